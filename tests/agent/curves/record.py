"""Record the curves that `test_stability.py` judges: policy gradient on the tiny agent.

`healthy` keeps its learning rate, `collapse` has the same one until it is raised to 5e-3 after step `RAISED_AFTER`.

    PYTHONPATH=. python tests/agent/curves/record.py

Writes `healthy.jsonl` and `collapse.jsonl` next to this file, under the names that verl and we log. Every step samples
trajectories with the real generator and session, and takes one gradient step on the model's own tokens. Half a minute.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin import components
from agentic_r_plugin.answers import exact_match
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.llm.hf_generate import HFGenerator
from agentic_r_plugin.rollout import run_sessions
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.session import Session
from agentic_r_plugin.store import dump_line
from tests.agent import tiny_world

LEARNING_RATES = {"healthy": (3e-4, 3e-4), "collapse": (3e-4, 5e-3)}
RAISED_AFTER = 10
STEPS = 24


class Model:
    """The agent as a backend of `run_sessions`."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.codec, self.generator, self.calls = TokenizerCodec(tokenizer), HFGenerator(model, tokenizer), seed * 1000

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        self.calls += 1
        made = self.generator.generate(
            [list(request.prompt_ids) for request in requests], max_tokens=[request.max_tokens for request in requests],
            stop=sampling.stop, temperature=1.0, seed=[self.calls * 100 + row for row in range(len(requests))],
        )  # fmt: skip
        return [Completion(token_ids=tuple(item.token_ids), prompt_tokens=0) for item in made]


class Search:
    """The tiny world's retriever, in this process."""

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        return [tiny_world.find(request.query, topk) for request in requests]


def step(model: Any, start: Any, optimizer: Any, llm: Model) -> dict[str, float]:
    """Sample three trajectories a question, then one update; what is watched."""
    protocol = components.load("agent_protocol", "compact")
    questions = tiny_world.questions() * 3
    sessions = [Session(protocol, llm.codec, tiny_world.LIMITS, item.question) for item in questions]
    llm.generator.weights_changed()
    run_sessions(sessions, llm, Search(), topk=1, sampling=Sampling())  # type: ignore[arg-type]
    rewards = torch.tensor([
        float(exact_match(session.finished.answer if session.finished else None, item.golden_answers))
        for session, item in zip(sessions, questions, strict=True)
    ])  # fmt: skip
    width = max(len(session.ids) for session in sessions)
    ids = torch.zeros((len(sessions), width), dtype=torch.long)
    mask = torch.zeros((len(sessions), width - 1))
    for row, session in enumerate(sessions):
        ids[row, : len(session.ids)] = torch.tensor(session.ids)
        first = len(session.prompt_ids) - 1
        mask[row, first : len(session.ids) - 1] = torch.tensor(session.response_mask, dtype=torch.float32)
    logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        reference = start(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    chosen = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
    advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-3)
    loss = -(advantage[:, None] * chosen * mask).sum() / mask.sum()
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return {
        "agentic_r/em": float(rewards.mean()),
        "actor/kl_loss": float(((chosen - reference) * mask).sum() / mask.sum()),
        "actor/entropy": float((entropy * mask).sum() / mask.sum()),
        "response_length/mean": sum(len(session.response_ids) for session in sessions) / len(sessions),
        "agentic_r/search_turns": sum(session.searches for session in sessions) / len(sessions),
        "agentic_r/malformed_share": sum(session.malformed > 0 for session in sessions) / len(sessions),
        "actor/grad_norm": float(norm),
    }


def main() -> None:
    """Record both."""
    with tempfile.TemporaryDirectory() as name:
        folder = tiny_world.write_agent(Path(name))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        codec = TokenizerCodec(tokenizer)
        for curve, (rate, raised) in LEARNING_RATES.items():
            model, start = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
            # A better start than the tests' agent has, so that there is something to lose.
            for started in (model, start):
                tiny_world._fit(started, [tiny_world.scripted(name, codec) for name in tiny_world.NAMES], steps=45)
            optimizer, llm = torch.optim.AdamW(model.parameters(), lr=rate), Model(model, tokenizer, seed=1)
            lines = []
            for number in range(1, STEPS + 1):
                optimizer.param_groups[0]["lr"] = rate if number <= RAISED_AFTER else raised
                found = step(model, start, optimizer, llm)
                lines.append({"step": number} | {key: float(f"{value:.5g}") for key, value in found.items()})
                print(curve, lines[-1], flush=True)
            Path(__file__).with_name(f"{curve}.jsonl").write_bytes(b"".join(map(dump_line, lines)))


if __name__ == "__main__":
    main()
