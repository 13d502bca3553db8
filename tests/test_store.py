"""Record files: formats, checks with file and line, atomic writes."""

from __future__ import annotations

import gzip
import json
import time
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import (
    Candidates,
    Correctness,
    Group,
    Question,
    Record,
    Relevance,
    ScoredPassage,
    StopReason,
    SubAnswer,
    Trajectory,
    Turn,
)
from agentic_r_plugin.store import (
    atomic_path,
    drop_torn_end,
    file_fingerprint,
    read_json,
    read_lines,
    read_records,
    write_json,
    write_records,
)

QUESTION = Question(id="q1", question="Où?", golden_answers=("là", "ici"), metadata={"hops": 2, "gold": ["a"]})
TRAJECTORY = Trajectory(
    id="q1",
    question="Who?",
    golden_answers=("x",),
    turns=(Turn(turn=1, reasoning="r", query="q", passages=(ScoredPassage(id="p", score=0.5),)),),
    answer="x",
    stop_reason=StopReason.ANSWERED,
    em=1,
    f1=1.0,
    text="…",
)
SILENT = replace(TRAJECTORY, turns=(), answer=None, stop_reason=StopReason.MALFORMED, em=0, f1=0.0)
CANDIDATES = Candidates(
    id="q", turn=2, question="Q", golden_answers=("x",), query="q", history=("p",), prefix="…</search>",
    passages=(ScoredPassage(id="a", score=1.0),),
)  # fmt: skip
GROUP = Group(id="q", turn=1, question="Q", query="q", history=(), positive="a", negatives=("b", "c"))
RECORDS = [QUESTION, TRAJECTORY, CANDIDATES, GROUP, Relevance(id="q", turn=1, scores={"a": 3, "b": 100}),
           SubAnswer(id="q", turn=1, query="q", sub_answer=None)]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was_written(tmp_path: Path, suffix: str, record: Record):
    path = tmp_path / f"records{suffix}"
    assert write_records(path, [record, record]) == 2
    assert list(read_records(path, type(record))) == [record, record]


@pytest.mark.parametrize("empty", [SILENT, TRAJECTORY], ids=["first rows empty", "first rows full"])
def test_parquet_columns_keep_their_type_when_the_first_batch_is_empty(tmp_path: Path, empty: Trajectory):
    other = TRAJECTORY if empty is SILENT else SILENT
    records = [empty] * 1500 + [other] * 3
    write_records(tmp_path / "t.parquet", records)
    assert list(read_records(tmp_path / "t.parquet", Trajectory)) == records


def test_parquet_of_others_is_read_with_a_struct_a_map_or_nothing_where_keys_are_data(tmp_path: Path):
    scores = [{"a": 3, "b": 100}, {"c": 7}]
    rows = [{"schema": "relevance/1", "id": "q", "turn": turn, "scores": item} for turn, item in enumerate(scores, 1)]
    expected = [Relevance(id="q", turn=turn, scores=item) for turn, item in enumerate(scores, 1)]
    struct = pa.Table.from_pylist(rows)
    of_map = pa.map_(pa.string(), pa.int64())
    as_map = struct.set_column(3, "scores", pa.array([list(item.items()) for item in scores], type=of_map))
    for table in (struct, as_map):
        pq.write_table(table, tmp_path / "r.parquet")
        assert list(read_records(tmp_path / "r.parquet", Relevance)) == expected
    questions = [{"id": "1", "question": "Q", "golden_answers": ["x"], "metadata": item} for item in (None, {"k": 1})]
    pq.write_table(pa.Table.from_pylist(questions), tmp_path / "q.parquet")
    assert [item.metadata for item in read_records(tmp_path / "q.parquet", Question)] == [{}, {"k": 1}]


