"""The generated benchmark in FlashRAG layout, and the small agent, warm-started on worlds with other seeds."""
