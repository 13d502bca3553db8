"""Several seeds as one matrix: the figures against a simulation, the command against run folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import AgenticRError, ConfigError, OutputExistsError, RecordError
from agentic_r_plugin.evaluation.aggregate import AggregateConfig, run
from agentic_r_plugin.evaluation.matrix import cell_name
from agentic_r_plugin.evaluation.statistics import seeds_interval
from agentic_r_plugin.store import read_json, write_json
from tests.evaluation.evaluation_run import write_run


def draw(rng: np.random.Generator, seeds: int, questions: int, spread: float) -> np.ndarray:
    """Scores with a seed's own skill, a question's own difficulty, and chance; the true mean is 0.5."""
    skill, difficulty = rng.normal(0, spread, (seeds, 1)), rng.normal(0, 0.3, (1, questions))
    return 0.5 + skill + difficulty + rng.normal(0, 0.3, (seeds, questions))


@pytest.mark.parametrize(("seeds", "spread"), [(3, 0.0), (3, 0.05), (3, 0.2), (8, 0.05)])
def test_the_interval_covers_other_seeds_and_other_questions_at_least_as_often_as_it_says(
    seeds: int, spread: float
) -> None:
    rng = np.random.default_rng(0)
    intervals = [seeds_interval(draw(rng, seeds, 60, spread)) for _ in range(400)]
    covered = sum(interval.low <= 0.5 <= interval.high for interval in intervals) / len(intervals)
    assert covered >= 0.92


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.4), (3, 0.1), (3, 0.4), (3, 0.9), (5, 0.4)])
def test_the_interval_of_exact_match_covers_at_least_as_often_as_it_says(seeds: int, share: float) -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1_000):
        chance = rng.beta(share * 2, (1 - share) * 2, (1, 125))  # of each question, the same for all seeds
        found = seeds_interval((rng.random((seeds, 125)) < chance).astype(float))
        covered += found.low <= share <= found.high
    assert covered / 1_000 >= 0.945


def test_seeds_that_agree_leave_the_interval_of_the_questions_alone() -> None:
    row = [1.0] * 30 + [0.0] * 70
    found = seeds_interval([row, row, row])
    half = 1.984 * (0.3 * 0.7 / 99) ** 0.5
    assert (found.mean, found.per_seed) == (pytest.approx(0.3), pytest.approx((0.3, 0.3, 0.3)))
    assert (found.low, found.high) == (pytest.approx(0.3 - half, abs=1e-3), pytest.approx(0.3 + half, abs=1e-3))


def test_seeds_that_differ_widen_it_beyond_that_of_one_seed() -> None:
    rows = [[1.0] * 100 + [0.0] * (300 - 100), [1.0] * 150 + [0.0] * 150, [1.0] * 200 + [0.0] * 100]
    found = seeds_interval(rows)
    assert found.mean == pytest.approx(0.5) and found.high - found.low > 0.6
    assert found.p_value < 0.05 < seeds_interval(np.asarray(rows) - 0.35).p_value


def test_no_difference_at_all_is_no_finding() -> None:
    found = seeds_interval([[0.0] * 5, [0.0] * 5])
    assert (found.low, found.high, found.p_value) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("values", [[[1.0, 0.0]], [[1.0], [0.0]], [[1.0, 0.0], [1.0]]])
def test_what_has_no_interval_over_seeds_is_refused(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="expected"):
        seeds_interval(values)


AGENTS, RETRIEVERS = ("agent-0",), ("retriever-0", "retriever-1", "retriever-2")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three run folders with made-up figures, each with its own agents and retrievers."""
    folder = tmp_path_factory.mktemp("seeds")
    runs = [
        write_run(folder / f"seed-{n}", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2], seed=n)
        for n in range(3)
    ]
    for number, each in enumerate(runs):
        matrix = read_json(each / "evaluation" / "matrix.json")
        for cell in matrix["cells"]:
            cell["search_fingerprint"] = f"seed {number}"
        write_json(each / "evaluation" / "matrix.json", matrix)
    return runs


def aggregate(runs: list[Path], out: Path) -> AggregateConfig:
    return load_config(AggregateConfig, values={"runs": [str(each) for each in runs], "out": str(out)})


def test_the_command_writes_a_matrix_with_the_mean_of_every_seed(seeds: list[Path], tmp_path: Path) -> None:
    config = aggregate(seeds, tmp_path)
    run(config)
    matrix = read_json(tmp_path / "matrix.json")
    single = [read_json(each / "evaluation" / "matrix.json")["cells"] for each in seeds]
    assert matrix["num_seeds"] == 3 and [cell["retriever"] for cell in matrix["cells"]] == [
        "retriever-0",
        "retriever-1",
    ]
    for place, cell in enumerate(matrix["cells"]):
        em = cell["metrics"]["agentic_em"]
        assert em["per_seed"] == pytest.approx([cells[place]["metrics"]["agentic_em"]["mean"] for cells in single])
        assert em["mean"] == pytest.approx(sum(em["per_seed"]) / 3) and em["low"] < em["mean"] < em["high"]
    (comparison,) = matrix["comparisons"]
    before, after = (cell["metrics"]["agentic_em"]["mean"] for cell in matrix["cells"])
    assert comparison["metrics"]["agentic_em"]["difference"] == pytest.approx(after - before)
    assert comparison["metrics"]["agentic_em"]["num_seeds"] == 3 and comparison["fixed"] == "agent"
    assert all((tmp_path / f"matrix.{suffix}").stat().st_size > 0 for suffix in ("md", "csv", "tex"))
    with pytest.raises(OutputExistsError):
        run(config)
    run(config, resume=True)


