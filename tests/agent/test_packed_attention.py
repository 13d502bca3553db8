"""Packed trajectories do not see each other, and each is computed as it is alone."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from agentic_r_plugin.agent import packed_attention

LENGTHS = (7, 1, 12, 4)


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped heads", "all heads"])
def models(request: pytest.FixtureRequest) -> tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]:
    """One model with transformers' SDPA attention, and the same weights with ours."""
    packed_attention.register()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=request.param, attn_implementation="sdpa",
    )  # fmt: skip
    stock = Qwen2ForCausalLM(config).double()
    config._attn_implementation = packed_attention.NAME
    ours = Qwen2ForCausalLM(config).double()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def test_logits_and_gradients_are_those_of_each_trajectory_alone(
    models: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
) -> None:
    stock, ours = models
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(50, (1, length), generator=generator) for length in LENGTHS]
    expected = [stock(input_ids=row, use_cache=False).logits for row in rows]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = ours(input_ids=torch.cat(rows, 1), attention_mask=None, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(expected, 1), atol=1e-12, rtol=1e-9)
    torch.cat(expected, 1).square().sum().backward()
    packed.square().sum().backward()
    for one, two in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-10, rtol=1e-8)
    stock.zero_grad()
    ours.zero_grad()


def test_windows_that_hold_a_trajectory_change_nothing_and_what_cannot_be_computed_is_an_error() -> None:
    packed_attention.register()
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=max(LENGTHS),
    )  # fmt: skip
    model = MistralForCausalLM(config).double()
    rows = [torch.randint(50, (1, length), generator=torch.Generator().manual_seed(3)) for length in LENGTHS]
    expected = [model(input_ids=row, use_cache=False).logits for row in rows]
    model.set_attn_implementation(packed_attention.NAME)
    packed = {"input_ids": torch.cat(rows, 1), "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    found = model(**packed, attention_mask=None, use_cache=False).logits
    torch.testing.assert_close(found, torch.cat(expected, 1), atol=1e-12, rtol=1e-9)
    heads = torch.zeros(1, 4, 3, 8)
    for unknown, reason in (
        ({"softcap": 50.0}, "no soft-capped logits"),
        ({"s_aux": torch.zeros(4)}, "no sinks"),
        ({"sliding_window": 2}, "sliding_window=2 is shorter than a trajectory of 3 tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            packed_attention.packed_causal(
                model, heads, heads, heads, None, position_ids=torch.arange(3)[None], **unknown
            )


def test_a_changed_token_moves_nothing_before_it_and_no_other_trajectory(
    models: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM],
) -> None:
    _, ours = models
    ids = torch.randint(50, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 50  # in the third trajectory, tokens 8 to 19
    with torch.inference_mode():
        before, after = (ours(input_ids=x, position_ids=positions, use_cache=False).logits[0] for x in (ids, changed))
    moved = (before != after).any(1).nonzero().flatten().tolist()
    assert moved == list(range(10, 20))


def test_trajectories_are_found_once_for_all_layers_and_again_for_other_rows(
    models: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    original = packed_attention.trajectory_lengths

    def noted(position_ids: torch.Tensor) -> list[int]:
        found.append(original(position_ids))
        return found[-1]

    monkeypatch.setattr(packed_attention, "trajectory_lengths", noted)
    for lengths in (LENGTHS, (5, 5)):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        models[1](input_ids=positions.clone(), position_ids=positions, use_cache=False)
    assert found == [list(LENGTHS), [5, 5]]


def test_a_row_that_begins_inside_a_trajectory_is_refused() -> None:
    with pytest.raises(ValueError, match="starts inside a trajectory"):
        packed_attention.trajectory_lengths(torch.tensor([3, 4, 0, 1]))


def test_what_is_not_one_packed_row_is_refused(models: tuple[Qwen2ForCausalLM, Qwen2ForCausalLM]) -> None:
    with pytest.raises(ValueError, match="one packed row"):
        models[1](input_ids=torch.zeros(2, 3, dtype=torch.long), use_cache=False)
