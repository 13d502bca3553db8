"""A critic that starts with a value head of zeros."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from agentic_r_plugin.agent.critic import write_critic


def test_every_value_is_zero_and_the_body_is_the_agents(agent_dir: Path, tmp_path: Path) -> None:
    write_critic(agent_dir, tmp_path / "critic")
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", num_labels=1)
    agent = AutoModelForCausalLM.from_pretrained(agent_dir)
    ids = AutoTokenizer.from_pretrained(tmp_path / "critic")("Ada", return_tensors="pt").input_ids
    values = critic(input_ids=ids).logits
    assert values.shape == (*ids.shape, 1)
    assert not values.any()
    values.sum().backward()
    assert critic.score.weight.grad.abs().sum() > 0
    for name, tensor in agent.model.state_dict().items():
        assert torch.equal(critic.model.state_dict()[name], tensor), name
    assert [path.name for path in tmp_path.iterdir()] == ["critic"]
