"""One cell of the matrix: one agent with one retriever on one benchmark, through FlashRAG, resumable batch by batch.

| file in the cell's folder | contents |
|---|---|
| `.manifest.json` | settings and inputs of the cell; written first (`storage.claim`) |
| `.work` | questions answered so far; removed at the end |
| `per_question.jsonl` | trajectory records, in the order of the questions |
| `judgements.jsonl` | with a judge: its judgement of each answer |
| `scores.json` | scores of every question: `{"id": [...], METRIC: [...]}` |
| `result.json` | means, intervals, cost, inputs and provenance; written last, so its existence means done |
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrag.config import Config

from agentic_r_plugin.errors import RequestRefusedError
from agentic_r_plugin.evaluation.answer_judge import AnswerJudge
from agentic_r_plugin.evaluation.generator import AgenticGenerator
from agentic_r_plugin.evaluation.metrics import recall_by_turn
from agentic_r_plugin.evaluation.pipeline import AgenticSearchPipeline, load_split
from agentic_r_plugin.evaluation.provenance import made_by, provenance
from agentic_r_plugin.evaluation.retriever import AgenticRetriever
from agentic_r_plugin.evaluation.settings import KEY, AgenticRSettings
from agentic_r_plugin.evaluation.statistics import bootstrap_interval, wilson_interval
from agentic_r_plugin.llm.base import LLMBackend
from agentic_r_plugin.progress import progress
from agentic_r_plugin.records import Record, Trajectory
from agentic_r_plugin.search.base import SearchBackend
from agentic_r_plugin.storage.claim import Claim, Output
from agentic_r_plugin.storage.json_text import parse_json
from agentic_r_plugin.storage.table import UnitResult, WorkTable
from agentic_r_plugin.store import atomic_path, read_json, write_json, write_records

if TYPE_CHECKING:
    from agentic_r_plugin.evaluation.evaluate import EvaluateConfig

RESULT = "result.json"
SCORES = "scores.json"
PER_QUESTION = "per_question.jsonl"
JUDGEMENTS = "judgements.jsonl"
OPENED = ("agent_fingerprint", "search_fingerprint", "judge_fingerprint")
"""Entries of `made_from` that are known only once agent, retriever and judge are open."""

ADDRESSES = ("agent_url", "retriever")
"""Entries of `made_from` that earlier versions wrote for servers; `retriever` is now left out for a service."""

BREAKDOWNS = ("hops", "type", "level")
"""Keys of question metadata by which exact match is broken down, if the benchmark has them."""

_YES_OR_NO = frozenset({"agentic_em", "agentic_sub_em", "agentic_judge"})
"""Metrics with a score of 0 or 1 per question."""

_RATIOS = frozenset({"malformed_share"})
"""Metrics that are a ratio of sums. A bootstrap over per-question scores would estimate something else."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Agent, retriever, benchmark and settings of one cell."""

    agent: str
    retriever: str
    benchmark: str
    config: EvaluateConfig
    settings: AgenticRSettings
    """Settings that include the paths of this agent and this retriever."""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    """Everything the result depends on. A resume with other values is refused."""

    @property
    def name(self) -> str:
        """Name of the cell and of its folder."""
        return f"{self.agent}-{self.retriever}-{self.benchmark}"

    @property
    def split(self) -> str:
        """Split of the benchmark."""
        return self.config.splits.get(self.benchmark, self.config.split)

    @property
    def num_questions(self) -> int | None:
        """Questions to answer; None: all."""
        return self.config.random if self.config.first is None else self.config.first

    def output(self, out: Path) -> Output:
        """The cell's folder in `out`. Metrics are computed after the last question, so until then they may change."""
        return Output(
            out=out / self.name, made_from=self.made_from, done=RESULT, folder=True, late=(*OPENED, *ADDRESSES),
            at_end=frozenset({"metrics", "level", "resamples"}),
        )  # fmt: skip

    def flashrag_config(self) -> Config:
        """FlashRAG's configuration. FlashRAG itself saves nothing, sets no GPU variable and loads no model."""
        settings = {
            "data_dir": self.config.data_dir,
            "dataset_name": self.benchmark,
            "split": [self.split],
            "test_sample_num": self.num_questions,
            "random_sample": self.config.random is not None,
            "seed": self.config.seed,
            "metrics": list(self.config.metrics),
            "gpu_id": None,
            "disable_save": True,
            "save_metric_score": False,
            "save_intermediate_data": False,
            KEY: asdict(self.settings),
        }
        return Config(config_dict=settings)


