"""The corpus: random access, faults by file and line, the same fingerprint whatever the file's form."""

from __future__ import annotations

import codecs
import datetime
import gzip
import json
from decimal import Decimal

import pyarrow
import pyarrow.parquet
import pytest

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Passage, text_id
from agentic_r_plugin.search.base import Hit
from agentic_r_plugin.search.corpus import Corpus, count_lines
from agentic_r_plugin.search.wire import decode_hits, encode_hits

ROWS = [
    {"id": "a", "contents": '"Ann"\nfirst\nsecond'},
    {"id": "7", "contents": "no title"},
    {"id": "ä", "contents": '"Ö"\n{"id": 1}'},
]


def write_jsonl(file, rows, end="\n"):
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + end, encoding="utf-8")
    return file


def test_passages_are_found_by_row_and_by_id(tmp_path):
    with Corpus(write_jsonl(tmp_path / "c.jsonl", ROWS, end="")) as corpus:
        assert len(corpus) == 3
        assert (corpus[0].id, corpus[0].title, corpus[0].text) == ("a", "Ann", "first\nsecond")
        assert (corpus[1].title, corpus[1].text) == ("", "no title")
        assert [passage.id for passage in corpus] == ["a", "7", "ä"]
        assert corpus.row_of("ä") == 2 and corpus.by_id("7").text == "no title"
        assert corpus.row_of("b") is None and "b" not in corpus and "a" in corpus
        with pytest.raises(IndexError):
            corpus[3]
        with pytest.raises(RecordError, match=r"c\.jsonl: no passage with id 'zz'"):
            corpus.by_id("zz")
        with pytest.raises(RecordError, match="the retrieval service gave this passage without an id: use a service"):
            corpus.by_id(text_id("zz"))


def test_gzipped_parquet_and_plain_forms_are_the_same_corpus(tmp_path):
    plain = write_jsonl(tmp_path / "c.jsonl", ROWS)
    packed, table = tmp_path / "c.jsonl.gz", tmp_path / "c.parquet"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), table)
    corpora = [Corpus(file) for file in (plain, packed, table)]
    assert len({corpus.fingerprint() for corpus in corpora}) == 1
    assert [corpus[2].title for corpus in corpora] == ["Ö"] * 3
    changed = write_jsonl(tmp_path / "d.jsonl", [*ROWS[:2], {"id": "ä", "contents": "x"}])
    assert Corpus(changed).fingerprint() != corpora[0].fingerprint()


@pytest.mark.parametrize(
    ("own", "leads_to"), [("c.jsonl", "wiki.jsonl.gz"), ("c.jsonl.gz", "blob"), ("c.jsonl", "w.parquet")]
)
def test_a_link_to_a_packed_corpus_is_read_whichever_of_the_names_shows_it(tmp_path, own, leads_to):
    rows = [{"id": "a", "contents": '"T"\nx'}, {"id": "b", "contents": '"U"\ny'}]
    target = tmp_path / leads_to
    if leads_to.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), target)
    else:
        target.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    (tmp_path / own).symlink_to(target)
    with Corpus(tmp_path / own) as corpus:
        assert [passage.id for passage in corpus] == ["a", "b"]
        corpus.save_table(tmp_path)
    with Corpus(tmp_path / own, table=tmp_path) as corpus:
        assert corpus.by_id("b").title == "U"


def test_other_columns_of_a_parquet_corpus_may_hold_anything(tmp_path):
    others = {"metadata": "plain text", "scores": [1.5], "seen": datetime.datetime(2024, 5, 1)}
    table = pyarrow.Table.from_pylist([row | others for row in ROWS])
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    plain = Corpus(write_jsonl(tmp_path / "c.jsonl", ROWS))
    assert Corpus(tmp_path / "c.parquet").fingerprint() == plain.fingerprint()
    pyarrow.parquet.write_table(table.drop_columns("contents"), tmp_path / "d.parquet")
    with pytest.raises(RecordError, match=r"d\.parquet: expected text in field 'contents', .* only 'id', 'metadata'"):
        Corpus(tmp_path / "d.parquet")


