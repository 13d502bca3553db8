"""A world of four towns and a tiny agent that has learnt it: real files, a real tokenizer, a real trained model."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from agentic_r_plugin.records import Passage
from agentic_r_plugin.tags import compact

TOWNS = {"Ada Brook": "Harrow", "Ben Cole": "Linden", "Cara Dunn": "Marsh", "Dov Ellis": "Norwick"}
PASSAGES = [
    *(
        Passage(id=f"born-{name.split()[0]}", title=name, text=f"{name} was born in {town} long ago.")
        for name, town in TOWNS.items()
    ),
    *(Passage(id=f"work-{name.split()[0]}", title=name, text=f"{name} worked as a baker for years.") for name in TOWNS),
    *(
        Passage(id=f"town-{town}", title=town, text=f"{town} is a small town where many were born.")
        for town in TOWNS.values()
    ),
]
BY_ID = {passage.id: passage for passage in PASSAGES}


def question_of(name: str) -> str:
    return f"Where was {name} born?"


def first_turn(name: str) -> str:
    return f"<think>I look up {name}.</think><search> {name} born years </search>"


def last_turn(name: str, shown: list[Passage]) -> str:
    known = any(passage.id == f"born-{name.split()[0]}" for passage in shown)
    return f"<think>I read it.</think><answer> {TOWNS[name] if known else 'unknown'} </answer>"


def demonstrations() -> list[list[tuple[str, bool]]]:
    """Of each trajectory its pieces: (text, whether the model writes it)."""
    found = []
    for name in TOWNS:
        start = [(compact.prompt(question_of(name)), False), (first_turn(name), True)]
        first = name.split()[0]
        own = [BY_ID[f"born-{first}"], BY_ID[f"work-{first}"]]
        shown = [[passage] for passage in PASSAGES] + [[own[0]]] * 10 + [[*own, p] for p in PASSAGES if p not in own]
        shown += [[own[1], own[0], p] for p in PASSAGES if p not in own]
        found += [[*start, (compact.render(docs), False), (last_turn(name, docs), True)] for docs in shown]
    return found


def write_files(folder: Path) -> None:
    """Corpus and questions in FlashRAG layout."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = [{"id": passage.id, "contents": passage.contents} for passage in PASSAGES]
    questions = [
        {
            "id": f"q{number}",
            "question": question_of(name),
            "golden_answers": [town],
            "metadata": {"gold_doc_ids": [f"born-{name.split()[0]}"], "hop_answers": [town]},
        }
        for number, (name, town) in enumerate(TOWNS.items())
    ]
    for file, rows in (("corpus.jsonl", corpus), ("train.jsonl", questions)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_agent(folder: Path, *, steps: int = 220) -> float:
    """A 2-layer Qwen2 that has learnt the demonstrations, saved with its tokenizer; returns the last loss."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    texts = ["".join(text for text, _ in pieces) for pieces in demonstrations()]
    tags = [f"<{end}{tag}>" for tag in ("think", "search", "answer", "information") for end in ("", "/")]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" ?[A-Za-z]+|\\s+|."), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>", *tags], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    rows = []
    for pieces in demonstrations():
        ids, labels = [], []
        for text, by_model in pieces:
            piece = tokenizer.encode(text, add_special_tokens=False)
            ids += piece
            labels += piece if by_model else [-100] * len(piece)
        rows.append((ids, labels))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator, loss = torch.Generator().manual_seed(0), torch.tensor(0.0)
    for _ in range(steps):
        picked = [rows[index] for index in torch.randint(len(rows), (8,), generator=generator).tolist()]
        width = max(len(ids) for ids, _ in picked)
        ids_BL = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in picked])
        labels_BL = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in picked])
        loss = model(input_ids=ids_BL, labels=labels_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return float(loss.detach())
