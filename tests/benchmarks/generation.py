"""Our batched generation against `model.generate` and against the arithmetic it cannot do without, on one CPU thread.

    python tests/benchmarks/generation.py [--model recipes/quickstart/agent] [--rows 16] [--turns 3] [--times 2]

All get the same random prompts of one length, write greedily, and are given the same random observation after each
turn. `model.generate` runs with its dynamic and its static cache and computes each turn's prompt from the start, as it
keeps nothing between calls; on one turn all compute the same. The bound is the model's matrix products and attention
alone, for exactly the tokens and keys that our forward passes had, without padding them, norms, rotations and Python;
it is measured right after. CPU seconds, the least of `--times`. Fails when the writers differ.

Results (the quick start's agent, 3.4 M parameters, float32, one thread of a busy AMD EPYC; 16 rows, 300 prompt tokens,
40 tokens written and 200 observed per turn):

| turns | ours | `model.generate`, dynamic cache | static cache |
|---|---|---|---|
| 1 | 1.06 s | 1.18 times ours | 1.10 times |
| 3 | 3.43 s | 1.88 times | 1.81 times |

Prefill takes 1.3 times as long as its matrix products and attention alone, measured in the same run; most of the rest
is the model's norms, rotations and activations. Decoding takes 1.4 times as long: its attention reads all keys and
values of every row from memory for each token, and small batches add a few milliseconds of Python per step.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin.llm.hf_generate import HFGenerator

Write = Callable[[list[list[int]]], list[list[int]]]
"""Prompts of one turn -> what is written after each."""


@dataclass(frozen=True)
class Pass:
    """One forward pass of ours: rows, tokens per row, keys each row attends to, CPU seconds."""

    rows: int
    tokens: int
    keys: int
    cpu_s: float


def spent(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def converse(write: Write, first: list[list[int]], observations: Sequence[list[list[int]]]) -> list[list[list[int]]]:
    """What is written in each turn."""
    prompts, turns = first, []
    for observation in [*observations, None]:
        turns.append(write(prompts))
        if observation is not None:
            prompts = [[*ids, *new, *seen] for ids, new, seen in zip(prompts, turns[-1], observation, strict=True)]
    return turns


class Ours:
    """`HFGenerator`, and the passes it made."""

    def __init__(self, model: Any, tokenizer: Any, new: int) -> None:
        self.model, self.new, self.passes, self.cpu_s = model, new, list[Pass](), 0.0
        self.generator = HFGenerator(model, tokenizer, max_batch_tokens=10**9, prefix_cache_tokens=10**6)

    def __call__(self, prompts: list[list[int]]) -> list[list[int]]:
        forward = self.model.forward

        def recorded(**kwargs: Any) -> Any:
            cpu_s, output = spent(lambda: forward(**kwargs))
            rows, tokens = kwargs["input_ids"].shape
            self.passes.append(Pass(rows, tokens, kwargs["attention_mask"].shape[-1], cpu_s))
            return output

        self.model.forward = recorded
        try:
            limits = [self.new] * len(prompts)
            cpu_s, done = spent(lambda: self.generator.generate(prompts, max_tokens=limits, ignore_eos=True))
            self.cpu_s += cpu_s
        finally:
            self.model.forward = forward
        return [list(row.token_ids) for row in done]


def theirs(model: Any, new: int, cache: str) -> Write:
    @torch.inference_mode()
    def write(prompts: list[list[int]]) -> list[list[int]]:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new, "cache_implementation": cache}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        return output[:, ids.shape[1] :].tolist()

    return write


@torch.inference_mode()
def bound(model: Any, passes: Sequence[Pass]) -> float:
    """CPU seconds of the matrix products and the attention of these passes."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    seconds = 0.0
    for done in passes:
        inputs = {width: torch.randn(done.rows * done.tokens, width) for width in {w.shape[1] for w in weights}}
        query = torch.randn(done.rows, heads, done.tokens, size)
        states = torch.randn(2, done.rows, heads, done.keys, size)

        def products(inputs: dict[int, torch.Tensor] = inputs, last: int = done.rows) -> None:
            for weight in weights:
                linear(inputs[weight.shape[1]], weight)
            linear(inputs[head.weight.shape[1]][:last], head.weight)

        def attention(query: torch.Tensor = query, states: torch.Tensor = states) -> None:
            for _ in range(config.num_hidden_layers):
                scaled_dot_product_attention(query, states[0], states[1])

        seconds += spent(products)[0] + spent(attention)[0]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="recipes/quickstart/agent")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--observation", type=int, default=200)
    parser.add_argument("--new", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--times", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[list[int]]:
        return torch.randint(10, model.config.vocab_size - 10, (args.rows, length), generator=draw).tolist()

    first, observations = ids(args.prompt), [ids(args.observation) for _ in range(args.turns - 1)]
    print(f"{args.rows} rows, prompt {args.prompt}, {args.new} written per turn, observation {args.observation}\n")
    print("| turns | ours | generate, dynamic cache | generate, static cache | ours : dynamic | ours : static |")
    print("|---|---|---|---|---|---|")
    for seen in dict.fromkeys((0, len(observations))):
        seconds: dict[str, float] = {}
        for _ in range(args.times):
            ours = Ours(model, tokenizer, args.new)
            found: dict[str, Any] = {}
            for name, write in (("ours", ours), *((c, theirs(model, args.new, c)) for c in ("dynamic", "static"))):
                cpu_s, found[name] = spent(lambda write=write, seen=seen: converse(write, first, observations[:seen]))
                seconds[name] = min(cpu_s, seconds.get(name, cpu_s))
        written = [row for turn in found["ours"] for row in turn]
        for name in ("dynamic", "static"):  # eos is suppressed by `generate` and only ignored by us: a row may differ
            same = sum(a == b for a, b in zip(written, (row for turn in found[name] for row in turn), strict=True))
            if same < 0.9 * len(written):
                raise SystemExit(f"{name}: only {same} of {len(written)} rows alike")
        ratios = " | ".join(f"1 : {seconds[name] / seconds['ours']:.2f}" for name in ("dynamic", "static"))
        print(f"| {seen + 1} | {' | '.join(f'{seconds[n]:.2f} s' for n in seconds)} | {ratios} |")
    print("\n| part of ours | passes | tokens | CPU s | bound | ratio |\n|---|---|---|---|---|---|")
    for part, chosen in (
        ("prefill", [done for done in ours.passes if done.tokens > 1]),
        ("decode", [done for done in ours.passes if done.tokens == 1]),
    ):
        cpu_s, least, tokens = (
            sum(p.cpu_s for p in chosen),
            bound(model, chosen),
            sum(p.rows * p.tokens for p in chosen),
        )
        print(f"| {part} | {len(chosen)} | {tokens:,} | {cpu_s:.2f} | {least:.2f} | {cpu_s / least:.2f} |")
    print(f"| outside the model | | | {ours.cpu_s - sum(p.cpu_s for p in ours.passes):.2f} | | |")


if __name__ == "__main__":
    main()
