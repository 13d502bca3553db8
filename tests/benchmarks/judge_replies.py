"""Mutated judge replies: every one gives exactly n whole numbers in 0..100, or is a judge error. Nothing else, ever.

    python tests/benchmarks/judge_replies.py [--replies 100000] [--thoughts 1000] [--seed 0]

A reply is a right one for 1 to 20 passages (bare, fenced, or in a sentence) with one to six mutations of characters, of
numbers and of structure. Replies with thoughts are right ones after a thought that holds drafts of the same length,
closed in the manner of several models: they must give the reply's scores, not the draft's; cut anywhere within the
thought they must be judge errors. Prints how many were taken and refused; fails at the first that is neither.
"""

from __future__ import annotations

import argparse
import json
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


THOUGHTS = (
    ("<think>", "</think>"), ("", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)  # fmt: skip


def check_thoughts(replies: int, seed: int) -> Counter[str]:
    """Parse right replies after thoughts, whole and cut within the thought; returns how many were taken and refused.

    Raises:
        AssertionError: a whole reply did not give its scores, or a cut one gave any.
    """
    chance, seen = random.Random(seed), Counter[str]()
    for _ in range(replies):
        scores = [chance.randrange(101) for _ in range(chance.randint(1, 20))]
        draft = str([chance.randrange(101) for _ in scores])
        opening, closing = chance.choice(THOUGHTS)
        thought = f"Passage [1] is near. {draft}? " * chance.randint(1, 3)
        written = [chance.choice((score, float(score), str(score))) for score in scores]
        reply = f"{opening}{thought}{closing}\n{chance.choice(FORMS[:3]).format(json.dumps(written))}"
        found = parse_scores(reply, len(scores))
        assert found == scores and all(type(score) is int for score in found), reply
        seen["taken, the right ones"] += 1
        if not opening:
            continue  # a cut reply without any tag can only be found by what the server says
        cut = reply[: chance.randrange(len(opening), len(opening) + len(thought))]
        try:
            raise AssertionError(f"{cut!r} gave {parse_scores(cut, len(scores))}")
        except JudgeError:
            seen["refused"] += 1
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--thoughts", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for what, seen in (
        ("mutated", check(args.replies, args.seed)),
        ("with thoughts", check_thoughts(args.thoughts, args.seed)),
    ):
        print(f"{what}:", ", ".join(f"{name} {count:,}" for name, count in sorted(seen.items())))


if __name__ == "__main__":
    main()
