"""Texts end to end: torch's kernel and the calls without it give the same, forwards and backwards."""

from __future__ import annotations

import inspect
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from agentic_r_plugin import attention

LENGTHS = (3, 3, 1, 6)


class Kernel:
    """torch's variable-length attention, text by text: no CPU has the kernel. It takes what the real one takes."""

    def __init__(self) -> None:
        self.calls = 0
        self.signature = inspect.signature(varlen.varlen_attn)

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        self.calls += 1
        given = self.signature.bind(*arguments, **named).arguments
        assert given["cu_seq_q"].dtype == given["cu_seq_k"].dtype == torch.int32  # what the CUDA kernel wants
        assert all(given[name].is_contiguous() for name in ("query", "key", "value"))
        assert given["query"].shape == given["key"].shape == given["value"].shape
        ends = given["cu_seq_q"].tolist()
        assert given["max_q"] == given["max_k"] == max(end - start for start, end in pairwise(ends))
        parts = [
            scaled_dot_product_attention(
                *(given[name][start:end].transpose(0, 1) for name in ("query", "key", "value")),
                scale=given.get("scale"), is_causal=given["window_size"] == (-1, 0),
            ).transpose(0, 1)
            for start, end in pairwise(ends)
        ]  # fmt: skip
        return torch.cat(parts)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_torchs_kernel_is_called_as_it_wants_and_gives_what_the_calls_without_it_give(
    monkeypatch: pytest.MonkeyPatch, causal: bool, groups: int
) -> None:
    total, heads, size = sum(LENGTHS), 4, 8
    shapes = [(1, heads, total, size), (1, heads // groups, total, size), (1, heads // groups, total, size)]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    weights = torch.randn(1, total, heads, size, generator=generator, dtype=torch.float64)
    ends = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)

    def run(lengths: tuple[int, ...] | None) -> list[torch.Tensor]:
        found = attention.attend(*inputs, ends=ends, longest=max(LENGTHS), lengths=lengths, causal=causal, scale=0.3)
        return [found, *torch.autograd.grad((found * weights).sum(), inputs)]

    expected, from_ends = run(LENGTHS), run(None)
    kernel = Kernel()
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "has_kernel", lambda device, dtype: True)
    for one, two, three in zip(expected, from_ends, run(LENGTHS), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, one, atol=1e-12, rtol=1e-10)
    assert kernel.calls == 1
    attention.attend(*inputs, ends=ends, longest=max(LENGTHS), causal=causal, dropout=0.1)
    assert kernel.calls == 1  # it knows no dropout


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "found"),
    [
        ("cpu", torch.bfloat16, (9, 0), False),
        ("cuda", torch.bfloat16, (9, 0), True),
        ("cuda", torch.float16, (8, 0), True),
        ("cuda", torch.float32, (9, 0), False),
        ("cuda", torch.float16, (7, 5), False),
    ],
)
def test_the_kernel_is_for_half_precision_on_ampere_and_newer(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, capability: tuple[int, int], found: bool
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention.has_kernel(torch.device(device), dtype) is found
