"""Supervised warm start of the small agent on scripted trajectories (`python -m recipes.quickstart.warm_start`).

Every few trajectories come from a different fictional world, so there are no facts to memorise: the agent learns to
plan the hops, copy names into queries, read passages and answer. The demonstrators are hasty on purpose
(`demonstrations.Haste`), which PPO is meant to correct. Training runs on a CPU or a GPU; the shipped weights took a few
minutes on a GPU with 14 workers writing demonstrations.

The loop is not transformers' `Trainer`: that needs the number of steps, while this schedule follows the demonstrations
seen and the clock, which are known only as the stream of batches goes on.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentic_r_plugin.child import die_with
from agentic_r_plugin.compute import device_name, fast_type
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, deciding
from agentic_r_plugin.errors import ConfigError, TrainingError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import AgentProtocol, Limits, load_protocol
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.tags import compact
from agentic_r_plugin.world.generate import build_world
from recipes.quickstart.warm_start.demonstrations import Haste, Shown, demonstrations, small_world
from recipes.quickstart.warm_start.small_agent import LAYERS, build_model, teach_tool_calls, train_tokenizer

FIRST_WORLD = 1_000_000
"""First seed of the demonstrations' worlds; benchmarks use smaller seeds."""

TOOL_OPTIONS = {"system": "", "thought_form": "<think> {thought} </think>"}
"""Options of the protocol `tool_calls` in demonstrations; the agent itself needs only `system`."""

