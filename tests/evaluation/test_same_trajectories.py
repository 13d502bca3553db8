"""One agent, one protocol: verl's loop, the data stage and the FlashRAG pipeline give the same trajectories.

Greedy in float32 on the CPU, with the quick start's agent and MiniLM on generated text (a barely trained agent has
near ties, which bfloat16 decides otherwise). Each way batches in its own manner: verl's
rollout engine as requests come in, the data stage three questions at a time, the pipeline five; the first two search
through the retrieval service, the third in its own process.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer
from verl.workers.rollout.replica import TokenOutput

from agentic_r_plugin.agent.cpu.rollout import HFServer
from agentic_r_plugin.agent.dataset import SourcedQuestion, verl_row
from agentic_r_plugin.config import load_config, to_dict
from agentic_r_plugin.data import trajectories
from agentic_r_plugin.evaluation.generator import AgenticGenerator
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline, load_split
from agentic_r_plugin.evaluation.retriever import AgenticRetriever
from agentic_r_plugin.iterate import IterateConfig
from agentic_r_plugin.llm.base import Completion
from agentic_r_plugin.protocol import Limits, load_protocol
from agentic_r_plugin.records import CorpusLine, Question, StopReason, Trajectory
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.indexing.index import run as build_index
from agentic_r_plugin.search.service.server import ServeConfig, running_service
from agentic_r_plugin.store import read_records, write_records
from agentic_r_plugin.world.generate import WorldConfig, build_world
from recipes.quickstart.warm_start import train
from recipes.quickstart.warm_start.train import WarmStartConfig
from tests import chat_templates
from tests.agent.test_agent_loop import make_loop
from tests.evaluation.evaluation_toy import flashrag_config
from tests.search import loopback

RECIPES = Path(__file__).parents[2] / "recipes"
AGENT, TOOL_CALLS = RECIPES / "quickstart" / "agent", RECIPES / "tool_calls"
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


def write_tool_agent(folder: Path) -> Path:
    """The agent of recipes/tool_calls after a few steps of its warm start."""
    warm_start = load_config(WarmStartConfig, TOOL_CALLS / "warm_start.yaml")
    train.run(replace(warm_start, init=str(AGENT), out=str(folder), worlds=3))
    return folder


def through_verl(agent: Path, shown: dict[str, Any], questions: list[Question], url: str) -> list[Any]:
    """verl's agent loop on verl's rollout engine of this package, all questions at the same time."""
    tokenizer = AutoTokenizer.from_pretrained(agent)
    model = SimpleNamespace(
        local_path=str(agent), hf_config=AutoConfig.from_pretrained(agent), tokenizer=tokenizer, trust_remote_code=False
    )
    lengths = {"prompt_length": 300, "response_length": 600, "max_model_len": None}
    engine = HFServer(SimpleNamespace(engine_kwargs={}, dtype="float32", seed=0, **lengths), model, 0)
    protocol = load_protocol(shown["protocol"], shown["protocol_options"])
    sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "logprobs": True}

    async def answer(index: int, question: Question) -> Any:
        row = verl_row(SourcedQuestion(record=question, source="world"), index, protocol)
        loop = make_loop(tokenizer, engine, url, **shown)
        return await loop.run(dict(sampling), **row, raw_prompt=row["prompt"], uid=str(index), session_id=0)

    async def main() -> list[Any]:
        return await asyncio.gather(*(answer(index, question) for index, question in enumerate(questions)))

    return asyncio.run(main())


def through_the_data_stage(agent: Path, shown: dict[str, Any], home: Path, url: str) -> list[Trajectory]:
    settings = {
        "in_": str(home / "test.jsonl"),
        "out": str(home / "trajectories.jsonl"),
        "llm": {"model": str(agent), "device": "cpu", "dtype": "float32"},
        "search": {"backend": "service", "url": url},
        "batch_size": 3,
    }
    trajectories.run(load_config(trajectories.TrajectoriesConfig, values=settings | shown))
    return list(read_records(home / "trajectories.jsonl", Trajectory))


def through_flashrag(agent: Path, shown: dict[str, Any], home: Path, index: Path) -> list[Trajectory]:
    settings = {
        "agent": {"model": str(agent), "device": "cpu", "dtype": "float32"},
        "search": {"index": str(index), "device": "cpu"},
        "batch_size": 5,
    }
    config = flashrag_config(home.parent, dataset_name=home.name, agentic_r=settings | shown)
    pipeline = AgenticSearchPipeline(config)
    try:
        return [Trajectory.from_dict(item.trajectory) for item in pipeline.run(load_split(config, "test"))]
    finally:
        pipeline.close()


@pytest.mark.parametrize("protocol", ["compact", "tool_calls"])
def test_the_same_agent_gives_the_same_trajectories_in_training_data_construction_and_evaluation(
    tmp_path: Path, protocol: str
) -> None:
    shown = {"protocol": protocol, "protocol_options": {}, "limits": to_dict(LIMITS), "topk": 2}
    agent = AGENT
    if protocol == "tool_calls":
        agent = write_tool_agent(tmp_path / "agent")
        shown["protocol_options"] = load_config(IterateConfig, TOOL_CALLS / "loop.yaml", ["agent=x"]).protocol_options
    home, index = tmp_path / "world", tmp_path / "index"
    questions = write_benchmark(home)
    build_index(
        IndexConfig(corpus=str(home / "corpus.jsonl"), retriever="builtin:minilm", out=str(index), device="cpu")
    )
    with running_service(ServeConfig(index=str(index), port=0)) as url:
        outputs = through_verl(agent, shown, questions, url)
        in_stage = through_the_data_stage(agent, shown, home, url)
    in_verl = [Trajectory.from_dict(output.extra_fields["trajectory"]) for output in outputs]
    in_flashrag = through_flashrag(agent, shown, home, index)
    for question, first, second, third in zip(questions, in_verl, in_stage, in_flashrag, strict=True):
        assert first.id == question.id
        assert first.text == second.text == third.text
        for record in (first, second, third):
            assert _without_scores(record) == _without_scores(first)
    assert sum(len(record.turns) for record in in_stage) > NUM_QUESTIONS
    assert any(record.stop_reason is StopReason.ANSWERED for record in in_stage)
    for record, output in zip(in_stage, outputs, strict=True):
        assert sum(output.response_mask) == record.generated_tokens and output.response_mask[-1] == 1


def _without_scores(record: Trajectory) -> dict[str, Any]:
    """The record; of a passage only its id, since one query and a batch of them round the last bit differently."""
    data = record.to_dict()
    data["turns"] = [turn | {"passages": [passage["id"] for passage in turn["passages"]]} for turn in data["turns"]]
    return data


# --- Tool calls, by a script ------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"tools": ["search", "open"], "template_arguments": {"enable_thinking": False}}
TOOL_LIMITS = Limits(max_searches=3, max_malformed=1, max_tokens=3000, max_response_tokens=300)
SCRIPTS = {
    "Who is Ann?": ["<think>two</think>" + "CALL(a)CALL(b)<|im_end|>", "OPEN(2)", "<answer>Ann</answer><|im_end|>"],
    "Who is Bob?": ["<tool_call>{</tool_call><|im_end|>", "CALL(c)<|im_end|>", "<answer>Bob"],
    "Who is Cat?": ["CALL(a)CALL(b)", "CALL(c)CALL(d)<|im_end|>"],
}


class ToolAgent:
    """Writes the turns of its scripts, for verl's loop and for the batches of the other drivers."""

    def __init__(self) -> None:
        self.codec, self.name = chat_templates.codec("qwen3"), "vllm"

    def turn(self, prompt_ids: Sequence[int]) -> list[int]:
        prompt = self.codec.decode(prompt_ids)
        script = next(turns for question, turns in SCRIPTS.items() if question in prompt)
        text = script[prompt.count("<|im_start|>assistant\n") - 1]
        call = '<tool_call>\n{{"name": "{}", "arguments": {{"{}": "\\1"}}}}\n</tool_call>'
        text = re.sub(r"CALL\((\w)\)", call.format("search", "query"), text)
        return self.codec.encode(re.sub(r"OPEN\((\w)\)", call.format("open", "id"), text))

    def generate(self, *args: Any, **request: Any) -> Any:
        if request:  # verl's client
            return self._for_verl(request["prompt_ids"])
        return [Completion(token_ids=tuple(self.turn(r.prompt_ids)), prompt_tokens=len(r.prompt_ids)) for r in args[0]]

    async def _for_verl(self, prompt_ids: list[int]) -> TokenOutput:
        ids = self.turn(prompt_ids)
        return TokenOutput(token_ids=ids, log_probs=[0.0] * len(ids))

    def fingerprint(self) -> str:
        return "scripted"

    def close(self) -> None:
        pass


