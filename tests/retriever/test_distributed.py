"""Two processes started by torchrun: loss, gradients and training are those of one process with the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.retriever.distributed import process_group
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
from agentic_r_plugin.store import read_json, read_lines
from tests.retriever import two_processes

SETTINGS = {
    "preset": "e5",
    "learning_rate": 1e-3,
    "group_size": 4,
    "temperature": 0.05,
    "precision": "float32",
    "max_steps": 4,
    "mini_batch_tokens": 64,
    "kept_tokens": 64,
    "checkpoint_steps": 2,
    "patience": 5,
    "dev_steps": 2,
    "dev_corpus": True,
}


@pytest.fixture(scope="module")
def without_dropout(base, tmp_path_factory):
    """Dropout draws differ between one process and two, so the comparison is made without."""
    folder = tmp_path_factory.mktemp("without_dropout")
    model = SentenceTransformer(base, device="cpu")
    model[0].config.hidden_dropout_prob = model[0].config.attention_probs_dropout_prob = 0.0
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


@pytest.fixture(scope="module")
def two(without_dropout, groups, corpus, tmp_path_factory):
    """Folder of what two processes left behind."""
    folder = tmp_path_factory.mktemp("two")
    given = SETTINGS | {"dev_groups": groups / "dev.jsonl", "out": folder / "out", "batch_size": 8}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "tests.retriever.two_processes", folder, without_dropout, groups / "train.jsonl", corpus,
        *(f"{key}={value}" for key, value in given.items()),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    finished = subprocess.run(
        [str(part) for part in command], env=environment, cwd=root, timeout=300, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return folder


def curve(folder: Path, key: str) -> list[float]:
    return [line[key] for _, line in read_lines(folder / "metrics.jsonl") if key in line]


def test_cross_device_negatives_are_real(two, without_dropout, groups, corpus):
    first, second = (torch.load(two / f"{rank}.pt") for rank in (0, 1))
    settings = {"retriever": without_dropout, "groups": str(groups / "train.jsonl"), "corpus": str(corpus)}
    loss, expected = two_processes.gradients(settings | {"temperature": 0.05}, 0, 1)
    assert (first["together"][0] + second["together"][0]) / 2 == pytest.approx(loss, abs=1e-5)
    for _, found in (first["together"], second["together"]):
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=0, msg=name)
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.1
    assert loss - (first["alone"][0] + second["alone"][0]) / 2 > 0.3  # half the negatives: about log 2 less


def test_two_processes_give_the_weights_and_metrics_of_one_with_twice_the_batch(
    two, without_dropout, groups, corpus, tmp_path
):
    files = {"groups": groups / "train.jsonl", "corpus": corpus, "dev_groups": groups / "dev.jsonl", "out": tmp_path}
    given = SETTINGS | {key: str(value) for key, value in files.items()}
    train(TrainRetrieverConfig(**given, retriever=without_dropout, batch_size=16))
    found, one = two / "out", tmp_path
    assert read_json(found / "done.json")["processes"] == 2
    assert curve(found, "slots") == curve(one, "slots") == [64] * 4
    assert curve(found, "passages") == curve(one, "passages")
    assert sum(curve(found, "tokens")) < 0.6 * sum(curve(one, "tokens"))  # each passage is encoded by one process
    for name in ("dev_ndcg_at_10", "corpus_recall_at_3", "corpus_mrr_at_10"):
        assert curve(found, name) == pytest.approx(curve(one, name), abs=1e-6) and len(curve(found, name)) == 3
    assert curve(found, "grad_norm") == pytest.approx(curve(one, "grad_norm"), rel=1e-4)
    expected = SentenceTransformer(str(one), device="cpu").state_dict()
    before = SentenceTransformer(without_dropout, device="cpu").state_dict()
    weights = SentenceTransformer(str(found), device="cpu").state_dict()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0, msg=name)
    assert max((weights[name] - before[name]).abs().max() for name in weights) > 1e-3


def test_an_output_that_exists_stops_every_process(two):
    for rank in (0, 1):
        found = torch.load(two / f"{rank}.pt")
        assert (found["exit code of training"], found["exit code where the output exists"]) == (0, 1)


@pytest.fixture
def third_of_three(monkeypatch):
    """As torchrun starts it, on a machine that says it has one GPU."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("took a GPU"))


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(third_of_three, device):
    with pytest.raises(ConfigError, match=r"GPUs \(1\), found a process of local rank 2"), process_group(device):
        pass


def test_processes_on_the_cpu_take_no_gpu_and_talk_over_gloo(third_of_three, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.distributed, "init_process_group", asked.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with process_group("cpu") as place:
        assert (place, asked) == ((0, 1), ["cpu:gloo,cuda:nccl"])
