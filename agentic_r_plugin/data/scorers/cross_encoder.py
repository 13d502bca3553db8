"""Relevance by a cross-encoder: no language model, a few milliseconds per passage on an accelerator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from agentic_r_plugin.config import FREE, check_least, fingerprint, load_config
from agentic_r_plugin.data.scorers.base import Resources, ScoringTask, check_options
from agentic_r_plugin.errors import BackendError, ConfigError, JudgeError

TEXTS = ("query", "question_query")


class CrossEncoderScorer:
    """A cross-encoder (sentence-transformers) scores each pair of query and passage; its sigmoid times 100.

    The threshold of the selection then means a probability of 0.6 under that model; check the distribution in the data
    report before relying on it.

    Args:
        model: directory or hub name of a cross-encoder with one label.
        text: text used for the query: `query`, or `question_query` (the question, then the query).
        batch_size: pairs per forward pass.
        max_length: maximum tokens per pair; 0 uses the model's own limit.
        device: `auto` (cuda if available) or a torch device.

    Raises:
        ConfigError: no such model, or one with several labels.
    """

    @dataclass(frozen=True, kw_only=True)
    class Options:
        """Options of this scorer."""

        model: str = ""
        text: str = "query"
        batch_size: int = field(default=64, metadata=FREE)
        max_length: int = 0
        device: str = field(default="auto", metadata=FREE)

    needs_questions = False

    def __init__(
        self, model: str, *, text: str = "query", batch_size: int = 64, max_length: int = 0, device: str = "auto"
    ) -> None:
        from agentic_r_plugin.search.cross_encoder import load_cross_encoder

        if text not in TEXTS:
            raise ConfigError(f"cross_encoder: text={text!r}: expected one of {', '.join(TEXTS)}")
        if not model:
            raise ConfigError("cross_encoder: give options.model, the directory or hub name of a cross-encoder")
        self.model, self.text, self.batch_size, self.max_length = model, text, batch_size, max_length
        self._encoder: Any = load_cross_encoder(model, "cross_encoder", max_length=max_length, device=device)

    @classmethod
    def build(cls, options: Mapping[str, Any], resources: Resources) -> CrossEncoderScorer:
        """Build from `model`, `text`, `batch_size`, `max_length` and `device`.

        Raises:
            ConfigError: an unknown option, or no model.
        """
        check_options("cross_encoder", options, *(item.name for item in fields(cls.Options)))
        try:
            found = load_config(cls.Options, values=options)
        except ConfigError as error:
            raise ConfigError(f"relevance scorer cross_encoder: {error}") from error
        check_least(found, "cross_encoder: ", batch_size=1)
        return cls(**vars(found))

    def score(self, tasks: Sequence[ScoringTask]) -> list[dict[str, int] | JudgeError]:
        """Scores of every task; never a JudgeError.

        Raises:
            BackendError: the model returned a value that is not a probability.
        """
        import torch

        from agentic_r_plugin.search.cross_encoder import clipped, passage_text

        pairs = [
            (self._text(task), clipped(passage_text(passage), self._encoder))
            for task in tasks
            for passage in task.passages
        ]
        if not pairs:
            return [{} for _ in tasks]
        found = self._encoder.predict(
            pairs, batch_size=self.batch_size, activation_fn=torch.nn.Sigmoid(), show_progress_bar=False
        )
        values = [float(value) for value in found]
        # NaN fails this comparison, too.
        if not all(0 <= value <= 1 for value in values):
            raise BackendError(
                f"cross_encoder {self.model}: expected scores in 0..1, found {min(values)}..{max(values)}"
            )
        scores = iter(values)
        return [{passage.id: round(100 * next(scores)) for passage in task.passages} for task in tasks]

    def _text(self, task: ScoringTask) -> str:
        return task.query.query if self.text == "query" else f"{task.query.question} {task.query.query}"

    def fingerprint(self) -> str:
        """Hash of the checkpoint's files (or the hub name) and the options."""
        from agentic_r_plugin.search.cross_encoder import model_fingerprint

        return fingerprint("cross_encoder", model_fingerprint(self.model), self.text, self.max_length)