@pytest.mark.parametrize("value", [[1, 2], ["ab"], [["a", "b"]], [{"a": 1}], 3, True])
def test_a_parquet_column_that_is_no_object_is_left_to_the_record_check(tmp_path: Path, value: object):
    row = {"id": "1", "question": "Q", "golden_answers": ["x"], "metadata": value}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    with pytest.raises(RecordError, match=r"q\.parquet:1: field 'metadata': expected an object, found "):
        list(read_records(tmp_path / "q.parquet", Question))
    row = {"schema": "relevance/1", "id": "q", "turn": 1, "scores": value}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "r.parquet")
    with pytest.raises(RecordError, match=r"r\.parquet:1: field 'scores': expected "):
        list(read_records(tmp_path / "r.parquet", Relevance))


@pytest.mark.parametrize("value", ["high", [0.5, 1.0], 3.5, None])
def test_a_scores_column_of_another_project_is_ignored(tmp_path: Path, value: object):
    row = {"id": "1", "question": "Q", "golden_answers": ["x"], "scores": value}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "q.parquet")
    (question,) = read_records(tmp_path / "q.parquet", Question)
    assert question.golden_answers == ("x",)


def test_parquet_types_that_json_lacks_are_converted_or_refused_with_file_and_row(tmp_path: Path):
    file = tmp_path / "q.parquet"

    def read(**columns: pa.Array) -> list[Question]:
        pq.write_table(pa.table({"id": pa.array(["1"]), "question": pa.array(["Q"])} | columns), file)
        return list(read_records(file, Question))

    (question,) = read(
        id=pa.array([Decimal("12")], pa.decimal128(20, 0)),
        question=pa.array(["Où?".encode()], pa.binary()),
        golden_answers=pa.array([[b"x"]], pa.list_(pa.binary())),
        image=pa.array([b"\xff"], pa.binary()),
        metadata=pa.array([{"day": date(2020, 1, 2)}]),
    )
    assert question == Question(id="12", question="Où?", golden_answers=("x",), metadata={"day": "2020-01-02"})
    with pytest.raises(RecordError, match=r"q\.parquet:1: field 'question': expected text, found bytes"):
        read(question=pa.array([b"\xff"], pa.binary()))
    with pytest.raises(RecordError, match=r"q\.parquet:1: field 'id': expected text or a whole number, found float"):
        read(id=pa.array([Decimal("1.5")], pa.decimal128(20, 1)))
    broken = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    with pytest.raises(RecordError, match=r"q\.parquet: rows 1 to 1 hold a value that is not valid: 'utf-8' codec"):
        read(question=broken)


