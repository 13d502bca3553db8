"""One language model as several engines on as many accelerators: each in a Ray actor, and a batch is dealt out to all.

For what opens its model in one process, such as `evaluate`. A data stage can also have Ray workers (`runner`), which
need not wait for each other at the end of a batch.
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
"""How often Ray starts an engine again whose process died."""
_CLOSE_S = 10.0


class Replica:
    """One of the engines, in a process of its own."""

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build = build

    @cached_property
    def _backend(self) -> Any:
        """Opened by the first call: Ray keeps no cause of an error in a constructor."""
        return self._build()

    def node(self) -> str:
        """The machine it is on."""
        return ray_cluster.this_node()

    def codec(self) -> Codec:
        """The model's; opens it."""
        return self._backend.codec  # type: ignore[no-any-return]

    def fingerprint(self) -> str:
        """The model's."""
        return str(self._backend.fingerprint())

    def call(self, method: str, *arguments: Any, **named: Any) -> tuple[list[Any], dict[str, float]]:
        """What a method of the backend returns, and the backend's usage since it was opened."""
        found = getattr(self._backend, method)(*arguments, **named)
        return list(found), asdict(getattr(self._backend, "usage", None) or Usage())

    def close(self) -> None:
        """Free the engine, if it was opened."""
        if "_backend" in vars(self):
            self._backend.close()


class ReplicatedBackend:
    """`replicas` engines behind the interface of one.

    Neighbours in a batch, which may share a prefix, go to the same engine. The cluster is the one that the environment
    variable `RAY_ADDRESS` names, or one that is started on this machine.

    Args:
        build: opens the backend; pickled, so it must be importable where the actors run.
        gpus: accelerators that Ray reserves for each engine, where the cluster has any.

    Raises:
        ConfigError: the cluster has fewer accelerators, the engines cannot be opened, or hold different models.
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
            asked = ray_cluster.one_per_node(self._actors)  # all on one machine read the same files
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
        """Of the model, the same whatever the number of engines."""
        return self._fingerprint

    def close(self) -> None:
        """Free the engines, and stop the cluster where it was started here."""
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
        """Add what an engine used since it was last asked; an engine that was started again counts from 0."""
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
    """`items` in order, cut into that many parts of nearly equal length.

    >>> shares([1, 2, 3, 4, 5], 3)
    [[1, 2], [3, 4], [5]]
    """
    size, more = divmod(len(items), parts)
    starts = [place * size + min(place, more) for place in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(starts)]
