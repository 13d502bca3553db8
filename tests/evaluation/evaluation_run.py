"""A run folder of the loop with made-up figures: what the report reads, without the hours that make it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from agentic_r_plugin.data.report import BANDS, band
from agentic_r_plugin.evaluation.matrix import cell_name, compare
from agentic_r_plugin.evaluation.provenance import hardware, versions
from agentic_r_plugin.evaluation.statistics import bootstrap_interval
from agentic_r_plugin.records import ScoredPassage, StopReason, Trajectory, Turn
from agentic_r_plugin.store import dump_line, write_json, write_records

QUESTION = "Which river runs through the town where the painter <b>Ada & Lom</b> no. {} was born?"
HOSTILE = "</script><script>document.title = 'taken'</script>"
"""What a model or a page might write to take the report over."""


def write_run(
    folder: Path,
    *,
    num_questions: int = 120,
    agents: Sequence[str] = ("agent-0", "agent-1", "agent-2"),
    retrievers: Sequence[str] = ("retriever-0", "retriever-1", "retriever-2"),
    benchmarks: Sequence[str] = ("fictional_world",),
    seed: int = 0,
) -> Path:
    """A finished run of two iterations."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("out: runs/quickstart\niterations: 2\nprotocol: compact\n")
    for number in (1, 2):
        _iteration(folder / f"iteration-{number}", number, rng)
    _costs(folder / "costs.jsonl")
    cells = [
        (*pair, benchmark) for benchmark in benchmarks for pair in product(enumerate(agents), enumerate(retrievers))
    ]
    _evaluation(folder / "evaluation", num_questions, cells, rng)
    return folder


def _evaluation(
    folder: Path, num_questions: int, cells: Sequence[tuple[tuple[int, str], tuple[int, str], str]], rng: random.Random
) -> None:
    results = []
    difficulty = [rng.random() for _ in range(num_questions)]
    for (a, agent), (r, retriever), benchmark in cells:
        skill = 0.35 + 0.08 * a + 0.11 * r
        rows = [_trajectory(i, difficulty[i] + rng.gauss(0, 0.08) < skill, a, r, rng) for i in range(num_questions)]
        results.append(_cell(folder, agent, retriever, benchmark, rows))
    comparisons = compare(results, folder, level=0.95, resamples=500, seed=0)
    write_json(
        folder / "matrix.json",
        {
            "schema": "evaluation_matrix/1",
            "cells": results,
            "comparisons": comparisons,
            "config": {},
            "versions": versions(),
            "hardware": hardware(),
        },
    )


def _trajectory(i: int, right: bool, agent: int, retriever: int, rng: random.Random) -> Trajectory:
    searches = 2 if right else rng.choice((2, 3, 4))
    turns, text = [], ""
    for turn in range(1, searches + 1):
        town = f"Orlo {i}" if right or turn < searches else "Pell"
        river = f"Awe {i}" if right and turn == searches else "Bure"
        docs = (
            f'Doc 1(Title: "Ada Lom") Ada Lom was born in {town}, a market town.\n'
            f'Doc 2(Title: "{town}") {town} lies on the river {river}.\n'
            'Doc 3(Title: "Bo Rusk") A ‹b>fence‹/b> builder.'
        )
        reasoning, query = f"I must find step {turn}.{HOSTILE}", f"Ada Lom birth town {turn}"
        text += f"<think>{reasoning}</think>\n<search> {query} </search>\n\n<information>{docs}</information>\n\n"
        passages = tuple(ScoredPassage(id=f"p{i}-{turn}-{k}", score=1.0 - k / 10) for k in range(3))
        turns.append(Turn(turn=turn, reasoning=reasoning, query=query, passages=passages))
    malformed = int(not right and i % 7 == 0)
    if malformed:
        text += "I think it is the\n\nInvalid.\n\n"
    answer = f"Awe {i}" if right else rng.choice(("Bure", None))
    text += f"<think>So it is found.</think>\n<answer> {answer} </answer>" if answer else "<think>Hm"
    return Trajectory(
        id=f"q{i}",
        question=QUESTION.format(i),
        golden_answers=(f"Awe {i}",),
        turns=tuple(turns),
        answer=answer,
        stop_reason=StopReason.ANSWERED if answer else StopReason.MAX_TOKENS,
        em=int(right),
        f1=float(right),
        text=text,
        malformed_turns=malformed,
        generated_tokens=40 * searches,
    )


