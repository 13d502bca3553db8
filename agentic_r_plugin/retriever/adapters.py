"""LoRA adapters on the transformer. They are merged into its weights at the end, so the result is an ordinary model."""

from __future__ import annotations

from typing import Any, cast

import torch
from sentence_transformers import SentenceTransformer

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig


class Adapters:
    """Adapters on every linear layer except the pooler; all other parameters are frozen.

    Raises:
        ConfigError: peft is not installed.
    """

    def __init__(self, model: SentenceTransformer, config: TrainRetrieverConfig) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ConfigError(f"lora_rank={config.lora_rank} needs the package peft: pip install peft") from error
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a float works; the annotation says int
            target_modules="all-linear",
            exclude_modules=r".*pooler.*",  # no vector depends on it: pooling reads the tokens
        )
        self._transformer = cast(Any, model[0])
        # peft freezes the transformer alone; a dense layer after it would still be trained.
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        # Adapters start at random values, which must be the same in every process.
        torch.manual_seed(config.seed)
        self._wrapped: Any = get_peft_model(self._transformer.model, lora)  # changes the layers of the model in place

    def merge(self) -> None:
        """Merge the adapters into the weights and remove them from the model."""
        self._transformer.model = self._wrapped.merge_and_unload()
