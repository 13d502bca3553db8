"""Every form of a corpus through everything that reads a corpus: the same passages, in the same order."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pyarrow.parquet
import pytest

from agentic_r_plugin import cli
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.dense import FaissBackend
from tests.search.loopback import serving
from tests.search.tiny_retriever import make_model

LONG = "p9 " + "p3 " * 350_000
"""More than a megabyte."""

TEXTS = [
    ("11", 'Ann "A" & Co &amp; sons', "p1 p2\u2028p2.\tEnd."),
    ("12", "1984", 'p4 "quoted" p5'),
    ("13", "", "p6 p7"),
    ("14", "Empty", ""),
    ("15", "Long", LONG.strip()),
]
"""(id, title, text) of the passages of every corpus here."""


@dataclass
class Form:
    """A corpus as its project writes it."""

    write: Callable[[Path], Path]
    titles: bool = True
    urls: bool = False


def rows_of(kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for identifier, title, text in TEXTS:
        number: Any = int(identifier)
        contents = Passage(id="", title=title, text=text).contents
        rows.append({
            "flashrag": {"id": identifier, "contents": contents},
            "title and text": {"id": number, "title": title or float("nan"), "text": text},
            "all four": {"id": float(number), "title": "x", "text": "y", "contents": contents or None},
            "beir": {"_id": identifier, "title": title, "text": text, "metadata": {"url": f"https://{number}"}},
            "tevatron": {"docid": identifier, "title": title or None, "text": text or None},
            "browsecomp": {"docid": number, "url": f"https://{number}",
                           "text": f"---\ntitle: {title}\n---\n{text}" if title else text},
        }[kind])  # fmt: skip
    return rows


def jsonl(kind: str) -> bytes:
    """With a byte-order mark, CRLF, an empty line and no line break at the end."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows_of(kind)]
    return b"\xef\xbb\xbf" + "\r\n".join([lines[0], "", *lines[1:]]).encode()


def plain(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "corpus.jsonl").write_bytes(jsonl(kind))
        return folder / "corpus.jsonl"

    return write


