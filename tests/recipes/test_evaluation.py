"""The evaluation recipes: every YAML composes, with the paper's splits and the agents' own settings."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.config import load_config
from agentic_r_plugin.errors import AgenticRError, ConfigError
from agentic_r_plugin.evaluation.cells import llm_spec
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig
from agentic_r_plugin.evaluation.settings import AgentSettings
from agentic_r_plugin.report.paper import BENCHMARKS
from agentic_r_plugin.search.indexing.index import IndexConfig
from tests.evaluation.evaluation_toy import write_benchmark

RECIPE = Path(__file__).parents[2] / "recipes" / "evaluation"
SINGLE = {benchmark.name: benchmark for benchmark in BENCHMARKS}
OTHERS = {"common", "all", "released", "released_index", "flashrag"}


def compose(name: str, *overrides: str) -> EvaluateConfig:
    return load_config(EvaluateConfig, RECIPE / f"{name}.yaml", ["out=o", *overrides])


def test_no_file_is_left_unchecked() -> None:
    assert {path.stem for path in RECIPE.glob("*.yaml")} == OTHERS | set(SINGLE)


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_every_benchmark_has_the_papers_split(name: str) -> None:
    config = compose(name, "first=10")
    assert (config.benchmarks, config.split, config.splits) == ([name], SINGLE[name].split, {})
    assert set(config.searches) == {"e5", "bge", "bm25", "replug", "agentic_r"} and config.first == 10


@pytest.mark.parametrize("name", ["all", "released"])
def test_the_run_over_all_benchmarks_has_the_papers_order_and_splits(name: str) -> None:
    config = compose(name)
    assert [(name, config.splits.get(name, config.split)) for name in config.benchmarks] == [
        (benchmark.name, benchmark.split) for benchmark in BENCHMARKS
    ]


def test_the_common_part_is_not_a_separate_run() -> None:
    with pytest.raises(ConfigError, match="benchmarks: expected at least one"):
        compose("common")


def test_the_released_agents_run_under_their_own_protocols_and_limits() -> None:
    config = compose("released")
    found = {name: config.per_agent.get(name, AgentSettings()).over(config.settings) for name in config.agents}
    assert {name: settings.protocol for name, settings in found.items()} == {
        "agentic_r": "search_r1_released",
        "r1_searcher": "r1_searcher",
        "simple_deep_searcher": "simple_deep_searcher",
    }
    assert [settings.limits.max_searches for settings in found.values()] == [5, 5, 10]
    models = [llm_spec(config, name) for name in config.agents]
    assert all(re.fullmatch(r"[\w-]+/[\w.-]+", spec.model) and spec.backend == "vllm" for spec in models)
    assert models[2].options["max_model_len"] > found["simple_deep_searcher"].limits.max_tokens
    index = load_config(IndexConfig, RECIPE / "released_index.yaml")
    assert (index.retriever, index.out) == ("liuwenhan/Agentic-R_e5", config.searches["agentic_r"])
    assert (index.preset, index.formulation) == ("e5", "question_query")


def test_a_file_that_extends_itself_in_a_circle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml: extends .*a\.yaml, which extends it in turn"):
        load_config(EvaluateConfig, tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("extends: missing.yaml\n")
    with pytest.raises(ConfigError, match=r"missing\.yaml: cannot be read"):
        load_config(EvaluateConfig, tmp_path / "a.yaml")


# --- run_exp.py -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_exp() -> dict[str, Any]:
    return runpy.run_path(str(RECIPE / "run_exp.py"))


def arguments(folder: Path, *more: str) -> list[str]:
    settings = {"data_dir": str(folder), "save_dir": str(folder / "out"), "metrics": ["agentic_em", "search_turns"]}
    (folder / "flashrag.yaml").write_text(json.dumps(settings | {"gpu_id": None, "agentic_r": {"depth": 0}}))
    return ["--config", str(folder / "flashrag.yaml"), "--dataset_name", "toy", *more]


def test_run_exp_answers_with_the_quick_starts_agent_and_saves_as_flashrag_does(
    run_exp: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = write_benchmark(tmp_path, num_questions=2)
    agent = RECIPE.parent / "quickstart" / "agent"
    given = ["--method_name", "agentic-r", "--split", "test", f"agent.model={agent}", "search.backend=bm25"]
    run_exp["main"](arguments(tmp_path, *given, f"search.corpus={home / 'corpus.jsonl'}", "protocol=compact"))
    assert "'search_turns'" in capsys.readouterr().out
    (saved,) = (tmp_path / "out").glob("toy_*_agentic-r")
    items = json.loads((saved / "intermediate_data.json").read_text())
    assert [item["id"] for item in items] == ["q0", "q1"] and "trajectory" in items[0]["output"]
    assert (saved / "metric_score.txt").is_file()


def test_run_exp_knows_the_methods_and_their_protocols(run_exp: dict[str, Any], tmp_path: Path) -> None:
    import argparse

    arguments(tmp_path)
    for method, (protocol, searches) in {
        "agentic-r": (None, None),
        "search-r1": ("search_r1_released", None),
        "r1-searcher": ("r1_searcher", None),
        "simpledeepsearcher": ("simple_deep_searcher", 10),
    }.items():
        options = argparse.Namespace(
            config=str(tmp_path / "flashrag.yaml"), method_name=method, dataset_name="toy", split="dev", gpu_id=None,
            overrides=["topk=5", "agent.model=m"],
        )  # fmt: skip
        config = run_exp["compose"](options)
        found = config["agentic_r"]
        assert (found["protocol"], found["limits"]["max_searches"]) == (protocol, searches)
        assert (found["topk"], found["depth"], found["agent"]["model"], config["split"]) == (5, 0, "m", ["dev"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "dev", "search.backend=bm25", "search.corpus={corpus}"], "split 'dev'"),
        (["agent.modell=x"], "modell"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
)
def test_run_exp_says_why_it_cannot_work(
    run_exp: dict[str, Any], tmp_path: Path, more: list[str], message: str
) -> None:
    home = write_benchmark(tmp_path)
    agent = RECIPE.parent / "quickstart" / "agent"
    filled = [item.format(corpus=home / "corpus.jsonl") for item in more]
    with pytest.raises(AgenticRError, match=re.escape(message)):
        run_exp["main"](arguments(tmp_path, f"agent.model={agent}", *filled))
