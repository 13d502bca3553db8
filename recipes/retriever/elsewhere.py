"""What a trained retriever gains on its own set and loses on another, and what interpolation keeps.

    python recipes/retriever/hotpotqa.py --data DIR/hotpotqa --out runs/retriever_hotpotqa --model minilm=builtin:minilm
    python recipes/retriever/elsewhere.py --base builtin:minilm --trained runs/retriever_hotpotqa/minilm-query-0 \
        --set own=DIR/hotpotqa --set other=DIR/2wikimultihopqa --out runs/retriever_elsewhere

Weights are base + W x (trained - base) for each W of `--weights` (`train-retriever interpolation=W` writes such a
checkpoint). Each set's questions (`--split`, the first `--questions`) give queries as in `make_groups.py`; their
supporting passages must be found among all passages of their contexts. Every finished cell is one line of
`results.jsonl`, so the same command goes on after an interruption. `--report` prints the table of what is there, with
95 % bootstrap intervals of the difference from W = 0 over the same queries.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from hotpotqa import in_pool, prepare

from agentic_r_plugin.cli import reported
from agentic_r_plugin.evaluation.statistics import bootstrap_interval
from agentic_r_plugin.retriever.batches import Example, read_examples
from agentic_r_plugin.retriever.interpolation import interpolate
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.encoder import Retriever
from agentic_r_plugin.store import dump_line, read_lines

DEPTHS = (3, 20)


def recalls(retriever: Retriever, corpus: Corpus, examples: list[Example]) -> list[list[float]]:
    """For each depth, the recall of each query's supporting passages."""
    queries = list({item.key: item for item in examples}.values())
    queries_QD = retriever.encode_queries([item.request for item in queries])
    passages_PD = np.concatenate(
        [
            retriever.encode_passages([corpus[row] for row in range(start, min(start + 512, len(corpus)))])
            for start in range(0, len(corpus), 512)
        ]
    )
    best_QK = np.argsort(-(queries_QD @ passages_PD.T), axis=1, kind="stable")[:, : max(DEPTHS)]
    return [
        [
            len(item.known_positives & set(rows[:depth])) / len(item.known_positives)
            for item, rows in zip(queries, best_QK.tolist(), strict=True)
        ]
        for depth in DEPTHS
    ]


def run_cell(args: argparse.Namespace, trained: str, weight: float, left: dict[str, Path]) -> list[dict[str, Any]]:
    """Measure one retriever on the sets that are left."""
    retriever = Retriever.load(trained, device="cpu", precision=args.precision)
    interpolate(retriever.model, Retriever.load(args.base, device="cpu").model, weight)
    lines = []
    for name, data in left.items():
        with Corpus(args.out / f"pool_{name}.jsonl") as pool, Corpus(data / "corpus.jsonl") as whole:
            found = recalls(retriever, pool, in_pool(read_examples(args.out / f"{name}.jsonl", whole), whole, pool))
        lines.append({"trained": trained, "weight": weight, "set": name, "recall": found})
    return lines


def report(lines: list[dict[str, Any]], *, each: bool = False) -> str:
    """A row for each weight and set: mean over the trained retrievers, and the paired difference from weight 0.

    With `each`, a row for each trained retriever; one that has no weight 0 is compared with that of the first that has
    it, which must start from the same model and read the same input.
    """
    found = {(line["trained"], line["weight"], line["set"]): np.array(line["recall"]) for line in lines}
    trained, weights, names = (list(dict.fromkeys(key[place] for key in found)) for place in range(3))
    first = next((one for one, weight, _ in found if weight == 0), None)
    head = ["retriever"] * each + ["weight", "set", "recall@3", "from 0", "recall@20", "from 0"]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for shown, weight, name in product([[one] for one in trained] if each else [trained], sorted(weights), names):
        here = [one for one in shown if (one, weight, name) in found]
        if not here:
            continue
        # The measurement at this weight and that at weight 0, where there is one.
        bases = {one: one if (one, 0, name) in found else first if each else None for one in here}
        pairs = [
            (found[one, weight, name], found[base, 0, name]) for one, base in bases.items() if (base, 0, name) in found
        ]
        cells = [Path(shown[0]).parent.name] * each + [f"{weight:g}", name]
        for place in range(len(DEPTHS)):
            cells.append(f"{np.mean([found[one, weight, name][place] for one in here]):.3f}")
            changes = [now[place] - before[place] for now, before in pairs]
            cells.append(interval(np.mean(changes, axis=0)) if changes else "")
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def interval(differences_Q: np.ndarray) -> str:
    """Mean and 95 % bootstrap interval over the queries."""
    found = bootstrap_interval(differences_Q)
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def main() -> None:
    """Measure the cells that are not there yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:minilm", help="the retriever that training started from")
    parser.add_argument("--trained", nargs="+", default=[], help="checkpoints of train-retriever; seeds are averaged")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=DIR", help="corpus.jsonl and SPLIT.jsonl")
    parser.add_argument("--split", default="test")
    parser.add_argument("--questions", type=int, help="the first N of each set; default: all")
    parser.add_argument("--weights", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--each", action="store_true", help="a row for each checkpoint, named by its parent folder")
    parser.add_argument("--report", action="store_true", help="print the table of what is there, run nothing")
    args = parser.parse_args()
    results = args.out / "results.jsonl"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        sets = {name: Path(folder) for name, _, folder in (item.partition("=") for item in args.set)}
        for name, data in sets.items():
            prepare(args.out, name, data, args.split, args.questions)
        done = {(x["trained"], x["weight"], x["set"]) for _, x in read_lines(results)} if results.is_file() else set()
        for weight in args.weights:
            for trained in args.trained:
                left = {name: data for name, data in sets.items() if (trained, weight, name) not in done}
                for line in run_cell(args, trained, weight, left) if left else []:
                    with results.open("ab") as stream:
                        stream.write(dump_line(line))
                    print(json.dumps(line | {"recall": [np.mean(x) for x in line["recall"]]}), file=sys.stderr)
    print(report([line for _, line in read_lines(results)], each=args.each))


if __name__ == "__main__":
    with reported("elsewhere.py"):
        main()
