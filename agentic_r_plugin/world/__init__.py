"""The generated benchmark: a fictional world in FlashRAG layout, and the small agent warm-started on worlds of other seeds."""
