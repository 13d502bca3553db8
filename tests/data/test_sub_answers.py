"""Sub-answers: the judge is shown the trajectory and must name exactly one sub-answer a query."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from agentic_r_plugin.backends import LLMSpec
from agentic_r_plugin.data.sub_answers import SubAnswersConfig, SubAnswersWorker, parse_sub_answers
from agentic_r_plugin.errors import JudgeError
from agentic_r_plugin.records import StopReason, Trajectory, Turn
from tests.llm.loopback import chat, serve

TRAJECTORY = Trajectory(
    id="q",
    question="Where was the author of Tides born?",
    golden_answers=("Oslo", "Kristiania"),
    turns=tuple(
        Turn(turn=turn, reasoning="", query=query, passages=()) for turn, query in ((1, "Tides author"), (3, "Velin"))
    ),
    answer="Oslo",
    stop_reason=StopReason.ANSWERED,
    em=1,
    f1=1.0,
    text="<search> Tides author </search> {num_queries} ...",
)


def ask(reply, *trajectories: Trajectory, **options):
    with serve(lambda path, body: chat(reply(body))) as server:
        llm = LLMSpec(backend="openai", url=server.url, model="judge")
        worker = SubAnswersWorker(SubAnswersConfig(in_="", out="", llm=llm, **options))
        named = worker.work(trajectories)
        worker.close()
    return named, [body["messages"][0]["content"] for _, body, _ in server.requests], worker.cost


def test_every_query_gets_its_sub_answer_and_not_sure_is_none():
    silent = replace(TRAJECTORY, id="silent", turns=())
    named, prompts, cost = ask(lambda body: '["Mara Velin", "not sure."]', TRAJECTORY, silent)
    assert [(item.turn, item.query, item.sub_answer) for item in named[0].records] == [
        (1, "Tides author", "Mara Velin"),
        (3, "Velin", None),
    ]
    assert (named[1].records, named[1].dropped, cost.judge_requests) == ((), "no_search", 1)
    (prompt,) = prompts
    assert "Correct answers: Oslo; Kristiania\n" in prompt
    assert "1. Tides author\n2. Velin\n" in prompt
    assert "exactly 2 strings" in prompt
    assert "<search> Tides author </search> {num_queries} ..." in prompt, "what the agent wrote stays as it is"


def test_another_number_of_sub_answers_is_asked_for_again_then_kept_apart():
    named, prompts, cost = ask(lambda body: '["Mara Velin"]', TRAJECTORY, max_retries=2)
    assert "expected exactly 2 items, found 1" in str(named[0].error)
    assert len(prompts) == cost.judge_requests == 3


@pytest.mark.parametrize("reply", ["[1, 2]", '["a", null]', "Mara Velin; Oslo", '{"1": "a"}'])
def test_a_reply_that_is_no_list_of_strings_is_refused(reply: str):
    with pytest.raises(JudgeError, match="expected"):
        parse_sub_answers(reply, 2)


def test_words_around_the_list_are_allowed():
    assert parse_sub_answers("Here: " + json.dumps(["a [b]", "Not Sure"]), 2) == ["a [b]", None]
