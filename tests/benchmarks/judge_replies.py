"""Mutated judge replies: every one gives exactly n whole numbers in 0..100, or is a judge error. Nothing else, ever.

    python tests/benchmarks/judge_replies.py [--replies 100000] [--seed 0]

A reply is a right one for 1 to 20 passages (bare, fenced, or in a sentence) with one to six mutations of characters, of
numbers and of structure. Prints how many were taken and refused; fails at the first that is neither.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

from agentic_r_plugin.data.judge import parse_score, parse_scores
from agentic_r_plugin.errors import JudgeError

PIECES = (
    "[", "]", "{", "}", ",", '"', "'", "\n", " ", "-", "+", ".", "e9", "0", "7", "100", "101", "1e2", "NaN", "Infinity",
    "true", "null", "50.0", "٣", "²", "₅", "５", "1_0", "0x1F", "```", "```json", "Not Sure", "scores:", "\\u0031",
    "\x00", "\ud800", "9" * 5000, "[" * 3000, "(85)", "85/100", "/* */", "//", "<think>[1]</think>", "﻿",
)  # fmt: skip
FORMS = (
    "{}",
    "```json\n{}\n```",
    "Scores: {}.",
    "Here are the scores [as asked]: {}",
    "{}\nDone.",
    "<think>x</think>{}",
)


def mutated(chance: random.Random, scores: list[int]) -> str:
    """A right reply, spoilt."""
    if chance.random() < 0.2:
        scores = list(scores)
        place = chance.randrange(len(scores))
        change = chance.choice(("drop", "add", "large", "negative"))
        if change == "drop":
            scores.pop(place)
        elif change == "add":
            scores.insert(place, chance.randrange(101))
        else:
            scores[place] = chance.randrange(101, 10**6) * (-1 if change == "negative" else 1)
    text = chance.choice(FORMS).format(str(scores))
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(text) + 1)
        kind = chance.random()
        if kind < 0.35:
            text = text[:at] + text[at + chance.randint(1, 3) :]
        elif kind < 0.7:
            text = text[:at] + chance.choice(PIECES) + text[at:]
        elif kind < 0.8:
            text = text[:at]
        elif kind < 0.9:
            other = chance.randrange(len(text) + 1)
            text = text[: min(at, other)] + text[max(at, other) :] + text[min(at, other) : max(at, other)]
        else:
            text = text[:at] + chr(chance.randrange(0x20, 0x3000)) + text[at + 1 :]
    return text


def check(replies: int, seed: int) -> Counter[str]:
    """Parse them all; returns how many were taken and refused.

    Raises:
        AssertionError: a reply gave something else than n whole numbers in 0..100.
    """
    chance, seen = random.Random(seed), Counter[str]()
    for _ in range(replies):
        scores = [chance.randrange(101) for _ in range(chance.randint(1, 20))]
        reply = mutated(chance, scores)
        try:
            found = parse_scores(reply, len(scores))
        except JudgeError:
            seen["refused"] += 1
        else:
            assert len(found) == len(scores) and all(type(score) is int and 0 <= score <= 100 for score in found), reply
            seen["taken, the right ones" if found == scores else "taken, others"] += 1
        try:
            score = parse_score(reply)
        except JudgeError:
            continue
        assert type(score) is int and 0 <= score <= 100, reply
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seen = check(args.replies, args.seed)
    print(", ".join(f"{name} {count:,}" for name, count in sorted(seen.items())))


if __name__ == "__main__":
    main()
