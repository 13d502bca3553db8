"""Experiments on a run's data: every recipe composes, and the driver makes and compares what the plan says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin import experiment as experiment_module
from agentic_r_plugin import iterate
from agentic_r_plugin.comparison import forecast as forecast_module
from agentic_r_plugin.comparison.benchmarks import Benchmarks
from agentic_r_plugin.comparison.evaluation import Evaluation, stops_at
from agentic_r_plugin.comparison.forecast import forecast
from agentic_r_plugin.comparison.retrievers import Retrievers
from agentic_r_plugin.comparison.settings import parts
from agentic_r_plugin.comparison.source import SourceRun
from agentic_r_plugin.comparison.summary import groups_of
from agentic_r_plugin.comparison.trained import TrainedRetriever
from agentic_r_plugin.config import load_config, save_config
from agentic_r_plugin.data import correctness
from agentic_r_plugin.data.selection import SelectionRule
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError
from agentic_r_plugin.evaluation import aggregate
from agentic_r_plugin.experiment import ExperimentConfig, run
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.loop.checks import check_settings
from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.protocol import load_protocol
from agentic_r_plugin.records import (
    Candidates,
    CorpusLine,
    Correctness,
    Group,
    Question,
    Relevance,
    ScoredPassage,
    StopReason,
    Trajectory,
    Turn,
)
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.indexing import index
from agentic_r_plugin.search.service import server
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import dump_line, read_json, read_lines, read_records, write_records
from recipes.quickstart.warm_start.train import WarmStartConfig
from tests.data.scripted import select
from tests.evaluation.evaluation_toy import write_benchmark
from tests.search.tiny_retriever import make_model, make_reranker

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "experiments"
SMALL_WORLD = {
    "seed": 5, "train_questions": 0, "dev_questions": 0, "test_questions": 2, "people": 16, "works": 12,
    "companies": 4, "schools": 4, "prizes": 4, "towns": 8, "rivers": 4, "newspapers": 2, "talk_passages": 0,
}  # fmt: skip
LIMITS = {"max_searches": 2, "max_malformed": 1, "max_tokens": 900, "max_response_tokens": 24}


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_composes(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if recipe.stem.startswith("loop"):
        config = load_config(IterateConfig, recipe)
        opens = recipe.stem == "loop_opened"
        protocol = "tool_calls" if opens else "compact"
        assert (config.protocol, config.world.test_questions, config.world.seed) == (protocol, 1000, 0)
        if opens:  # the agent is run as it was taught
            taught = load_config(WarmStartConfig, ROOT / "recipes" / "tool_calls" / "open.yaml").protocol
            made = load_protocol(protocol, config.protocol_options | {"thought_form": taught.thought_form})
            assert made == taught
        assert (config.world.homonyms, config.world.misleading) == ((0.5, 0.5) if "causes" in recipe.stem else (0, 0))
        assert config.train_agent["mini_batch_size"] == 16, "the quick start's settings"
        return
    found = load_config(ExperimentConfig, recipe)
    assert found.retrievers and found.out == f"runs/experiments/{recipe.stem}" and found.seeds == [0, 10, 20]
    if not (found.variants or found.loop_settings):
        assert load_config(ExperimentConfig, recipe, ["seeds=[]", "loop="]).loop is None, "as the README says"
    whole = list(parts(replace(found, run=str(tmp_path / "{variant}" / "{seed}"))))
    assert len(whole) == 3 * max(len(found.variants), 1)
    for part in whole:
        assert part.loop is not None and part.loop.seed == part.seed and part.loop.world.seed == 0
        check_settings(Phases(part.loop))
    text = forecast(whole)
    (hours,) = re.findall(r"forecast: (?:(\d+) h )?\d+ min", text)
    assert int(hours or 0) < 3, text


def test_only_some_retrievers_are_made_and_a_name_that_is_none_is_refused() -> None:
    recipe = RECIPES / "correctness_cost.yaml"
    found = load_config(ExperimentConfig, recipe, ["only=[likelihood,pruned]"])
    assert list(found.retrievers) == ["likelihood", "pruned"]
    assert list(replace(found, only=[]).retrievers) == ["likelihood", "pruned"], "as saved in config.yaml"
    with pytest.raises(ConfigError, match=r"only: 'x' is not among retrievers: exhaustive, pruned, "):
        load_config(ExperimentConfig, recipe, ["only=[x]"])


def test_only_some_variants_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = RECIPES / "homonyms.yaml"
    found = list(parts(load_config(ExperimentConfig, recipe, ["only=[homonyms-6]", "seeds=[0]"])))
    assert [(part.variant, part.loop.world.homonyms) for part in found if part.loop] == [("homonyms-6", 0.6)]
    assert list(found[0].experiment.retrievers) == ["retriever-0", "with_question", "without_question"]
    both = load_config(ExperimentConfig, recipe, ["only=[homonyms-6,none,retriever-0]"])
    assert [(part.variant, part.seed) for part in parts(both)] == [
        (variant, seed) for variant in ("homonyms-6", "none") for seed in both.seeds
    ]
    assert list(both.retrievers) == ["retriever-0"]


def test_an_agent_of_another_protocol_is_compared_by_the_command_in_the_recipe(finished: Path, tmp_path: Path) -> None:
    text = (RECIPES / "transfer.yaml").read_text()
    (tools,) = re.findall(r'"(evaluate\.per_agent=.*)"', text)
    agent = ROOT / "recipes" / "quickstart" / "agent"
    values = [f"run={finished}", f"out={tmp_path}", "seeds=[]", "loop=", f"agents=[agent-1,tools={agent}]", tools]
    evaluation = Evaluation(*of(load_config(ExperimentConfig, RECIPES / "transfer.yaml", values)))
    settings = evaluation.settings({"x": "x"}).per_agent["tools"]
    assert settings.protocol == "tool_calls" and settings.protocol_options == {"system": ""}


def test_a_series_makes_the_runs_that_are_missing_and_tables_over_its_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    for module, name in ((iterate, "loop"), (aggregate, "aggregate")):
        monkeypatch.setattr(module, "run", lambda config, resume, name=name: calls.append((name, config)))
    monkeypatch.setattr(experiment_module, "compare", lambda config, resume: calls.append(("experiment", config)))
    config = ExperimentConfig(
        run=str(tmp_path / "{variant}-{seed}"), out=str(tmp_path / "out"), seeds=[3, 13],
        retrievers={"b": {"bm25": True}},
        loop=str(RECIPES / "loop.yaml"), loop_settings={"world": {"test_questions": 9}}, agents=["a=x/{seed}"],
        variants={"plain": {}, "shared": {"world": {"homonyms": 0.5}}},
    )  # fmt: skip
    monkeypatch.chdir(ROOT)
    run(config)
    loops, made, tables = ([c for name, c in calls if name == kind] for kind in ("loop", "experiment", "aggregate"))
    assert [name for name, _ in calls] == ["loop"] * 4 + ["experiment"] * 4 + ["aggregate"] * 2
    assert [(c.out, c.seed, c.world.test_questions, c.world.homonyms) for c in loops] == [
        (str(tmp_path / f"{variant}-{seed}"), seed, 9, share)
        for variant, share in (("plain", 0), ("shared", 0.5))
        for seed in (3, 13)
    ]
    assert [(c.run, c.agents) for c in made] == [(c.out, [f"a=x/{c.seed}"]) for c in loops]
    assert [c.evaluate.get("reuse") for c in made] == [
        None if loop.seed == 3 else [str(Path(c.out).parent / "seed-3" / "evaluation")]
        for c, loop in zip(made, loops, strict=True)
    ]
    assert [c.runs for c in tables] == [[f"{c.out}/seed-3", f"{c.out}/seed-13"] for c in tables]
    assert [c.out for c in tables] == [str(tmp_path / "out" / variant) for variant in ("plain", "shared")]
    calls.clear()
    run(replace(config, dry_run=True))
    assert calls == []


def test_the_forecast_counts_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loop = tmp_path / "loop.yaml"
    seconds = {"train-agent": 400, "correctness": 60, "train-retriever": 100, "index": 20, "evaluate": 110}
    quick = dict.fromkeys(("trajectories", "candidates", "relevance", "groups"), 0)
    expected = dump_line({"0": {"world": 0, "index": 20}, "1": quick | seconds}).decode()
    loop.write_text(f"extends: {RECIPES / 'loop.yaml'}\nexpected_seconds: {expected}")
    config = ExperimentConfig(
        run=str(tmp_path / "run"), out=str(tmp_path / "out"), loop=str(loop),
        retrievers={"r": {"of_run": "retriever-1"}, "n": {"relevance": {"scorer": "noisy"}}, "e": {"exhaustive": True}},
    )  # fmt: skip
    (part,) = parts(config)
    # 710 s of the loop; two times training and index, 60 s and 60 / 0.045 s of rollouts; three cells of 110 s
    assert re.search(r"\| all +\| 12 min +\| 27 min +\| 6 min +\|", forecast([part]))
    took = {"train-agent": 100.0, "correctness": 9.0, "train-retriever": 50.0, "index": 20.0, "evaluate": 50.0}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "costs.jsonl").write_bytes(
        b"".join(dump_line({"iteration": 1, "phase": name, "seconds": value}) for name, value in took.items())
    )
    done = tmp_path / "out" / "evaluation" / "agent-1-r-main"
    done.mkdir(parents=True)
    (done / "result.json").write_text("{}")
    known = forecast_module._known_seconds(part)
    assert forecast_module._retrievers_left(part, known) == 2 * 70 + 9 + 9 / 0.045
    assert forecast_module._cells_left(part, known) == pytest.approx(2 * 50)


def test_the_forecast_knows_copied_cells_and_other_numbers_of_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    # The recipe's `evaluate` takes 110 s for 1,000 questions; the run evaluates one, the experiment 500.
    fixed = {"train_agents": False, "agent": "recipes/quickstart/agent", "evaluate": {"first": 1}}
    values = {"run": str(tmp_path / "{seed}"), "out": str(tmp_path / "out"), "loop_settings": fixed}
    config = load_config(ExperimentConfig, RECIPES / "search_turns.yaml", values=values | {"evaluate": {"first": 500}})
    first, second, _ = parts(config)
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "costs.jsonl").write_bytes(dump_line({"iteration": 1, "phase": "evaluate", "seconds": 20.0}))
    for part, cells in ((first, 3 * 5), (second, 1 * 5)):
        known = forecast_module._known_seconds(part)
        assert known["question"] == 0.11
        assert forecast_module._cells_left(part, known) == pytest.approx(cells * 55)
    # The agents of a loop that trains them differ between the seeds.
    trains = replace(config, loop_settings={}, agents=["agent-0", "agent-1"], max_searches=[])
    _, second, _ = parts(trains)
    assert forecast_module._cells_left(second, {"question": 0.11}) == pytest.approx(4 * 55), "six but agent-0's two"


def test_the_loop_is_kept_at_the_last_iteration_before_the_first_that_brought_nothing() -> None:
    assert [stops_at(scores) for scores in ([0.4], [0.4, 0.5], [0.5, 0.4, 0.9], [0.4, 0.5, 0.5])] == [0, 1, 0, 1]


def test_the_rule_also_considers_what_training_started_from(finished: Path, tmp_path: Path) -> None:
    given = {"stop_rule": "dev", "retrievers": {name: {"of_run": name} for name in ("retriever-0", "retriever-1")}}
    for agents, cells in (
        (["agent-0", "agent-1"], ["agent-0:retriever-0", "agent-1:retriever-1"]),
        (["agent-1"], ["agent-1:retriever-1"]),
    ):
        evaluation = Evaluation(*of(experiment(finished, tmp_path / "out", agents=agents, **given)))
        assert evaluation.stop_settings(dict.fromkeys(given["retrievers"], "x")).cells == cells
    with pytest.raises(ConfigError, match="expected agent-1, agent-2"):
        Evaluation(*of(experiment(finished, tmp_path / "out", agents=["agent-0"], **given))).stop_settings({})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `iterate` leaves of one iteration on the toy benchmark, with data written by hand."""
    folder = tmp_path_factory.mktemp("experiment")
    home, out = write_benchmark(folder), folder / "run"
    for split in ("train", "dev"):
        (home / f"{split}.jsonl").write_bytes((home / "test.jsonl").read_bytes())
    agent, model = ROOT / "recipes" / "quickstart" / "agent", make_model(folder)
    data = out / "iteration-1" / "data"
    data.mkdir(parents=True)
    (out / "iteration-1" / "agent").mkdir()
    (out / "iteration-1" / "agent" / "agent").symlink_to(agent)
    (out / "iteration-1" / "retriever").symlink_to(model)
    config = load_config(
        IterateConfig,
        values={
            "out": "moved/since",
            "agent": str(agent),
            "retriever": model,
            "benchmark": str(home),
            "iterations": 1,
            "protocol": "compact",
            "limits": LIMITS,
            "groups": {"num_negatives": 3},
            "train_retriever": {"batch_size": 2, "group_size": 4, "max_steps": 1, "query_max_length": 32},
        },
    )
    save_config(config, out / "config.yaml")
    write_data(data, list(read_records(home / "test.jsonl", Question)))
    return out


