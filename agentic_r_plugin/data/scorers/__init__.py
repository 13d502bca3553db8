"""Relevance scorers: registered components that score how well a passage serves a query."""
