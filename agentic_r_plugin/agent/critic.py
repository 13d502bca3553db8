"""Initial critic: the agent with a value head of zeros.

verl initialises a new value head at random. Its values then vary between tokens about as much as the rewards do, and
with lambda = gamma = 1 they enter the first advantages unchanged. With zeros the first advantages equal the rewards.
"""

from __future__ import annotations

import shutil
from pathlib import Path


def write_critic(agent: Path, folder: Path) -> None:
    """Write the agent's weights, a value head of zeros, and the tokenizer to `folder`, atomically."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(agent)
    policy.config.num_labels = 1
    # Not with from_pretrained, which would report the weights of the value head as missing.
    critic = AutoModelForTokenClassification.from_config(policy.config, dtype=policy.dtype)
    critic.base_model.load_state_dict(policy.base_model.state_dict())
    with torch.no_grad():
        for parameter in critic.score.parameters():
            parameter.zero_()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    critic.save_pretrained(partial)
    AutoTokenizer.from_pretrained(agent).save_pretrained(partial)
    partial.rename(folder)
