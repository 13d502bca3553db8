"""Continues a trajectory from one candidate alone, and returns how it ends (method section 4, step 5)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from agentic_r_plugin.cost import Cost
from agentic_r_plugin.data.inputs import PassageStore
from agentic_r_plugin.data.likelihood import answer_likelihoods
from agentic_r_plugin.llm.base import LLMBackend, Sampling
from agentic_r_plugin.protocol import AgentProtocol, Limits, Prefix
from agentic_r_plugin.records import Candidates, Passage
from agentic_r_plugin.rollout import answer_calls, run_sessions
from agentic_r_plugin.search.base import Hit, SearchBackend, SearchRequest, open_documents
from agentic_r_plugin.session import PREFIX_SEARCH, Session


@dataclass(frozen=True, kw_only=True)
class Ending:
    """End of a trajectory that was continued from one candidate."""

    answer: str | None
    searches: int
    refusal: str | None = None
    """Why the rollout was impossible: the model or the retriever refused it."""


class Continuations:
    """Continues from (query, candidate) pairs, greedily and in batches; equal prompts are run once and cached.

    Args:
        search: the agent's retriever, for searches after the candidate.
        limits: limits of a trajectory, including its prefix.
        topk: passages shown per later search.
        max_kept: outcomes in the cache. Equal prompts belong to one question, whose queries are adjacent in the input.
    """

    def __init__(
        self,
        llm: LLMBackend,
        search: SearchBackend,
        passages: PassageStore,
        *,
        protocol: AgentProtocol,
        limits: Limits,
        topk: int = 3,
        cost: Cost | None = None,
        max_kept: int = 16_384,
    ) -> None:
        self.llm, self.search, self.passages, self.protocol, self.limits = llm, search, passages, protocol, limits
        self.topk, self.cost, self.max_kept = topk, cost if cost is not None else Cost(), max_kept
        self._kept: dict[bytes, Ending] = {}
        self._earlier = _Remembered(search, self.cost)

    def run(self, pairs: Sequence[tuple[Candidates, str]]) -> list[Ending]:
        """One outcome per pair.

        Raises:
            BackendError, SearchError: the agent or the retriever failed.
            RecordError: the corpus does not hold a candidate.
        """
        sessions = [self._session(query, passage) for query, passage in pairs]
        keys = [_key(session) for session in sessions]
        # Decoding is greedy, so equal prompts have equal outcomes: run each distinct prompt once.
        fresh = {key: session for key, session in zip(keys, sessions, strict=True) if key not in self._kept}
        self.cost.reused += len(pairs) - len(fresh)
        run_sessions(list(fresh.values()), self.llm, self.search, topk=self.topk, sampling=Sampling(), cost=self.cost)
        # Read cached outcomes before the eviction below can remove them.
        done = {key: self._kept[key] for key in keys if key in self._kept}
        for key, session in fresh.items():
            done[key] = self._kept[key] = _ending(session)
        # Dicts keep insertion order: the first key is the oldest entry.
        while len(self._kept) > self.max_kept:
            self._kept.pop(next(iter(self._kept)))
        return [done[key] for key in keys]

    def likelihoods(self, pairs: Sequence[tuple[Candidates, str | None]]) -> list[float | None]:
        """Log-likelihood of the first gold answer directly after each candidate, or after a block without passages.

        None where no room is left, or the model refuses the text.

        Raises:
            ConfigError, BackendError: as `likelihood.answer_likelihoods`.
            RecordError: the corpus does not hold a candidate.
        """
        sessions = [(self._session(query, passage), query.golden_answers[0]) for query, passage in pairs]
        return answer_likelihoods(sessions, self.llm, self.cost)

    def _session(self, query: Candidates, passage: str | None) -> Session:
        prefix = Prefix(
            query=query.query,
            text=query.prefix,
            turn_start=query.turn_start,
            opens=query.opens,
            searches=query.turn,  # turns count searches from 1, so this one is included
            history=query.history,
            last_shown=query.last_shown,
        )
        session = Session(self.protocol, self.llm.codec, self.limits, query.question, prefix)
        while (action := session.pending) is not None and action != PREFIX_SEARCH:
            # An earlier call of the prefix's last turn, which has the same result for all candidates of the query.
            # The cost is discarded: `_Remembered` counts the searches that are really carried out.
            answer_calls([(session, action)], self._earlier, self.topk, 0, Cost(), None)
        if session.finished is None:
            session.found([] if passage is None else [self.passages.by_id(passage)])
        return session


class _Remembered:
    """A retriever that carries out equal searches once, and opens each document once; `cost` counts these."""

    def __init__(self, search: SearchBackend, cost: Cost, most: int = 1024) -> None:
        self._search, self._cost = search, cost
        self._hits, self._document = lru_cache(most)(self._find), lru_cache(most)(self._open)

    def _find(self, request: SearchRequest, topk: int) -> list[Hit]:
        self._cost.searches += 1
        return self._search.search([request], topk)[0]

    def _open(self, identifier: str) -> Passage | None:
        return open_documents(self._search, [identifier])[0]

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        return [self._hits(request, topk) for request in requests]

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        return [self._document(identifier) for identifier in ids]

    def fingerprint(self) -> str:
        return self._search.fingerprint()

    def close(self) -> None:
        """Do nothing: the retriever belongs to the caller."""


def _key(session: Session) -> bytes:
    """Hash of everything that a greedy continuation depends on: the model's input and the inputs of a search."""
    given = (session.ids, session.searches, session.opens, session.question, session.earlier_queries)
    return hashlib.blake2b(repr(given).encode(), digest_size=16).digest()


def _ending(session: Session) -> Ending:
    assert session.finished is not None
    return Ending(answer=session.finished.answer, searches=len(session.turns), refusal=session.refusal)