def test_a_folder_of_shards_is_read_whole_or_refused_by_the_file_that_is_not_read(tmp_path: Path):
    rows = [{"id": str(number), "question": "Q", "golden_answers": ["x"]} for number in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows[:1]))
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(rows[1]).encode()))
    (tmp_path / "c.jsonl").write_text(json.dumps(rows[2]) + "\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[3]).encode()))
    pq.write_table(pa.Table.from_pylist(rows[4:]), tmp_path / "e.parquet")
    for name in ("README.md", "_SUCCESS", ".a.json.crc", ".x.json", "dataset_info.json", "c.jsonl.report.json"):
        (tmp_path / name).write_text("{}")
    assert [question.id for question in read_records(tmp_path, Question)] == ["0", "1", "2", "3", "4"]
    for name in ("f.jsonl.bz2", "f.csv", "f.ndjson.xz", "f.parquet.gz"):
        (tmp_path / name).touch()
        for path in (tmp_path, tmp_path / name):
            with pytest.raises(RecordError, match=f"{name}: expected .jsonl, .*; convert this file"):
                list(read_records(path, Question))
        (tmp_path / name).unlink()


def test_a_correctness_out_of_range_is_refused():
    good = Correctness(id="q", turn=1, passage_id="p", em=1, answer=None, searches=0)
    for change in ({"em": 7}, {"em": -1}, {"turn": 0}, {"searches": -1}):
        with pytest.raises(RecordError, match="expected em 0 or 1, turn from 1, searches from 0; found"):
            replace(good, **change)


def test_a_file_without_records_is_read_as_such_in_every_format(tmp_path: Path):
    for name in ("e.jsonl", "e.jsonl.gz", "e.parquet"):
        assert write_records(tmp_path / name, []) == 0
        assert list(read_records(tmp_path / name, Question)) == []


def test_empty_lines_are_skipped_and_line_numbers_stay_right(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"id": "a"}\n\n{"id": "b"}\n', encoding="utf-8")
    assert [number for number, _ in read_lines(path)] == [2, 4]


def test_a_packed_file_without_its_suffix_is_recognised(tmp_path: Path):
    (tmp_path / "q.jsonl").write_bytes(gzip.compress(b'{"id": "a", "question": "Q"}\n'))
    with pytest.raises(RecordError, match=r"q\.jsonl:1: .*packed with gzip; give it a name that ends in \.gz"):
        list(read_records(tmp_path / "q.jsonl", Question))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b", "question": ', "expected one JSON object per line"),
        (b'{"id": "b", "question": "\xff"}', "iconv -f cp1252"),
        (b"[1]", "expected a JSON object, found list"),
        (b'{"question": "Q", "golden_answers": ["x"]}', "missing field 'id'"),
        (b'{"id": "b", "question": "Q", "gold_answers": ["x"]}', "unknown field 'gold_answers' and no 'golden_"),
        (b'{"id": 7.5, "question": "Q", "golden_answers": ["x"]}', "field 'id': expected text or a whole number"),
        (b"[" * 100_000, "expected one JSON object per line"),
        (b'{"id": "b", "question": "Q", "golden_answers": ["caf\\ud83d"]}', "half a surrogate pair"),
        (b'{"id": "b", "question": "Q", "golden_answers": ["caf\xed\xa0\xbd"]}', "expected UTF-8"),
    ],
)
def test_a_broken_line_is_an_error_that_names_file_and_line(tmp_path: Path, line: bytes, message: str):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(b'{"id": "a", "question": "Q", "golden_answers": ["x"]}\n' + line + b"\n")
    with pytest.raises(RecordError) as caught:
        list(read_records(path, Question))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert caught.value.line == 2


def test_a_record_of_another_schema_is_refused(tmp_path: Path):
    write_records(tmp_path / "r.jsonl", [GROUP])
    with pytest.raises(RecordError, match=r"'relevance/1' \(a file of agentic-r relevance\), found 'group/1'"):
        list(read_records(tmp_path / "r.jsonl", Relevance))


def test_a_cut_gzip_file_is_an_error_not_a_shorter_file(tmp_path: Path):
    path = tmp_path / "q.jsonl.gz"
    write_records(path, [replace(QUESTION, id=str(number)) for number in range(2000)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordError, match="not a whole gzip file"):
        list(read_records(path, Question))


def test_a_cut_parquet_file_is_an_error(tmp_path: Path):
    path = tmp_path / "q.parquet"
    write_records(path, [QUESTION])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RecordError, match="not a whole Parquet file"):
        list(read_records(path, Question))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path):
    for read in (lambda path: list(read_lines(path)), read_json, file_fingerprint):
        with pytest.raises(RecordError, match=r"nowhere\.jsonl: no such file"):
            read(tmp_path / "nowhere.jsonl")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "q.jsonl"
    write_records(path, [QUESTION])

    def failing():
        yield QUESTION
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(path, failing())
    assert [item.name for item in tmp_path.iterdir()] == ["q.jsonl"]
    assert list(read_records(path, Question)) == [QUESTION]


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path):
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_jsonl_is_utf8_with_the_schema_tag_first(tmp_path: Path):
    write_records(tmp_path / "r.jsonl", [SubAnswer(id="ü", turn=1, query="q", sub_answer=None)])
    text = (tmp_path / "r.jsonl").read_text(encoding="utf-8")
    assert text == '{"schema": "sub_answer/1", "id": "ü", "turn": 1, "query": "q", "sub_answer": null}\n'


