"""Drives many sessions at once with one language model and one retriever (data stages and FlashRAG pipeline).

Each turn of all unfinished sessions is one batch for the model, then one batch for the retriever. If the backend's
cache of earlier turns is small, further sessions start as others end. verl's agent loop drives the same `Session`, one
trajectory at a time (`agent.agent_loop`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from agentic_r_plugin.answers import exact_match, f1
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import RequestRefusedError, SearchError, SearchRefusedError
from agentic_r_plugin.llm.base import Completion, LLMBackend, Request, Sampling, Usage, count_tokens
from agentic_r_plugin.protocol import Open, Search
from agentic_r_plugin.records import Question, Trajectory
from agentic_r_plugin.search.base import (
    Hit,
    SearchBackend,
    SearchRequest,
    depth_changes_order,
    open_documents,
    search_each,
)
from agentic_r_plugin.session import Session

OnSearch = Callable[[Session, list[Hit], list[Hit]], None]
"""Called with a session, the passages shown to it, and all passages found (`depth` of them)."""


def run_sessions(
    sessions: Sequence[Session],
    llm: LLMBackend,
    search: SearchBackend,
    *,
    topk: int,
    sampling: Sampling,
    cost: Cost | None = None,
    depth: int = 0,
    on_search: OnSearch | None = None,
) -> None:
    """Drive every session to its end, in place. A session that the model or the retriever refuses ends with the reason
    in `Session.refusal`; the others continue.

    Args:
        sessions: new sessions, or sessions that have just been shown a passage; all with the same protocol.
        topk: passages shown to the agent per search.
        sampling: sampling parameters; the protocol's stop strings are added.
        cost: updated in place, if given.
        depth: passages to search for `on_search`, if more than `topk`; the agent sees the first `topk`.
        on_search: called with each session, the passages shown to it, and those found down to `depth`.

    Raises:
        BackendError: the model failed.
        SearchError: the retriever failed, or refuses this depth; no session sees this as an empty result.
    """
    cost = cost if cost is not None else Cost()
    cost.rollouts += len(sessions)
    _limit_to_model(sessions, getattr(llm, "max_length", None))
    waiting_to_start = deque(session for session in sessions if session.finished is None)
    active: list[Session] = []
    while waiting_to_start or active:
        active += _admitted(waiting_to_start, active, llm)
        sampling = replace(sampling, stop=active[0].protocol.stop)
        requests = [Request(prompt_ids=tuple(s.ids), max_tokens=s.budget) for s in active]
        with _paid(llm, cost):
            completions = _generate(llm, requests, sampling)
        waiting: list[tuple[Session, Search | Open]] = []
        for session, completion in zip(active, completions, strict=True):
            if isinstance(completion, RequestRefusedError):
                session.refused(str(completion))
                continue
            count_tokens(cost, completion)
            action = session.model_wrote(completion.token_ids)
            if isinstance(action, Search | Open):
                waiting.append((session, action))
        while waiting:  # a turn may hold several calls
            waiting = answer_calls(waiting, search, topk, depth, cost, on_search)
        active = [session for session in active if session.finished is None]


def _limit_to_model(sessions: Sequence[Session], longest: int | None) -> None:
    """Limit sessions to the model's maximum length (for backends that have a `max_length`)."""
    for session in sessions:
        if session.finished is None and longest is not None and session.limits.max_tokens > longest:
            _say_limited(session.limits.max_tokens, longest)
            session.limits = replace(session.limits, max_tokens=longest)
            if session.budget < 1:
                session.refused(f"the prompt takes {len(session.ids)} tokens and the model runs {longest} at most")


@cache
def _say_limited(limit: int, longest: int) -> None:
    print(
        f"agentic-r: limits.max_tokens={limit}, but the model runs {longest} tokens at most: trajectories end there",
        file=sys.stderr,
    )


def _admitted(waiting: deque[Session], active: Sequence[Session], llm: LLMBackend) -> Iterator[Session]:
    """Sessions that can start: all, or as many as fit in the backend's key-value cache.

    More sessions would evict each other's prefixes from the cache, and every turn would be computed from its start.
    """
    kept_tokens: int | None = getattr(llm, "kept_tokens", None)
    # What each session holds after its next turn; a prefix that sessions share counts for each of them.
    held = sum(len(session.ids) + session.budget for session in active)
    # One session always runs, even if it alone exceeds the cache.
    first = not active
    while waiting:
        held += len(waiting[0].ids) + waiting[0].budget
        if kept_tokens is not None and held > kept_tokens and not first:
            return
        first = False
        yield waiting.popleft()


