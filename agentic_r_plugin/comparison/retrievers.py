"""Makes the retrievers of an experiment: data that differ from the run's, training, rerankers and indexes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from agentic_r_plugin import child
from agentic_r_plugin.comparison.benchmarks import Benchmarks, link
from agentic_r_plugin.comparison.settings import ExperimentConfig
from agentic_r_plugin.comparison.trained import TrainedRetriever
from agentic_r_plugin.config import load_config
from agentic_r_plugin.data import correctness, groups, relevance
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.evaluation.cells import located
from agentic_r_plugin.records import Relevance
from agentic_r_plugin.retriever import reranker, training
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.indexing import index
from agentic_r_plugin.search.service import server
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.store import file_fingerprint, read_records, write_records

_OF_A_RETRIEVER = ("preset", "formulation", "max_length")
"""Settings of an index that belong to its retriever; another retriever uses what its own record says."""


class Retrievers:
    """Makes the retrievers and rerankers of an experiment."""

    def __init__(self, config: ExperimentConfig, benchmarks: Benchmarks) -> None:
        self.config, self.benchmarks, self.run = config, benchmarks, benchmarks.run
        self.out = Path(config.out)
        self.rerankers = list(dict.fromkeys(plan.rerank for plan in config.retrievers.values() if plan.rerank))
        """Names of the rerankers in use."""

    def check(self) -> None:
        """Compose every step.

        Raises:
            ConfigError: a key or value is wrong, or the run lacks a model or data that are needed.
        """
        for name, plan in self.config.retrievers.items():
            if plan.of_run:
                self.run.model(plan.of_run, "retriever")
            elif not plan.ready:
                self.trained(name).check()
        for name in self.rerankers:
            self.run.require_data(f"rerankers.{name}", "candidates")
            self._reranker(name)

    def make(self) -> dict[str, Any]:
        """Make all retrievers; returns their locations or settings as `evaluate` expects them."""
        plans = self.config.retrievers
        for name in self.rerankers:
            child.run_command("train-reranker", self._reranker(name))
        # Those that rerank come last: they reorder the passages of another retriever here.
        found: dict[str, Any] = {name: self.make_one(name) for name, plan in plans.items() if not plan.rerank}
        for name, plan in plans.items():
            if plan.rerank:
                rerank = {"model": str(self.reranker_folder(plan.rerank)), "depth": plan.depth}
                found[name] = located(found[plan.of]) | {"rerank": rerank}
        return {name: found[name] for name in plans}

    def make_one(self, name: str) -> str:
        """Train a retriever if needed and build its indexes; returns its location as `evaluate` expects it."""
        plan = self.config.retrievers[name]
        if plan.hybrid:
            return f"hybrid:{'+'.join(plan.hybrid)}"
        if plan.bm25:
            return f"bm25:{self.benchmarks.corpus('{benchmark}')}"
        of_run = self.run.model(plan.of_run, "retriever") if plan.of_run else ""
        model = of_run or plan.model or self.train(self.trained(name))
        # The run's benchmark first: others with the same corpus get a link to its index.
        for benchmark in dict.fromkeys([self.benchmarks.main, *self.benchmarks.compared()]):
            self.index(name, model, benchmark, of_run=plan.of_run)
        return str(self.out / "index" / name / "{benchmark}")

    def trained(self, name: str) -> TrainedRetriever:
        """How a retriever is trained."""
        return TrainedRetriever(self.config, self.benchmarks, name)

    def reranker_folder(self, name: str) -> Path:
        """Folder of a trained reranker."""
        return self.out / "rerankers" / name

    def _reranker(self, name: str) -> reranker.TrainRerankerConfig:
        """Training on the scores that the run has, with the given changes."""
        files = {item: self.run.data(item) for item in ("candidates", "relevance", "correctness")}
        values = {item: str(file) for item, file in files.items() if file.exists()} | {"seed": self.run.config.seed}
        values |= dict(self.config.rerankers[name] or {})
        place = {"corpus": str(self.benchmarks.corpus(self.benchmarks.main)), "out": str(self.reranker_folder(name))}
        try:
            return load_config(reranker.TrainRerankerConfig, values=values | place)
        except ConfigError as error:
            raise ConfigError(f"rerankers.{name}: {error}") from error

    def index(self, name: str, model: str, benchmark: str, *, of_run: str = "") -> Path:
        """Encode the benchmark's corpus with a retriever, or link to the run's index if it is still usable.

        Benchmarks with the same corpus as the run's share its index, and the seeds of a series that of a retriever that
        does not depend on the seed.
        """
        main, indexes = self.benchmarks.main, self.out / "index" / name
        out, corpus = indexes / benchmark, self.benchmarks.corpus(benchmark)
        if benchmark != main and corpus.resolve() == self.benchmarks.corpus(main).resolve():
            link(out, indexes / main)
            return out
        if of_run and benchmark == main:
            built = self.run.phases.index_folder(int(of_run.rpartition("-")[2]))
            # A link of an earlier start goes through `link` again, which repairs it or refuses another target.
            if out.is_symlink() or (not out.exists() and _usable(built, model)):
                link(out, built)
                return out
        own = self.run.config.index
        if not of_run:
            own = {key: value for key, value in own.items() if key not in _OF_A_RETRIEVER}
        values = {"corpus": str(corpus), "retriever": model, "out": str(out)}
        config = load_config(index.IndexConfig, values=own | values)
        for earlier in self.config.evaluate.get("reuse", ()):
            built = Path(earlier).parent / "index" / name / benchmark
            if (out.is_symlink() or not out.exists()) and _same(built, config):
                link(out, built)
                return out
        if out.is_symlink():
            raise ManifestMismatchError(
                f"{out}: links to {out.resolve()}, but this retriever needs its own index; choose another out"
            )
        index.run(config, resume=True)
        return out

    def train(self, trained: TrainedRetriever) -> str:
        """Make the data that differ from the run's, then train on them; returns the retriever's folder."""
        if trained.plan.regroups:
            self.regroup(trained)
        settings = trained.train()
        training.run_apart(settings)
        return settings.out

    def regroup(self, trained: TrainedRetriever) -> None:
        """Select groups with other settings, after scoring and rolling out again what the plan changes."""
        if trained.plan.sampled:
            self.sample(trained.file("relevance"), trained.plan.sampled)
        if trained.plan.relevance:
            relevance.run(trained.relevance(), resume=True)
        if trained.rolls_out:
            self.roll_out(trained)
        groups.run(trained.groups(), resume=True)

    def sample(self, out: Path, count: int) -> None:
        """Write relevance scores in which all candidates except `count` random ones score 0, so they stay negatives.

        Raises:
            ManifestMismatchError: the file was drawn from another source.
        """
        whole, seed = self.run.data("relevance"), self.run.config.seed
        drawn_from = {"relevance": file_fingerprint(whole), "seed": seed, "sampled": count}

        def drawn() -> Iterator[Relevance]:
            for record in read_records(whole, Relevance):
                # Seeded by query, from sorted ids: the order of records does not change what is drawn.
                draw = random.Random(f"{seed}/{record.id}/{record.turn}")
                kept = set(draw.sample(sorted(record.scores), min(count, len(record.scores))))
                scores = {name: score if name in kept else 0 for name, score in record.scores.items()}
                yield replace(record, scores=scores)

        with Output(out=out, made_from=drawn_from, done=".report.json").claim(resume=True) as held:
            held.begin()
            if held.finished is None:
                held.finish({"records": write_records(out, drawn())})

    def roll_out(self, trained: TrainedRetriever) -> None:
        """Run the stage `correctness` with the loop's agent and search."""
        first = self.run.first_retriever
        index_dir = self.index(first, self.run.model(first, "retriever"), self.benchmarks.main, of_run=first)
        with server.running_service(self.run.phases.serve(str(index_dir))) as url:
            correctness.run(trained.correctness(url), resume=True)


def _usable(built: Path, model: str) -> bool:
    """Whether an index exists with its corpus and retriever at the recorded paths (not after a run was moved)."""
    if not (built / index.MANIFEST).is_file():
        return False
    manifest = index.read_manifest(built)
    return Path(manifest.corpus).exists() and (manifest.retriever == model or Path(manifest.retriever).is_dir())


def _same(built: Path, config: index.IndexConfig) -> bool:
    """Whether an index exists that was made with these settings from the same passages, wherever they are."""
    if not (built / index.MANIFEST).is_file():
        return False
    made_with = load_config(index.IndexConfig, built / "config.yaml")
    if replace(made_with, out=config.out, corpus=config.corpus) != config:
        return False
    with Corpus(config.corpus) as corpus:
        return corpus.fingerprint() == index.read_manifest(built).corpus_fingerprint
