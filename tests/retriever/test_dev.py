"""What is measured on held-out groups, and when training stops because of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.errors import ConfigError, ManifestMismatchError
from agentic_r_plugin.retriever import dev as dev_set
from agentic_r_plugin.retriever.batches import read_examples
from agentic_r_plugin.retriever.dev import measure, ranking_metrics
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import read_lines
from tests.search.tiny_retriever import write_corpus


@pytest.fixture
def config(groups, corpus, base, tmp_path):
    return TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"), corpus=str(corpus), out=str(tmp_path / "out"), retriever=base,
        learning_rate=5e-3, batch_size=16, group_size=4, temperature=0.05, precision="float32", max_steps=12,
        dev_groups=str(groups / "dev.jsonl"), dev_steps=2, dev_corpus=True,
    )  # fmt: skip


def lines(folder):
    return [line for _, line in read_lines(folder / "metrics.jsonl")]


def test_metrics_are_those_of_the_textbook():
    found = [[5, 8, 1, 2], [3, 4, 9, 7], [6, 0, 2, 1]]
    relevant = [frozenset({8}), frozenset({3, 7}), frozenset({99})]
    metrics = ranking_metrics(found, relevant)
    assert metrics["recall_at_1"] == pytest.approx((0 + 1 / 2 + 0) / 3)
    assert metrics["recall_at_3"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert metrics["recall_at_10"] == pytest.approx((1 + 1 + 0) / 3)
    assert metrics["mrr_at_10"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    second = (1 + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert metrics["ndcg_at_10"] == pytest.approx((1 / np.log2(3) + second + 0) / 3)


def test_the_whole_corpus_is_searched_chunk_by_chunk_as_a_plain_product_says(config, monkeypatch):
    monkeypatch.setattr(dev_set, "_CHUNK", 30)
    retriever = Retriever.load(config.retriever, precision="float32", formulation="question_query")
    with Corpus(config.corpus) as corpus:
        dev = read_examples(config.dev_groups, corpus)
        found = measure(retriever, corpus, dev, pools=("dev", "corpus"))
        queries = retriever.encode_queries([item.request for item in dev])
        scores = queries @ retriever.encode_passages(list(corpus)).T
        pool = sorted({row for item in dev for row in (item.positive, *item.negatives)})
    for name, columns in (("corpus", list(range(200))), ("dev", pool)):
        ranks = [int((scores[i][columns] > scores[i][item.positive]).sum()) for i, item in enumerate(dev)]
        for k in (1, 3, 10, 20):
            assert found[f"{name}_recall_at_{k}"] == pytest.approx(np.mean([rank < k for rank in ranks]))
        mrr = np.mean([1 / (1 + rank) if rank < 10 else 0 for rank in ranks])
        assert found[f"{name}_mrr_at_10"] == pytest.approx(mrr)
    assert found["corpus_recall_at_20"] < found["dev_recall_at_20"] <= 1


def test_positives_of_one_query_are_one_query_with_several_relevant_passages(config, tmp_path):
    group = json.loads(Path(config.dev_groups).read_text().splitlines()[0])
    file = tmp_path / "ties.jsonl"
    ties = [group, group | {"positive": "d199", "negatives": group["negatives"][:3]}]
    file.write_text("".join(json.dumps(item) + "\n" for item in ties))
    retriever = Retriever.load(config.retriever, precision="float32", formulation="question_query")
    with Corpus(config.corpus) as corpus:
        found = measure(retriever, corpus, read_examples(file, corpus))
    assert found["dev_recall_at_1"] in (0.0, 0.5) and found["dev_recall_at_20"] == 1.0


def test_measuring_changes_nothing_about_training(config, tmp_path):
    measured = train(replace(config, max_steps=6))
    silent = train(replace(config, max_steps=6, dev_groups=None, dev_corpus=False, out=str(tmp_path / "silent")))
    expected = SentenceTransformer(str(silent), device="cpu").state_dict()
    for name, tensor in SentenceTransformer(str(measured), device="cpu").state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert [line["step"] for line in lines(measured) if "corpus_ndcg_at_10" in line] == [0, 2, 4, 6]


def test_training_stops_when_the_metric_stops_rising_and_keeps_the_best_weights(config, monkeypatch):
    values = iter([0.1, 0.3, 0.5, 0.4, 0.5, 0.9])
    real = measure
    seen = []

    def planned(retriever, *arguments, **settings):
        seen.append({n: p.detach().clone() for n, p in retriever.model.state_dict().items()})
        return real(retriever, *arguments, **settings) | {"dev_mrr_at_10": next(values)}

    monkeypatch.setattr(dev_set, "measure", planned)
    folder = train(replace(config, patience=2, dev_metric="dev_mrr_at_10"))
    done = json.loads((folder / "done.json").read_text())
    assert (done["steps"], done["best_step"]) == (8, 4)
    assert [line["dev_mrr_at_10"] for line in lines(folder) if "dev_mrr_at_10" in line] == [0.1, 0.3, 0.5, 0.4, 0.5]
    for name, tensor in SentenceTransformer(str(folder), device="cpu").state_dict().items():
        assert torch.equal(tensor, seen[2][name]), name
    assert "Weights of step 4 of 8." in (folder / "README.md").read_text()
    assert not (folder / "best.pt").exists()


def test_early_stopping_is_exact_over_an_interruption(config, tmp_path, monkeypatch):
    from agentic_r_plugin.retriever.loop import Training

    config = replace(config, patience=3, learning_rate=3e-2, checkpoint_steps=3, epochs=4, max_steps=30)
    whole = train(replace(config, out=str(tmp_path / "whole")))
    step = Training._train_step

    def dies_once(self, *arguments):
        if self.step == 7:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Training, "_train_step", dies_once)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    folder = train(config, resume=True)
    expected = json.loads((whole / "done.json").read_text())
    found = json.loads((folder / "done.json").read_text())
    assert (found["steps"], found["best_step"], found["loss"]) == (
        expected["steps"], expected["best_step"], expected["loss"],
    )  # fmt: skip
    weights = SentenceTransformer(str(whole), device="cpu").state_dict()
    for name, tensor in SentenceTransformer(str(folder), device="cpu").state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_early_stopping_without_something_to_watch_is_refused(config):
    with pytest.raises(ConfigError, match="need dev_groups"):
        replace(config, dev_groups=None, patience=2)
    with pytest.raises(ConfigError, match="dev_metric 'em': expected one of dev_recall_at_1"):
        train(replace(config, patience=2, dev_metric="em"))


@pytest.fixture
def elsewhere(config, tmp_path):
    """Groups of another corpus, whose positives are what the untrained model finds first: training can only lose."""
    retriever = Retriever.load(config.retriever, precision="float32", formulation="question_query")
    corpus = write_corpus(tmp_path / "other.jsonl", 60)
    lines = [json.loads(line) for line in Path(config.dev_groups).read_text().splitlines()[:40]]
    with Corpus(corpus) as passages:
        requests = [SearchRequest(query=line["query"], question=line["question"]) for line in lines]
        scores = retriever.encode_queries(requests) @ retriever.encode_passages(list(passages)).T
        found = np.argsort(-scores, axis=1)[:, :6].tolist()
        ids = [[passages[row].id for row in rows] for rows in found]
    groups = [line | {"positive": best, "negatives": others} for line, (best, *others) in zip(lines, ids, strict=True)]
    file = tmp_path / "elsewhere.jsonl"
    file.write_text("".join(json.dumps(group) + "\n" for group in groups))
    return {"elsewhere_groups": str(file), "elsewhere_corpus": str(corpus), "dev_metric": "dev_recall_at_1"}


def test_training_stops_before_it_loses_too_much_on_another_set(config, elsewhere, tmp_path):
    config = replace(config, dev_groups=None, dev_corpus=False, dev_steps=1, learning_rate=1e-4)
    folder = train(replace(config, **elsewhere, elsewhere_loss=0.1))
    curve = [line["elsewhere_recall_at_1"] for line in lines(folder) if "elsewhere_recall_at_1" in line]
    done = json.loads((folder / "done.json").read_text())
    assert curve[0] == 1 and min(curve[:-1]) >= 0.9 > curve[-1]
    assert (done["steps"], done["best_step"]) == (len(curve) - 1, len(curve) - 2) and done["steps"] < 12
    assert f"Weights of step {done['best_step']} of {done['steps']}." in (folder / "README.md").read_text()
    shorter = train(replace(config, max_steps=done["best_step"], out=str(tmp_path / "shorter")))
    expected = SentenceTransformer(str(shorter), device="cpu").state_dict()
    for name, tensor in SentenceTransformer(str(folder), device="cpu").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_both_stops_together_keep_the_best_weights_from_before_the_loss(config, elsewhere):
    folder = train(replace(config, **elsewhere, elsewhere_loss=0.1, dev_steps=1, learning_rate=1e-4, patience=20))
    found, done = lines(folder), json.loads((folder / "done.json").read_text())
    held = [line for line in found if line.get("elsewhere_recall_at_1", 0) >= 0.9]
    assert done["best_step"] == max(held, key=lambda line: line["dev_recall_at_1"])["step"] < done["steps"] < 12
    assert all("dev_recall_at_1" in line and "corpus_recall_at_1" in line for line in held)


def test_a_stop_on_another_set_resumes_and_compares_its_files_by_contents(config, elsewhere, tmp_path):
    config = replace(config, **elsewhere, elsewhere_loss=0.1, dev_steps=1, learning_rate=1e-4)
    folder = train(config)
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(Path(config.elsewhere_groups).read_bytes())
    assert train(replace(config, elsewhere_groups=str(moved)), resume=True) == folder
    moved.write_text(moved.read_text().splitlines()[0] + "\n")
    with pytest.raises(ManifestMismatchError, match="elsewhere_groups"):
        train(replace(config, elsewhere_groups=str(moved)), resume=True)


def test_wrong_settings_of_a_stop_on_another_set_are_refused(config, elsewhere):
    with pytest.raises(ConfigError, match="elsewhere_corpus needs elsewhere_groups"):
        replace(config, elsewhere_corpus="c")
    with pytest.raises(ConfigError, match="elsewhere_loss must not be below 0, found -1"):
        replace(config, elsewhere_loss=-1.0)
    with pytest.raises(ConfigError, match="dev_metric 'em': expected one of dev_recall_at_1"):
        train(replace(config, **elsewhere | {"dev_metric": "em"}))
