"""`agentic-r evaluate`: agent x retriever x benchmark through FlashRAG.

Each cell is a folder `OUT/<agent>-<retriever>-<benchmark>/` (`evaluation.cell`). `OUT/matrix.json` holds all cells, and
`matrix.md`, `.csv` and `.tex` show them as tables. A resume skips finished cells and continues an interrupted one with
its first unanswered batch of questions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin.backends import SearchSpec, open_llm, open_search
from agentic_r_plugin.child import run_side_by_side
from agentic_r_plugin.config import FREE, check_least, entries_of, save_config, setting, to_dict
from agentic_r_plugin.credentials import refuse_secrets
from agentic_r_plugin.errors import ConfigError, ManifestMismatchError, SearchError
from agentic_r_plugin.evaluation.benchmarks import check_questions, split_file
from agentic_r_plugin.evaluation.cells import cells_of, llm_spec, pairs_of, search_spec, searched_path
from agentic_r_plugin.evaluation.settings import JUDGED, AgenticRSettings, AgentSettings, AnswerJudgeSettings
from agentic_r_plugin.questions import FORMAT
from agentic_r_plugin.search.hybrid import parts_of
from agentic_r_plugin.storage.claim import require_new
from agentic_r_plugin.store import write_json

if TYPE_CHECKING:
    from agentic_r_plugin.evaluation.answer_judge import AnswerJudge
    from agentic_r_plugin.evaluation.cell import Cell

_WAYS_OUT = "evaluate into another --out, or remove that folder"

_METRICS = (
    "agentic_em", "agentic_f1", "agentic_sub_em", "search_turns", "answer_recall_at_3", "answer_recall_at_20",
    "gold_document_recall", "gold_document_recall_at_20", "malformed_share", "generated_tokens",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluate agents with retrievers on benchmarks through FlashRAG."""

    out: str = setting("folder for the cells and the matrix")
    data_dir: str = setting("folder that holds the benchmarks in FlashRAG layout")
    benchmarks: list[str] = setting("names of folders in data_dir", default_factory=list)
    agents: dict[str, str] = setting(
        "name -> model directory (vllm: or hub name), or URL of an OpenAI-compatible server", default_factory=dict
    )
    per_agent: dict[str, Any] = setting(
        "agent -> its own protocol, limits, topk and llm (AgentSettings)", default_factory=dict
    )
    searches: dict[str, Any] = setting(
        "name -> index directory, URL of a retrieval service, bm25:CORPUS, hybrid:NAME+NAME of other "
        "searches, or what differs from `settings.search`; {benchmark} in it is the benchmark's name",
        default_factory=dict,
    )
    rerankers: dict[str, str] = setting(
        "name -> reranker; each search is evaluated with each of them as well, as the retriever SEARCH+NAME",
        default_factory=dict,
    )
    cells: list[str] = setting("evaluate only these pairs, AGENT:SEARCH; empty: all", default_factory=list)
    processes: int = setting("evaluate cells in N processes at a time, for small models on a CPU", FREE, default=1)
    tables: bool = setting("write the matrix and its tables", FREE, default=True)
    reuse: list[str] = setting(
        "folders of other evaluations; a cell that one of them has finished with the same agent, search, questions and "
        "settings is copied",
        FREE,
        default_factory=list,
    )
    split: str = setting("split of every benchmark", default="test")
    splits: dict[str, str] = setting("benchmark -> split, where it differs", default_factory=dict)
    format: str = field(default="", metadata=FORMAT)
    first: int | None = setting("only the first N questions", default=None)
    random: int | None = setting("only N questions drawn with the seed", default=None)
    seed: int = setting("of the random sample and of the intervals", default=0)
    level: float = setting("of the intervals", default=0.95)
    resamples: int = setting("of the bootstrap and the permutation test", default=10_000)
    metrics: list[str] = setting("FlashRAG's metrics can be added", default_factory=lambda: list(_METRICS))
    settings: AgenticRSettings = setting(
        "protocol, limits and backends of all agents", default_factory=AgenticRSettings
    )
    judge: AnswerJudgeSettings = setting(
        "judge of the answers, in addition to exact match", default_factory=AnswerJudgeSettings
    )

    def __post_init__(self) -> None:
        metrics = [*self.metrics, *([JUDGED] if self.judge.llm.model else [])]
        object.__setattr__(self, "metrics", list(dict.fromkeys(name.lower() for name in metrics)))
        object.__setattr__(self, "per_agent", entries_of(AgentSettings, self.per_agent, "per_agent"))
        for name in ("benchmarks", "agents", "searches"):
            if not getattr(self, name):
                raise ConfigError(f"{name}: expected at least one")
            for key, value in getattr(self, name).items() if name != "benchmarks" else ():
                if not value:
                    raise ConfigError(f"{name}.{key}: expected a location, found nothing")
        if self.first is not None and self.random is not None:
            raise ConfigError("first, random: give at most one of the two")
        for name in ("first", "random"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ConfigError(f"{name}: expected at least 1, found {number}; leave it out for all questions")
        check_statistics(self.level, self.resamples)
        check_least(self, processes=1)
        if self.settings.search.rerank.on:
            raise ConfigError("settings.search.rerank: name the reranker: rerankers={NAME: MODEL}")
        self._check_metrics()
        self._check_names()

    def _check_metrics(self) -> None:
        if JUDGED in self.metrics and not self.judge.llm.model:
            raise ConfigError(f"metrics: {JUDGED} needs a judge; set judge.llm.model")
        if not {"agentic_em", "agentic_f1"} <= set(self.metrics):
            raise ConfigError("metrics: agentic_em and agentic_f1 must be among them")

    def _check_names(self) -> None:
        """Settings about an agent, a search or a benchmark must name one of those that are evaluated."""
        for kind in ("agents", "searches", "rerankers"):
            for name in getattr(self, kind):
                if not name or "/" in name:  # a cell's folder is named after them
                    raise ConfigError(f"{kind}: {name!r} names a folder, so expected a name without /")
        for cell in self.cells:
            agent, _, search = cell.partition(":")
            if agent not in self.agents or search not in self.retrievers:
                raise ConfigError(
                    f"cells: {cell!r} is not AGENT:SEARCH; agents: {', '.join(self.agents)}; "
                    f"searches: {', '.join(self.retrievers)}"
                )
        for agent in self.per_agent:
            if agent not in self.agents:
                raise ConfigError(f"per_agent: {agent!r} is not among the agents {', '.join(self.agents)}")
            llm_spec(self, agent)
        for benchmark in self.splits:
            if benchmark not in self.benchmarks:
                raise ConfigError(f"splits: {benchmark!r} is not among the benchmarks {', '.join(self.benchmarks)}")

    @property
    def retrievers(self) -> dict[str, tuple[str, str]]:
        """Name in the matrix -> (search, reranker or empty), every search followed by its reranked forms."""
        return {
            f"{search}+{reranker}" if reranker else search: (search, reranker)
            for search in self.searches
            for reranker in ("", *self.rerankers)
        }


def check_statistics(level: float, resamples: int = 1) -> None:
    """Raise ConfigError if no interval can be computed. Checked at the start, before any question is answered."""
    if not 0 < level < 1:
        raise ConfigError(f"level: expected a share between 0 and 1 (0.95), found {level}")
    if resamples < 1:
        raise ConfigError(f"resamples: expected at least 1, found {resamples}")


def run(config: EvaluateConfig, *, resume: bool = False) -> None:
    """Evaluate every unfinished cell, then write the matrix.

    Raises:
        OutputExistsError: the output exists and `resume` is off.
        ManifestMismatchError: an existing cell was made from other inputs or settings, or its service now serves
            another index.
    """
    out = Path(config.out)
    if not resume:
        require_new(out, folder=True)
    check_inputs(config)
    cells = list(cells_of(config))
    done = {cell.name: result for cell in cells if (result := cell.output(out).finished()) is not None}
    _require_same_services([cell for cell in cells if cell.name in done], done, out)
    out.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if cell.name not in done]
    if config.tables:
        save_config(config, out / "config.yaml")
    if config.processes > 1 and len(missing) > 1:
        _run_side_by_side(config, missing)
        done |= {cell.name: result for cell in missing if (result := cell.output(out).finished()) is not None}
    else:
        _run_missing(config, missing, done, out)
    if config.tables:
        write_matrix(config, [done[cell.name] for cell in cells], out)


