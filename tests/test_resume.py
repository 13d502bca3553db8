"""Which settings may change when work is resumed: every field says so, and every command asks the field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import pytest

from agentic_r_plugin import components
from agentic_r_plugin.agent import launch
from agentic_r_plugin.agent.prepare import run_output
from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.cli import COMMANDS
from agentic_r_plugin.config import BY_CONTENTS, FREE, deciding, free_settings, load_config, options_of
from agentic_r_plugin.errors import ManifestMismatchError
from agentic_r_plugin.iterate import IterateConfig, opened
from agentic_r_plugin.loop.phases import Phases

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart" / "loop.yaml"

FREE_OF = {
    "LLMSpec": "url api_key_env device max_batch_tokens prefix_cache_tokens concurrency timeout_s max_retries replicas",
    "SearchSpec": "url device batch_size timeout_s max_retries",
    "WorldConfig": "out name",
    "CoverageConfig": "out",
    "IndexConfig": "out allow_pickle seed device batch_size max_batch_tokens ray_workers ray_address ray_gpus",
    "MilvusSettings": "token_env prefix timeout_s",
    "RepairConfig": "out",
    "ServeConfig": "device host port token_env workers allow_reload ready_file exit_with_parent default_topk "
    "max_queries max_passages max_body_bytes max_waiting timeout_s "
    "header_timeout_s batch_size window_ms cache_size",
    "TrainAgentConfig": "retrieval_url retrieval_token_env out micro_batch_size stability save_every keep_checkpoints "
    "validate_every rollouts_per_step loggers max_failed_search_share max_concurrent_searches search_timeout_s "
    "search_retries device_memory_gb tensor_parallel offload micro_batch_tokens threads attention dry_run",
    "TrajectoriesConfig": "out batch_size runner",
    "CandidatesConfig": "out batch_size runner",
    "SubAnswersConfig": "out max_error_share batch_size runner",
    "RelevanceConfig": "out max_error_share batch_size runner",
    "CorrectnessConfig": "out batch_size runner",
    "GroupsConfig": "out runner",
    "TrainRetrieverConfig": "out push_to_hub token_env loggers datasets device checkpoint_steps",
    "TrainRerankerConfig": "out push_to_hub token_env loggers datasets device",
    "QuestionsConfig": "out push_to_hub token_env",
    "CorpusConfig": "out push_to_hub token_env batch_size runner",
    "ConvertTrajectoriesConfig": "out push_to_hub token_env",
    "ConvertGroupsConfig": "out push_to_hub token_env",
    "ConvertRunsConfig": "out",
    "ConvertQrelsConfig": "out",
    "AgenticRSettings": "batch_size",
    "EvaluateConfig": "processes tables reuse",
    "AnswerJudgeSettings": "max_error_share",
    "IterateConfig": "out dry_run report expected_seconds plan",
}
"""Class -> the settings that cannot change the result; every other setting decides. A new one is added here, too."""

OPTIONS = {
    ("llm_backend", "vllm"): "gpu_memory_utilization tensor_parallel_size max_num_seqs max_num_batched_tokens",
    ("llm_backend", "openai"): "requests_per_minute usd_per_million_prompt_tokens usd_per_million_cached_tokens "
    "usd_per_million_generated_tokens",
    ("search_backend", "faiss"): "mapped",
    ("search_backend", "torch"): "search_devices block_rows",
    ("search_backend", "bm25"): "folder",
    ("search_backend", "service"): "token_env max_connections max_batch",
    ("search_backend", "milvus"): "uri token_env timeout_s",
    ("relevance_scorer", "cross_encoder"): "batch_size device",
    ("reranker", "cross_encoder"): "batch_size",
}


def settings_classes() -> Iterator[type]:
    """The dataclasses of all commands' settings, with those nested in them."""
    waiting, seen = [command.load()[0] for command in COMMANDS.values()], set()
    while waiting:
        cls = waiting.pop()
        if cls not in seen:
            seen.add(cls)
            yield cls
            waiting += [hint for hint in get_type_hints(cls).values() if isinstance(hint, type) and is_dataclass(hint)]


