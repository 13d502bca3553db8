"""How to use an embedding model without our record: prefixes, pooling and normalisation, with the reasons.

The order of precedence is the same in every command: settings, the checkpoint's `agentic_r.json` (`search.encoder`),
the model's own sentence-transformers files, a known model name (exact match). What cannot be determined is an error,
not a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from sentence_transformers.util.file_io import load_file_path
from tokenizers.processors import TemplateProcessing
from torch import nn

from agentic_r_plugin.errors import ConfigError

POOLINGS = ("mean", "cls", "lasttoken")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of embedding models."""

    query_prompt: str = ""
    passage_prompt: str = ""
    pooling: str | None = "mean"
    """None: taken from the model."""
    normalize: bool = True
    """Whether vectors have length 1; False for models trained with inner products."""

    @property
    def prompts(self) -> tuple[str, str]:
        """Prefixes of queries and passages."""
        return self.query_prompt, self.passage_prompt


FAMILIES: dict[str, Family] = {
    "plain": Family(pooling=None),
    "e5": Family(query_prompt="query: ", passage_prompt="passage: "),
    "bge": Family(query_prompt="Represent this sentence for searching relevant passages: ", pooling="cls"),
    "minilm": Family(),
    "decoder": Family(
        query_prompt="Instruct: Given a question and a search query, retrieve passages that help to answer it\nQuery: ",
        pooling="lasttoken",
    ),
    "instruct": Family(
        query_prompt="Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ",
        pooling=None,
    ),
    "bge_zh": Family(query_prompt="为这个句子生成表示以用于检索相关文章：", pooling="cls"),
    "bge_m3": Family(pooling="cls"),
    "contriever": Family(normalize=False),
    "nomic": Family(query_prompt="search_query: ", passage_prompt="search_document: "),
}
"""Values of `preset`. `instruct`: E5 models that read a task before the query; this task is web search."""

_SIZES = "(?:tiny|mini|small|base|large)"
_NAMES = {
    rf"(?:multilingual-)?e5-{_SIZES}(?:-v2|-unsupervised|-4k)?|agentic-r-e5": "e5",
    r"(?:multilingual-)?e5-(?:[a-z0-9.]+-)+instruct": "instruct",
    rf"bge-{_SIZES}(?:-en)?(?:-v1\.5)?": "bge",
    rf"bge-{_SIZES}-zh(?:-v1\.5)?": "bge_zh",
    r"bge-m3": "bge_m3",
    r"all-(?:minilm-l(?:6|12)|mpnet-base|distilroberta)-v[12]": "minilm",
    r"m?contriever(?:-msmarco)?": "contriever",
    r"nomic-embed-text-v1(?:\.5)?": "nomic",
}
"""Full names of the published models, in lower case -> family."""

_ORGANISATION = re.compile(r"^(?:intfloat|baai|facebook|nomic-ai|sentence-transformers|liuwenhan)-+")

_QUERY_NAMES = (
    "query", "queries", "question", "questions", "search_query", "retrieval_query", "web_search_query", "s2p_query",
)  # fmt: skip
_PASSAGE_NAMES = (
    "document", "passage", "corpus", "documents", "passages", "doc", "docs", "search_document", "retrieval_document",
    "retrieval_passage", "search_passage", "s2p_document", "s2p_passage",
)  # fmt: skip
_OTHER_TASK = re.compile(r"sts|s2s|cluster|classif|summar|bitext|separation|matching|rerank", re.IGNORECASE)
"""Prompts of tasks other than retrieval; they say nothing about queries and passages."""

_NOT_ONE_VECTOR = {
    "SparseEncoder": "a sparse model (SPLADE): one weight per word",
    "MultiVectorEncoder": "a multi-vector model (ColBERT): one vector per token",
    "CrossEncoder": "a cross-encoder: it scores pairs of texts",
}


def read_json_file(name: str, file: str, key: str | None = None) -> Any:
    """A JSON file of a model folder or hub repository (only the value of `key`, if given); None if missing."""
    path = load_file_path(name, file)
    if path is None:
        return None
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return found if key is None or not isinstance(found, dict) else found.get(key)


