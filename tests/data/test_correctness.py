"""Going on from single candidates: what the agent is shown, what is run, what is looked up, what is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agentic_r_plugin.config import deciding
from agentic_r_plugin.data.continuations import Continuations
from agentic_r_plugin.data.correctness import (
    CorrectnessConfig,
    CorrectnessCost,
    _labelled_units,
    by_rollout,
    run,
    steps_of,
)
from agentic_r_plugin.data.likelihood import answer_likelihoods, by_likelihood, in_order_of_likelihood
from agentic_r_plugin.data.selection import preset_rule
from agentic_r_plugin.errors import ConfigError, RecordError, RequestRefusedError
from agentic_r_plugin.llm.base import Likelihood
from agentic_r_plugin.protocol import Finished, Limits, Prefix
from agentic_r_plugin.records import Candidates, Passage, ScoredPassage, StopReason
from agentic_r_plugin.session import Session
from agentic_r_plugin.store import write_records
from agentic_r_plugin.tags import compact
from tests.chat_templates import PROTOCOLS, codec
from tests.data.scripted import ListedSearch, Passages, ScriptedAgent, passage, select

PREFIX = "<think>x</think><search> first </search>\n\n<information>old</information>\n\n<search> second </search>"
PASSAGES = Passages({letter: passage(letter) for letter in "abcdefgh"})


def query(*passages: str, **changes) -> Candidates:
    base = Candidates(
        id="q", turn=2, question="Who?", golden_answers=("Ann",), query="second", history=("first",), prefix=PREFIX,
        passages=tuple(ScoredPassage(id=identifier, score=1.0) for identifier in passages),
    )  # fmt: skip
    return replace(base, **changes)


def continuations(policy, **changes) -> Continuations:
    settings = {"protocol": compact, "limits": Limits(), "cost": CorrectnessCost()} | changes
    return Continuations(ScriptedAgent(policy), ListedSearch({"third": [PASSAGES["h"]]}), PASSAGES, **settings)


def judge(found: Continuations, *queries: tuple[Candidates, list[list[str]]]):
    return [
        [(record.passage_id, record.em, record.answer, record.searches) for record in records]
        for records in by_rollout(queries, found)
    ]


def test_the_agent_goes_on_from_the_prefix_with_the_one_candidate():
    found = continuations(lambda prompt: "<answer> Ann </answer>")
    assert judge(found, (query("a"), [["a"]])) == [[("a", 1, "Ann", 0)]]
    assert found.llm.prompts == [compact.prompt("Who?") + PREFIX + compact.render([PASSAGES["a"]])]


def test_later_searches_are_normal_ones_with_the_earlier_queries_and_are_counted():
    def policy(prompt: str) -> str:
        return "<answer> Bob </answer>" if "text of h" in prompt else "<search> third </search>"

    found = continuations(policy)
    assert judge(found, (query("a"), [["a"]])) == [[("a", 0, "Bob", 1)]]
    (request,) = found.search.requests
    assert (request.query, request.question, request.history) == ("third", "Who?", ("first", "second"))


def test_searches_of_the_prefix_count_against_the_limit():
    found = continuations(lambda prompt: "<search> third </search>", limits=Limits(max_searches=3))
    assert judge(found, (query("a"), [["a"]])) == [[("a", 0, None, 1)]]


def test_steps_are_rolled_out_until_one_holds_a_correct_candidate_and_all_queries_share_a_batch():
    def policy(prompt: str) -> str:
        right = "text of c" in prompt or "text of e" in prompt
        return f"<answer> {'Ann' if right else 'Bob'} </answer>"

    found = continuations(policy)
    first, second = query("a", "b", "c", "d"), query("e", "f", question="Whom?")
    records = judge(found, (first, [["b"], ["a", "c"], ["d"]]), (second, [["f", "e"]]))
    assert [[item[:2] for item in of_query] for of_query in records] == [
        [("a", 0), ("b", 0), ("c", 1)],
        [("e", 1), ("f", 0)],
    ]
    assert found.llm.batches == [3, 2], "a step of every query at once; d is never rolled out"


def test_a_prompt_that_was_run_before_is_looked_up():
    same = Passages({letter: Passage(id=letter, title="T", text="the same") for letter in "ab"})
    found = continuations(lambda prompt: "<answer> Ann </answer>")
    found.passages = same
    both = [[("a", 1, "Ann", 0), ("b", 1, "Ann", 0)]]
    assert judge(found, (query("a", "b"), [["a", "b"]])) == both
    assert judge(found, (query("a", "b"), [["a", "b"]])) == both
    assert (found.cost.rollouts, found.cost.reused, len(found.llm.prompts)) == (1, 3, 1)


def test_the_same_text_for_another_question_is_run_again():
    found = continuations(lambda prompt: "<answer> Ann </answer>")
    judge(found, (query("a"), [["a"]]), (query("a", question="Whom?"), [["a"]]))
    assert found.cost.rollouts == 2


def test_a_prefix_that_leaves_no_room_is_a_wrong_answer_not_an_error():
    found = continuations(lambda prompt: "<answer> Ann </answer>", limits=Limits(max_tokens=60))
    assert judge(found, (query("a"), [["a"]])) == [[("a", 0, None, 0)]]
    assert found.llm.prompts == []


def settings(**changes) -> CorrectnessConfig:
    return CorrectnessConfig(candidates="c", out="o", corpus="p", **{"relevance": "r", **changes})


def test_without_exhaustive_only_candidates_above_the_threshold_are_rolled_out():
    scores = {"a": 59, "b": 60, "c": 90}
    assert steps_of(query("a", "b", "c"), settings(), scores) == [["c"], ["b"]]
    assert steps_of(query("a"), settings(), scores) == "relevance_below_threshold"
    assert steps_of(query("a"), settings(), None) == "no_relevance"
    assert steps_of(query("a", "b"), settings(exhaustive=True, relevance=""), None) == [["a", "b"]]


def test_ties_are_tried_one_by_one_in_retrieval_order_for_the_papers_rule_and_together_for_the_released_codes():
    scores = {"a": 80, "b": 95, "c": 80, "d": 80, "e": 59}
    of_five = query("a", "b", "c", "d", "e")
    assert steps_of(of_five, settings(), scores) == [["b"], ["a"], ["c"], ["d"]]
    assert steps_of(of_five, settings(preset="released_code"), scores) == [["b"], ["a", "c", "d"]]
    with pytest.raises(ConfigError, match="preset='papre': expected one of opened, paper, released_code"):
        settings(preset="papre").check()


def test_the_released_codes_omissions_are_options():
    scores = {"a": 90}
    assert steps_of(query("a"), settings(max_turn=1), scores) == "turn_left_out"
    assert steps_of(query("a"), settings(num_candidates=20), scores) == "other_number_of_candidates"
    assert steps_of(query("a"), settings(max_turn=2, num_candidates=1), scores) == [["a"]]


@pytest.mark.parametrize("changes", [{"relevance": ""}, {"exhaustive": True}])
def test_either_relevance_or_exhaustive_must_be_given(changes: dict):
    with pytest.raises(ConfigError, match="either --relevance FILE, for exact pruning, or --exhaustive"):
        run(settings(**changes))


def test_a_query_without_gold_answers_is_dropped_and_only_all_of_them_are_an_error(tmp_path):
    unlabelled = query("a", id="r", golden_answers=())
    assert steps_of(unlabelled, settings(), {"a": 90}) == "no_gold_answer"
    file = tmp_path / "c.jsonl"
    write_records(file, [unlabelled, query("a")])
    assert [unit.item.id for unit in _labelled_units(str(file))] == ["r", "q"]
    write_records(file, [unlabelled, replace(unlabelled, turn=3)])
    with pytest.raises(RecordError, match=r"c\.jsonl: no question has golden answers"):
        list(_labelled_units(str(file)))


# --- the likelihood of the gold answer


class LikelyAgent(ScriptedAgent):
    """Gives each character of an answer the log-probability that `likely` has for the prompt before it."""

    def __init__(self, policy, likely) -> None:
        super().__init__(policy)
        self.likely, self.scored = likely, []

    def likelihoods(self, continuations):
        self.scored += [self.codec.decode((*one.prompt_ids, *one.token_ids)) for one in continuations]
        found = [self.likely(self.codec.decode(one.prompt_ids)) for one in continuations]
        return [
            RequestRefusedError("too long")
            if value is None
            else Likelihood(logprobs=(value,) * len(one.token_ids), prompt_tokens=len(one.prompt_ids))
            for value, one in zip(found, continuations, strict=True)
        ]


def likely(**values):
    """Log-probability by the letter of the passage in the prompt; `none` for a block without passages."""
    return lambda prompt: next((value for key, value in values.items() if f"text of {key}" in prompt), values["none"])


def likely_continuations(policy, values, **changes) -> Continuations:
    found = continuations(policy, **changes)
    found.llm = LikelyAgent(policy, likely(**values))
    return found


def test_the_likelihood_is_of_the_answer_directly_after_the_candidate_and_one_prefill_each():
    found = likely_continuations(lambda prompt: "", {"a": -0.5, "none": -1.0})
    assert found.likelihoods([(query("a"), "a"), (query("a"), None)]) == [-0.5 * 14, -14.0]
    before = compact.prompt("Who?") + PREFIX
    assert found.llm.scored == [
        before + compact.render([PASSAGES["a"]]) + "<answer> Ann </answer>",
        before + compact.render([]) + "<answer> Ann </answer>",
    ]
    assert found.llm.prompts == [] and found.cost.prompt_tokens > 0 and found.cost.rollouts == 0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_what_is_scored_reads_as_the_answer_in_every_chat_template(name: str):
    protocol, agent = PROTOCOLS[name], LikelyAgent(lambda prompt: "", lambda prompt: -1.0)
    agent.codec = codec(name)
    session = Session(protocol, agent.codec, Limits(), "Who?", prefix=Prefix("first", "a call"))
    session.found([PASSAGES["a"]])
    assert answer_likelihoods([(session, "Ann")], agent, CorrectnessCost()) == [
        -len(agent.codec.encode(protocol.answered("Ann")[1]))
    ]
    turn = agent.scored[0].removeprefix(agent.codec.decode(session.ids))
    assert protocol.read(turn, agent.codec) == Finished(StopReason.ANSWERED, "Ann"), (
        "a thought that is opened is closed"
    )


@pytest.mark.parametrize(
    ("values", "correct"),
    [
        ({"a": -2.0, "b": -0.5, "c": -0.7, "none": -1.0}, "b"),
        ({"a": -2.0, "b": -1.5, "c": -1.2, "none": -1.0}, ""),  # the answer is likelier without any passage
        ({"a": -2.0, "b": None, "c": -0.7, "none": -1.0}, "c"),
    ],
)
def test_by_likelihood_the_likeliest_candidate_counts_as_correct(values, correct):
    found = likely_continuations(lambda prompt: "", values)
    (records,) = by_likelihood([(query("a", "b", "c", "d"), [["b"], ["a", "c"]])], found)
    assert {record.passage_id: record.em for record in records} == {one: int(one == correct) for one in "abc"}
    scores = {one: None if values[one] is None else pytest.approx(14 * values[one]) for one in "abc"}
    assert {record.passage_id: record.log_likelihood for record in records} == scores
    assert [record.to_dict()["schema"] for record in records] == [
        "correctness/1" if values[one] is None else "correctness/2" for one in "abc"
    ]
    assert list(by_likelihood([(query("a"), [])], found)) == [[]]


def test_in_order_of_likelihood_levels_stay_and_the_first_success_ends_a_query():
    def policy(prompt: str) -> str:
        return "<answer> Ann </answer>" if any(f"text of {one}" in prompt for one in "ce") else "<answer> B </answer>"

    found = likely_continuations(policy, {"a": -3.0, "b": -9.0, "c": -1.0, "d": None, "e": -0.1, "none": -1.0})
    levels = [["b"], ["a", "c", "d"], ["e"]]
    plans = in_order_of_likelihood([(query("a", "b", "c", "d", "e"), levels), (query("a"), [])], found)
    assert [steps for _, steps in plans] == [[["b"], ["c"], ["a"], ["d"], ["e"]], []]
    records, none = by_rollout(plans, found)
    assert [(record.passage_id, record.em) for record in records] == [("b", 0), ("c", 1)] and none == []
    rule = preset_rule("paper", num_negatives=1)
    relevance = {"a": 80, "b": 90, "c": 80, "d": 80, "e": 70}
    correctness = {record.passage_id: record.em for record in records}
    (group,) = select(query("a", "b", "c", "d", "e"), relevance, correctness, replace(rule, any_of_ties=True))
    assert group.positive == "c"
    with pytest.raises(RecordError, match="the correctness of passage 'a' is needed and unknown"):
        select(query("a", "b", "c", "d", "e"), relevance, correctness, rule)


def test_likelihood_needs_a_backend_that_knows_it_and_settings_that_fit():
    with pytest.raises(ConfigError, match="the llm backend ScriptedAgent gives no likelihood of a text; use hf, vllm"):
        continuations(lambda prompt: "").likelihoods([(query("a"), "a")])
    files = {"candidates": "c", "out": "o", "corpus": "k", "relevance": "r"}
    for wrong, message in (
        ({"method": "guess"}, "correctness.method: expected rollout or likelihood, found 'guess'"),
        ({"order": "likelihood", "preset": "released_code"}, "expected method=rollout and preset=paper"),
        ({"order": "likelihood", "method": "likelihood"}, "expected method=rollout and preset=paper"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorrectnessConfig(**files, **wrong).check()
    assert deciding(CorrectnessConfig(**files)).keys().isdisjoint({"method", "order"}), "as earlier versions"