def packed(kind: str, suffix: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        data = jsonl(kind)
        data = gzip.compress(data) if suffix == "gz" else pyarrow.Codec("zstd").compress(data, asbytes=True)
        (folder / f"corpus.jsonl.{suffix}").write_bytes(data)
        return folder / f"corpus.jsonl.{suffix}"

    return write


def in_shards(folder: Path) -> Path:
    """Plain, packed and Parquet shards, as the hub stores them with a card."""
    made, rows = folder / "shards", rows_of("tevatron")
    made.mkdir()
    (made / "README.md").write_text("# A data set")
    (made / "a-0.jsonl").write_text("\r\n".join(map(json.dumps, rows[:1])))
    (made / "a-1.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[1:3])).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[3:]), made / "b-0.parquet")
    return made


def in_plain_shards(folder: Path) -> Path:
    made = folder / "shards"
    made.mkdir()
    for number, row in enumerate(rows_of("flashrag")):
        (made / f"{number:05d}.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\r\n")
    return made


def json_list(folder: Path) -> Path:
    (folder / "corpus.json").write_text(json.dumps(rows_of("title and text"), indent=1), encoding="utf-8-sig")
    return folder / "corpus.json"


def parquet(kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows_of(kind)), folder / "corpus.parquet")
        return folder / "corpus.parquet"

    return write


def dpr(folder: Path) -> Path:
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\r\n")
    writer.writerow(["id", "text", "title"])
    writer.writerows((identifier, text, title) for identifier, title, text in TEXTS)
    (folder / "psgs_w100.tsv").write_bytes(b"\xef\xbb\xbf" + out.getvalue().encode())
    return folder / "psgs_w100.tsv"


def ms_marco(folder: Path) -> Path:
    lines = [f"{identifier}\t{text}\r\n" for identifier, _, text in TEXTS]
    (folder / "collection.tsv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return folder / "collection.tsv.gz"


def ms_marco_documents(folder: Path) -> Path:
    lines = [f"{identifier}\thttps://{identifier}\t{title}\t{text}\n" for identifier, title, text in TEXTS]
    (folder / "msmarco-docs.tsv").write_text("".join(lines), encoding="utf-8")
    return folder / "msmarco-docs.tsv"


def wikipedia(folder: Path) -> Path:
    """Articles of the hub, none longer than a passage."""
    rows = [
        {"id": identifier, "url": f"https://{identifier}", "title": title, "text": text}
        for identifier, title, text in TEXTS
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    given = [f"in={folder / 'train-00000-of-00001.parquet'}", f"out={folder / 'wiki.jsonl'}", "words=1000000"]
    assert cli.main(["convert", "corpus", *given]) == 0
    return folder / "wiki.jsonl"


FORMS = {
    "FlashRAG, Pyserini": Form(plain("flashrag")),
    "id, title, text": Form(plain("title and text")),
    "all four": Form(plain("all four")),
    "BEIR": Form(plain("beir"), urls=True),
    "Tevatron": Form(plain("tevatron")),
    "BrowseComp-Plus": Form(plain("browsecomp"), urls=True),
    "gz": Form(packed("beir", "gz"), urls=True),
    "zst": Form(packed("flashrag", "zst")),
    "shards": Form(in_shards),
    "plain shards": Form(in_plain_shards),
    "JSON list": Form(json_list),
    "Parquet": Form(parquet("beir"), urls=True),
    "Parquet of BrowseComp-Plus": Form(parquet("browsecomp"), urls=True),
    "DPR": Form(dpr),
    "MS MARCO": Form(ms_marco, titles=False),
    "MS MARCO documents": Form(ms_marco_documents, urls=True),
    "Hugging Face Wikipedia, cut": Form(wikipedia, urls=True),
}


def expected(name: str) -> list[tuple[str, str, str]]:
    """(id, title, text) of the passages that a form must give."""
    found = []
    for identifier, title, text in TEXTS:
        title = title if FORMS[name].titles else ""
        if "BrowseComp" in name and title:
            text = f"---\ntitle: {title}\n---\n{text}"
        if "cut" in name:
            identifier = f"{identifier}#0"
            if not text:
                continue  # an article without text has no passage
        found.append((identifier, title, text))
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def of_corpus(file: Path, folder: Path, model: str) -> list[Passage]:
    with Corpus(file) as corpus:
        found = list(corpus)
        assert [corpus.row_of(passage.id) for passage in found] == list(range(len(found)))
        corpus.save_table(folder)
    with Corpus(file, table=folder) as corpus:
        assert list(corpus) == found
    return found


def of_index(file: Path, folder: Path, model: str) -> list[Passage]:
    """Row i of an index belongs to passage i, so each passage is found first by its own text."""
    given = [f"corpus={file}", f"retriever={model}", f"out={folder / 'index'}", "precision=float32", "device=cpu"]
    assert cli.main(["index", *given]) == 0
    backend = FaissBackend(folder / "index", precision="float32")
    (hits,) = backend.search([SearchRequest(query="p1")], len(backend.corpus))
    return sorted((hit.passage for hit in hits), key=lambda passage: backend.corpus.row_of(passage.id))


def of_bm25(file: Path, folder: Path, model: str) -> list[Passage]:
    backend = BM25Backend(file)
    for query, identifier in (("p1 p2", "11"), ("p6", "13"), ("p9", "15")):
        assert backend.search([SearchRequest(query=query)], 1)[0][0].passage.id.partition("#")[0] == identifier
    return list(backend.corpus)


def of_coverage(file: Path, folder: Path, model: str) -> list[Passage]:
    with Corpus(file) as corpus:
        passages = list(corpus)
    questions, out = folder / "questions.jsonl", folder / "coverage.jsonl"
    gold = [passage.id for passage in passages]
    row = {"id": "q", "question": "p7?", "golden_answers": ["p6 p7"], "metadata": {"gold_doc_ids": [*gold, "none"]}}
    questions.write_text(json.dumps(row))
    given = [f"questions={questions}", f"corpus={file}", f"out={out}", "search.backend=bm25", "topk=[1]"]
    assert cli.main(["coverage", *given]) == 0
    (found,) = map(json.loads, out.read_text().splitlines())
    assert (found["answer_in_corpus"], found["answer_rank"]) == (True, 1)
    assert (found["gold"], found["gold_in_corpus"]) == (len(gold) + 1, len(gold))
    return passages


def of_service(file: Path, folder: Path, model: str) -> list[Passage]:
    """Documents as Search-R1's clients receive them."""
    backend = BM25Backend(file)
    with serving(backend) as url:
        body = {"queries": ["p1 p4 p6 p9 empty"], "topk": len(backend.corpus), "return_scores": True}
        answer = httpx.post(f"{url}/retrieve", json=body, timeout=60).json()
    documents = [hit["document"] for hit in answer["result"][0]]
    nothing = [passage for passage in backend.corpus if not passage.contents]  # which no word finds
    documents += [{"id": passage.id, "title": "", "text": "", "contents": ""} for passage in nothing]
    documents.sort(key=lambda document: backend.corpus.row_of(document["id"]))
    for document in documents:
        assert document["contents"] == backend.corpus.by_id(document["id"]).contents
    return [
        Passage(id=item["id"], title=item["title"], text=item["text"], metadata=item.get("metadata", {}))
        for item in documents
    ]


READERS: dict[str, Callable[[Path, Path, str], list[Passage]]] = {
    "Corpus": of_corpus,
    "index": of_index,
    "bm25": of_bm25,
    "coverage": of_coverage,
    "service": of_service,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FORMS)
def test_everything_reads_every_form(tmp_path, name, reader, model):
    form, work = FORMS[name], tmp_path / "work"
    work.mkdir()
    file = form.write(tmp_path)
    found = READERS[reader](file, work, model)
    assert [(passage.id, passage.title, passage.text) for passage in found] == expected(name)
    urls = [dict(passage.metadata).get("url") for passage in found]
    assert urls == [f"https://{passage.id.partition('#')[0]}" if form.urls else None for passage in found]


@pytest.mark.parametrize("command", ["index", "coverage", "convert corpus"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"id": 1, "contents": "x"}\n\n{"id": 2, "contents": "y', ":3: expected one JSON object per line"),
        (
            b'{"id": 1, "contents": "x"}\r\n{"id": 2, "contents": ["y"]}',
            ":2: field 'contents': expected text, found list",
        ),
        (b'{"id": 1, "contents": "x"}\n{"id": 2, "contents": "\xe9"}', ":2: expected UTF-8"),
        (b'{"id": 1, "contents": "x"}\n{"id": NaN, "contents": "y"}', ":2: expected an id"),
        (b'{"id": 1, "contents": "x"}\n{"id": "1", "contents": "y"}', "'1'"),
    ],
    ids=["cut line", "mixed types", "Latin-1", "no id", "duplicate id"],
)
def test_every_command_names_file_and_line_of_what_it_cannot_read(tmp_path, capsys, command, data, message, model):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.jsonl").write_text('{"id": 0, "contents": "w"}')
    (shards / "1.jsonl").write_bytes(data)
    (tmp_path / "q.jsonl").write_text('{"id": "q", "question": "Q?", "golden_answers": ["x"]}')
    given = {
        "index": ["index", f"corpus={shards}", f"retriever={model}"],
        "coverage": ["coverage", f"corpus={shards}", f"questions={tmp_path / 'q.jsonl'}", "search.backend=bm25"],
        "convert corpus": ["convert", "corpus", f"in={shards}"],
    }[command]
    assert cli.main([*given, f"out={tmp_path / 'out.jsonl'}"]) == 1
    said = capsys.readouterr().err
    assert (f"1.jsonl{message}" if message[0] == ":" else message) in said
    if message[0] != ":":
        assert "1.jsonl:2: " in said and ("first at line 1" in said or "1.jsonl:1" in said)
    assert "Traceback" not in said and not (tmp_path / "out.jsonl").is_file()


def test_a_document_of_ms_marco_with_fewer_fields_is_an_error_with_its_line(tmp_path):
    file = ms_marco_documents(tmp_path)
    file.write_text(file.read_text() + "16\thttps://16\tno text\n")
    with pytest.raises(
        RecordError, match=r"msmarco-docs\.tsv:6: expected an id, an address, a title and a text, found '16"
    ):
        Corpus(file)