def require_cross_encoder(name: str, who: str) -> None:
    """Raise `ConfigError` for another kind of model: its head would be random, and its scores meaningless."""
    kind = read_json_file(name, "config_sentence_transformers.json", "model_type")
    architectures = read_json_file(name, "config.json", "architectures") or []
    scores = any(item.endswith(("ForSequenceClassification", "ForCausalLM")) for item in architectures)
    if kind != "CrossEncoder" and (kind is not None or (architectures and not scores)):
        raise ConfigError(
            f"{who}: {name!r} is no cross-encoder ({kind or ', '.join(architectures)}); expected a model that scores "
            "pairs of texts, such as cross-encoder/ms-marco-MiniLM-L6-v2 or one made by agentic-r train-reranker"
        )


def require_one_vector(name: str, source: str) -> None:
    """Raise `ConfigError` for models that do not give one vector per text."""
    kind = read_json_file(name, "config_sentence_transformers.json", "model_type") or "SentenceTransformer"
    modules = [str(module.get("type")).lower() for module in read_json_file(name, "modules.json") or []]
    architectures = read_json_file(name, "config.json", "architectures") or []
    names = re.split(r"[^a-z0-9]+", " ".join(names_of(name)))
    if any("splade" in module or "sparse_encoder" in module for module in modules) or "splade" in names:
        kind = "SparseEncoder"
    elif (
        any("pylate" in module or "multi_vector" in module for module in modules)
        or any("colbert" in architecture.lower() for architecture in architectures)
        # Checkpoints of the ColBERT project have this file.
        or load_file_path(name, "artifact.metadata") is not None
        or (not modules and any(word.startswith("colbert") for word in names))
    ):
        kind = "MultiVectorEncoder"
    elif not modules and any(item.endswith("ForSequenceClassification") for item in architectures):
        kind = "CrossEncoder"
    if kind in _NOT_ONE_VECTOR:
        raise ConfigError(
            f"retriever {source!r} is {_NOT_ONE_VECTOR[kind]}; expected a model with one dense vector per text, such "
            "as intfloat/e5-base-v2"
        )
    if not modules and (two := [item for item in architectures if item.startswith("DPR")]):
        raise ConfigError(
            f"retriever {source!r} is one half of a two-encoder model ({', '.join(two)}); expected one model for "
            "queries and passages"
        )


def require_known(preset: str, pooling: str) -> None:
    """Raise `ConfigError` unless both are valid values of their settings."""
    if preset != "auto" and preset not in FAMILIES:
        raise ConfigError(f"unknown preset {preset!r}; known: auto, {', '.join(FAMILIES)}")
    if pooling not in ("auto", *POOLINGS):
        raise ConfigError(f"pooling {pooling!r}: expected auto, {', '.join(POOLINGS)}")


def names_of(name: str) -> list[str]:
    """Names of a model, most specific first: by its hub cache or folder, then by its configuration.

    >>> names_of("/cache/models--intfloat--e5-base-v2/snapshots/0123abcd"), names_of("BAAI/bge-small-en")
    (['e5-base-v2'], ['bge-small-en'])
    """
    configured = read_json_file(name, "config.json", "_name_or_path") if Path(name).is_dir() else None
    found = []
    for text in (name, configured or ""):
        cached = [part for part in Path(text).parts if part.startswith("models--")]
        last = (cached[-1].rpartition("--")[2] if cached else Path(text).name).lower().replace("_", "-")
        found.append(_ORGANISATION.sub("", last))
    return [text for text in dict.fromkeys(found) if text]


def family_of(names: list[str]) -> tuple[str, str] | None:
    """(name, family) of the first name that is exactly a known model's; the name of an instruct model ends the search.

    >>> family_of(["multilingual-e5-small"]), family_of(["multilingual-e5-large-instruct"])
    (('multilingual-e5-small', 'e5'), ('multilingual-e5-large-instruct', 'instruct'))
    >>> family_of(["my-e5-like"]), family_of(["my-instruct-model", "e5-base"])
    (None, None)
    """
    for name in names:
        for pattern, family in _NAMES.items():
            if re.fullmatch(pattern, name):
                return name, family
        # The next name may be that of its base model, whose prefixes an instruct model does not use.
        if "instruct" in name:
            return None
    return None


