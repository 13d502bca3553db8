"""Forecast the cost of a loop before it starts: rollouts, tokens, GPU hours, from assumptions (`iterate --dry-run`).

Nothing here is measured. Every number that the forecast depends on is a field of `PlanConfig` and is printed with it.
Take numbers that depend on data (queries per question, candidates left after pruning, tokens) from a stage's own
forecast on a sample (`runner.forecast=200`), and the throughputs from the machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

from agentic_r_plugin.loop.phases import Phases
from agentic_r_plugin.loop.settings import PlanConfig
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.search.corpus import count_lines


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of one iteration, from the loop's configuration."""

    questions: int
    passages: int
    ppo_steps: int
    ppo_batch: int
    topk: int = 3
    candidates: int = 20
    window: int = 20
    """Passages per judge prompt; 0 if no language model judges."""
    sub_answers: bool = False
    exhaustive: bool = False
    epochs: int = 2
    left_out: frozenset[str] = frozenset()
    """Phases that the loop does not have."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Forecast of one phase of one iteration."""

    name: str
    units: int
    what: str
    rollouts: int = 0
    prompt_tokens: int = 0
    """Computed prompt tokens, without cached ones."""
    generated_tokens: int = 0
    gpu_hours: float = 0.0


def forecast(phases: Phases) -> str:
    """Forecast of the cost of a loop, from the assumptions in its settings (`plan`)."""
    config, planned = phases.config, phases.planned
    relevance, correctness = planned.get("relevance"), planned.get("correctness")
    train = Path(phases.questions(config.train_split))
    questions = config.plan.train_questions
    if not questions and train.is_file():
        questions = sum(1 for _ in read_questions(train, format=config.format))
    first = Scale(
        questions=planned["trajectories"].num_questions or questions,
        passages=config.plan.corpus_passages or count_lines(phases.corpus),
        ppo_steps=0,
        ppo_batch=0,
        topk=config.topk,
        candidates=planned["candidates"].topk,
        window=relevance.passages_per_prompt() if relevance is not None else 0,
        sub_answers=config.judge,
        exhaustive=correctness is not None and correctness.exhaustive,
        left_out=frozenset({"relevance", "correctness"} - planned.keys()),
        epochs=planned["train_retriever"].epochs,
    )
    ppo = [planned["train_agent"], *[planned["train_agent_later"]] * (config.iterations - 1)]
    scales = [
        replace(first, ppo_steps=each.steps if config.train_agents else 0, ppo_batch=each.batch_size * each.samples)
        for each in ppo
    ]
    return table(scales, config.plan)


def phases_of(scale: Scale, plan: PlanConfig) -> Iterator[Phase]:
    """The phases of one iteration, in order."""
    return (phase for phase in _all_phases(scale, plan) if phase.name not in scale.left_out)


def _all_phases(scale: Scale, plan: PlanConfig) -> Iterator[Phase]:
    queries = round(scale.questions * plan.queries_per_question)
    turns = plan.queries_per_question + 1  # the last turn gives the answer
    yield Phase(
        name="train-agent",
        units=scale.ppo_steps,
        what="steps",
        rollouts=scale.ppo_steps * scale.ppo_batch,
        gpu_hours=scale.ppo_steps * plan.ppo_step_s * plan.gpus / 3600,
    )
    yield _rollouts("trajectories", scale.questions, "questions", scale.questions, turns, plan)
    yield Phase(name="candidates", units=queries, what="queries")
    if scale.sub_answers:
        # The judge reads the whole trajectory, with the passages of every turn; 300 tokens for the rest of the prompt.
        prompt = round(turns * (plan.turn_generated_tokens + scale.topk * plan.passage_tokens)) + 300
        yield _judge("sub-answers", scale.questions, "questions", scale.questions, prompt, plan)
    if scale.window:
        calls = queries * math.ceil(scale.candidates / scale.window)
        prompt = 350 + min(scale.candidates, scale.window) * plan.passage_tokens  # 350: without the passages
        yield _judge("relevance", queries, "queries", calls, prompt, plan)
    else:
        yield Phase(name="relevance", units=queries, what="queries")
    per_query = scale.candidates if scale.exhaustive else min(plan.rollouts_per_query, scale.candidates)
    yield _rollouts("correctness", queries, "queries", round(queries * per_query), plan.calls_per_rollout, plan)
    groups = round(queries * plan.positive_share)
    yield Phase(name="groups", units=groups, what="groups")
    yield Phase(
        name="train-retriever",
        units=groups * scale.epochs,
        what="groups",
        gpu_hours=groups * scale.epochs / plan.trained_groups_per_s / 3600,
    )
    yield _index(scale, plan)


