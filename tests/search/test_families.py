"""How models without our record are used: by settings, their own files, or a name that is exactly known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaForCausalLM, RobertaConfig, RobertaModel

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.retriever.encoding import TextEncoder, tokenize
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.families import family_of, names_of
from agentic_r_plugin.search.indexing.index import IndexConfig, index_retriever, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from tests.retriever.tiny_models import write_decoder

TEXTS = ["p1 p2", "title p3 p4 p5 p6 p7 p8 p9", "p1", ""]


@pytest.fixture
def plain(model_folder, tmp_path) -> Path:
    """The tiny BERT as transformers saves it, without sentence-transformers' modules."""
    return copy_plain(model_folder, tmp_path / "plain")


def copy_plain(model_folder: str, folder: Path) -> Path:
    model = SentenceTransformer(model_folder, device="cpu")
    model[0].model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def saved(plain: Path, folder: Path, *, pooling: Any = "mean", later: Any = (), **settings: Any) -> str:
    """A sentence-transformers model of the plain one."""
    include = settings.pop("include_prompt", True)
    modules = [Transformer(str(plain)), Pooling(32, pooling, include_prompt=include), *later]
    model = SentenceTransformer(modules=modules, device="cpu", **settings)
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("intfloat/e5-base-v2", "e5"),
        ("e5-small", "e5"),
        ("/m/intfloat_e5-large-v2", "e5"),
        ("/hub/models--intfloat--multilingual-e5-base/snapshots/0123abc", "e5"),
        ("liuwenhan/Agentic-R_e5", "e5"),
        ("intfloat/multilingual-e5-large-instruct", "instruct"),
        ("/hub/models--intfloat--e5-mistral-7b-instruct/snapshots/0123abc", "instruct"),
        ("BAAI/bge-base-en-v1.5", "bge"),
        ("BAAI/bge-small-zh-v1.5", "bge_zh"),
        ("BAAI/bge-m3", "bge_m3"),
        ("facebook/contriever-msmarco", "contriever"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm"),
        ("my-e5-like", None),
        ("table5-encoder", None),
        ("e5-base-v2-finetuned", None),
        ("/runs/e5/checkpoint-100", None),
        ("BAAI/bge-reranker-base", None),
        ("bge-en-icl", None),
        ("gte-Qwen2-7B-instruct", None),
    ],
)
def test_a_family_is_known_by_the_whole_name_of_a_model(name, family):
    found = family_of(names_of(name))
    assert (found and found[1]) == family


def test_the_configurations_name_counts_after_the_folders(plain):
    edit(plain / "config.json", _name_or_path="/cache/models--intfloat--e5-base-v2/snapshots/0123abc")
    assert family_of(names_of(str(plain))) == ("e5-base-v2", "e5")
    renamed = plain.with_name("our-instruct-model")
    plain.rename(renamed)
    assert family_of(names_of(str(renamed))) is None


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"query": "q: ", "document": "d: "}, ("q: ", "d: ")),
        ({"query": "q: ", "passage": "p: ", "STS": "s: "}, ("q: ", "p: ")),
        ({"retrieval.query": "q: ", "retrieval.passage": "p: ", "separation": "s: "}, ("q: ", "p: ")),
        ({"web_search_query": "w: ", "sts_query": "s: ", "summarization_query": "u: "}, ("w: ", "")),
        ({"query": "", "document": ""}, ("query: ", "passage: ")),  # what every model is saved with: it says nothing
        ({"Clustering": "c: "}, ("query: ", "passage: ")),
    ],
)
def test_a_models_own_prompts_come_before_its_name(plain, tmp_path, capfd, prompts, expected):
    folder = saved(plain, tmp_path / "e5-small-v2", prompts=prompts)
    record = Retriever.load(folder).record
    assert (record.query_prompt, record.passage_prompt) == expected
    said = capfd.readouterr().err
    assert f"prefixes {expected[0]!r} (queries) and {expected[1]!r} (passages)" in said
    assert ("by its name e5-small-v2" in said) == (expected[0] == "query: ")