@dataclass(frozen=True, kw_only=True)
class _Answered(Record):
    """A finished question with the output that the pipeline wrote to its item."""

    id: str
    output: dict[str, Any]


def run_cell(
    cell: Cell, llm: LLMBackend, search: SearchBackend, held: Claim, judge: AnswerJudge | None = None
) -> dict[str, Any]:
    """Answer all remaining questions and write the cell's files; returns the result.

    Args:
        held: claim on the cell's folder.
        judge: judges the answers, if given.

    Raises:
        ConfigError, RecordError: the split does not exist, or its question file is broken.
        SearchError, BackendError: the retriever or the model failed; answered questions are kept.
        RequestRefusedError: every question was refused; a resume asks them again.
        JudgeError: too many judgements failed; a resume asks for these again.
    """
    made_by()  # cached now, because source files may be edited while the questions are answered
    # FlashRAG prints to stdout, which is for the results.
    with redirect_stdout(sys.stderr):
        config = cell.flashrag_config()
        pipeline = AgenticSearchPipeline(config, retriever=AgenticRetriever(search), generator=AgenticGenerator(llm))
        dataset = load_split(config, cell.split, cell.config.format)
        with WorkTable(held.work) as table:
            _answer(pipeline, dataset, table, judge)
            _check_refused(cell, dataset, table)
            cost = {name: round(value, 3) for name, value in sorted(table.cost.items())}
        records = [Trajectory.from_dict(item.trajectory) for item in dataset]
        write_records(held.out / PER_QUESTION, records)
        if judge is not None:
            write_records(held.out / JUDGEMENTS, judge.judgements(dataset))
        scores = {name: [item.output["metric_score"][name] for item in dataset] for name in cell.config.metrics}
        write_json(held.out / SCORES, {"id": [str(item.id) for item in dataset], **scores})
        result = _result(cell, pipeline, dataset, records, scores) | {
            "cost": cost,
            "agent_fingerprint": llm.fingerprint(),
            "search_fingerprint": search.fingerprint(),
            "provenance": provenance(),
            **(judge.report(dataset) if judge is not None else {}),
        }
        held.finish(result)
        # After the result: a kill before it must not lose the answers.
        WorkTable.remove(held.work)
    return result


def copy_finished(cell: Cell, held: Claim, folders: Sequence[str]) -> dict[str, Any] | None:
    """Copy the cell from the first of these evaluations that has finished it with the same inputs and settings.

    Returns:
        Its result, which keeps the provenance and the cost of the evaluation that made it; None if there is none.
    """
    mine = _identity(held.output)
    for folder in folders:
        other = cell.output(Path(folder))
        if other.out == held.out or not other.path(RESULT).is_file():
            continue
        if _identity(other) == mine:
            for name in (PER_QUESTION, JUDGEMENTS, SCORES):
                if (file := other.path(name)).is_file():
                    with atomic_path(held.out / name) as partial:
                        shutil.copyfile(file, partial)
            held.finish(read_json(other.path(RESULT)))
            WorkTable.remove(held.work)
            return held.finished
    return None


def _identity(output: Output) -> dict[str, Any]:
    """What a cell was made from, as its manifest says, without the files of its index (`retriever`).

    They hold paths and times, so an index that was built twice differs in them, but not in `search_fingerprint`.
    """
    return {key: value for key, value in (output.before() or {}).items() if key != "retriever"}


def _answer(pipeline: AgenticSearchPipeline, dataset: Any, table: WorkTable, judge: AnswerJudge | None) -> None:
    position = {str(item.id): place for place, item in enumerate(dataset)}
    finished = {row.key: parse_json(row.records)["output"] for row in table.rows()}
    before, since = asdict(pipeline.cost), time.monotonic()

    def keep(items: Sequence[Any]) -> None:
        nonlocal before, since
        now, clock = asdict(pipeline.cost), time.monotonic()
        # The pipeline's cost is a running total; a batch is stored with what it added.
        spent = {name: now[name] - before[name] for name in now} | {"seconds": clock - since}
        answered = [_Answered(id=str(item.id), output=item.output) for item in items]
        # A judged item replaces its row from before the judgement.
        table.add([(position[item.id], item.id, UnitResult(records=(item,))) for item in answered], spent)
        before, since = now, clock

    def judged(items: Any) -> Any:
        if judge is not None:
            judge.judge(items, pipeline.cost, pipeline.settings.batch_size, keep)
        return items

    with progress(total=len(dataset), initial=len(finished), desc="evaluate", unit="question") as shown:

        def answered(items: Sequence[Any]) -> None:
            keep(items)
            shown.update(len(items))

        pipeline.run(dataset, finished=finished, on_batch=answered, pred_process_fun=judged)


