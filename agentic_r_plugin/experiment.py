"""`agentic-r experiment`: train retrievers in several ways from the data of one run and compare them.

A run folder of `iterate` holds agents and retrievers, and the candidates, relevance, correctness and groups of each
iteration. An experiment trains further retrievers on this data with the package's own stages and other settings, and
evaluates agents x retrievers x benchmarks in one matrix. Everything can be resumed. The run folder is only read.

| in OUT | contents |
|---|---|
| `benchmarks/NAME/` | links to the run's benchmark and to others (`corpus.jsonl` also to a packed corpus); worlds |
| `retrievers/NAME/` | data files that differ from the run's, and `retriever/` |
| `rerankers/NAME/` | a trained reranker |
| `index/NAME/BENCHMARK/` | the benchmark's corpus, encoded with the retriever |
| `evaluation/` | the matrix; `stop_rule/` holds the one on the split of the stop rule |
| `experiment.json`, `experiment.md` | for each retriever its groups, their cost and its exact match |
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from agentic_r_plugin import child
from agentic_r_plugin.config import load_config, merged, save_config, to_dict
from agentic_r_plugin.data import correctness, groups, relevance
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.evaluation import evaluate
from agentic_r_plugin.evaluation.benchmarks import QUESTION_SUFFIXES
from agentic_r_plugin.evaluation.matrix import figure, markdown
from agentic_r_plugin.experiment_plan import ExperimentConfig, RetrieverPlan
from agentic_r_plugin.iterate import IterateConfig, Loop
from agentic_r_plugin.records import Group, Relevance
from agentic_r_plugin.retriever import reranker, training
from agentic_r_plugin.search.corpus import corpus_file
from agentic_r_plugin.search.indexing import index
from agentic_r_plugin.search.service import server
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.store import atomic_path, file_fingerprint, read_json, read_records, write_json, write_records
from agentic_r_plugin.world import generate


def run(config: ExperimentConfig, *, resume: bool = False) -> None:
    """Run the command `experiment`.

    Raises:
        OutputExistsError: the folder exists and `resume` is off.
        ConfigError: a setting is wrong, or the run folder lacks a part that is needed.
        ManifestMismatchError: an existing output was made from another run or with other settings.
        AgenticRError: a stage failed; finished stages are kept.
    """
    experiment = Experiment(config)
    experiment.check()
    # Retrievers, benchmarks and agents may be added later; what each was made from is recorded with it.
    output = Output(out=experiment.out, made_from={"iteration": config.iteration}, done="experiment.json", folder=True)
    with output.claim(resume=resume) as held:
        held.begin()
        save_config(config, experiment.out / "config.yaml")
        experiment.gather_benchmarks()
        experiment.check_evaluation()
        searches = experiment.make_retrievers()
        experiment.compare(searches)
        if config.stop_rule:
            experiment.find_stop(searches)
        held.finish(experiment.summarize())


def stops_at(scores: Sequence[float]) -> int:
    """The iteration to keep: the last one before the first without improvement.

    Args:
        scores: scores of iteration 1, 2, ... on questions that were not used for training.

    >>> stops_at([0.40, 0.44, 0.43]), stops_at([0.40, 0.44, 0.45]), stops_at([0.40, 0.40, 0.50])
    (2, 3, 1)
    """
    return next((k for k, (now, later) in enumerate(pairwise(scores), start=1) if later <= now), len(scores))


class Experiment:
    """The steps of an experiment, each run by one of the package's commands."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config, self.out, self.run = config, Path(config.out), Path(config.run)
        of_run = load_config(IterateConfig, self.run / "config.yaml")
        self.loop = Loop(replace(of_run, out=str(self.run)))
        self.data = self.run / f"iteration-{config.iteration}" / "data"
        self.main = self.loop.benchmark.name
        self.agents = dict(self._agent(item) for item in config.agents)

    def _agent(self, item: str) -> tuple[str, str]:
        name, given, folder = item.partition("=")
        return (name, folder) if given else (item, self._of_run(item, "agent"))

    def _of_run(self, name: str, kind: str) -> str:
        """Path of the run's `agent-K` or `retriever-K`.

        Raises:
            ConfigError: the name or the folder does not exist.
        """
        found, _, number = name.rpartition("-")
        if found != kind or not number.isdecimal():
            raise ConfigError(f"{name!r}: expected {kind}-K, a {kind} of the run {self.run}")
        if number == "0" or (kind == "agent" and not self.loop.config.train_agents):
            return str(getattr(self.loop.config, kind))
        folder = self.run / f"iteration-{number}" / kind
        folder = folder / "agent" if kind == "agent" else folder
        if not folder.is_dir():
            raise ConfigError(f"{name}: the run has no {folder}")
        return str(folder)

    def check(self) -> None:
        """Compose every step with placeholder paths, so that errors are found before anything runs.

        Raises:
            ConfigError: a key or value is wrong, or the run lacks a part that is needed.
        """
        for name, plan in self.config.retrievers.items():
            if plan.of_run:
                self._of_run(plan.of_run, "retriever")
            elif not plan.ready:
                made_here = {"relevance": plan.relevance, "correctness": plan.rolls_out}
                of_run = [role for role in self._reads(plan) if not made_here.get(role)]
                self._require(f"retrievers.{name}", ["candidates", "groups", *of_run])
                self._check_correctness(name, plan)
                self._relevance_config(plan, Path("x")).check()
                self._correctness_config(plan).check()
                self._train_config(plan, Path("x"), Path("x"))
        for name in self._rerankers:
            self._require(f"rerankers.{name}", ["candidates"])
            self._reranker_config(name)
        self._planned_evaluations()
        for name in self.config.worlds:
            self._world_config(name)
        for name, folder in self.config.benchmarks.items():
            if not Path(folder).is_dir():
                raise ConfigError(f"benchmarks.{name}: {folder}: no such folder")

    def _require(self, where: str, names: Sequence[str]) -> None:
        """Check that the run has these data files."""
        for name in names:
            if not (self.data / f"{name}.jsonl").exists():
                raise ConfigError(f"{where}: the run has no {self.data / f'{name}.jsonl'}")

    def _check_correctness(self, name: str, plan: RetrieverPlan) -> None:
        """Check that the run's correctness, if the plan uses it, was not pruned more than its groups allow."""
        rule = self._groups_config(plan, {}, Path("x")).rule()
        rolled_out = self._stage("correctness")
        if "correctness" in self._reads(plan) and not (plan.rolls_out or rolled_out.exhaustive):
            try:
                groups.check_pruned(rule, rolled_out.rule())
            except ConfigError as error:
                raise ConfigError(f"retrievers.{name}: {error} (or exhaustive: true here)") from error

    def check_evaluation(self) -> None:
        """Check the evaluation before anything is trained. The benchmarks must have been gathered.

        Raises:
            ConfigError, RecordError: an agent or a split does not exist, or there are too few or broken questions.
        """
        for config in self._planned_evaluations():
            evaluate.check_inputs(config, later=config.searches.keys())

    def _planned_evaluations(self) -> list[evaluate.EvaluateConfig]:
        """The planned evaluations, with placeholders for the paths of the retrievers."""
        searches = dict.fromkeys(self.config.retrievers, "x")
        stop = [self._stop_config(searches)] if self.config.stop_rule else []
        return [self._evaluate_config(searches, {}, "x"), *stop]

    # --- benchmarks

    def gather_benchmarks(self) -> None:
        """Collect all benchmarks in one folder by linking or generating them."""
        given = {name: Path(folder) for name, folder in self.config.benchmarks.items()}
        for name, folder in ({self.main: self.loop.benchmark} | self._evaluated_by_run() | given).items():
            target = self._benchmark(name)
            target.mkdir(parents=True, exist_ok=True)
            own = corpus_file(folder)
            _link(target / "corpus.jsonl", own if name != self.main and own.is_file() else self.loop.corpus)
            for file in sorted(folder.iterdir()):
                if file.name.endswith(QUESTION_SUFFIXES) and not file.name.startswith(("corpus.", ".")):
                    _link(target / file.name, file)
        for name in self.config.worlds:
            generate.run(self._world_config(name), resume=True)

    def _world_config(self, name: str) -> generate.WorldConfig:
        place = {"out": str(self.out / "benchmarks"), "name": name}
        values = to_dict(self.loop.config.world) | (self.config.worlds[name] or {}) | place
        return load_config(generate.WorldConfig, values=values)

    def _benchmark(self, name: str) -> Path:
        return self.out / "benchmarks" / name

    def _evaluated_by_run(self) -> dict[str, Path]:
        """The benchmarks that the run's own evaluation names, without the run's benchmark."""
        own = self.loop.config.evaluate
        folder = Path(own.get("data_dir", self.loop.benchmark.parent))
        return {name: folder / name for name in own.get("benchmarks", []) if name != self.main}

    def _benchmarks(self) -> list[str]:
        """Names of the benchmarks in the comparison."""
        of_run = self.loop.config.evaluate.get("benchmarks", [self.main])
        return list(dict.fromkeys([*of_run, *self.config.benchmarks, *self.config.worlds]))

    # --- retrievers

    def make_retrievers(self) -> dict[str, Any]:
        """Make all retrievers; returns their locations or settings as `evaluate` expects them."""
        plans = self.config.retrievers
        rerankers = {name: self._train_reranker(name) for name in self._rerankers}
        found: dict[str, Any] = {name: self.make_retriever(name) for name, plan in plans.items() if not plan.rerank}
        for name, plan in plans.items():
            if plan.rerank:
                rerank = {"model": rerankers[plan.rerank], "depth": plan.depth}
                found[name] = evaluate.located(found[plan.of]) | {"rerank": rerank}
        return {name: found[name] for name in plans}

    @property
    def _rerankers(self) -> list[str]:
        """Names of the rerankers in use."""
        return list(dict.fromkeys(plan.rerank for plan in self.config.retrievers.values() if plan.rerank))

    def _reranker(self, name: str) -> Path:
        return self.out / "rerankers" / name

    def _train_reranker(self, name: str) -> str:
        settings = self._reranker_config(name)
        child.run_command("train-reranker", settings)
        return settings.out

    def _reranker_config(self, name: str) -> reranker.TrainRerankerConfig:
        """Training on the scores that the run has, with the given changes."""
        files = {item: self.data / f"{item}.jsonl" for item in ("candidates", "relevance", "correctness")}
        values = {item: str(file) for item, file in files.items() if file.exists()} | {"seed": self.loop.config.seed}
        values |= dict(self.config.rerankers[name] or {})
        place = {"corpus": str(self._benchmark(self.main) / "corpus.jsonl"), "out": str(self._reranker(name))}
        try:
            return load_config(reranker.TrainRerankerConfig, values=values | place)
        except ConfigError as error:
            raise ConfigError(f"rerankers.{name}: {error}") from error

    def make_retriever(self, name: str) -> str:
        """Train the retriever if needed and build its indexes; returns its location as `evaluate` expects it."""
        plan = self.config.retrievers[name]
        if plan.hybrid:
            return f"hybrid:{'+'.join(plan.hybrid)}"
        if plan.bm25:
            return f"bm25:{self._benchmark('{benchmark}') / 'corpus.jsonl'}"
        model = plan.model or (self._of_run(plan.of_run, "retriever") if plan.of_run else self._train(name, plan))
        for benchmark in dict.fromkeys([self.main, *self._benchmarks()]):
            self._index(name, model, benchmark, of_run=plan.of_run)
        return str(self.out / "index" / name / "{benchmark}")

    def _index(self, name: str, model: str, benchmark: str, *, of_run: str = "") -> Path:
        """Encode the benchmark's corpus with a retriever, or link to the run's index if it is still usable.

        Benchmarks with the same corpus as the run's share its index.
        """
        out = self.out / "index" / name / benchmark
        corpus = self._benchmark(benchmark) / "corpus.jsonl"
        if benchmark != self.main and corpus.resolve() == (self._benchmark(self.main) / "corpus.jsonl").resolve():
            _link(out, self.out / "index" / name / self.main)
            return out
        built = self.run / f"iteration-{of_run.rpartition('-')[2]}" / "index"
        linked = out.is_symlink() or (bool(of_run) and not out.exists() and _stands(built, model))
        if linked and benchmark == self.main:
            out.parent.mkdir(parents=True, exist_ok=True)
            _link(out, built)
            return out
        own = self.loop.config.index if of_run else _without_retriever_settings(self.loop.config.index)
        values = {"corpus": str(corpus), "retriever": model, "out": str(out)}
        index.run(load_config(index.IndexConfig, values=own | values), resume=True)
        return out

    def _train(self, name: str, plan: RetrieverPlan) -> str:
        home = self.out / "retrievers" / name
        found = self._regroup(home, plan) if plan.regroups else self.data / "groups.jsonl"
        settings = self._train_config(plan, found, home / "retriever")
        training.run_apart(settings)
        return settings.out

    def _train_config(self, plan: RetrieverPlan, groups_file: Path, out: Path) -> training.TrainRetrieverConfig:
        """The loop's configuration for the iteration's retriever, with the changes of the plan."""
        first = "retriever-0" if self.loop.config.retriever_from == "first" else self._first_retriever()
        start = plan.train.get("retriever") or self._of_run(first, "retriever")
        made = self.loop.train_retriever_config(self.config.iteration, start, groups_file, plan.train)
        if plan.relevance and made.relevance:
            made = replace(made, relevance=str(groups_file.with_name("relevance.jsonl")))
        return replace(made, corpus=str(self._benchmark(self.main) / "corpus.jsonl"), out=str(out))

    def _first_retriever(self) -> str:
        """The retriever with which the iteration's data were made."""
        return f"retriever-{self.config.iteration - 1}"

    def _regroup(self, home: Path, plan: RetrieverPlan) -> Path:
        """Select groups with other settings, after rolling out other candidates if the plan asks for it."""
        files = {item: str(self.data / f"{item}.jsonl") for item in ("candidates", "relevance", "correctness")}
        if plan.sampled:
            files["relevance"] = str(home / "relevance.jsonl")
            self._sample(home / "relevance.jsonl", plan.sampled)
        if plan.relevance:
            files["relevance"] = str(home / "relevance.jsonl")
            relevance.run(self._relevance_config(plan, home / "relevance.jsonl"), resume=True)
        if plan.exhaustive or (plan.rolls_out and "correctness" in self._reads(plan)):
            files["correctness"] = str(self._roll_out(home, plan, files["relevance"]))
        groups.run(self._groups_config(plan, files, home / "groups.jsonl"), resume=True)
        return home / "groups.jsonl"

    def _relevance_config(self, plan: RetrieverPlan, out: Path) -> relevance.RelevanceConfig:
        """The run's scoring of its candidates, with the changes of the plan."""
        files = {"candidates": str(self.data / "candidates.jsonl"), "out": str(out)}
        own = to_dict(self._stage("relevance"))
        if plan.relevance.get("scorer", own["scorer"]) != own["scorer"]:
            own["options"] = {}
        return load_config(relevance.RelevanceConfig, values=merged(own, plan.relevance) | files)

    def _correctness_config(self, plan: RetrieverPlan, url: str = "") -> correctness.CorrectnessConfig:
        """The run's settings of correctness, with the changes of the plan."""
        own = to_dict(self._stage("correctness", url))
        return load_config(correctness.CorrectnessConfig, values=merged(own, plan.correctness))

    def _groups_config(self, plan: RetrieverPlan, files: Mapping[str, str], out: Path) -> groups.GroupsConfig:
        shown = {"trajectories": str(self.data / "trajectories.jsonl")}
        values = {**to_dict(self._stage("groups")), **shown, **files, **plan.groups, "out": str(out)}
        return load_config(groups.GroupsConfig, values=values)

    def _reads(self, plan: RetrieverPlan) -> set[str]:
        """Files that the selection of the plan's groups reads, besides the candidates."""
        return set(self._groups_config(plan, {}, Path("x")).files())

    def _sample(self, out: Path, count: int) -> None:
        """Write relevance scores in which all candidates except `count` random ones score 0, so they stay negatives.

        Raises:
            ManifestMismatchError: the file was drawn from another source.
        """
        whole = self.data / "relevance.jsonl"
        drawn_from = {"relevance": file_fingerprint(whole), "seed": self.loop.config.seed, "sampled": count}

        def drawn() -> Iterator[Relevance]:
            for record in read_records(whole, Relevance):
                draw = random.Random(f"{self.loop.config.seed}/{record.id}/{record.turn}")
                kept = set(draw.sample(sorted(record.scores), min(count, len(record.scores))))
                scores = {name: score if name in kept else 0 for name, score in record.scores.items()}
                yield replace(record, scores=scores)

        with Output(out=out, made_from=drawn_from, done=".report.json").claim(resume=True) as held:
            held.begin()
            if held.finished is None:
                held.finish({"records": write_records(out, drawn())})

    def _roll_out(self, home: Path, plan: RetrieverPlan, relevance: str) -> Path:
        """Run the stage `correctness` with the loop's agent and search. Retrievers share an exhaustive result."""
        out = (self.out if plan.exhaustive else home) / "correctness.jsonl"
        first = self._first_retriever()
        index_dir = self._index(first, self._of_run(first, "retriever"), self.main, of_run=first)
        with server.running_service(self.loop.serve_config(str(index_dir))) as url:
            settings = replace(
                self._correctness_config(plan, url),
                candidates=str(self.data / "candidates.jsonl"),
                relevance="" if plan.exhaustive else relevance,
                exhaustive=plan.exhaustive,
                preset=self._groups_config(plan, {}, Path("x")).preset,
                corpus=str(self._benchmark(self.main) / "corpus.jsonl"),
                out=str(out),
            )
            correctness.run(settings, resume=True)
        return out

    def _stage(self, name: str, url: str = "") -> Any:
        """The run's settings of a data stage."""
        k = self.config.iteration
        return self.loop.stage_config(k, name, self._of_run(f"agent-{k}", "agent"), url)

    # --- results

    def compare(self, searches: Mapping[str, str]) -> None:
        """Evaluate agents x retrievers x benchmarks."""
        evaluate.run(self._evaluate_config(searches, {}, "evaluation"), resume=True)

    def _evaluate_config(
        self, searches: Mapping[str, str], given: Mapping[str, Any], folder: str
    ) -> evaluate.EvaluateConfig:
        limits = self.config.max_searches
        agents = {f"{name}-max-{n}": where for name, where in self.agents.items() for n in limits} or self.agents
        own = {f"{name}-max-{n}": {"limits": {"max_searches": n}} for name in self.agents for n in limits}
        values: dict[str, Any] = {
            "data_dir": str(self.out / "benchmarks"),
            "benchmarks": self._benchmarks(),
            "split": self.loop.config.test_split,
            "agents": agents,
            "per_agent": own,
            "searches": dict(searches),
            "settings": self.loop.protocol_settings() | {"agent": to_dict(self.loop.config.llm)},
        }
        of_run = {key: value for key, value in self.loop.config.evaluate.items() if key not in _OF_THE_MATRIX}
        values = merged(merged(values, of_run), self.config.evaluate)
        return load_config(evaluate.EvaluateConfig, values={**values, **given, "out": str(self.out / folder)})

    def find_stop(self, searches: Mapping[str, str]) -> None:
        """Find where the loop should have stopped, on a split other than the test split; writes `stop_rule.json`.

        The retrievers must include the run's own, named retriever-1, retriever-2, ...
        """
        evaluate.run(self._stop_config(searches), resume=True)
        found = read_json(self.out / "stop_rule" / "matrix.json")["cells"]
        scores = [cell["metrics"]["agentic_em"]["mean"] for cell in found]
        if None in scores:
            raise ConfigError(f"stop_rule: split {self.config.stop_rule!r} has no gold answers to decide by")
        result = {"split": self.config.stop_rule, "em": scores, "stops_at": self._rounds()[stops_at(scores) - 1]}
        write_json(self.out / "stop_rule.json", result)
        print(f"stop rule on {self.config.stop_rule}: K = {result['stops_at']}", flush=True)

    def _stop_config(self, searches: Mapping[str, str]) -> evaluate.EvaluateConfig:
        cells = [f"agent-{k}:retriever-{k}" for k in self._rounds()]
        given = {"benchmarks": [self.main], "split": self.config.stop_rule, "splits": {}, "cells": cells}
        return self._evaluate_config(searches, given, "stop_rule")

    def _rounds(self) -> list[int]:
        return [k for k in range(1, self.loop.config.iterations + 1) if f"agent-{k}" in self.agents]

    def summarize(self) -> dict[str, Any]:
        """Print and write a table of each retriever's groups, their cost and its exact match; returns the summary."""
        cells = read_json(self.out / "evaluation" / "matrix.json")["cells"]
        rows = {name: self._made_from(name) for name in self.config.retrievers}
        table = [["retriever", "groups", "same positive", "rollouts", "agent", "benchmark", "EM", "searches"]]
        for cell in cells:
            made, metrics = rows[cell["retriever"]], cell["metrics"]
            same = made["same_positive"]
            table.append(
                [
                    cell["retriever"],
                    _shown(made["groups"]),
                    "–" if same is None else f"{same:.0%}",
                    _shown(made["rollouts"]),
                    cell["agent"],
                    cell["benchmark"],
                    figure(metrics["agentic_em"], with_interval=True),
                    figure(metrics.get("search_turns"), 1),
                ]
            )
        trained = {name: read_json(self._reranker(name) / reranker.DONE) for name in self._rerankers}
        text = markdown(table) + (f"\n{markdown(self._cost_of_reranking(cells, trained))}" if trained else "")
        with atomic_path(self.out / "experiment.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(text, flush=True)
        found = {"schema": "experiment/1", "retrievers": rows, "config": to_dict(self.config)}
        return found | ({"rerankers": trained} if trained else {})

    def _cost_of_reranking(
        self, cells: Sequence[Mapping[str, Any]], trained: Mapping[str, Mapping[str, Any]]
    ) -> list[list[str]]:
        """Table: seconds of training, and of the evaluation with and without a reranker."""
        took = {(cell["retriever"], cell["agent"], cell["benchmark"]): cell["cost"]["seconds"] for cell in cells}
        table = [["retriever", "agent", "benchmark", "training, s", "evaluation, s", "without reranker, s"]]
        for (name, *where), seconds in took.items():
            if (plan := self.config.retrievers[name]).rerank:
                shown = (trained[plan.rerank]["train_runtime"], seconds, took.get((plan.of, *where)))
                table.append([name, *where, *(_shown(None if time is None else round(time)) for time in shown)])
        return table

    def _made_from(self, name: str) -> dict[str, Any]:
        """Number of groups and rollouts, and the share of queries with the same positive as in the run.

        The share is over the queries that have a positive here or in the run.
        """
        plan = self.config.retrievers[name]
        own_of_iteration = plan.of_run == f"retriever-{self.config.iteration}"
        if plan.ready and not own_of_iteration:
            return {"groups": None, "same_positive": None, "rollouts": None}
        home = self.out / "retrievers" / name
        own = home / "groups.jsonl" if plan.regroups else self.data / "groups.jsonl"
        positives, wanted = _positives(own), _positives(self.data / "groups.jsonl")
        queries = positives.keys() | wanted.keys()
        paid = {"exhaustive": self.out, "own": home, "pruned": self.data}
        kind = "exhaustive" if plan.exhaustive else "own" if plan.rolls_out else "pruned"
        judged = "correctness" in self._reads(plan)
        report = read_json(paid[kind] / "correctness.jsonl.report.json") if judged else {"rollouts": 0}
        return {
            "groups": sum(map(len, positives.values())),
            "same_positive": sum(positives.get(key) == wanted.get(key) for key in queries) / max(len(queries), 1),
            "rollouts": report["rollouts"],
        }


_OF_THE_MATRIX = frozenset({"agents", "searches", "cells", "per_agent", "data_dir", "benchmarks", "out"})
"""Settings of the run's evaluation that an experiment replaces by its own."""


def _without_retriever_settings(section: Mapping[str, Any]) -> dict[str, Any]:
    """The index section without settings of the run's retriever: another one uses what its own record says."""
    return {key: value for key, value in section.items() if key not in ("preset", "formulation", "max_length")}


def _positives(file: Path) -> dict[tuple[str, int], list[str]]:
    found: dict[tuple[str, int], list[str]] = {}
    for group in read_records(file, Group):
        found.setdefault((group.id, group.turn), []).append(group.positive)
    return found


def _stands(built: Path, model: str) -> bool:
    """Whether an index exists with its corpus and retriever at the recorded paths (not after a run was moved)."""
    if not (built / index.MANIFEST).is_file():
        return False
    manifest = index.read_manifest(built)
    return Path(manifest.corpus).exists() and (manifest.retriever == model or Path(manifest.retriever).is_dir())


def _link(link: Path, target: Path) -> None:
    """Link to a file or folder of the run or a benchmark. A broken link (the target was moved) is replaced.

    Raises:
        ConfigError: the target does not exist.
        ManifestMismatchError: the link exists and points to another target.
    """
    if not target.exists():
        raise ConfigError(f"{target}: not there; it belongs to the run or to a benchmark")
    if link.exists() and link.resolve() != target.resolve():
        raise ManifestMismatchError(f"{link}: leads to {link.resolve()}, now {target.resolve()}; choose another out")
    if not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(target.resolve())


def _shown(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