def write_data(data: Path, questions: list[Question]) -> None:
    """One query a question, all passages its candidates, two of them relevant and the second of these correct."""
    names = [f"{kind}{i}" for i in range(6) for kind in "pt"]
    files: dict[str, list[Any]] = {"candidates": [], "relevance": [], "correctness": [], "groups": []}
    for i, question in enumerate(questions):
        query = Candidates(
            id=question.id, turn=1, question=question.question, golden_answers=question.golden_answers, query="where",
            history=(), prefix="<think> where </think><search> where </search>",
            passages=tuple(ScoredPassage(id=name, score=1.0 - k / 20) for k, name in enumerate(names)),
        )  # fmt: skip
        relevance = dict.fromkeys(names, 10) | {f"p{i}": 90, f"t{i}": 70}
        correct = {f"p{i}": 0, f"t{i}": 1}
        chosen = select(query, relevance, correct, SelectionRule(num_negatives=3))
        assert not isinstance(chosen, str)
        files["candidates"].append(query)
        files["relevance"].append(Relevance(id=question.id, turn=1, scores=relevance))
        files["correctness"] += [
            Correctness(id=question.id, turn=1, passage_id=name, em=em, answer=None, searches=0)
            for name, em in correct.items()
        ]
        files["groups"] += chosen
    for name, records in files.items():
        write_records(data / f"{name}.jsonl", records)
    (data / "correctness.jsonl.report.json").write_text('{"rollouts": 12}')


