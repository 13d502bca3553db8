"""The generated benchmark: a fictional world, so that no model can know the answers in advance (command `world`).

It is written in FlashRAG's layout. The entities of the train, dev and test questions are disjoint, and no fact connects
two splits. Retrieval is hard for four reasons: every entity has several passages under one title; other passages
mention it with the exact words of a relation but a wrong object; people and works have namesakes that only the question
distinguishes; and some passages and questions about test entities use wordings that never occur in training. Four more
causes (`CAUSES`) are off by default; `tests/benchmarks/world_causes.py` measures each one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from agentic_r_plugin.config import deciding
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import CorpusLine, Passage, Question
from agentic_r_plugin.storage.claim import Output
from agentic_r_plugin.store import write_records
from agentic_r_plugin.world.facts import SPLITS, build_facts
from agentic_r_plugin.world.prose import write_passages
from agentic_r_plugin.world.questions import Places, write_questions
from agentic_r_plugin.world.settings import WorldConfig

__all__ = ["CAUSES", "World", "WorldConfig", "build_world", "run"]

CAUSES = ("homonyms", "elliptic_queries", "misleading", "paraphrase")
"""Settings that make single parts of the method matter. At 0 the world is the one without them, byte for byte."""

MANIFEST = "world.json"
"""Name of the file with a world's settings, in the world's folder; written last."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Passages and questions."""

    passages: tuple[Passage, ...]
    questions: dict[str, tuple[Question, ...]]
    """Split -> questions; `metadata` holds gold_doc_ids, hop_answers, relations and more, in hop order."""


def build_world(config: WorldConfig) -> World:
    """Build the world in memory.

    Raises:
        ConfigError: the world is too small for the number of questions.
    """
    rng = random.Random(f"world {config.seed}")
    counts = {"train": config.train_questions, "dev": config.dev_questions, "test": config.test_questions}
    facts = build_facts(rng, config, {"train": 0.5, "dev": 0.12, "test": 0.38})
    passages, stated, misleading = write_passages(rng, facts, config)
    places = Places(stated=stated, misleading=misleading)
    questions = {split: tuple(write_questions(rng, facts, places, split, counts[split], config)) for split in SPLITS}
    return World(passages=tuple(passages), questions=questions)


def run(config: WorldConfig, *, resume: bool = False) -> None:
    """Write `OUT/NAME/` with corpus, train, dev and test `.jsonl`.

    Raises:
        ConfigError: no `out`, or the world is too small for the number of questions.
        OutputExistsError: the folder exists and `resume` is off; with it, a finished world is left as it is.
        ManifestMismatchError: with `resume`, the folder holds another world, or no world of this command.
    """
    if not config.out:
        raise ConfigError("world: expected --out DIR")
    folder = Path(config.out) / config.name
    sizes = deciding(config)
    with Output(out=folder, made_from=sizes, done=MANIFEST, folder=True).claim(resume=resume) as held:
        if held.finished is None:
            # Before the manifest is written, so that impossible sizes leave nothing behind.
            world = build_world(config)
            held.begin()
            lines = (CorpusLine(id=passage.id, contents=passage.contents) for passage in world.passages)
            write_records(folder / "corpus.jsonl", lines)
            for split in SPLITS:
                write_records(folder / f"{split}.jsonl", world.questions[split])
            held.finish(sizes)
