"""How groups are picked, and that pruned correctness picks the same ones."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_r_plugin.data.continuations import Continuations
from agentic_r_plugin.data.correctness import CorrectnessCost, by_rollout
from agentic_r_plugin.data.selection import (
    BELOW_THRESHOLD,
    NO_RELEVANCE,
    NO_TRAJECTORY,
    NOTHING_OPENED,
    TOO_FEW_NEGATIVES,
    SelectionRule,
    SelectionTask,
    preset_rule,
    released_code,
    rollout_order,
    selection_named,
)
from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Candidates, Group, ScoredPassage
from agentic_r_plugin.store import dump_line
from agentic_r_plugin.tags import compact
from tests.data.scripted import ListedSearch, Passages, ScriptedAgent, passage, select

LETTERS = "abcdefghijklmnopqrst"


def query(size: int, turn: int = 1) -> Candidates:
    return Candidates(
        id="q",
        turn=turn,
        question="Q?",
        golden_answers=("yes",),
        query="find it",
        history=(),
        prefix="<search> find it </search>",
        passages=tuple(ScoredPassage(id=letter, score=1.0 - rank / 100) for rank, letter in enumerate(LETTERS[:size])),
    )


def scores(**given: int) -> dict[str, int]:
    return dict.fromkeys(LETTERS, 10) | given


RULE = SelectionRule(num_negatives=3)


def positives(picked: list[Group] | str) -> list[str]:
    assert not isinstance(picked, str), picked
    return [group.positive for group in picked]


def test_the_positive_is_the_correct_candidate_of_highest_relevance():
    picked = select(query(8), scores(a=95, b=90, c=70), {"a": 0, "b": 1, "c": 1}, RULE)
    assert positives(picked) == ["b"]


def test_of_tied_candidates_the_earlier_in_retrieval_order_is_the_positive():
    picked = select(query(8), scores(c=80, b=80, d=80), {"b": 0, "c": 1, "d": 1}, RULE)
    assert positives(picked) == ["c"]


def test_the_released_code_takes_up_to_three_ties_which_share_their_negatives_and_leaves_out_further_ties():
    rule = replace(RULE, **released_code.rule, num_negatives=5)
    picked = select(query(9), scores(a=80, b=80, c=80, d=80, e=79), dict.fromkeys("abcd", 1), rule)
    assert positives(picked) == ["a", "b", "c"]
    assert isinstance(picked, list) and len({group.negatives for group in picked}) == 1
    assert sorted(picked[0].negatives) == list("efghi"), "d ties with the positives"


def test_the_papers_rule_takes_the_other_ties_as_negatives():
    picked = select(query(4), scores(a=80, b=80), {"a": 1, "b": 1}, RULE)
    assert isinstance(picked, list) and sorted(picked[0].negatives) == list("bcd")


def test_the_papers_rule_needs_no_correctness_behind_the_first_success_and_the_released_codes_does():
    ties = scores(a=80, b=80, c=80)
    assert positives(select(query(8), ties, {"a": 0, "b": 1}, RULE)) == ["b"]
    with pytest.raises(RecordError, match=r"passage 'c' is needed and unknown.*another preset"):
        select(query(8), ties, {"a": 0, "b": 1}, replace(RULE, **released_code.rule))


def test_negatives_are_all_other_candidates_sampled_without_replacement():
    rule = replace(RULE, num_negatives=7)
    picked = select(query(8), scores(a=80), {"a": 1}, rule)
    assert isinstance(picked, list) and sorted(picked[0].negatives) == list("bcdefgh")


@pytest.mark.parametrize(
    ("relevance", "correctness", "size", "reason"),
    [
        (None, {"a": 1}, 8, "no_relevance"),
        (scores(a=59), {}, 8, "relevance_below_threshold"),
        (scores(a=60), None, 8, "not_rolled_out"),
        (scores(a=60, b=90), {"a": 0, "b": 0}, 8, "no_correct_candidate"),
        (scores(a=60), {"a": 1}, 3, "too_few_negatives"),
    ],
)
def test_a_query_without_a_group_says_why(relevance, correctness, size: int, reason: str):
    assert select(query(size), relevance, correctness, RULE) == reason


def test_relevance_of_exactly_the_threshold_is_enough():
    assert positives(select(query(8), scores(a=60), {"a": 1}, RULE)) == ["a"]


def test_correctness_that_is_needed_and_unknown_is_an_error():
    with pytest.raises(RecordError, match=r"correctness of passage 'b' is needed and unknown.*make it again"):
        select(query(8), scores(a=90, b=80), {"a": 0}, RULE)


def test_relevance_of_other_candidates_is_an_error():
    with pytest.raises(RecordError, match="no relevance for passage 'a'"):
        select(query(8), {"z": 90}, {"z": 1}, RULE)


def test_without_relevance_the_first_correct_candidate_is_the_positive():
    rule = replace(RULE, use_relevance=False)
    assert positives(select(query(5), None, dict(zip("abcde", (0, 0, 1, 1, 0), strict=True)), rule)) == ["c"]


def test_without_correctness_the_most_relevant_candidate_is_the_positive():
    rule = replace(RULE, use_correctness=False)
    assert positives(select(query(5), scores(d=70, b=65), None, rule)) == ["d"]
    assert select(query(5), scores(d=59), None, rule) == "relevance_below_threshold"


def test_both_ablations_at_once_are_refused():
    with pytest.raises(ConfigError, match="both off"):
        SelectionRule(use_relevance=False, use_correctness=False)


def test_the_sample_depends_on_seed_id_and_turn_alone():
    rule = replace(RULE, num_negatives=6)

    def negatives(seed: int = 0, turn: int = 1) -> tuple[str, ...]:
        picked = select(query(20, turn), scores(a=80), {"a": 1}, replace(rule, seed=seed))
        assert isinstance(picked, list)
        return picked[0].negatives

    assert negatives() == negatives() == ("i", "n", "g", "q", "o", "h")
    assert negatives(seed=1) != negatives() != negatives(turn=2)


# --- Ours, off by default ------------------------------------------------------------------------------------------


def picked_negatives(rule: SelectionRule, relevance: dict[str, int]) -> tuple[str, ...] | str:
    picked = select(query(8), relevance, {"b": 1}, rule)
    return picked[0].negatives if isinstance(picked, list) else picked


def test_candidates_too_relevant_to_be_negatives_are_left_out():
    relevance = scores(b=95, c=90, d=85, e=84)
    rule = replace(RULE, num_negatives=5, false_negative_relevance=85)
    found = picked_negatives(rule, relevance)
    assert not isinstance(found, str) and sorted(found) == list("aefgh")
    assert picked_negatives(replace(rule, num_negatives=6), relevance) == "too_few_negatives"


def test_hard_negatives_are_the_best_ranked_others_and_the_rest_is_sampled():
    rule = replace(RULE, num_negatives=4, hard_negatives=2)
    found = picked_negatives(rule, scores(b=95))
    assert found[:2] == ("a", "c") and len(set(found)) == 4 and "b" not in found


@pytest.mark.parametrize(
    "changes", [{"hard_negatives": 4}, {"false_negative_relevance": 80, "use_relevance": False}, {"hard_negatives": -1}]
)
def test_options_that_contradict_each_other_are_refused(changes: dict):
    with pytest.raises(ConfigError, match=r"hard_negatives|false_negative_relevance"):
        SelectionRule(**{"num_negatives": 3, **changes})


# --- Exact pruning ----------------------------------------------------------------------------------------------------


def naive_groups(
    candidates: Candidates, relevance: Mapping[str, int], correctness: Mapping[str, int], rule: SelectionRule
) -> list[Group] | str:
    """The method's section 4, step 6, written out with every score known."""
    order = [item.id for item in candidates.passages]
    ranked = sorted(order, key=lambda item: (-correctness[item], -relevance[item], order.index(item)))
    if max(relevance[item] for item in order) < rule.threshold:
        return "relevance_below_threshold"
    eligible = [item for item in ranked if correctness[item] == 1 and relevance[item] >= rule.threshold]
    if not eligible or ranked[0] != eligible[0]:
        return "no_correct_candidate"
    best = ranked[0]
    ties = [item for item in ranked if (correctness[item], relevance[item]) == (1, relevance[best])]
    chosen = ties[: rule.max_positives]
    rest = [item for item in order if item not in (chosen if rule.max_positives == 1 else ties)]
    if len(rest) < rule.num_negatives:
        return "too_few_negatives"
    sampled = random.Random(f"{rule.seed}/{candidates.id}/{candidates.turn}").sample(rest, rule.num_negatives)
    return [
        Group(
            id=candidates.id, turn=candidates.turn, question=candidates.question, query=candidates.query,
            history=candidates.history, positive=item, negatives=tuple(sampled),
        )
        for item in chosen
    ]  # fmt: skip


