"""Fixtures of the retrieval tests: one tiny model, corpus and index for the whole session."""

from __future__ import annotations

import pytest

from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.indexing.index import run as build_index
from tests.search.tiny_retriever import make_model, write_corpus


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def index_folder(tmp_path_factory, model_folder, corpus_file):
    out = tmp_path_factory.mktemp("index") / "index"
    build_index(
        IndexConfig(corpus=str(corpus_file), retriever=model_folder, out=str(out), precision="float32", shard_size=16)
    )
    return out