def test_the_fingerprint_separates_an_id_from_the_text_that_follows(tmp_path):
    one = write_jsonl(tmp_path / "1.jsonl", [{"id": "ab", "contents": "c"}])
    other = write_jsonl(tmp_path / "2.jsonl", [{"id": "a", "contents": "bc"}])
    assert Corpus(one).fingerprint() != Corpus(other).fingerprint()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "contents": ""}\n\n{"id": "a", "contents": ""}\n', r":3: duplicate passage id 'a', first at"),
        ('{"id": "a", "contents": "x"}\n{"id": "b", \n', r":2: expected one JSON object per line"),
        ('{"id": "a", "body": "x"}\n', r":1: expected text in field 'contents', .* found only 'id', 'body'; rename"),
        ('{"contents": "x"}\n', r":1: expected an id in field 'id' \('_id', 'docid'\), found only 'contents'"),
        ('{"id": true, "contents": "x"}\n', r":1: field 'id': expected text or a whole number, found bool 'True'"),
        ('{"id": "a", "contents": 3}\n', r":1: field 'contents': expected text, found int '3'"),
        ('{"id": "a", "text": ["x"]}\n', r":1: field 'text': expected text, found list"),
        ("[1]\n", r":1: expected a JSON object, found int"),
        ('[\n{"id": "a", "text": "x"},\n{"id": "b"}]', r":3: expected text in field 'contents'"),
        ("", "the corpus is empty"),
        ("\n\n", "the corpus is empty"),
    ],
)  # fmt: skip
def test_a_broken_corpus_is_refused_with_file_and_line(tmp_path, text, message):
    file = tmp_path / "c.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"c\.jsonl" + ("" if message.startswith(":") else ": ") + message):
        Corpus(file)


def test_bad_utf8_and_cut_gzip_are_refused(tmp_path):
    bad, cut = tmp_path / "c.jsonl", tmp_path / "c.jsonl.gz"
    bad.write_bytes(b'{"id": "a", "contents": "\xff"}\n')
    cut.write_bytes(gzip.compress(b'{"id": "a", "contents": "x"}\n' * 100)[:-12])
    with pytest.raises(RecordError, match=r"c\.jsonl:1: expected UTF-8"):
        Corpus(bad)
    with pytest.raises(RecordError, match=r"c\.jsonl\.gz: not a whole gzip file"):
        Corpus(cut)
    with pytest.raises(RecordError, match="no such corpus file"):
        Corpus(tmp_path / "none.jsonl")


FORMS = {
    "contents": lambda id, title, text: {"id": id, "contents": Passage(id="", title=title, text=text).contents},
    "title and text": lambda id, title, text: {"id": id, "title": title, "text": text},
    "all four": lambda id, title, text: {
        "id": id, "title": "x", "text": "y", "contents": Passage(id="", title=title, text=text).contents
    },
    "beir": lambda id, title, text: {"_id": id, "title": title, "text": text, "metadata": {"url": "u"}},
    "tevatron": lambda id, title, text: {"docid": id, "title": title, "text": text, "__index_level_0__": 3},
}  # fmt: skip
PASSAGES = [("1", "Ann", "first\nsecond"), ("2", '"Heroes"', "A\u2028song."), ("3", "", "no title"), ("4", "T", "")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.parquet"])
@pytest.mark.parametrize("ids", [str, int], ids=["text ids", "number ids"])
def test_every_form_of_a_corpus_gives_the_same_passages(tmp_path, form, name, ids):
    plain = write_jsonl(tmp_path / "plain.jsonl", [FORMS["contents"](*passage) for passage in PASSAGES])
    rows = [FORMS[form](ids(id), title, text) for id, title, text in PASSAGES]
    file = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        data = codecs.BOM_UTF8 + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode()
        file.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with Corpus(file) as corpus, Corpus(plain) as expected:
        assert [(passage.id, passage.title, passage.text) for passage in corpus] == PASSAGES
        assert list(corpus) == list(expected) and corpus.by_id("3") == expected.by_id("3")
        assert corpus.fingerprint() == expected.fingerprint()
        corpus.save_table(tmp_path)
    with Corpus(file, table=tmp_path) as corpus:
        assert corpus.by_id("2").title == '"Heroes"'


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "list.json", "shards", "text.parquet"])
def test_what_else_a_corpus_says_of_a_passage_is_kept_but_not_compared(tmp_path, name):
    rows = [
        {"_id": "1", "title": "A", "text": "x", "metadata": {"source": "a.pdf", "page": 3, "gap": None}},
        {"docid": 2, "text": "y", "url": "https://u"},
        {"docid": 3, "text": "z", "url": None, "metadata": "plain"},
    ]
    path = tmp_path / name
    if name == "shards":
        path.mkdir()
        for row in rows:
            write_jsonl(path / f"{row.get('_id', row.get('docid'))}.jsonl", [row])
    elif name == "list.json":
        path.write_text(json.dumps(rows))
    elif name == "text.parquet":  # as our own commands write it
        columns = {"id": ["1", "2", "3"], "title": ["A", None, None], "text": ["x", "y", "z"]}
        metadata = [json.dumps(rows[0]["metadata"]), None, "plain"]
        table = pyarrow.table(columns | {"url": [None, "https://u", None], "metadata": metadata})
        pyarrow.parquet.write_table(table, path)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with Corpus(path) as corpus:
        assert [dict(passage.metadata) for passage in corpus] == [
            {"source": "a.pdf", "page": 3}, {"url": "https://u"}, {}
        ]  # fmt: skip
        answer = encode_hits([[Hit(passage=passage, score=1.0) for passage in corpus]], with_scores=True)
        documents = [hit["document"] for hit in answer["result"][0]]
        assert [document.get("metadata") for document in documents] == [
            {"source": "a.pdf", "page": 3}, {"url": "https://u"}, None
        ]  # fmt: skip
        (received,) = decode_hits(json.loads(json.dumps(answer)), num_requests=1, topk=3)
        assert [hit.passage.metadata for hit in received] == [passage.metadata for passage in corpus]
        assert corpus[0] == Passage(id="1", title="A", text="x")


