"""Our batched generation against `model.generate`, same model, prompts and greedy output, in one run.

    python tests/benchmarks/generation.py [--model recipes/quickstart/agent] [--rows 32] [--prompt 400] [--new 64]

Prints seconds of each and their ratio, best of three; fails when the two write different tokens. It is the reason why
the CPU rollout engine drives the model's forward pass itself: `generate` copies every key and value at every token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin.llm.hf_generate import HFGenerator


def best_of(times: int, work: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="recipes/quickstart/agent")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=400)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, model.config.vocab_size, (args.rows, args.prompt), generator=draw)

    def ours() -> list[list[int]]:
        generator = HFGenerator(model, tokenizer, max_batch_tokens=10**9)
        rows = generator.generate(prompts.tolist(), max_tokens=[args.new] * args.rows, ignore_eos=True)
        return [list(row.token_ids) for row in rows]

    @torch.inference_mode()
    def theirs() -> list[list[int]]:
        options = {"do_sample": False, "max_new_tokens": args.new, "min_new_tokens": args.new}
        output = model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)
        return output[:, args.prompt :].tolist()

    our_s, our_tokens = best_of(3, ours)
    their_s, their_tokens = best_of(3, theirs)
    same = sum(a == b for a, b in zip(our_tokens, their_tokens, strict=True)) / args.rows
    print(f"ours {our_s:.2f} s, model.generate {their_s:.2f} s, ratio {their_s / our_s:.2f}; rows alike {same:.3f}")
    if same < 0.95:  # eos is suppressed by `generate` and allowed by `ignore_eos`: rows that wrote it may differ
        raise SystemExit("the two wrote different tokens")


if __name__ == "__main__":
    main()
