"""The reward is the exact match of the model's own answer."""

from __future__ import annotations

import numpy as np
import pytest

from agentic_r_plugin.agent.verl_reward import compute_score
from agentic_r_plugin.errors import TrainingError

LOOP = {
    "answer": "the Nile",
    "stop_reason": "answered",
    "searches": 2,
    "malformed_turns": 1,
    "search_failed": 0,
    "masked_token_share": 0.5,
    "generated_tokens": 30,
}


def test_the_reward_is_one_for_an_exact_match_and_all_numbers_are_passed_on() -> None:
    assert compute_score("nq", "", ["Nile"], LOOP) == {
        "score": 1.0,
        "acc": 1.0,
        "em": 1.0,
        "f1": 1.0,
        "searches": 2.0,
        "malformed_turns": 1.0,
        "search_failed": 0.0,
        "masked_token_share": 0.5,
        "generated_tokens": 30.0,
    }


def test_the_text_of_the_response_cannot_earn_a_reward() -> None:
    scores = compute_score("nq", "<answer> Nile </answer>", ["Nile"], LOOP | {"answer": None})
    assert (scores["score"], scores["f1"]) == (0.0, 0.0)


def test_a_partly_right_answer_has_f1_but_no_reward() -> None:
    scores = compute_score("nq", "", ["River Nile"], LOOP)
    assert (scores["score"], scores["f1"]) == (0.0, pytest.approx(2 / 3))


def test_a_trajectory_of_another_agent_loop_is_refused() -> None:
    with pytest.raises(TrainingError, match="default_agent_loop=agentic_r"):
        compute_score("nq", "<answer> Nile </answer>", ["Nile"], {"num_turns": 2})


@pytest.mark.parametrize(
    "gold", ["the Nile", ["Nile"], np.array(["Nile"]), {"target": "Nile"}, {"target": ["x", "Nile"]}]
)
def test_gold_answers_are_read_in_the_forms_of_search_r1_and_verl(gold: object) -> None:
    assert compute_score("nq", "", gold, LOOP)["score"] == 1.0
    assert compute_score("nq", "", gold, LOOP | {"answer": "t"})["score"] == 0.0


def test_an_empty_answer_earns_nothing_and_an_unlabelled_question_is_refused() -> None:
    assert compute_score("nq", "", ["The The"], LOOP | {"answer": ""})["score"] == 0.0
    with pytest.raises(TrainingError, match="without gold answers"):
        compute_score("nq", "", [], LOOP)
