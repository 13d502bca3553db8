"""Groups are checked against the corpus; batches are the same for the same seed and hold each passage once."""

from __future__ import annotations

import json

import pytest

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.retriever.batches import epoch_batches, num_batches, read_examples
from agentic_r_plugin.search.corpus import Corpus

GROUP = {
    "schema": "group/1",
    "id": "x",
    "turn": 1,
    "question": "q1",
    "query": "q2",
    "history": ["q3"],
    "positive": "d3",
    "negatives": ["d5", "d4"],
}


def write_groups(file, *changes):
    file.write_text("".join(json.dumps(GROUP | change) + "\n" for change in changes))
    return file


def test_passages_become_rows_and_positives_of_one_query_know_each_other(tmp_path, corpus):
    file = write_groups(tmp_path / "g.jsonl", {}, {"positive": "d9"}, {"turn": 2, "positive": "d1"})
    first, second, third = read_examples(file, Corpus(corpus))
    assert (first.positive, first.negatives) == (3, (5, 4))
    assert (first.request.question, first.request.query, first.request.history) == ("q1", "q2", ("q3",))
    assert first.known_positives == second.known_positives == {3, 9}
    assert third.known_positives == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": "gone"}, r"g\.jsonl:2: passage 'gone' is not in the corpus .*corpus\.jsonl"),
        ({"negatives": ["d4", "gone"]}, r"g\.jsonl:2: passage 'gone'"),
        ({"negatives": []}, r"g\.jsonl:2: expected negatives"),
        ({"negatives": ["d3"]}, r"g\.jsonl:2: expected negatives without the positive"),
        ({"schema": "group/0"}, r"g\.jsonl:2: expected schema 'group/1'"),
    ],
)
def test_a_wrong_group_is_refused_with_file_and_line(tmp_path, corpus, change, message):
    with pytest.raises(RecordError, match=message):
        read_examples(write_groups(tmp_path / "g.jsonl", {}, change), Corpus(corpus))


def test_a_folder_of_shards_is_read_like_one_file(tmp_path, corpus):
    (tmp_path / "shards").mkdir()
    write_groups(tmp_path / "shards" / "0.jsonl", {}, {"positive": "d9"})
    write_groups(tmp_path / "shards" / "1.jsonl", {"turn": 2, "positive": "d1"})
    whole = write_groups(tmp_path / "g.jsonl", {}, {"positive": "d9"}, {"turn": 2, "positive": "d1"})
    assert read_examples(tmp_path / "shards", Corpus(corpus)) == read_examples(whole, Corpus(corpus))
    write_groups(tmp_path / "shards" / "1.jsonl", {"positive": "gone"})
    with pytest.raises(RecordError, match=r"shards/1\.jsonl:1: passage 'gone'"):
        read_examples(tmp_path / "shards", Corpus(corpus))


def test_no_groups_is_an_error(tmp_path, corpus):
    with pytest.raises(RecordError, match="no training groups"):
        read_examples(write_groups(tmp_path / "g.jsonl"), Corpus(corpus))


def test_an_epoch_shows_every_group_once_in_another_order(groups, corpus):
    examples = read_examples(groups / "train.jsonl", Corpus(corpus))

    def epoch(number, **settings):
        return list(epoch_batches(examples, epoch=number, batch_size=16, group_size=4, **{"seed": 1} | settings))

    batches = epoch(0)
    assert len(batches) == num_batches(150, 16) == 10
    seen = [example.positive for batch in batches for example in batch.examples]
    assert sorted(seen) == list(range(150)) and seen != sorted(seen)
    assert epoch(0) == batches and epoch(1) != batches and epoch(0, seed=2) != batches
    for batch in batches:
        assert all(len(example.negatives) == 3 for example in batch.examples)
        needed = {row for example in batch.examples for row in (example.positive, *example.negatives)}
        assert len(batch.rows) == len(set(batch.rows)) and set(batch.rows) == needed


def test_processes_share_every_batch_evenly(groups, corpus):
    examples = read_examples(groups / "train.jsonl", Corpus(corpus))[:47]
    parts = [
        list(epoch_batches(examples, epoch=0, seed=0, batch_size=8, group_size=4, rank=rank, world=2))
        for rank in (0, 1)
    ]
    assert [len(part) for part in parts] == [3, 3] == [num_batches(47, 8, 2)] * 2
    sizes = [[len(batch.examples) for batch in part] for part in parts]
    assert sizes == [[8, 8, 7], [8, 8, 7]]
    seen = [example.positive for part in parts for batch in part for example in batch.examples]
    assert len(seen) == len(set(seen)) == 46
