"""The generated benchmark in FlashRAG layout, and the small agent warm-started on worlds of other seeds."""
