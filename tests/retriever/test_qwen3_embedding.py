"""A retriever in the form of Qwen3-Embedding, with the agent's reasoning as input: index, search, training, result.

Everywhere the vectors are those of sentence-transformers' own `encode`.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.records import Group
from agentic_r_plugin.retriever.encoding import TextEncoder, tokenize
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, train
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.search.service.server import ServeConfig, running_service
from agentic_r_plugin.store import write_records
from tests.retriever.tiny_models import QWEN3_PROMPT, write_qwen3_embedding

LONG = " ".join(f"q{i % 30}" for i in range(700))
REQUESTS = [
    SearchRequest(query="q1 q2", question="q3", reasoning=LONG),
    SearchRequest(query="q4", question="q3", reasoning="q5 q6"),
    SearchRequest(query="q7", question="q3"),
]
INPUTS = [f"Reasoning: {LONG}\n\nQuery: q1 q2", "Reasoning: q5 q6\n\nQuery: q4", "Query: q7"]
PASSAGES = ["p1 p2", f"p3 {LONG.replace('q', 'p')}", "p4 p5 p6 p7", "p8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_qwen3_embedding(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    lines = [{"id": str(i), "contents": f'"title"\n{text}'} for i, text in enumerate(PASSAGES)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def own_vectors(model):
    """Queries with the prefix of the checkpoint, and passages, as sentence-transformers encodes them."""
    plain = SentenceTransformer(model, device="cpu")
    return plain.encode_query(INPUTS), plain.encode_document([f'"title"\n{text}' for text in PASSAGES])


def test_index_and_service_use_prefix_pooling_padding_and_length_of_the_checkpoint(model, corpus, tmp_path):
    index = tmp_path / "index"
    config = IndexConfig(
        corpus=str(corpus), retriever=model, out=str(index), formulation="reasoning_query", max_length=8192,
        precision="float32", device="cpu",
    )  # fmt: skip
    build_index(config)
    queries, passages = own_vectors(model)
    expected = queries @ passages.T
    options = {"precision": "float32"}
    with open_search(SearchSpec(index=str(index), device="cpu", options=options)) as search:
        record = search.retriever.record
        assert (record.query_prompt, record.passage_prompt, record.pooling) == (QWEN3_PROMPT, "", "lasttoken")
        assert (record.formulation, record.query_max_length) == ("reasoning_query", 8192)
        found = search.search(REQUESTS, 4)
    with running_service(ServeConfig(index=str(index), device="cpu", options=options)) as url:
        served = RetrievalClient(url).search(REQUESTS, 4)
    for hits in (found, served):
        scores = [[next(hit.score for hit in row if hit.passage.id == str(i)) for i in range(4)] for row in hits]
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.ptp(expected, axis=0).min() > 1e-4, "the inputs differ"


def test_a_reasoning_that_is_too_long_does_not_push_the_query_out_in_service_search_and_training(
    model, corpus, tmp_path
):
    index = tmp_path / "index"
    build_index(
        IndexConfig(
            corpus=str(corpus), retriever=model, out=str(index), formulation="reasoning_query", max_length=40,
            precision="float32", device="cpu",
        )
    )  # fmt: skip
    options = {"precision": "float32"}
    requests = [REQUESTS[0], replace(REQUESTS[0], query="q9"), replace(REQUESTS[0], reasoning="x y " * 30_000)]
    with open_search(SearchSpec(index=str(index), device="cpu", options=options)) as search:
        retriever, found = search.retriever, search.search(requests, 4)
        texts = [retriever.query_text(request) for request in requests]
        tokens = tokenize(retriever, texts, "query")
    for text, ids, request in zip(texts, tokens, requests, strict=True):
        reasoning = text.removeprefix("Reasoning: ").removesuffix(f"\n\nQuery: {request.query}")
        assert len(reasoning) < len(text) and request.reasoning.endswith(reasoning) and len(reasoning.split()) > 15
        assert len(ids) <= 40 and retriever.model.tokenizer.decode(ids.ids).endswith(f"{request.query} <|endoftext|>")
    with running_service(ServeConfig(index=str(index), device="cpu", options=options)) as url:
        served = RetrievalClient(url).search(requests, 4)
    scores = [[[hit.score for hit in hits] for hits in each] for each in (found, served)]
    np.testing.assert_allclose(*scores, atol=1e-6)
    assert abs(scores[0][0][0] - scores[0][1][0]) > 1e-4, "the query counts"


def test_training_starts_from_the_vectors_of_the_checkpoint_and_its_result_is_used_in_the_same_way(
    model, corpus, tmp_path
):
    groups = [
        Group(id=str(i), turn=1, question="q3", query=f"q{i}", history=(), positive="0", negatives=("1", "2"),
              reasoning="q5 q6")
        for i in range(4)
    ]  # fmt: skip
    write_records(tmp_path / "groups.jsonl", groups)
    config = TrainRetrieverConfig(
        groups=str(tmp_path / "groups.jsonl"), corpus=str(corpus), out=str(tmp_path / "trained"), retriever=model,
        formulation="reasoning_query", query_max_length=8192, passage_max_length=8192, precision="float32",
        device="cpu", batch_size=2, group_size=3, max_steps=2, learning_rate=1e-3,
    )  # fmt: skip
    start = initial_retriever(config)
    queries, _ = own_vectors(model)
    tokens = tokenize(start, [start.query_text(request) for request in REQUESTS], "query")
    assert len(tokens[0]) > 700
    for packing in (True, False):
        encoder = TextEncoder(start.model.eval(), precision="float32", packing=packing)
        np.testing.assert_allclose(encoder(tokens).detach().numpy(), queries, atol=1e-5)
        encoder.close()
    trained = Retriever.load(train(config), precision="float32")
    assert trained.record.query_prompt == QWEN3_PROMPT
    found = trained.encode_queries(REQUESTS)
    np.testing.assert_allclose(found, SentenceTransformer(config.out, device="cpu").encode_query(INPUTS), atol=1e-5)
    assert np.abs(found - queries).max() > 1e-3, "it learned"
