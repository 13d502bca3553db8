"""The likelihood of the gold answer directly after a candidate: a signal of correctness without a rollout.

For each candidate, one prefill of the trajectory up to the query, the information block with that one passage, and the
turn that gives the first gold answer; the value is the log-probability of that answer. A thought that the chat template
has opened is ended before it. Searches that the agent would make after the candidate do not enter it. REPLUG and
IG-Search use the same signal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Continuation, LLMBackend, count_tokens
from agentic_r_plugin.llm.reply import thought_end
from agentic_r_plugin.records import Candidates, Correctness
from agentic_r_plugin.session import Session

if TYPE_CHECKING:
    from agentic_r_plugin.data.continuations import Continuations


def answer_likelihoods(sessions: Sequence[tuple[Session, str]], llm: LLMBackend, cost: Cost) -> list[float | None]:
    """Log-likelihood of an answer as the next turn of each session; None where it leaves no room or is refused.

    Args:
        sessions: a session that has just been shown its passages, and the answer.

    Raises:
        ConfigError: the backend does not know the probability of a given text.
        BackendError: the model or its server failed.
    """
    if not hasattr(llm, "likelihoods"):
        raise ConfigError(
            f"correctness: the llm backend {type(llm).__name__} gives no likelihood of a text; use hf, vllm or openai"
        )
    asked: dict[int, Continuation] = {}
    for place, (session, answer) in enumerate(sessions):
        before, rest = session.protocol.answered(answer)
        before = thought_end(session.segments[-1].text) + before
        # Encoded apart: only the answer and its end are scored, not the tags before it.
        prompt, ids = (*session.ids, *session.codec.encode(before)), tuple(session.codec.encode(rest))
        if session.finished is None and len(prompt) + len(ids) <= session.limits.max_tokens:
            asked[place] = Continuation(prompt_ids=prompt, token_ids=ids)
    results: list[float | None] = [None] * len(sessions)
    for place, found in zip(asked, llm.likelihoods(list(asked.values())) if asked else [], strict=True):
        if not isinstance(found, RequestRefusedError):
            count_tokens(cost, found)
            results[place] = sum(found.logprobs)
    return results


def by_likelihood(
    queries: Sequence[tuple[Candidates, Sequence[Sequence[str]]]], continuations: Continuations
) -> Iterator[list[Correctness]]:
    """Correctness of each query's candidates without rollouts, in retrieval order.

    `em` is 1 for the candidate of highest likelihood, if the gold answer is likelier after it than without passages.

    Args:
        queries: each query with its candidates in steps; all are scored.

    Raises:
        ConfigError, BackendError, RecordError: as `Continuations.likelihoods`.
    """
    for (query, steps), scores in zip(queries, _scores(queries, continuations, baseline=True), strict=True):
        known = {passage: score for passage, score in scores.items() if score is not None}
        best = max((passage for passage in known if passage is not None), key=lambda one: known[one], default=None)
        # Without a baseline (no room for it, or the model refused it) the best candidate counts as correct.
        if best is not None and None in known and known[best] <= known[None]:
            best = None
        wanted = {passage for step in steps for passage in step}
        yield [
            Correctness(
                id=query.id, turn=query.turn, passage_id=passage.id, em=int(passage.id == best), answer=None,
                searches=0, log_likelihood=known.get(passage.id),
            )
            for passage in query.passages
            if passage.id in wanted
        ]  # fmt: skip


def in_order_of_likelihood(
    queries: Sequence[tuple[Candidates, Sequence[Sequence[str]]]], continuations: Continuations
) -> list[tuple[Candidates, list[list[str]]]]:
    """The queries with one candidate per step: levels as they are, and within a level by falling likelihood.

    Raises:
        ConfigError, BackendError, RecordError: as `Continuations.likelihoods`.
    """
    ordered = []
    for (query, levels), scores in zip(queries, _scores(queries, continuations, baseline=False), strict=True):
        # A candidate without a score is tried last. The sort is stable, so equal scores keep the retrieval order.
        rank = {passage: -math.inf if score is None else score for passage, score in scores.items()}
        tried = [one for level in levels for one in sorted(level, key=rank.__getitem__, reverse=True)]
        ordered.append((query, [[one] for one in tried]))
    return ordered


def _scores(
    queries: Sequence[tuple[Candidates, Sequence[Sequence[str]]]], continuations: Continuations, *, baseline: bool
) -> list[dict[str | None, float | None]]:
    """Per query, the log-likelihood after each candidate of its steps, and after none (key None) if wanted."""
    places: list[tuple[int, str | None]] = [
        (index, passage)
        for index, (_, steps) in enumerate(queries)
        for passage in (*([None] if baseline and steps else []), *(passage for step in steps for passage in step))
    ]
    found: list[dict[str | None, float | None]] = [{} for _ in queries]
    scores = continuations.likelihoods([(queries[index][0], passage) for index, passage in places])
    for (index, passage), score in zip(places, scores, strict=True):
        found[index][passage] = score
    return found