def experiment(finished: Path, out: Path, **values: Any) -> ExperimentConfig:
    return load_config(ExperimentConfig, values={"run": str(finished), "out": str(out)} | values)


def of(config: ExperimentConfig) -> tuple[ExperimentConfig, Benchmarks]:
    return config, Benchmarks(config, SourceRun(config.run, config.iteration))


def trained(config: ExperimentConfig) -> TrainedRetriever:
    """How the only retriever of an experiment is trained."""
    (name,) = config.retrievers
    return TrainedRetriever(*of(config), name)


def test_retrievers_are_made_compared_and_accounted_for_and_a_resume_does_nothing_again(
    finished: Path, tmp_path: Path
) -> None:
    config = experiment(
        finished,
        tmp_path / "out",
        agents=["agent-1", f"other={ROOT / 'recipes' / 'quickstart' / 'agent'}"],
        retrievers={
            "bm25": {"bm25": True},
            "retriever-1": {"of_run": "retriever-1"},
            "both": {"hybrid": ["bm25", "retriever-1"]},
            "reranked": {"rerank": "cross_encoder", "of": "bm25", "depth": 4},
            "replug": {"train": {"trainer": "replug"}},
            "judge_only": {"groups": {"use_correctness": False}},
            "likelihood": {"correctness": {"method": "likelihood"}},
            "noisy": {"relevance": {"scorer": "noisy", "options": {"rate": 0.3}}, "groups": {"use_correctness": False}},
            "all": {"exhaustive": True, "groups": {"use_correctness": False}, "train": {"formulation": "query"}},
        },
        rerankers={"cross_encoder": {"model": make_reranker(tmp_path / "start"), "num_candidates": 3, "device": "cpu"}},
        worlds={"shifted": SMALL_WORLD},
        evaluate={
            "first": 2,
            "resamples": 100,
            "cells": ["agent-1:both", "agent-1:all", "agent-1:bm25", "agent-1:reranked", "other:replug"],
        },
        stop_rule="dev",
    )
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    run(config)
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before
    made = read_json(config.out + "/experiment.json")["retrievers"]
    assert made["replug"] == {"groups": 6, "same_positive": 1.0, "rollouts": 12}
    assert made["judge_only"] == {"groups": 6, "same_positive": 0.0, "rollouts": 0}
    assert made["retriever-1"] == made["replug"] and made["bm25"]["groups"] is made["both"]["groups"] is None
    rolled_out = [line for _, line in read_lines(config.out + "/correctness.jsonl")]
    assert len(rolled_out) == 6 * 12
    record = read_json(config.out + "/retrievers/all/retriever/agentic_r.json")
    assert record["formulation"] == "query" and record["query_max_length"] == 32
    cells = read_json(config.out + "/evaluation/matrix.json")["cells"]
    assert [(cell["agent"], cell["retriever"], cell["benchmark"]) for cell in cells] == [
        (*pair, benchmark)
        for benchmark in ("toy", "shifted")
        for pair in (*(("agent-1", name) for name in ("both", "all", "bm25", "reranked")), ("other", "replug"))
    ]
    (reranked,) = (cell["made_from"] for cell in cells if (cell["retriever"], cell["benchmark"]) == ("reranked", "toy"))
    assert (reranked["search_backend"], reranked["rerank"]["depth"]) == ("bm25", 4)
    assert reranked["rerank"]["model"] == path_fingerprint(f"{config.out}/rerankers/cross_encoder")
    reranker = read_json(config.out + "/experiment.json")["rerankers"]["cross_encoder"]
    assert (reranker["queries"], reranker["held_out"]) == (5, 1)
    stop = read_json(config.out + "/stop_rule.json")
    assert stop["split"] == "dev" and stop["stops_at"] == 1 and len(stop["em"]) == 1
    assert "| judge_only" not in (table := Path(config.out, "experiment.md").read_text()) and "| replug" in table
    assert re.search(r"\| reranked +\| agent-1 +\| shifted +\| \d+ +\| \d+ +\| \d+ +\|$", table, re.MULTILINE)
    with pytest.raises(OutputExistsError):
        run(config)
    times = {path: path.stat().st_mtime_ns for path in Path(config.out, "evaluation").glob("*/result.json")}
    run(config, resume=True)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_candidates_that_are_not_drawn_are_never_positive_and_stay_negatives(finished: Path, tmp_path: Path) -> None:
    drawing = Retrievers(*of(experiment(finished, tmp_path / "out", retrievers={"s": {"sampled": 4}})))
    drawing.sample(tmp_path / "relevance.jsonl", 4)
    whole = list(read_records(finished / "iteration-1" / "data" / "relevance.jsonl", Relevance))
    drawn = list(read_records(tmp_path / "relevance.jsonl", Relevance))
    for full, part in zip(whole, drawn, strict=True):
        kept = [name for name, score in part.scores.items() if score]
        assert len(kept) == 4 and all(part.scores[name] == full.scores[name] for name in kept)
        assert part.scores.keys() == full.scores.keys()
    assert len({frozenset(name for name, score in record.scores.items() if score) for record in drawn}) > 1


