"""Masked attention on the CPU, bfloat16 against float32: `python tests/benchmarks/attention.py [--threads 1]`."""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F


def milliseconds(work, times: int = 5) -> float:
    work()
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    rows, heads, tokens, size = 6, 4, 650, 64
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(rows, 1, tokens, tokens)
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(rows, heads, tokens, size, dtype=dtype, requires_grad=True) for _ in range(3))

        def forward(q=q, k=k, v=v) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        with torch.no_grad():
            infer = milliseconds(forward)
        train = milliseconds(lambda forward=forward: forward().sum().backward())
        print(f"{dtype}: forward {infer:.1f} ms, forward and backward {train:.1f} ms")


if __name__ == "__main__":
    main()
