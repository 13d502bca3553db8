"""Retrievers before and after training on HotpotQA: supporting-passage recall at 3 and 20 on the test questions.

    python recipes/retriever/hotpotqa.py --data DIR/hotpotqa --out runs/retriever_hotpotqa \
        --model minilm=builtin:minilm --model e5=runs/e5-small

Groups come from the training questions (`make_groups.py`), recall from the test questions, by search of all passages of
their own contexts (`--pool contexts`) or of the whole corpus (`--pool corpus`). Each model is trained with each
formulation and each seed; a formulation is measured before as well. Every cell is one line of `results.jsonl`, written
when it is done: stopped at any point, the same command goes on. `--report` prints the table of what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import make_groups
import torch

from agentic_r_plugin.cli import reported
from agentic_r_plugin.config import fingerprint, load_config, to_dict
from agentic_r_plugin.errors import ManifestMismatchError, RecordError
from agentic_r_plugin.retriever.batches import Example, read_examples
from agentic_r_plugin.retriever.dev import measure
from agentic_r_plugin.retriever.start import initial_retriever
from agentic_r_plugin.retriever.training import TrainRetrieverConfig, run_apart
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import dump_line, read_json, read_lines, write_json

HERE = Path(__file__).parent
SHOWN = ("corpus_recall_at_3", "corpus_recall_at_20", "corpus_mrr_at_10", "corpus_ndcg_at_10")
Cell = tuple[str, str, int | None]
"""(model, formulation, seed); without a seed: before training."""


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """All before training, then seed after seed, so that what is there early is comparable."""
    names = [item.partition("=")[0] for item in args.model]
    for name in names:
        for formulation in args.formulation:
            yield name, formulation, None
    for seed in args.seeds:
        for name in names:
            for formulation in args.formulation:
                yield name, formulation, seed


def prepare(folder: Path, name: str, data: Path, split: str, questions: int | None) -> None:
    """Write the groups of a split and the pool of its passages, unless both files exist."""
    out, pool = folder / f"{name}.jsonl", folder / f"pool_{name}.jsonl"
    if out.is_file() and pool.is_file():
        return
    # `make_groups.py` refuses existing files, and one file without the other is unfinished.
    for path in (out, pool):
        path.unlink(missing_ok=True)
    arguments = ["--data", data, "--split", split, "--out", out, "--pool", pool]
    limit = [] if questions is None else ["--questions", questions]
    make_groups.main([str(part) for part in (*arguments, *limit)])


def run_cell(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """Train where the cell has a seed, and measure."""
    name, formulation, seed = cell
    config = cell_config(args, cell)
    started = time.perf_counter()
    if seed is None:
        # the model as training would find it, with the lengths that it will be trained with
        retriever = initial_retriever(config)
        trained: dict[str, Any] = {}
    else:
        run_apart(config)  # in a separate process: its memory is freed, and its peak is that of training alone
        folder = Path(config.out)
        retriever = Retriever.load(folder, precision=config.precision)
        steps = [line for _, line in read_lines(folder / "metrics.jsonl") if "seconds" in line]
        trained = {
            "steps": len(steps),
            "train_seconds": round(sum(line["seconds"] for line in steps), 1),
            "last_loss": steps[-1]["loss"],
            "peak_memory_bytes": read_json(folder / "done.json")["peak_memory_bytes"],
        }
    pool = args.out / "pool_test.jsonl" if args.pool == "contexts" else args.data / "corpus.jsonl"
    with Corpus(pool) as corpus, Corpus(args.data / "corpus.jsonl") as whole:
        test = in_pool(read_examples(args.out / "test.jsonl", whole), whole, corpus)
        found = measure(retriever, corpus, test, pools=("corpus",))
        passages = len(corpus)
    return {
        "model": name,
        "formulation": formulation,
        "seed": seed,
        "queries": len({item.key for item in test}),
        "pool": passages,
        **found,
        **trained,
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
    }


def in_pool(test: list[Example], whole: Corpus, pool: Corpus) -> list[Example]:
    """Test queries with their supporting passages as rows of the pool that is searched."""

    def row(place: int) -> int:
        found = pool.row_of(whole[place].id)
        if found is None:
            raise RecordError(f"passage {whole[place].id!r} of the test groups is not in the pool", path=pool.path)
        return found

    return [
        replace(
            item, positive=row(item.positive), negatives=(), known_positives=frozenset(map(row, item.known_positives))
        )
        for item in test
    ]


def cell_config(args: argparse.Namespace, cell: Cell) -> TrainRetrieverConfig:
    """The recipe's settings with what the cell and the command line say."""
    name, formulation, seed = cell
    values = {
        "groups": str(args.out / "train.jsonl"),
        "corpus": str(args.data / "corpus.jsonl"),
        "out": str(args.out / f"{name}-{formulation}-{seed}"),
        "retriever": dict(item.split("=", 1) for item in args.model)[name],
        "formulation": formulation,
        "seed": seed or 0,
    }
    return load_config(TrainRetrieverConfig, HERE / "hotpotqa.yaml", args.set, values=values)