def _check_refused(cell: Cell, dataset: Any, table: WorkTable) -> None:
    """Print how many questions were refused. If all were, a setting must be wrong, and that is an error."""
    refused = _refused(dataset)
    if not refused:
        return
    first = f"first, {refused[0].id}: {refused[0].output['refusal']}"
    if len(refused) == len(dataset):
        # Refused questions are stored like answered ones; without this, a resume would not ask them again.
        table.clear()
        raise RequestRefusedError(f"{cell.name}: all of the {len(dataset)} questions were refused; {first}")
    print(f"{cell.name}: {len(refused)} of {len(dataset)} questions were refused and count as unanswered; {first}")


def _refused(dataset: Any) -> list[Any]:
    return [item for item in dataset if item.output.get("refusal") is not None]


def _result(
    cell: Cell, pipeline: Any, dataset: Any, records: Sequence[Trajectory], scores: Mapping[str, Sequence[float | None]]
) -> dict[str, Any]:
    return {
        "schema": "evaluation/1",
        "agent": cell.agent,
        "retriever": cell.retriever,
        "benchmark": cell.benchmark,
        "split": cell.split,
        "num_questions": len(records),
        "sample": "all" if cell.num_questions is None else ("first" if cell.config.random is None else "random"),
        "seed": cell.config.seed,
        "protocol": pipeline.protocol.name,
        **({"protocol_options": options} if (options := pipeline.protocol_options) else {}),
        "limits": asdict(pipeline.limits),
        "topk": pipeline.topk,
        "metrics": _intervals(cell.config, pipeline.evaluator.result, scores),
        "stop_reasons": dict(sorted(Counter(record.stop_reason.value for record in records).items())),
        "refused": len(_refused(dataset)),
        "breakdown": _breakdown(dataset, records),
        "by_turn": recall_by_turn(dataset),
        "made_from": dict(cell.made_from),
    }


def _intervals(
    config: EvaluateConfig, means: Mapping[str, float | None], scores: Mapping[str, Sequence[float | None]]
) -> dict[str, Any]:
    """The value of each metric, with an interval if it is the mean of per-question scores (corpus BLEU is not).

    If all questions are right, or all wrong, the interval is Wilson's, because a bootstrap would have zero width.
    """
    table: dict[str, Any] = {}
    for name, mean in means.items():
        present = [score for score in scores.get(name, ()) if score is not None]
        averaged = mean is not None and present and math.isclose(mean, statistics.fmean(present), abs_tol=1e-9)
        if name in _RATIOS or not averaged:
            table[name] = {"mean": mean}
        else:
            interval = bootstrap_interval(present, level=config.level, resamples=config.resamples, seed=config.seed)
            if name in _YES_OR_NO and mean in (0, 1):
                low, high = wilson_interval(round(sum(present)), len(present), level=config.level)
                interval = replace(interval, low=low, high=high)
            table[name] = asdict(interval)
    return table


def _breakdown(dataset: Any, records: Sequence[Trajectory]) -> dict[str, Any]:
    """Exact match of the questions with gold answers, and number of searches of all, by kind of question."""
    table: dict[str, dict[str, Any]] = {}
    for key in BREAKDOWNS:
        groups: dict[str, list[Trajectory]] = {}
        for item, record in zip(dataset, records, strict=True):
            if key in (item.metadata or {}):
                groups.setdefault(str(item.metadata[key]), []).append(record)
        if len(groups) > 1:
            table[key] = {
                value: {
                    "num_questions": len(rows),
                    "em": statistics.fmean(labelled)
                    if (labelled := [r.em for r in rows if r.golden_answers])
                    else None,
                    "search_turns": sum(len(row.turns) for row in rows) / len(rows),
                }
                for value, rows in sorted(groups.items())
            }
    return table
