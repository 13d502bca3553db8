"""Report on the quality and cost of an iteration's data: its relevance, correctness and groups.

Files are read once, side by side; memory does not grow with them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentic_r_plugin.config import setting
from agentic_r_plugin.data.inputs import QueryFiles
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Candidates
from agentic_r_plugin.storage.claim import companion, require_new
from agentic_r_plugin.store import read_json, read_records, write_json

BANDS = ("0-20", "21-40", "41-60", "61-80", "81-100")
STAGES = ("trajectories", "candidates", "sub_answers", "relevance", "correctness", "groups")
_COUNTS = ("rollouts", "reused", "pruned", "judge_requests", "prompt_tokens", "generated_tokens", "usd", "seconds")


@dataclass(frozen=True, kw_only=True)
class DataReportConfig:
    """Report the quality and the cost of an iteration's data."""

    data: str = setting("folder with candidates, relevance, correctness and groups (.jsonl)")
    out: str = setting("JSON file; empty: DATA/data_report.json; a .md is put next to it", default="")
    threshold: int = setting("least relevance of a positive, for the agreement", default=60)


def band(score: int) -> str:
    """The band of a relevance score.

    >>> [band(score) for score in (0, 20, 21, 60, 61, 100)]
    ['0-20', '0-20', '21-40', '41-60', '61-80', '81-100']
    """
    return BANDS[max(0, score - 1) // 20]


@dataclass
class Tally:
    """Counts over queries and candidates."""

    queries: int = 0
    with_positive: int = 0
    groups: int = 0
    best_band: Counter[str] = field(default_factory=Counter)
    """Band of each query's highest relevance."""
    candidates_in: Counter[str] = field(default_factory=Counter)
    rolled_out_in: Counter[str] = field(default_factory=Counter)
    correct_in: Counter[str] = field(default_factory=Counter)
    table: Counter[tuple[bool, bool]] = field(default_factory=Counter)
    """(relevance at or above the threshold, correct) of the candidates rolled out."""
    turns: Counter[int] = field(default_factory=Counter)
    turns_with_positive: Counter[int] = field(default_factory=Counter)
    first_level: Counter[bool] = field(default_factory=Counter)
    """Whether a query's most relevant candidates include a correct one, where all of them were rolled out."""

    def add(
        self, turn: int, scores: Mapping[str, int] | None, correct: Mapping[str, int] | None, groups: int, least: int
    ) -> None:
        """Count one query."""
        self.queries += 1
        self.turns[turn] += 1
        self.groups += groups
        self.with_positive += bool(groups)
        self.turns_with_positive[turn] += bool(groups)
        if not scores:
            return
        best = max(scores.values())
        self.best_band[band(best)] += 1
        self.candidates_in.update(map(band, scores.values()))
        for passage, em in (correct or {}).items():
            score = scores.get(passage)
            if score is not None:
                self.rolled_out_in[band(score)] += 1
                self.correct_in[band(score)] += em
                self.table[score >= least, bool(em)] += 1
        level = [passage for passage, score in scores.items() if score == best]
        # A pruned level stops at its first success, which says enough; without one it must be complete.
        if correct and (any(map(correct.get, level)) or correct.keys() >= set(level)):
            self.first_level[any(map(correct.get, level))] += 1

    def result(self) -> dict[str, Any]:
        """The shares and distributions."""
        judged, right = sum(self.first_level.values()), self.first_level[True]
        rolled_out = sum(self.rolled_out_in.values())
        return {
            "queries": self.queries,
            "groups": self.groups,
            "share_with_positive": _share(self.with_positive, self.queries),
            "share_with_positive_by_turn": {
                str(turn): _share(self.turns_with_positive[turn], count) for turn, count in sorted(self.turns.items())
            },
            "best_relevance": {name: self.best_band[name] for name in BANDS},
            "candidates": {
                name: {
                    "candidates": self.candidates_in[name],
                    "rolled_out": self.rolled_out_in[name],
                    "correct": self.correct_in[name],
                    "share_correct": _share(self.correct_in[name], self.rolled_out_in[name]),
                }
                for name in BANDS
            },
            "rolled_out": rolled_out,
            "share_correct": _share(sum(self.correct_in.values()), rolled_out),
            "agreement": {
                "most_relevant_is_correct": _share(right, judged),
                "of_queries": judged,
                "phi": phi(self.table),
                "every_candidate_rolled_out": rolled_out == sum(self.candidates_in.values()),
            },
        }


def phi(table: Mapping[tuple[bool, bool], int]) -> float | None:
    """Phi coefficient of two binary properties; None if one of them does not vary.

    >>> phi({(True, True): 5, (False, False): 5})
    1.0
    """
    both, one, other, neither = (
        table.get(key, 0) for key in ((True, True), (True, False), (False, True), (False, False))
    )
    scale = math.sqrt((both + one) * (other + neither) * (both + other) * (one + neither))
    return round((both * neither - one * other) / scale, 4) if scale else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def run(config: DataReportConfig, *, resume: bool = False) -> None:
    """Run the command `data-report`.

    Raises:
        ConfigError: the folder holds no candidates.
        OutputExistsError: the report exists and `resume` is off.
        RecordError: a broken record.
    """
    if not resume:
        require_new(_out(config))
    print(write_report(config))


def _out(config: DataReportConfig) -> Path:
    return Path(config.out or Path(config.data) / "data_report.json")


def write_report(config: DataReportConfig) -> str:
    """Write the report as JSON and Markdown; returns the Markdown."""
    out, report = _out(config), make_report(Path(config.data), config.threshold)
    write_json(out, report)
    text = markdown(report)
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def make_report(folder: Path, threshold: int) -> dict[str, Any]:
    """Read an iteration's data files; missing ones are skipped."""
    files = {name: folder / f"{name}.jsonl" for name in STAGES}
    if not files["candidates"].exists():
        raise ConfigError(f"data-report: {files['candidates']} does not exist")
    tally = Tally()
    roles = ("relevance", "correctness", "groups")
    known: dict[str, Any] = {role: files[role] for role in roles if files[role].exists()}
    with closing(QueryFiles(folder, **known)) as found:
        for query in read_records(files["candidates"], Candidates):
            groups = len(found.groups(query))
            tally.add(query.turn, found.relevance(query), found.correctness(query), groups, threshold)
    stages = {
        name: read_json(report) for name, file in files.items() if (report := companion(file, ".report.json")).exists()
    }
    unknown = [name for name, file in files.items() if file.exists() and name not in stages]
    dropped = {name: made["dropped"] for name, made in stages.items() if made.get("dropped")}
    made = tally.result() | {"dropped": dropped, "stages": stages, "cost": _total(stages, tally.queries)}
    return made | ({"without_report": unknown} if unknown else {})


def _total(stages: Mapping[str, Mapping[str, Any]], queries: int) -> dict[str, Any]:
    total = {name: round(sum(made.get(name, 0) for made in stages.values()), 3) for name in _COUNTS}
    return total | {"per_query": {name: round(value / queries, 4) for name, value in total.items()} if queries else {}}


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    agreement = report["agreement"]
    lines = [
        "# Constructed data",
        "",
        f"{report['queries']:,} queries, {report['groups']:,} groups; {_percent(report['share_with_positive'])} of the "
        "queries have a positive.",
        "",
        "| relevance | queries with their best here | candidates | rolled out | correct |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {report['best_relevance'][name]:,} | {row['candidates']:,} | {row['rolled_out']:,} | "
            f"{row['correct']:,} ({_percent(row['share_correct'])}) |"
            for name, row in report["candidates"].items()
        ),
        "",
        "Agreement: the most relevant candidates hold a correct one for "
        f"{_percent(agreement['most_relevant_is_correct'])} of {agreement['of_queries']:,} queries; "
        f"phi of (relevant, correct) {'-' if agreement['phi'] is None else agreement['phi']}"
        + ("." if agreement["every_candidate_rolled_out"] else ", over the candidates that pruning left."),
        "",
        "| turn | share of queries with a positive |",
        "|---|---|",
        *(f"| {turn} | {_percent(share)} |" for turn, share in report["share_with_positive_by_turn"].items()),
        "",
        "| stage | dropped because | units |",
        "|---|---|---|",
        *(
            f"| {stage} | {reason} | {count:,} |"
            for stage, reasons in report["dropped"].items()
            for reason, count in reasons.items()
        ),
        "",
        "| cost | total | per query |",
        "|---|---|---|",
        *(f"| {name} | {report['cost'][name]:,} | {value:,} |" for name, value in report["cost"]["per_query"].items()),
    ]
    if unknown := report.get("without_report"):
        # Their costs count as 0 in the table above.
        lines += ["", f"Without `.report.json`, so that costs and dropped units are unknown: {', '.join(unknown)}."]
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