@pytest.mark.parametrize(
    ("prompts", "unclear"),
    [
        ({"task_a": "a: ", "task_b": "b: "}, "query_prompt and passage_prompt"),
        ({"query": "q: ", "text": "t: "}, "passage_prompt"),
        ({"search_query": "a: ", "s2p_query": "b: "}, "query_prompt"),
    ],
)
def test_prompts_whose_use_is_not_clear_are_an_error_until_settings_say_them(plain, tmp_path, prompts, unclear):
    folder = saved(plain, tmp_path / "e5-small-v2", prompts=prompts)
    with pytest.raises(ConfigError, match=rf"is not clear .*{next(iter(prompts))}: .*give {unclear} \("):
        Retriever.load(folder)
    record = Retriever.load(folder, query_prompt="Q", passage_prompt="").record
    assert (record.query_prompt, record.passage_prompt) == ("Q", "")


def test_settings_come_first_and_the_index_keeps_what_was_used(plain, tmp_path, corpus_file, capfd):
    folder = tmp_path / "e5-small-v2"
    plain.rename(folder)
    config = IndexConfig(
        corpus=str(corpus_file), retriever=str(folder), out=str(tmp_path / "index"), query_prompt="query: ",
        passage_prompt="p1 ", pooling="cls",
    )  # fmt: skip
    build_index(config)
    said = capfd.readouterr().err
    assert said.count("has no agentic_r.json") == 1 and "as set; pooling cls as set" in said
    manifest = read_manifest(config.out)
    record = manifest.retriever_record
    assert (record["query_prompt"], record["passage_prompt"], record["pooling"]) == ("query: ", "p1 ", "cls")
    moved = tmp_path / "another-name"  # nothing is guessed again
    folder.rename(moved)
    again = index_retriever(manifest, str(moved))
    assert again.record.to_dict() == record and again.model[1].pooling_mode == "cls"
    assert "agentic_r.json" not in capfd.readouterr().err


def test_a_plain_model_needs_a_known_pooling(plain, tmp_path):
    with pytest.raises(ConfigError, match="is no model known by name: give pooling=mean, cls, lasttoken"):
        Retriever.load(plain)
    assert Retriever.load(plain, pooling="cls").model[1].pooling_mode == "cls"
    known = tmp_path / "bge-small-en-v1.5"
    plain.rename(known)
    assert Retriever.load(known).record.pooling == "cls"
    decoder = write_decoder(tmp_path / "decoder")
    loaded = Retriever.load(decoder)
    assert loaded.record.pooling == "lasttoken"
    assert loaded.model.tokenizer("p1")["input_ids"][-1] == loaded.model.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: edit(f / "config.json", architectures=["HF_ColBERT"]), "a multi-vector model"),
        (lambda f: edit(f / "config.json", architectures=["BertForSequenceClassification"]), "a cross-encoder"),
        (lambda f: edit(f / "config.json", architectures=["DPRQuestionEncoder"]), "one half of a two-encoder model"),
        (lambda f: f.rename(f.with_name("splade-v3")), "a sparse model"),
        (lambda f: f.rename(f.with_name("colbertv2.0")), "a multi-vector model"),
    ],
)
def test_models_without_one_dense_vector_are_refused(plain, change, reason):
    found = change(plain)
    with pytest.raises(ConfigError, match=f"is {reason}"):
        Retriever.load(found if isinstance(found, Path) else plain, pooling="mean")


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "a sparse model"),
        ("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}, "a multi-vector model"),
        ("modules.json", [{"type": "pylate.models.Dense.Dense", "path": "1"}], "a multi-vector model"),
        (
            "modules.json",
            [{"type": "sentence_transformers.sparse_encoder.models.SpladePooling.SpladePooling", "path": "1"}],
            "a sparse model",
        ),
        ("config_sentence_transformers.json", {"similarity_fn_name": "euclidean"}, r".*euclidean.*expected cosine or"),
    ],
)
def test_what_a_models_files_say_of_its_kind_counts(plain, tmp_path, file, content, reason):
    folder = Path(saved(plain, tmp_path / "model"))
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"is {reason}|{reason}"):
        Retriever.load(folder)


