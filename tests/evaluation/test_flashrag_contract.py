"""What we rely on in FlashRAG 0.3.0.dev20260919, so that another release is noticed here and not in a result."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
from pathlib import Path

import pytest
from flashrag.dataset import Dataset
from flashrag.evaluator import Evaluator
from flashrag.evaluator.metrics import BaseMetric
from flashrag.pipeline import BasicPipeline, SearchR1Pipeline

from agentic_r_plugin import components
from agentic_r_plugin.agent.protocols import search_r1_released
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline
from tests.evaluation.evaluation_toy import flashrag_config, write_benchmark


def test_the_release_is_the_one_that_was_tried() -> None:
    assert importlib.metadata.version("flashrag-dev") == "0.3.0.dev20260919"


def test_the_signatures_that_are_overridden_are_as_they_were() -> None:
    assert list(inspect.signature(SearchR1Pipeline.run).parameters) == [
        "self",
        "dataset",
        "do_eval",
        "pred_process_fun",
    ]
    assert list(inspect.signature(AgenticSearchPipeline.run).parameters)[:4] == [
        *("self", "dataset", "do_eval", "pred_process_fun")
    ]
    assert list(inspect.signature(BasicPipeline.evaluate).parameters) == [
        *("self", "dataset", "do_eval", "pred_process_fun")
    ]
    wanted = {"config", "prompt_template", "max_retrieval_num", "retriever", "generator"}
    assert wanted <= set(inspect.signature(SearchR1Pipeline.__init__).parameters)
    assert list(inspect.signature(BaseMetric.calculate_metric).parameters) == ["self", "data"]
    assert list(inspect.signature(Evaluator.evaluate).parameters) == ["self", "data"]
    assert {"config", "data"} <= set(inspect.signature(Dataset.__init__).parameters)


def test_flashrags_evaluator_still_swallows_errors_which_is_why_ours_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_benchmark(tmp_path)
    config = flashrag_config(tmp_path, metrics=["em"])
    data = Dataset(config, data=[{"id": "1", "question": "?", "golden_answers": ["a"], "output": {"pred": None}}])
    assert Evaluator(config).evaluate(data) == {}
    assert "Error in em" in capsys.readouterr().out


def test_a_configuration_without_gpu_id_leaves_the_environment_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    flashrag_config(tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert not list(tmp_path.iterdir())


def test_the_released_instruction_is_read_from_flashrag_and_fits_the_protocol() -> None:
    assert search_r1_released.instruction == SearchR1Pipeline.user_prompt
    prompt = search_r1_released.prompt("Who wrote {question}?")
    assert prompt.endswith("Question: Who wrote {question}?\n")
    assert search_r1_released.stop == ("</search>", "</answer>")
    if "search_r1_released" in components.names("agent_protocol"):
        assert components.load("agent_protocol", "search_r1_released") is search_r1_released