def test_every_setting_of_every_command_decides_the_result_unless_it_is_listed_here() -> None:
    classes = list(settings_classes())
    # sections of iterate are compared as the phases that they make
    sections = [item.name for item in fields(IterateConfig) if item.metadata.get("decides") == "phases"]
    assert {cls.__name__: free_settings(cls) for cls in classes if free_settings(cls)} == {
        name: [item.name for item in fields(next(cls for cls in classes if cls.__name__ == name))
               if item.name in {*names.split(), *(sections if name == "IterateConfig" else ())}]
        for name, names in FREE_OF.items()
    }  # fmt: skip
    for cls in classes:
        for item in fields(cls):
            decides = item.metadata.get("decides", True)
            assert isinstance(decides, bool) or decides in ("contents", "phases") or callable(decides), item


def test_options_of_components_that_cannot_change_the_result_are_declared_by_the_components() -> None:
    found = {
        (component.kind, component.name): " ".join(free_settings(options))
        for component in components.components()
        if component.package == "agentic-r-plugin"
        if (options := getattr(components.load(component.kind, component.name), "Options", None))
    }
    assert {key: names for key, names in found.items() if names} == OPTIONS


def test_an_option_of_a_third_party_decides_unless_its_component_says_otherwise(monkeypatch) -> None:
    @dataclass
    class Options:
        cache: str = field(default="", metadata=FREE)
        weights: str = field(default="", metadata=BY_CONTENTS)
        depth: int = 3

    @dataclass
    class Settings:
        reranker: str = "theirs"
        options: dict[str, Any] = field(default_factory=dict, metadata=options_of("search_backend", "reranker"))

    given = Settings(options={"cache": "/tmp", "weights": "w", "depth": 5, "new": 1})
    theirs = {"theirs": SimpleNamespace(Options=Options), "older": SimpleNamespace()}
    monkeypatch.setattr(components, "load", lambda kind, name: theirs[name])
    assert deciding(given) == {"reranker": "theirs", "options": {"depth": 5, "new": 1}}
    assert deciding(given, names=True)["options"] == {"weights": "w", "depth": 5, "new": 1}
    assert deciding(replace(given, reranker="older"))["options"] == given.options


def test_of_a_backend_only_its_name_type_and_deciding_options_are_compared() -> None:
    llm = LLMSpec(backend="vllm", model="m", url="u", options={"max_model_len": 512, "tensor_parallel_size": 2})
    assert deciding(llm) == {"backend": "vllm", "dtype": "auto", "options": {"max_model_len": 512}}
    search = SearchSpec(backend="service", url="u", index="i", options={"token_env": "T"})
    assert deciding(search) == {"backend": "service", "options": {}}
    assert deciding(search, names=True)["index"] == "i"


def begun(tmp_path: Path, *overrides: str) -> Phases:
    settings = [f"out={tmp_path / 'run'}", f"benchmark={tmp_path}", *overrides]
    phases = Phases(load_config(IterateConfig, RECIPE, settings))
    with opened(phases, resume=False):
        return phases


