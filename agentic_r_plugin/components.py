"""Registered components: the only way to add a part to this package, for us and for third parties.

A package declares entry points in the group `agentic_r_plugin.components`, named `KIND.NAME`:

    [project.entry-points."agentic_r_plugin.components"]
    "query_formulation.my_formulation" = "my_package.queries:my_formulation"

The object behind a name depends on its kind:

| kind | the object |
|---|---|
| query_formulation | `f(request: query.SearchRequest) -> str` |
| agent_protocol | a `protocol.AgentProtocol` |
| relevance_scorer | a class with `needs_questions`, `build`, `score` and `fingerprint` (`data.scorers.base`) |
| llm_backend | a class with `from_spec(spec)` (`backends`) and `generate(requests, sampling)` (`llm.base`) |
| search_backend | a class with `from_spec(spec)` (`backends`) and `search(requests, topk)` (`search.base`) |
| reranker | a class with `from_spec(spec)` (`backends`) and `score(requests, passages)` (`search.rerank`) |
| retriever_trainer | `f(config, *, resume) -> Path` of the trained checkpoint (`retriever.training`) |
| reward | `f(outcome: Outcome, **options) -> float` (`agent.rewards`) |
| selection | a `data.selection.Selection` |

A backend, reranker, scorer or trainer may declare its options in a dataclass `Options`, an attribute of it. An option
whose field has the metadata `config.FREE` cannot change the result and may differ when work is resumed. Every other
option, declared or not, must stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from agentic_r_plugin.errors import ConfigError, UnknownComponentError

GROUP = "agentic_r_plugin.components"
KINDS = (
    "query_formulation",
    "agent_protocol",
    "relevance_scorer",
    "llm_backend",
    "search_backend",
    "reranker",
    "retriever_trainer",
    "reward",
    "selection",
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """A registered component: its kind, its name, and the distribution that provides it."""

    kind: str
    name: str
    package: str
    target: str
    """Location of the object, `module:attribute`."""


@cache
def _registry() -> dict[tuple[str, str], EntryPoint]:
    found: dict[tuple[str, str], EntryPoint] = {}
    for point in entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        if kind not in KINDS or not name:
            raise ConfigError(
                f"entry point {point.name!r} of {_package(point)}: expected KIND.NAME, KIND one of {', '.join(KINDS)}"
            )
        other = found.setdefault((kind, name), point)
        if other.value != point.value:
            raise ConfigError(
                f"component {point.name!r} is registered twice: by {_package(other)} ({other.value}) and by "
                f"{_package(point)} ({point.value}); uninstall one or rename it"
            )
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "unknown package"


def components() -> Iterator[Component]:
    """All registered components, ordered by kind and name, without importing them."""
    for (kind, name), point in sorted(_registry().items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1])):
        yield Component(kind=kind, name=name, package=_package(point), target=point.value)


def names(kind: str) -> list[str]:
    """Names registered under one kind, sorted."""
    return sorted(name for found_kind, name in _registry() if found_kind == kind)


@cache
def load(kind: str, name: str) -> Any:
    """The object registered as `kind.name`.

    Raises:
        UnknownComponentError: the name is not registered; the message lists the registered names.
        ConfigError: the component's module cannot be imported.
    """
    point = _registry().get((kind, name))
    if point is None:
        known = ", ".join(names(kind)) or "none; is the package installed (pip install -e .)?"
        raise UnknownComponentError(f"unknown {kind} {name!r}; registered: {known}")
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {name!r} of {_package(point)} ({point.value}) cannot be loaded: {error}") from error


def describe(component: Component) -> str:
    """First line of the component's docstring (or of its `description`), or why it cannot be loaded."""
    try:
        target = load(component.kind, component.name)
    except ConfigError as error:
        return f"({str(error).splitlines()[0]})"
    text = getattr(target, "description", None) or target.__doc__ or ""
    return str(text).strip().partition("\n")[0]
