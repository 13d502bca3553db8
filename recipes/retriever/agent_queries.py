"""Which retriever finds more with an agent's own queries: all get the same queries, and no answer is generated.

    agentic-r candidates protocol=compact --in runs/evaluation/CELL/per_question.jsonl \\
        --out runs/q/minilm.jsonl search.index=INDEX                     # the same for each retriever
    python recipes/retriever/agent_queries.py --questions DIR/test.jsonl \\
        minilm=runs/q/minilm.jsonl trained=runs/q/trained.jsonl

The trajectories may come from `trajectories` or from a cell of `evaluate`, with any retriever. Gold passages are the
`gold_doc_ids` of the question. A question counts once, whatever the number of its queries:

| column | of a question |
|---|---|
| hit@K | share of its queries with a gold passage among the K best |
| recall@K | share of its gold passages among the K best of any of its queries |

Differences from the first file are paired over the questions, with 95 % intervals.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from agentic_r_plugin.cli import reported
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.evaluation.matrix import markdown
from agentic_r_plugin.evaluation.statistics import paired_difference
from agentic_r_plugin.field_values import listed
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Candidates
from agentic_r_plugin.store import read_records

DEPTHS = (3, 20)
COLUMNS = tuple(f"{name}@{depth}" for depth in DEPTHS for name in ("hit", "recall"))

Found = dict[tuple[str, int], list[str]]
"""(question, turn) -> ids of the passages found, best first."""


def read_found(path: Path) -> tuple[Found, dict[tuple[str, int], str]]:
    """The passages of each query of a candidates file, and the queries.

    Raises:
        RecordError: a record is broken, or every query has fewer passages than the largest depth.
    """
    found, queries = {}, {}
    for item in read_records(path, Candidates):
        key = (item.id, item.turn)
        found[key], queries[key] = [passage.id for passage in item.passages], item.query
    # BM25 finds fewer where fewer passages share a word with a query, but not for all queries.
    most = max(map(len, found.values()), default=0)
    if found and most < max(DEPTHS):
        raise RecordError(
            f"expected {max(DEPTHS)} passages of a query, found at most {most}; make the candidates with "
            f"topk={max(DEPTHS)}",
            path=path,
        )
    return found, queries


def scores(found: Found, gold: Mapping[str, set[str]]) -> dict[str, list[float]]:
    """The columns' scores of each question that has gold passages and queries, in the order of the questions."""
    of_question: dict[str, list[list[str]]] = defaultdict(list)
    for (question, _), passages in found.items():
        of_question[question].append(passages)
    table: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for question, wanted in gold.items():
        lists = of_question.get(question)
        if not lists or not wanted:
            continue
        for depth in DEPTHS:
            best = [wanted & set(passages[:depth]) for passages in lists]
            table[f"hit@{depth}"].append(sum(map(bool, best)) / len(best))
            table[f"recall@{depth}"].append(len(set().union(*best)) / len(wanted))
    return table


def report(files: Mapping[str, Path], questions: Path) -> str:
    """The table, a row for each file.

    Raises:
        RecordError: a file is broken, holds other queries than the first, or no question has gold passages.
    """
    gold = {item.id: set(listed(item.metadata, "gold_doc_ids")) for item in read_questions(questions)}
    rows, first, asked = [["retriever", "questions", "queries", *COLUMNS]], None, None
    for name, path in files.items():
        found, queries = read_found(path)
        asked = queries if asked is None else asked
        if queries != asked:
            raise RecordError(
                f"holds other queries than {next(iter(files.values()))}; make both from the same trajectories",
                path=path,
            )
        table = scores(found, gold)
        if not table[COLUMNS[0]]:
            raise RecordError("no question of the candidates has gold_doc_ids", path=questions)
        first = table if first is None else first
        row = [name, str(len(table[COLUMNS[0]])), str(len(found))]
        for column in COLUMNS:
            values = table[column]
            cell = f"{100 * sum(values) / len(values):.1f}"
            if table is not first:
                paired = paired_difference(first[column], values)
                cell += f" ({100 * paired.difference:+.1f} [{100 * paired.low:.1f}, {100 * paired.high:.1f}])"
            row.append(cell)
        rows.append(row)
    return markdown(rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", required=True, type=Path, help="with gold_doc_ids in their metadata")
    parser.add_argument("candidates", nargs="+", metavar="NAME=CANDIDATES")
    args = parser.parse_args()
    pairs = [item.partition("=") for item in args.candidates]
    if any(not name or not path for name, _, path in pairs):
        parser.error("expected NAME=CANDIDATES, such as minilm=runs/q/minilm.jsonl")
    print(report({name: Path(path) for name, _, path in pairs}, args.questions))


if __name__ == "__main__":
    with reported("agent_queries.py"):
        main()
