"""Settings of `agentic-r experiment`: how each retriever is made, what is compared, and for which runs of the loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import entries_of, load_config, merged, section_of, setting
from agentic_r_plugin.data.correctness import CorrectnessConfig
from agentic_r_plugin.data.groups import GroupsConfig
from agentic_r_plugin.data.relevance import RelevanceConfig
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig
from agentic_r_plugin.loop.settings import IterateConfig
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig

_READY = ("of_run", "model", "bm25", "hybrid", "rerank")


@dataclass(frozen=True, kw_only=True)
class RetrieverPlan:
    """How one retriever is made: taken from the run, off the shelf, BM25, a hybrid, reranked, or trained here."""

    of_run: str = setting("the run's own: retriever-0, retriever-1, ...", default="")
    model: str = setting("folder, hub name or builtin:NAME", default="")
    bm25: bool = setting("BM25 over the same corpus", default=False)
    hybrid: list[str] = setting("names of other retrievers here, fused by reciprocal rank", default_factory=list)
    rerank: str = setting("name of a reranker here, which reorders the passages of `of`", default="")
    of: str = setting("name of another retriever here, for rerank", default="")
    depth: int = setting("passages of a search that rerank reorders", default=50)
    exhaustive: bool = setting("train on the correctness of every candidate", default=False)
    sampled: int = setting("train on the correctness of N candidates per query, drawn with the run's seed", default=0)
    relevance: dict[str, Any] = setting(
        "what differs in the scores of candidates, e.g. another scorer; correctness is rolled out again",
        section_of(RelevanceConfig),
        default_factory=dict,
    )
    correctness: dict[str, Any] = setting(
        "what differs in correctness, e.g. its method", section_of(CorrectnessConfig), default_factory=dict
    )
    groups: dict[str, Any] = setting(
        "what differs in the selection of groups", section_of(GroupsConfig), default_factory=dict
    )
    train: dict[str, Any] = setting("what differs in training", section_of(TrainRetrieverConfig), default_factory=dict)

    def __post_init__(self) -> None:
        ready = [name for name in _READY if getattr(self, name)]
        if len(ready) > 1 or (self.sampled and (self.exhaustive or self.relevance)):
            raise ConfigError(
                "a retriever is one of: of_run, model, bm25, hybrid, rerank, trained (sampled, or exhaustive and "
                "relevance)"
            )
        if self.sampled < 0:
            raise ConfigError(f"sampled: expected at least 1 candidate of each query, found {self.sampled}")
        if len(self.hybrid) == 1:
            raise ConfigError(f"hybrid: expected at least two retrievers, found {self.hybrid[0]!r} alone")
        if bool(self.rerank) != bool(self.of) or self.depth < 1:
            raise ConfigError("rerank, of, depth: expected a reranker, another retriever, and at least 1 passage")
        if self.exhaustive and self.correctness:
            raise ConfigError(
                "exhaustive, correctness: retrievers share the exhaustive correctness; give one of the two"
            )
        changes = ("exhaustive", "sampled", "relevance", "correctness", "groups", "train")
        trained = [name for name in changes if getattr(self, name)]
        if ready and trained:
            raise ConfigError(
                f"{ready[0]}: is used unchanged, so {', '.join(trained)} would have no effect; to train from another "
                "retriever, give only train: {retriever: FOLDER_OR_NAME}"
            )

    @property
    def ready(self) -> bool:
        """Whether it is not trained here."""
        return any(getattr(self, name) for name in _READY)

    @property
    def rolls_out(self) -> bool:
        """Whether correctness, where it is used, is not the run's."""
        return bool(self.exhaustive or self.sampled or self.relevance or self.correctness)

    @property
    def regroups(self) -> bool:
        """Whether it needs groups other than the run's."""
        return bool(self.groups) or self.rolls_out


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Make retrievers in several ways from one run's data, and compare them with its agents."""

    run: str = setting("finished run folder of iterate; only read")
    out: str = setting("folder of the experiment")
    seeds: list[int] = setting(
        "one run each, named by {seed} in run and agents; tables over the seeds", default_factory=list
    )
    variants: dict[str, Any] = setting(
        "name -> what differs in the loop; one run each, named by {variant} in run and agents", default_factory=dict
    )
    loop: str | None = setting("configuration of iterate, to make missing runs", default=None)
    loop_settings: dict[str, Any] = setting(
        "what differs in the loop, e.g. {world: {test_questions: 300}}", default_factory=dict
    )
    dry_run: bool = setting("check, print a forecast of the time, stop", default=False)
    iteration: int = setting("iteration whose agent, data and starting retriever are used", default=1)
    agents: list[str] = setting("agent-K of the run, or NAME=FOLDER", default_factory=lambda: ["agent-1"])
    retrievers: dict[str, Any] = setting("name -> RetrieverPlan", default_factory=dict)
    rerankers: dict[str, Any] = setting(
        "name -> what differs in train-reranker on the run's data; a retriever's rerank names it", default_factory=dict
    )
    only: list[str] = setting(
        "names of retrievers to make and compare, and of variants; empty: all", default_factory=list
    )
    benchmarks: dict[str, str] = setting(
        "name -> folder in FlashRAG layout, next to the run's own benchmark", default_factory=dict
    )
    worlds: dict[str, Any] = setting(
        "name -> what differs from the run's world; generated, next to the run's", default_factory=dict
    )
    max_searches: list[int] = setting(
        "evaluate each agent under these limits of searches; empty: its own", default_factory=list
    )
    stop_rule: str = setting("split on which agent-k with retriever-k, from k = 0, show where to stop", default="")
    evaluate: dict[str, Any] = setting(
        "fields of EvaluateConfig: cells, first", section_of(EvaluateConfig), default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.retrievers or not self.agents:
            raise ConfigError("retrievers, agents: expected at least one of each")
        if any(number < 0 for number in self.max_searches):
            raise ConfigError(f"max_searches: expected numbers of at least 0, found {self.max_searches}")
        if self.stop_rule and self.max_searches:
            raise ConfigError("stop_rule, max_searches: give at most one of the two")
        if (self.variants or self.loop_settings) and not self.loop:
            raise ConfigError("variants, loop_settings: need loop, the configuration that they change")
        self._choose()
        object.__setattr__(self, "retrievers", entries_of(RetrieverPlan, self.retrievers, "retrievers"))
        for name, plan in self.retrievers.items():
            for part in plan.hybrid:
                if part not in self.retrievers or self.retrievers[part].hybrid:
                    raise ConfigError(
                        f"retrievers.{name}: hybrid of {part!r}: expected another retriever here, not a hybrid"
                        + self._left_out(part)
                    )
            if plan.rerank and plan.rerank not in self.rerankers:
                raise ConfigError(
                    f"retrievers.{name}: rerank={plan.rerank!r} is not among the rerankers {', '.join(self.rerankers)}"
                )
            if plan.of and (plan.of not in self.retrievers or self.retrievers[plan.of].rerank):
                raise ConfigError(
                    f"retrievers.{name}: reranks {plan.of!r}: expected another retriever here, not a reranked one"
                    + self._left_out(plan.of)
                )

    def _left_out(self, part: str) -> str:
        return f"; only={self.only} leaves it out, add it there" if self.only and part not in self.retrievers else ""

    def _choose(self) -> None:
        """Leave the retrievers and variants that `only` names; where it names none of one kind, all of that kind."""
        kinds = {"retrievers": self.retrievers, "variants": self.variants}
        for name in self.only:
            if not any(name in known for known in kinds.values()):
                listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
                raise ConfigError(f"only: {name!r} is not among {listed}")
        for kind, known in kinds.items():
            chosen = {name: known[name] for name in self.only if name in known}
            object.__setattr__(self, kind, chosen or known)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run and the experiment on it."""

    variant: str
    seed: int | None
    experiment: ExperimentConfig
    loop: IterateConfig | None
    """The loop that makes the run; None if it must exist."""


def parts(config: ExperimentConfig) -> Iterator[Part]:
    """The runs and experiments, variant by variant.

    Raises:
        ConfigError: `run` does not name the seed or the variant, or a setting of the loop is wrong.
    """
    for name, wanted in (("seed", config.seeds), ("variant", config.variants)):
        if wanted and f"{{{name}}}" not in config.run:
            raise ConfigError(f"run: expected {{{name}}} in {config.run!r}, since {name}s are given")
    seeds: list[int | None] = [*config.seeds] or [None]
    for variant in config.variants or {"": {}}:
        for seed in seeds:
            named = {"{variant}": variant, "{seed}": "" if seed is None else str(seed)}
            folder = Path(config.out, variant, *([] if seed is None else [f"seed-{seed}"]))
            # A cell whose agent and retriever do not depend on the seed is evaluated once, with the first seed.
            earlier = seeds[: seeds.index(seed)]
            others = [str(Path(config.out, variant, f"seed-{other}", "evaluation")) for other in earlier]
            one = replace(
                config,
                run=_filled(config.run, named),
                agents=[_filled(agent, named) for agent in config.agents],
                out=str(folder),
                evaluate=({"reuse": others} if others else {}) | config.evaluate,
                seeds=[],
                variants={},
                only=[],  # the retrievers are chosen by now
            )
            yield Part(variant=variant, seed=seed, experiment=one, loop=_loop(config, variant, seed, one.run))


def _filled(text: str, named: Mapping[str, str]) -> str:
    for slot, value in named.items():
        text = text.replace(slot, value)
    return text


def _loop(config: ExperimentConfig, variant: str, seed: int | None, out: str) -> IterateConfig | None:
    if not config.loop:
        return None
    own: dict[str, Any] = {"out": out} | ({} if seed is None else {"seed": seed})
    settings = merged(config.loop_settings, config.variants.get(variant) or {})
    return load_config(IterateConfig, config.loop, values=settings | own)
