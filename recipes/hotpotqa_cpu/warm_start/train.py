"""Teach a Hugging Face causal language model the agent protocol on scripted trajectories.

A model that has never searched earns no reward, so PPO gets no signal. This recipe makes demonstrations from training
questions with known supporting passages (`demonstrations.py`) and fine-tunes on the agent's own tokens
(`supervised.py`). Each epoch has new demonstrations of the same questions.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from agentic_r_plugin import compute
from agentic_r_plugin.backends import SearchSpec, open_search
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, check_least, deciding, save_config
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Limits, load_protocol
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.session import Session
from agentic_r_plugin.storage.claim import Output, require_new
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import write_json
from recipes.hotpotqa_cpu.warm_start.demonstrations import DemonstrationSettings, demonstrate, describe
from recipes.hotpotqa_cpu.warm_start.supervised import Example, FineTuneSettings, fine_tune


@dataclass(frozen=True, kw_only=True)
class WarmStartSFTConfig:
    """Supervised warm start of a causal language model on scripted search trajectories."""

    model: str = field(
        default="???", metadata={"help": "folder of a Hugging Face causal language model", **BY_CONTENTS}
    )
    questions: str = field(
        default="???", metadata={"help": "questions whose metadata names supporting passages", **BY_CONTENTS}
    )
    format: str = field(default="", metadata=FORMAT)
    corpus: str = field(default="???", metadata={"help": "corpus file", **BY_CONTENTS})
    out: str = field(default="???", metadata={"help": "folder of the trained model", **FREE})
    protocol: str = field(default="compact", metadata={"help": "registered agent_protocol"})
    protocol_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the protocol that differ from its own", **LATER}
    )
    supporting_field: str = field(default="gold_doc_ids", metadata={"help": "field of metadata with the passage ids"})
    skip: int = field(default=0, metadata={"help": "questions left out at the start of the file"})
    limit: int = field(default=0, metadata={"help": "questions used after that (0: all)"})
    seed: int = field(default=0, metadata={"help": "of the demonstrations and the order of training"})
    device: str = field(default="auto", metadata={"help": "auto: cuda where there is one, else cpu", **FREE})
    limits: Limits = field(default_factory=Limits)
    search: SearchSpec = field(default_factory=lambda: SearchSpec(backend="bm25"))
    demonstrations: DemonstrationSettings = field(default_factory=DemonstrationSettings)
    training: FineTuneSettings = field(default_factory=FineTuneSettings)

    def __post_init__(self) -> None:
        check_least(self, skip=0, limit=0)


def run(config: WarmStartSFTConfig, *, resume: bool = False) -> None:
    """Make the demonstrations, train, and write the model with `agent.json` and `config.yaml`; last `warm_start.json`.

    Args:
        resume: keep a finished output unchanged, and continue an unfinished one from its last checkpoint.

    Raises:
        OutputExistsError: the output exists or was begun and `resume` is False, or another process is writing it.
        ManifestMismatchError: resumed with a different configuration or different inputs, or the output is not from
            this command.
        RecordError: a broken question or corpus file, or unknown supporting passages.
        ConfigError: the model folder holds no weights.
    """
    out = Path(config.out)
    if not resume:
        require_new(out, folder=True)
    output = Output(out=out, made_from=_made_from(config), done="warm_start.json", folder=True)
    with output.claim(resume=resume) as held:
        if held.finished is None:
            held.begin()
            held.work.mkdir(exist_ok=True)
            held.finish(_train(config, held.work, out))
        shutil.rmtree(held.work, ignore_errors=True)


def _train(config: WarmStartSFTConfig, work: Path, out: Path) -> dict[str, Any]:
    """Train and write the model; returns the report."""
    started = time.monotonic()
    model, tokenizer = _load(config)
    epochs = _demonstrations(config, tokenizer)
    examples = [[Example.from_session(session) for session in sessions] for sessions in epochs]
    begun = time.monotonic()
    log = fine_tune(model, examples, config.training, seed=config.seed, folder=work)
    seconds = time.monotonic() - begun
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_config(config, out / "config.yaml")
    card = {"protocol": config.protocol, "limits": vars(config.limits), "topk": config.demonstrations.topk}
    if config.protocol_options:
        card["protocol_options"] = config.protocol_options
    write_json(out / "agent.json", card)
    losses, seen = [line["loss"] for line in log], [example for items in examples for example in items]
    return {
        **describe([session for sessions in epochs for session in sessions]),
        "precision": _precision(config),
        "steps": len(log),
        "tokens": sum(len(example.ids) for example in seen),
        "model_tokens": sum(sum(example.mask) for example in seen),
        "first_loss": losses[0],
        "last_loss": sum(losses[-5:]) / len(losses[-5:]),
        "training_seconds": seconds,
        "seconds": time.monotonic() - started,
        "losses": [round(loss, 4) for loss in losses],
    }


def _made_from(config: WarmStartSFTConfig) -> dict[str, Any]:
    if not any(Path(config.model).glob("*.safetensors")):
        raise ConfigError(f"model {config.model!r}: expected a folder with *.safetensors")
    files = {name: path_fingerprint(getattr(config, name)) for name in ("questions", "corpus", "model")}
    return deciding(config) | files | {"index": path_fingerprint(config.search.index), "precision": _precision(config)}


def _precision(config: WarmStartSFTConfig) -> str:
    return compute.resolve(config.training.precision, config.device)


def _load(config: WarmStartSFTConfig) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(config.seed)
    model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return model.to(compute.device_name(config.device)), AutoTokenizer.from_pretrained(config.model)


def _demonstrations(config: WarmStartSFTConfig, tokenizer: Any) -> list[list[Session]]:
    """Make the sessions of each epoch."""
    last = config.skip + config.limit if config.limit else None
    questions = list(islice(read_questions(config.questions, labelled=True, format=config.format), config.skip, last))
    spec = config.search
    if spec.backend == "bm25" and not spec.corpus:
        spec = replace(spec, corpus=config.corpus)
    protocol = load_protocol(config.protocol, config.protocol_options)
    with Corpus(config.corpus) as corpus, open_search(spec) as search:
        return [
            demonstrate(
                questions, search, corpus, protocol, TokenizerCodec(tokenizer), config.limits, config.demonstrations,
                seed=config.seed + epoch, supporting_field=config.supporting_field,
            )
            for epoch in range(config.training.epochs)
        ]  # fmt: skip
