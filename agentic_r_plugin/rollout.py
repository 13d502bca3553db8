"""Drives many sessions at once with one language model and one retriever (data stages and FlashRAG pipeline).

A turn of all unfinished sessions is one batch for the model, then one batch for the retriever. Where the backend's
cache of earlier turns is small, further sessions start as others end. verl's agent loop drives the same `Session` one
trajectory at a time (`agent.agent_loop`).
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

from agentic_r_plugin.answers import exact_match, f1
from agentic_r_plugin.errors import RequestRefusedError, SearchError, SearchRefusedError
from agentic_r_plugin.llm.base import Completion, LLMBackend, Request, Sampling, Usage
from agentic_r_plugin.protocol import Search, Session
from agentic_r_plugin.records import Question, Trajectory
from agentic_r_plugin.search.base import Hit, SearchBackend, SearchRequest, depth_changes_order, search_each

OnSearch = Callable[[Session, list[Hit], list[Hit]], None]
"""Called with a session, the passages it is shown, and the passages found down to the depth asked for."""


@dataclass
class RolloutCost:
    """What a stage spent; added to as it runs."""

    rollouts: int = 0
    searches: int = 0
    prompt_tokens: int = 0
    """Tokens given to the model, each turn's whole prompt counted."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    reused: int = 0
    """Rollouts that were looked up, not run: their prompt had been run before."""
    judge_requests: int = 0
    """Prompts sent to a judge, repeated ones included."""
    judge_prompt_tokens: int = 0
    judge_cached_tokens: int = 0
    judge_generated_tokens: int = 0
    """Tokens of the judge, where its backend tells them."""
    retried_requests: int = 0
    """Requests to a server that failed in passing and were sent again."""
    usd: float = 0.0
    """What the requests cost, where the backend was told prices."""


def run_sessions(
    sessions: Sequence[Session],
    llm: LLMBackend,
    search: SearchBackend,
    *,
    topk: int,
    sampling: Sampling,
    cost: RolloutCost | None = None,
    depth: int = 0,
    on_search: OnSearch | None = None,
) -> None:
    """Drive every session to its end, in place. One that the model or the retriever refuses ends, and says so
    (`Session.refusal`); the others go on.

    Args:
        sessions: fresh sessions, or sessions that have just been shown a passage; all of one protocol.
        topk: passages the agent is shown for a search.
        sampling: how the model draws; the protocol's stop strings are added.
        cost: added to, when given.
        depth: passages to search for `on_search`, where that is more than `topk`; the agent sees the first `topk`.
        on_search: called with each session, the passages it is shown, and those found down to `depth`.

    Raises:
        BackendError: the model failed.
        SearchError: the retriever failed, or refuses this depth; no session takes that for an empty result.
    """
    cost = cost if cost is not None else RolloutCost()
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
        waiting: list[tuple[Session, Search]] = []
        for session, completion in zip(active, completions, strict=True):
            if isinstance(completion, RequestRefusedError):
                session.refused(str(completion))
                continue
            cost.prompt_tokens += completion.prompt_tokens
            cost.cached_tokens += completion.cached_tokens
            cost.generated_tokens += len(completion.token_ids)
            action = session.model_wrote(completion.token_ids)
            if isinstance(action, Search):
                waiting.append((session, action))
        _answer_searches(waiting, search, topk, depth, cost, on_search)
        active = [session for session in active if session.finished is None]


def _limit_to_model(sessions: Sequence[Session], longest: int | None) -> None:
    """Let no session get longer than the model runs (backends that have a `max_length`)."""
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
    """Sessions that can start: all, or as many as the backend keeps keys and values of.

    More of them would push each other's beginnings out of the cache, and every turn would be computed from its start.
    """
    kept_tokens: int | None = getattr(llm, "kept_tokens", None)
    held = sum(len(session.ids) + session.budget for session in active)
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
    """What the backend gives; one that raises for the whole batch where it refuses a prompt is asked one by one."""
    try:
        return llm.generate(requests, sampling)
    except RequestRefusedError as error:
        if len(requests) == 1:
            return [error]
    return [completion for request in requests for completion in _generate(llm, [request], sampling)]


@contextmanager
def _paid(llm: LLMBackend, cost: RolloutCost) -> Iterator[None]:
    """Add what the backend's own meter says beside tokens: repeated requests and money."""
    usage: Usage = getattr(llm, "usage", None) or Usage()
    retried, usd = usage.retried, usage.usd
    yield
    cost.retried_requests += usage.retried - retried
    cost.usd += usage.usd - usd


def _answer_searches(
    waiting: Sequence[tuple[Session, Search]],
    search: SearchBackend,
    topk: int,
    depth: int,
    cost: RolloutCost,
    on_search: OnSearch | None,
) -> None:
    if not waiting:
        return
    requests = [search_request(session, action) for session, action in waiting]
    cost.searches += len(requests)
    for (session, _), found in zip(waiting, _find(search, requests, topk, depth), strict=True):
        if isinstance(found, SearchRefusedError):
            session.search_failed(str(found))
            continue
        hits, deeper = found
        if on_search is not None:
            on_search(session, hits, deeper)
        session.found([hit.passage for hit in hits], [hit.score for hit in hits])


def _find(
    search: SearchBackend, requests: Sequence[SearchRequest], topk: int, depth: int
) -> list[tuple[list[Hit], list[Hit]] | SearchRefusedError]:
    """For each request its best `topk` passages and its best `depth`, from one search where the backend allows it."""
    found = search_each(search, requests, max(topk, depth))
    if depth <= topk:
        return [hits if isinstance(hits, SearchRefusedError) else (hits, hits[:depth]) for hits in found]
    pairs: list[tuple[list[Hit], list[Hit]] | SearchRefusedError] = []
    again = [isinstance(hits, SearchRefusedError) or depth_changes_order(search) for hits in found]
    shown = iter(search_each(search, [request for request, ask in zip(requests, again, strict=True) if ask], topk))
    for hits, ask in zip(found, again, strict=True):
        first = next(shown) if ask or isinstance(hits, SearchRefusedError) else hits[:topk]
        if isinstance(first, SearchRefusedError):
            pairs.append(first)
        elif isinstance(hits, SearchRefusedError):  # the query is good, and only the depth is refused
            raise SearchError(f"the retriever refuses {depth} passages for a search, and gives {topk}: {hits}")
        else:
            pairs.append((first, hits))
    return pairs


def search_request(session: Session, action: Search) -> SearchRequest:
    """The request for a session's pending search, with the question and the earlier queries."""
    history = (*session.history, *(turn.query for turn in session.turns))
    return SearchRequest(query=action.query, question=session.question, history=history)


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
    )
