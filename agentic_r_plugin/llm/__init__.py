"""Language models behind one small interface: batches of token ids in, token ids out."""
