"""Cross-encoders: models that read a query and a passage together and give one score.

Loading and reading them is shared by the reranker (`search.rerank`), its training (`retriever.reranker`) and the
relevance scorer (`data.scorers.cross_encoder`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sentence_transformers import CrossEncoder
from sentence_transformers.util.file_io import load_file_path

from agentic_r_plugin import components, compute
from agentic_r_plugin.config import FREE, fingerprint, load_config, to_dict
from agentic_r_plugin.errors import ConfigError, located
from agentic_r_plugin.llm.hf import checkpoint_fingerprint
from agentic_r_plugin.query import needs_reasoning, retriever_input
from agentic_r_plugin.records import Passage, Record
from agentic_r_plugin.search import families
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.search.encoder import MAX_LENGTH, RECORD_FILE, autocast, resolve
from agentic_r_plugin.store import read_json, write_json

if TYPE_CHECKING:
    from agentic_r_plugin.backends import SearchSpec

_CHARACTERS_PER_TOKEN = 16
"""Upper bound on the average characters per token of real text."""


def load_cross_encoder(
    name: str, who: str, *, max_length: int = 0, device: str = "auto", new_head: bool = False
) -> CrossEncoder:
    """Open a cross-encoder with one label; its length is reduced to the model's positions, with a line on stderr.

    Args:
        name: folder or hub name.
        who: the component and the setting's value, for messages.
        max_length: maximum tokens per pair; 0 uses the model's own limit.
        device: `auto` (an accelerator if available) or a torch device.
        new_head: for training: any encoder is accepted, and gets a head with one label if it has none.

    Raises:
        ConfigError: no such model, no cross-encoder, or one with several labels.
    """
    try:
        if not new_head:
            families.require_cross_encoder(name, who)
        model = CrossEncoder(
            name,
            max_length=max_length or None,
            device=None if device == "auto" else device,
            num_labels=1 if new_head else None,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{who}: {name!r} cannot be loaded: {error}") from error
    if model.num_labels != 1:
        raise ConfigError(f"{who}: {name!r} has {model.num_labels} labels; expected one, a score of relevance")
    longest = families.positions(model.model, model.model.config)
    # A model without a limit of tokens counts as one whose limit is too large.
    if longest is not None and (model.max_seq_length or longest + 1) > longest:
        if max_length > longest:
            print(
                f"{who} {name}: max_length={max_length} is limited to the {longest} tokens that the model has "
                "positions for",
                file=sys.stderr,
            )
        model.max_seq_length = longest
    return model


def clipped(text: str, model: CrossEncoder) -> str:
    """Text without the part that the model cannot read: the tokenizer would process all of it before truncating."""
    most = model.max_seq_length
    # A tokenizer without a limit reports a huge number.
    return text[: _CHARACTERS_PER_TOKEN * most] if most and most < 1_000_000 else text


def passage_text(passage: Passage) -> str:
    """The text of a passage that a cross-encoder reads: title and text, one per line."""
    return f"{passage.title}\n{passage.text}" if passage.title else passage.text


def model_fingerprint(name: str) -> str:
    """Hash of a folder's weights, configuration and tokenizer; a hub name is returned unchanged."""
    folder = Path(name)
    return checkpoint_fingerprint(folder, folder) if folder.is_dir() else name


@dataclass(frozen=True, kw_only=True)
class RerankerRecord(Record):
    """How to use a reranker; stored in its checkpoint as `agentic_r.json`."""

    schema: ClassVar[str | None] = "reranker/1"

    formulation: str
    """Name of the registered `query_formulation` that it was trained with."""
    max_length: int
    """Tokens of a pair, special tokens included."""


def _read_record(folder: str, *, training: bool) -> RerankerRecord | None:
    """The record of a checkpoint, if it has one. Training may start from a retriever, whose record is not used."""
    file = load_file_path(folder, RECORD_FILE)
    data = read_json(file) if file is not None else None
    if data is None or (training and isinstance(data, dict) and data.get("schema") != RerankerRecord.schema):
        return None
    with located(file):
        return RerankerRecord.from_dict(data)


