"""Relevance scorers: registered components that say how well a passage serves a query."""