def test_gzipped_and_plain_files_hold_the_same_lines(tmp_path: Path):
    write_records(tmp_path / "a.jsonl", RECORDS[:1])
    write_records(tmp_path / "a.jsonl.gz", RECORDS[:1])
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()) == (tmp_path / "a.jsonl").read_bytes()


def test_a_character_that_is_written_as_a_surrogate_pair_is_read(tmp_path: Path):
    (tmp_path / "q.jsonl").write_bytes(b'{"id": "a", "question": "\\ud83d\\ude00", "golden_answers": ["x"]}\n')
    (question,) = read_records(tmp_path / "q.jsonl", Question)
    assert question.question == "\U0001f600"


def test_the_same_records_make_the_same_gzipped_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, now in (("a", 1.0), ("b", 2e9)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        write_records(tmp_path / f"{name}.jsonl.gz", RECORDS[:1])
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_json_documents_come_back_and_broken_ones_are_errors(tmp_path: Path):
    write_json(tmp_path / "m.json", {"ü": [1, None]})
    assert read_json(tmp_path / "m.json") == {"ü": [1, None]}
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8")) == {"ü": [1, None]}
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(RecordError, match="expected JSON"):
        read_json(tmp_path / "m.json")


def test_a_fingerprint_follows_the_bytes(tmp_path: Path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"1")
    assert file_fingerprint(first) == file_fingerprint(second)
    second.write_bytes(b"2")
    assert file_fingerprint(first) != file_fingerprint(second)


@pytest.mark.parametrize(
    ("before", "after"),
    [(b'{"a": 1}\n{"b"', b'{"a": 1}\n'), (b'{"a": 1}\n', b'{"a": 1}\n'), (b'{"a"', b""), (b"", b"")],
)
def test_a_torn_end_is_cut_off_and_whole_lines_stay(tmp_path: Path, before: bytes, after: bytes):
    file = tmp_path / "log.jsonl"
    drop_torn_end(file)
    file.write_bytes(before)
    drop_torn_end(file)
    assert file.read_bytes() == after


ITEMS = [{"a": 'x, ]"\\', "b": [1, {"c": None}]}, 17, "Ås \u2028\U0001f600", [], 3.5e-3, {"long": "z" * 300}, True]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("packed", [False, True])
def test_a_json_list_is_read_block_by_block(tmp_path: Path, monkeypatch, block: int, packed: bool):
    monkeypatch.setattr("agentic_r_plugin.storage.json_text._LIST_BLOCK", block)
    for indent, begin in ((None, ""), (1, "\ufeff \r\n")):
        path = tmp_path / ("a.json.gz" if packed else "a.json")
        text = begin + json.dumps(ITEMS, ensure_ascii=False, indent=indent) + "\n "
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        found = list(read_lines(path))
        assert [item for _, item in found] == ITEMS
        lines = text.split("\n")
        assert all(number == 1 if indent is None else lines[number - 1].startswith(" " + json.dumps(item)[0])
                   for number, item in found)  # fmt: skip


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("[1\n 2]", 2, "expected a comma between two items"),
        ('[1,\n{"a": 2', 2, "Expecting ',' delimiter"),
        ("[1,\n2,\n]", 3, "Expecting value"),
        ("[1,\n2", 2, "expected a comma between two items"),
        ("[1]\n[2]", 1, "something follows the list"),
        ('[1,\n"\\ud83d"]', 2, "half a surrogate pair"),
        ("[", 1, "Expecting value"),
    ],
)
def test_a_broken_json_list_is_an_error_with_the_line_of_its_item(tmp_path, monkeypatch, text, line, message, block):
    monkeypatch.setattr("agentic_r_plugin.storage.json_text._LIST_BLOCK", block)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecordError, match=message) as caught:
        list(read_lines(tmp_path / "a.json"))
    assert caught.value.line == line


def test_a_json_list_that_is_no_text_is_an_error(tmp_path: Path):
    for data in (b'["a", "\xff"]', b'["a", "\xc3'):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(RecordError, match="expected UTF-8"):
            list(read_lines(tmp_path / "a.json"))
