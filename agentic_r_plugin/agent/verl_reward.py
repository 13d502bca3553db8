"""The reward function that verl calls: it passes on what the agent loop recorded (`agent.rewards`, `agent_loop`).

verl calls `compute_score` with the whole response as text, passages included. That text is ignored: the answer and the
reward are those that the agent loop found in the model's own tokens. They arrive in `extra_info`: verl's reward manager
(`experimental/reward_loop/reward_manager/naive.py`) adds the agent loop's `extra_fields` to the row's `extra_info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agentic_r_plugin.errors import TrainingError

NUMBERS = ("searches", "malformed_turns", "search_failed", "masked_token_share", "generated_tokens")
"""Agent loop fields passed on, so that validation reports them as `val-aux/<data source>/<field>/mean@1`."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any], **kwargs: Any
) -> dict[str, float]:
    """Score one trajectory.

    Args:
        data_source: name of the benchmark.
        solution_str: the response as text; ignored.
        ground_truth: ignored; the agent loop read the gold answers from the same row.
        extra_info: the row's `extra_info` (`dataset.verl_row`) and the agent loop's `extra_fields`.

    Returns:
        `score`, the reward, with the parts of a sum as `reward_NAME`; `acc` and `em`, exact match under the names that
        verl and we report; `f1`; and the fields in `NUMBERS`.

    Raises:
        TrainingError: the trajectory is not from our agent loop, or its question has no gold answers.
    """
    if "stop_reason" not in extra_info:
        raise TrainingError(
            "the reward is read from the agent loop's own record, and this trajectory has none; set "
            "actor_rollout_ref.rollout.agent.default_agent_loop=agentic_r"
        )
    if not extra_info["trajectory"]["golden_answers"]:
        raise TrainingError("a question without gold answers cannot be rewarded; leave it out of the training data")
    em = float(extra_info["em"])
    scores = {"score": float(extra_info["reward"]), "acc": em, "em": em, "f1": float(extra_info["f1"])}
    # verl requires the same names for all trajectories, so numbers that only some of them have are left out.
    parts = {name: extra_info["reward_parts"][name] for name in extra_info.get("reward_weights", ())}
    scores |= {f"reward_{name}": float(part) for name, part in parts.items()}
    return scores | {name: float(extra_info[name]) for name in NUMBERS}
