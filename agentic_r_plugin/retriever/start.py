"""The model that retriever training starts from."""

from __future__ import annotations

from typing import Any

from sentence_transformers.sentence_transformer.modules import Transformer

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.query import DEFAULT_FORMULATION
from agentic_r_plugin.retriever.settings import MAX_LENGTH, TrainRetrieverConfig
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.search.families import end_texts

_UNTRAINED = {"formulation": DEFAULT_FORMULATION, "max_length": MAX_LENGTH, "normalize": True}
"""Defaults for a model without `agentic_r.json` where the settings give no value (method sections 3 and 5)."""


def initial_retriever(config: TrainRetrieverConfig) -> Retriever:
    """Load the model that training starts from, with the record that the trained checkpoint will have.

    Raises:
        ConfigError: as `Retriever.load`; the model is not a transformer, or a decoder without an end-of-text token.
    """
    given: dict[str, Any] = {
        name: getattr(config, name)
        for name in ("formulation", "query_prompt", "passage_prompt", "query_max_length", "passage_max_length")
    }
    retriever = Retriever.load(
        config.retriever,
        preset=config.preset,
        pooling=config.pooling,
        device=config.device,
        precision="auto" if config.precision == "float16" else config.precision,
        untrained=_UNTRAINED,
        **given,
    )
    if not isinstance(retriever.model[0], Transformer):
        raise ConfigError(
            f"retriever {config.retriever!r} is made of {type(retriever.model[0]).__name__}; expected a transformer to "
            "train"
        )
    if retriever.record.pooling == "lasttoken":
        end_texts(retriever.model, config.retriever)
    return retriever