def test_metadata_of_a_parquet_corpus_is_kept_where_json_can_hold_it(tmp_path):
    file = tmp_path / "c.parquet"
    seen = datetime.datetime(2024, 5, 1)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[0] | {"metadata": {"page": 3, "seen": seen}}]), file)
    assert Corpus(file)[0].metadata == {"page": 3, "seen": "2024-05-01 00:00:00"}
    for metadata in ({"page": 3, "image": b"\xff"}, b"\xff", [1.5], "{not JSON"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[0] | {"metadata": metadata, "url": b"\xff"}]), file)
        assert Corpus(file)[0].metadata == {}, metadata


def test_a_title_in_the_front_matter_of_a_text_is_its_title(tmp_path):
    text = "---\ntitle: 'Ann: a life'\ndate: 2020\n---\nAnn was born."
    rows = [{"docid": "1", "text": text}, {"docid": "2", "title": "T", "text": text}, {"docid": "3", "text": "--- x"}]
    with Corpus(write_jsonl(tmp_path / "c.jsonl", rows)) as corpus:
        assert [passage.title for passage in corpus] == ["Ann: a life", "T", ""]
        assert corpus[0].text == text


def test_a_passage_without_title_or_text_keeps_its_row(tmp_path):
    file = tmp_path / "c.jsonl"
    lines = (
        '{"id": 1, "title": NaN, "text": "x"}',
        '{"id": 2.0, "title": 1984, "text": "y"}',
        '{"id": "3", "title": "T", "text": null}',
        '{"id": "4", "contents": ""}',
        '{"id": "5", "contents": null, "title": "two\\nlines", "text": "z"}',
    )
    file.write_text("\n".join(lines), encoding="utf-8")
    with Corpus(file) as corpus:
        found = [(passage.id, passage.title, passage.text) for passage in corpus]
    assert found == [("1", "", "x"), ("2", "1984", "y"), ("3", "T", ""), ("4", "", ""), ("5", "two lines", "z")]


DPR = 'id\ttext\ttitle\n1\t"He said ""go"".\u2028Then\tleft."\t"Ann ""A"" B"\n2\tplain\tBob\n'
MARCO = '1\t"Quoted" start\n2\tplain\ttab\n'


