"""`agentic-r convert corpus`: documents and articles cut into passages that name their source and position."""

from __future__ import annotations

import gzip
import json
import zipfile

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_r_plugin import cli
from agentic_r_plugin.convert.corpus import Document, count_words, cut, sentence_chunker
from agentic_r_plugin.search.corpus import Corpus

TWELVE = " ".join(f"word{number}" for number in range(1, 12)) + " end. "


def pdf(*pages: str) -> bytes:
    """A PDF with one text line per line of each page."""
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(pages)))
    font = "<< /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    for number, page in enumerate(pages):
        shown = "BT /F1 12 Tf 72 720 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in page.splitlines()) + " ET"
        place = f"/Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * number} 0 R"
        objects.append(f"<< /Type /Page {place} /Resources {font} >>")
        objects.append(f"<< /Length {len(shown)} >>\nstream\n{shown}\nendstream")
    data, starts = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, start=1):
        starts.append(len(data))
        data += f"{number} 0 obj\n{item}\nendobj\n".encode()
    table = "".join(f"{start:010d} 00000 n \n" for start in starts)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return data + f"{end}trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n".encode()


def docx(file, *paragraphs: str) -> None:
    """A Word file whose first paragraph is a heading."""
    kind, word = "application/vnd.openxmlformats-", "http://schemas.openxmlformats.org"
    heading = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    body = "".join(f"<w:p>{heading}<w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs[:1])
    body += "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs[1:])
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{word}/package/2006/content-types"><Default Extension="rels" '
        f'ContentType="{kind}package.relationships+xml"/><Override PartName="/word/document.xml" '
        f'ContentType="{kind}officedocument.wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{word}/package/2006/relationships"><Relationship Id="r" Type="{word}'
        '/officeDocument/2006/relationships/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{word}/wordprocessingml/2006/main"><w:body>{body}</w:body>'
        "</w:document>",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text)


def convert(*arguments: object) -> int:
    return cli.main(["convert", "corpus", *map(str, arguments)])


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").strip().split("\n")]