def _cell(folder: Path, agent: str, retriever: str, benchmark: str, rows: list[Trajectory]) -> dict[str, Any]:
    scores: dict[str, list[float]] = {
        "agentic_em": [float(row.em) for row in rows],
        "agentic_f1": [row.f1 for row in rows],
        "search_turns": [float(len(row.turns)) for row in rows],
        "answer_recall_at_3": [float(row.em or i % 4 == 0) for i, row in enumerate(rows)],
        "gold_document_recall": [0.5 + row.em / 2 for row in rows],
        "gold_document_recall_at_20": [1.0 for _ in rows],
        "generated_tokens": [float(row.generated_tokens) for row in rows],
    }
    metrics: dict[str, Any] = {
        name: asdict(bootstrap_interval(values, resamples=500)) for name, values in scores.items()
    }
    metrics["malformed_share"] = {"mean": sum(row.malformed_turns for row in rows) / 400}
    result = {
        "schema": "evaluation/1",
        "agent": agent,
        "retriever": retriever,
        "benchmark": benchmark,
        "split": "test",
        "num_questions": len(rows),
        "sample": "all",
        "seed": 0,
        "protocol": "compact",
        "limits": {"max_searches": 5},
        "topk": 3,
        "metrics": metrics,
        "stop_reasons": {"answered": len(rows)},
        "breakdown": {
            "hops": {
                str(hops): {
                    "num_questions": 40,
                    "em": metrics["agentic_em"]["mean"] ** hops,
                    "search_turns": hops + 0.2,
                }
                for hops in (1, 2, 3)
            }
        },
        "by_turn": [
            {"turn": turn, "answer_recall_so_far": (turn > 1) * metrics["agentic_em"]["mean"]} for turn in (1, 2)
        ],
        "made_from": {},
        "cost": {},
        "agent_fingerprint": "0123456789abcdef",
        "search_fingerprint": "fedcba9876543210",
    }
    home = folder / cell_name(result)
    write_records(home / "per_question.jsonl", rows)
    write_json(home / "scores.json", {"id": [row.id for row in rows], **scores})
    write_json(home / "result.json", result)
    return result


def _iteration(folder: Path, number: int, rng: random.Random) -> None:
    (folder / "agent").mkdir(parents=True)
    (folder / "data").mkdir()
    (folder / "retriever").mkdir()
    steps: list[dict[str, float]] = [{"step": 0, "val-core/dev/acc/mean@1": 0.3 + 0.1 * number}]
    for step in range(1, 41):
        em = 0.25 + 0.1 * number + 0.2 * (1 - math.exp(-step / 15)) + rng.gauss(0, 0.05)
        steps.append(
            {
                "step": step,
                "agentic_r/em": em,
                "critic/score/mean": em,
                "critic/rewards/mean": em - 0.02,
                "agentic_r/search_turns": 2.6 - step / 80 + rng.gauss(0, 0.1),
                "agentic_r/malformed_turns": max(0.0, 0.3 - step / 100 + rng.gauss(0, 0.03)),
                "agentic_r/masked_token_share": 0.82,
                "actor/entropy": 0.5 * math.exp(-step / 40) + rng.gauss(0, 0.01),
                "actor/ppo_kl": abs(rng.gauss(0, 0.002)) + step * 1e-4,
                "critic/vf_loss": 0.2 * math.exp(-step / 10) + abs(rng.gauss(0, 0.01)),
            }
        )
        if step % 20 == 0:
            steps[-1]["val-core/dev/acc/mean@1"] = 0.35 + 0.1 * number + step / 300
    (folder / "agent" / "metrics.jsonl").write_bytes(b"".join(map(dump_line, steps)))
    losses = [{"step": step, "loss": 2.2 * math.exp(-step / 12) + abs(rng.gauss(0, 0.08))} for step in range(1, 31)]
    (folder / "retriever" / "metrics.jsonl").write_bytes(b"".join(map(dump_line, losses)))
    _stages(folder / "data", number, rng)


def _stages(folder: Path, number: int, rng: random.Random) -> None:
    for name, read, kept in (
        ("trajectories", 400, 400),
        ("candidates", 400, 391),
        ("relevance", 905, 905),
        ("correctness", 905, 700),
        ("groups", 905, 430 + 90 * number),
    ):
        dropped = {"no_positive": read - kept} if read != kept else {}
        report = {"stage": name, "read": read, "kept": kept, "records": kept, "dropped": dropped, "errors": 0}
        write_json(folder / f"{name}.jsonl.report.json", report | {"seconds": 12.5, "rollouts": 1200, "searches": 900})
    shares = {str(turn): 0.6 - 0.05 * turn - 0.05 * (2 - number) for turn in (1, 2, 3)}
    candidates = {name: {"rolled_out": 0, "correct": 0} for name in BANDS}
    for _ in range(100):
        for score in [rng.randrange(101) for _ in range(5)]:
            candidates[band(score)]["rolled_out"] += 1
            candidates[band(score)]["correct"] += rng.random() < score / 120
    write_json(folder / "data_report.json", {"share_with_positive_by_turn": shares, "candidates": candidates})


def _costs(file: Path) -> None:
    lines: list[dict[str, Any]] = [{"iteration": 0, "phase": "world", "seconds": 4.1}]
    lines.append({"iteration": 0, "phase": "index", "seconds": 48.0})
    for number in (1, 2):
        for phase, seconds in (("train-agent", 310.0), ("trajectories", 31.0), ("correctness", 95.5), ("groups", 0.3)):
            work = {"rollouts": 1280, "searches": 2900, "generated_tokens": 91_000} if phase != "groups" else {}
            lines.append({"iteration": number, "phase": phase, "seconds": seconds * number} | work)
    lines.append({"iteration": 2, "phase": "evaluate", "seconds": 74.0})
    file.write_bytes(b"".join(map(dump_line, lines)))
