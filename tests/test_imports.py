"""Imports point one way: within the list of layers, among the data stages, and without a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "agentic_r_plugin"

LAYERS = (
    ("", "errors", "components", "credentials", "records", "forms", "answers", "query", "store", "config", "protocol",
     "session", "blocks", "cost", "tags", "tools", "questions", "progress", "compute", "memory", "attention",
     "upstream", "storage", "child", "net", "ray_cluster", "trec", "hub", "field_values"),
    ("llm", "search", "backends", "rollout"),
    ("data", "retriever", "world", "agent", "convert"),
    ("evaluation", "report"),
    ("loop", "comparison"),
    ("iterate", "experiment", "cli"),
)  # fmt: skip
"""Folders and modules of the package, lowest first (CONTRIBUTING.md)."""

UPWARDS = {
    ("child", "cli"),  # a child process runs a command by its name
    ("tools", "llm.reply"),  # pure functions on the text of a reply
}
"""Imports that go up, with the reason."""

STAGES = ("trajectories", "candidates", "sub_answers", "relevance", "correctness", "groups", "report")
"""The data stages in the order of the method."""


def modules() -> dict[str, Path]:
    """Name within the package -> file."""
    found = {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    return {name.removesuffix("__init__").rstrip("."): file for name, file in found.items()}


def imports(file: Path, known: dict[str, Path], *, later: bool = True) -> Iterator[str]:
    """Modules of the package that a file imports, if `later` also within functions; none that only types need."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not later:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE.name:
            base = str(node.module).removeprefix(PACKAGE.name).lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in known else base
        waiting += ast.iter_child_nodes(node)


def layer(name: str) -> int:
    found = [number for number, names in enumerate(LAYERS) if name.partition(".")[0] in names]
    assert found, f"{name}: a new module or folder; give it a place in LAYERS"
    return found[0]


def test_no_module_imports_from_a_higher_layer():
    known = modules()
    found = {(name, target) for name, file in known.items() for target in imports(file, known)}
    assert {pair for pair in found if layer(pair[1]) > layer(pair[0])} == UPWARDS


def test_no_data_stage_imports_from_a_later_one():
    known = modules()
    for place, stage in enumerate(STAGES):
        later = {f"data.{name}" for name in STAGES[place + 1 :]}
        assert later.isdisjoint(imports(known[f"data.{stage}"], known)), stage


def test_modules_can_be_sorted_so_that_each_imports_only_earlier_ones():
    known = modules()
    graph = {name: set(imports(file, known, later=False)) - {name, ""} for name, file in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(known) - 1
