"""An advantage estimator in verl's public register: reward minus the mean reward of the batch, without a critic."""

from verl.trainer.ppo.core_algos import register_adv_est


@register_adv_est("batch_mean")
def batch_mean(token_level_rewards, response_mask, config=None, **kwargs):
    """(advantages, returns), both [B, R]; masked tokens get 0."""
    rewards_B = token_level_rewards.sum(dim=1)
    advantages_BR = (rewards_B - rewards_B.mean())[:, None] * response_mask
    return advantages_BR, advantages_BR
