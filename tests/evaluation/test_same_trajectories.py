"""One agent, one protocol: verl's loop, the data stage and the FlashRAG pipeline give the same trajectories.

Greedy on the CPU, with the quick start's agent and MiniLM on generated text. Each way batches in its own manner: verl's
rollout engine as requests come in, the data stage three questions at a time, the pipeline five; the first two search
through the retrieval service, the third in its own process.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from agentic_r_plugin import components
from agentic_r_plugin.agent.cpu.rollout import HFServer
from agentic_r_plugin.agent.dataset import SourcedQuestion, verl_row
from agentic_r_plugin.config import load_config, to_dict
from agentic_r_plugin.data import trajectories
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline, load_split
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import CorpusLine, Question, StopReason, Trajectory
from agentic_r_plugin.search.index import IndexConfig, build_index
from agentic_r_plugin.search.server import ServeConfig, running_service
from agentic_r_plugin.store import read_records, write_records
from agentic_r_plugin.world.generate import WorldConfig, build_world
from tests.agent.test_agent_loop import make_loop
from tests.evaluation.evaluation_toy import flashrag_config

AGENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "agent"
LIMITS = Limits(max_searches=3, max_malformed=1, max_tokens=900, max_response_tokens=48, max_observation_tokens=240)
NUM_QUESTIONS, NUM_PASSAGES = 6, 60


def write_benchmark(home: Path) -> list[Question]:
    """A few questions of a generated world, among the passages that answer them and others."""
    world = build_world(WorldConfig(people=40, works=24, companies=8, schools=8, prizes=6, towns=14, rivers=6))
    questions = list(world.questions["test"][:NUM_QUESTIONS])
    gold = {name for question in questions for name in question.metadata["gold_doc_ids"]}
    ordered = sorted(world.passages, key=lambda passage: passage.id not in gold)[:NUM_PASSAGES]
    write_records(home / "corpus.jsonl", (CorpusLine(id=each.id, contents=each.contents) for each in ordered))
    write_records(home / "test.jsonl", questions)
    return questions


def through_verl(questions: list[Question], url: str) -> list[Trajectory]:
    """verl's agent loop on verl's rollout engine of this package, all questions at the same time."""
    tokenizer = AutoTokenizer.from_pretrained(AGENT)
    model = SimpleNamespace(
        local_path=str(AGENT), hf_config=AutoConfig.from_pretrained(AGENT), tokenizer=tokenizer, trust_remote_code=False
    )
    lengths = {"prompt_length": 300, "response_length": 600, "max_model_len": None}
    engine = HFServer(SimpleNamespace(engine_kwargs={}, dtype="float32", seed=0, **lengths), model, 0)
    protocol = components.load("agent_protocol", "compact")
    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "logprobs": True}

    async def answer(index: int, question: Question) -> Any:
        row = verl_row(SourcedQuestion(question=question, source="world"), index, protocol)
        loop = make_loop(tokenizer, engine, url, limits=vars(LIMITS), topk=2)
        return await loop.run(dict(sampling), **row, raw_prompt=row["prompt"], uid=str(index), session_id=0)

    async def main() -> list[Any]:
        return await asyncio.gather(*(answer(index, question) for index, question in enumerate(questions)))

    return [Trajectory.from_dict(output.extra_fields["trajectory"]) for output in asyncio.run(main())]


def through_the_data_stage(home: Path, url: str) -> list[Trajectory]:
    settings = {
        "in_": str(home / "test.jsonl"),
        "out": str(home / "trajectories.jsonl"),
        "llm": {"model": str(AGENT), "device": "cpu"},
        "search": {"backend": "service", "url": url},
        "batch_size": 3,
    }
    shown = {"protocol": "compact", "limits": to_dict(LIMITS), "topk": 2}
    trajectories.run(load_config(trajectories.TrajectoriesConfig, values=settings | shown))
    return list(read_records(home / "trajectories.jsonl", Trajectory))


def through_flashrag(home: Path, index: Path) -> list[Trajectory]:
    settings = {
        "agent": {"model": str(AGENT), "device": "cpu"},
        "search": {"index": str(index), "device": "cpu"},
        "batch_size": 5,
    }
    shown = {"protocol": "compact", "limits": to_dict(LIMITS), "topk": 2}
    config = flashrag_config(home.parent, dataset_name=home.name, agentic_r=settings | shown)
    pipeline = AgenticSearchPipeline(config)
    try:
        return [Trajectory.from_dict(item.trajectory) for item in pipeline.run(load_split(config, "test"))]
    finally:
        pipeline.close()


def test_the_same_agent_gives_the_same_trajectories_in_training_data_construction_and_evaluation(
    tmp_path: Path,
) -> None:
    home, index = tmp_path / "world", tmp_path / "index"
    questions = write_benchmark(home)
    build_index(
        IndexConfig(corpus=str(home / "corpus.jsonl"), retriever="builtin:minilm", out=str(index), device="cpu")
    )
    with running_service(ServeConfig(index=str(index), port=0)) as url:
        in_verl, in_stage = through_verl(questions, url), through_the_data_stage(home, url)
    in_flashrag = through_flashrag(home, index)
    for question, first, second, third in zip(questions, in_verl, in_stage, in_flashrag, strict=True):
        assert first.id == question.id
        assert first.text == second.text == third.text
        for record in (first, second, third):
            assert _without_scores(record) == _without_scores(first)
    assert sum(len(record.turns) for record in in_stage) > NUM_QUESTIONS
    assert any(record.stop_reason is StopReason.ANSWERED for record in in_stage)


def _without_scores(record: Trajectory) -> dict[str, Any]:
    """The record; of a passage only its id, since one query and a batch of them round the last bit differently."""
    data = record.to_dict()
    data["turns"] = [turn | {"passages": [passage["id"] for passage in turn["passages"]]} for turn in data["turns"]]
    return data