Example = tuple[list[int], list[int]]
"""Ids of prompt and response, and a mask of the same length: 1 for tokens written by the model."""


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Data, schedule and haste of one warm start."""

    out: str = field(default="", metadata={"help": "folder for weights and tokenizer", **FREE})
    init: str = field(
        default="", metadata={"help": "folder of an agent to go on from; empty: from scratch", **BY_CONTENTS}
    )
    seed: int = field(default=0, metadata={"help": "seed of weights and order; also shifts the worlds"})
    worlds: int = field(default=400, metadata={"help": "worlds that demonstrations come from"})
    per_world: int = field(default=24, metadata={"help": "demonstrations from each world"})
    vocabulary: int = field(default=2560, metadata={"help": "tokens"})
    tokenizer_worlds: int = field(default=60, metadata={"help": "worlds whose text trains the tokenizer"})
    batch_tokens: int = field(default=4096, metadata={"help": "tokens of one step, padding included"})
    learning_rate: float = field(default=2e-3, metadata={"help": "highest learning rate"})
    warm_up: float = field(default=0.03, metadata={"help": "share of the demonstrations with a rising learning rate"})
    weight_decay: float = field(default=0.1, metadata={"help": "of matrices"})
    seconds: float = field(default=0.0, metadata={"help": "end after this time, schedule included; 0: no limit"})
    tool_calls: bool = field(
        default=False, metadata={"help": "teach tool calls in a chat template instead of tags", **LATER}
    )
    snippet: int = field(
        default=0,
        metadata={"help": "teach to open passages, of which a search shows N characters; 0: it shows all", **LATER},
    )
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda", **FREE})
    workers: int = field(default=0, metadata={"help": "processes that write demonstrations; 0: this one", **FREE})
    stop_at_person: float = field(default=Haste.stop_at_person, metadata={"help": "see demonstrations.Haste"})
    stop_at_other: float = field(default=Haste.stop_at_other, metadata={"help": "see demonstrations.Haste"})
    guess: float = field(default=Haste.guess, metadata={"help": "see demonstrations.Haste"})
    repeat: float = field(default=Haste.repeat, metadata={"help": "see demonstrations.Haste"})
    gold: float = field(default=Shown.gold, metadata={"help": "share of searches that show the gold passage"})
    elliptic_queries: float = field(
        default=0.0, metadata={"help": "share of hops whose first query leaves out what the question says"}
    )
    layers: int = field(default=LAYERS, metadata={"help": "of the model, without init; another size of agent"})
    one_passage_first: float = field(default=0.1, metadata={"help": "share of the worlds with one passage per search"})

    def __post_init__(self) -> None:
        for name in ("worlds", "per_world", "batch_tokens", "tokenizer_worlds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.vocabulary < 300:
            raise ConfigError(f"vocabulary: expected at least 300, found {self.vocabulary}")
        if self.snippet < 0 or (self.snippet and not self.tool_calls):
            raise ConfigError("snippet: expected at least 0 characters, and tool_calls=true to open passages")
        if self.layers < 3 or not 0 <= self.elliptic_queries <= 1:
            raise ConfigError("expected layers of at least 3, and elliptic_queries from 0 to 1")
        if self.init and self.layers != LAYERS:
            raise ConfigError(f"layers={self.layers} is for a model from scratch; the one in init has its own number")

    @property
    def protocol(self) -> AgentProtocol:
        """How the demonstrators write."""
        if not self.tool_calls:
            return compact
        form = f'Doc {{rank}}(Title: "{{title}}") {{text:.{self.snippet}}}'
        opening = {"tools": ["search", "open"], "passage_form": form} if self.snippet else {}
        return load_protocol("tool_calls", TOOL_OPTIONS | opening)

    @property
    def haste(self) -> Haste:
        """How hasty the demonstrators are."""
        return Haste(**{item.name: getattr(self, item.name) for item in fields(Haste)})


def run(config: WarmStartConfig, *, resume: bool = False) -> None:
    """Train and write weights in bfloat16 and the tokenizer to `OUT`; last `warm_start.json`.

    Raises:
        ConfigError: no `out`, or `init` holds no weights.
        OutputExistsError: the folder exists and `resume` is off; with it, a finished folder is left as it is.
        ManifestMismatchError: with `resume`, the folder was begun with other settings.
        TrainingError: the loss is not finite.
    """
    if not config.out:
        raise ConfigError("warm-start: expected --out DIR")
    if config.init and not any(Path(config.init).glob("*.safetensors")):
        raise ConfigError(f"init {config.init!r}: expected a folder with *.safetensors")
    out, started = Path(config.out), time.monotonic()
    made_from = deciding(config) | {"init": path_fingerprint(config.init), "precision": fast_type(config.device)}
    with Output(out=out, made_from=made_from, done="warm_start.json", folder=True).claim(resume=resume) as held:
        if held.finished is not None:
            return
        held.begin()
        if config.init:
            tokenizer = AutoTokenizer.from_pretrained(config.init)
        else:
            tokenizer = train_tokenizer(_texts(config), config.vocabulary)
        model, curve = train(config, tokenizer)
        model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
        held.finish(
            {
                "config": asdict(config) | {"out": out.name},
                "precision": fast_type(config.device),
                "loss": curve,
                "seconds": time.monotonic() - started,
            }
        )


def train(config: WarmStartConfig, tokenizer: Any) -> tuple[Any, list[tuple[int, float]]]:
    """Train; return the model in float32 and the (step, mean loss per model token) points.

    Raises:
        TrainingError: the loss is not finite.
    """
    device = torch.device(device_name(config.device))
    model: Any = build_model(tokenizer, config.seed, config.layers)
    if config.init:
        model = AutoModelForCausalLM.from_pretrained(config.init, dtype=torch.float32)
    if config.tool_calls:
        teach_tool_calls(tokenizer, model, opens=config.snippet > 0)
    model = model.to(device).train()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
    )
    total = config.worlds * config.per_world
    seen, recent, curve, started = 0, [], [], time.monotonic()
    for step, batch in enumerate(_batches(config, tokenizer)):
        progress = seen / total
        if config.seconds:
            progress = max(progress, (time.monotonic() - started) / config.seconds)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(progress, config.warm_up)
        loss = loss_of(model, batch, tokenizer.pad_token_id)
        if not torch.isfinite(loss):
            raise TrainingError(f"warm start: the loss at step {step} is {loss.item()}; lower learning_rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += len(batch)
        recent.append(loss.detach())
        if len(recent) == 50 or seen == total:
            curve.append((step + 1, round(torch.stack(recent).mean().item(), 4)))
            print(
                f"step {step + 1}  {seen}/{total}  loss {curve[-1][1]:.4f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )
            recent = []
    return model.cpu(), curve


def loss_of(model: Any, batch: list[Example], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the model's tokens.

    B sequences, T positions, N predicted tokens. Sequences are padded on the right, where causal attention ignores it.
    """
    length = max(len(ids) for ids, _ in batch)
    ids_BT = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in batch]).to(model.device)
    mask_BT = torch.tensor([mask + [0] * (length - len(mask)) for _, mask in batch], dtype=torch.bool).to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=fast_type(model.device) == "bfloat16"):
        hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        # The state at position t predicts token t + 1; only the model's tokens need logits.
        hidden_ND = hidden_BTD[:, :-1][mask_BT[:, 1:]]
        logits_NV = model.lm_head(hidden_ND)
    return torch.nn.functional.cross_entropy(logits_NV.float(), ids_BT[:, 1:][mask_BT[:, 1:]])