def test_tool_calls_give_the_same_trajectories_and_masks_in_training_data_construction_and_evaluation(
    tmp_path: Path,
) -> None:
    questions = [Question(id=f"q{i}", question=text, golden_answers=("Ann",)) for i, text in enumerate(SCRIPTS)]
    protocol, agent, backend = load_protocol("tool_calls", OPTIONS), ToolAgent(), loopback.EchoBackend()
    with loopback.serving(backend) as url:
        outputs = [asyncio.run(_in_loop(agent, url, index, question)) for index, question in enumerate(questions)]
    in_verl = [Trajectory.from_dict(output.extra_fields["trajectory"]) for output in outputs]
    in_stage = list(
        trajectories.answer_questions(questions, agent, backend, protocol=protocol, limits=TOOL_LIMITS, topk=2)  # type: ignore[arg-type]
    )
    write_records(tmp_path / "toy" / "test.jsonl", questions)
    settings = {"protocol": "tool_calls", "protocol_options": OPTIONS, "limits": vars(TOOL_LIMITS), "topk": 2}
    config = flashrag_config(tmp_path, dataset_name="toy", agentic_r=settings | {"depth": 0})
    pipeline = AgenticSearchPipeline(
        config,
        retriever=AgenticRetriever(backend),  # type: ignore[arg-type]
        generator=AgenticGenerator(agent),  # type: ignore[arg-type]
    )
    in_flashrag = [Trajectory.from_dict(item.trajectory) for item in pipeline.run(load_split(config, "test"))]
    assert in_verl == in_stage == in_flashrag
    assert [record.stop_reason.value for record in in_stage if isinstance(record, Trajectory)] == [
        "answered", "malformed", "max_turns",
    ]  # fmt: skip
    for record, output in zip(in_verl, outputs, strict=True):
        runs = [list(group) for _, group in groupby(output.response_mask)]
        assert [group[0] for group in runs] == [1 - i % 2 for i in range(len(record.runs))]
        texts = iter(output.response_ids)
        decoded = [agent.codec.decode([next(texts) for _ in group]) for group in runs]
        assert [len(text) for text in decoded] == list(record.runs) and "".join(decoded) == record.text


async def _in_loop(agent: ToolAgent, url: str, index: int, question: Question) -> Any:
    protocol = load_protocol("tool_calls", OPTIONS)
    row = verl_row(SourcedQuestion(record=question, source="toy"), index, protocol)
    loop = make_loop(
        agent.codec.tokenizer,
        agent,
        url,
        protocol="tool_calls",
        protocol_options=OPTIONS,
        limits=vars(TOOL_LIMITS),
        topk=2,
    )
    return await loop.run({"temperature": 0.0}, **row, raw_prompt=row["prompt"], uid=str(index), session_id=0)
