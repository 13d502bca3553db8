"""Encode texts with gradients, in mini-batches with a bounded number of tokens.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor

from agentic_r_plugin.attention import has_kernel
from agentic_r_plugin.retriever.packing import NAME, is_packable, pack, set_attention_dropout
from agentic_r_plugin.search.encoder import Retriever, autocast, truncated
from agentic_r_plugin.search.families import first_position


@dataclass(frozen=True)
class Tokens:
    """One tokenized text, as the model reads it."""

    ids: Sequence[int]
    """Token ids, including prefix and special tokens."""
    prompt_length: int = 0
    """Leading tokens that the model's pooling skips (`include_prompt: false`); 0 if it skips none."""

    def __len__(self) -> int:
        return len(self.ids)


def tokenize(retriever: Retriever, texts: Sequence[str], kind: str) -> list[Tokens]:
    """Tokenize texts of a kind (`query` or `passage`) as the retriever does, without padding."""
    if not texts:
        return []
    features = retriever.features(list(texts), kind)
    includes = all(module.include_prompt for module in retriever.model if isinstance(module, Pooling))
    skipped = 0 if includes else int(features.get("prompt_length") or 0)
    rows = zip(features["input_ids"], features["attention_mask"].bool(), strict=True)
    return [Tokens(ids[mask].tolist(), skipped) for ids, mask in rows]


class TextEncoder:
    """Runs a sentence-transformers model on token ids, with gradients.

    Args:
        model: a transformer, its pooling, and any further modules.
        precision: `float32`, `bfloat16` or `float16` (autocast), or `auto`.
        packing: concatenate texts without padding if the model supports it. On CUDA this also needs torch's
            variable-length kernel, which has no dropout. Otherwise texts are padded.
        attention_dropout: set in the model; None keeps the model's own, or sets 0 where the kernel is used.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        precision: str = "auto",
        packing: bool = True,
        attention_dropout: float | None = None,
    ) -> None:
        self.model, self.precision = model, precision
        self._transformer = cast(Any, model[0])
        self.packs = packing and _packs(model)
        if self.packs and model.device.type != "cpu":
            # Padded without the kernel: `attend` would make one call per run of texts of equal length.
            self.packs = not attention_dropout and has_kernel(model.device, self._computed_dtype())
            attention_dropout = 0.0 if self.packs else attention_dropout
        self.attention_dropout = set_attention_dropout(model, attention_dropout)
        if self.packs:
            self._transformer.model.set_attn_implementation(NAME)
        self._first_position = first_position(self._transformer) if self.packs else 0

    def close(self) -> None:
        """Restore the model's usual attention."""
        if self.packs:
            self._transformer.model.set_attn_implementation("sdpa")

    def plan(self, texts: Sequence[Tokens], max_tokens: int) -> list[list[int]]:
        """Split the texts, shortest first, into mini-batches of at most `max_tokens` positions; returns their indices.

        A text above the limit gets its own mini-batch. A mini-batch holds texts of one prompt length, because pooling
        takes a single one.
        """
        batches: list[list[int]] = []
        room, skipped = 0, 0
        for place in sorted(range(len(texts)), key=lambda i: (texts[i].prompt_length, len(texts[i]), i)):
            length = len(texts[place])
            # This text is the longest so far: with padding, each text of the mini-batch takes as much room.
            needed = length if self.packs else length * (len(batches[-1]) + 1) if batches else length
            if not batches or needed > room or texts[place].prompt_length != skipped:
                batches.append([])
                room, needed, skipped = max_tokens, length, texts[place].prompt_length
            batches[-1].append(place)
            room -= needed if self.packs else 0
        return batches

    def __call__(self, texts: Sequence[Tokens]) -> Tensor:
        """(N, D) vectors in at least float32. Texts must share one prompt length; a text without tokens gives zeros."""
        full = [place for place, text in enumerate(texts) if len(text)]
        if len(full) < len(texts):
            vectors = self([texts[place] for place in full]) if full else self._none()
            zeros = vectors.new_zeros(len(texts), vectors.shape[1])
            return zeros.index_copy(0, torch.tensor(full, dtype=torch.long, device=vectors.device), vectors)
        ids = [text.ids for text in texts]
        with self._autocast():
            features = self._packed(ids) if self.packs else self._padded(ids)
            features["prompt_length"] = texts[0].prompt_length
            for module in list(self.model)[1:]:
                features = module(features)
        vectors = features["sentence_embedding"]
        vectors = vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors
        return truncated(self.model, vectors)

    def _none(self) -> Tensor:
        """An empty (0, D) tensor attached to the parameters, so that a batch of empty texts has a backward pass."""
        first = next(parameter for parameter in self.model.parameters() if parameter.requires_grad)
        return first.float().sum() * torch.zeros(0, self.model.get_embedding_dimension() or 0, device=first.device)

    def _packed(self, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        packed = pack(texts, first_position=self._first_position, device=self.model.device)
        hidden = self._transformer.model(**packed, use_cache=False).last_hidden_state
        return {"token_embeddings": hidden, "cu_seq_lens_q": packed["cu_seq_lens_q"]}

    def _padded(self, texts: Sequence[Sequence[int]]) -> dict[str, Any]:
        padded = self.model.tokenizer.pad({"input_ids": [list(text) for text in texts]}, return_tensors="pt")
        return self._transformer(
            {key: item.to(self.model.device) for key, item in padded.items()} | {"modality": "text"}
        )

    def _computed_dtype(self) -> torch.dtype:
        kind = self.model.device.type
        with self._autocast():
            computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.model.dtype
        return computed or torch.float32

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "float16":
            return torch.autocast(self.model.device.type, dtype=torch.float16)
        return autocast(self.model.device, self.precision)


def _packs(model: SentenceTransformer) -> bool:
    """Whether the model is a transformer that supports packed texts, followed by a pooling module."""
    modules: list[Any] = list(model)
    return (
        len(modules) > 1
        and isinstance(modules[0], Transformer)
        and isinstance(modules[1], Pooling)
        and is_packable(modules[0].model)
    )
