"""Passages of other agents are found in the corpus: an id is trusted as far as what was shown with it agrees."""

from __future__ import annotations

import json

import pytest

from agentic_r_plugin.convert.passages import PassageFinder
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.corpus import Corpus

ROWS = [
    {"id": "0", "title": "Emma", "text": "Emma is a novel."},
    {"id": "1", "title": "Emma Watson", "text": "An actress."},
    {"id": "2", "title": "", "text": "No title."},
]


@pytest.mark.parametrize(
    ("identifier", "title", "text", "found", "how"),
    [
        ("0", "", "", "0", "by_id"),
        ("0", " Emma ", "", "0", "by_id"),
        ("1", "Emma", "", None, "not_found"),
        ("2", "Emma", "", None, "not_found"),
        ("0", "Persuasion", "", None, "not_found"),
        ("9", "Emma", "", None, "not_found"),
        ("0", "Emma", "Emma is", "0", "by_id"),
        ("1", "Emma", "Emma is a novel.", "0", "by_text"),
        ("", "", "An  actress.", "1", "by_text"),
    ],
)
def test_what_is_shown_must_agree_with_the_id(tmp_path, identifier, title, text, found, how):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with Corpus(file) as corpus:
        finder = PassageFinder(corpus, tmp_path)
        passage = finder.find(Passage(id=identifier, title=title, text=text))
        finder.close()
    assert (passage and passage.id) == found and finder.counts[how] == 1
