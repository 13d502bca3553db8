"""E5, BGE, MiniLM and decoders are set up by preset, and encode alike while training and afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.retriever.encoding import TextEncoder, tokenize
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.families import FAMILIES
from tests.retriever.tiny_models import write_decoder

TEXTS = ["q1 q2", "q3", "p1 p2 p3 p4", "p9 " * 80, "q5 q6"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def config(groups, corpus, base, tmp_path):
    return TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"), corpus=str(corpus), out=str(tmp_path / "out"), retriever=base,
        learning_rate=5e-3, batch_size=16, group_size=4, temperature=0.05, precision="float32", max_steps=6,
    )  # fmt: skip


def plain_transformer(base: str, folder: Path, name: str) -> str:
    """The model as Hugging Face has it, without sentence-transformers' modules."""
    model = SentenceTransformer(base, device="cpu")
    model[0].model.save_pretrained(folder / name)
    model.tokenizer.save_pretrained(folder / name)
    return str(folder / name)


@pytest.mark.parametrize(("preset", "pooling"), [("e5", "mean"), ("bge", "cls"), ("minilm", "mean"), ("plain", "mean")])
def test_a_preset_sets_prefixes_and_pooling(config, preset, pooling):
    retriever = initial_retriever(replace(config, preset=preset))
    family = FAMILIES[preset]
    assert (retriever.record.query_prompt, retriever.record.passage_prompt) == (
        family.query_prompt, family.passage_prompt,
    )  # fmt: skip
    assert retriever.record.pooling == pooling == retriever.model[1].pooling_mode
    assert retriever.record.normalize and retriever.record.formulation == "question_query"


def test_without_a_preset_the_name_of_a_bare_model_decides(config, base, tmp_path):
    for name, family, pooling in (("e5-small-v2", "e5", "mean"), ("bge-small-en-v1.5", "bge", "cls")):
        folder = plain_transformer(base, tmp_path, name)
        record = initial_retriever(replace(config, retriever=folder)).record
        assert (record.query_prompt, record.pooling) == (FAMILIES[family].query_prompt, pooling)
    folder = plain_transformer(base, tmp_path, "other")
    with pytest.raises(ConfigError, match=r"no pooling module .* give pooling=mean, cls, lasttoken"):
        initial_retriever(replace(config, retriever=folder))
    changed = replace(config, retriever=folder, preset="e5", pooling="cls", query_prompt="search: ", passage_prompt="")
    record = initial_retriever(changed).record
    assert (record.pooling, record.query_prompt, record.passage_prompt) == ("cls", "search: ", "")


@pytest.mark.parametrize("preset", ["e5", "bge", "decoder"])
def test_training_sees_the_vectors_that_searching_sees(config, preset, decoder):
    source = decoder if preset == "decoder" else config.retriever
    retriever = initial_retriever(replace(config, preset=preset, retriever=source))
    record = retriever.record
    passages = [Passage.from_contents(str(i), text) for i, text in enumerate(TEXTS)]
    expected = retriever.encode_passages(passages)
    retriever.model.eval()
    texts = [passage.contents for passage in passages]
    ids = tokenize(retriever, texts, "passage")
    assert max(map(len, ids)) == record.passage_max_length
    for packing in (False, True):
        encoder = TextEncoder(retriever.model, precision="float32", packing=packing)
        assert encoder.packs == packing
        plan = encoder.plan(ids, 24)
        assert sorted(place for part in plan for place in part) == list(range(len(ids)))
        for part in plan:
            positions = [len(ids[i]) for i in part]
            assert len(part) == 1 or (sum(positions) if packing else max(positions) * len(part)) <= 24
            with torch.no_grad():
                vectors = encoder([ids[i] for i in part]).numpy()
            np.testing.assert_allclose(vectors, expected[part], atol=1e-6)


def test_a_decoder_ends_every_text_with_its_end_token_and_learns(config, decoder):
    config = replace(config, retriever=decoder, learning_rate=3e-3, epochs=6, max_steps=None)
    folder = train(config)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in steps]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert json.loads((folder / "done.json").read_text())["packed"]
    plain = SentenceTransformer(str(folder), device="cpu")
    for text in ("q1 q2", "q1 " * 200):
        ids = plain.tokenizer(text, truncation=True, max_length=plain.max_seq_length)["input_ids"]
        assert ids[-1] == plain.tokenizer.eos_token_id and len(ids) <= 66
    again = Retriever.load(folder, precision="float32")
    assert again.record.pooling == "lasttoken"
    expected = again.encode_queries([SearchRequest(query="q1 q2", question="q3")])
    np.testing.assert_allclose(plain.encode_query(["q3 [SEP] q1 q2"]), expected, atol=1e-6)


def test_a_trained_checkpoint_keeps_its_record_in_the_next_iteration_unless_asked_otherwise(config, tmp_path):
    own = {"formulation": "question_history_query", "query_max_length": 20, "passage_max_length": 30}
    first = initial_retriever(replace(config, preset="bge", **own))
    first.save(tmp_path / "first")
    again = replace(config, retriever=str(tmp_path / "first"), out=str(tmp_path / "second"))
    record = initial_retriever(again).record
    assert record == first.record
    assert (record.query_prompt, record.pooling) == (FAMILIES["bge"].query_prompt, "cls")
    assert (record.formulation, record.query_max_length, record.passage_max_length) == tuple(own.values())
    found = initial_retriever(replace(again, formulation="query", query_max_length=40)).record
    assert (found.formulation, found.query_max_length, found.passage_max_length) == ("query", 40, 30)


def test_a_model_without_a_record_is_trained_with_the_question_and_as_long_as_it_can(config):
    record = initial_retriever(config).record
    assert (record.formulation, record.query_max_length, record.passage_max_length) == ("question_query", 64, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "e6"}, "unknown preset 'e6'; known: auto, plain, e5, bge, minilm, decoder"),
        ({"pooling": "max"}, "pooling 'max': expected auto, mean, cls, lasttoken"),
        ({"pooling": "lasttoken"}, "needs a tokenizer with an end-of-text token"),
    ],
)
def test_impossible_presets_are_explained(config, change, message):
    with pytest.raises(ConfigError, match=message):
        initial_retriever(replace(config, **change))