ACCEPTED = (
    "correctness.batch_size=7", "trajectories.runner.workers=2", "relevance.llm.concurrency=3", "llm.device=cpu",
    "candidates.search.timeout_s=5", "serve.workers=2", "train_retriever.device=cpu", "relevance.max_error_share=0.5",
    "train_agent.threads=2", "plan.gpus=4", "serve.token_env=OTHER", "train_agent.micro_batch_tokens=512",
    "train_agent.micro_batch_size=1", "train_agent.offload=false", "train_agent.tensor_parallel=2",
    "train_agent.stability.patience=3", "train_agent.stability.on_collapse=stop",
    "train_agent_later.stability.window=2",
    "train_agent_later.micro_batch_tokens=256", "train_agent.max_failed_search_share=0.3", "index.batch_size=8",
    "train_agent.verl=[actor_rollout_ref.rollout.gpu_memory_utilization=0.5]", "serve.options.mapped=true",
    "candidates.search.options.max_connections=4", "evaluate.settings.batch_size=3",
    "evaluate.settings.agent.device=cpu",
    "sub_answers.prompt=mine.txt", "train_retriever.epochs=2", "groups.threshold=60", "report.num_trajectories=3",
)  # fmt: skip
"""With those that change nothing because they are unused (no judge here) or the default."""


def test_a_resume_may_change_what_decides_no_result_and_keeps_what_is_used_now(tmp_path: Path) -> None:
    phases = begun(tmp_path, "train_retriever.epochs=2", "train_agent.verl=[]")
    saved = phases.folder / "config.yaml"
    before = saved.stat().st_mtime_ns
    with opened(phases, resume=True):
        pass
    assert saved.stat().st_mtime_ns == before
    other = load_config(IterateConfig, saved, ACCEPTED)
    with opened(Phases(other), resume=True):
        pass
    assert load_config(IterateConfig, saved) == other


REFUSED = (
    "correctness.threshold=70", "relevance.llm.model=other", "llm.dtype=float16", "serve.options.nprobe=3",
    "candidates.search.backend=bm25", "train_retriever.epochs=99", "train_agent.steps=99", "index.kind=SQ8",
    "llm.options.quantization=fp8", "train_agent_later.steps=99", "limits.max_searches=2", "seed=4", "iterations=5",
    "train_agent.verl=[critic.cliprange_value=0.2]", "evaluate.settings.temperature=0.5", "groups.num_negatives=3",
)  # fmt: skip


def test_a_resume_may_not_change_what_decides_results(tmp_path: Path) -> None:
    phases = begun(tmp_path)
    saved = phases.folder / "config.yaml"
    before = phases.deciding()
    for override in REFUSED:
        name = override.partition("=")[0]
        now = Phases(load_config(IterateConfig, saved, [override])).deciding()
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        assert [key for key in changed if key.startswith(name)], (override, changed)
    other, refused = Phases(load_config(IterateConfig, saved, ["groups.threshold=70"])), ManifestMismatchError
    with pytest.raises(refused, match=r"groups\.threshold was 60, now 70"), opened(other, resume=True):
        pass


def test_what_train_agent_takes_on_a_resume_the_loop_takes_as_well(tmp_path: Path) -> None:
    given = {"model": str(tmp_path), "questions": str(tmp_path), "retrieval_url": "http://x:1", "out": "o"}
    config = load_config(launch.TrainAgentConfig, values=given)
    values = {
        "micro_batch_size": 1, "save_every": 7, "keep_checkpoints": 1, "validate_every": 9, "rollouts_per_step": 1,
        "max_failed_search_share": 0.4, "max_concurrent_searches": 3, "search_timeout_s": 9.0, "search_retries": 1,
        "device_memory_gb": 24.0, "tensor_parallel": 2, "offload": False, "micro_batch_tokens": 99, "threads": 3,
        "attention": "sdpa",
        "stability": {"patience": 9}, "loggers": ["wandb"], "retrieval_token_env": "T", "dry_run": True,
    }  # fmt: skip
    filled_in = {"retrieval_url", "out"}
    assert {*values, *filled_in} == set(free_settings(launch.TrainAgentConfig))
    saved = begun(tmp_path).folder / "config.yaml"
    for name, value in values.items():
        changed = load_config(launch.TrainAgentConfig, values=given | {name: value})
        assert run_output(changed).made_from == run_output(config).made_from, name
    with opened(Phases(load_config(IterateConfig, saved, values={"train_agent": values})), resume=True):
        pass
