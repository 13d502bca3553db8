"""A query formulation."""


def query_question(question, query, history=()):
    """Query first, then the question."""
    return f"{query} | {question}"
