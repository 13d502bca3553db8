"""Evaluation in FlashRAG: adapters, metrics, statistics, report."""
