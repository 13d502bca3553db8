"""Repair: what is missing is added once, from the source or the questions, and only that is encoded."""

from __future__ import annotations

import gzip
import json
import weakref

import faiss
import numpy as np
import pytest

from agentic_r_plugin.backends import SearchSpec
from agentic_r_plugin.cli import main
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, OutputExistsError
from agentic_r_plugin.forms import context_documents
from agentic_r_plugin.records import Question
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.dense import FaissBackend
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.indexing import repair
from agentic_r_plugin.search.indexing.index import IndexConfig, read_manifest
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.search.indexing.repair import RepairConfig
from tests.search.tiny_retriever import contents, passage_numbers, write_corpus

NUMBERS = passage_numbers(40)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("full") / "corpus.jsonl")


@pytest.fixture(scope="module")
def cut(full, tmp_path_factory):
    """The corpus without its last ten passages, and with a foreign passage that has the id of one of them."""
    file = tmp_path_factory.mktemp("cut") / "corpus.jsonl"
    lines = full.read_text().splitlines(keepends=True)[:30]
    file.write_text("".join([*lines, json.dumps({"id": "d39", "contents": '"other"\np1'}) + "\n"]))
    return file


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    file = tmp_path_factory.mktemp("questions") / "dev.jsonl"
    rows = [
        {
            "id": f"q{row}",
            "question": contents(NUMBERS[row]).partition("\n")[2],
            "golden_answers": [f"p{NUMBERS[row][0]}"],
            "metadata": {"gold_doc_ids": [f"d{row}"]},
        }
        for row in (0, 30, 31, 35)
    ]
    rows.append(rows[0] | {"id": "none", "metadata": {"gold_doc_ids": ["d1", "nowhere"]}})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def build(out, corpus, retriever, **settings):
    build_index(IndexConfig(corpus=str(corpus), retriever=retriever, out=str(out), precision="float32", **settings))
    return out


def config(index, questions, out, **settings):
    return RepairConfig(index=str(index), questions=str(questions), out=str(out), topk=[1, 5], **settings)


@pytest.mark.parametrize("kind", ["Flat", "SQfp16", "SQ8", "HNSW16", "IVF2,Flat"])
def test_every_kind_takes_what_was_missing(kind, cut, full, questions, model_folder, tmp_path, monkeypatch, capsys):
    index = build(tmp_path / "index", cut, model_folder, kind=kind)
    encoded, encode = [], Retriever.encode_passages

    def counts(self, passages, **settings):
        encoded.extend(passage.id for passage in passages)
        return encode(self, passages, **settings)

    monkeypatch.setattr(Retriever, "encode_passages", counts)
    repair.run(config(index, questions, tmp_path / "out", source=str(full)))
    assert encoded == ["d30", "d31", "d35"]
    report = json.loads((tmp_path / "out" / "repair.json").read_text())
    assert (report["added"], report["not_found"]) == (3, ["nowhere"])
    assert report["before"]["corpus"]["gold"] == pytest.approx((1 + 0.5) / 5)
    assert report["after"]["corpus"]["gold"] == pytest.approx((4 + 0.5) / 5)
    assert "3 passages added; 1 gold documents in no source" in capsys.readouterr().out
    manifest, corpus = read_manifest(tmp_path / "out"), Corpus(tmp_path / "out" / "corpus")
    assert [passage.id for passage in corpus] == [*(f"d{row}" for row in range(30)), "d39", "d30", "d31", "d35"]
    assert (manifest.rows, manifest.corpus_fingerprint) == (34, corpus.fingerprint())
    assert (tmp_path / "out" / "corpus" / "00000.jsonl").resolve() == cut.resolve()
    old, new = (faiss.read_index(str(path / manifest.index_file)) for path in (index, tmp_path / "out"))
    assert (old.ntotal, new.ntotal) == (31, 34)
    added = Retriever.load(model_folder, precision="float32").encode_passages([corpus[row] for row in range(31, 34)])
    assert np.argmax(added @ added.T, axis=1).tolist() == [0, 1, 2]
    assert new.search(added, 1)[1].ravel().tolist() == [31, 32, 33]
    FaissBackend(tmp_path / "out").close()


