"""The other trainers and adapters: same data, same command; what they learn is what their loss says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.cli import main
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.retriever.batches import read_examples, read_scores
from agentic_r_plugin.retriever.dev import measure
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, run, train
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import read_lines


@pytest.fixture(scope="module")
def scores(groups, tmp_path_factory):
    """Relevance 90 for the positive and 40 for the first negative, 10 for the rest; correctness of all."""
    folder = tmp_path_factory.mktemp("scores")
    relevance, correctness = [], []
    for name in ("train", "dev"):
        for line in (groups / f"{name}.jsonl").read_text().splitlines():
            group = json.loads(line)
            key = {"id": group["id"], "turn": group["turn"]}
            passages = [group["positive"], *group["negatives"]]
            judged = dict.fromkeys(passages, 10) | {passages[0]: 90, passages[1]: 40}
            relevance.append({"schema": "relevance/1", **key, "scores": judged})
            rest = {"answer": None, "searches": 0}
            correctness += [
                {"schema": "correctness/1", **key, "passage_id": p, "em": int(p == passages[0]), **rest}
                for p in passages
            ]
    for name, records in (("relevance", relevance), ("correctness", correctness)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def config(groups, corpus, base, tmp_path):
    return TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"), corpus=str(corpus), out=str(tmp_path / "out"), retriever=base,
        learning_rate=5e-3, batch_size=16, group_size=8, temperature=0.1, precision="float32", epochs=6, max_steps=50,
        dev_groups=str(groups / "dev.jsonl"),
    )  # fmt: skip


def curve(folder, key):
    return [line[key] for _, line in read_lines(f"{folder}/metrics.jsonl") if key in line]


def test_scores_are_relevance_plus_correctness(scores, groups, corpus):
    found = read_scores(str(scores / "relevance.jsonl"), str(scores / "correctness.jsonl"))
    first = read_examples(groups / "train.jsonl", Corpus(corpus), found)[0]
    assert first.scores == pytest.approx((1.9, 0.4, *[0.1] * 6))
    found = read_scores(None, str(scores / "correctness.jsonl"))
    assert read_examples(groups / "train.jsonl", Corpus(corpus), found)[0].scores == (1.0, *[0.0] * 7)


@pytest.mark.parametrize("trainer", ["replug", "llm_embedder"])
def test_a_score_based_trainer_runs_by_the_same_command_and_finds_more_than_before(config, scores, trainer):
    arguments = {
        key: value
        for key, value in vars(config).items()
        if value is not None and key in ("groups", "corpus", "out", "retriever", "dev_groups", "learning_rate",
                                         "batch_size", "group_size", "temperature", "precision", "epochs", "max_steps")
    }  # fmt: skip
    arguments |= {"trainer": trainer, "relevance": scores / "relevance.jsonl", "teacher_temperature": 0.2}
    assert main(["train-retriever", *(f"{key}={value}" for key, value in arguments.items())]) == 0
    losses, recall = curve(config.out, "loss"), curve(config.out, "dev_recall_at_3")
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert recall[-1] > recall[0] + 0.2
    assert f"trainer `{trainer}`" in Path(config.out, "README.md").read_text()
    assert Retriever.load(config.out).record.formulation == "question_query"


def test_distillation_draws_the_second_passage_above_the_rest(config, scores):
    folder = train_with(config, scores, "replug")
    retriever = Retriever.load(folder, precision="float32")
    with Corpus(config.corpus) as corpus:
        examples = read_examples(config.groups, corpus)[:60]
        queries = retriever.encode_queries([item.request for item in examples])
        margins = []
        for query, item in zip(queries, examples, strict=True):
            passages = retriever.encode_passages([corpus[row] for row in item.negatives])
            similar = passages @ query
            margins.append(float(similar[0] - similar[1:].mean()))
    assert sum(margins) / len(margins) > 0.03


def train_with(config, scores, trainer):
    config = replace(
        config, trainer=trainer, relevance=str(scores / "relevance.jsonl"), teacher_temperature=0.3, dev_groups=None,
        epochs=12, max_steps=100,
    )  # fmt: skip
    run(config)
    return config.out


def test_missing_scores_are_said_with_file_and_line(config, scores, tmp_path):
    with pytest.raises(ConfigError, match="learns from scores: give relevance=FILE"):
        run(replace(config, trainer="replug"))
    with pytest.raises(ConfigError, match="the trainer 'contrastive' has none, found margin"):
        run(replace(config, options={"margin": 1}))
    part = tmp_path / "part.jsonl"
    part.write_text("".join((scores / "relevance.jsonl").read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(RecordError, match=r"train\.jsonl:4: no score for passage 'd3' of query \('question3', 1\)"):
        run(replace(config, trainer="llm_embedder", relevance=str(part)))


def test_adapters_train_few_weights_resume_exactly_and_end_in_an_ordinary_model(config, base, tmp_path, monkeypatch):
    from agentic_r_plugin.retriever.loop import Training

    config = replace(
        config, lora_rank=4, lora_alpha=16.0, max_steps=12, learning_rate=5e-3, checkpoint_steps=3, dev_steps=12
    )
    whole = train(replace(config, out=str(tmp_path / "whole")))
    step = Training._train_step

    def dies_once(self, *arguments):
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        assert 0 < trained < 0.3 * sum(p.numel() for p in self.model.parameters())
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(Training, "_train_step", dies_once)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config, resume=True)
    losses = curve(config.out, "loss")
    assert losses == curve(whole, "loss") and len(losses) == 12
    with Corpus(config.corpus) as corpus:
        merged = measure(Retriever.load(whole, precision="float32"), corpus, read_examples(config.dev_groups, corpus))
    ndcg = curve(whole, "dev_ndcg_at_10")
    assert merged["dev_ndcg_at_10"] == pytest.approx(ndcg[-1], abs=1e-6) and ndcg[-1] != ndcg[0]
    before = SentenceTransformer(base, device="cpu").state_dict()
    after = SentenceTransformer(config.out, device="cpu").state_dict()
    expected = SentenceTransformer(str(whole), device="cpu").state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(name.endswith("weight") and "embeddings" not in name for name in changed)
    assert all(torch.equal(after[name], expected[name]) for name in after)


def test_half_precision_scales_its_gradients(config):
    folder = train(replace(config, precision="float16", max_steps=30, dev_groups=None))
    losses = curve(folder, "loss")
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert all(tensor.dtype == torch.float32 for tensor in SentenceTransformer(str(folder)).state_dict().values())
