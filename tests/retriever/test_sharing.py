"""What users of sentence-transformers expect of a training: trackers, an upload, and a card that the hub reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agentic_r_plugin.cli import main
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.retriever import card
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
from agentic_r_plugin.store import read_lines
from tests.hub_server import TOKEN, committed


@pytest.fixture
def config(groups, corpus, base, tmp_path):
    return TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"), corpus=str(corpus), out=str(tmp_path / "trained"), retriever=base,
        batch_size=16, group_size=4, temperature=0.05, precision="float32", max_steps=3,
        dev_groups=str(groups / "dev.jsonl"), dev_steps=2,
    )  # fmt: skip


def lines(folder):
    return [line for _, line in read_lines(Path(folder) / "metrics.jsonl")]


def scalars(folder):
    """Tag -> (step, value) of each event of the only TensorBoard file."""
    (file,) = folder.glob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_training_log(config):
    folder = train(replace(config, loggers=["tensorboard"]))
    found = scalars(folder / "runs")
    for tag, name in (
        ("train/loss", "loss"),
        ("train/learning_rate", "learning_rate"),
        ("eval/dev_mrr_at_10", "dev_mrr_at_10"),
    ):
        expected = [(line["step"], line[name]) for line in lines(folder) if name in line]
        assert [step for step, _ in found[tag]] == [step for step, _ in expected]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3]
    (settings,) = folder.glob("runs/*/hparams.yml")
    assert "temperature: 0.05" in settings.read_text()


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(config):
    with pytest.raises(ConfigError, match=r"loggers: no tracker aimless; installed are .*tensorboard"):
        train(replace(config, loggers=["tensorboard", "aimless"]))
    assert not Path(config.out).exists()


def test_a_retriever_is_uploaded_as_a_private_model_and_a_refused_upload_is_made_up_for(config, hub, capfd):
    names = ("groups", "corpus", "out", "retriever", "batch_size", "group_size", "max_steps")
    given = ["train-retriever", *(f"{name}={getattr(config, name)}" for name in names), "push_to_hub=me/set"]
    hub.refuse = True
    assert main(given) == 1
    shown = capfd.readouterr()
    assert "push_to_hub=me/set" in shown.err and "--resume only uploads" in shown.err and TOKEN not in shown.err
    out = Path(config.out)
    trained = (out / "done.json").stat().st_mtime_ns
    hub.refuse = False
    hub.requests.clear()
    assert main([*given, "--resume"]) == 0
    assert (out / "done.json").stat().st_mtime_ns == trained
    made = json.loads(next(body for path, _, body in hub.requests if path == "/api/repos/create"))
    assert made.get("type", "model") == "model" and made.get("visibility", made.get("private")) in ("private", True)
    files = committed(hub.requests, "models")
    assert {"model.safetensors", "modules.json", "1_Pooling/config.json", "agentic_r.json", "README.md"} <= set(files)
    assert files == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*")
                     if path.is_file() and not path.name.startswith(".")}  # fmt: skip
    assert f"{hub.url}/me/set" in capfd.readouterr().out


def test_the_card_names_base_licence_data_and_results_as_the_hub_reads_them(config, base, tmp_path):
    folder = train(replace(config, datasets=["me/groups"]))
    data = ModelCard.load(folder / "README.md").data
    shown = {"library_name": "sentence-transformers", "pipeline_tag": "sentence-similarity", "datasets": ["me/groups"]}
    found = data.to_dict()
    assert {name: found[name] for name in shown} == shown
    assert {"sentence-transformers", "feature-extraction", "dense", "agentic-search", "dataset_size:150"} <= set(
        data.tags
    )
    assert data.base_model is None and data.license is None, "the base has no card"
    measured = next(line for line in lines(folder) if line["step"] == 3 and "dev_mrr_at_10" in line)
    found = {result.metric_type: result for result in data.eval_results}
    assert found["cosine_mrr@10"].metric_value == round(measured["dev_mrr_at_10"], 4)
    assert found["cosine_recall@3"].metric_value == round(measured["dev_recall_at_3"], 4)
    assert {(result.task_type, result.dataset_name) for result in data.eval_results} == {
        ("information-retrieval", "held-out groups")
    }
    mixed = train(replace(config, interpolation=0.5, out=str(tmp_path / "mixed")))
    assert ModelCard.load(mixed / "README.md").data.eval_results is None, "other weights were measured"


def test_base_and_licence_of_a_card_come_from_the_card_of_the_model_that_training_started_from(tmp_path):
    def known(base, text=None):
        folder = tmp_path / "base"
        folder.mkdir(exist_ok=True)
        if text is not None:
            (folder / "README.md").write_text(text)
        header = card.header(base or str(folder), "runs/R2", pipeline_tag="x", tags=[], datasets=[], results={})
        data = ModelCard(f"{header}\n\n").data
        return data.base_model, data.license

    assert known("", "---\nbase_model: intfloat/e5-base-v2\nlicense: mit\n---\n") == ("intfloat/e5-base-v2", "mit")
    assert known("", "no metadata") == (None, None)
    assert known("", "---\nlicense: [\n---\n") == (None, None)
    assert known("builtin:minilm") == ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")
