"""The rollout driver against a simulated language model: asynchronous against turn-synchronous, and its own CPU time.

    python tests/benchmarks/rollout_driver.py [--trajectories 256] [--seeds 0 1 2] [--median-s 0.5] [--sigma 1.0]

Every turn of the model takes a time drawn from a log-normal distribution (median `--median-s`, shape `--sigma`), every
trajectory 1 to 5 turns. The retrieval service is a real one, over HTTP, in a separate process. Per seed, in one run
and one after the other:

- turn-synchronous, as in Search-R1: all trajectories wait for the slowest turn, then search in one batch;
- asynchronous: verl's agent loop of this package, one coroutine a trajectory;
- the bound: the slowest trajectory alone, its turns and searches one after the other.

Then the asynchronous driver's CPU time a turn with `--cpu-trajectories` at once, the simulated model's own taken off.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from agentic_r_plugin.agent.agent_loop import SearchAgentLoop
from agentic_r_plugin.agent.dataset import SourcedQuestion, verl_row
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Limits, Search
from agentic_r_plugin.records import CorpusLine, Question
from agentic_r_plugin.rollout import search_request
from agentic_r_plugin.search.client import RetrievalClient
from agentic_r_plugin.search.service.server import ServeConfig, running_service
from agentic_r_plugin.session import Session
from agentic_r_plugin.store import write_records
from agentic_r_plugin.tags import search_r1

MODEL = Path(__file__).parents[2] / "recipes" / "quickstart" / "agent"
LIMITS = Limits()
MAX_TURNS = 5


@dataclass
class Script:
    """What the model writes in one trajectory, and how long each turn takes it."""

    turns: list[list[int]]
    seconds: list[float]


@dataclass
class SimulatedModel:
    """In place of verl's client of the rollout engine; answers a request after its time."""

    scripts: list[Script]
    at: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Request id -> (trajectory, turn)."""

    async def generate(self, request_id: str, **_: Any) -> TokenOutput:
        number, turn = self.at.setdefault(request_id, (len(self.at), 0))
        self.at[request_id] = (number, turn + 1)
        return await self.turn(number, turn)

    async def turn(self, number: int, turn: int) -> TokenOutput:
        script = self.scripts[number]
        await asyncio.sleep(script.seconds[turn])
        return TokenOutput(token_ids=script.turns[turn], log_probs=[-0.1] * len(script.turns[turn]), extra_fields={})


def scripts(count: int, seed: int, options: argparse.Namespace, codec: TokenizerCodec) -> list[Script]:
    """Trajectories of 1 to 5 turns, about 90 tokens each."""
    rng = random.Random(seed)
    thought = " ".join(["the", "town", "by", "the", "river", "was", "named", "after", "its", "founder"] * 6)
    made = []
    for number in range(count):
        searches = rng.randint(0, MAX_TURNS - 1)
        texts = [f"<think> {thought} </think><search> town {number} {turn} </search>" for turn in range(searches)]
        turns = [codec.encode(text) for text in [*texts, f"<think> {thought} </think><answer> Paris </answer>"]]
        made.append(Script(turns, [options.median_s * rng.lognormvariate(0, options.sigma) for _ in turns]))
    return made


def rows(count: int) -> list[dict[str, Any]]:
    questions = [Question(id=str(n), question=f"Which town {n}?", golden_answers=("Paris",)) for n in range(count)]
    return [verl_row(SourcedQuestion(record=q, source="s"), n, search_r1) for n, q in enumerate(questions)]


async def asynchronous(model: SimulatedModel, tokenizer: Any, url: str, concurrency: int) -> float:
    """All trajectories through verl's agent loop; seconds."""
    config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"prompt_length": 512}}, "data": {}})
    limits = {name: getattr(LIMITS, name) for name in LIMITS.__dataclass_fields__}
    started = time.perf_counter()
    loops = [
        SearchAgentLoop(
            trainer_config=DictConfigWrap(config), server_manager=model, tokenizer=tokenizer, processor=None,
            dataset_cls=RLHFDataset, data_config=DictConfigWrap(config.data), hf_model_type="qwen2",
            protocol="search_r1", limits=limits, retrieval_url=url, max_concurrent_searches=concurrency,
        ).run({"temperature": 1.0}, **row)
        for row in rows(len(model.scripts))
    ]  # fmt: skip
    outputs = await asyncio.gather(*loops)
    seconds = time.perf_counter() - started
    assert all(output.extra_fields["em"] == 1 for output in outputs)
    return seconds