def test_rollouts_share_one_retrieval_service_as_in_the_loop(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Retrievers(*of(experiment(finished, tmp_path / "out", retrievers={"s": {"sampled": 4}})))
    served: list[Any] = []
    run_with: list[Any] = []

    @contextmanager
    def service(config: Any) -> Iterator[str]:
        served.append(config.index)
        yield "http://host:1"

    monkeypatch.setattr(server, "running_service", service)
    monkeypatch.setattr(made, "index", lambda *_, **__: tmp_path / "index")
    monkeypatch.setattr(correctness, "run", lambda config, resume: run_with.append(config))
    made.roll_out(made.trained("s"))
    assert served == [str(tmp_path / "index")]
    assert (run_with[0].search.backend, run_with[0].search.url) == ("service", "http://host:1")


def test_without_relevance_the_groups_come_from_the_correctness_of_every_candidate(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {"exhaustive": True, "groups": {"use_relevance": False}}
    made = Retrievers(*of(experiment(finished, tmp_path / "out", retrievers={"x": plan})))
    queries = list(read_records(finished / "iteration-1" / "data" / "candidates.jsonl", Candidates))
    right = {
        query.key: f"p{5 - place}" for place, query in enumerate(queries)
    }  # irrelevant, and never rolled out by the run
    outcomes = [
        Correctness(
            id=query.id, turn=1, passage_id=passage.id, em=int(passage.id == right[query.key]), answer=None, searches=0
        )
        for query in queries
        for passage in query.passages
    ]
    (tmp_path / "out").mkdir()
    write_records(tmp_path / "out" / "correctness.jsonl", outcomes)
    monkeypatch.setattr(made, "roll_out", lambda _: None)
    made.regroup(made.trained("x"))
    found = made.trained("x").file("groups")
    assert {(group.id, group.turn): group.positive for group in read_records(found, Group)} == right


def test_groups_of_ties_are_refused_where_the_runs_correctness_stopped_at_the_first_success(
    finished: Path, tmp_path: Path
) -> None:
    plans = {"x": {"groups": {"preset": "released_code"}}}
    with pytest.raises(ConfigError, match=r"retrievers\.x: groups: .*up to 3 tied candidates.*exhaustive: true"):
        trained(experiment(finished, tmp_path / "out", retrievers=plans)).check()
    trained(experiment(finished, tmp_path / "out", retrievers={"x": {**plans["x"], "exhaustive": True}})).check()


def test_a_run_whose_groups_need_no_correctness_is_not_asked_for_one(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    data = moved / "iteration-1" / "data"
    data.mkdir(parents=True)
    (moved / "iteration-1" / "agent").symlink_to(finished / "iteration-1" / "agent")
    (moved / "iteration-1" / "retriever").symlink_to(finished / "iteration-1" / "retriever")
    for name in ("candidates", "relevance", "groups"):
        (data / f"{name}.jsonl").symlink_to(finished / "iteration-1" / "data" / f"{name}.jsonl")
    queries = list(read_records(data / "candidates.jsonl", Candidates))
    trajectories = [
        Trajectory(
            id=query.id, question=query.question, golden_answers=query.golden_answers, answer=None, em=0, f1=0.0,
            text="", stop_reason=StopReason.MAX_TURNS,
            turns=(Turn(turn=1, reasoning="", query="where", passages=query.passages[:4], opened=(f"t{i}",)),),
        )
        for i, query in enumerate(queries)
    ]  # fmt: skip
    write_records(data / "trajectories.jsonl", trajectories)
    save_config(load_config(IterateConfig, finished / "config.yaml", ["groups.preset=opened"]), moved / "config.yaml")
    plans = {
        "own": {"of_run": "retriever-1"},
        "unjudged": {"groups": {"use_relevance": False}},
        "paper": {"groups": {"preset": "paper"}, "correctness": {"method": "rollout"}},
    }
    made = Retrievers(*of(experiment(moved, tmp_path / "out", retrievers=plans)))
    made.check()
    assert groups_of(made, "own")["rollouts"] == 0
    made.regroup(made.trained("unjudged"))
    positives = [group.positive for group in read_records(made.trained("unjudged").file("groups"), Group)]
    assert positives == ["t0", "t1"], "p0, t0, p1 and t1 were shown"
    with pytest.raises(ConfigError, match=r"retrievers\.x: the run has no .*correctness\.jsonl"):
        trained(experiment(moved, tmp_path / "out", retrievers={"x": {"groups": {"preset": "paper"}}})).check()


def test_a_sample_drawn_otherwise_is_not_taken_for_this_one(finished: Path, tmp_path: Path) -> None:
    drawing = Retrievers(*of(experiment(finished, tmp_path / "out", retrievers={"s": {"sampled": 4}})))
    file = tmp_path / "relevance.jsonl"
    drawing.sample(file, 4)
    before = file.stat().st_mtime_ns
    drawing.sample(file, 4)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(ManifestMismatchError, match="sampled was 4, now 5"):
        drawing.sample(file, 5)


def test_a_link_to_another_run_is_refused_and_one_that_leads_nowhere_is_made_anew(
    finished: Path, tmp_path: Path
) -> None:
    _, benchmarks = of(experiment(finished, tmp_path / "out", retrievers={"b": {"bm25": True}}))
    benchmarks.gather()
    benchmarks.gather()
    link = tmp_path / "out" / "benchmarks" / "toy" / "test.jsonl"
    there = link.resolve()
    for target, found in ((tmp_path / "nowhere", there), (tmp_path, None)):
        link.unlink()
        link.symlink_to(target)
        if found is None:
            with pytest.raises(ManifestMismatchError, match=r"test\.jsonl: links to .*, expected .*another out"):
                benchmarks.gather()
        else:
            benchmarks.gather()
            assert link.resolve() == found


@pytest.mark.parametrize(("retriever_from", "first"), [("first", "0"), ("previous", "1")])
def test_a_retriever_is_trained_from_the_start_and_with_the_seed_of_the_loop(
    finished: Path, tmp_path: Path, retriever_from: str, first: str
) -> None:
    moved = tmp_path / "run"
    moved.mkdir()
    (moved / "iteration-1").symlink_to(finished / "iteration-1")
    (moved / "iteration-2").symlink_to(finished / "iteration-1")
    own = load_config(IterateConfig, finished / "config.yaml", ["seed=5", f"retriever_from={retriever_from}"])
    save_config(own, moved / "config.yaml")
    made = trained(experiment(moved, tmp_path / "out", iteration=2, retrievers={"x": {"train": {"epochs": 7}}}))
    found = made.train()
    start = {"0": own.retriever, "1": str(moved / "iteration-1" / "retriever")}[first]
    assert found == replace(
        made.run.phases.train_retriever(2, start, str(moved / "iteration-2" / "data" / "groups.jsonl")),
        epochs=7, corpus=str(tmp_path / "out" / "benchmarks" / "toy" / "corpus.jsonl"),
        out=str(tmp_path / "out" / "retrievers" / "x" / "retriever"),
    )  # fmt: skip
    assert found.seed == 6
    scored = {"train": {"trainer": "replug"}}
    found = trained(experiment(moved, tmp_path / "out", iteration=2, retrievers={"x": scored})).train()
    assert found.relevance == str(moved / "iteration-2" / "data" / "relevance.jsonl")


def test_an_experiment_evaluates_as_the_run_does_and_on_its_benchmarks(finished: Path, tmp_path: Path) -> None:
    for name in ("musique", "nq"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "test.jsonl").write_bytes(b"")
    (tmp_path / "data" / "nq" / "corpus.jsonl").write_bytes(b"its own")
    of_run = {
        "data_dir": str(tmp_path / "data"), "benchmarks": ["musique", "nq"], "splits": {"nq": "dev"},
        "cells": ["agent-1:retriever-1"], "settings": {"depth": 30, "agent": {"dtype": "float16"}}, "first": 5,
    }  # fmt: skip
    run_config = load_config(IterateConfig, finished / "config.yaml", values={"evaluate": of_run})
    save_config(run_config, (tmp_path / "run" / "config.yaml"))
    (tmp_path / "run" / "iteration-1").symlink_to(finished / "iteration-1")
    config = experiment(
        tmp_path / "run", tmp_path / "out", retrievers={"retriever-1": {"of_run": "retriever-1"}},
        evaluate={"settings": {"batch_size": 7}, "first": 3},
    )  # fmt: skip
    _, benchmarks = of(config)
    found = Evaluation(config, benchmarks).settings({"retriever-1": "x"})
    settings = found.settings
    assert (settings.depth, settings.batch_size, settings.protocol, settings.agent.dtype) == (
        30,
        7,
        "compact",
        "float16",
    )
    assert settings.limits.max_searches == LIMITS["max_searches"]
    assert (found.benchmarks, found.splits, found.first, found.cells) == (["musique", "nq"], {"nq": "dev"}, 3, [])
    benchmarks.gather()
    home = tmp_path / "out" / "benchmarks"
    assert Path(found.data_dir) == home and (home / "nq" / "corpus.jsonl").read_bytes() == b"its own"
    assert (home / "musique" / "corpus.jsonl").resolve() == (home / "toy" / "corpus.jsonl").resolve()
    built = tmp_path / "out" / "index" / "retriever-1" / "toy"
    built.mkdir(parents=True)
    assert Retrievers(config, benchmarks).index("retriever-1", "x", "musique").resolve() == built.resolve()
    deciding = Evaluation(*of(replace(config, stop_rule="dev"))).stop_settings({"retriever-1": "x"})
    assert (deciding.benchmarks, deciding.split, deciding.splits) == (["toy"], "dev", {})
    held = len((home / "toy" / "dev.jsonl").read_text().splitlines())
    for asked, expected in ((1, 1), (held + 400, held)):
        more = replace(config, stop_rule="dev", evaluate={"first": asked})
        assert Evaluation(*of(more)).stop_settings({"retriever-1": "x"}).first == expected


def test_another_retriever_is_indexed_with_its_own_settings(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Retrievers(*of(experiment(finished, tmp_path / "out", retrievers={"b": {"bm25": True}})))
    made.run.config.index.update({"formulation": "question_query", "max_length": 9, "shard_size": 3})
    indexed: list[Any] = []
    monkeypatch.setattr(index, "run", lambda config, resume: indexed.append(config))
    made.index("of_run", "x", "toy", of_run="retriever-1")
    made.index("trained", "x", "toy")
    found = [(config.formulation, config.max_length, config.shard_size) for config in indexed]
    assert found == [("question_query", 9, 3), (None, None, 3)]


def test_seeds_share_the_index_of_a_retriever_that_does_not_depend_on_them(finished: Path, tmp_path: Path) -> None:
    first, second = (
        experiment(
            finished, tmp_path / seed, retrievers={"b": {"bm25": True}}, worlds={"shifted": SMALL_WORLD},
            evaluate={"reuse": reuse},
        )
        for seed, reuse in (("seed-0", []), ("seed-10", [str(tmp_path / "seed-0" / "evaluation")]))
    )  # fmt: skip
    model, other = make_model(tmp_path / "model"), make_model(tmp_path / "other", seed=1)
    of_seed = []
    for config in (first, second):
        benchmarks = Benchmarks(config, SourceRun(config.run, config.iteration))
        benchmarks.gather()
        of_seed.append(Retrievers(config, benchmarks))
    built = of_seed[0].index("fixed", model, "shifted")
    for _ in range(2):  # also when the link is there
        assert of_seed[1].index("fixed", model, "shifted").resolve() == built.resolve()
    of_seed[0].index("trained", model, "shifted")
    assert not of_seed[1].index("trained", other, "shifted").is_symlink(), "another model"


def test_a_limit_of_searches_is_a_separate_agent(finished: Path, tmp_path: Path) -> None:
    config = experiment(finished, tmp_path / "out", retrievers={"bm25": {"bm25": True}}, max_searches=[1, 3])
    found = Evaluation(*of(config)).settings({"bm25": "bm25:x"})
    assert list(found.agents) == ["agent-1-max-1", "agent-1-max-3"]
    assert [found.per_agent[name].limits.max_searches for name in found.agents] == [1, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"retrievers": {}}, "expected at least one of each"),
        ({"retrievers": {"x": {"modell": "y"}}}, r"retrievers\.x: .*modell"),
        ({"retrievers": {"x": {"bm25": True, "model": "y"}}}, "a retriever is one of"),
        (
            {"retrievers": {"x": {"hybrid": ["bm25", "x"]}}},
            r"retrievers\.x: hybrid of 'bm25': expected another retriever",
        ),
        ({"retrievers": {"x": {"rerank": "r"}}, "rerankers": {"r": {}}}, "expected a reranker, another retriever"),
        (
            {"retrievers": {"x": {"rerank": "r", "of": "x"}}, "rerankers": {"r": {}}},
            r"retrievers\.x: reranks 'x': expected another retriever",
        ),
        (
            {"retrievers": {"x": {"rerank": "r", "of": "b"}, "b": {"bm25": True}}},
            "rerank='r' is not among the rerankers",
        ),
        (
            {"retrievers": {"x": {"rerank": "r", "of": "b"}, "b": {"bm25": True}}, "rerankers": {"r": {"epoch": 1}}},
            r"rerankers\.r: .*epoch",
        ),
        ({"retrievers": {"x": {"model": "y", "train": {"epochs": 1}}}}, r"model: is used unchanged, so train would"),
        ({"retrievers": {"x": {"of_run": "retriever-1", "groups": {"seed": 1}}}}, "so groups would have no effect"),
        ({"agents": ["agent-7"]}, r"agent-7: the run has no .*iteration-7"),
        ({"agents": ["retriever-1"]}, "expected agent-K"),
        ({"retrievers": {"x": {"of_run": "retriever-2"}}}, r"retriever-2: the run has no"),
        ({"retrievers": {"x": {"groups": {"num_negativs": 1}}}}, "num_negativs"),
        ({"retrievers": {"x": {"train": {"epochs": 0}}}}, "epochs must be above 0"),
        ({"evaluate": {"cells": ["agent-1:c"]}}, "'agent-1:c' is not AGENT:SEARCH"),
        ({"worlds": {"far": {"namesake_share": 2}}}, "namesake_share"),
        ({"stop_rule": "dev"}, "'agent-1:retriever-1' is not AGENT:SEARCH"),
        ({"stop_rule": "dev", "agents": ["mine=x"]}, "stop_rule: expected agent-1, agent-2, .* agents mine"),
        ({"stop_rule": "dev", "max_searches": [1]}, "at most one of the two"),
        ({"variants": {"a": {}}}, "need loop, the configuration that they change"),
        ({"retrievers": {"x": {"exhaustive": True, "correctness": {"method": "likelihood"}}}}, "give one of the two"),
        ({"retrievers": {"x": {"correctness": {"method": "guess"}}}}, "guess"),
        ({"retrievers": {"x": {"sampled": 2, "relevance": {"scorer": "noisy"}}}}, "a retriever is one of"),
        (
            {"retrievers": {"x": {"relevance": {"scorer": "noisy", "options": {"rate": 2}}}}},
            "expected a share from 0 to 1",
        ),
        ({"run": "nowhere"}, "nowhere/config.yaml: cannot be read"),
        ({"max_searches": [-1]}, "max_searches: expected numbers of at least 0"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_work_is_an_error_that_leaves_nothing_behind(
    finished: Path, tmp_path: Path, values: dict[str, Any], message: str, dry_run: bool
) -> None:
    with pytest.raises(ConfigError, match=message):
        given = {"retrievers": {"b": {"bm25": True}}, "dry_run": dry_run}
        run(experiment(finished, tmp_path / "out", **given | values))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agents": ["mine=runs/typo"]}, "agents.mine: no directory 'runs/typo'"),
        ({"benchmarks": {"nq": "data/nowhere"}}, "data/nowhere: no such folder"),
        ({"evaluate": {"first": 99}}, "99 questions were asked for"),
    ],
)
def test_what_cannot_be_evaluated_is_found_before_anything_is_trained(
    finished: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(experiment(finished, tmp_path / "out", retrievers={"x": {"train": {"epochs": 1}}}, **values))
    assert not (tmp_path / "out" / "retrievers").exists()


def test_an_agent_on_a_server_is_no_missing_folder(finished: Path, tmp_path: Path) -> None:
    plan = {"retrievers": {"b": {"bm25": True}}, "agents": ["served=http://127.0.0.1:1/v1"]}
    engine = {"per_agent": {"served": {"llm": {"model": "agent"}}}}
    Evaluation(*of(experiment(finished, tmp_path / "out", evaluate=engine, **plan))).check_agents()


@pytest.mark.parametrize("form", ["corpus.jsonl.gz", "corpus.parquet"])
def test_a_benchmark_with_a_packed_corpus_is_searched_in_that(finished: Path, tmp_path: Path, form: str) -> None:
    folder = write_benchmark(tmp_path / "other")
    plain = folder / "corpus.jsonl"
    lines = [line for _, line in read_lines(plain)][:5]
    write_records(folder / form, [CorpusLine.from_dict(line) for line in lines])
    plain.unlink()
    config = experiment(finished, tmp_path / "out", retrievers={"b": {"bm25": True}}, benchmarks={"o": str(folder)})
    _, benchmarks = of(config)
    benchmarks.gather()
    Evaluation(config, benchmarks).check_inputs()
    with Corpus(benchmarks.corpus("o")) as corpus:
        assert len(corpus) == 5
    assert Retrievers(config, benchmarks).make_one("b").startswith("bm25:")


def test_groups_of_the_toy_run_name_the_correct_passage(finished: Path) -> None:
    groups = list(read_records(finished / "iteration-1" / "data" / "groups.jsonl", Group))
    assert [group.positive for group in groups] == [f"t{i}" for i in range(6)]
