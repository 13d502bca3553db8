"""Gather the requests of concurrent agent loops into batches for one generator."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentic_r_plugin.errors import BackendError
from agentic_r_plugin.llm.hf_generate import Generated, HFGenerator


@dataclass(frozen=True, kw_only=True)
class RequestSampling:
    """Sampling parameters of one request; only requests that differ in `max_tokens` and `seed` alone share a batch."""

    max_tokens: int
    seed: int | None
    """Sampling seed of this request; None: the engine chooses one."""
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    with_logprobs: bool
    ignore_eos: bool

    @property
    def batch_key(self) -> tuple[Any, ...]:
        """Key that is equal for requests that can share a batch."""
        return self.temperature, self.top_p, self.top_k, self.stop, self.with_logprobs, self.ignore_eos


# Parameters accepted only with the value that has no effect, and parameters that affect the text but not the tokens.
_NEUTRAL = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_p": 0.0, "n": 1}
_TEXT_ONLY = {"include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"}


def parse_sampling(
    params: dict[str, Any], *, num_prompt_tokens: int, max_length: int, response_length: int, total_length: int
) -> RequestSampling:
    """Parse vLLM-style sampling parameters, with the same length limits as verl's vLLM server.

    Args:
        params: not modified.
        max_length: maximum number of tokens of prompt and answer together.
        response_length, total_length: limits in tokens from the rollout configuration, for requests without
            `max_tokens`.

    Raises:
        BackendError: the prompt leaves no room, or this engine does not support a parameter.
    """
    params = dict(params)
    room = max_length - num_prompt_tokens
    if room < 1:
        raise BackendError(
            f"a prompt of {num_prompt_tokens} tokens leaves no room to generate within {max_length}; raise "
            "actor_rollout_ref.rollout.max_model_len or shorten the prompt"
        )
    limit = params.pop("max_tokens", params.pop("max_new_tokens", None))
    if limit is None:
        limit = min(response_length, total_length - num_prompt_tokens)
    stop = params.pop("stop", None) or ()
    logprobs, seed = params.pop("logprobs", None), params.pop("seed", None)
    sampling = RequestSampling(
        max_tokens=max(1, min(int(limit), room)),
        seed=None if seed is None else int(seed),
        temperature=float(params.pop("temperature", 1.0)),
        top_p=float(params.pop("top_p", 1.0)),
        top_k=int(params.pop("top_k", -1)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        with_logprobs=logprobs is not None and logprobs is not False,
        ignore_eos=bool(params.pop("ignore_eos", False)),
    )
    left = {
        name: value
        for name, value in params.items()
        if name not in _TEXT_ONLY and not (name in _NEUTRAL and value == _NEUTRAL[name])
    }
    if left:
        raise BackendError(f"the hf rollout engine does not know these sampling parameters: {left}")
    return sampling


@dataclass(eq=False)
class _Request:
    prompt: list[int]
    sampling: RequestSampling
    seed: int
    answer: asyncio.Future[Generated]


class RequestBatcher:
    """Collects requests until none arrives for `quiet_s`, for at most `max_wait_s`, and generates for all at once.

    A request's random draws depend on its own seed, not on its time of arrival or its batch. Without a seed they depend
    on the engine's seed, the version of the weights, the prompt, and how often that prompt was requested before with
    these weights: of two requests with the same prompt, the first to arrive gets the first of the two draws.
    """

    def __init__(self, generator: HFGenerator, *, seed: int, quiet_s: float, max_wait_s: float) -> None:
        self.generator, self.seed, self.quiet_s, self.max_wait_s = generator, seed, quiet_s, max_wait_s
        self._version: int | None = None
        self._asked: Counter[int] = Counter()
        self._waiting: list[_Request] = []
        self._arrived = asyncio.Event()
        self._busy = asyncio.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="generate")
        self._loop_task: asyncio.Task[None] | None = None

    def new_weights(self, version: int | None) -> None:
        """Restart the per-prompt counts that seed the draws, for a new version of the weights."""
        self._version = version
        self._asked.clear()

    async def submit(self, prompt: list[int], sampling: RequestSampling) -> Generated:
        """Generate the answer to one request; raises the error of its batch."""
        # Started with the first request, not in the constructor, because the task needs a running event loop.
        if self._loop_task is None:
            self._loop_task = asyncio.create_task(self._serve())
        seed = sampling.seed
        if seed is None:
            # The hash of integers, unlike that of text or None, is the same in every process.
            prompt_hash = hash(tuple(prompt))
            seed = hash((self.seed, self._version or 0, prompt_hash, self._asked[prompt_hash]))
            self._asked[prompt_hash] += 1
        request = _Request(prompt, sampling, seed, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._arrived.set()
        return await request.answer

    @asynccontextmanager
    async def idle(self) -> AsyncIterator[None]:
        """Wait for the current batch, and hold back further batches while the block runs."""
        async with self._busy:
            yield

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            await self._gather()
            async with self._busy:
                # Taken under the lock: requests that arrived while the weights were being replaced join this batch.
                requests, self._waiting = self._waiting, []
                self._arrived.clear()
                groups: dict[tuple[Any, ...], list[_Request]] = defaultdict(list)
                for request in requests:
                    groups[request.sampling.batch_key].append(request)
                for group in groups.values():
                    await self._answer(group)

    async def _gather(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + self.max_wait_s
        seen = -1
        # Requests arrive in bursts: as long as more keep arriving, a short wait makes the batch larger.
        while len(self._waiting) != seen and loop.time() < end:
            seen = len(self._waiting)
            await asyncio.sleep(self.quiet_s)

    async def _answer(self, group: list[_Request]) -> None:
        loop = asyncio.get_running_loop()
        try:
            # A thread keeps the event loop free to accept requests while the model generates.
            answers = await loop.run_in_executor(self._thread, self._generate, group)
        except Exception as error:  # re-raised in each waiting caller
            for request in group:
                if not request.answer.done():
                    request.answer.set_exception(error)
            return
        for request, answer in zip(group, answers, strict=True):
            # A caller that was cancelled has a cancelled future, which takes no result.
            if not request.answer.done():
                request.answer.set_result(answer)

    def _generate(self, group: list[_Request]) -> list[Generated]:
        first = group[0].sampling
        return self.generator.generate(
            [request.prompt for request in group],
            max_tokens=[request.sampling.max_tokens for request in group],
            stop=first.stop,
            temperature=first.temperature,
            top_p=first.top_p,
            top_k=first.top_k,
            seed=[request.seed for request in group],
            with_logprobs=first.with_logprobs,
            ignore_eos=first.ignore_eos,
        )
