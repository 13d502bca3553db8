"""How a family of models wants to be used: prefixes, pooling, and what its tokenizer must add.

A checkpoint with our record brings all of that itself; a preset is for models that nobody trained for agentic search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers.processors import TemplateProcessing

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.query import DEFAULT_FORMULATION
from agentic_r_plugin.retriever.settings import MAX_LENGTH, TrainRetrieverConfig
from agentic_r_plugin.search.encoder import PRESETS, RECORD_FILE, Retriever, resolve


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of embedding models."""

    query_prompt: str
    passage_prompt: str
    pooling: str | None
    """None: as the model says, and the mean where it says nothing."""


FAMILIES = {
    "plain": Family(query_prompt="", passage_prompt="", pooling=None),
    "e5": Family(query_prompt=PRESETS["e5"][0], passage_prompt=PRESETS["e5"][1], pooling="mean"),
    "bge": Family(query_prompt=PRESETS["bge"][0], passage_prompt=PRESETS["bge"][1], pooling="cls"),
    "minilm": Family(query_prompt="", passage_prompt="", pooling="mean"),
    "decoder": Family(
        query_prompt="Instruct: Given a question and a search query, retrieve passages that help to answer it\nQuery: ",
        passage_prompt="",
        pooling="lasttoken",
    ),
}
_DECODERS = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"})
POOLINGS = ("mean", "cls", "lasttoken")
_UNTRAINED = {
    "formulation": DEFAULT_FORMULATION, "query_max_length": MAX_LENGTH, "passage_max_length": MAX_LENGTH,
}  # fmt: skip
"""What training records for a model without our record, where the settings do not say (method section 3)."""


def initial_retriever(config: TrainRetrieverConfig) -> Retriever:
    """The model that training starts from, with the record that the trained one will have.

    Raises:
        ConfigError: no such model, preset, pooling or formulation; a decoder without an end-of-text token.
    """
    if config.preset != "auto" and config.preset not in FAMILIES:
        raise ConfigError(f"unknown preset {config.preset!r}; known: auto, {', '.join(FAMILIES)}")
    if config.pooling not in ("auto", *POOLINGS):
        raise ConfigError(f"pooling {config.pooling!r}: expected auto, {', '.join(POOLINGS)}")
    folder = Path(resolve(config.retriever))
    trained = (folder / RECORD_FILE).is_file()
    overrides: dict[str, Any] = {} if trained else dict(_UNTRAINED)
    lengths = {name: getattr(config, name) for name in ("query_max_length", "passage_max_length")}
    if config.preset != "auto":
        family = FAMILIES[config.preset]
        overrides |= {"query_prompt": family.query_prompt, "passage_prompt": family.passage_prompt}
    given = {"query_prompt": config.query_prompt, "passage_prompt": config.passage_prompt}
    given |= {"formulation": config.formulation} | lengths
    overrides |= {name: value for name, value in given.items() if value is not None}
    precision = "auto" if config.precision == "float16" else config.precision
    preset = "auto" if config.preset == "auto" else "plain"
    retriever = Retriever.load(config.retriever, preset=preset, device=config.device, precision=precision, **overrides)
    model, record = retriever.model, retriever.record
    if config.preset == "auto" and not trained:
        found = _family(config.retriever, model)
        if found == "decoder" and not record.query_prompt and config.query_prompt is None:
            record = replace(record, query_prompt=FAMILIES[found].query_prompt)
        family = FAMILIES[found] if not (folder / "modules.json").is_file() else FAMILIES["plain"]
    elif config.preset == "auto":
        family = FAMILIES["plain"]
    pooling = config.pooling if config.pooling != "auto" else family.pooling
    if pooling is not None:
        _set_pooling(model, pooling)
    record = replace(record, pooling=_pooling(model))
    if record.pooling == "lasttoken":
        _end_texts(model, config.retriever)
    positions = getattr(model[0].config, "max_position_embeddings", None) or MAX_LENGTH
    positions -= _positions_lost(model)
    record = replace(
        record,
        query_max_length=min(record.query_max_length, positions),
        passage_max_length=min(record.passage_max_length, positions),
    )
    return Retriever(model, record, precision=precision, source=config.retriever)


def _family(name: str, model: SentenceTransformer) -> str:
    config: Any = model[0].config
    architectures = getattr(config, "architectures", None) or []
    if config.model_type in _DECODERS or any(item.endswith("ForCausalLM") for item in architectures):
        return "decoder"
    words = Path(name).name.lower().replace("_", "-").replace(":", "-").split("-")
    return next((family for family in ("e5", "bge", "minilm") if family in words), "plain")


def _pooling(model: SentenceTransformer) -> str:
    return next((str(module.pooling_mode) for module in model if isinstance(module, Pooling)), "mean")


def _set_pooling(model: SentenceTransformer, pooling: str) -> None:
    for place, module in enumerate(model):
        if isinstance(module, Pooling):
            if module.pooling_mode != pooling:
                model[place] = Pooling(module.embedding_dimension, pooling)
            return
    raise ConfigError(f"pooling {pooling!r}: this model has no pooling module of sentence-transformers to change")


def _end_texts(model: SentenceTransformer, name: str) -> None:
    """Make the tokenizer end every text with its end-of-text token, also after cutting, and know a padding token.

    The vector of a decoder is that of the last token, which should be the same for every text.
    """
    tokenizer = model.tokenizer
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"retriever {name!r}: pooling lasttoken needs a tokenizer with an end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer("x")["input_ids"][-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        return
    start = [tokenizer.bos_token] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    special = [*start, tokenizer.eos_token]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*start, "$A", tokenizer.eos_token],
        pair=[*start, "$A", "$B", tokenizer.eos_token],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(special)],
    )


def _positions_lost(model: SentenceTransformer) -> int:
    """Positions that RoBERTa and its kin cannot use: they count from behind their padding token."""
    config: Any = model[0].config
    return 2 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
