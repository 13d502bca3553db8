"""The rule "last stable checkpoint" on recorded curves of real trainings, and its edges on made ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agentic_r_plugin.agent.stability import StabilityRule, judge, last_stable, to_keep
from agentic_r_plugin.errors import ConfigError, TrainingError
from tests.agent.tiny_world import read_jsonl

RULE = StabilityRule(window=2, patience=2)


def steps(*rewards: float, **others: list[float | None]) -> list[dict[str, Any]]:
    """Lines of a training with these rewards, step by step; line 0 is the validation before it."""
    lines: list[dict[str, Any]] = [{"step": 0, "val-core/nq/acc/mean@1": 0.1}]
    for index, reward in enumerate(rewards):
        extra = {name: values[index] for name, values in others.items()}
        lines.append({"step": index + 1, "agentic_r/em": reward, **extra})
    return lines


def test_a_training_that_only_gets_better_is_taken_at_its_end() -> None:
    verdict = judge(steps(0.1, 0.2, 0.3, 0.35, 0.34, 0.36), RULE)
    assert (verdict.collapse, verdict.doubtful_from, verdict.reasons) == (None, None, {})
    assert last_stable([2, 4, 6], verdict) == 6


def test_the_checkpoint_before_the_fall_is_taken_also_if_the_training_recovers() -> None:
    verdict = judge(steps(0.3, 0.4, 0.4, 0.4, 0.05, 0.0, 0.0, 0.4, 0.4), RULE)
    assert verdict.collapse == 6
    assert verdict.describe() == "collapse at step 6: reward 0.025, best 0.400"
    assert last_stable([2, 4, 6, 8], verdict) == 4


def test_one_bad_step_is_no_collapse_but_makes_later_checkpoints_doubtful_until_it_is_over() -> None:
    dip = judge(steps(0.4, 0.4, 0.1, 0.0), RULE)
    assert (dip.collapse, dip.doubtful_from) == (None, 4)
    assert to_keep([1, 2, 3, 4], dip, newest=1) == {3, 4}
    over = judge(steps(0.4, 0.4, 0.1, 0.0, 0.4, 0.4), RULE)
    assert (over.collapse, over.doubtful_from) == (None, None)
    assert to_keep([2, 4, 6], over, newest=1) == {6}


def test_one_lucky_first_step_sets_no_bar_for_the_means_that_follow() -> None:
    assert judge(steps(1.0, 0.4, 0.4, 0.4, 0.4), RULE).reasons == {}
    assert judge(steps(0.6, 0.6, 0.2, 0.2, 0.2), RULE).collapse == 4
    lucky = [0.0, *[0.6] * 5]
    assert judge(steps(*[0.3] * 6, **{"agentic_r/malformed_share": lucky}), RULE).reasons == {}


def test_small_rewards_may_fall_without_saying_anything() -> None:
    assert judge(steps(0.04, 0.03, 0.0, 0.0, 0.0), RULE).collapse is None


@pytest.mark.parametrize(
    ("metric", "values", "reason"),
    [
        ("actor/reward_kl_penalty", [0.0, 0.1, 0.2, 2.0, 3.0, 4.0], "kl 1.1, above 1"),
        ("actor/kl_loss", [0.0, 0.1, 0.2, 2.0, 3.0, 4.0], "kl 1.1, above 1"),
        ("actor/entropy", [1.0, 1.0, 1.0, 9.0, 9.0, 9.0], "entropy 9, above 5"),
        ("actor/entropy", [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], "entropy 0, below 0.02"),
        ("actor/entropy_loss", [1.0, 1.0, 0.0, 0.0, 0.0, 0.0], "entropy 0, below 0.02"),  # of the update: bypass mode
        ("response_length/mean", [100, 100, 100, 500, 500, 500], "response_length 500, above 300"),
        ("agentic_r/search_turns", [1, 1, 1, 4, 4, 4], "searches 4, above 3"),
        ("agentic_r/malformed_share", [0.1, 0.1, 0.9, 1.0, 1.0, 1.0], "malformed 0.95, above 0.5"),
        ("actor/grad_norm", [1.0, 1.0, 1.0, 500.0, 500.0, 500.0], "gradient_norm 250, above 100"),
    ],
)
def test_every_watched_number_can_break_its_bound(metric: str, values: list[float | None], reason: str) -> None:
    verdict = judge(steps(*[0.3] * 6, **{metric: values}), RULE)
    assert verdict.collapse is not None
    assert verdict.reasons[verdict.collapse] == (reason,)


def test_an_agent_that_has_yet_to_learn_the_form_is_not_called_unstable() -> None:
    lines = steps(*[0.0] * 6, **{"agentic_r/malformed_share": [1.0, 0.9, 1.0, 1.0, 0.7, 0.9]})
    assert judge(lines, RULE).reasons == {}


def test_a_bound_that_is_none_is_not_watched() -> None:
    lines = steps(*[0.3] * 6, **{"actor/reward_kl_penalty": [0.0, 5.0, 5.0, 5.0, 5.0, 5.0]})
    assert judge(lines, StabilityRule(window=2, patience=2, max_kl=None)).collapse is None


def test_a_number_that_is_not_finite_is_unstable_at_once() -> None:
    verdict = judge(steps(0.3, 0.3, 0.3, **{"actor/entropy": [1.0, None, None]}), RULE)
    assert (verdict.collapse, verdict.reasons[2]) == (2, ("entropy is not finite",))


def test_a_collapse_before_the_first_checkpoint_leaves_nothing_to_take() -> None:
    verdict = judge(steps(0.4, 0.4, 0.0, 0.0, 0.0), RULE)
    with pytest.raises(TrainingError, match=r"collapse at step 4: .*before the first checkpoint \(step 5\)"):
        last_stable([5], verdict)
    with pytest.raises(TrainingError, match=r"collapse at step 4: .*, before the first checkpoint: no stable one"):
        last_stable([], verdict)
    with pytest.raises(TrainingError, match="expected a checkpoint"):
        last_stable([], judge([], StabilityRule()))


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stability\.patience: expected at least 1"):
        StabilityRule(patience=0)
    with pytest.raises(ConfigError, match="on_collapse='panic': expected one of finish, stop"):
        StabilityRule(on_collapse="panic")


# --- Recorded curves (`curves/record.py` says of what) ---------------------------------------------------------------

CURVES = Path(__file__).with_name("curves")


def recorded(name: str) -> list[dict[str, Any]]:
    return read_jsonl(CURVES / f"{name}.jsonl")


def test_a_recorded_healthy_training_is_taken_at_its_end() -> None:
    lines = recorded("healthy")
    verdict = judge(lines, StabilityRule())
    assert verdict.collapse is None
    assert last_stable(range(2, len(lines) + 1, 2), verdict) == len(lines)


def test_the_checkpoint_before_a_recorded_collapse_is_taken() -> None:
    lines = recorded("collapse")  # the learning rate was raised after step 10; from step 15 on EM stays below 0.15
    verdict = judge(lines, StabilityRule())
    assert verdict.describe() == "collapse at step 15: reward 0.144, best 0.289"
    assert last_stable(range(4, len(lines) + 1, 4), verdict) == 12
    assert judge(lines[:18], StabilityRule()).collapse is None  # four unstable steps are not yet five
    assert to_keep([12, 16], judge(lines[:18], StabilityRule()), newest=1) == {12, 16}


def test_a_stricter_rule_sees_the_recorded_collapse_earlier() -> None:
    assert judge(recorded("collapse"), StabilityRule(window=2, patience=2)).collapse == 14
