"""A query formulation."""


def query_question(request):
    """Query first, then the question."""
    return f"{request.query} | {request.question}"
