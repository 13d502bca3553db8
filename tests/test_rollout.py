"""Many sessions driven at once: batches, costs, failures, records."""

from __future__ import annotations

import pytest

from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import SearchError, SearchRefusedError
from agentic_r_plugin.llm.base import Sampling
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Question, StopReason
from agentic_r_plugin.rollout import run_sessions, to_trajectory
from agentic_r_plugin.search.base import Hit
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from tests.data.scripted import CharCodec, ListedSearch, ScriptedAgent, passage

GREEDY = Sampling()


def session(question: str, **changes) -> Session:
    return Session(protocol=compact, codec=CharCodec(), limits=Limits(**changes), question=question)


def policy(prompt: str) -> str:
    """Searches as often as the question says, then answers."""
    searches = int(prompt.partition("Question: ")[2][0])
    made = prompt.count("<search>")
    return f"<search> s{made + 1} </search>" if made < searches else f"<answer> after {made} </answer>"


FOUND = {f"s{number}": [passage("a"), passage("b"), passage("c")] for number in (1, 2, 3)}


def test_sessions_of_any_length_finish_and_each_turn_is_one_batch():
    agent, search, cost = ScriptedAgent(policy), ListedSearch(FOUND), Cost()
    sessions = [session(f"{number}?") for number in (0, 2, 1)]
    run_sessions(sessions, agent, search, topk=2, sampling=GREEDY, cost=cost)
    assert [item.finished.answer for item in sessions] == ["after 0", "after 2", "after 1"]
    assert agent.batches == [3, 2, 1]
    assert [[turn.query for turn in item.turns] for item in sessions] == [[], ["s1", "s2"], ["s1"]]
    assert [p.id for p in sessions[1].turns[0].passages] == ["a", "b"]
    assert (cost.rollouts, cost.searches) == (3, 3)
    assert cost.generated_tokens == sum(item.generated_tokens for item in sessions)
    assert cost.prompt_tokens == sum(map(len, agent.prompts))


def test_the_mask_is_one_on_what_the_model_wrote_and_the_last_token_is_the_models():
    item = session("1?")
    run_sessions([item], ScriptedAgent(policy), ListedSearch(FOUND), topk=3, sampling=GREEDY)
    by_model = "".join(chr(token) for token, mask in zip(item.response_ids, item.response_mask, strict=True) if mask)
    assert by_model == "<search> s1 </search><answer> after 1 </answer>"
    assert item.response_mask[-1] == 1


def test_a_search_is_made_with_question_and_earlier_queries():
    search = ListedSearch(FOUND)
    run_sessions([session("2?")], ScriptedAgent(policy), search, topk=3, sampling=GREEDY)
    assert [(request.query, request.question, request.history) for request in search.requests] == [
        ("s1", "2?", ()),
        ("s2", "2?", ("s1",)),
    ]


def test_a_search_that_fails_ends_the_run_and_is_never_an_empty_result():
    class Down(ListedSearch):
        def search(self, requests, topk):
            raise SearchError("no retriever")

    item = session("1?")
    with pytest.raises(SearchError, match="no retriever"):
        run_sessions([item], ScriptedAgent(policy), Down({}), topk=3, sampling=GREEDY)
    assert item.finished is None and "<information>" not in item.text


def test_a_search_that_finds_nothing_is_shown_as_such():
    item = session("1?")
    run_sessions([item], ScriptedAgent(policy), ListedSearch({}), topk=3, sampling=GREEDY)
    assert "<information></information>" in item.text and item.turns[0].passages == ()


def test_malformed_turns_are_corrected_and_then_end_the_trajectory():
    item = session("x", max_malformed=2)
    cost = Cost()
    run_sessions([item], ScriptedAgent(lambda prompt: "hm"), ListedSearch({}), topk=3, sampling=GREEDY, cost=cost)
    assert item.finished.stop_reason is StopReason.MALFORMED
    assert item.text == f"hm{compact.correction}hm{compact.correction}hm"


def test_finished_sessions_are_left_alone():
    item, agent = session("0?"), ScriptedAgent(policy)
    for _ in range(2):
        run_sessions([item], agent, ListedSearch({}), topk=3, sampling=GREEDY)
    assert agent.batches == [1]