def test_vectors_keep_their_length_where_the_model_compares_by_inner_product(plain, tmp_path):
    dot = Retriever.load(saved(plain, tmp_path / "dot", similarity_fn_name="dot"), precision="float32")
    cosine = Retriever.load(saved(plain, tmp_path / "cosine"), precision="float32")
    passages = [Passage.from_contents("a", TEXTS[1])]
    free, unit = dot.encode_passages(passages), cosine.encode_passages(passages)
    assert not dot.record.normalize and cosine.record.normalize
    assert abs(np.linalg.norm(free) - 1) > 0.01
    np.testing.assert_allclose(free / np.linalg.norm(free), unit, atol=1e-6)


def variants(plain: Path, tmp_path: Path) -> dict[str, str]:
    prompts = {"query": "query : title ", "document": "passage : "}
    decoder = tmp_path / "decoder-plain"
    write_decoder(decoder)
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(decoder)
    LlamaForCausalLM.from_pretrained(decoder).model.save_pretrained(decoder)
    return {
        "mean": saved(plain, tmp_path / "mean", prompts=prompts),
        "no prompt": saved(plain, tmp_path / "no-prompt", prompts=prompts, include_prompt=False),
        "no prompt, cls": saved(plain, tmp_path / "cls", prompts=prompts, include_prompt=False, pooling="cls"),
        "two poolings": saved(plain, tmp_path / "two", prompts=prompts, pooling=("cls", "max")),
        "weighted, dense": saved(
            plain, tmp_path / "dense", pooling="weightedmean", prompts=prompts, later=(Dense(32, 16), Normalize())
        ),
        "left padding, last token": saved(decoder, tmp_path / "left", pooling="lasttoken", prompts=prompts),
        "left padding, no prompt": saved(
            decoder, tmp_path / "left2", pooling="mean", prompts=prompts, include_prompt=False
        ),
    }


