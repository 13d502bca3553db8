"""Fixtures for agent training; what they are made of is in `tiny_world.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agentic_r_plugin.store import write_records
from tests.agent import tiny_world


@pytest.fixture(scope="session")
def service() -> Iterator[tiny_world.Service]:
    """A retrieval service."""
    with tiny_world.serving() as running:
        yield running


@pytest.fixture(scope="session")
def agent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with the tiny agent."""
    return tiny_world.write_agent(tmp_path_factory.mktemp("agent"))


@pytest.fixture(scope="session")
def question_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions in FlashRAG layout."""
    path = tmp_path_factory.mktemp("data") / "towns" / "train.jsonl"
    write_records(path, tiny_world.questions())
    return path
