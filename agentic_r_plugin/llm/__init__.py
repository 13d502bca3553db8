"""Language models behind one small interface: token ids in, token ids out, in batches."""
