"""The paper's figures, against the averages that it reports itself."""

from __future__ import annotations

import pytest

from agentic_r_plugin.report.paper import BENCHMARKS, EM

AVERAGES = {
    ("agentic_r", "e5"): 41.74,
    ("agentic_r", "replug"): 41.78,
    ("agentic_r", "agentic_r"): 45.00,
    ("r1_searcher", "e5"): 41.67,
    ("r1_searcher", "agentic_r"): 43.64,
    ("simple_deep_searcher", "e5"): 37.17,
    ("simple_deep_searcher", "agentic_r"): 39.43,
}


@pytest.mark.parametrize(("pair", "average"), AVERAGES.items())
def test_the_rows_give_the_averages_that_the_paper_prints(pair: tuple[str, str], average: float) -> None:
    row = {benchmark: em for (agent, retriever, benchmark), em in EM.items() if (agent, retriever) == pair}
    assert list(row) == [benchmark.name for benchmark in BENCHMARKS]
    assert sum(row.values()) / len(row) == pytest.approx(average, abs=0.005)


def test_every_row_belongs_to_one_of_these_pairs() -> None:
    assert {(agent, retriever) for agent, retriever, _ in EM} == set(AVERAGES)
