"""The search agent as a FlashRAG pipeline, driven by the same protocol as everywhere else (method section 2).

config = Config("recipes/evaluation/flashrag.yaml", {"agentic_r": {...}})
pipeline = AgenticSearchPipeline(config)
pipeline.run(load_split(config, "test"))
print(pipeline.evaluator.result)
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flashrag.dataset import Dataset
from flashrag.evaluator import Evaluator
from flashrag.pipeline import SearchR1Pipeline

from agentic_r_plugin.backends import open_llm, open_search
from agentic_r_plugin.cost import Cost
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.benchmarks import check_number, split_file
from agentic_r_plugin.evaluation.cache import with_cache
from agentic_r_plugin.evaluation.generator import AgenticGenerator
from agentic_r_plugin.evaluation.metrics import answer_ranks, gold_of
from agentic_r_plugin.evaluation.retriever import AgenticRetriever, FlashRAGBackend, to_doc
from agentic_r_plugin.evaluation.settings import (
    DEFAULT_PROTOCOL,
    protocol_options,
    read_agent_card,
    read_settings,
    resolve_agent,
)
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Question
from agentic_r_plugin.rollout import run_sessions, to_trajectory
from agentic_r_plugin.search.base import Hit
from agentic_r_plugin.session import Session


class StrictEvaluator(Evaluator):
    """FlashRAG's evaluator, except that errors are raised (FlashRAG prints one line and drops the metric)."""

    result: dict[str, float | None]
    """Metrics of the last call of `evaluate`."""

    def __init__(self, config: Any) -> None:
        known = self._collect_metrics()
        unknown = sorted({name.lower() for name in config["metrics"]} - set(known))
        if unknown:
            raise ConfigError(f"metrics: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        super().__init__(config)
        self.result = {}

    def evaluate(self, data: Any) -> dict[str, float | None]:
        """Compute all configured metrics. Each item gets its scores under `metric_score`."""
        self.result = {}
        for name in self.metrics:
            summary, scores = self.metric_class[name].calculate_metric(data)
            self.result.update(summary)
            for score, item in zip(scores, data, strict=True):
                item.update_evaluation_score(name, score)
        if self.save_metric_flag:
            self.save_metric_score(self.result)
        if self.save_data_flag:
            self.save_data(data)
        return self.result


class AgenticSearchPipeline(SearchR1Pipeline):
    """FlashRAG pipeline in which every trajectory is a `session.Session`.

    Output keys of each item:
        pred: the answer; an empty string if there is none.
        answer: the answer; None if there is none.
        trajectory: the trajectory record.
        retrieval_result: all passages shown, in order.
        retrieval_results: passages per search, in the form of FlashRAG's reasoning pipelines.
        retrieved: per search, the ids down to the setting `depth` and the first rank with a gold answer.
        refusal: None, or why the model, the retriever or the limits refused the question. Such a question has no answer
            and the stop reason `max_tokens` or `search_failed`.
        prompt, retrieved_times, finish_flag, finish_reason: as in FlashRAG.

    Args:
        config: FlashRAG's `Config`, with our settings under `agentic_r`.
        prompt_template: must be None, because the instruction belongs to the protocol.
        retriever: an `AgenticRetriever` or any FlashRAG retriever; None opens the one in the settings.
        generator: an `AgenticGenerator`; None opens the one in the settings.

    Raises:
        ConfigError: unknown keys or metrics, or a generator or template that cannot be used with a protocol.
    """

    def __init__(self, config: Any, prompt_template: Any = None, retriever: Any = None, generator: Any = None) -> None:
        self.settings = read_settings(config)
        card = read_agent_card(self.settings.agent.model) or read_agent_card(self.settings.agent.tokenizer)
        if card is None and self.settings.protocol is None:
            named = self.settings.agent.model or self.settings.agent.url
            print(f"{named}: no agent.json and no protocol given, so {DEFAULT_PROTOCOL}", file=sys.stderr)
        self.protocol, self.limits, self.topk = resolve_agent(self.settings, card)
        self.protocol_options = protocol_options(self.settings, card)
        _refuse(config, prompt_template, generator)
        evaluator = StrictEvaluator(config)
        self._opened = ExitStack()
        # If a later step fails, the block closes what was opened; on success `pop_all` keeps it open.
        with ExitStack() as opening:
            if generator is None:
                generator = AgenticGenerator(opening.enter_context(open_llm(self.settings.agent)))
            if retriever is None:
                retriever = AgenticRetriever(opening.enter_context(open_search(self.settings.search)), topk=self.topk)
            super().__init__(
                config,
                # Without a template FlashRAG makes one, and loads its own generator's configuration for that.
                prompt_template=SimpleNamespace(get_string=lambda question, **_: self.protocol.prompt(question)),
                max_retrieval_num=self.limits.max_searches,
                retriever=retriever,
                generator=generator,
            )
            self._opened = opening.pop_all()
        self.evaluator = evaluator
        backend = retriever.backend if isinstance(retriever, AgenticRetriever) else FlashRAGBackend(retriever)
        self.backend = with_cache(config, backend)
        self.save_retrieval_cache = False  # FlashRAG would write it at the end; ours is written after every search
        self.cost = Cost()

    def close(self) -> None:
        """Close the model and the retriever if this pipeline opened them."""
        self._opened.close()

    def run(
        self,
        dataset: Any,
        do_eval: bool = True,
        pred_process_fun: Callable[[Any], Any] | None = None,
        *,
        finished: Mapping[str, dict[str, Any]] | None = None,
        on_batch: Callable[[Sequence[Any]], None] | None = None,
    ) -> Any:
        """Answer every question of a FlashRAG `Dataset` and evaluate.

        Args:
            dataset: the questions; outputs are written to its items in place.
            do_eval: whether to compute the metrics (`self.evaluator.result`).
            pred_process_fun: applied to the data set before the metrics.
            finished: outputs of an earlier, interrupted run by question id; these questions are not answered again.
            on_batch: called with the items of each answered batch.

        Raises:
            RecordError: the gold answers of a question are not texts; raised before any question is answered.
            SearchError, BackendError: the retriever or the model failed; batches passed to `on_batch` are complete.
        """
        finished = finished or {}
        waiting = []
        for item in dataset:
            # Raises for gold answers that are not texts, before any question is answered.
            gold_of(item)
            if str(item.id) in finished:
                item.output = dict(finished[str(item.id)])
            else:
                waiting.append(item)
        for start in range(0, len(waiting), self.settings.batch_size):
            batch = waiting[start : start + self.settings.batch_size]
            self._answer(batch)
            if on_batch is not None:
                on_batch(batch)
        return self.evaluate(dataset, do_eval=do_eval, pred_process_fun=pred_process_fun)

    def _answer(self, items: Sequence[Any]) -> None:
        codec = self.generator.llm.codec
        sessions = [Session(self.protocol, codec, self.limits, item.question) for item in items]
        # Keyed by `id`, because sessions are mutable and have no hash.
        shown: dict[int, dict[str, Hit]] = {id(session): {} for session in sessions}
        deep: dict[int, list[list[Hit]]] = {id(session): [] for session in sessions}

        def remember(session: Session, hits: list[Hit], deeper: list[Hit]) -> None:
            shown[id(session)].update({hit.passage.id: hit for hit in hits})
            deep[id(session)].append(deeper)

        run_sessions(
            sessions,
            self.generator.llm,
            self.backend,
            topk=self.topk,
            sampling=self.settings.sampling(),
            cost=self.cost,
            depth=self.settings.depth,
            on_search=remember,
        )
        for item, session in zip(items, sessions, strict=True):
            self._write(item, session, shown[id(session)], deep[id(session)])

    def _write(self, item: Any, session: Session, seen: Mapping[str, Hit], deep: Sequence[Sequence[Hit]]) -> None:
        question = Question(id=str(item.id), question=item.question, golden_answers=tuple(gold_of(item)))
        record = to_trajectory(session, question)
        # The record holds ids only; FlashRAG's metrics need the passages.
        shown = [[to_doc(seen[passage.id].passage) for passage in turn.passages] for turn in record.turns]
        ranks = answer_ranks([[to_doc(hit.passage) for hit in hits] for hits in deep], question.golden_answers)
        outputs = {
            "prompt": self.prompt_template.get_string(question=item.question),
            "pred": record.answer if record.answer is not None else "",
            "answer": record.answer,
            "trajectory": record.to_dict(),
            "retrieval_result": list({doc["id"]: doc for docs in shown for doc in docs}.values()),
            "retrieval_results": {
                str(i): {"query": turn.query, "docs": docs}
                for i, (turn, docs) in enumerate(zip(record.turns, shown, strict=True))
            },
            "retrieved": [
                {"ids": [hit.passage.id for hit in hits], "answer_rank": rank}
                for hits, rank in zip(deep, ranks, strict=True)
            ],
            "retrieved_times": len(record.turns),
            "finish_flag": True,
            "finish_reason": record.stop_reason.value,
            "refusal": session.refusal,
        }
        for key, value in outputs.items():
            item.update_output(key, value)


def _refuse(config: Any, prompt_template: Any, generator: Any) -> None:
    if prompt_template is not None:
        raise ConfigError(
            "prompt_template: the agent's instruction belongs to its protocol; register an agent_protocol and name it "
            "in agentic_r.protocol"
        )
    if generator is not None and not isinstance(generator, AgenticGenerator):
        raise ConfigError(
            f"generator: expected an AgenticGenerator, found {type(generator).__name__}; the protocol needs token ids"
        )


def load_split(config: Any, split: str, format: str = "") -> Any:
    """Read one split as a FlashRAG `Dataset` of checked questions.

    FlashRAG's own reader accepts questions without ids and reads a text as a list of letters, so the rows are read
    here. The sample is drawn as in FlashRAG, but a split may have any name (in FlashRAG: test, val, dev or train).

    Raises:
        ConfigError: an unknown format, or the split has no file, where FlashRAG returns None, or fewer questions than
            the sample needs.
        RecordError: as `questions.read_questions`.
    """
    file, sample = split_file(Path(config["dataset_path"]), split), config["test_sample_num"]
    items = [question.to_dict() for question in read_questions(file, format=format)]
    check_number(file, len(items), sample)
    # FlashRAG draws from the global generator after the same seed, so both draw the same sample.
    random.seed(config["seed"])
    if sample is not None:
        items = random.sample(items, int(sample)) if config["random_sample"] else items[: int(sample)]
    return Dataset(config, str(file), data=items, sample_num=sample, random_sample=config["random_sample"])