def test_a_passage_is_found_again_in_the_file_that_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, out = tmp_path / "docs", tmp_path / "corpus.jsonl"
    (folder / "guides").mkdir(parents=True)
    text = f"# Ann's page #\r\n\r\n{TWELVE * 3}\r\n\r\n## Later\r\n\r\nOslo \u2028is a city.\r\n"
    (folder / "guides" / "ann.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (folder / "notes.TXT").write_text("# no heading. " + "x" * 200)
    assert convert("--in", "docs", "--out", out, "words=30") == 0
    found = lines(out)
    assert [line["id"] for line in found] == ["guides/ann.md#0", "guides/ann.md#1", "notes.TXT#0"]
    for line in found[:2]:
        place = line["metadata"]
        assert place["source"] == "guides/ann.md"
        found_text = text[place["start"] : place["end"]]
        assert (
            line["contents"] == '"Ann\'s page"\n' + found_text.replace("\r\n", "\n") and count_words(found_text) <= 30
        )
    assert found[1]["contents"].endswith("## Later\n\nOslo \u2028is a city.")
    assert found[2]["contents"].startswith('"notes"\n# no heading.')
    with Corpus(out) as corpus:
        assert corpus.by_id("guides/ann.md#1").metadata == found[1]["metadata"]


def test_a_single_document_is_a_corpus_too(tmp_path):
    (tmp_path / "notes.txt").write_text("One two.")
    (tmp_path / "other.md").write_text("Three.")
    assert convert("--in", tmp_path / "notes.txt", "--out", tmp_path / "corpus.jsonl") == 0
    assert [line["contents"] for line in lines(tmp_path / "corpus.jsonl")] == ['"notes"\nOne two.']


def test_html_pdf_and_word_are_read_and_a_broken_file_is_kept_apart(tmp_path, capfd):
    pytest.importorskip("markitdown", reason="the extra `documents` is not installed")
    folder, out = tmp_path / "docs", tmp_path / "corpus.jsonl"
    folder.mkdir()
    (folder / "a.html").write_text(
        "<html><head><title>T &amp; C</title><script>bad()</script></head><body><p>One <b>two</b>.</p></body></html>"
    )
    (folder / "b.pdf").write_bytes(pdf("The first page is here.\nThe first page ends.", "The second page is here."))
    docx(folder / "c.docx", "Word title", "Second paragraph.")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    (folder / "broken.docx").write_bytes(b"PK broken")
    (folder / "empty.md").write_text(" \n")
    (folder / "latin.txt").write_bytes("Gen\xe8ve".encode("latin-1"))
    (folder / "picture.png").write_bytes(b"x")
    (folder / ".hidden.md").write_text("hidden")
    assert convert("--in", folder, "--out", out, "words=9") == 0
    found = {line["id"]: (line["contents"], line["metadata"].get("page")) for line in lines(out)}
    assert found == {
        "a.html#0": ('"T & C"\nOne **two**.', None),
        "b.pdf#0": ('"b"\nThe first page is here.\nThe first page ends.', 1),
        "b.pdf#1": ('"b"\nThe second page is here.', 2),
        "c.docx#0": ('"Word title"\n# Word title\n\nSecond paragraph.', None),
    }
    apart = {line["unit"]: line["error"] for line in lines(tmp_path / "corpus.jsonl.errors.jsonl")}
    assert set(apart) == {"broken.pdf", "broken.docx", "empty.md", "latin.txt"}
    assert "expected UTF-8" in apart["latin.txt"] and apart["empty.md"].startswith("no text in it")
    shown = capfd.readouterr().err
    assert "files of other kinds are left out: 1 .png" in shown and "4 passages of 3 documents" in shown
    assert "of 7 units 4 refused, kept apart" in shown


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_packed_output_is_the_same_corpus(tmp_path, suffix):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# T\n\n" + TWELVE * 20)
    found = set()
    for out in (tmp_path / "c.jsonl", tmp_path / f"c{suffix}"):
        assert convert("--in", tmp_path / "docs", "--out", out) == 0
        with Corpus(out) as corpus:
            assert len(corpus) == 3
            found.add(corpus.fingerprint())
    assert len(found) == 1


@pytest.mark.parametrize("name", ["wiki.parquet", "wiki.jsonl", "wiki.tsv", "wiki.tsv.gz", "shards"])
def test_whole_articles_are_cut_and_keep_their_address(tmp_path, name):
    rows = [
        {"id": "12", "url": "https://x/Ann", "title": "Ann", "text": TWELVE * 2 + "\n\n" + TWELVE},
        {"id": "13", "url": "https://x/Bob", "title": "Bob", "text": "Short."},
    ]
    path = tmp_path / name
    if name == "shards":
        path.mkdir()
        (path / "README.md").write_text("# A data set of the hub")
        for row in rows:
            (path / f"{row['id']}.jsonl").write_text(json.dumps(row))
    elif ".tsv" in name:  # no cell holds a line break
        rows[0]["text"] = rows[0]["text"].replace("\n\n", "  ")
        data = "\r\n".join("\t".join(cells) for cells in [list(rows[0]), *(row.values() for row in rows)]) + "\r\n"
        path.write_bytes(gzip.compress(data.encode()) if name.endswith("gz") else data.encode())
    elif name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert convert("--in", path, "--out", out, "words=24") == 0
    found = lines(out)
    assert [line["id"] for line in found] == ["12#0", "12#1", "13#0"]
    assert found[1]["metadata"] == {"url": "https://x/Ann", "source": "12", "start": 2 * len(TWELVE) + 2,
                                    "end": 3 * len(TWELVE) + 1}  # fmt: skip
    assert found[1]["contents"] == '"Ann"\n' + TWELVE.strip()


def test_a_conversion_resumes_only_with_the_same_documents(tmp_path, capfd):
    folder, out = tmp_path / "docs", tmp_path / "corpus.jsonl"
    folder.mkdir()
    (folder / "a.md").write_text("One.")
    assert convert("--in", folder, "--out", out) == 0
    assert convert("--in", folder, "--out", out, "--resume", "batch_size=3") == 0
    (folder / "b.md").write_text("Two.")
    assert convert("--in", folder, "--out", out, "--resume") == 1
    assert "documents" in capfd.readouterr().err


def test_what_holds_no_document_is_an_error(tmp_path, capfd):
    (tmp_path / "docs").mkdir()
    for path in (tmp_path / "docs", tmp_path / "none"):
        assert convert("--in", path, "--out", tmp_path / "o.jsonl") == 1
        assert str(path) in capfd.readouterr().err
    (tmp_path / "docs" / "a.txt").write_text("")
    assert convert("--in", tmp_path / "docs", "--out", tmp_path / "o.jsonl") == 1
    assert "all of the 1 units were refused" in capfd.readouterr().err


TEXT = st.text(st.sampled_from("ab .!?\n\r\f\u2028東京。x"), max_size=200)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(1, 9))
def test_passages_hold_every_word_once_and_no_more_words_than_asked(text, words):
    document = Document(source="d", title="T", text=text)
    places = [passage.metadata for passage in cut(document, words, sentence_chunker(words))]
    parts = [text[place["start"] : place["end"]] for place in places]
    assert "".join("".join(part.split()) for part in parts) == "".join(text.split())
    assert all(part == part.strip() and count_words(part) <= words for part in parts)
