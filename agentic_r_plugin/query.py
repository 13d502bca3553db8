"""Query formulation: the retriever input for the agent's query (method section 3).

Only this module knows `[SEP]`. A retriever checkpoint records the name of its formulation; training, indexing, serving
and evaluation read it from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentic_r_plugin import components

SEPARATOR = " [SEP] "
"""BERT tokenizers map the inner token to their own separator; for other tokenizers it is plain text."""

DEFAULT_FORMULATION = "question_query"


def question_query(question: str, query: str, history: Sequence[str] = ()) -> str:
    """Question and query: `Q [SEP] q_i` (the paper's default)."""
    return f"{question}{SEPARATOR}{query}"


def query_only(question: str, query: str, history: Sequence[str] = ()) -> str:
    """The agent's query alone (ablation "without the question", and untrained retrievers)."""
    return query


def question_history_query(question: str, query: str, history: Sequence[str] = ()) -> str:
    """Question, the trajectory's earlier queries, and query (ablation "with history")."""
    return SEPARATOR.join([question, *history, query])


def retrieval_query(
    question: str, query: str, history: Sequence[str] = (), formulation: str = DEFAULT_FORMULATION
) -> str:
    """Retriever input x_i for query `query` of a trajectory that answers `question`.

    Args:
        question: the user's question Q.
        query: the agent's query q_i.
        history: the agent's earlier queries q_1 .. q_(i-1), oldest first.
        formulation: name of a registered `query_formulation`.

    Raises:
        UnknownComponentError: no such formulation.

    >>> retrieval_query("Who wrote Emma?", "Emma author")
    'Who wrote Emma? [SEP] Emma author'
    """
    return components.load("query_formulation", formulation)(question, query, history)