def test_the_file_is_that_of_an_index_of_the_whole_corpus(cut, full, questions, model_folder, tmp_path):
    index = build(tmp_path / "index", cut, model_folder)
    repair.run(config(index, questions, tmp_path / "out", source=str(full)))
    whole = build(tmp_path / "whole", tmp_path / "out" / "corpus", model_folder)
    found, expected = (faiss.read_index(str(path / "agentic_r_Flat.index")) for path in (tmp_path / "out", whole))
    np.testing.assert_allclose(found.reconstruct_n(0, 34), expected.reconstruct_n(0, 34), atol=1e-6)
    assert read_manifest(tmp_path / "out").fingerprint() == read_manifest(whole).fingerprint()


def test_an_adopted_index_is_repaired_and_repaired_again(cut, full, questions, model_folder, tmp_path):
    index = build(tmp_path / "theirs", cut, model_folder)
    file = index / "agentic_r_Flat.index"
    adopted = build(tmp_path / "adopted", cut, model_folder, adopt=[str(file)])
    before = file.read_bytes()
    repair.run(config(adopted, questions, tmp_path / "one", source=str(full), max_questions=2))
    repair.run(config(tmp_path / "one", questions, tmp_path / "two", source=str(full)))
    assert [path.name for path in sorted((tmp_path / "two" / "corpus").iterdir())] == [
        f"0000{number}.jsonl" for number in range(3)
    ]
    assert file.read_bytes() == before
    assert not (tmp_path / "one" / "agentic_r_Flat.index").is_symlink()
    manifests = [read_manifest(folder) for folder in (adopted, tmp_path / "one", tmp_path / "two")]
    assert [manifest.rows for manifest in manifests] == [31, 32, 34]
    assert len({manifest.fingerprint() for manifest in manifests}) == 3
    assert {manifest.adopted for manifest in manifests} == {manifests[0].adopted}


def test_contexts_of_the_questions_give_documents_by_title(cut, model_folder, tmp_path):
    rows = [
        {
            "_id": f"q{number}",
            "question": "p3 p4",
            "answer": "p4",
            "supporting_facts": [["Lost", 0], ["title 3", 1]],
            "context": [["Lost", ["p3 p4.", " p5."]], ["Distractor", ["p9"]]],
        }
        for number in range(2)
    ]
    (tmp_path / "dev.json").write_text(json.dumps(rows))
    index = build(tmp_path / "index", cut, model_folder)
    repair.run(config(index, tmp_path / "dev.json", tmp_path / "out"))
    (added,) = list(Corpus(tmp_path / "out" / "corpus"))[31:]
    assert (added.title, added.text, added.id[:6]) == ("Lost", "p3 p4. p5.", "added-")
    report = json.loads((tmp_path / "out" / "repair.json").read_text())
    held = any(n[0] == 3 for n in NUMBERS[:30])
    assert report["not_found"] == ([] if held else ["title 3"])


def test_every_form_of_context_is_read():
    nile = {"id": "", "title": "Nile", "text": "It flows. Far.", "gold": True}
    facts = {"supporting_facts": {"title": ["Nile"], "sent_id": [0]}}
    hub = facts | {"context": {"title": ["Nile"], "sentences": [["It flows.", " Far."]]}}
    wiki = {"context": json.dumps([["Nile", ["It flows.", "Far."]]]), "supporting_facts": json.dumps([["Nile", 0]])}
    musique = {"paragraphs": [{"idx": 0, "title": "Nile", "paragraph_text": "It flows. Far.", "is_supporting": True}]}
    assert [context_documents(row) for row in (hub, wiki, musique)] == [[nile]] * 3
    browsecomp = {"gold_docs": [{"docid": 7, "text": "It flows.", "url": "u"}]}
    assert context_documents(browsecomp) == [{"id": "7", "title": None, "text": "It flows.", "gold": True}]
    assert context_documents({"question": "Who?"}) == []


def test_contexts_of_other_data_sets_are_not_taken_for_pairs():
    facts = {"supporting_facts": [["Nile", 0]]}
    whole = {"id": "", "title": "Nile", "text": "It flows. Far.", "gold": True}
    assert context_documents(facts | {"context": [["Nile", "It flows. Far."]]}) == [whole]
    for context in ([{"title": "Nile", "text": "x"}], ["ab"], [7], {"title": None, "sentences": None}, {"title": "x"}):
        assert context_documents(facts | {"context": context}) == []


