"""Query formulation: the retriever input for the agent's query (method section 3).

Only this module knows `[SEP]`. A retriever checkpoint records the name of its formulation; training, indexing, serving
and evaluation read it from there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from agentic_r_plugin import components

if TYPE_CHECKING:
    from agentic_r_plugin.records import Candidates, Group

SEPARATOR = " [SEP] "
"""BERT tokenizers map the inner token to their own separator; for other tokenizers it is plain text."""

DEFAULT_FORMULATION = "question_query"

MAX_REASONING = 20_000
"""Characters of a reasoning that are read, its last ones; a retrieval service takes no longer texts by default."""

_LONGEST_WORD = 40
"""Characters after a cut in which to look for a space."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """One search of the agent, with all that a formulation may read. Each retriever uses its own formulation."""

    query: str
    question: str | None = None
    """The user's question; None in a search that does not name it."""
    history: tuple[str, ...] = ()
    """The trajectory's earlier queries, oldest first."""
    reasoning: str = ""
    """What the agent wrote in this turn before the query, without tags; empty if it wrote nothing."""

    @classmethod
    def of(cls, record: Candidates | Group) -> SearchRequest:
        """The search that a record is about."""
        return cls(query=record.query, question=record.question, history=record.history, reasoning=record.reasoning)


def question_query(request: SearchRequest) -> str:
    """Question and query: `Q [SEP] q_i` (the paper's default)."""
    return _joined(request.question, request.query)


def query_only(request: SearchRequest) -> str:
    """The agent's query alone (ablation "without the question", and untrained retrievers)."""
    return request.query


def question_history_query(request: SearchRequest) -> str:
    """Question, the trajectory's earlier queries, and query (ablation "with history")."""
    return _joined(request.question, *request.history, request.query)


def reasoning_query(request: SearchRequest) -> str:
    """The agent's reasoning and its query (AgentIR, arXiv 2603.04384)."""
    return _labelled(Reasoning=request.reasoning, Query=request.query)


def question_reasoning_query(request: SearchRequest) -> str:
    """Question, the agent's reasoning and its query."""
    return _labelled(Question=request.question, Reasoning=request.reasoning, Query=request.query)


def _joined(*parts: str | None) -> str:
    return SEPARATOR.join(part for part in parts if part is not None)


def _labelled(**parts: str | None) -> str:
    """Named parts, one a paragraph; empty ones are left out."""
    return "\n\n".join(f"{name}: {text}" for name, text in parts.items() if text)


def retriever_input(
    request: SearchRequest, formulation: str, *, count_tokens: Callable[[str], int] | None = None, max_tokens: int = 0
) -> str:
    """The text that a retriever with this formulation encodes, before its prefix.

    A search with neither question nor reasoning is the query alone, whatever the formulation. If the text is longer
    than the retriever reads, the reasoning loses its beginning until the text fits: a retriever cuts the end of a text,
    which is the query. The end of the reasoning is kept because it leads to the query.

    Args:
        request: the search.
        formulation: name of a registered `query_formulation`. A function of three arguments (question, query, history),
            the interface of earlier versions, is called with these, and not without a question.
        count_tokens: number of tokens of a text for the retriever, prefix and special tokens included; None: the whole
            text is wanted.
        max_tokens: tokens that the retriever reads.

    Raises:
        UnknownComponentError: no such formulation.
    """
    formulate: Callable[..., str] = components.load("query_formulation", formulation)
    if request.question is None and (not request.reasoning or _takes_three(formulation)):
        return request.query
    if _takes_three(formulation):
        return formulate(request.question, request.query, request.history)
    request = replace(request, reasoning=request.reasoning[-MAX_REASONING:])
    text = formulate(request)
    if count_tokens is None or not request.reasoning or (tokens := count_tokens(text)) <= max_tokens:
        return text
    # Tokens of question and query, which are never cut.
    others = count_tokens(formulate(replace(request, reasoning="")))
    while request.reasoning and tokens > max_tokens:
        # Tokens per character vary, so the cut is an estimate; the loop repeats until the text fits.
        share = max(0, max_tokens - others) / max(1, tokens - others)
        request = replace(request, reasoning=_last_part(request.reasoning, share))
        text = formulate(request)
        tokens = count_tokens(text)
    return text


def _last_part(text: str, share: float) -> str:
    """The last `share` of a text, from the beginning of a word where there is one nearby; always shorter.

    >>> _last_part("one two three four", 0.5), _last_part("一二三四", 0.5), _last_part("x", 0.9)
    ('four', '三四', '')
    """
    kept = text[len(text) - min(len(text) - 1, int(len(text) * share)) :]
    start, space, rest = kept.partition(" ")
    return rest if space and len(start) < _LONGEST_WORD else kept


def retrieval_query(
    question: str,
    query: str,
    history: Sequence[str] = (),
    formulation: str = DEFAULT_FORMULATION,
    *,
    reasoning: str = "",
) -> str:
    """Retriever input x_i for query `query` of a trajectory that answers `question`.

    Args:
        question: the user's question Q.
        query: the agent's query q_i.
        history: the agent's earlier queries q_1 .. q_(i-1), oldest first.
        formulation: name of a registered `query_formulation`.
        reasoning: what the agent wrote in this turn before the query.

    Raises:
        UnknownComponentError: no such formulation.

    >>> retrieval_query("Who wrote Emma?", "Emma author")
    'Who wrote Emma? [SEP] Emma author'
    >>> retrieval_query("Who wrote Emma?", "Emma author", formulation="reasoning_query", reasoning="A novel.")
    'Reasoning: A novel.\\n\\nQuery: Emma author'
    """
    request = SearchRequest(question=question, query=query, history=tuple(history), reasoning=reasoning)
    return retriever_input(request, formulation)


@cache
def _takes_three(formulation: str) -> bool:
    """Whether a formulation has the interface of earlier versions: question, query and (optionally) history."""
    signature = inspect.signature(components.load("query_formulation", formulation))
    return sum(item.default is item.empty for item in signature.parameters.values()) > 1


@cache
def needs_reasoning(formulation: str) -> bool:
    """Whether a formulation's text depends on the agent's reasoning.

    Raises:
        UnknownComponentError: no such formulation.

    >>> needs_reasoning("question_query"), needs_reasoning("reasoning_query")
    (False, True)
    """
    without, with_it = (SearchRequest(question="Q", query="q", reasoning=text) for text in ("", "r"))
    return retriever_input(without, formulation) != retriever_input(with_it, formulation)
