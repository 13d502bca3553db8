"""Texts laid end to end give the vectors and gradients of texts encoded one by one, to double precision."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface, AutoConfig

from agentic_r_plugin.retriever import encoding
from agentic_r_plugin.retriever.packing import NAME, is_packable, pack, packed_attention, set_attention_dropout
from agentic_r_plugin.search.families import first_position
from tests.retriever.tiny_models import architectures

TEXTS = [[5, 9, 7, 4], [8, 3, 11, 6], [12], [4, 5, 6, 7, 8, 9, 10], [9, 9]]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama", "qwen3"])
def test_packed_texts_are_encoded_as_if_each_were_alone(kind):
    model = architectures(20)[kind].double().eval()
    assert is_packable(model)
    alone = torch.cat([model(input_ids=torch.tensor([text])).last_hidden_state[0] for text in TEXTS])
    weights = torch.randn(alone.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (alone * weights).sum().backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation(NAME)
    packed = pack(TEXTS, first_position=first_position(model), device=torch.device("cpu"))
    together = model(**packed, use_cache=False).last_hidden_state[0]
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    (together * weights).sum().backward()
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10, msg=name)


def test_padded_batches_still_work_after_the_switch():
    model = architectures(20)["bert"].double().eval()
    ids = torch.tensor([[5, 9, 7, 4], [12, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


def test_models_that_do_not_attend_to_the_whole_text_are_left_padded():
    model = architectures(20)["qwen3"]
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert not is_packable(model)
    bert = architectures(20)["bert"]
    bert.config.is_decoder = True
    assert not is_packable(bert)
    assert not is_packable(torch.nn.Linear(2, 2))
    other = architectures(20)["bert"]
    other.config = AutoConfig.for_model("modernbert")
    assert not is_packable(other)


def dropouts(model, monkeypatch) -> set[float]:
    """What the layers ask of the attention in training."""
    asked = []

    def noted(module, query, key, value, mask, dropout=0.0, **kwargs):
        asked.append(dropout)
        return packed_attention(module, query, key, value, mask, dropout=dropout, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, noted)
    model.set_attn_implementation(NAME)
    model.train()(**pack(TEXTS, first_position=first_position(model), device=torch.device("cpu")), use_cache=False)
    return set(asked)


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "llama", "qwen3"])
def test_the_dropout_of_attention_is_the_one_that_is_set_and_the_models_own_otherwise(kind, monkeypatch):
    model = architectures(20)[kind]
    own = set_attention_dropout(model, None)
    assert dropouts(model, monkeypatch) == {own} == ({0.1} if "bert" in kind else {0.0})
    for share in (0.25, 0.0):
        assert set_attention_dropout(model, share) == share
        assert dropouts(model, monkeypatch) == {share}


@pytest.mark.parametrize(
    ("kernel", "asked", "packs", "used"),
    [(True, None, True, 0.0), (True, 0.0, True, 0.0), (True, 0.1, False, 0.1), (False, None, False, 0.1)],
)
def test_on_cuda_texts_are_packed_where_the_kernel_takes_them_and_never_in_a_loop(
    monkeypatch, kernel, asked, packs, used
):
    monkeypatch.setattr(encoding, "has_kernel", lambda device, dtype: kernel)
    monkeypatch.setattr(encoding, "_packs", lambda model: True)
    monkeypatch.setattr(encoding.TextEncoder, "_computed_dtype", lambda self: torch.bfloat16)

    class OnCuda(torch.nn.Sequential):
        device = torch.device("cuda")

    layers = torch.nn.Module()
    layers.model = architectures(20)["bert"]
    encoder = encoding.TextEncoder(OnCuda(layers), attention_dropout=asked)
    assert (encoder.packs, encoder.attention_dropout) == (packs, used)
    assert layers.model.config._attn_implementation == (NAME if packs else "sdpa")


def test_on_a_cpu_texts_are_packed_with_the_models_own_dropout(monkeypatch):
    monkeypatch.setattr(encoding, "_packs", lambda model: True)

    class OnCPU(torch.nn.Sequential):
        device = torch.device("cpu")

    layers = torch.nn.Module()
    layers.model = architectures(20)["bert"]
    encoder = encoding.TextEncoder(OnCPU(layers))
    assert (encoder.packs, encoder.attention_dropout) == (True, 0.1)