def _schedule(progress: float, warm_up: float) -> float:
    """Learning rate factor: linear rise, then half a cosine down to 2 %."""
    if progress < warm_up:
        return max(progress, 1e-3) / warm_up
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


def _batches(config: WarmStartConfig, tokenizer: Any) -> Iterator[list[Example]]:
    """Yield batches of similar lengths in random order, independent of the number of workers."""
    rng = random.Random(f"batches {config.seed}")
    pool: list[Example] = []
    for examples in _by_world(config, tokenizer):
        pool += examples
        if sum(len(ids) for ids, _ in pool) > 16 * config.batch_tokens:
            yield from _cut(pool, config.batch_tokens, rng)
            pool = []
    yield from _cut(pool, config.batch_tokens, rng)


def _cut(pool: list[Example], batch_tokens: int, rng: random.Random) -> list[list[Example]]:
    batches: list[list[Example]] = []
    for example in sorted(pool, key=lambda pair: len(pair[0])):
        if batches and (len(batches[-1]) + 1) * len(example[0]) <= batch_tokens:
            batches[-1].append(example)
        else:
            batches.append([example])
    rng.shuffle(batches)
    return batches


def _by_world(config: WarmStartConfig, tokenizer: Any) -> Iterator[list[Example]]:
    write = partial(_write_world, config=config, tokenizer=tokenizer)
    if config.workers == 0:
        yield from map(write, range(config.worlds))
        return
    with multiprocessing.get_context("spawn").Pool(config.workers, die_with, (os.getpid(),)) as pool:
        # In order, so that the batches do not depend on the number of workers.
        yield from pool.imap(write, range(config.worlds), chunksize=4)


def _write_world(index: int, *, config: WarmStartConfig, tokenizer: Any) -> list[Example]:
    """Write all demonstrations of one world."""
    most = 1 if index < config.one_passage_first * config.worlds else 3
    shown = Shown(gold=config.gold, most_passages=most, snippet=config.snippet)
    made = demonstrations(
        TokenizerCodec(tokenizer),
        first_seed=FIRST_WORLD * (1 + config.seed) + index,
        worlds=1,
        per_world=config.per_world,
        haste=config.haste,
        shown=shown,
        limits=Limits(max_opens=10),
        elliptic_queries=config.elliptic_queries,
        protocol=config.protocol,
    )
    return [(one.ids, one.mask) for one in made]


def _texts(config: WarmStartConfig) -> Iterator[str]:
    """Yield the tokenizer's training text: passages, questions, and the words of the protocol and demonstrations."""
    for index in range(config.tokenizer_worlds):
        # Seeds below those of the demonstrations, so that the tokenizer is trained on other worlds.
        world = build_world(small_world(FIRST_WORLD * (1 + config.seed) - 1 - index, config.per_world))
        for passage in world.passages:
            yield passage.text
        for passage in world.passages[:9]:
            yield compact.render([passage] * 3)
        for split in ("train", "test"):
            for question in world.questions[split]:
                yield compact.prompt(question.question)
                yield f" Find {', then '.join(question.metadata['relations'])}."
                yield from (f" {name}: not found. Again." for name in question.metadata["relations"])
                yield " Next author. Next composer. Next painter. Next director. Done. Check."