def test_an_interrupted_repair_goes_on_without_encoding_twice(
    cut, full, questions, model_folder, tmp_path, monkeypatch
):
    index, out = build(tmp_path / "index", cut, model_folder), tmp_path / "out"
    given = config(index, questions, out, source=str(full))
    monkeypatch.setattr(repair, "_SHARD", 2)
    encode, calls = Retriever.encode_passages, []

    def fails_at_the_second(self, passages, **settings):
        calls.append([passage.id for passage in passages])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, passages, **settings)

    monkeypatch.setattr(Retriever, "encode_passages", fails_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        repair.run(given)
    with pytest.raises(OutputExistsError, match=r"pass --resume|already exists"):
        repair.run(given)
    with pytest.raises(ManifestMismatchError, match="source was"):
        repair.run(config(index, questions, out, source=str(cut)), resume=True)
    with monkeypatch.context() as broken:  # the next kill comes while the index is written
        broken.setattr(repair, "write_index", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            repair.run(given, resume=True)
    repair.run(given, resume=True)
    assert calls == [["d30", "d31"], ["d35"], ["d35"]]
    assert read_manifest(out).rows == 34 and not (out / ".work").exists()
    repair.run(given, resume=True)
    assert len(calls) == 3


def test_nothing_to_add_is_an_error_that_leaves_nothing(cut, questions, model_folder, tmp_path, capsys):
    index = build(tmp_path / "index", cut, model_folder)
    flags = ["--questions", questions, "--index", index, "--out", tmp_path / "out"]
    assert main(["repair", *map(str, flags)]) == 1
    assert "lacks 4 gold documents" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="nothing to add"):
        repair.run(config(index, questions, tmp_path / "out", max_questions=1))


@pytest.mark.parametrize("name", ["copy.jsonl.gz", "copy.json"])
def test_a_packed_copy_of_a_corpus_that_was_indexed_unpacked_is_unpacked_once(
    cut, full, questions, model_folder, tmp_path, name
):
    index, copy = build(tmp_path / "index", cut, model_folder), tmp_path / name
    lines = cut.read_text()
    copy.write_bytes(
        gzip.compress(lines.encode())
        if name.endswith("gz")
        else json.dumps([json.loads(line) for line in lines.splitlines()]).encode()
    )
    repair.run(config(index, questions, tmp_path / "one", source=str(full), corpus=str(copy), max_questions=2))
    repair.run(config(tmp_path / "one", questions, tmp_path / "two", source=str(full)))
    first = tmp_path / "one" / "corpus" / "00000.jsonl"
    assert first.is_file() and not first.is_symlink() and len(first.read_text().splitlines()) == 31
    assert (tmp_path / "two" / "corpus" / "00000.jsonl").resolve() == first
    with Corpus(tmp_path / "two" / "corpus") as corpus:
        assert [passage.id for passage in corpus][-4:] == ["d39", "d30", "d31", "d35"]


def test_rows_are_streamed_and_only_missing_documents_are_held(cut):
    class Row(dict):
        """Can be referred to weakly."""

    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    most = 0

    def rows():
        nonlocal most
        for number in range(50):
            title = "Lost" if number == 20 else "title 3"
            row = Row(context=[[title, [f"p{number}."]]], supporting_facts=[[title, 0]])
            Row.__hash__ = object.__hash__
            alive.add(row)
            most = max(most, len(alive))
            metadata = {"supporting_titles": [title]}
            yield Question(id=f"q{number}", question="?", golden_answers=(), metadata=metadata), row

    with Corpus(cut) as corpus:
        assert any(passage.title == "title 3" for passage in corpus)
        (added,), not_found = repair.missing_documents(rows, corpus, None)
    assert (added.title, added.text, not_found) == ("Lost", "p20.", []) and most < 4


def test_a_service_and_no_index_are_refused_before_any_work(cut, questions, tmp_path, capsys):
    given = ["repair", f"questions={questions}", f"out={tmp_path / 'out'}"]
    said = "search.backend=service: a service searches the index that it was started with"
    assert said in cli_error(capsys, *given, "search.backend=service", "search.url=http://127.0.0.1:1")
    assert "expected the folder of the index to repair (--index)" in cli_error(capsys, *given)
    assert not (tmp_path / "out").exists()


def cli_error(capsys, *arguments) -> str:
    assert main(list(map(str, arguments))) == 1
    return capsys.readouterr().err


def test_a_sparse_retriever_is_measured_on_both_corpora(cut, full, questions, model_folder, tmp_path):
    index = build(tmp_path / "index", cut, model_folder)
    spec = SearchSpec(backend="bm25")
    repair.run(config(index, questions, tmp_path / "out", source=str(full), search=spec))
    report = json.loads((tmp_path / "out" / "repair.json").read_text())
    assert report["after"]["top 5"]["gold"] > report["before"]["top 5"]["gold"]
