"""Retrieval: corpus, index, backends, service and client."""