class CrossEncoderReranker:
    """A cross-encoder (sentence-transformers); the scores are its logits.

    Args:
        source: where the model came from.
        precision: `float32`, `bfloat16` or `float16` (autocast), or `auto` (`compute.fast_type`).
        batch_size: pairs per forward pass, sorted by length.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options accepted in `rerank.options`. The first two replace what the checkpoint records."""

        formulation: str = ""
        max_length: int = 0
        precision: str = "auto"
        batch_size: int = field(default=32, metadata=FREE)

    def __init__(
        self, model: CrossEncoder, record: RerankerRecord, *, source: str, precision: str = "auto", batch_size: int = 32
    ) -> None:
        if precision not in ("auto", *compute.TYPES):
            raise ConfigError(f"reranker: precision {precision!r}: expected auto, {', '.join(compute.TYPES)}")
        if batch_size < 1:
            raise ConfigError(f"reranker: batch_size: expected at least 1, found {batch_size}")
        components.load("query_formulation", record.formulation)
        self.model, self.record, self.source = model, record, source
        self.precision, self.batch_size = precision, batch_size
        self.reads_reasoning = needs_reasoning(record.formulation)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        formulation: str = "",
        max_length: int = 0,
        untrained: str = "query",
        device: str = "auto",
        new_head: bool = False,
        **settings: Any,
    ) -> CrossEncoderReranker:
        """Open a checkpoint folder, a hub name or a `builtin:` name.

        Args:
            formulation, max_length: replace the recorded ones. A model without our record reads `untrained` and as many
                tokens as it has positions for, at most 512.
            new_head: see `load_cross_encoder`.
            settings: see the class.

        Raises:
            ConfigError: the model cannot be loaded or is no cross-encoder.
            RecordError: a broken `agentic_r.json`, or that of a retriever.
        """
        folder = resolve(name)
        record = _read_record(folder, training=new_head)
        length = max_length or (record.max_length if record else 0)
        model = load_cross_encoder(folder, "reranker", max_length=length, device=device, new_head=new_head)
        if not length:
            model.max_seq_length = min(model.max_seq_length or MAX_LENGTH, MAX_LENGTH)
        own = RerankerRecord(
            formulation=formulation or (record.formulation if record else untrained),
            max_length=model.max_seq_length or MAX_LENGTH,
        )
        return cls(model, own, source=folder, **settings)

    @classmethod
    def from_spec(cls, spec: SearchSpec) -> CrossEncoderReranker:
        """Build from the settings shared by all commands; for the options see the class."""
        if not spec.rerank.model:
            raise ConfigError("reranker 'cross_encoder' needs rerank.model, the folder or hub name of a cross-encoder")
        try:
            options = to_dict(load_config(cls.Options, values=spec.rerank.options))
        except ConfigError as error:
            raise ConfigError(f"reranker cross_encoder: {error}") from error
        return cls.load(spec.rerank.model, device=spec.device, **options)

    def query_text(self, request: SearchRequest) -> str:
        """What the model reads of a request; a reasoning that is too long loses its beginning."""
        if not self.reads_reasoning:
            return clipped(retriever_input(request, self.record.formulation), self.model)
        # The longer text of a pair is truncated first, so half of the tokens are safe: [CLS] A [SEP] B [SEP].
        half = (self.record.max_length - 3) // 2
        return retriever_input(request, self.record.formulation, count_tokens=self._tokens, max_tokens=half)

    def _tokens(self, text: str) -> int:
        """Tokens of a text without special tokens."""
        return len(self.model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def passage_text(self, passage: Passage) -> str:
        """What the model reads of a passage."""
        return clipped(passage_text(passage), self.model)

    def score(self, requests: Sequence[SearchRequest], passages: Sequence[Sequence[Passage]]) -> list[list[float]]:
        """See `rerank.Reranker.score`. Equal pairs are scored once, so equal passages tie exactly."""
        pairs = [
            [(self.query_text(request), self.passage_text(passage)) for passage in row]
            for request, row in zip(requests, passages, strict=True)
        ]
        distinct = list(dict.fromkeys(pair for row in pairs for pair in row))
        if not distinct:
            return [[] for _ in requests]
        # logits: a sigmoid would be 1 for all good passages
        with autocast(self.model.device, self.precision):
            found = self.model.predict(
                distinct, batch_size=self.batch_size, activation_fn=torch.nn.Identity(), show_progress_bar=False
            )
        scores = dict(zip(distinct, map(float, found), strict=True))
        return [[scores[pair] for pair in row] for row in pairs]

    def save(self, folder: str | Path) -> None:
        """Write the sentence-transformers folder with our record."""
        self.model.save_pretrained(str(folder), create_model_card=False)
        write_json(Path(folder) / RECORD_FILE, self.record.to_dict())

    def fingerprint(self) -> str:
        """Changes with the model's files (or hub name), formulation and length."""
        return fingerprint(model_fingerprint(self.source), self.record.to_dict())

    def close(self) -> None:
        """Nothing to free."""