def continuations(correct: Mapping[int, Mapping[str, int]], cost: CorrectnessCost) -> Continuations:
    """An agent that answers rightly from the candidates that are correct in a turn (which the prefix shows)."""

    def policy(prompt: str) -> str:
        turn, shown = prompt.count("</search>"), prompt.rpartition("text of ")[2][0]
        return f"<answer> {'yes' if correct[turn][shown] else 'no'} </answer>"

    store = Passages({letter: passage(letter) for letter in LETTERS})
    return Continuations(ScriptedAgent(policy), ListedSearch({}), store, protocol=compact, limits=Limits(), cost=cost)


query_scores = st.lists(
    st.tuples(st.sampled_from([0, 20, 59, 60, 61, 80, 80, 100]), st.booleans()), min_size=1, max_size=20
)


@settings(max_examples=120, deadline=None)
@given(st.lists(query_scores, min_size=1, max_size=4), st.sampled_from(["paper", "released_code"]), st.integers(0, 5))
def test_pruned_and_exhaustive_correctness_give_the_same_groups_byte_for_byte(drawn, preset: str, num_negatives: int):
    rule = preset_rule(preset, num_negatives=num_negatives, seed=3)
    queries = [
        replace(query(len(of_query), turn), prefix="<search> find it </search>" * turn)
        for turn, of_query in enumerate(drawn, start=1)
    ]
    relevance = [{LETTERS[rank]: lr for rank, (lr, _) in enumerate(of_query)} for of_query in drawn]
    correct = {
        turn: {LETTERS[rank]: int(gac) for rank, (_, gac) in enumerate(of_query)}
        for turn, of_query in enumerate(drawn, start=1)
    }
    written, rollouts = [], []
    for exhaustive in (False, True):
        cost = CorrectnessCost()
        steps = [
            [[item.id for item in q.passages]]
            if exhaustive
            else rollout_order([item.id for item in q.passages], scored, rule)
            for q, scored in zip(queries, relevance, strict=True)
        ]
        judged = by_rollout(zip(queries, steps, strict=True), continuations(correct, cost))
        picked = [
            select(q, scored, {record.passage_id: record.em for record in records}, rule)
            for q, scored, records in zip(queries, relevance, judged, strict=True)
        ]
        written.append(
            b"".join(
                dump_line([group.to_dict() for group in groups] if isinstance(groups, list) else groups)
                for groups in picked
            )
        )
        rollouts.append(cost.rollouts)
        assert picked == [
            naive_groups(q, scored, correct[q.turn], rule) for q, scored in zip(queries, relevance, strict=True)
        ]
    assert written[0] == written[1]
    assert rollouts[1] == sum(map(len, drawn))
    assert rollouts[0] == sum(least_rollouts(of_query, rule) for of_query in drawn)


