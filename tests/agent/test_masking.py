"""verl's own formulas honour the mask everywhere: what we rely on, checked against the installed release.

Legend: B trajectories, R response positions.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import (
    FixedKLController,
    compute_gae_advantage_return,
    compute_value_loss,
    get_policy_loss_fn,
)
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, FSDPCriticConfig
from verl.workers.utils.losses import ppo_loss, value_loss

MASK_BR = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 0]])
"""Two trajectories of model, passage, model; the second is one token shorter."""


def random_like_mask(seed: int) -> torch.Tensor:
    return torch.randn(MASK_BR.shape, generator=torch.Generator().manual_seed(seed))


def spoiled(values_BR: torch.Tensor) -> torch.Tensor:
    """The same where the mask is 1, nonsense where it is 0."""
    return torch.where(MASK_BR.bool(), values_BR, 50 + 10 * random_like_mask(99))


def outcome_rewards() -> torch.Tensor:
    """1 on the last response token of each trajectory."""
    rewards_BR = torch.zeros(MASK_BR.shape)
    rewards_BR[0, 5] = rewards_BR[1, 4] = 1.0
    return rewards_BR


def test_the_reward_reaches_the_first_token_across_the_passages() -> None:
    _, returns_BR = compute_gae_advantage_return(outcome_rewards(), random_like_mask(0), MASK_BR, 1.0, 1.0)
    assert returns_BR[MASK_BR.bool()] == pytest.approx(torch.ones(7))


def test_a_trajectory_that_ended_with_a_masked_token_would_lose_its_reward() -> None:
    mask_BR = MASK_BR.clone()
    mask_BR[0, 5] = 0
    _, returns_BR = compute_gae_advantage_return(outcome_rewards(), random_like_mask(0), mask_BR, 1.0, 1.0)
    assert returns_BR[0, 0] == pytest.approx(0.0, abs=1e-6)
    assert returns_BR[1, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_values_of_passage_tokens_change_neither_advantages_nor_returns(gamma: float) -> None:
    values_BR = random_like_mask(1)
    clean = compute_gae_advantage_return(outcome_rewards(), values_BR, MASK_BR, gamma, 0.95)
    other = compute_gae_advantage_return(outcome_rewards(), spoiled(values_BR), MASK_BR, gamma, 0.95)
    for one, two in zip(clean, other, strict=True):
        torch.testing.assert_close(one[MASK_BR.bool()], two[MASK_BR.bool()])


def test_a_wholly_masked_trajectory_changes_no_advantage_of_the_others() -> None:
    values_BR, mask_BR = random_like_mask(1), MASK_BR.clone()
    mask_BR[1] = 0
    advantages_BR, _ = compute_gae_advantage_return(outcome_rewards(), values_BR, mask_BR, 1.0, 1.0)
    alone_BR, _ = compute_gae_advantage_return(outcome_rewards()[:1], values_BR[:1], mask_BR[:1], 1.0, 1.0)
    torch.testing.assert_close(advantages_BR[:1][mask_BR[:1].bool()], alone_BR[mask_BR[:1].bool()])


def test_the_kl_penalty_leaves_passage_tokens_alone() -> None:
    batch = TensorDict(
        {
            "response_mask": MASK_BR,
            "token_level_scores": outcome_rewards(),
            "old_log_probs": spoiled(random_like_mask(2)),
            "ref_log_prob": random_like_mask(3),
        },
        batch_size=2,
    )
    data, _ = apply_kl_penalty(DataProto(batch=batch), FixedKLController(0.1))
    expected_BR = outcome_rewards() - 0.1 * (random_like_mask(2) - random_like_mask(3)) * MASK_BR
    torch.testing.assert_close(data.batch["token_level_rewards"], expected_BR)


def engine_batch(**fields_BR: torch.Tensor) -> TensorDict:
    """A batch as verl's engine gives it to a loss: nested rows, prompts of one token."""
    lengths = [6, 5]

    def nested(values_BR: torch.Tensor) -> torch.Tensor:
        rows = [values_BR[row, :length] for row, length in enumerate(lengths)]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    responses = nested(torch.ones(MASK_BR.shape, dtype=torch.long))
    prompts = torch.nested.as_nested_tensor([torch.ones(1, dtype=torch.long)] * 2, layout=torch.jagged)
    fields = {name: nested(value) for name, value in fields_BR.items()}
    batch = TensorDict({"prompts": prompts, "responses": responses, "response_mask": nested(MASK_BR), **fields}, [2])
    tu.assign_non_tensor(batch, dp_size=1, batch_num_tokens=int(MASK_BR.sum()), global_batch_size=2)
    return batch


