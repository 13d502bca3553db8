"""The cells of an evaluation: their names, their settings, and the inputs that determine their figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentic_r_plugin import components
from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.config import deciding, fingerprint, load_config, to_dict
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.evaluation.settings import AgenticRSettings, AgentSettings, AnswerJudgeSettings
from agentic_r_plugin.search.hybrid import parts_of
from agentic_r_plugin.storage.fingerprints import path_fingerprint
from agentic_r_plugin.store import file_fingerprint

if TYPE_CHECKING:
    from agentic_r_plugin.evaluation.cell import Cell
    from agentic_r_plugin.evaluation.evaluate import EvaluateConfig


def cells_of(config: EvaluateConfig) -> Iterator[Cell]:
    """Every cell of an evaluation.

    Raises:
        ConfigError: a part of a hybrid does not exist, or two cells have the same name.
    """
    from agentic_r_plugin.evaluation.cell import Cell

    names: set[str] = set()
    identities: dict[str, str] = {}
    for benchmark in config.benchmarks:
        split = config.splits.get(benchmark, config.split)
        for agent, search in pairs_of(config):
            own = config.per_agent.get(agent, AgentSettings()).over(config.settings)
            settings = replace(own, agent=llm_spec(config, agent), search=search_spec(config, search, benchmark))
            spec = settings.search
            parts = parts_of(spec)
            searched = [w for part in parts for w in (searched_path(part), part.retriever, part.rerank.model)]
            for where in (settings.agent.model, settings.agent.tokenizer, spec.rerank.model, *searched):
                # Cells share models and indexes, so each is hashed only once.
                if where not in identities:
                    identities[where] = path_fingerprint(where)
            cell = Cell(
                agent=agent,
                retriever=search,
                benchmark=benchmark,
                config=config,
                settings=settings,
                made_from=_made_from(config, settings, benchmark, split, identities),
            )
            if cell.name in names:
                raise ConfigError(f"two cells would be called {cell.name!r}; rename an agent, retriever or benchmark")
            names.add(cell.name)
            yield cell


def pairs_of(config: EvaluateConfig) -> list[tuple[str, str]]:
    """(agent, search) of the cells of each benchmark."""
    named = [cell.partition(":") for cell in config.cells]
    return [(agent, search) for agent, _, search in named] or [
        (agent, search) for agent in config.agents for search in config.retrievers
    ]


def _made_from(
    config: EvaluateConfig, settings: AgenticRSettings, benchmark: str, split: str, identities: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that can change a cell's figures and is known before the start; not paths, addresses or batch sizes.

    A retrieval service is identified by its `search_fingerprint`, which is its address only if it reports no other.
    """
    own, llm, rerank = deciding(settings), settings.agent, settings.search.rerank
    # In the manifest, `seed` is that of the sample and the intervals, so the agent's has another name.
    agent, searching, sampling_seed = own.pop("agent"), own.pop("search"), own.pop("seed")
    parts = parts_of(settings.search)
    ranked = [part.rerank.model and identities[part.rerank.model] for part in parts]
    if stored := [identities[searched_path(part)] for part in parts if part.backend != "service"]:
        own["retriever"] = _one_or_all(stored)
    if config.judge.llm.model:
        own["judge"] = _judge_made_from(config.judge)
    return {
        "questions": file_fingerprint(split_file(Path(config.data_dir) / benchmark, split)),
        "agent": llm.model if llm.backend == "openai" else identities[llm.model],
        "agent_options": agent["options"],
        "first": config.first,
        "random": config.random,
        "seed": config.seed,
        "metrics": sorted(config.metrics),
        "agent_backend": agent["backend"],
        "search_backend": searching["backend"],
        "search_options": searching["options"],
        "search_retriever": _one_or_all([identities[part.retriever] for part in parts]),
        "dtype": agent["dtype"],
        "tokenizer": identities[llm.tokenizer],
        "level": config.level,
        "resamples": config.resamples,
        "sampling_seed": sampling_seed,
        **({"format": config.format} if config.format else {}),
        **({"rerank": searching["rerank"] | {"model": identities[rerank.model]}} if rerank.on else {}),
        **({"part_rerankers": ranked} if settings.search.backend == "hybrid" and any(ranked) else {}),
    } | own