KINDS = (
    "mean", "no prompt", "no prompt, cls", "two poolings", "weighted, dense", "left padding, last token",
    "left padding, no prompt",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_searching_and_training_give_the_vectors_of_sentence_transformers(plain, tmp_path, kind):
    torch.manual_seed(0)
    folder = variants(plain, tmp_path)[kind]
    texts = TEXTS[:3] if "left" in kind else TEXTS  # its tokenizer makes nothing of an empty text
    reference = SentenceTransformer(folder, device="cpu")
    expected = {
        "query": reference.encode_query(texts, normalize_embeddings=True),
        "passage": reference.encode_document(texts, normalize_embeddings=True),
    }
    retriever = Retriever.load(folder, precision="float32")
    found = {
        "query": retriever.encode_queries([SearchRequest(query=text) for text in texts]),
        "passage": retriever.encode_passages([Passage.from_contents("x", text) for text in texts]),
    }
    for role in ("query", "passage"):
        np.testing.assert_allclose(found[role], expected[role], atol=1e-6)
    tokens = [*tokenize(retriever, texts, "query"), *tokenize(retriever, texts, "passage")]
    wanted = np.concatenate([expected["query"], expected["passage"]])
    retriever.model.eval()
    for packing in (True, False):
        encoder = TextEncoder(retriever.model, precision="float32", packing=packing)
        assert encoder.packs == packing
        with torch.no_grad():
            for places in encoder.plan(tokens, 40):
                vectors = encoder([tokens[place] for place in places]).numpy()
                np.testing.assert_allclose(vectors, wanted[places], atol=1e-6)
        encoder.close()
    retriever.save(tmp_path / "again")
    after = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode_query(texts)
    np.testing.assert_allclose(after, expected["query"], atol=1e-6)


def test_a_text_without_tokens_has_the_zero_vector(tmp_path):
    folder = saved(Path(write_decoder(tmp_path / "decoder")), tmp_path / "mean")
    retriever = Retriever.load(folder, precision="float32")
    retriever.model.tokenizer.pad_token = retriever.model.tokenizer.eos_token
    passages = [Passage.from_contents("a", "p1 p2"), Passage.from_contents("b", "")]
    vectors = retriever.encode_passages(passages)
    assert np.linalg.norm(vectors, axis=1).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert np.linalg.norm(retriever.encode_passages(passages[1:])) == 0
    encoder = TextEncoder(retriever.model, precision="float32")
    trained = encoder(tokenize(retriever, ["p1 p2", ""], "passage"))
    np.testing.assert_allclose(trained.detach().numpy(), vectors, atol=1e-6)
    encoder(tokenize(retriever, [""], "passage")).sum().backward()


def test_a_chat_template_of_a_plain_model_is_not_used(tmp_path):
    folder = Path(write_decoder(tmp_path / "decoder"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}p9 p9 {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    retriever = Retriever.load(folder)
    (tokens,) = tokenize(retriever, ["p1 p2"], "passage")
    assert retriever.model.tokenizer.convert_ids_to_tokens(list(tokens.ids)) == ["p1", "p2", "<end>"]


def test_lengths_are_limited_to_the_models_positions_and_that_is_said(plain, tmp_path, capfd):
    config = RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    roberta = tmp_path / "roberta"
    shutil.copytree(plain, roberta)
    RobertaModel(config).save_pretrained(roberta)
    for folder, positions in ((plain, 64), (roberta, 64)):
        retriever = Retriever.load(folder, pooling="mean", passage_max_length=1000, query_max_length=50)
        record = retriever.record
        assert (record.query_max_length, record.passage_max_length) == (50, positions)
        assert f"passage_max_length=1000 is limited to the {positions} tokens" in capfd.readouterr().err
        assert np.isfinite(retriever.encode_passages([Passage.from_contents("a", "p1 " * 500)])).all()


def test_a_length_that_the_prefix_fills_is_an_error(plain):
    with pytest.raises(ConfigError, match=r"query_max_length=4: special tokens and the prefix 'query: ' take 4 tokens"):
        Retriever.load(plain, pooling="mean", query_prompt="query: ", query_max_length=4)


def test_the_record_of_a_trained_model_needs_no_guess(plain, tmp_path, capfd):
    first = Retriever.load(plain, pooling="cls", query_prompt="query: ", normalize=False)
    first.save(tmp_path / "e5-base-v2")
    capfd.readouterr()
    again = Retriever.load(tmp_path / "e5-base-v2")
    assert again.record == first.record and again.model[1].pooling_mode == "cls"
    assert "no agentic_r.json" not in capfd.readouterr().err


def test_the_default_length_is_said_with_the_settings_that_raise_it(plain, tmp_path, capfd):
    def said(folder: Path, **settings: Any) -> str:
        record = Retriever.load(folder, pooling="mean", **settings).record
        assert (record.query_max_length, record.passage_max_length) == lengths
        return capfd.readouterr().err

    lengths = (64, 64)
    assert "that. Length of query and passage: 64 tokens\n" in said(plain)
    config = BertConfig.from_pretrained(plain, max_position_embeddings=1024)
    BertModel(config).save_pretrained(plain)
    edit(plain / "tokenizer_config.json", model_max_length=1024)
    lengths = (512, 512)
    assert (
        "Length of query and passage: 512 tokens, and the model takes 1,024; query_max_length and passage_max_length "
        "(in `index`: max_length) raise that\n"
    ) in said(plain)
    lengths = (512, 1024)
    assert "Length of query: 512 tokens" in said(plain, passage_max_length=1024)
    lengths = (1024, 1024)
    assert "Length" not in said(plain, passage_max_length=1024, query_max_length=1024)
