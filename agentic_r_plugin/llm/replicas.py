"""Several engines of one language model, each in a Ray actor on its own accelerators; batches are split among them.

Intended for commands that open their model in one process, such as `evaluate`. A data stage can use Ray workers
(`runner`) instead, which do not wait for each other at the end of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from operator import attrgetter, methodcaller
from typing import Any

from agentic_r_plugin.errors import RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Continuation, Likelihood, Request, Sampling, Usage
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.protocol import Codec
from agentic_r_plugin.ray_cluster import Pool

_MAX_RESTARTS = 3
"""Maximum number of times that Ray restarts an engine whose process died."""


def _call(backend: Any, method: str, *arguments: Any, **named: Any) -> tuple[list[Any], dict[str, float]]:
    """Call a method of an engine's backend; return its result and what it adds to the backend's usage."""
    usage = getattr(backend, "usage", None) or Usage()
    before = asdict(usage)
    found = getattr(backend, method)(*arguments, **named)
    return list(found), {name: value - before[name] for name, value in asdict(usage).items()}


def _limits(backend: Any) -> dict[str, int | None]:
    """What an engine's backend says of its limits (`rollout.run_sessions` reads both, where a backend has them)."""
    return {name: getattr(backend, name, None) for name in ("max_length", "kept_tokens")}


class ReplicatedBackend:
    """`replicas` engines behind the interface of one.

    Neighbours in a batch, which may share a prefix, go to the same engine. The Ray cluster is the one at the address in
    the environment variable `RAY_ADDRESS`, or a new one on this machine.

    Args:
        build: opens the backend; pickled, so it must be importable where the actors run.
        gpus: accelerators that Ray reserves for each engine, if the cluster has any.

    Raises:
        ConfigError: the cluster has too few accelerators, or the engines cannot be opened or hold different models.
    """

    def __init__(self, build: Callable[[], Any], replicas: int, gpus: float) -> None:
        self._pool = Pool(
            build,
            replicas,
            address=os.environ.get("RAY_ADDRESS", ""),
            setting="RAY_ADDRESS",
            names="llm.replicas",
            worker=f"an engine of llm.replicas (restarted {_MAX_RESTARTS} times)",
            gpus=gpus,
            gpus_if_any=True,
            restarts=_MAX_RESTARTS,
        )
        self.replicas, self.usage = replicas, Usage()
        try:
            # The first call opens an engine. All calls start before the first is waited for, so engines load together.
            opened = [self._pool.call(place, attrgetter("codec")) for place in range(replicas)]
            self.codec: Codec
            self.codec, *_ = [self._pool.get(reference) for reference in opened]
            limits = self._pool.get(self._pool.call(0, _limits))
            self.max_length: int | None = limits["max_length"]
            kept = limits["kept_tokens"]
            self.kept_tokens: int | None = None if kept is None else kept * replicas
            self._fingerprint = str(self._pool.same(methodcaller("fingerprint"), "llm.replicas: the engines' models"))
        except Exception:
            self.close()
            raise

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion | RequestRefusedError]:
        """See `LLMBackend.generate`."""
        return self._deal("generate", requests, sampling)

    def likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood | RequestRefusedError]:
        """See `LLMBackend`."""
        return self._deal("likelihoods", continuations)

    def chat(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float = 0.0, seed: int | None = None
    ) -> list[Reply | RequestRefusedError]:
        """See `ChatBackend.chat`."""
        return self._deal("chat", prompts, max_tokens=max_tokens, temperature=temperature, seed=seed)

    def fingerprint(self) -> str:
        """Fingerprint of the model, independent of the number of engines."""
        return self._fingerprint

    def close(self) -> None:
        """Close the engines, and stop the cluster if it was started here."""
        self._pool.close()

    def _deal(self, method: str, items: Sequence[Any], *arguments: Any, **named: Any) -> list[Any]:
        parts = [part for part in shares(items, self.replicas) if part]
        calls = [self._pool.call(place, _call, method, part, *arguments, **named) for place, part in enumerate(parts)]
        answers: list[Any] = []
        for found, spent in [self._pool.get(reference) for reference in calls]:
            answers += found
            for name, value in spent.items():
                setattr(self.usage, name, getattr(self.usage, name) + value)
        return answers


def shares(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Split `items`, in order, into `parts` parts of nearly equal length.

    >>> shares([1, 2, 3, 4, 5], 3)
    [[1, 2], [3, 4], [5]]
    """
    size, more = divmod(len(items), parts)
    starts = [place * size + min(place, more) for place in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(starts)]
