"""The generated benchmark in FlashRAG layout."""
