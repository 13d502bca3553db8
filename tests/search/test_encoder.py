"""A retriever and its record: what it encodes, how it is saved and distinguished."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.retriever.encoding import TextEncoder, tokenize
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import RECORD_FILE, Retriever
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from tests.search.tiny_retriever import make_model


@pytest.fixture
def trained(model_folder):
    return Retriever.load(
        model_folder,
        precision="float32",
        formulation="question_history_query",
        query_prompt="query: ",
        passage_prompt="passage: ",
        query_max_length=12,
        passage_max_length=8,
    )


def test_an_untrained_model_takes_the_query_alone_and_no_prefix(model_folder):
    retriever = Retriever.load(model_folder)
    assert retriever.record.formulation == "query"
    assert (retriever.record.query_prompt, retriever.record.passage_prompt) == ("", "")
    assert retriever.query_text(SearchRequest(query="q1", question="q2", history=("q3",))) == "q1"
    assert Retriever.load(model_folder, preset="e5").record.query_prompt == "query: "


def test_the_formulation_builds_the_input_and_a_plain_search_is_the_query_alone(trained):
    assert trained.query_text(SearchRequest(query="q1", question="q2", history=("q3",))) == "q2 [SEP] q3 [SEP] q1"
    assert trained.query_text(SearchRequest(query="q1")) == "q1"


def test_a_saved_retriever_loads_as_it_was_and_plain_sentence_transformers_gives_the_same_vectors(trained, tmp_path):
    trained.save(tmp_path / "saved")
    again = Retriever.load(tmp_path / "saved", precision="float32")
    assert again.record == trained.record
    assert again.fingerprint() == trained.fingerprint()
    requests = [SearchRequest(query="q1 q2", question="q3"), SearchRequest(query="q4")]
    passages = [Passage(id="x", title="title", text="p1"), Passage(id="y", title="title", text="p3")]
    plain = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_allclose(again.encode_queries(requests), trained.encode_queries(requests), atol=1e-6)
    expected = plain.encode_query(["q3 [SEP] q1 q2", "q4"])
    np.testing.assert_allclose(again.encode_queries(requests), expected, atol=1e-6)
    expected = plain.encode_document([passage.contents for passage in passages])
    np.testing.assert_allclose(again.encode_passages(passages), expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1.0, atol=1e-6)


def test_queries_and_passages_are_cut_at_their_own_lengths(trained):
    long, same_start = "p1 " * 30, "p1 " * 6
    cut = trained.encode_passages([Passage.from_contents("a", long), Passage.from_contents("b", same_start)])
    np.testing.assert_allclose(cut[0], cut[1], atol=1e-6)
    # [CLS] query : ... [SEP] leaves 8 words of a query, 3 more than of a passage
    queries = [SearchRequest(query="q1 " * n) for n in (30, 8)]
    vectors = trained.encode_queries(queries)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_the_separator_is_the_tokenizers_own(trained):
    ids = trained.model.tokenizer("q2 [SEP] q1")["input_ids"]
    assert ids.count(trained.model.tokenizer.sep_token_id) == 2


def test_weights_that_a_checkpoint_lacks_are_the_same_at_every_load(tmp_path):
    folder = make_model(tmp_path, pooler=False)
    first = Retriever.load(folder)
    assert any("pooler" in name for name in first.model.state_dict())  # drawn, since the checkpoint has none
    state = torch.get_rng_state()
    assert Retriever.load(folder).fingerprint() == first.fingerprint()
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprints_follow_weights_and_record(trained):
    before = trained.fingerprint()
    other = Retriever(trained.model, replace(trained.record, formulation="query"))
    assert other.fingerprint() != before
    with torch.no_grad():
        next(trained.model.parameters())[0, 0] += 1e-3
    assert trained.fingerprint() != before


def test_bfloat16_stays_close_to_float32(trained):
    passages = [Passage.from_contents(str(i), f"p{i} p{i + 1} p{i + 2}") for i in range(20)]
    exact = trained.encode_passages(passages)
    fast = Retriever(trained.model, trained.record, precision="bfloat16").encode_passages(passages)
    assert fast.dtype == np.float32
    assert (exact * fast).sum(axis=1).min() > 0.999


def test_wrong_names_and_records_are_explained(model_folder, tmp_path, trained):
    with pytest.raises(ConfigError, match="unknown built-in retriever 'builtin:x'; known: builtin:minilm"):
        Retriever.load("builtin:x")
    with pytest.raises(ConfigError, match="no retriever given"):
        Retriever.load("")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Retriever.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="unknown preset 'e6'; known: auto, plain, e5, bge"):
        Retriever.load(model_folder, preset="e6")
    with pytest.raises(ConfigError, match="formulaton"):
        Retriever.load(model_folder, formulaton="query")
    with pytest.raises(ConfigError, match="unknown query_formulation 'nope'"):
        Retriever.load(model_folder, formulation="nope")
    trained.save(tmp_path / "saved")
    (tmp_path / "saved" / RECORD_FILE).write_text(json.dumps({"schema": "retriever/1"}))
    with pytest.raises(RecordError, match=r"agentic_r\.json: missing field 'formulation'"):
        Retriever.load(tmp_path / "saved")


def test_mean_word_vectors_are_a_retriever_too(tmp_path):
    words = {"river": 0, "bread": 1, "[UNK]": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    module = StaticEmbedding(tokenizer, embedding_weights=torch.eye(3))
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(tmp_path / "static"))
    retriever = Retriever.load(tmp_path / "static")
    vectors = retriever.encode_queries([SearchRequest(query="river bread"), SearchRequest(query="bread")])
    np.testing.assert_allclose(vectors, [[0.5**0.5, 0.5**0.5, 0], [0, 1, 0]], atol=1e-6)
    assert retriever.encode_passages([]).shape == (0, 3)


def test_batches_change_nothing_but_the_padding(trained):
    passages = [Passage.from_contents(str(i), "p1 " * (1 + i * 7 % 20) + f"p{i % 30}") for i in range(40)]
    one_by_one = np.concatenate([trained.encode_passages([passage]) for passage in passages])
    for limits in ({"batch_size": 1}, {"batch_size": 7}, {"max_batch_tokens": 9}, {"max_batch_tokens": 10_000}):
        np.testing.assert_allclose(trained.encode_passages(passages, **limits), one_by_one, atol=1e-6)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_truncated_dimension_gives_the_vectors_of_sentence_transformers_in_search_index_and_training(
    tmp_path, corpus_file, normalized
):
    folder = make_model(tmp_path)
    plain = SentenceTransformer(folder, device="cpu", truncate_dim=16, similarity_fn_name="cosine")
    if normalized:
        plain.append(Normalize())
    plain.save_pretrained(str(tmp_path / "cut"), create_model_card=False)
    texts = ["p1 p2", "title p3 p4 p5", "p1"]
    expected = SentenceTransformer(str(tmp_path / "cut"), device="cpu").encode(texts, normalize_embeddings=True)
    assert expected.shape == (3, 16)
    retriever = Retriever.load(tmp_path / "cut", precision="float32")
    passages = [Passage.from_contents(text, text) for text in texts]
    assert retriever.dim == 16
    np.testing.assert_allclose(retriever.encode_passages(passages), expected, atol=1e-6)
    np.testing.assert_allclose(
        retriever.encode_queries([SearchRequest(query=text) for text in texts]), expected, atol=1e-6
    )
    for packing in (False, True):
        with torch.no_grad():
            encoder = TextEncoder(retriever.model.eval(), precision="float32", packing=packing)
            np.testing.assert_allclose(encoder(tokenize(retriever, texts, "passage")).numpy(), expected, atol=1e-6)
        encoder.close()
    assert retriever.fingerprint() != Retriever.load(folder, precision="float32").fingerprint()
    retriever.save(tmp_path / "saved")
    assert Retriever.load(tmp_path / "saved", precision="float32").fingerprint() == retriever.fingerprint()
    config = IndexConfig(
        corpus=str(corpus_file), retriever=str(tmp_path / "saved"), out=str(tmp_path / "index"), precision="float32"
    )
    build_index(config)
    assert read_manifest(config.out).dim == 16
    with open_search(SearchSpec(index=config.out)) as backend:
        [[hit]] = backend.search([SearchRequest(query="p1 p2")], 1)
    vectors = retriever.encode_passages(list(Corpus(corpus_file)))
    assert hit.score == pytest.approx(float((vectors @ expected[0]).max()), abs=1e-5)


@pytest.mark.parametrize("truncate_dim", [None, 2])
def test_a_static_model_is_truncated_too(tmp_path, truncate_dim):
    words = {"[UNK]": 0, "p1": 1, "p2": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    static = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], truncate_dim=truncate_dim)
    static.save_pretrained(str(tmp_path / "static"), create_model_card=False)
    expected = static.encode(["p1", "p1 p2"], normalize_embeddings=True)
    passages = [Passage.from_contents(text, text) for text in ("p1", "p1 p2")]
    found = Retriever.load(tmp_path / "static").encode_passages(passages)
    assert found.shape == (2, truncate_dim or 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)
