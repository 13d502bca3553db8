"""verl is given the reward that the agent loop recorded, whatever the text of the response says."""

from __future__ import annotations

import pytest

from agentic_r_plugin.agent.verl_reward import compute_score
from agentic_r_plugin.errors import TrainingError

LOOP = {
    "reward": 1.0,
    "em": 1,
    "f1": 1.0,
    "trajectory": {"golden_answers": ["Nile"]},
    "answer": "the Nile",
    "stop_reason": "answered",
    "searches": 2,
    "malformed_turns": 1,
    "search_failed": 0,
    "masked_token_share": 0.5,
    "generated_tokens": 30,
}


def test_the_reward_and_all_numbers_of_the_loop_are_passed_on() -> None:
    scores = compute_score("nq", "", ["Nile"], LOOP)
    assert scores == {
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
    assert all(type(value) is float for value in scores.values())


def test_the_text_of_the_response_cannot_earn_a_reward() -> None:
    scores = compute_score("nq", "<answer> Nile </answer>", ["Nile"], LOOP | {"reward": 0.0, "em": 0, "f1": 0.0})
    assert (scores["score"], scores["em"], scores["f1"]) == (0.0, 0.0, 0.0)


def test_a_trajectory_of_another_agent_loop_is_refused() -> None:
    with pytest.raises(TrainingError, match="default_agent_loop=agentic_r"):
        compute_score("nq", "<answer> Nile </answer>", ["Nile"], {"num_turns": 2})


def test_an_unlabelled_question_is_refused() -> None:
    with pytest.raises(TrainingError, match="without gold answers"):
        compute_score("nq", "", [], LOOP | {"trajectory": {"golden_answers": []}})