def least_rollouts(drawn: list[tuple[int, bool]], rule: SelectionRule) -> int:
    """Candidates up to the first correct one in the order of trying, or down to the end of its level for ties."""
    tried = sorted((item for item in drawn if item[0] >= rule.threshold), key=lambda item: -item[0])
    first = next((place for place, (_, gac) in enumerate(tried) if gac), None)
    if first is None:
        return len(tried)
    return first + 1 if rule.max_positives == 1 else sum(lr >= tried[first][0] for lr, _ in tried)


# --- opened passages as positives


def opened(shown: str, *, opened: str, reasoning: str | None = "so it is", **task: Any) -> list[Group] | str:
    """The groups of turn 1 of a trajectory that was shown some passages and opened some of them."""
    turn = SimpleNamespace(turn=1, passages=[ScoredPassage(id=one, score=1.0) for one in shown], opened=tuple(opened))
    later = [] if reasoning is None else [SimpleNamespace(turn=2, reasoning=reasoning, passages=(), opened=())]
    trajectory = SimpleNamespace(turns=(turn, *later))
    rule = preset_rule("opened", num_negatives=2, use_relevance="relevance" in task)
    return selection_named("opened").pick(SelectionTask(query=query(5), trajectory=trajectory, **task), rule)


def test_opened_passages_are_positives_and_those_shown_and_not_opened_negatives():
    picked = opened("bcdea", opened="dc")
    assert positives(picked) == ["c", "d"]
    assert isinstance(picked, list) and [group.negatives for group in picked] == [("b", "e")] * 2
    assert opened("abc", opened="") == NOTHING_OPENED
    assert opened("abc", opened="d") == NOTHING_OPENED, "opened, and shown by another search"
    assert opened("ab", opened="ab") == TOO_FEW_NEGATIVES


def test_a_judge_filters_the_opened_passages():
    assert positives(opened("abcd", opened="ab", relevance=scores(a=59, b=60))) == ["b"]
    picked = opened("abcd", opened="ab", relevance=scores(a=59, b=60))
    assert isinstance(picked, list) and picked[0].negatives == ("c", "d"), "what the judge refuses is no negative"
    assert opened("abcd", opened="a", relevance=scores(a=10)) == BELOW_THRESHOLD


def test_an_opened_passage_that_was_not_judged_is_neither_positive_nor_below_the_threshold():
    assert opened("abcd", opened="a", relevance={"b": 90}) == NO_RELEVANCE
    assert opened("abcd", opened="ab", relevance={"b": 10}) == BELOW_THRESHOLD
    picked = opened("abcd", opened="ab", relevance={"b": 90})
    assert positives(picked) == ["b"] and isinstance(picked, list) and picked[0].negatives == ("c", "d")


@pytest.mark.parametrize(
    ("reasoning", "weight"), [("", 2 / 51), ("one " * 24, 2 / 3), ("one " * 49, 1.0), ("one " * 449, 1.8), (None, 1.0)]
)
def test_long_reasoning_after_opening_weighs_more_and_the_last_search_weighs_one(reasoning: str | None, weight: float):
    (group,) = opened("ab", opened="a", reasoning=reasoning)
    assert isinstance(group, Group) and group.weight == pytest.approx(weight)
    assert group.to_dict()["schema"] == ("group/1" if weight == 1 else "group/2")


def test_a_query_without_its_trajectory_has_no_group():
    task = SelectionTask(query=query(5))
    assert selection_named("opened").pick(task, preset_rule("opened", use_relevance=False)) == NO_TRAJECTORY
    with pytest.raises(ConfigError, match="preset='best': expected one of opened, paper, released_code"):
        preset_rule("best")
