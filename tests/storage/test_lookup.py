"""Records by key from disk: any order, any size, shards and packed files, little memory."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.records import Correctness, SubAnswer
from agentic_r_plugin.storage.lookup import HashIndex, HashSet, KeyedRecords, key_hash
from agentic_r_plugin.store import write_records


def answers(count: int) -> list[SubAnswer]:
    return [SubAnswer(id=f"ü{number}", turn=1, query="q", sub_answer=f"a{number}") for number in range(count)]


def by_id(path: Path, **options) -> KeyedRecords[SubAnswer]:
    return KeyedRecords(path, SubAnswer, lambda record: record.id, **options)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=300), st.integers(0, 3))
def test_an_index_holds_every_value_of_every_hash_in_order(tmp_path_factory, hashes: list[int], repeats: int):
    hashes = hashes + hashes[:5] * repeats
    index = HashIndex(tmp_path_factory.getbasetemp())
    expected: dict[int, list[int]] = {}
    for value, hashed in enumerate(hashes):
        index.add(hashed, value)
        expected.setdefault(hashed, []).append(value)
    assert sorted(index.finish()) == sorted(hashed for hashed, values in expected.items() if len(values) > 1)
    assert {hashed: index.find(hashed) for hashed in expected} == expected
    assert index.find(key_hash("not there")) == expected.get(key_hash("not there"), [])
    index.close()


def test_more_entries_than_are_added_at_once_are_found_too(tmp_path: Path):
    index = HashIndex(tmp_path)
    keys = [f"key {number}" for number in range(12_345)]
    for value, key in enumerate(keys):
        index.add(key_hash(key), value)
    assert index.finish() == []
    assert all(index.find(key_hash(key)) == [value] for value, key in enumerate(keys))
    assert index.find(key_hash("key 12345")) == []
    assert list(tmp_path.iterdir()) == [], "the file has no name"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_records_are_found_in_any_order_and_format(tmp_path: Path, name: str):
    write_records(tmp_path / name, answers(50))
    found = by_id(tmp_path / name)
    wanted = answers(50)
    random.Random(0).shuffle(wanted)
    assert [found.find(record.id) for record in wanted] == [[record] for record in wanted]
    assert found.find("ü50") == []
    found.close()
    found.close()


def test_a_folder_of_shards_is_one_file(tmp_path: Path):
    for number, part in enumerate((answers(60)[:20], answers(60)[20:])):
        write_records(tmp_path / "out" / f"0000{number}.jsonl", part)
    found = by_id(tmp_path / "out", folder=tmp_path)
    assert [found.find(record.id) for record in answers(60)] == [[record] for record in answers(60)]


def test_a_key_may_have_several_records_where_that_is_said(tmp_path: Path):
    records = [
        Correctness(id="q", turn=turn, passage_id=passage, em=0, answer=None, searches=0)
        for passage in "ab"
        for turn in (1, 2)
    ]
    write_records(tmp_path / "c.jsonl", records)
    found = KeyedRecords(tmp_path / "c.jsonl", Correctness, lambda record: f"{record.id}/{record.turn}", many=True)
    assert [record.passage_id for record in found.find("q/2")] == ["a", "b"]


def test_a_key_that_occurs_twice_and_a_broken_line_are_errors_that_say_where(tmp_path: Path):
    write_records(tmp_path / "a.jsonl", answers(3) + answers(1))
    twice = r"a\.jsonl:4: 'ü0' occurs twice; expected one SubAnswer for each, the first is at .*a\.jsonl:1$"
    with pytest.raises(RecordError, match=twice):
        by_id(tmp_path / "a.jsonl").open()
    blank = (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(blank))
    with pytest.raises(RecordError, match=r"a\.jsonl\.gz:7: 'ü0' occurs twice; .* the first is at .*a\.jsonl\.gz:1$"):
        by_id(tmp_path / "a.jsonl.gz").open()
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([lines[0], json.dumps({"schema": "sub_answer/1"})]))
    with pytest.raises(RecordError, match=r"b\.jsonl:2: missing field 'id'"):
        by_id(tmp_path / "b.jsonl").open()
    with pytest.raises(RecordError, match="no such file"):
        by_id(tmp_path / "none.jsonl").open()


def test_a_set_of_hashes_is_a_set():
    draw, known, hashes = random.Random(0), set(), HashSet()
    for _ in range(20_000):
        hashed = draw.choice([0, draw.randrange(-(2**63), 2**63), draw.randrange(-5000, 5000) << 20])
        assert (hashed in hashes) == (hashed in known)
        assert hashes.add(hashed) == (hashed not in known)
        known.add(hashed)
