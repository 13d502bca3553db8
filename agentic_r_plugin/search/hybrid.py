"""Hybrid search: several search backends, fused by reciprocal rank (Cormack, Clarke and Büttcher, SIGIR 2009)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from agentic_r_plugin.backends import SearchSpec, build_search
from agentic_r_plugin.config import deciding, fingerprint, load_config
from agentic_r_plugin.errors import ConfigError, SearchError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.base import (
    Hit,
    SearchBackend,
    SearchRequest,
    bounded_topk,
    open_documents,
    reads_reasoning,
    typed_options,
)

_SHARED = ("index", "corpus", "retriever", "url", "device", "batch_size", "timeout_s", "max_retries")
"""Settings of the hybrid that a part takes over unless it names its own."""


def _part_specs(parts: Sequence[Any], shared: Mapping[str, Any]) -> list[SearchSpec]:
    """Settings of each part, those that it does not name taken from `shared`.

    Raises:
        ConfigError: a part is no mapping of search settings.
    """
    specs = []
    for number, part in enumerate(parts, start=1):
        where = f"search backend 'hybrid': options.parts, part {number}"
        if not isinstance(part, Mapping):
            raise ConfigError(f"{where}: expected settings of a search (backend, index, corpus, ...), found {part!r}")
        try:
            specs.append(load_config(SearchSpec, values={**shared, **part}))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        if specs[-1].backend == "hybrid":
            raise ConfigError(f"{where}: is a hybrid itself; list its parts here")
    return specs


def _deciding_parts(parts: Sequence[Any]) -> list[dict[str, Any]]:
    return [deciding(spec) for spec in _part_specs(parts, {})]


class HybridBackend:
    """Several searches over one corpus, such as BM25 and a dense retriever, fused by reciprocal rank.

    A passage scores the sum of weight / (k + rank) over the parts that find it among their first `depth` passages. It
    is known by its id and counts once. Among equal scores, the passage that an earlier part finds comes first. Each
    part gets the same requests and uses its own formulation. If one part fails, the search fails.

    A request for more than `depth` passages takes as many of each part, which can change the order of the first ones.

    Args:
        parts: backends to fuse, at least two; closed with this one.
        k: constant of the fusion; a larger one lets lower ranks count more.
        depth: passages taken from each part.
        weights: one per part; empty: all 1.

    Raises:
        ConfigError: fewer than two parts, or a value out of range.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options accepted in `SearchSpec.options`."""

        parts: list[Any] = field(
            default_factory=lambda: [{"backend": "bm25"}, {"backend": "faiss"}], metadata={"decides": _deciding_parts}
        )
        """Settings of each part (`SearchSpec`). What a part does not name is the hybrid's own."""
        k: float = 60.0
        depth: int = 100
        weights: list[float] = field(default_factory=list)

    def __init__(
        self, parts: Sequence[SearchBackend], *, k: float = 60.0, depth: int = 100, weights: Sequence[float] = ()
    ) -> None:
        self.parts, self.k, self.depth, self.weights = list(parts), k, depth, list(weights) or [1.0] * len(parts)
        if len(self.parts) < 2:
            raise ConfigError(f"search backend 'hybrid': expected at least two parts, found {len(self.parts)}")
        if len(self.weights) != len(self.parts) or not all(0 < weight < math.inf for weight in self.weights):
            raise ConfigError(
                f"search backend 'hybrid': expected {len(self.parts)} weights above 0, one per part, found {weights}"
            )
        if not 0 < k < math.inf or depth < 1:
            raise ConfigError(
                f"search backend 'hybrid': expected k above 0 and depth of at least 1, found {k}, {depth}"
            )
        self.reads_reasoning = any(map(reads_reasoning, self.parts))
        self.corpus = next((part.corpus for part in self.parts if hasattr(part, "corpus")), None)

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> HybridBackend:
        """Build from the settings shared by all commands; options: `parts`, `k`, `depth`, `weights`."""
        options = typed_options(spec, cls.Options)
        options.pop("parts")
        # If a later part cannot be opened, those opened before are closed.
        with ExitStack() as opened:
            parts = []
            for part in parts_of(spec):
                parts.append(build_search(part))
                opened.callback(parts[-1].close)
            hybrid = cls(parts, **options)
            opened.pop_all()
        return hybrid

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        """See `SearchBackend.search`; scores are those of the fusion.

        Raises:
            SearchError: a part failed, or two parts hold different passages of the same id.
        """
        # `bounded_topk` only refuses a topk below 1 here: each part limits it to its own corpus.
        depth = max(self.depth, bounded_topk(topk, topk))
        found = [part.search(requests, depth) for part in self.parts]
        return [self._fused(lists)[:topk] for lists in zip(*found, strict=True)]

    def _fused(self, lists: Sequence[Sequence[Hit]]) -> list[Hit]:
        passages: dict[str, Passage] = {}
        gains: dict[str, list[float]] = {}
        for weight, hits in zip(self.weights, lists, strict=True):
            # A passage that a part returns twice counts once, at its first rank.
            distinct = {hit.passage.id: hit.passage for hit in hits}
            for rank, passage in enumerate(distinct.values(), start=1):
                known = passages.setdefault(passage.id, passage)
                if known.text != passage.text and known.text.split() != passage.text.split():
                    raise SearchError(
                        f"passage {passage.id!r} has different texts in two parts of the hybrid: {known.text[:60]!r} "
                        f"and {passage.text[:60]!r}; give all parts the same corpus"
                    )
                gains.setdefault(passage.id, []).append(weight / (self.k + rank))
        scores = {name: math.fsum(gain) for name, gain in gains.items()}  # exact, so equal ranks give equal scores
        # The sort is stable, so ties keep the order of insertion: earlier parts first.
        return [Hit(passage=passages[name], score=scores[name]) for name in sorted(scores, key=lambda n: -scores[n])]

    def documents(self, ids: Sequence[str]) -> list[Passage | None]:
        """See `base.open_documents`; the parts are asked in turn."""
        found: dict[str, Passage | None] = dict.fromkeys(ids)
        for part in self.parts:
            missing = [name for name, passage in found.items() if passage is None]
            found |= zip(missing, open_documents(part, missing), strict=True)
        return [found[name] for name in ids]

    def fingerprint(self) -> str:
        """See `SearchBackend.fingerprint`; it covers those of all parts."""
        return fingerprint("hybrid/1", [part.fingerprint() for part in self.parts], self.k, self.depth, self.weights)

    def close(self) -> None:
        """Close the parts."""
        # Every part is closed, even if closing another one fails.
        with ExitStack() as stack:
            for part in self.parts:
                stack.callback(part.close)


def parts_of(spec: SearchSpec) -> list[SearchSpec]:
    """Settings of the searches that a hybrid fuses; for another backend the settings themselves.

    A part takes the hybrid's index, corpus and limits where it names none. BM25 searches the index's own corpus if
    no other is named.

    Raises:
        ConfigError: a part is no mapping of search settings, or the hybrid's index is not finished or not used.
    """
    if spec.backend != "hybrid":
        return [spec]
    parts = typed_options(spec, HybridBackend.Options)["parts"]
    if len(parts) < 2:
        raise ConfigError(f"search backend 'hybrid': expected at least two parts, found {len(parts)}")
    shared = {name: getattr(spec, name) for name in _SHARED}
    if spec.index:
        from agentic_r_plugin.search.indexing.index import read_manifest

        shared["corpus"] = spec.corpus or read_manifest(spec.index).corpus
        if all(isinstance(part, Mapping) and (part.get("index") or part.get("backend") == "bm25") for part in parts):
            raise ConfigError(
                f"search backend 'hybrid': no part searches index {spec.index!r}, each names its own; leave one of "
                "them out"
            )
    return _part_specs(parts, shared)