def _one_or_all(found: list[str]) -> str | list[str]:
    return found[0] if len(found) == 1 else found


def _judge_made_from(judge: AnswerJudgeSettings) -> dict[str, Any]:
    from agentic_r_plugin.data.judge import load_prompt

    model = judge.llm.model if judge.llm.backend == "openai" else path_fingerprint(judge.llm.model)
    prompt = fingerprint(load_prompt("answer_correct", judge.prompt))
    return deciding(judge) | {"model": model, "prompt": prompt}


def llm_spec(config: EvaluateConfig, name: str) -> LLMSpec:
    """The language model of the agent `name`: the shared settings with its own over them."""
    where, shared = config.agents[name], asdict(config.settings.agent)
    own = config.per_agent.get(name, AgentSettings()).llm
    if not where.startswith(("http://", "https://")):
        return load_config(LLMSpec, values=shared | {"model": where} | own)
    if shared["backend"] != "openai":
        shared["options"] = {}  # these are options of another backend
    return load_config(LLMSpec, values=shared | {"backend": "openai", "url": where} | own)


def searched_path(spec: SearchSpec) -> str:
    """The index or corpus that is searched."""
    return spec.corpus if spec.backend == "bm25" else spec.index


def search_spec(config: EvaluateConfig, name: str, benchmark: str) -> SearchSpec:
    """The search of the retriever `name` of the matrix, with its reranker and its parts.

    Raises:
        ConfigError: a part is not among the other searches, or is a hybrid itself.
    """
    search, reranker = config.retrievers[name]
    where, shared = _of_benchmark(config.searches[search], benchmark), config.settings.search
    if reranker:
        shared = replace(shared, rerank=replace(shared.rerank, model=config.rerankers[reranker]))
    if isinstance(where, str):
        where = located(where)
        if where.get("backend") != "hybrid":
            return _of_backend(replace(shared, **where), shared.backend)
    # The shared options belong to the shared backend.
    values = to_dict(shared) | ({"options": {}} if where.get("backend", shared.backend) != shared.backend else {})
    spec = load_config(SearchSpec, values=values | where)
    parts = [_named_part(config, name, part, benchmark) for part in spec.options.get("parts", ())]
    return replace(spec, options=spec.options | {"parts": parts}) if parts else spec


def _of_backend(spec: SearchSpec, shared: str) -> SearchSpec:
    """`spec` without the shared options that its backend does not have, if it is not the shared backend."""
    if spec.backend == shared or not spec.options:
        return spec
    declared = getattr(components.load("search_backend", spec.backend), "Options", None)
    names = {item.name for item in fields(declared)} if declared else set(spec.options)
    return replace(spec, options={name: value for name, value in spec.options.items() if name in names})


def located(where: str) -> dict[str, Any]:
    """Settings of a search that is given by its location (`EvaluateConfig.searches`)."""
    if where.startswith(("http://", "https://")):
        return {"backend": "service", "url": where}
    if where.startswith("bm25:"):
        return {"backend": "bm25", "corpus": where.removeprefix("bm25:")}
    if where.startswith("hybrid:"):
        return {"backend": "hybrid", "options": {"parts": where.removeprefix("hybrid:").split("+")}}
    return {"index": where}


def _named_part(config: EvaluateConfig, name: str, part: Any, benchmark: str) -> Any:
    """A part of the hybrid `name`: settings, or the name of another search."""
    if not isinstance(part, str):
        return part
    if part not in config.searches or part == name:
        others = ", ".join(other for other in config.searches if other != name)
        raise ConfigError(f"searches.{name}: expected parts among the other searches ({others}), found {part!r}")
    found = config.searches[part]
    if (located(found) if isinstance(found, str) else found).get("backend") == "hybrid":
        raise ConfigError(f"searches.{name}: its part {part!r} is a hybrid itself; name that one's parts")
    return to_dict(search_spec(config, part, benchmark))


def _of_benchmark(value: Any, benchmark: str) -> Any:
    """A search's location or settings, with the benchmark's name filled in."""
    if isinstance(value, Mapping):
        return {key: _of_benchmark(item, benchmark) for key, item in value.items()}
    if isinstance(value, list):
        return [_of_benchmark(item, benchmark) for item in value]
    return value.replace("{benchmark}", benchmark) if isinstance(value, str) else value
