"""verl's agent loop for Agentic-R: one trajectory, driven by the protocol's `Session` (method section 2).

The loop is registered only through the YAML file at `rollout.agent.agent_loop_config_path`, which `launch` writes:
verl's `@register` decorator would add an entry without arguments under the same name, and each overwrites the other.

The loop works on token ids throughout: ids from the engine are passed on unchanged, the mask marks the ids written by
the model, and ids written by the environment have log-probability 0.0. The answer, and therefore the reward, is taken
from the model's ids only.

verl traces trajectories, searches and opened documents if `rollout.trace.backend` is set (weave, mlflow, trackio).

A trajectory whose search failed must not contribute to learning. Its mask is all zeros, so it adds nothing to the sum
or the count of any masked token mean (policy loss, value loss, KL, entropy, advantage whitening). With GAE and
`loss_agg_mode=token-mean` this is exact in every verl trainer. A mask cannot handle two cases, so our trainer
(`agent.trainer`) also removes these trajectories from the batch: a mini-batch that is fully masked would divide by
zero, and group baselines or sequence means would still count the trajectory.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from types import MappingProxyType
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.rollout_trace import rollout_trace_op

from agentic_r_plugin.agent.rewards import Outcome, RewardSum
from agentic_r_plugin.credentials import read_secret
from agentic_r_plugin.errors import BackendError, ConfigError, SearchError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Action, Codec, Finished, Limits, Open, Search, load_protocol
from agentic_r_plugin.records import Passage, Question, StopReason
from agentic_r_plugin.rollout import search_request, to_trajectory
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.session import Session

_log = logging.getLogger(__name__)


class SearchAgentLoop(AgentLoopBase):
    """Think, search, read, answer. verl creates one instance per trajectory.

    Args:
        protocol: name of a registered agent protocol.
        protocol_options: options of the protocol that differ from its own.
        limits: fields of `protocol.Limits`.
        retrieval_url: address of the retrieval service.
        retrieval_token_env: environment variable that holds the service's token; empty if it needs none. The value is
            read here, in the Ray worker, because a runtime environment would expose it in Ray's and verl's logs.
        topk: passages shown per search.
        max_concurrent_searches: maximum number of concurrent searches per agent-loop worker.
        search_timeout_s: timeout of one search attempt.
        search_retries: attempts after the first, with exponential backoff, before the search counts as failed.
        mask_observations: False trains on the environment's tokens too (ablation).
        reward: name of a registered reward -> its weight; empty: exact match alone.
        reward_options: name of a registered reward -> its options.
        seed: base of the sampling seed of each request; None lets the engine choose. With a seed, a step repeated
            after a resume samples the same tokens.

    Raises:
        ConfigError: the token's variable is not set in this Ray worker.
    """

    def __init__(
        self,
        *args: Any,
        protocol: str,
        limits: Mapping[str, int],
        retrieval_url: str,
        retrieval_token_env: str = "",
        topk: int = 3,
        max_concurrent_searches: int = 64,
        search_timeout_s: float = 60.0,
        search_retries: int = 5,
        mask_observations: bool = True,
        reward: Mapping[str, float] = MappingProxyType({}),
        reward_options: Mapping[str, Any] = MappingProxyType({}),
        protocol_options: Mapping[str, Any] = MappingProxyType({}),
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reward = RewardSum(reward, reward_options)
        self.protocol = load_protocol(protocol, protocol_options)
        self.limits = Limits(**limits)
        self.codec = TokenizerCodec(self.tokenizer)
        self.topk, self.seed, self.mask_observations = topk, seed, mask_observations
        self.client, self.searching = _shared_client(
            retrieval_url, _token(retrieval_token_env), max_concurrent_searches, search_timeout_s, search_retries
        )

    @rollout_trace_op
    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Run one trajectory.

        Args:
            sampling_params: verl's sampling parameters; shared between trajectories and never modified.
            kwargs: fields of the data set row. `extra_info` holds `id`, `question` and `golden_answers`, or the row
                has Search-R1's or verl's layout (`forms.question_fields`).

        Returns:
            See `_output`; `extra_fields` also holds what `_rewarded` returns.

        Raises:
            BackendError: the engine returned no tokens, or log-probabilities that do not match the tokens.
            ConfigError: the prompt alone fills `limits.max_tokens`.
            TrainingError: a reward is not a finite number.
        """
        question = _question(kwargs)
        session = Session(self.protocol, self.codec, self.limits, question.question)
        if session.refusal is not None:
            raise ConfigError(session.refusal)
        log = _EngineLog()
        # One id for all turns: verl sends them to one server, which has the earlier turns in its prefix cache.
        request_id = uuid4().hex
        while session.finished is None:
            params = self._turn_params(sampling_params, session, kwargs)
            started = perf_counter()
            turn = await self.server_manager.generate(
                request_id=request_id, prompt_ids=session.ids, sampling_params=params
            )
            # Cut first: log and session must get the same tokens.
            cut_at_stop(turn, self.protocol.stop, self.codec)
            log.took(turn, perf_counter() - started)
            action: Action | None = session.model_wrote(turn.token_ids)
            # Every other outcome (answer, malformed turn, limit reached) is handled inside the session.
            while isinstance(action, Search | Open):
                started = perf_counter()
                action = await self._carry_out(session, action)
                log.search_s += perf_counter() - started
            log.pad(len(session.response_ids))
        output = _output(session, question, log, _place(kwargs), mask_observations=self.mask_observations)
        output.extra_fields |= await _rewarded(self.reward, session, question)
        return output

    def _turn_params(self, shared: Mapping[str, Any], session: Session, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling parameters of the next turn: verl's, with stop strings, the turn's budget and its seed."""
        sglang = self.rollout_config.get("name") == "sglang"  # our CPU engine uses vLLM's names
        params = {**shared, "stop": list(self.protocol.stop), "max_tokens": session.budget}
        if sglang:
            params["no_stop_trim"] = True
        else:  # stop strings may consist of special tokens
            params |= {"include_stop_str_in_output": True, "skip_special_tokens": False}
        if self.seed is not None and "global_steps" in fields:
            # Step, row, sample and number of segments name one request of the run.
            seed = request_seed(self.seed, fields["global_steps"], *_place(fields), len(session.segments))
            params["sampling_seed" if sglang else "seed"] = seed
        return params

    async def _carry_out(self, session: Session, action: Search | Open) -> Search | Open | Finished | None:
        """Search or open a document, and give the session the result; returns what `Session.found` returns."""
        try:
            # Trajectories wait here, not for a connection: the client's timeout would count that wait.
            async with self.searching:
                if isinstance(action, Open):
                    document = await self._open(action.document)
                    return session.found([document] if document is not None else [])
                hits = await self._search(search_request(session, action))
        except SearchError as error:
            _log.warning("search failed, the trajectory is left out of the loss: %s", error)
            return session.search_failed()
        return session.found([hit.passage for hit in hits], [hit.score for hit in hits])

    @rollout_trace_op
    async def _search(self, request: SearchRequest) -> list[Hit]:
        (hits,) = await self.client.asearch([request], self.topk)
        return hits

    @rollout_trace_op
    async def _open(self, document: str) -> Passage | None:
        (found,) = await self.client.adocuments([document])
        return found


async def _rewarded(reward: RewardSum, session: Session, question: Question) -> dict[str, Any]:
    """`reward`, and where rewards were named `reward_weights` and `reward_parts`.

    A trajectory whose search failed is not trained on and gets 0.
    """
    assert session.finished is not None
    outcome = Outcome(
        question=question.question,
        golden_answers=question.golden_answers,
        answer=session.finished.answer,
        stop_reason=session.finished.stop_reason,
        shown=tuple(f"{passage.title}\n{passage.text}" for passage in session.passages_read),
        searches=session.searches,
        turns=sum(segment.by_model for segment in session.segments),
        malformed_turns=session.malformed,
    )
    if outcome.stop_reason is StopReason.SEARCH_FAILED:
        parts = dict.fromkeys(reward.weights, 0.0)
    else:
        parts = await asyncio.to_thread(reward.parts, outcome)  # a judge would block the other trajectories
    recorded = {"reward_weights": reward.weights, "reward_parts": parts} if reward.with_parts else {}
    return {"reward": reward.total(parts), **recorded}


def cut_at_stop(output: Any, stop: Sequence[str], codec: Codec) -> None:
    """Drop the tokens after the one that completed a stop string.

    Engines normally stop there. The asynchronous trainers, however, abort requests and resume them from the tokens
    generated so far (verl's `workers/rollout/llm_server.py`), and a resumed engine misses a stop string that began
    before the abort.

    Args:
        output: verl's `TokenOutput`; `token_ids` and `log_probs` are modified in place.
    """
    ids = output.token_ids

    def stopped(count: int) -> bool:
        text = codec.decode(ids[:count])
        return any(item in text for item in stop)

    # The usual case: the last token completed a stop string, or there is none.
    if not stopped(len(ids) - 1):
        return
    # Once a prefix holds a stop string, every longer prefix does too, so the shortest one is found by bisection.
    count = bisect_left(range(len(ids)), True, key=stopped)
    output.token_ids = ids[:count]
    output.log_probs = output.log_probs and output.log_probs[:count]


def request_seed(*parts: int) -> int:
    """Derive a 31-bit seed for one request; the same place in a run always gets the same seed.

    >>> request_seed(0, 1, 2, 0, 0) == request_seed(0, 1, 2, 0, 0) != request_seed(0, 1, 2, 0, 1)
    True
    """
    digest = hashlib.sha256(",".join(str(int(part)) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


# Connections and semaphores belong to one event loop; the weak key frees them with it.
_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Any, ...], tuple[RetrievalClient, Any]]] = (
    WeakKeyDictionary()
)


def _token(variable: str) -> str | None:
    try:
        return read_secret(variable, "retrieval_token_env")
    except ConfigError as error:
        raise ConfigError(
            f"{error}. Workers of a Ray cluster have the environment of `ray start`: export {variable} before it, on "
            "every machine"
        ) from error


def _shared_client(
    url: str, token: str | None, concurrency: int, timeout_s: float, retries: int
) -> tuple[RetrievalClient, asyncio.Semaphore]:
    """Return the connection pool and semaphore that all trajectories of a worker process (event loop) share."""
    clients = _clients.setdefault(asyncio.get_running_loop(), {})
    key = (url, token, concurrency, timeout_s, retries)
    if key not in clients:
        client = RetrievalClient(url, timeout_s=timeout_s, retries=retries, max_connections=concurrency, token=token)
        clients[key] = (client, asyncio.Semaphore(concurrency))
    return clients[key]


def _place(fields: Mapping[str, Any]) -> tuple[int, int]:
    """(data set row, sample number): identifies a trajectory within a step."""
    # `session_id`: verl's name for the number of a question's sample.
    return int(fields["extra_info"]["index"]), int(fields.get("session_id", 0))


def _question(fields: Mapping[str, Any]) -> Question:
    row = {name: fields.get(name) for name in ("data_source", "reward_model", "extra_info")}
    return Question.from_dict(row | {"prompt": fields.get("raw_prompt")})


@dataclass
class _EngineLog:
    """Log-probabilities (aligned with the response ids), times and counters collected over a trajectory's turns."""

    logprobs: list[float] | None = field(default_factory=list)
    generate_s: float = 0.0
    search_s: float = 0.0
    num_preempted: int = -1
    """-1: not reported by the engine."""
    global_steps: list[int] = field(default_factory=list)
    """Versions of the weights that the turns were generated with."""

    def took(self, output: Any, seconds: float) -> None:
        """Add one model turn."""
        if not output.token_ids:
            raise BackendError(f"the rollout engine returned no tokens (stop reason {output.stop_reason!r})")
        if output.log_probs and len(output.log_probs) != len(output.token_ids):
            raise BackendError(
                f"the rollout engine returned {len(output.token_ids)} ids and {len(output.log_probs)} log-probabilities"
            )
        if not output.log_probs:
            self.logprobs = None  # one turn without them makes the trajectory's list useless
        elif self.logprobs is not None:
            self.logprobs += output.log_probs
        self.generate_s += seconds
        if output.num_preempted is not None and output.num_preempted >= 0:
            self.num_preempted = max(self.num_preempted, 0) + output.num_preempted
        versions = (output.extra_fields.get(name) for name in ("min_global_steps", "max_global_steps"))
        self.global_steps += [version for version in versions if version is not None]

    def pad(self, length: int) -> None:
        """Add 0.0 for each id that the environment has written since, up to `length` ids."""
        if self.logprobs is not None:
            self.logprobs += [0.0] * (length - len(self.logprobs))


def _output(
    session: Session, question: Question, log: _EngineLog, place: tuple[int, int], *, mask_observations: bool
) -> AgentLoopOutput:
    """verl's record of a finished session.

    `response_ids`, `response_mask` and `response_logprobs` have one entry for each id after the prompt, R in all; verl
    pads them to [B, R]. The mask is 1 where a token counts in policy loss, value loss, KL and advantages. Our reward,
    trainer and logs read `extra_fields`.

    Args:
        place: (data set row, sample number), by which the trainer orders the trajectories of a step.
        mask_observations: False counts the environment's tokens too (ablation).
    """
    assert session.finished is not None
    failed = session.finished.stop_reason is StopReason.SEARCH_FAILED
    by_model = session.response_mask
    # Nothing of a failed trajectory is trained on (see the module's docstring).
    trained = [0] * len(by_model) if failed else by_model if mask_observations else [1] * len(by_model)
    trajectory = to_trajectory(session, question).to_dict()
    extra_fields = {
        "min_global_steps": min(log.global_steps, default=None),
        "max_global_steps": max(log.global_steps, default=None),
        # As verl's single-turn loop sets them: there are no scores of single turns or tools.
        "turn_scores": [],
        "tool_rewards": [],
        "place": list(place),
        "answer": session.finished.answer,
        "em": trajectory["em"],
        "f1": trajectory["f1"],
        "searches": session.searches,
        "malformed_turns": session.malformed,
        "search_failed": int(failed),
        "stop_reason": session.finished.stop_reason.value,
        "masked_token_share": 1 - sum(by_model) / len(by_model),  # not empty: there was a turn
        "generated_tokens": session.generated_tokens,
        "trained_tokens": sum(trained),
        "trajectory": trajectory,
        "prompt": session.protocol.prompt(session.question),
        "segments": [
            {"by_model": segment.by_model, "tokens": len(segment.ids), "text": segment.text}
            for segment in session.segments
        ],
    }
    return AgentLoopOutput(
        prompt_ids=session.prompt_ids,
        response_ids=session.response_ids,
        response_mask=trained,
        response_logprobs=log.logprobs,
        num_turns=1 + len(session.segments),  # verl counts the prompt as a turn
        metrics=AgentLoopMetrics(
            generate_sequences=log.generate_s, tool_calls=log.search_s, num_preempted=log.num_preempted
        ),
        extra_fields=extra_fields,
    )
