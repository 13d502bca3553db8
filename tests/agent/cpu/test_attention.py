"""Float32 attention under bfloat16 training."""

from __future__ import annotations

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from agentic_r_plugin.agent.cpu import attention

CONFIG = {
    "vocab_size": 50, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def loss_and_gradients(implementation: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Of a padded batch: left padding in the first row, right padding in the second."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG, attn_implementation=implementation)).to(dtype)
    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, -7:] = 0, 0
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    loss = (torch.logsumexp(logits, -1) * mask).sum() / mask.sum()
    loss.backward()
    return loss.detach(), [parameter.grad.float() for parameter in model.parameters()]


def test_it_equals_sdpa_in_float32_with_padding_on_either_side():
    attention.register()
    ours, theirs = (loss_and_gradients(name, torch.float32) for name in (attention.NAME, "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_bfloat16_model_stays_in_bfloat16_and_close_to_float32():
    attention.register()
    half, _ = loss_and_gradients(attention.NAME, torch.bfloat16)
    full, _ = loss_and_gradients("sdpa", torch.float32)
    assert abs(half - full) < 0.02