def _generate(
    llm: LLMBackend, requests: Sequence[Request], sampling: Sampling
) -> Sequence[Completion | RequestRefusedError]:
    """Completions of the backend; if it refuses the whole batch because of one prompt, prompts are sent one by one."""
    try:
        return llm.generate(requests, sampling)
    except RequestRefusedError as error:
        if len(requests) == 1:
            return [error]
    return [completion for request in requests for completion in _generate(llm, [request], sampling)]


@contextmanager
def _paid(llm: LLMBackend, cost: Cost) -> Iterator[None]:
    """Add the backend's own counts of retried requests and money to the cost."""
    usage: Usage = getattr(llm, "usage", None) or Usage()
    retried, usd = usage.retried, usage.usd
    yield
    cost.retried_requests += usage.retried - retried
    cost.usd += usage.usd - usd


def answer_calls(
    waiting: Sequence[tuple[Session, Search | Open]],
    search: SearchBackend,
    topk: int,
    depth: int,
    cost: Cost,
    on_search: OnSearch | None,
) -> list[tuple[Session, Search | Open]]:
    """Carry out one call of each session; return the sessions whose turn holds another one, with that call."""
    # One call of each session per round: a call may depend on the one before it (a rank in its passages).
    opening = [(session, action.document) for session, action in waiting if isinstance(action, Open)]
    documents = open_documents(search, [identifier for _, identifier in opening])
    answered = [
        (session, session.found([document] if document is not None else []))
        for (session, _), document in zip(opening, documents, strict=True)
    ]
    searching = [(session, action) for session, action in waiting if isinstance(action, Search)]
    requests = [search_request(session, action) for session, action in searching]
    cost.searches += len(requests)
    for (session, _), found in zip(searching, _find(search, requests, topk, depth), strict=True):
        if isinstance(found, SearchRefusedError):
            session.search_failed(str(found))
            continue
        hits, deeper = found
        if on_search is not None:
            on_search(session, hits, deeper)
        answered.append((session, session.found([hit.passage for hit in hits], [hit.score for hit in hits])))
    return [(session, action) for session, action in answered if isinstance(action, Search | Open)]


def _find(
    search: SearchBackend, requests: Sequence[SearchRequest], topk: int, depth: int
) -> list[tuple[list[Hit], list[Hit]] | SearchRefusedError]:
    """Best `topk` and best `depth` passages per request, from one search where the backend allows it."""
    found = search_each(search, requests, max(topk, depth))
    if depth <= topk:
        return [hits if isinstance(hits, SearchRefusedError) else (hits, hits[:depth]) for hits in found]
    pairs: list[tuple[list[Hit], list[Hit]] | SearchRefusedError] = []
    # A second search, to the agent's depth: where the order depends on the depth, or the depth may be what was refused.
    again = [isinstance(hits, SearchRefusedError) or depth_changes_order(search) for hits in found]
    shown = iter(search_each(search, [request for request, ask in zip(requests, again, strict=True) if ask], topk))
    for hits, ask in zip(found, again, strict=True):
        first = next(shown) if ask or isinstance(hits, SearchRefusedError) else hits[:topk]
        if isinstance(first, SearchRefusedError):
            pairs.append(first)
        elif isinstance(hits, SearchRefusedError):  # the query is accepted; only the depth is refused
            raise SearchError(f"the retriever refuses {depth} passages for a search, and gives {topk}: {hits}")
        else:
            pairs.append((first, hits))
    return pairs


def search_request(session: Session, action: Search) -> SearchRequest:
    """Search request for a session's pending search, with the question, the earlier queries and the reasoning."""
    history, reasoning = session.earlier_queries, action.reasoning
    return SearchRequest(query=action.query, question=session.question, history=history, reasoning=reasoning)


def to_trajectory(session: Session, question: Question) -> Trajectory:
    """The record of a finished session.

    Raises:
        ValueError: the session is not finished.
    """
    if session.finished is None:
        raise ValueError("the session is not finished")
    answer = session.finished.answer
    return Trajectory(
        id=question.id,
        question=question.question,
        golden_answers=question.golden_answers,
        turns=tuple(session.turns),
        answer=answer,
        stop_reason=session.finished.stop_reason,
        em=int(exact_match(answer, question.golden_answers)),
        f1=f1(answer, question.golden_answers),
        text=session.text,
        malformed_turns=session.malformed,
        prompt_tokens=len(session.prompt_ids),
        generated_tokens=session.generated_tokens,
        runs=() if session.protocol.text_shows_authors else tuple(len(segment.text) for segment in session.segments),
    )
