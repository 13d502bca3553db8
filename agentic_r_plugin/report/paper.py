"""The paper's results (arXiv 2601.11888, Findings of ACL 2026), for comparison in reports.

Exact match is in per cent. The paper gives neither seeds nor intervals. Bamboogle has 125 questions, so one question is
worth 0.8 points.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One of the paper's seven test sets, under FlashRAG's name for it."""

    name: str
    split: str
    num_questions: int


BENCHMARKS = (
    Benchmark(name="hotpotqa", split="dev", num_questions=7405),
    Benchmark(name="2wikimultihopqa", split="dev", num_questions=12576),
    Benchmark(name="musique", split="dev", num_questions=2417),
    Benchmark(name="bamboogle", split="test", num_questions=125),
    Benchmark(name="nq", split="test", num_questions=3610),
    Benchmark(name="triviaqa", split="test", num_questions=11313),
    Benchmark(name="popqa", split="test", num_questions=14267),
)
"""In the order of the paper's tables."""

_EM = {
    ("agentic_r", "e5"): (41.68, 40.02, 17.74, 44.00, 42.18, 64.72, 41.82),
    ("agentic_r", "replug"): (42.63, 40.23, 18.90, 41.60, 41.46, 65.78, 41.85),
    ("agentic_r", "agentic_r"): (45.82, 45.30, 20.27, 48.00, 42.43, 69.02, 44.14),
    ("r1_searcher", "e5"): (43.56, 46.33, 21.39, 44.00, 39.39, 58.69, 38.31),
    ("r1_searcher", "agentic_r"): (47.68, 49.07, 22.54, 41.60, 39.63, 62.52, 42.43),
    ("simple_deep_searcher", "e5"): (36.61, 34.01, 15.55, 40.80, 33.65, 62.48, 37.09),
    ("simple_deep_searcher", "agentic_r"): (39.75, 38.04, 17.29, 41.60, 34.62, 65.61, 39.09),
}

EM = {(*pair, benchmark.name): em for pair, row in _EM.items() for benchmark, em in zip(BENCHMARKS, row, strict=True)}
"""(agent, retriever, benchmark) -> exact match in per cent: the paper's main table. `agentic_r` is its own agent."""

SEARCH_TURNS = {
    ("agentic_r", retriever, benchmark): turns
    for benchmark, row in {"hotpotqa": (2.36, 2.32, 2.11), "triviaqa": (1.72, 1.70, 1.45)}.items()
    for retriever, turns in zip(("e5", "replug", "agentic_r"), row, strict=True)
}
"""(agent, retriever, benchmark) -> searches per question."""