def _index(scale: Scale, plan: PlanConfig) -> Phase:
    hours = scale.passages / plan.encoded_passages_per_s / 3600
    return Phase(name="index", units=scale.passages, what="passages", gpu_hours=hours)


def _rollouts(name: str, units: int, what: str, rollouts: int, calls: float, plan: PlanConfig) -> Phase:
    prompt = round(rollouts * calls * plan.turn_prompt_tokens * (1 - plan.turn_cached_share))
    generated = round(rollouts * calls * plan.turn_generated_tokens)
    seconds = prompt / plan.agent_prompt_tokens_per_s + generated / plan.agent_generated_tokens_per_s
    return Phase(
        name=name, units=units, what=what, rollouts=rollouts, prompt_tokens=prompt, generated_tokens=generated,
        gpu_hours=seconds * plan.agent_gpus / 3600,
    )  # fmt: skip


def _judge(name: str, units: int, what: str, calls: int, prompt: int, plan: PlanConfig) -> Phase:
    generated = calls * plan.judge_generated_tokens
    seconds = calls * prompt / plan.judge_prompt_tokens_per_s + generated / plan.judge_generated_tokens_per_s
    return Phase(
        name=name, units=units, what=what, prompt_tokens=calls * prompt, generated_tokens=generated,
        gpu_hours=seconds * plan.judge_gpus / 3600,
    )  # fmt: skip


def table(scales: Sequence[Scale], plan: PlanConfig) -> str:
    """The forecast as readable text, with its assumptions and the cost of the exhaustive job.

    Args:
        scales: one per iteration, in order.
    """
    first, *_ = scales
    found = list(phases_of(first, plan))
    rows = [
        f"{phase.name:16}{phase.units:>12,} {phase.what:10}{phase.rollouts:>12,}{_millions(phase.prompt_tokens)}"
        f"{_millions(phase.generated_tokens)}{phase.gpu_hours:>11,.1f}"
        for phase in found
    ]
    hours = [sum(phase.gpu_hours for phase in phases_of(scale, plan)) for scale in scales]
    in_all = sum(hours) + _index(first, plan).gpu_hours  # plus the index of the first retriever, before iteration 1
    exhaustive = [phase for phase in phases_of(replace(first, exhaustive=True), plan) if phase.name == "correctness"]
    data = sum(phase.gpu_hours for phase in found if phase.name not in ("train-agent", "train-retriever", "index"))
    lines = [
        "Forecast of iteration 1, from assumptions, not measured:",
        f"{'phase':16}{'units':>12} {'':10}{'rollouts':>12}{'prompt M':>12}{'written M':>12}{'GPU hours':>11}",
        *rows,
        f"Iteration 1: {hours[0]:,.1f} GPU hours, {hours[0] / plan.gpus:,.1f} hours on {plan.gpus} GPUs if all are "
        f"busy; data construction {data:,.1f} of them.",
        *_later(scales, hours),
        f"All {len(scales)}, with the index before them: {in_all:,.1f} GPU hours, without evaluation.",
        *(
            f"Correctness without pruning: {phase.rollouts:,} rollouts, {phase.generated_tokens / 1e6:,.0f} M "
            f"tokens written, {phase.gpu_hours:,.0f} GPU hours."
            for phase in exhaustive
        ),
        "Assumptions (plan.*): " + ", ".join(f"{name}={value:g}" for name, value in asdict(plan).items()),
    ]
    return "\n".join(lines)


def _later(scales: Sequence[Scale], hours: Sequence[float]) -> Iterator[str]:
    """Lines on iterations whose PPO differs in size from the iteration before; nothing else changes between them."""
    for number, (before, now) in enumerate(pairwise(scales), start=2):
        if now != before:
            yield (
                f"From iteration {number} on: train-agent {now.ppo_steps:,} steps, "
                f"{now.ppo_steps * now.ppo_batch:,} rollouts; {hours[number - 1]:,.1f} GPU hours an iteration."
            )


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:>12,.1f}"
