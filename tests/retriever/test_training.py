"""Training: it learns, it resumes exactly, its result is an ordinary sentence-transformers model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.config import deciding, load_config, to_dict
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError, RecordError, TrainingError
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.retriever.interpolation import interpolate
from agentic_r_plugin.retriever.loop import Training
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, run, train
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import read_lines
from tests.search.tiny_retriever import make_model


@pytest.fixture
def config(groups, corpus, base, tmp_path):
    return TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"),
        corpus=str(corpus),
        out=str(tmp_path / "trained"),
        retriever=base,
        learning_rate=5e-3,
        batch_size=16,
        group_size=4,
        temperature=0.05,
        gradient_checkpointing=False,
        precision="float32",
        checkpoint_steps=4,
        max_steps=10,
    )


def curve(config, key):
    return [line[key] for _, line in read_lines(f"{config.out}/metrics.jsonl") if key in line]


def weights(folder):
    return SentenceTransformer(str(folder), device="cpu").state_dict()


def test_the_loss_falls_and_recall_on_held_out_groups_rises(config, groups):
    config = replace(config, epochs=8, max_steps=None, dev_groups=str(groups / "dev.jsonl"))
    run(config)
    losses, recall = curve(config, "loss"), curve(config, "dev_recall_at_1")
    assert len(losses) == 80
    assert sum(losses[-5:]) < 0.25 * sum(losses[:5])
    assert recall[0] < 0.2 < 0.6 < recall[-1]


def test_the_result_records_its_use_and_loads_in_plain_sentence_transformers(config):
    folder = train(replace(config, max_steps=2, query_max_length=20, passage_max_length=500))
    retriever = Retriever.load(folder, precision="float32")
    assert retriever.record.formulation == "question_query"
    assert (retriever.record.query_max_length, retriever.record.passage_max_length) == (20, 64)
    plain = SentenceTransformer(str(folder), device="cpu")
    np.testing.assert_allclose(
        retriever.encode_queries([SearchRequest(query="q1 q2", question="q3")]),
        plain.encode_query(["q3 [SEP] q1 q2"]),
        atol=1e-6,
    )
    done = json.loads((folder / "done.json").read_text())
    assert (done["steps"], done["groups"]) == (2, 150)
    assert not (folder / "checkpoint.pt").exists()


def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_one(config, tmp_path, monkeypatch):
    whole = replace(config, out=str(tmp_path / "whole"))
    train(whole)
    step = Training._train_step

    def dies_at_the_seventh(self, *arguments):
        if self.step == 6:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Training, "_train_step", dies_at_the_seventh)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Retriever.load(config.out)
    monkeypatch.undo()
    with pytest.raises(OutputExistsError, match="pass --resume"):
        train(config)
    with pytest.raises(ManifestMismatchError, match="begun from something else: seed was 0, now 3"):
        train(replace(config, seed=3), resume=True)
    with (tmp_path / "trained" / "metrics.jsonl").open("ab") as stream:
        stream.write(b'{"step": 7, "lo')
    train(config, resume=True)
    assert curve(config, "step") == list(range(1, 11))
    assert curve(config, "loss") == curve(whole, "loss")
    expected = weights(whole.out)
    for name, tensor in weights(config.out).items():
        assert torch.equal(tensor, expected[name]), name
    done = (tmp_path / "trained" / "done.json").read_text()
    train(config, resume=True)
    assert (tmp_path / "trained" / "done.json").read_text() == done
    with pytest.raises(ManifestMismatchError, match="learning_rate was"):
        train(replace(config, learning_rate=1e-4), resume=True)


def test_a_run_killed_before_its_checkpoints_were_removed_removes_them_later(config, tmp_path):
    train(replace(config, max_steps=1))
    left = [tmp_path / "trained" / name for name in ("checkpoint.pt", "best.pt")]
    for file in left:
        file.write_bytes(b"")
    train(replace(config, max_steps=1), resume=True)
    assert not any(file.exists() for file in left)


def test_interpolation_writes_weights_between_the_start_and_the_trained_ones_and_records_it(config, base, tmp_path):
    train(replace(config, max_steps=3))
    mixed = replace(config, max_steps=3, interpolation=0.25, out=str(tmp_path / "mixed"))
    train(mixed)
    assert curve(mixed, "loss") == curve(config, "loss")
    start, trained, found = weights(base), weights(config.out), weights(mixed.out)
    moved = 0
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, start[name] + 0.25 * (trained[name] - start[name]), rtol=0, atol=1e-6)
        moved += int(not torch.equal(tensor, start[name]))
    assert moved > 10
    assert json.loads((tmp_path / "mixed" / "done.json").read_text())["interpolation"] == 0.25
    assert "| weights | base + 0.25 x (trained - base)" in (tmp_path / "mixed" / "README.md").read_text()
    for name in ("done.json", ".manifest.json"):
        assert "interpolation" not in (tmp_path / "trained" / name).read_text(), "as before the setting existed"
    with pytest.raises(ManifestMismatchError, match=r"interpolation was 0\.25, now absent"):
        train(replace(mixed, interpolation=1.0), resume=True)


def test_models_of_other_sizes_are_not_mixed(base, tmp_path):
    models = SentenceTransformer(base, device="cpu"), SentenceTransformer(make_model(tmp_path, dim=32), device="cpu")
    with pytest.raises(ConfigError, match="other parameters or sizes"):
        interpolate(*models, 0.5)


def test_gradient_checkpointing_changes_memory_and_no_number(config, tmp_path):
    train(replace(config, max_steps=3))
    other = replace(config, max_steps=3, gradient_checkpointing=True, out=str(tmp_path / "other"))
    train(other)
    assert curve(other, "loss") == curve(config, "loss")


def test_bfloat16_learns_too(config):
    train(replace(config, precision="bfloat16", epochs=3, max_steps=30))
    losses = curve(config, "loss")
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert all(tensor.dtype == torch.float32 for tensor in weights(config.out).values())


def test_the_learning_rate_warms_up_and_falls_to_nothing(config):
    train(replace(config, epochs=1, max_steps=None, warmup_ratio=0.2))
    rates = [rate / config.learning_rate for rate in curve(config, "learning_rate")]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_a_missing_passage_or_a_diverging_loss_is_said_and_leaves_no_retriever(config, tmp_path, groups):
    broken = tmp_path / "broken.jsonl"
    lines = (groups / "train.jsonl").read_text().splitlines()[:3]
    broken.write_text("\n".join([*lines[:2], lines[2].replace('"d2"', '"elsewhere"')]))
    with pytest.raises(RecordError, match=r"broken\.jsonl:3: passage 'elsewhere' is not in the corpus"):
        train(replace(config, groups=str(broken)))
    assert not (tmp_path / "trained").exists()
    with pytest.raises(TrainingError, match=r"step \d+: the loss is nan"):
        train(replace(config, learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0))
    assert not (tmp_path / "trained" / "done.json").exists()
    shutil.rmtree(tmp_path / "trained")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int8"}, "precision 'int8': expected auto, float32, bfloat16, float16"),
        ({"group_size": 1}, "group_size of at least 2"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"interpolation": 1.5}, "interpolation must be a share from 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)


def test_settings_that_were_removed_are_accepted_with_the_value_that_is_the_rule_and_never_with_another(
    config, tmp_path
):
    old = tmp_path / "old.yaml"
    given = {name: value for name, value in to_dict(config).items() if value is not None}
    old.write_text(json.dumps(given | {"schedule": "linear", "weight_decay": 0, "gradient_caching": True}))
    assert load_config(TrainRetrieverConfig, old, ["order=shuffled"]) == config
    with pytest.raises(
        ConfigError, match="override 'schedule=cosine': key 'schedule': this setting was removed and 'li"
    ):
        load_config(TrainRetrieverConfig, old, ["schedule=cosine"])
    loop = {"out": "o", "agent": "a", "retriever": "r", "benchmark": "b"}
    assert load_config(IterateConfig, values=loop | {"train_retriever": {"weight_decay": 0.0, "epochs": 3}})
    with pytest.raises(ConfigError, match=r"train_retriever: key 'weight_decay': this setting was removed and 0\.0 is"):
        load_config(IterateConfig, values=loop | {"train_retriever": {"weight_decay": 0.1}})
    assert deciding(config)["weight_decay"] == 0.0, "a manifest of an earlier version is equal"


def test_a_formulation_with_reasoning_trains_on_it_and_refuses_groups_without_any(config, groups, tmp_path):
    config = replace(config, formulation="reasoning_query", max_steps=1, query_max_length=20)
    with pytest.raises(RecordError, match="no group holds the agent's reasoning, which the formulation 'reasoning_q"):
        train(config)
    lines = [line for _, line in read_lines(config.groups)]
    given = [line | {"schema": "group/2", "reasoning": "q7 q8"} for line in lines]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))
    folder = train(replace(config, groups=str(tmp_path / "groups.jsonl")))
    retriever = Retriever.load(folder, precision="float32")
    np.testing.assert_allclose(
        retriever.encode_queries([SearchRequest(query="q1", question="q3", reasoning="q2")]),
        SentenceTransformer(str(folder), device="cpu").encode_query(["Reasoning: q2\n\nQuery: q1"]),
        atol=1e-6,
    )
