"""Rewards as components: their values, their weighted sum, and where its parts are recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from agentic_r_plugin.agent.metrics import rollout_line, trajectory_metrics
from agentic_r_plugin.agent.rewards import Outcome, RewardSum
from agentic_r_plugin.agent.rollout_page import page
from agentic_r_plugin.agent.verl_reward import compute_score
from agentic_r_plugin.errors import BackendError, ConfigError, TrainingError, UnknownComponentError
from agentic_r_plugin.records import Passage, StopReason
from agentic_r_plugin.tags import compact
from tests.llm.loopback import Answer, chat, serve

OTHER = compact.render([Passage(id="2", title="Hills", text="No river here.")])
NILE = compact.render(
    [Passage(id="1", title="Rivers", text="The Nile flows north."), Passage(id="3", title="", text="x")]
)
RIGHT = Outcome(
    question="Which river?",
    golden_answers=("Nile",),
    answer="the Nile",
    stop_reason=StopReason.ANSWERED,
    shown=(OTHER, NILE),
    searches=5,
    turns=4,
    malformed_turns=1,
)
SILENT = replace(
    RIGHT, answer=None, stop_reason=StopReason.MALFORMED, shown=(OTHER,), searches=0, turns=3, malformed_turns=3
)


@pytest.mark.parametrize(
    ("name", "right", "silent"),
    [
        ("exact_match", 1.0, 0.0),
        ("f1", 1.0, 0.0),
        ("format", 3 / 4, 0.0),
        ("retrieval_credit", 1.0, 0.0),
        ("search_penalty", -5.0, 0.0),
    ],
)
def test_the_value_of_each_reward(name: str, right: float, silent: float) -> None:
    reward = RewardSum({name: 1.0}, {})
    assert [reward.parts(outcome)[name] for outcome in (RIGHT, SILENT)] == [right, silent]


def test_without_weights_the_reward_is_exact_match() -> None:
    reward = RewardSum({}, {})
    assert [reward.total(reward.parts(outcome)) for outcome in (RIGHT, SILENT)] == [1.0, 0.0]
    assert not reward.with_parts


def test_rewards_are_added_up_by_their_weights_and_the_parts_are_kept_as_they_are() -> None:
    options = {"search_penalty": {"free": 1, "none": 3.0}}
    reward = RewardSum({"exact_match": 1.0, "f1": 0.5, "search_penalty": 0.05}, options)
    half_right = replace(RIGHT, answer="River Nile")
    parts = reward.parts(half_right)
    assert parts == {"exact_match": 0.0, "f1": pytest.approx(2 / 3), "search_penalty": -4.0}
    assert reward.total(parts) == pytest.approx(1 / 3 - 0.2)
    assert reward.parts(SILENT)["search_penalty"] == -3.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"other": 1.0}])
def test_a_reward_that_is_no_finite_number_never_reaches_the_training(value: Any) -> None:
    reward = RewardSum({"f1": 1.0}, {})
    reward.rewards["f1"] = lambda outcome: value
    with pytest.raises(TrainingError, match="reward 'f1': expected a finite number"):
        reward.parts(RIGHT)


def test_a_reward_without_this_name_or_option_is_refused_at_the_start() -> None:
    with pytest.raises(UnknownComponentError, match=r"unknown reward 'em'; registered: exact_match, f1, format, judge"):
        RewardSum({"em": 1.0}, {})
    with pytest.raises(ConfigError, match=r"reward_options.search_penalty: .*'most'; search_penalty\(outcome"):
        RewardSum({"search_penalty": 1.0}, {"search_penalty": {"most": 1}})
    with pytest.raises(ConfigError, match=r"reward_options.judge: missing a required .*'llm'"):
        RewardSum({"judge": 1.0}, {})
    with pytest.raises(ConfigError, match="'f1' has no weight in reward"):
        RewardSum({"exact_match": 1.0}, {"f1": {}})


def test_a_judge_grades_the_answer_and_exact_match_takes_its_place_where_it_gives_no_number() -> None:
    replies = iter(["80", "I like it", "Very much", "so", "no"])

    def answer(path: str, body: dict[str, Any]) -> Answer:
        return chat(next(replies))

    with serve(answer) as server:
        llm = {"backend": "openai", "url": server.url, "model": "m", "max_retries": 0}
        reward = RewardSum({"judge": 1.0}, {"judge": {"llm": llm, "max_retries": 2}})
        assert reward.parts(RIGHT) == {"judge": 0.8, "judge_failed": 0.0}
        prompt = server.requests[-1][1]["messages"][0]["content"]
        assert "Question: Which river?" in prompt and "Answer to judge: the Nile" in prompt
        assert reward.parts(RIGHT) == {"judge": 1.0, "judge_failed": 1.0}
        assert len(server.requests) == 4, "two more attempts"
        assert reward.parts(SILENT) == {"judge": 0.0} and len(server.requests) == 4, "no answer: not asked"
    with pytest.raises(BackendError):
        reward.parts(RIGHT)


def loop_fields(answer: str, **more: Any) -> dict[str, Any]:
    """What the agent loop says of a trajectory."""
    trajectory = {
        "id": "1", "question": "Which river?", "golden_answers": ["Nile"], "turns": [], "answer": answer, "em": 0,
        "text": "t", "stop_reason": "answered",
    }  # fmt: skip
    numbers = {"searches": 2, "malformed_turns": 0, "search_failed": 0, "masked_token_share": 0, "generated_tokens": 9}
    segments = [{"by_model": True, "tokens": 4, "text": "t"}]
    scored = {"em": 0, "f1": 0.5, "reward": 0.0}
    made = {"trajectory": trajectory, "prompt": "p", "segments": segments, "trained_tokens": 4, **scored}
    return numbers | made | {"answer": answer, "stop_reason": "answered"} | more


PARTS = {"f1": 0.5, "search_penalty": -2.0, "judge_failed": 1.0}
SUMMED = {"reward": 0.4, "reward_weights": {"f1": 1.0, "search_penalty": 0.05}, "reward_parts": PARTS}


def test_verl_is_given_the_sum_and_its_parts_next_to_exact_match() -> None:
    scores = compute_score("nq", "", ["Nile"], loop_fields("River Nile", **SUMMED))
    assert {name: scores[name] for name in ("score", "acc", "em", "f1", "reward_f1", "reward_search_penalty")} == {
        "score": 0.4, "acc": 0.0, "em": 0.0, "f1": 0.5, "reward_f1": 0.5, "reward_search_penalty": -2.0,
    }  # fmt: skip
    assert "reward_judge_failed" not in scores
    assert not any(name.startswith("reward") for name in compute_score("nq", "", ["Nile"], loop_fields("x")))


def test_metrics_rollout_log_and_page_name_the_parts_only_where_a_sum_was_set() -> None:
    summed, plain = loop_fields("River Nile", **SUMMED), loop_fields("River Nile")
    failed = loop_fields("x", **SUMMED | {"reward_parts": {"f1": 9.0}}, search_failed=1)
    better = loop_fields("Nile", **SUMMED | {"reward": 1.0, "reward_parts": {"f1": 1.0, "search_penalty": 0.0}})
    metrics = trajectory_metrics([summed, failed, better])
    assert {name: value for name, value in metrics.items() if "reward" in name} == {
        "agentic_r/reward": 0.7,
        "agentic_r/reward/f1": 0.75,
        "agentic_r/reward/search_penalty": -1.0,
        "agentic_r/reward/judge_failed": 0.5,
    }
    assert not any("reward" in name for name in trajectory_metrics([plain]))
    line = rollout_line(summed, 3)
    assert (line["score"], line["reward"]) == (0.4, PARTS)
    assert "reward 0.4 (f1 0.5, search_penalty -2, judge_failed 1)" in page("run", {3: [line]})
    line = rollout_line(plain, 3)
    assert line["score"] == 0.0 and "reward" not in line and "reward" not in page("run", {3: [line]})