def report(results: Path) -> str:
    """Mean and, over several seeds, standard deviation of each metric."""
    rows: Mapping[Cell, list[dict[str, Any]]] = defaultdict(list)
    for _, line in read_lines(results):
        rows[line["model"], line["formulation"], None if line["seed"] is None else 0].append(line)
    head = ["model", "input", "trained", "seeds", *(name.removeprefix("corpus_") for name in SHOWN), "train s"]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (name, formulation, trained), lines in sorted(
        rows.items(), key=lambda item: (*item[0][:2], item[0][2] is not None)
    ):
        columns = [[line[metric] for line in lines] for metric in SHOWN]
        cells_ = [
            f"{statistics.mean(c):.3f}" + (f" ± {statistics.stdev(c):.3f}" if len(c) > 1 else "") for c in columns
        ]
        seconds = [line["train_seconds"] for line in lines if "train_seconds" in line]
        first = [name, formulation, "no" if trained is None else "yes", str(len(lines)) if seconds else "-"]
        table.append(f"| {' | '.join([*first, *cells_, f'{statistics.mean(seconds):.0f}' if seconds else '-'])} |")
    return "\n".join(table)


def main() -> None:
    """Run the cells that are not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("AGENTIC_R_DATA")
    parser.add_argument("--data", type=Path, default=Path(data) / "hotpotqa" if data else None)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=RETRIEVER")
    parser.add_argument("--formulation", nargs="+", default=["query", "question_query"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pool", choices=["contexts", "corpus"], default="contexts")
    parser.add_argument("--train-questions", type=int, help="the first N; default: all")
    parser.add_argument("--test-questions", type=int, help="the first N; default: all")
    parser.add_argument("--cells", type=int, help="stop after N new cells")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, run nothing")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings of train-retriever")
    args = parser.parse_args()
    results = args.out / "results.jsonl"
    if not args.report:
        if args.data is None:
            parser.error("give --data, or set AGENTIC_R_DATA")
        args.out.mkdir(parents=True, exist_ok=True)
        begin(args)
        for split, questions in (("train", args.train_questions), ("test", args.test_questions)):
            prepare(args.out, split, args.data, split, questions)
        there = (
            {(x["model"], x["formulation"], x["seed"]) for _, x in read_lines(results)} if results.is_file() else set()
        )
        left = [cell for cell in cells(args) if cell not in there][: args.cells]
        for cell in left:
            line = run_cell(args, cell)
            with results.open("ab") as stream:
                stream.write(dump_line(line))
            print(json.dumps(line), file=sys.stderr, flush=True)
    print(report(results))


def begin(args: argparse.Namespace) -> None:
    """Note what every cell depends on, or check that it is the same as before."""
    settings = to_dict(cell_config(args, next(cells(args))))
    # These differ from cell to cell.
    for name in ("out", "retriever", "formulation", "seed"):
        settings.pop(name)
    key = {
        "settings": fingerprint(settings),
        "pool": args.pool,
        "train_questions": args.train_questions,
        "test_questions": args.test_questions,
    }
    note = args.out / "key.json"
    if note.is_file() and read_json(note) != key:
        raise ManifestMismatchError(f"{args.out} was begun with other settings or questions; choose another --out")
    write_json(note, key)


if __name__ == "__main__":
    with reported("hotpotqa.py"):
        main()
