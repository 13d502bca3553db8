"""The outcome reward: exact match of the model's own answer (method sections 2 and 6), or a sum of `agent.rewards`.

verl calls `compute_score` with the whole response as text, passages included. That text is ignored: the answer is the
one that the agent loop extracted from the model's own tokens. It arrives in `extra_info`: verl's reward manager
(`experimental/reward_loop/reward_manager/naive.py`) adds the agent loop's `extra_fields` to the row's `extra_info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentic_r_plugin.answers import exact_match, f1
from agentic_r_plugin.errors import TrainingError
from agentic_r_plugin.field_values import answers

NUMBERS = ("searches", "malformed_turns", "search_failed", "masked_token_share", "generated_tokens")
"""Agent loop fields passed on, so that validation reports them as `val-aux/<data source>/<field>/mean@1`."""


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any],
    **kwargs: Any,
) -> dict[str, float]:
    """Score one trajectory.

    Args:
        data_source: name of the benchmark.
        solution_str: the response as text; ignored.
        ground_truth: gold answers, in any form that `field_values.answers` reads.
        extra_info: the row's `extra_info` (`dataset.verl_row`) and the agent loop's `extra_fields`.

    Returns:
        `score`, the reward: exact match, or the sum that the agent loop computed from its setting `reward`, with its
        parts as `reward_NAME`; `acc` and `em`, exact match under the names that verl and we report; `f1`; and the
        fields in `NUMBERS`.

    Raises:
        TrainingError: the trajectory is not from our agent loop, or its question has no gold answers.
    """
    if "stop_reason" not in extra_info:
        raise TrainingError(
            "the reward is read from the agent loop's own record, and this trajectory has none; set "
            "actor_rollout_ref.rollout.agent.default_agent_loop=agentic_r"
        )
    answer, gold = extra_info["answer"], answers(ground_truth, "ground_truth")
    if not gold:
        raise TrainingError("a question without gold answers cannot be rewarded; leave it out of the training data")
    correct = float(exact_match(answer, gold))
    scores = {"score": correct, "acc": correct, "em": correct, "f1": float(f1(answer, gold))}
    if "reward" in extra_info:
        scores["score"] = float(extra_info["reward"])
        # verl wants the same names for all trajectories, so numbers that only some of them have are left out.
        scores |= {f"reward_{name}": float(extra_info["reward_parts"][name]) for name in extra_info["reward_weights"]}
    return scores | {name: float(extra_info[name]) for name in NUMBERS}
