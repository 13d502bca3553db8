"""What a model, a retriever or the limits refuse is one unit's fault in every stage: counted, kept apart, gone past."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agentic_r_plugin.cli import main
from agentic_r_plugin.data.candidates import find_candidates
from agentic_r_plugin.data.trajectories import answer_questions
from agentic_r_plugin.errors import RequestRefusedError, SearchRefusedError
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import (
    Candidates,
    Correctness,
    Question,
    Relevance,
    ScoredPassage,
    StopReason,
    SubAnswer,
    Trajectory,
    Turn,
)
from agentic_r_plugin.rollout import run_sessions
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.session import Session
from agentic_r_plugin.store import read_json, read_records, write_records
from agentic_r_plugin.tags import compact
from tests.data.scripted import ListedSearch, ScriptedAgent, passage
from tests.llm.loopback import Answer, chat, serve

TOKENIZER = "recipes/quickstart/agent"
LONG = "a very long question " * 150
QUESTIONS = [
    Question(id=name, question=text, golden_answers=("Lindholm",))
    for name, text in (("q0", "Where was Vela born?"), ("q1", LONG), ("q2", "Where did Tarn live?"))
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    corpus = [{"id": str(number), "contents": f'"T"\nVela text of {number}'} for number in range(4)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    write_records(tmp_path / "questions.jsonl", QUESTIONS)
    passages = tuple(ScoredPassage(id=str(number), score=1.0) for number in range(4))
    write_records(
        tmp_path / "candidates.jsonl",
        [
            Candidates(
                id=one.id, turn=1, question=one.question, golden_answers=one.golden_answers, query=f"about {one.id}",
                history=(), prefix=f"<search> about {one.id} </search>", passages=passages,
            )
            for one in QUESTIONS
        ],
    )  # fmt: skip
    write_records(tmp_path / "trajectories.jsonl", [trajectory(one.id, f"about {one.id}") for one in QUESTIONS])
    return tmp_path


def trajectory(identifier: str, query: str) -> Trajectory:
    turn = Turn(turn=1, reasoning="", query=query, passages=(ScoredPassage(id="0", score=1.0),))
    return Trajectory(
        id=identifier, question="Q", golden_answers=("x",), turns=(turn,), answer=None, em=0, f1=0.0,
        stop_reason=StopReason.MAX_TURNS, text=f"<search> {query} </search>", malformed_turns=0, prompt_tokens=1,
        generated_tokens=1,
    )  # fmt: skip


TOO_LONG: Answer = (400, {"object": "error", "message": "the maximum context length is 60 tokens", "code": 400})


def agent(path: str, body: dict) -> Answer:
    """Answers at once; refuses prompts of more than 300 tokens."""
    if len(body["prompt"]) > 300:
        return TOO_LONG
    text = {"text": "<answer> Lindholm </answer>", "finish_reason": "stop", "stop_reason": "</answer>"}
    return 200, {"choices": [text]}


def judge(path: str, body: dict) -> Answer:
    """Refuses what is about q1."""
    prompt = body["messages"][0]["content"]
    count = int(re.search(r"exactly (\d+)", prompt).group(1))
    if "about q1" in prompt:
        return TOO_LONG
    return chat(json.dumps([90] * count if "whole number" in prompt else ["x"] * count))


def backends(folder: Path, url: str) -> list[str]:
    return [
        "--protocol", "compact", "llm.backend=openai", f"llm.url={url}", "llm.model=m", f"llm.tokenizer={TOKENIZER}",
        "search.backend=bm25", f"search.corpus={folder / 'corpus.jsonl'}",
    ]  # fmt: skip


def errors(out: Path) -> list[tuple[str, str]]:
    lines = out.with_name(out.name + ".errors.jsonl").read_text().splitlines()
    return [(line["unit"], line["error"]) for line in map(json.loads, lines)]


@pytest.mark.parametrize("batch_size", [1, 64])
def test_trajectories_go_past_a_question_that_the_server_refuses_and_a_resume_does_too(
    folder: Path, batch_size: int, capsys: pytest.CaptureFixture
):
    out = folder / "t.jsonl"
    arguments = ["trajectories", "--in", str(folder / "questions.jsonl"), "--out", str(out), f"batch_size={batch_size}"]
    with serve(agent) as server:
        command = [*arguments, *backends(folder, server.url)]
        assert main(command) == 0
        said = capsys.readouterr().err
        assert main([*command, "--resume"]) == 0
        assert len(server.requests) == 3, "nothing is asked twice"
    assert [(one.id, one.em) for one in read_records(out, Trajectory)] == [("q0", 1), ("q2", 1)]
    report = read_json(folder / "t.jsonl.report.json")
    assert (report["read"], report["kept"], report["dropped"], report["errors"]) == (3, 2, {"refused": 1}, 0)
    ((unit, error),) = errors(out)
    assert unit == "q1" and "HTTP 400" in error and "maximum context length is 60 tokens" in error
    assert "trajectories: of 3 units 1 refused" in said and "t.jsonl.errors.jsonl; first, q1: " in said


def test_trajectories_go_past_a_question_that_the_limits_do_not_hold(folder: Path):
    out = folder / "t.jsonl"
    with serve(agent) as server:
        arguments = ["trajectories", "--in", str(folder / "questions.jsonl"), "--out", str(out)]
        assert main([*arguments, *backends(folder, server.url), "limits.max_tokens=150"]) == 0
    assert [one.id for one in read_records(out, Trajectory)] == ["q0", "q2"]
    ((unit, error),) = errors(out)
    assert unit == "q1" and re.match(r"limits\.max_tokens=150: the \d+ prompt tokens .* leave none", error)


def test_a_stage_all_of_whose_units_are_refused_is_an_error_and_a_resume_asks_them_again(
    folder: Path, capsys: pytest.CaptureFixture
):
    out, healthy = folder / "t.jsonl", False
    with serve(lambda path, body: agent(path, body) if healthy else TOO_LONG) as server:
        arguments = ["trajectories", "--in", str(folder / "questions.jsonl"), "--out", str(out)]
        command = [*arguments, *backends(folder, server.url)]
        assert main([*command, "runner.part_size=2"]) == 1
        error = capsys.readouterr().err
        assert "trajectories: all of the 3 units were refused" in error and "first, q0: " in error
        assert not out.exists()
        healthy = True
        assert main([*command, "--resume"]) == 0
    assert [one.id for one in read_records(out, Trajectory)] == ["q0", "q2"]


@pytest.mark.parametrize(
    ("stage", "record"), [("relevance", Relevance), ("sub-answers", SubAnswer)], ids=["relevance", "sub-answers"]
)
def test_a_prompt_that_the_judge_refuses_is_no_error_of_the_judge(folder: Path, stage: str, record: type):
    out = folder / "out.jsonl"
    files = {
        "relevance": [
            "--candidates", str(folder / "candidates.jsonl"), "--corpus", str(folder / "corpus.jsonl"),
            "--scorer", "listwise_judge",
        ],
        "sub-answers": ["--in", str(folder / "trajectories.jsonl")],
    }[stage]  # fmt: skip
    with serve(judge) as server:
        llm = ["llm.backend=openai", f"llm.url={server.url}", "llm.model=m"]
        assert main([stage, *files, "--out", str(out), *llm, "max_error_share=0"]) == 0
    assert [one.id for one in read_records(out, record)] == ["q0", "q2"]
    report = read_json(folder / "out.jsonl.report.json")
    assert (report["dropped"], report["errors"]) == ({"refused": 1}, 0)
    assert "maximum context length" in dict(errors(out))["q1" if stage == "sub-answers" else "q1/1"]


def test_correctness_leaves_out_a_query_whose_continuation_is_refused_and_groups_go_on(folder: Path):
    with serve(agent) as server:
        arguments = ["correctness", "--candidates", str(folder / "candidates.jsonl"), "--exhaustive"]
        arguments += ["--corpus", str(folder / "corpus.jsonl"), "--out", str(folder / "c.jsonl")]
        assert main([*arguments, *backends(folder, server.url)]) == 0
    found = list(read_records(folder / "c.jsonl", Correctness))
    assert [(one.id, one.passage_id, one.em) for one in found] == [
        (q, str(p), 1) for q in ("q0", "q2") for p in range(4)
    ]
    assert dict(errors(folder / "c.jsonl")).keys() == {"q1/1"}
    relevance = [Relevance(id=f"q{n}", turn=1, scores={str(p): 90 for p in range(4)}) for n in range(3)]
    write_records(folder / "r.jsonl", relevance)
    files = [
        f"--{name}={folder / file}" for name, file in (("candidates", "candidates.jsonl"), ("relevance", "r.jsonl"))
    ]
    files += [f"--correctness={folder / 'c.jsonl'}", f"--out={folder / 'g.jsonl'}", "num_negatives=3"]
    assert main(["groups", *files]) == 0
    assert read_json(folder / "g.jsonl.report.json")["dropped"] == {"not_rolled_out": 1}


class _Refusing(ListedSearch):
    """A service that takes no query with `long` in it; in a batch it refuses them all."""

    status = 413

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        if any("long" in request.query for request in requests):
            raise SearchRefusedError("the query is too long", status=self.status)
        return super().search(requests, topk)


def test_a_query_that_the_service_refuses_is_so_alone_and_a_refused_caller_is_an_error():
    search = _Refusing({"fine": [passage("a")]})
    found = list(find_candidates([trajectory(q, q) for q in ("fine", "long", "fine")], search, protocol=compact))
    assert [one if isinstance(one, SearchRefusedError) else one[0].passages[0].id for one in found] == [
        "a", found[1], "a"
    ]  # fmt: skip
    assert isinstance(found[1], SearchRefusedError)
    search.status = 401
    with pytest.raises(SearchRefusedError):
        list(find_candidates([trajectory("t", "long")], search, protocol=compact))


def test_an_agent_whose_query_is_refused_ends_alone_as_a_failed_search():
    agent = ScriptedAgent(
        lambda text: (
            "<answer> x </answer>"
            if "<information>" in text
            else f"<search> {'long' if 'q1' in text else 'fine'} </search>"
        )
    )
    questions = [Question(id=name, question=name, golden_answers=("x",)) for name in ("q0", "q1", "q2")]
    search = _Refusing({"fine": [passage("a")]})
    first, second, third = answer_questions(questions, agent, search, protocol=compact, limits=Limits())
    assert isinstance(second, RequestRefusedError) and str(second) == "the query is too long"
    assert [one.em for one in (first, third)] == [1, 1]


def test_a_backend_that_refuses_a_whole_batch_is_asked_one_by_one():
    class Old(ScriptedAgent):
        def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
            if any("bad" in self.codec.decode(request.prompt_ids) for request in requests):
                raise RequestRefusedError("too long")
            return super().generate(requests, sampling)

    agent = Old(lambda text: "<answer> x </answer>")
    sessions = [Session(compact, agent.codec, Limits(), text) for text in ("one", "bad", "two")]
    run_sessions(sessions, agent, ListedSearch({}), topk=3, sampling=Sampling())
    assert [one.refusal for one in sessions] == [None, "too long", None]
    assert [one.finished.answer for one in sessions] == ["x", None, "x"]
    assert sessions[1].finished.stop_reason is StopReason.MAX_TOKENS


def lose_passages(folder: Path, lost: set[str]) -> None:
    """Replace a candidate of these queries by one that the corpus lacks."""
    queries = list(read_records(folder / "candidates.jsonl", Candidates))
    away = ScoredPassage(id="lost", score=1.0)
    queries = [replace(q, passages=(*q.passages[:3], away)) if q.id in lost else q for q in queries]
    write_records(folder / "candidates.jsonl", queries)


@pytest.mark.parametrize("stage", ["correctness", "relevance"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_candidate_that_the_corpus_lacks_refuses_its_query_and_of_all_queries_is_an_error(
    folder: Path, stage: str, batch_size: int, capsys: pytest.CaptureFixture
):
    def command(url: str, out: str) -> int:
        files = ["--candidates", str(folder / "candidates.jsonl"), "--corpus", str(folder / "corpus.jsonl")]
        own = (
            ["--exhaustive", *backends(folder, url)]
            if stage == "correctness"
            else ["--scorer", "listwise_judge", "llm.backend=openai", f"llm.url={url}", "llm.model=m"]
        )
        return main([stage, *files, *own, "--out", str(folder / out), f"batch_size={batch_size}"])

    record = Correctness if stage == "correctness" else Relevance
    accepting = agent if stage == "correctness" else judge
    lose_passages(folder, {"q0"})
    with serve(accepting) as server:
        assert command(server.url, "one.jsonl") == 0
        asked = len(server.requests)
        lose_passages(folder, {"q0", "q1", "q2"})
        capsys.readouterr()
        assert command(server.url, "all.jsonl") == 1
        assert len(server.requests) == asked, "nothing was asked"
    assert {one.id for one in read_records(folder / "one.jsonl", record)} == {"q2"}  # q1 is refused by the server
    found = dict(errors(folder / "one.jsonl"))
    assert list(found) == ["q0/1", "q1/1"] and "no passage with id 'lost' in this corpus" in found["q0/1"]
    assert read_json(folder / "one.jsonl.report.json")["dropped"] == {"refused": 2}
    assert "all of the 3 units were refused, none could be worked on; first, q0/1: " in capsys.readouterr().err


def test_a_question_that_the_file_lacks_refuses_its_queries(folder: Path):
    gold = [replace(one, metadata={"gold_doc_ids": ["0"]}) for one in QUESTIONS if one.id != "q1"]
    write_records(folder / "questions.jsonl", gold)
    files = [f"--{name}={folder / name}.jsonl" for name in ("candidates", "corpus", "questions")]
    assert main(["relevance", *files, "--out", str(folder / "r.jsonl")]) == 0
    assert [one.id for one in read_records(folder / "r.jsonl", Relevance)] == ["q0", "q2"]
    assert "question 'q1' is not in the questions file" in dict(errors(folder / "r.jsonl"))["q1/1"]
