"""Opens vLLM's engine on an agent, answers questions, and holds the engine open: `opener.py WORLD AGENT OUT`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from agentic_r_plugin import components
from agentic_r_plugin.backends import LLMSpec, SearchSpec, open_llm, open_search
from agentic_r_plugin.data.trajectories import answer_questions
from agentic_r_plugin.llm.base import Sampling
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Question, Trajectory
from agentic_r_plugin.store import read_records, write_records

LIMITS = Limits(max_searches=3, max_malformed=2, max_tokens=1200, max_response_tokens=64, max_observation_tokens=300)
ENGINE = {"enforce_eager": True, "max_model_len": 1280}


def answer(world: Path, llm: LLMSpec, out: Path, *, hold_s: float = 0.0) -> None:
    """Write the greedy trajectories of all test questions, then hold the model open."""
    with open_llm(llm) as model, open_search(SearchSpec(backend="bm25", corpus=str(world / "corpus.jsonl"))) as search:
        protocol = components.load("agent_protocol", "compact")
        found = answer_questions(
            read_records(world / "test.jsonl", Question), model, search, protocol=protocol, limits=LIMITS,
            sampling=Sampling(),
        )  # fmt: skip
        write_records(out, [record for record in found if isinstance(record, Trajectory)])
        time.sleep(hold_s)


if __name__ == "__main__":
    answer(
        Path(sys.argv[1]),
        LLMSpec(backend="vllm", model=sys.argv[2], dtype="float32", options=ENGINE),
        Path(sys.argv[3]),
        hold_s=3600,
    )