def untrained_use(
    model: SentenceTransformer, name: str, source: str, *, preset: str, pooling: str, given: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """(`query_prompt`, `passage_prompt`, `pooling` and `normalize` of a model without our record, where each is from).

    Args:
        name: its folder or hub name. source: as the user named it.
        preset: a family, or `auto`.
        pooling: one of `POOLINGS`, or `auto`.
        given: `query_prompt`, `passage_prompt` and `normalize`, where the settings give them.

    Raises:
        ConfigError: ambiguous prompts, no pooling, or a similarity other than the inner product.
    """
    require_known(preset, pooling)
    named = family_of(names_of(name))
    (query, passage), why_prompts = _prompts(model, source, preset, named, given)
    pooled, why_pooling = _pooling(model, name, source, preset, pooling, named)
    normalize = given.get("normalize")
    if normalize is None:
        normalize = _normalized(model, name, source, named)
    return (
        {"query_prompt": query, "passage_prompt": passage, "pooling": pooled, "normalize": normalize},
        f"prefixes {query!r} (queries) and {passage!r} (passages) {why_prompts}; pooling {pooled} {why_pooling}",
    )


def _prompts(
    model: SentenceTransformer, source: str, preset: str, named: tuple[str, str] | None, given: Mapping[str, Any]
) -> tuple[tuple[str, str], str]:
    """(prefixes of queries and passages, where they are from)."""
    fixed = (given.get("query_prompt"), given.get("passage_prompt"))
    found, why = _prompts_not_given(model, source, preset, named, fixed)
    query, passage = (text if value is None else value for text, value in zip(found, fixed, strict=True))
    return (query, passage), why if None in fixed else "as set"


def _prompts_not_given(
    model: SentenceTransformer, source: str, preset: str, named: tuple[str, str] | None, fixed: tuple[Any, Any]
) -> tuple[tuple[str, str], str]:
    if preset != "auto":
        return FAMILIES[preset].prompts, f"by preset {preset}"
    own = {key: text for key, text in (model.prompts or {}).items() if text}
    query, passage = _own(own, _QUERY_NAMES), _own(own, _PASSAGE_NAMES)
    rest = [key for key in own if _alias(key) not in (*_QUERY_NAMES, *_PASSAGE_NAMES) and not _OTHER_TASK.search(key)]
    unclear = [
        setting
        for setting, texts, value in (("query_prompt", query, fixed[0]), ("passage_prompt", passage, fixed[1]))
        # Several texts for this role, or none although prompts of unknown use exist.
        if value is None and (len(texts) > 1 or (not texts and rest))
    ]
    if unclear:
        listed = ", ".join(f"{key}: {text!r}" for key, text in own.items())
        raise ConfigError(
            f"retriever {source!r} has prompts whose use for retrieval is not clear ({listed}); give "
            f"{' and '.join(unclear)} (an empty text for none)"
        )
    # The model's own prompts come before those of its name.
    if named is not None and not query and not passage:
        return FAMILIES[named[1]].prompts, f"by its name {named[0]} (preset {named[1]})"
    why = "from the model's own prompts" if own else "because it has no prompts and is no model known by name"
    return ("".join(query[:1]), "".join(passage[:1])), why


def _alias(key: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", key.lower())


def _own(prompts: Mapping[str, str], names: tuple[str, ...]) -> list[str]:
    """Prompts under the names of one role; only the first if the role's main name is among them."""
    by_alias = {_alias(key): text for key, text in prompts.items()}
    found = list(dict.fromkeys(by_alias[name] for name in names if name in by_alias))
    return found[:1] if names[0] in by_alias else found


def _pooling(
    model: SentenceTransformer, name: str, source: str, preset: str, pooling: str, named: tuple[str, str] | None
) -> tuple[str, str]:
    if pooling != "auto":
        return pooling, "as set"
    if preset != "auto" and (of_preset := FAMILIES[preset].pooling) is not None:
        return of_preset, f"by preset {preset}"
    if not is_plain(name):
        return pooling_of(model, source), "from its checkpoint"
    if preset == "auto" and named is not None and (of_family := FAMILIES[named[1]].pooling) is not None:
        return of_family, f"by its name {named[0]}"
    config: Any = getattr(model[0], "config", None)
    architectures = getattr(config, "architectures", None) or []
    if any(item.endswith("ForCausalLM") for item in architectures) and getattr(config, "is_causal", True):
        return "lasttoken", "because only the last token of a causal model sees the whole text"
    raise ConfigError(
        f"retriever {source!r} has no pooling module of sentence-transformers (1_Pooling), and is no model known by "
        f"name: give pooling={', '.join(POOLINGS)}, whichever it was trained with"
    )


def _normalized(model: SentenceTransformer, name: str, source: str, named: tuple[str, str] | None) -> bool:
    if isinstance(model[-1], Normalize):
        return True
    similarity = read_json_file(name, "config_sentence_transformers.json", "similarity_fn_name") or "cosine"
    if similarity not in ("cosine", "dot"):
        raise ConfigError(
            f"retriever {source!r} compares vectors of any length by {similarity} distance; expected cosine or dot"
        )
    if is_plain(name) and named is not None:
        return FAMILIES[named[1]].normalize
    return bool(similarity == "cosine")


def is_plain(name: str) -> bool:
    """Whether a folder or hub repository holds a plain transformers model, without sentence-transformers' modules."""
    return load_file_path(name, "modules.json") is None


def pooling_of(model: SentenceTransformer, source: str) -> str:
    """`mean`, `cls`, `lasttoken`, …, several joined by `+`; `own` if other modules make the vector.

    Raises:
        ConfigError: no module turns the token vectors into one vector.
    """
    for module in model:
        if isinstance(module, Pooling):
            return module.pooling_mode if isinstance(module.pooling_mode, str) else "+".join(module.pooling_mode)
    if isinstance(model[0], Transformer) and model[0].module_output_name == "token_embeddings" and len(model) < 2:
        raise ConfigError(f"retriever {source!r}: its modules.json has no pooling; give pooling={', '.join(POOLINGS)}")
    return "own"


def set_pooling(model: SentenceTransformer, pooling: str, source: str, *, asked: bool) -> None:
    """Set the model's pooling; whether the prompt is included in it does not change.

    Raises:
        ConfigError: a setting asked for this pooling, but the model has no pooling module and needs none.
    """
    for place, module in enumerate(model):
        if isinstance(module, Pooling):
            if module.pooling_mode != pooling and pooling in Pooling.POOLING_MODES:
                model[place] = Pooling(module.embedding_dimension, pooling, include_prompt=module.include_prompt)
            return
    if pooling in POOLINGS and len(model) == 1 and isinstance(model[0], Transformer):
        model.append(Pooling(model[0].get_embedding_dimension(), pooling))
    elif asked:
        raise ConfigError(
            f"retriever {source!r}: pooling {pooling!r}: this model has no pooling module of sentence-transformers to "
            "change"
        )


def end_texts(model: SentenceTransformer, source: str) -> None:
    """Make the tokenizer end every text with its end-of-text token, also after truncation, and set a padding token.

    A decoder's text vector is that of the last token, which should be the same token for every text. A tokenizer that
    already ends texts with a special token (Qwen3-Embedding: its padding token) does not change.
    """
    tokenizer = model.tokenizer
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"retriever {source!r}: pooling lasttoken needs a tokenizer with an end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # If "x" does not end with its own tokens, the tokenizer ends texts with a special token already.
    bare = tokenizer("x", add_special_tokens=False)["input_ids"]
    if tokenizer("x")["input_ids"][-len(bare) :] != bare:
        return
    # The new template replaces the tokenizer's own, so a BOS token that this one adds is kept.
    start = [tokenizer.bos_token] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    special = [*start, tokenizer.eos_token]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*start, "$A", tokenizer.eos_token],
        pair=[*start, "$A", "$B", tokenizer.eos_token],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(special)],
    )


def longest_text(model: SentenceTransformer) -> int | None:
    """Maximum tokens of a text, special tokens included, by the model's positions; None if no bound is known."""
    config = getattr(model[0], "config", None)
    return None if config is None else positions(model[0], config)


def positions(model: nn.Module, config: Any) -> int | None:
    """Number of positions that a model of transformers has for tokens; None if its configuration gives no bound."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found - first_position(model) if isinstance(found, int) and found > 0 else None


def first_position(model: nn.Module) -> int:
    """Position of a text's first token: RoBERTa-like models count from after their padding index."""
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), nn.Embedding):
            return padding + 1
    return 0
