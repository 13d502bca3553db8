"""Evaluation in FlashRAG: adapters, metrics, statistics and the matrix of results."""
