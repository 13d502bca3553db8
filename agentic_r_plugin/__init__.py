"""Agentic-R for verl and FlashRAG: train a search agent, learn a retriever from its own queries, repeat."""

__version__ = "0.1.0"