def test_no_more_sessions_are_under_way_than_the_backend_keeps_tokens_of():
    alone = [session(f"{number}?") for number in (2, 0, 2, 1)]
    run_sessions(alone, ScriptedAgent(policy), ListedSearch(FOUND), topk=1, sampling=GREEDY)
    agent, sessions = ScriptedAgent(policy), [session(f"{number}?") for number in (2, 0, 2, 1)]
    held = [len(item.ids) + item.budget for item in sessions]
    agent.kept_tokens = held[0] + held[1] + 1
    run_sessions(sessions, agent, ListedSearch(FOUND), topk=1, sampling=GREEDY)
    # Two at once; the third begins when the second has ended and the first has written its turns, and so on.
    assert max(agent.batches) == 2 and sum(agent.batches) == 3 + 1 + 3 + 2
    assert [item.text for item in sessions] == [item.text for item in alone]
    agent.kept_tokens = 1
    agent.batches.clear()
    run_sessions([session("1?"), session("0?")], agent, ListedSearch(FOUND), topk=1, sampling=GREEDY)
    assert agent.batches == [1, 1, 1], "one at a time is always possible"


def test_every_search_is_reported_to_the_listener():
    heard = []
    run_sessions(
        [session("1?")], ScriptedAgent(policy), ListedSearch(FOUND), topk=2, sampling=GREEDY,
        on_search=lambda item, hits, deeper: heard.append((item.question, ids(hits), ids(deeper))),
    )  # fmt: skip
    assert heard == [("1?", ["a", "b"], [])]


def ids(hits: list[Hit]) -> list[str]:
    return [hit.passage.id for hit in hits]


class Reranking(ListedSearch):
    """Turns what it found around: the best of three is not the best of two."""

    depth_changes_order = True

    def search(self, requests, topk):
        return [hits[::-1] for hits in super().search(requests, topk)]


@pytest.mark.parametrize(
    ("kind", "depth", "searches", "shown", "found"),
    [
        (ListedSearch, 3, 1, ["a", "b"], ["a", "b", "c"]),
        (ListedSearch, 1, 1, ["a", "b"], ["a"]),
        (Reranking, 3, 2, ["b", "a"], ["c", "b", "a"]),
    ],
)
def test_one_search_serves_the_agent_and_the_listener_unless_the_retriever_reranks(kind, depth, searches, shown, found):
    heard, search, cost, item = [], kind(FOUND), Cost(), session("1?")
    run_sessions(
        [item], ScriptedAgent(policy), search, topk=2, sampling=GREEDY, cost=cost, depth=depth,
        on_search=lambda _, hits, deeper: heard.append((ids(hits), ids(deeper))),
    )  # fmt: skip
    assert heard == [(shown, found)]
    assert [passage.id for passage in item.turns[0].passages] == shown
    assert (len(search.requests), cost.searches) == (searches, 1)


def test_a_retriever_that_refuses_the_depth_is_an_error_and_not_a_failed_search():
    class Shallow(ListedSearch):
        def search(self, requests, topk):
            if topk > 2:
                raise SearchRefusedError("topk 20: max 2", status=413)
            return super().search(requests, topk)

    with pytest.raises(SearchError, match="refuses 20 passages for a search, and gives 2: topk 20: max 2"):
        run_sessions([session("1?")], ScriptedAgent(policy), Shallow(FOUND), topk=2, sampling=GREEDY, depth=20)


def test_a_finished_session_becomes_a_record_with_its_scores():
    question = Question(id="q", question="1?", golden_answers=("After 1", "x"))
    item = session(question.question)
    with pytest.raises(ValueError, match="not finished"):
        to_trajectory(item, question)
    run_sessions([item], ScriptedAgent(policy), ListedSearch(FOUND), topk=1, sampling=GREEDY)
    record = to_trajectory(item, question)
    assert (record.id, record.answer, record.em, record.f1) == ("q", "after 1", 1, 1.0)
    assert record.stop_reason is StopReason.ANSWERED and record.text == item.text
    assert record.turns[0].passages[0].id == "a" and record.turns[0].passages[0].score == 1.0
    assert record.prompt_tokens == len("Question: 1?\n")
