"""A BERT of some ten thousand parameters and a corpus of made-up words, for tests that need no language.

Passage words are p0..p29 and query words q0..q29; a query matches a passage when their numbers are the same. An
untrained model cannot know that, a trained one can.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel, BertTokenizer

NUM_WORDS = 30


def make_model(folder: Path, *, dim: int = 32, layers: int = 1, seed: int = 0, pooler: bool = True) -> str:
    """Write an untrained sentence-transformers model; returns its folder. Without the `pooler` its weights lack it."""
    torch.manual_seed(seed)
    words = [f"{letter}{i}" for letter in "pq" for i in range(NUM_WORDS)] + ["query", "passage", "title", ":", '"']
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    plain = folder / "transformer"
    plain.mkdir(parents=True)
    (plain / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, model_max_length=64).save_pretrained(plain)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=max(2, dim // 64),
        intermediate_size=64 if layers == 1 else 4 * dim,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(plain)
    transformer = Transformer(str(plain))
    model = SentenceTransformer(modules=[transformer, Pooling(dim, "mean")], device="cpu")
    if not pooler:
        model[0].auto_model.pooler = None
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return str(folder / "model")


def passage_numbers(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """`count` different sets of three word numbers."""
    generator, found = random.Random(seed), dict[tuple[int, ...], None]()
    while len(found) < count:
        found[tuple(sorted(generator.sample(range(NUM_WORDS), 3)))] = None
    return list(found)


def contents(numbers: tuple[int, ...]) -> str:
    return f'"title {numbers[0]}"\n' + " ".join(f"p{n}" for n in numbers)


def query(numbers: tuple[int, ...]) -> str:
    return " ".join(f"q{n}" for n in numbers)


def write_corpus(file: Path, count: int = 40, seed: int = 0) -> Path:
    """A corpus of `count` passages with ids d0, d1, …"""
    lines = [{"id": f"d{i}", "contents": contents(numbers)} for i, numbers in enumerate(passage_numbers(count, seed))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


def make_reranker(folder: Path, *, formulation: str = "", seed: int = 0, layers: int = 1) -> str:
    """Write an untrained cross-encoder of the same words; with our record if it has a formulation."""
    from sentence_transformers import CrossEncoder

    base = make_model(folder, layers=layers, seed=seed)
    torch.manual_seed(seed)
    config = {"initializer_range": 0.6}  # scores that differ
    model = CrossEncoder(base, num_labels=1, device="cpu", config_kwargs=config)
    model.save_pretrained(str(folder / "reranker"), create_model_card=False)
    if formulation:
        record = {"schema": "reranker/1", "formulation": formulation, "max_length": 64}
        (folder / "reranker" / "agentic_r.json").write_text(json.dumps(record), encoding="utf-8")
    return str(folder / "reranker")
