"""FlashRAG's retrieval cache under the agent: the same results with fewer searches, and never another retriever's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, RecordError
from agentic_r_plugin.evaluation.cache import CachedSearch
from agentic_r_plugin.evaluation.generator import AgenticGenerator
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline, load_split
from agentic_r_plugin.evaluation.retriever import AgenticRetriever, FlashRAGBackend
from agentic_r_plugin.search.base import SearchRequest
from tests.evaluation.evaluation_toy import OverlapSearch, RuleAgent, flashrag_config, write_benchmark


def answered(folder: Path, **extra: Any) -> tuple[list[dict[str, Any]], OverlapSearch]:
    """Trajectories of the toy benchmark, and the retriever that was asked."""
    config = flashrag_config(folder, retrieval_cache_path=str(folder / "cache" / "c.jsonl"), **extra)
    search = OverlapSearch(folder / "toy" / "corpus.jsonl")
    pipeline = AgenticSearchPipeline(
        config, retriever=AgenticRetriever(search), generator=AgenticGenerator(RuleAgent())
    )
    return [item.output for item in pipeline.run(load_split(config, "test"))], search


def test_a_second_run_searches_nothing_and_finds_the_same(tmp_path: Path) -> None:
    write_benchmark(tmp_path)
    plain, _ = answered(tmp_path)
    first, asked = answered(tmp_path, save_retrieval_cache=True)
    second, asked_again = answered(tmp_path, use_retrieval_cache=True)
    assert first == second == plain
    assert len(asked.requests) == 12 and asked_again.requests == []
    with pytest.raises(ConfigError, match="is there already; set use_retrieval_cache"):
        answered(tmp_path, save_retrieval_cache=True)


def test_a_search_is_known_by_question_history_and_depth_too(tmp_path: Path) -> None:
    search = OverlapSearch(write_benchmark(tmp_path) / "corpus.jsonl")
    cache = CachedSearch(search, tmp_path / "c.jsonl")
    requests = [
        SearchRequest(query="Ada", question="Q"),
        SearchRequest(query="Ada", question="other"),
        SearchRequest(query="Ada", question="Q", history=("before",)),
        SearchRequest(query="Ada", question="Q"),
    ]
    found = cache.search(requests, 3)
    assert len(search.requests) == 3 and cache.looked_up == 1
    assert cache.search(requests, 2) == [row[:2] for row in found] and len(search.requests) == 3
    assert cache.search(requests[:1], 5)[0][:3] == found[0] and len(search.requests) == 4
    again = CachedSearch(search, tmp_path / "c.jsonl", save=False)
    assert again.search(requests, 3) == found and len(search.requests) == 4


def test_searches_that_differ_in_their_reasoning_are_one_where_it_is_not_read(tmp_path: Path) -> None:
    search = OverlapSearch(write_benchmark(tmp_path) / "corpus.jsonl")
    requests = [SearchRequest(query="Ada", reasoning=reasoning) for reasoning in ("a", "b", "a")]
    CachedSearch(search, tmp_path / "read.jsonl").search(requests, 3)
    assert len(search.requests) == 2
    again = CachedSearch(search, tmp_path / "read.jsonl", save=False)
    again.search(requests, 3)
    assert len(search.requests) == 2 and again.looked_up == 3
    search.reads_reasoning = False  # type: ignore[attr-defined]
    CachedSearch(search, tmp_path / "unread.jsonl").search(requests, 3)
    assert len(search.requests) == 3


def test_of_a_reranking_retriever_each_depth_is_kept_apart(tmp_path: Path) -> None:
    search = OverlapSearch(write_benchmark(tmp_path) / "corpus.jsonl")
    search.depth_changes_order = True  # type: ignore[attr-defined]
    cache = CachedSearch(search, tmp_path / "c.jsonl")
    for topk in (20, 3, 20):
        cache.search([SearchRequest(query="Ada")], topk)
    assert len(search.requests) == 2
    again = CachedSearch(search, tmp_path / "c.jsonl", save=False)
    assert [len(again.search([SearchRequest(query="Ada")], topk)[0]) for topk in (3, 20)] == [3, 12]
    assert len(search.requests) == 2


def test_a_line_that_was_cut_off_is_searched_again_and_the_file_is_whole(tmp_path: Path) -> None:
    search = OverlapSearch(write_benchmark(tmp_path) / "corpus.jsonl")
    requests = [SearchRequest(query="Ada"), SearchRequest(query="Bo")]
    found = CachedSearch(search, tmp_path / "c.jsonl").search(requests, 2)
    content = (tmp_path / "c.jsonl").read_bytes()
    (tmp_path / "c.jsonl").write_bytes(content[:-20])
    cache = CachedSearch(search, tmp_path / "c.jsonl")
    assert cache.search(requests, 2) == found and cache.looked_up == 1
    assert (tmp_path / "c.jsonl").read_bytes() == content


def test_a_cache_of_another_retriever_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    search, path = OverlapSearch(write_benchmark(tmp_path) / "corpus.jsonl"), tmp_path / "c.jsonl"
    CachedSearch(search, path)
    with pytest.raises(ManifestMismatchError, match="another index or retriever"):
        CachedSearch(_OtherSearch(tmp_path / "toy" / "corpus.jsonl"), path)
    path.write_bytes(path.read_bytes() + b'{"query": "Ada"}\n')
    with pytest.raises(RecordError, match=r"c\.jsonl:2: expected a cached search"):
        CachedSearch(search, path)


def test_flashrags_retrievers_are_distinguished_by_what_their_configuration_names(tmp_path: Path) -> None:
    def named(**settings: Any) -> str:
        retriever = type("DenseRetriever", (), {"config": {"retrieval_method": "e5", **settings}})()
        return FlashRAGBackend(retriever).fingerprint()

    index = tmp_path / "e5_Flat.index"
    index.write_bytes(b"one")
    first = named(index_path=str(index))
    assert first == named(index_path=str(index), retrieval_topk=7)
    assert named(index_path=str(index), retrieval_model_path="bge") != first
    index.write_bytes(b"two")
    assert named(index_path=str(index)) != first


class _OtherSearch(OverlapSearch):
    def fingerprint(self) -> str:
        return "other"
