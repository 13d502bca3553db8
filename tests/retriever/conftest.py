"""Fixtures of the trainer tests; what they are made of is in `tests/search/tiny_retriever.py`."""

from __future__ import annotations

import json
import random

import pytest

from tests.search.tiny_retriever import make_model, passage_numbers, query, write_corpus

NUM_PASSAGES, NUM_TRAIN = 200, 150


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """An untrained model."""
    return make_model(tmp_path_factory.mktemp("base"), dim=64)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", NUM_PASSAGES)


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """Groups of passages 0 to 149, and, held out, of the other 50."""
    folder, generator = tmp_path_factory.mktemp("groups"), random.Random(0)
    numbers = passage_numbers(NUM_PASSAGES)
    files = {"train": range(NUM_TRAIN), "dev": range(NUM_TRAIN, NUM_PASSAGES)}
    for name, chosen in files.items():
        lines = []
        for i in chosen:
            negatives = generator.sample([j for j in chosen if j != i], 7)
            lines.append(
                {
                    "schema": "group/1",
                    "id": f"question{i}",
                    "turn": 1,
                    "question": query(numbers[i][:1]),
                    "query": query(numbers[i][1:]),
                    "history": [],
                    "positive": f"d{i}",
                    "negatives": [f"d{j}" for j in negatives],
                }
            )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
