"""The agent inside FlashRAG: `Config` + `get_dataset` + this pipeline, driven by the one protocol (method section 2).

config = Config("recipes/evaluation/flashrag.yaml", {"agentic_r": {...}})
pipeline = AgenticSearchPipeline(config)
pipeline.run(load_split(config, "test"))
print(pipeline.evaluator.result)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flashrag.dataset import Dataset
from flashrag.evaluator import Evaluator
from flashrag.pipeline import SearchR1Pipeline

from agentic_r_plugin.backends import open_llm, open_search
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.benchmarks import check_number, split_file
from agentic_r_plugin.evaluation.cache import with_cache
from agentic_r_plugin.evaluation.generator import AgenticGenerator
from agentic_r_plugin.evaluation.metrics import answer_ranks, gold_of
from agentic_r_plugin.evaluation.retriever import AgenticRetriever, FlashRAGBackend, to_doc
from agentic_r_plugin.evaluation.settings import read_agent_card, read_settings, resolve_agent
from agentic_r_plugin.protocol import AgentProtocol, Session
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Question
from agentic_r_plugin.rollout import RolloutCost, run_sessions, to_trajectory
from agentic_r_plugin.search.base import Hit


class StrictEvaluator(Evaluator):
    """FlashRAG's evaluator that lets errors through (FlashRAG prints one line and drops the metric)."""

    result: dict[str, float | None]
    """What the last `evaluate` found."""

    def __init__(self, config: Any) -> None:
        known = self._collect_metrics()
        unknown = sorted({name.lower() for name in config["metrics"]} - set(known))
        if unknown:
            raise ConfigError(f"metrics: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        super().__init__(config)
        self.result = {}

    def evaluate(self, data: Any) -> dict[str, float | None]:
        """All configured metrics; each item gets its scores under `metric_score`."""
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


class ProtocolPrompt:
    """The protocol's instruction where FlashRAG expects a prompt template."""

    def __init__(self, protocol: AgentProtocol) -> None:
        self.protocol = protocol

    def get_string(self, question: str, **_: Any) -> str:
        """The prompt's text, before any chat template."""
        return self.protocol.prompt(question)


class AgenticSearchPipeline(SearchR1Pipeline):
    """FlashRAG pipeline whose every trajectory is a `protocol.Session`.

    Each item gets `pred` (empty where the agent gave no answer), `answer` (None there), `trajectory` (the record),
    `retrieval_result` (all passages shown, in order), `retrieval_results` (per search, as FlashRAG's reasoning
    pipelines write it), `retrieved` (per search: ids to the settings' depth, and the first rank with a gold answer),
    `prompt`, `retrieved_times`, `finish_flag`, `finish_reason`, and `refusal`: None, or why the model, the retriever or
    the limits do not take the question; it has no answer then, and stop reason `max_tokens` or `search_failed`.

    Args:
        config: FlashRAG's `Config`; our settings under `agentic_r`.
        prompt_template: must stay None, since the instruction is the protocol's.
        retriever: an `AgenticRetriever`, or any FlashRAG retriever; opened from the settings where None.
        generator: an `AgenticGenerator`; opened from the settings where None.

    Raises:
        ConfigError: unknown keys or metrics, a generator or template that cannot carry the protocol.
    """

    def __init__(self, config: Any, prompt_template: Any = None, retriever: Any = None, generator: Any = None) -> None:
        self.settings = read_settings(config)
        card = read_agent_card(self.settings.agent.model) or read_agent_card(self.settings.agent.tokenizer)
        self.protocol, self.limits, self.topk = resolve_agent(self.settings, card)
        _refuse(config, prompt_template, generator)
        evaluator = StrictEvaluator(config)
        self._opened = ExitStack()
        with ExitStack() as opening:
            if generator is None:
                generator = AgenticGenerator(opening.enter_context(open_llm(self.settings.agent)))
            if retriever is None:
                retriever = AgenticRetriever(opening.enter_context(open_search(self.settings.search)), topk=self.topk)
            super().__init__(
                config,
                prompt_template=ProtocolPrompt(self.protocol),
                max_retrieval_num=self.limits.max_searches,
                begin_of_query_token=self.protocol.opening(self.protocol.search_tag),
                end_of_query_token=self.protocol.closing(self.protocol.search_tag),
                begin_of_documents_token=self.protocol.opening(self.protocol.information_tag),
                end_of_documents_token=self.protocol.closing(self.protocol.information_tag),
                begin_of_answer_token=self.protocol.opening(self.protocol.answer_tag),
                end_of_answer_token=self.protocol.closing(self.protocol.answer_tag),
                retriever=retriever,
                generator=generator,
            )
            self._opened = opening.pop_all()
        self.evaluator = evaluator
        backend = retriever.backend if isinstance(retriever, AgenticRetriever) else FlashRAGBackend(retriever)
        self.backend = with_cache(config, backend)
        self.save_retrieval_cache = False  # FlashRAG would write it at the end; ours is written search by search
        self.cost = RolloutCost()

    def close(self) -> None:
        """Free the model and the retriever that this pipeline opened itself."""
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
            dataset: its items are written to, in place.
            do_eval: whether the metrics are computed (`self.evaluator.result`).
            pred_process_fun: applied to the data set before.
            finished: outputs of an earlier, interrupted run by question id; these are not answered again.
            on_batch: called with the items that have just been answered.

        Raises:
            RecordError: a question's gold answers are no texts; none of the questions has been asked then.
            SearchError, BackendError: a part failed; what `on_batch` was given is whole.
        """
        finished = finished or {}
        waiting = []
        for item in dataset:
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


def load_split(config: Any, split: str) -> Any:
    """One split as a FlashRAG `Dataset` of checked questions.

    FlashRAG's own reader takes a text for a list of letters and questions without ids, so the rows are read here. The
    sample is drawn as FlashRAG draws it, of splits with any name (FlashRAG: test, val, dev and train).

    Raises:
        ConfigError: the split has no file (FlashRAG gives None), or fewer questions than the sample asked for.
        RecordError: as `questions.read_questions`.
    """
    file, sample = split_file(Path(config["dataset_path"]), split), config["test_sample_num"]
    items = [question.to_dict() for question in read_questions(file)]
    check_number(file, len(items), sample)
    random.seed(config["seed"])
    if sample is not None:
        items = random.sample(items, int(sample)) if config["random_sample"] else items[: int(sample)]
    return Dataset(config, str(file), data=items, sample_num=sample, random_sample=config["random_sample"])
