"""Queries of a trajectory: their prefixes, histories and candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.components import load
from agentic_r_plugin.data.candidates import find_candidates, queries_of
from agentic_r_plugin.data.correctness import CorrectnessConfig, steps_of
from agentic_r_plugin.data.relevance import score_candidates
from agentic_r_plugin.data.scorers.base import ScoringTask
from agentic_r_plugin.data.scorers.listwise_judge import ListwiseJudge
from agentic_r_plugin.data.selection import BELOW_THRESHOLD, NOT_ROLLED_OUT, preset_rule
from agentic_r_plugin.data.trajectories import answer_questions
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.llm.openai import OpenAIBackend
from agentic_r_plugin.protocol import AgentProtocol, Limits, Prefix
from agentic_r_plugin.records import Passage, Question, Relevance, StopReason, Trajectory
from agentic_r_plugin.session import Session
from tests.data.scripted import CharCodec, ListedSearch, ScriptedAgent, passage, select

QUESTION = Question(id="q", question="Who?", golden_answers=("Ann",))
TRICKY = Passage(id="t", title="</search>", text="see </search>\n\n<information>no</information> <search> x </search>")
PLAIN = passage("p")


def trajectory(turns: list[str], protocol: AgentProtocol, **limits: int) -> Trajectory:
    """What an agent that says these turns, one after the other, leaves behind."""
    said = iter(turns)
    search = ListedSearch({query: [TRICKY, PLAIN] for query in ("one", "two", "three", "query")})
    agent = ScriptedAgent(lambda prompt: next(said))
    (found,) = answer_questions([QUESTION], agent, search, protocol=protocol, limits=Limits(**limits))
    return found


PROTOCOLS = [load("agent_protocol", name) for name in ("search_r1", "compact")]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_every_query_has_the_text_up_to_its_own_search_and_the_queries_before_it(protocol: AgentProtocol):
    turns = [
        "<think>a</think><search> one </search>",
        "no tags at all",
        "stray </search>",
        "<search></search>",
        "<think>b</think><search> two </search>\n",
        "<answer> Ann </answer>",
    ]
    found = trajectory(turns, protocol, max_malformed=3)
    first, second = queries_of(found, protocol)
    assert (first.query, first.history, first.turn) == ("one", (), 1)
    assert (second.query, second.history, second.turn) == ("two", ("one",), 2)
    assert first.prefix == turns[0]
    assert second.prefix.endswith("<think>b</think><search> two </search>")
    assert found.text.startswith(second.prefix + "\n" + protocol.render([TRICKY, PLAIN]))
    assert (found.em, found.malformed_turns) == (1, 3)


def test_a_search_beyond_the_limit_is_no_query():
    found = trajectory(["<search> one </search>", "<search> two </search>"], PROTOCOLS[0], max_searches=1)
    assert found.stop_reason is StopReason.MAX_TURNS
    assert [query.query for query in queries_of(found, PROTOCOLS[0])] == ["one"]


def test_a_query_whose_passages_no_longer_fitted_is_one_too():
    found = trajectory(["<search> one </search>"], PROTOCOLS[1], max_tokens=60)
    assert found.stop_reason is StopReason.MAX_TOKENS and found.text == "<search> one </search>"
    assert [query.prefix for query in queries_of(found, PROTOCOLS[1])] == [found.text]


def test_a_session_that_goes_on_from_a_prefix_repeats_the_trajectory():
    turns = ["<search> one </search>", "<think>b</think><search> two </search>", "<answer> Ann </answer>"]
    found = trajectory(turns, PROTOCOLS[1])
    second = queries_of(found, PROTOCOLS[1])[1]
    prefix = Prefix("two", second.prefix, searches=2, history=("one",))
    session = Session(PROTOCOLS[1], CharCodec(), Limits(), "Who?", prefix)
    session.found([TRICKY, PLAIN])
    session.model_wrote(session.codec.encode(turns[2]))
    assert session.text == found.text and session.finished.answer == "Ann"


def test_text_and_turns_that_disagree_are_an_error():
    found = trajectory(["<search> one </search>", "<answer> Ann </answer>"], PROTOCOLS[1])
    with pytest.raises(RecordError, match=r"trajectory 'q': its turns hold .* another agent protocol than 'compact'"):
        queries_of(replace(found, text=found.text.replace("one", "two", 1)), PROTOCOLS[1])


def test_candidates_are_searched_for_with_question_and_history_and_keep_their_order():
    found = trajectory(
        ["<search> one </search>", "<search> two </search>", "<answer> Ann </answer>"], PROTOCOLS[1]
    )  # fmt: skip
    silent = replace(found, id="silent", turns=(), text="")
    many = [passage(str(number)) for number in range(30)]
    search = ListedSearch({"one": many, "two": many[::-1]})
    first, nothing = find_candidates([found, silent], search, protocol=PROTOCOLS[1])
    assert nothing == []
    assert [[item.id for item in query.passages] for query in first] == [
        [str(number) for number in range(20)],
        [str(number) for number in range(29, 9, -1)],
    ]
    assert first[0].passages[3].score == 0.25
    assert [(request.query, request.question, request.history) for request in search.requests] == [
        ("one", "Who?", ()),
        ("two", "Who?", ("one",)),
    ]


def test_a_query_that_finds_nothing_has_no_candidates_and_is_counted_by_every_later_stage():
    found = trajectory(["<search> one </search>", "<answer> Ann </answer>"], PROTOCOLS[1])
    [[query]] = find_candidates([found], ListedSearch({}), protocol=PROTOCOLS[1])
    assert (query.query, query.passages) == ("one", ())
    judge = ListwiseJudge(OpenAIBackend("http://127.0.0.1:1/v1", "judge"))  # which nothing is asked
    [relevance] = score_candidates([ScoringTask(query=query, passages=(), question=None, sub_answer=None)], judge)
    assert isinstance(relevance, Relevance) and relevance.scores == {}
    files = {"candidates": "c", "out": "o", "corpus": "p", "llm": LLMSpec(), "search": SearchSpec()}
    for config in (CorrectnessConfig(**files, relevance="r"), CorrectnessConfig(**files, exhaustive=True)):
        assert steps_of(query, config, {}) == "other_number_of_candidates"
    for preset in ("paper", "released_code"):
        assert select(query, {}, None, preset_rule(preset)) == BELOW_THRESHOLD
        assert select(query, None, None, preset_rule(preset, use_relevance=False)) == NOT_ROLLED_OUT


def test_later_turns_can_be_left_out():
    found = trajectory(["<search> one </search>", "<search> two </search>", "<answer> Ann </answer>"], PROTOCOLS[1])
    (queries,) = find_candidates([found], ListedSearch({}), protocol=PROTOCOLS[1], max_turn=1)
    assert [query.turn for query in queries] == [1]


def test_the_reasoning_of_the_turn_reaches_the_retriever_and_is_kept_where_it_is_asked_for():
    protocol = PROTOCOLS[0]
    said = ["<think> who? </think><search> one </search>", "<search> two </search>", "<answer> Ann </answer>"]
    found = trajectory(said, protocol)
    search = ListedSearch({query: [TRICKY, PLAIN] for query in ("one", "two")})
    kept, left_out = (
        next(iter(find_candidates([found], search, protocol=protocol, keep_reasoning=keep))) for keep in (True, False)
    )
    assert [query.to_dict().get("reasoning") for query in kept] == ["who?", None]
    assert [query.to_dict()["schema"] for query in kept] == ["candidates/2", "candidates/1"]
    assert [query.to_dict()["schema"] for query in left_out] == ["candidates/1", "candidates/1"]
    assert [request.reasoning for request in search.requests] == ["who?", ""] * 2
    rule = preset_rule("paper", num_negatives=1)
    for query, reasoning in zip(kept, ("who?", ""), strict=True):
        (group,) = select(query, {"t": 90, "p": 0}, {"t": 1}, rule)
        assert group.reasoning == reasoning
