"""The retriever: checkpoint and contrastive training (paper section 3.3)."""
