"""Several engines of one language model, each in a Ray actor on its own accelerators; batches are split among them.

Intended for commands that open their model in one process, such as `evaluate`. A data stage can use Ray workers
(`runner`) instead, which do not wait for each other at the end of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from typing import Any

from agentic_r_plugin import ray_cluster
from agentic_r_plugin.errors import ConfigError, RequestRefusedError
from agentic_r_plugin.llm.base import Completion, Request, Sampling, Usage
from agentic_r_plugin.llm.reply import Reply
from agentic_r_plugin.protocol import Codec

_MAX_RESTARTS = 3
"""Maximum number of times that Ray restarts an engine whose process died."""
_CLOSE_S = 10.0


class Replica:
    """One engine, in its own process."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build

    @cached_property
    def _backend(self) -> Any:
        """The backend, opened on first use: Ray does not report the cause of an error in a constructor."""
        return self._build()

    def node(self) -> str:
        """Name of the engine's machine."""
        return ray_cluster.this_node()

    def codec(self) -> Codec:
        """Codec of the model; opens the model if needed."""
        return self._backend.codec  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """Fingerprint of the model."""
        return str(self._backend.fingerprint())

    def call(self, method: str, *arguments: Any, **named: Any) -> tuple[list[Any], dict[str, float]]:
        """Call a method of the backend; return its result and the backend's usage since it was opened."""
        found = getattr(self._backend, method)(*arguments, **named)
        return list(found), asdict(getattr(self._backend, "usage", None) or Usage())

    def close(self) -> None:
        """Close the engine if it was opened."""
        if "_backend" in vars(self):
            self._backend.close()


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
        import ray

        self._ray: Any = ray
        self._actors: list[Any] = []
        self._ours = ray_cluster.enter(os.environ.get("RAY_ADDRESS", ""), "RAY_ADDRESS")
        try:
            gpus = gpus if ray.cluster_resources().get("GPU") else 0
            ray_cluster.require(replicas, cpus=0, gpus=gpus, names="llm.replicas")
            actor = ray.remote(Replica).options(  # type: ignore[attr-defined]
                num_cpus=0, num_gpus=gpus, max_restarts=_MAX_RESTARTS, max_task_retries=_MAX_RESTARTS
            )
            self._actors = [actor.remote(build) for _ in range(replicas)]
            self._spent: list[dict[str, float]] = [{} for _ in self._actors]
            self.usage = Usage()
            self.codec: Codec = self._get([actor.codec.remote() for actor in self._actors])[0]
            asked = ray_cluster.one_per_node(self._actors)  # engines on one machine read the same files
            self._fingerprint, *others = self._get([actor.fingerprint.remote() for actor in asked])
            if any(other != self._fingerprint for other in others):
                raise ConfigError("llm.replicas: the engines hold different models; is it the same on every machine?")
        except Exception:
            self.close()
            raise

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion | RequestRefusedError]:
        """See `LLMBackend.generate`."""
        return self._deal("generate", requests, sampling)

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
        if self._actors:
            closing = [actor.close.remote() for actor in self._actors]
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_S)
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._ours:
            self._ray.shutdown()
            self._ours = False

    def _deal(self, method: str, items: Sequence[Any], *arguments: Any, **named: Any) -> list[Any]:
        parts = [part for part in shares(items, len(self._actors)) if part]
        calls = [
            actor.call.remote(method, part, *arguments, **named)
            for actor, part in zip(self._actors, parts, strict=False)
        ]
        answers: list[Any] = []
        for place, (found, spent) in enumerate(self._get(calls)):
            answers += found
            self._count(place, spent)
        return answers

    def _count(self, place: int, spent: dict[str, float]) -> None:
        """Add the usage of an engine since its last call; a restarted engine counts from 0 again."""
        before = self._spent[place]
        started_again = any(value < before.get(name, 0) for name, value in spent.items())
        for name, value in spent.items():
            known = 0 if started_again else before.get(name, 0)
            setattr(self.usage, name, getattr(self.usage, name) + value - known)
        self._spent[place] = spent

    def _get(self, references: Sequence[Any]) -> list[Any]:
        return [ray_cluster.get(reference, f"an engine of llm.replicas (restarted {_MAX_RESTARTS} times)")
                for reference in references]  # fmt: skip


def shares(items: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    """Split `items`, in order, into `parts` parts of nearly equal length.

    >>> shares([1, 2, 3, 4, 5], 3)
    [[1, 2], [3, 4], [5]]
    """
    size, more = divmod(len(items), parts)
    starts = [place * size + min(place, more) for place in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(starts)]