def model_output(values_BR: torch.Tensor) -> torch.Tensor:
    """What a model returns for prompt and response: the value that predicts a token is one place before it."""
    rows = [torch.cat([values_BR[row, :length], torch.zeros(1)]) for row, length in enumerate([6, 5])]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def actor_config() -> Any:
    return FSDPActorConfig(
        strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=2, use_kl_loss=True, kl_loss_coef=0.1,
        loss_agg_mode="token-mean", entropy_coeff=0.0,
    )  # fmt: skip


def policy_loss(log_prob_BR: torch.Tensor, spoil: bool) -> torch.Tensor:
    change = spoiled if spoil else torch.Tensor.clone
    batch = engine_batch(
        old_log_probs=change(random_like_mask(4)),
        advantages=change(random_like_mask(5)),
        ref_log_prob=change(random_like_mask(6)),
    )
    loss, _ = ppo_loss(actor_config(), {"log_probs": model_output(log_prob_BR)}, batch)
    return loss


def test_passage_tokens_enter_neither_policy_loss_nor_kl_loss_nor_gradient() -> None:
    log_prob_BR = (random_like_mask(4) + 0.1 * random_like_mask(7)).requires_grad_()
    clean, other = policy_loss(log_prob_BR, spoil=False), policy_loss(log_prob_BR, spoil=True)
    torch.testing.assert_close(clean, other)
    (gradient_BR,) = torch.autograd.grad(other, log_prob_BR)
    assert torch.equal(gradient_BR != 0, MASK_BR.bool())


def critic_loss(vpreds_BR: torch.Tensor, spoil: bool) -> torch.Tensor:
    change = spoiled if spoil else torch.Tensor.clone
    batch = engine_batch(values=change(random_like_mask(8)), returns=change(random_like_mask(9)))
    config = SimpleNamespace(cliprange_value=100.0, loss_agg_mode="token-mean", loss_scale_factor=None)
    loss, _ = value_loss(config, {"values": model_output(vpreds_BR)}, batch)
    return loss


def test_passage_tokens_enter_neither_value_loss_nor_gradient() -> None:
    vpreds_BR = random_like_mask(10).requires_grad_()
    clean, other = critic_loss(vpreds_BR, spoil=False), critic_loss(vpreds_BR, spoil=True)
    torch.testing.assert_close(clean, other)
    (gradient_BR,) = torch.autograd.grad(other, vpreds_BR)
    assert torch.equal(gradient_BR != 0, MASK_BR.bool())


def test_a_wholly_masked_trajectory_leaves_both_losses_as_they_are() -> None:
    mask_BR = MASK_BR.bool().clone()
    mask_BR[1] = False
    config = OmegaConf.create({"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 3.0})
    config = SimpleNamespace(**config, get=config.get, global_batch_info={}, tis_imp_ratio_cap=-1)
    losses = [
        get_policy_loss_fn("vanilla")(
            old_log_prob=random_like_mask(4)[:rows],
            log_prob=random_like_mask(4)[:rows] + 0.1,
            advantages=random_like_mask(5)[:rows],
            response_mask=mask_BR[:rows],
            loss_agg_mode="token-mean",
            config=config,
        )[0]
        for rows in (1, 2)
    ]
    torch.testing.assert_close(losses[0], losses[1])
    values = [
        compute_value_loss(
            vpreds=random_like_mask(1)[:rows], values=random_like_mask(2)[:rows], returns=random_like_mask(3)[:rows],
            response_mask=mask_BR[:rows], cliprange_value=0.5, loss_agg_mode="token-mean",
        )[0]
        for rows in (1, 2)
    ]  # fmt: skip
    torch.testing.assert_close(values[0], values[1])


def test_the_critic_takes_its_token_mean_from_the_actor_configuration() -> None:
    assert FSDPCriticConfig.__dataclass_fields__["loss_agg_mode"].default == "token-mean"