async def turn_synchronous(model: SimulatedModel, codec: TokenizerCodec, url: str) -> float:
    """The same trajectories, a turn of all at a time, searches in one batch; seconds."""
    client = RetrievalClient(url)
    started = time.perf_counter()
    sessions = [Session(search_r1, codec, LIMITS, f"Which town {n}?") for n in range(len(model.scripts))]
    for turn in range(MAX_TURNS):
        active = [(number, session) for number, session in enumerate(sessions) if session.finished is None]
        outputs = await asyncio.gather(*(model.turn(number, turn) for number, _ in active))
        waiting = [
            (session, action)
            for (_, session), output in zip(active, outputs, strict=True)
            if isinstance(action := session.model_wrote(output.token_ids), Search)
        ]
        if waiting:
            found = await client.asearch([search_request(session, action) for session, action in waiting], 3)
            for (session, _), hits in zip(waiting, found, strict=True):
                session.found([hit.passage for hit in hits])
    seconds = time.perf_counter() - started
    assert all(session.finished is not None and session.finished.answer == "Paris" for session in sessions)
    return seconds


async def slowest_alone(model: SimulatedModel, tokenizer: Any, url: str) -> float:
    """The trajectory whose turns take longest, by itself; seconds."""
    slowest = max(model.scripts, key=lambda script: sum(script.seconds))
    return await asynchronous(SimulatedModel([slowest]), tokenizer, url, 1)


async def only_the_model(model: SimulatedModel) -> None:
    """The simulated model without a driver: what it costs itself."""

    async def one(number: int) -> None:
        for turn in range(len(model.scripts[number].turns)):
            await model.turn(number, turn)

    await asyncio.gather(*(one(number) for number in range(len(model.scripts))))


def cpu_per_turn(options: argparse.Namespace, tokenizer: Any, codec: TokenizerCodec, url: str) -> dict[str, float]:
    """CPU milliseconds of this process a turn of the model, and of the simulated model alone."""
    made = scripts(options.cpu_trajectories, 0, options, codec)
    turns = sum(len(script.turns) for script in made)
    before = time.process_time()
    asyncio.run(asynchronous(SimulatedModel(made), tokenizer, url, options.max_concurrent_searches))
    driven = time.process_time() - before
    before = time.process_time()
    asyncio.run(only_the_model(SimulatedModel(made)))
    alone = time.process_time() - before
    return {
        "trajectories": options.cpu_trajectories,
        "turns": turns,
        "driver_cpu_ms_per_turn": round(1000 * (driven - alone) / turns, 3),
        "simulated_model_cpu_ms_per_turn": round(1000 * alone / turns, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trajectories", type=int, default=256)
    parser.add_argument("--cpu-trajectories", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--median-s", type=float, default=0.5)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--max-concurrent-searches", type=int, default=64)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    codec = TokenizerCodec(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        words = "the town lies on a river and was founded long ago by people who came from the hills " * 5
        corpus = Path(folder) / "corpus.jsonl"
        write_records(corpus, [CorpusLine(id=str(n), contents=f'"Town {n}"\n{words}{n}') for n in range(50)])
        with running_service(ServeConfig(backend="bm25", corpus=str(corpus), port=0)) as url:
            ratios, shares = [], []
            for seed in options.seeds:
                made = scripts(options.trajectories, seed, options, codec)
                bound = asyncio.run(slowest_alone(SimulatedModel(made), tokenizer, url))
                synchronous = asyncio.run(turn_synchronous(SimulatedModel(made), codec, url))
                concurrent = asyncio.run(
                    asynchronous(SimulatedModel(made), tokenizer, url, options.max_concurrent_searches)
                )
                ratios.append(synchronous / concurrent)
                shares.append(bound / concurrent)
                line = {
                    "seed": seed, "turn_synchronous_s": round(synchronous, 2), "async_s": round(concurrent, 2),
                    "slowest_alone_s": round(bound, 2), "ratio": round(ratios[-1], 2), "bound": round(shares[-1], 3),
                }  # fmt: skip
                print(json.dumps(line), flush=True)
            print(
                f"async / turn-synchronous throughput, median of {len(ratios)} seeds: {statistics.median(ratios):.2f}"
            )
            print(f"share of the slowest trajectory's bound, median: {statistics.median(shares):.1%}")
            print(json.dumps(cpu_per_turn(options, tokenizer, codec, url)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
