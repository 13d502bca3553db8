"""A trained retriever gives the same vectors in sentence-transformers, in FlashRAG and in our index."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pytest
from flashrag.retriever.encoder import Encoder, STEncoder
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.indexing.index import run as build_index

INPUTS = ["q3 [SEP] q1 q2", "q4 q5 [SEP] q6"]
REQUESTS = [SearchRequest(query="q1 q2", question="q3"), SearchRequest(query="q6", question="q4 q5")]


@pytest.fixture(scope="module")
def trained(groups, corpus, base, tmp_path_factory):
    """A small E5: mean pooling and prefixes."""
    config = TrainRetrieverConfig(
        groups=str(groups / "train.jsonl"), corpus=str(corpus), out=str(tmp_path_factory.mktemp("trained")),
        retriever=base, preset="e5", learning_rate=5e-3, batch_size=16, group_size=4, temperature=0.05, max_steps=3,
        precision="float32", query_max_length=32, passage_max_length=32, dev_groups=str(groups / "dev.jsonl"),
        mask_false_negatives=True,
    )  # fmt: skip
    return train(config)


@pytest.fixture(scope="module")
def passages(corpus):
    return [passage.contents for passage in Corpus(corpus)]


def test_sentence_transformers_and_our_index_agree(trained, passages, corpus, tmp_path):
    plain = SentenceTransformer(str(trained), device="cpu")
    build_index(IndexConfig(corpus=str(corpus), retriever=str(trained), out=str(tmp_path / "i"), precision="float32"))
    index = faiss.read_index(str(tmp_path / "i" / "agentic_r_Flat.index"))
    np.testing.assert_allclose(plain.encode_document(passages), index.reconstruct_n(0, len(passages)), atol=1e-6)
    ours = Retriever.load(trained, precision="float32").encode_queries(REQUESTS)
    np.testing.assert_allclose(plain.encode_query(INPUTS), ours, atol=1e-6)


@pytest.mark.parametrize("kind", ["transformer", "sentence-transformers"])
def test_flashrag_agrees(trained, passages, kind):
    if kind == "transformer":
        theirs = Encoder("e5", str(trained), "mean", 32, use_fp16=False, silent=True)
    else:
        theirs = STEncoder("e5", str(trained), 32, use_fp16=False, instruction=None, silent=True)
    plain = SentenceTransformer(str(trained), device="cpu")
    np.testing.assert_allclose(theirs.encode(INPUTS, is_query=True), plain.encode_query(INPUTS), atol=1e-6)
    np.testing.assert_allclose(theirs.encode(passages, is_query=False), plain.encode_document(passages), atol=1e-6)


def test_nothing_of_the_training_stays_in_the_files(trained):
    assert "agentic_r_packed" not in (trained / "config.json").read_text()
    assert sorted(path.name for path in trained.glob("*.pt")) == []
    prompts = json.loads((trained / "config_sentence_transformers.json").read_text())["prompts"]
    assert (prompts["query"], prompts["document"]) == ("query: ", "passage: ")


def test_the_model_card_names_use_data_costs_and_results(trained):
    card = (trained / "README.md").read_text()
    for part in (
        "| query formulation | `question_query` |",
        "| query prefix | `'query: '` |",
        "| lengths | 32 tokens per query, 32 per passage |",
        "| groups | 150 of `train.jsonl` (",
        "| known false negatives | masked |",
        "| batch | 16 queries on each of 1 processes |",
        "| steps | 3 |",
        " for 192 slots |",
        "Weights of step 3 of 3.",
    ):
        assert part in card, part
    done = json.loads((trained / "done.json").read_text())
    assert done["peak_memory_bytes"] > 50 << 20