def _run_side_by_side(config: EvaluateConfig, missing: Sequence[Cell]) -> None:
    """Distribute the cells over processes. Neighbouring cells share an agent, so they go to the same process."""
    pairs = list(dict.fromkeys(f"{cell.agent}:{cell.retriever}" for cell in missing))
    size = -(-len(pairs) // config.processes)
    shares = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    run_side_by_side("evaluate", [replace(config, cells=share, processes=1, tables=False) for share in shares])


def check_inputs(config: EvaluateConfig, *, later: Set[str] = frozenset()) -> None:
    """Check the inputs of all cells before a model is loaded or a folder is created.

    Args:
        config: agents, searches and benchmarks to evaluate. Those that no cell uses are not checked.
        later: names of agents and searches that do not exist yet.

    Raises:
        ConfigError: a split, an agent or an index does not exist, there are fewer questions than requested, or an
            address holds a password (whether a cell uses it or not).
        RecordError: a question file is broken.
    """
    for name in ("agents", "searches", "rerankers", "per_agent"):
        refuse_secrets(name, to_dict(config)[name], "put it into an environment variable and give that variable's name")
    for benchmark in config.benchmarks:
        file = split_file(Path(config.data_dir) / benchmark, config.splits.get(benchmark, config.split))
        check_questions(file, config.first if config.first is not None else config.random, config.format)
    for folder in config.reuse:
        if not Path(folder).is_dir():
            raise ConfigError(f"reuse: {folder}: no such folder; expected the output of another evaluation")
    check_models(config, later=later)
    searches = dict.fromkeys(search for _, search in pairs_of(config))
    for name in (name for name in searches if config.retrievers[name][0] not in later):
        specs = [search_spec(config, name, benchmark) for benchmark in config.benchmarks]
        rerank = specs[0].rerank  # the same for all benchmarks
        if rerank.reranker == "cross_encoder" and Path(rerank.model or "-").is_dir():
            from agentic_r_plugin.search.families import require_cross_encoder

            require_cross_encoder(rerank.model, f"searches.{name}: reranker")
        for spec in specs:
            for part in parts_of(spec):
                if part.backend in ("faiss", "bm25") and not Path(searched_path(part)).exists():
                    raise ConfigError(f"searches.{name}: {searched_path(part)!r} does not exist")


def check_models(config: EvaluateConfig, *, later: Set[str] = frozenset()) -> None:
    """Raise ConfigError if the folder of the judge, or of an agent that `later` does not name, does not exist."""
    agents = dict.fromkeys(agent for agent, _ in pairs_of(config))
    models = {f"agents.{name}": llm_spec(config, name) for name in agents if name not in later}
    if config.judge.llm.model:
        models["judge.llm.model"] = config.judge.llm
    for where, spec in models.items():
        if spec.backend == "hf" and not Path(spec.model).is_dir():
            raise ConfigError(f"{where}: no directory {spec.model!r}")


def _run_missing(config: EvaluateConfig, missing: list[Cell], done: dict[str, Any], out: Path) -> None:
    """Evaluate the missing cells. Judge and agents are loaded once; a retriever stays open for its next cell."""
    from agentic_r_plugin.evaluation.cell import copy_finished, run_cell

    if not missing:
        return
    with _open_judge(config) as judge:
        for agent in dict.fromkeys(cell.agent for cell in missing):
            of_agent = (cell for cell in missing if cell.agent == agent)
            # Cells of one retriever become neighbours, so that it is opened once.
            mine = sorted(of_agent, key=lambda cell: list(config.retrievers).index(cell.retriever))
            with open_llm(mine[0].settings.agent) as llm:
                for searching, cells in groupby(mine, key=lambda cell: cell.settings.search):
                    with open_search(searching) as search:
                        opened = {"agent_fingerprint": llm.fingerprint(), "search_fingerprint": search.fingerprint()}
                        opened |= {"judge_fingerprint": judge.backend.fingerprint()} if judge is not None else {}
                        for cell in cells:
                            with cell.output(out).claim(resume=True) as held:
                                held.begin(opened)
                                # another process may have finished it while the models were loaded
                                done[cell.name] = (
                                    held.finished
                                    or copy_finished(cell, held, config.reuse)
                                    or run_cell(cell, llm, search, held, judge)
                                )
                            print(_one_line(done[cell.name]), flush=True)


@contextmanager
def _open_judge(config: EvaluateConfig) -> Iterator[AnswerJudge | None]:
    if not config.judge.llm.model:
        yield None
        return
    from agentic_r_plugin.evaluation.answer_judge import AnswerJudge

    with open_llm(config.judge.llm) as backend:
        yield AnswerJudge(backend, config.judge)  # type: ignore[arg-type]  # our backends are ChatBackends, too


def write_matrix(config: EvaluateConfig, results: list[Mapping[str, Any]], out: Path) -> None:
    """Write `matrix.json` and its tables from the cells' results, and print the Markdown table."""
    from agentic_r_plugin.evaluation.matrix import compare, write_tables
    from agentic_r_plugin.evaluation.provenance import shared_provenance

    comparisons = compare(results, out, level=config.level, resamples=config.resamples, seed=config.seed)
    matrix = {
        "schema": "evaluation_matrix/1",
        "cells": results,
        "comparisons": comparisons,
        "config": to_dict(config),
        **shared_provenance(results),
    }
    table = write_tables(results, out)
    write_json(out / "matrix.json", matrix)
    print(table, flush=True)


def _require_same_services(finished: Sequence[Cell], results: Mapping[str, Any], out: Path) -> None:
    """Check that the services of finished cells still serve the same index. The address alone does not show this.

    If a service does not answer, its finished cells are kept without the check.

    Raises:
        ManifestMismatchError: the service of a finished cell now serves another index.
    """
    served: dict[str, str | None] = {}
    for cell in finished:
        spec = cell.settings.search
        urls = " and ".join(part.url for part in parts_of(spec) if part.backend == "service")
        if not urls:
            continue
        if (key := repr(spec)) not in served:
            served[key] = _served(spec, urls)
        before, now = results[cell.name].get("search_fingerprint"), served[key]
        if now not in (None, before):
            raise ManifestMismatchError(
                f"{out / cell.name}: made with index {before} of {urls}, which serves {now} now; {_WAYS_OUT}"
            )


def _served(spec: SearchSpec, urls: str) -> str | None:
    """Fingerprint of what the service at `urls` serves; None, with a line on stderr, if it gives no answer."""
    try:
        with open_search(replace(spec, max_retries=min(spec.max_retries, 1))) as search:
            return search.fingerprint()
    except SearchError as error:
        print(f"evaluate: finished cells of {urls} are kept without asking what it serves: {error}", file=sys.stderr)
        return None


def _one_line(result: Mapping[str, Any]) -> str:
    from agentic_r_plugin.evaluation.matrix import figure

    metrics = result["metrics"]
    unlabelled = result["num_questions"] - metrics["agentic_em"].get("num_questions", 0)
    return (
        f"{result['agent']} + {result['retriever']} on {result['benchmark']} {result['split']}: "
        f"EM {figure(metrics['agentic_em'], with_interval=True)}, "
        + (f"judge {figure(metrics[JUDGED], with_interval=True)}, " if JUDGED in metrics else "")
        + f"{figure(metrics.get('search_turns'), 1)} searches, "
        f"{result['num_questions']} questions" + (f", {unlabelled} of them without gold answers" if unlabelled else "")
    )