@pytest.mark.parametrize("name", ["psgs.tsv", "psgs.tsv.gz"])
def test_passages_of_dpr_and_ms_marco_are_read(tmp_path, name):
    def found(text):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
        with Corpus(tmp_path / name) as corpus:
            return [(passage.id, passage.title, passage.text) for passage in corpus]

    assert found(DPR) == [("1", 'Ann "A" B', 'He said "go".\u2028Then\tleft.'), ("2", "Bob", "plain")]
    assert found(MARCO) == [("1", "", '"Quoted" start'), ("2", "", "plain\ttab")]
    assert found(MARCO.replace("\n", "\r\n")) == found(MARCO)
    assert found(DPR.replace("id", "docid", 1)) == found(DPR.replace("id", "_id", 1)) == found(DPR)
    for text, message in (
        (DPR + "3\tx\n", ":4: expected 3 fields, found 2"),
        (MARCO + "3\n", ":3: expected an id, a tab"),
        (DPR + '3\t"Go" he said\tC\n4\tx\ty\n', ":4: a cell is not quoted as expected .* as JSON Lines"),
        (DPR + '3\t"Go he said\tC\n4\tx\ty\n', ":4: a cell is not quoted as expected"),
        (DPR + '3\t"Go he said\tC\n4\tx"\ty\n', ":4: a cell is not quoted as expected .*holds a line break"),
        (DPR + "1\tx\ty\n", ":4: duplicate passage id '1', first at line 2"),
    ):
        with pytest.raises(RecordError, match=message):
            found(text)


@pytest.mark.parametrize("name", ["c.json", "c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
def test_a_corpus_of_one_json_list_is_read(tmp_path, name):
    plain = write_jsonl(tmp_path / "plain.jsonl", ROWS)
    data = json.dumps(ROWS, indent=1).encode()
    with pyarrow.output_stream(str(tmp_path / name), compression={"gz": "gzip", "zst": "zstd"}.get(name[8:])) as out:
        out.write(data)
    with Corpus(tmp_path / name) as corpus, Corpus(plain) as expected:
        assert list(corpus) == list(expected) and corpus.fingerprint() == expected.fingerprint()


def test_a_folder_of_shards_is_a_corpus_in_the_order_of_their_names(tmp_path):
    folder, saved = tmp_path / "wiki", tmp_path / "saved"
    folder.mkdir()
    saved.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[2:]), folder / "b.parquet")
    write_jsonl(folder / "a.jsonl", ROWS[:2])
    with Corpus(folder) as corpus, Corpus(write_jsonl(tmp_path / "plain.jsonl", ROWS)) as expected:
        assert list(corpus) == list(expected) and corpus.fingerprint() == expected.fingerprint()
        corpus.save_table(saved)
    assert count_lines(folder) == 3
    with Corpus(folder, table=saved) as corpus:
        assert corpus.by_id("ä").text == '{"id": 1}'
    write_jsonl(folder / "c.jsonl", [{"id": "c", "contents": "x"}])
    with Corpus(folder, table=saved) as corpus:
        assert len(corpus) == 4, "a shard was added, so the saved table is not used"
    write_jsonl(folder / "c.jsonl", [{"id": "c"}])
    with pytest.raises(RecordError, match=r"c\.jsonl:1: expected text in field 'contents'"):
        Corpus(folder)


def test_binary_text_and_decimal_ids_of_a_parquet_corpus_are_read_and_other_types_refused(tmp_path):
    file = tmp_path / "c.parquet"
    ids = pyarrow.array([Decimal("12")], pyarrow.decimal128(20, 0))
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "contents": pyarrow.array(["Ö".encode()])}), file)
    with Corpus(file) as corpus:
        assert [(passage.id, passage.text) for passage in corpus] == [("12", "Ö")]
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "contents": pyarrow.array([b"\xff"])}), file)
    with pytest.raises(RecordError, match=r"c\.parquet:1: field 'contents': expected text, found bytes"):
        Corpus(file)


def test_a_corpus_packed_with_zstandard_is_read_and_a_cut_one_refused(tmp_path):
    plain = write_jsonl(tmp_path / "c.jsonl", ROWS)
    packed = tmp_path / "c.jsonl.zst"
    packed.write_bytes(pyarrow.Codec("zstd").compress(plain.read_bytes(), asbytes=True))
    assert Corpus(packed).fingerprint() == Corpus(plain).fingerprint()
    (tmp_path / "link.jsonl").symlink_to(packed)
    assert len(Corpus(tmp_path / "link.jsonl")) == 3 == count_lines(packed)
    for broken in (b"no zstandard", packed.read_bytes()[:-9]):
        packed.write_bytes(broken)
        with pytest.raises(RecordError, match=r"c\.jsonl\.zst: not a whole zstd file"):
            Corpus(packed)