def test_the_interval_of_a_score_stays_in_its_range(seeds: list[Path], tmp_path: Path) -> None:
    runs = []
    for number, each in enumerate(seeds):
        runs.append(tmp_path / f"seed-{number}")
        shutil.copytree(each, runs[-1])
        # One correct answer in the first seed, none in the others; searches are unbounded and keep their interval.
        for file in runs[-1].glob("evaluation/*/scores.json"):
            scores = read_json(file)
            write_json(file, scores | {"agentic_em": [float(number == 0), *[0.0] * 39]})
    run(aggregate(runs, tmp_path / "out"))
    matrix = read_json(tmp_path / "out" / "matrix.json")
    for cell in matrix["cells"]:
        em, searches = cell["metrics"]["agentic_em"], cell["metrics"]["search_turns"]
        assert em["low"] == 0.0 < em["mean"] < em["high"] < 1.0
        rows = [read_json(each / "evaluation" / cell_name(cell) / "scores.json")["search_turns"] for each in runs]
        free = seeds_interval(rows)
        assert (searches["low"], searches["high"]) == (pytest.approx(free.low), pytest.approx(free.high))


def test_a_metric_that_a_run_does_not_have_is_left_out(seeds: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(seeds[1], other)
    file = other / "evaluation" / "matrix.json"
    matrix = read_json(file)
    for cell in matrix["cells"]:
        del cell["metrics"]["search_turns"]
        scores = other / "evaluation" / cell_name(cell) / "scores.json"
        write_json(scores, {key: value for key, value in read_json(scores).items() if key != "search_turns"})
    write_json(file, matrix)
    for runs in ([seeds[0], other], [other, seeds[0]]):
        run(aggregate(runs, tmp_path / "out"), resume=True)
        found = read_json(tmp_path / "out" / "matrix.json")
        assert all("search_turns" not in cell["metrics"] for cell in [*found["cells"], *found["comparisons"]])
        assert all("agentic_em" in cell["metrics"] for cell in [*found["cells"], *found["comparisons"]])


def test_runs_that_are_not_seeds_of_one_experiment_are_refused(seeds: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", num_questions=30, agents=AGENTS, retrievers=RETRIEVERS[:2])
    more = write_run(tmp_path / "more", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:3])
    same = write_run(tmp_path / "same", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2])
    twin = write_run(tmp_path / "twin", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2])
    world = write_run(tmp_path / "world", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2])
    limited = write_run(tmp_path / "limited", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2])
    cold = write_run(tmp_path / "cold", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2])
    hot = write_run(tmp_path / "hot", num_questions=40, agents=AGENTS, retrievers=RETRIEVERS[:2])
    changes: list[tuple[Path, dict[str, Any]]] = [
        (world, {"made_from": {"questions": "others"}}),
        (limited, {"topk": 5}),
        (cold, {"made_from": {"temperature": 0.0, "agent": "a"}}),
        (hot, {"made_from": {"temperature": 1.0, "agent": "b"}, "search_fingerprint": "another"}),
    ]
    for each, change in changes:
        matrix = read_json(each / "evaluation" / "matrix.json")
        matrix["cells"] = [cell | change for cell in matrix["cells"]]
        write_json(each / "evaluation" / "matrix.json", matrix)
    cases: list[tuple[list[Path], type[AgenticRError], str]] = [
        ([seeds[0], other], RecordError, "other questions than in"),
        ([seeds[0], world], RecordError, "other questions than in"),
        ([seeds[0], limited], RecordError, "another topk than in"),
        ([cold, hot], RecordError, "another temperature than in"),
        ([seeds[0], more], RecordError, "not in both: agent-0-retriever-2"),
        ([same, twin], RecordError, "not another seed"),
        ([seeds[0], same, twin], RecordError, "are those of .*same.*: not another seed"),
        ([seeds[0], tmp_path], RecordError, "no matrix.json here"),
    ]
    for runs, error, message in cases:
        with pytest.raises(error, match=message):
            run(aggregate(runs, tmp_path / "out"))
    with pytest.raises(ConfigError, match="at least two different folders"):
        aggregate([seeds[0], seeds[0]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rerankers_that_were_trained_with_each_seed_are_put_together(seeds: list[Path], tmp_path: Path) -> None:
    def rerank(**changes: list[Any]) -> list[Path]:
        """Copies of the runs, whose cells are reranked by models of their own; `changes` differ from run to run."""
        runs = []
        for number, seed in enumerate(seeds):
            runs.append(tmp_path / f"{number}-{'-'.join(changes)}")
            shutil.copytree(seed, runs[-1])
            matrix = read_json(runs[-1] / "evaluation" / "matrix.json")
            used = {"model": f"reranker {number}", "depth": 10} | {key: of[number] for key, of in changes.items()}
            for cell in matrix["cells"]:
                cell["made_from"] = {"rerank": used, "part_rerankers": [f"reranker {number}"]}
            write_json(runs[-1] / "evaluation" / "matrix.json", matrix)
        return runs

    run(aggregate(rerank(), tmp_path / "out"))
    assert read_json(tmp_path / "out" / "matrix.json")["num_seeds"] == len(seeds)
    with pytest.raises(RecordError, match="another rerank than in"):
        run(aggregate(rerank(depth=[10, *range(20, 20 + len(seeds))]), tmp_path / "other"))
