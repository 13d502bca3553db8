"""A stage on a server that misbehaves: finishes when the server recovers, stops with a clear error when it does not."""

from __future__ import annotations

import json
import random
import re
import threading
from collections import Counter
from pathlib import Path

import pytest

from agentic_r_plugin.cli import main
from agentic_r_plugin.llm import openai
from agentic_r_plugin.records import Candidates, Relevance, ScoredPassage
from agentic_r_plugin.store import read_json, read_records, write_records
from tests.llm.loopback import CUT, Answer, chat, serve

FAULTS: list[Answer] = [
    (429, "slow down"), (429, "slow down", {"Retry-After": "0"}), (500, "oops"), (503, ""), CUT, (200, "<html>garbage"),
    (200, ""), (200, {"choices": []}), (200, []),
]  # fmt: skip


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "_FIRST_PAUSE_S", 0.001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corpus = [{"id": str(number), "contents": f'"T"\ntext of {number}'} for number in range(5)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    query = {"turn": 1, "question": "Q", "golden_answers": ("x",), "history": (), "prefix": ""}
    passages = tuple(ScoredPassage(id=str(number), score=1.0) for number in range(5))
    queries = [Candidates(id=f"q{n}", query=f"query {n} ", passages=passages, **query) for n in range(40)]
    write_records(tmp_path / "candidates.jsonl", queries)
    return tmp_path


def arguments(folder: Path, url: str, name: str, *more: str) -> list[str]:
    files = ["--candidates", str(folder / "candidates.jsonl"), "--corpus", str(folder / "corpus.jsonl")]
    llm = ["llm.backend=openai", f"llm.url={url}", "llm.model=judge", "llm.concurrency=4", "llm.timeout_s=5"]
    return [
        "relevance", *files, "--out", str(folder / name), "--scorer", "listwise_judge", *llm, "batch_size=8", *more
    ]  # fmt: skip


def scores(body: dict) -> Answer:
    number = int(re.search(r"query (\d+) ", body["messages"][0]["content"]).group(1))
    return chat(json.dumps([(number * place) % 101 for place in range(5)]))


def test_a_job_on_a_server_that_misbehaves_and_recovers_is_that_of_a_healthy_one(folder: Path):
    chance, lock, tries = random.Random(5), threading.Lock(), Counter[str]()

    def unsteady(path: str, body: dict) -> Answer:
        with lock:
            prompt = body["messages"][0]["content"]
            tries[prompt] += 1
            return chance.choice(FAULTS) if tries[prompt] <= chance.randint(0, 4) else scores(body)

    with serve(lambda path, body: scores(body)) as server:
        assert main(arguments(folder, server.url, "healthy.jsonl")) == 0
    with serve(unsteady) as server:
        assert main(arguments(folder, server.url, "unsteady.jsonl", "llm.max_retries=8", "runner.workers=2")) == 0
    assert (folder / "unsteady.jsonl").read_bytes() == (folder / "healthy.jsonl").read_bytes()
    report = read_json(folder / "unsteady.jsonl.report.json")
    assert report["retried_requests"] == len(server.requests) - 40 > 20
    assert report["judge_requests"] == 40 and report["errors"] == 0


def test_a_query_that_the_server_refuses_is_a_judge_error_of_that_query(folder: Path):
    def refusing(path: str, body: dict) -> Answer:
        too_long = "query 7 " in body["messages"][0]["content"]
        return (400, "maximum context length is 8 tokens") if too_long else scores(body)

    with serve(refusing) as server:
        assert main(arguments(folder, server.url, "out.jsonl")) == 0
    assert len(server.requests) == 40, "what is refused is not asked again"
    (error,) = (json.loads(line) for line in (folder / "out.jsonl.errors.jsonl").read_text().splitlines())
    assert error["unit"] == "q7/1" and "HTTP 400: maximum context length" in error["error"]
    assert len(list(read_records(folder / "out.jsonl", Relevance))) == 39


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_server_that_does_not_recover_ends_the_job_and_what_was_finished_is_not_asked_again(
    folder: Path, fault: Answer, capsys: pytest.CaptureFixture
):
    answered: list[str] = []

    def failing(path: str, body: dict) -> Answer:
        if len(answered) >= 20:
            return fault
        answered.append(body["messages"][0]["content"])
        return scores(body)

    with serve(failing) as server:
        assert main(arguments(folder, server.url, "o.jsonl", "llm.max_retries=1")) == 1
    error = capsys.readouterr().err
    assert "/v1/chat/completions: " in error and "(tried 2 times)" in error and "Traceback" not in error
    with serve(lambda path, body: scores(body)) as server:
        assert main([*arguments(folder, server.url, "o.jsonl"), "--resume"]) == 0
    again = {body["messages"][0]["content"] for _, body, _ in server.requests} & set(answered[:16])
    assert not again, "two batches of eight were finished"
    assert len(list(read_records(folder / "o.jsonl", Relevance))) == 40
