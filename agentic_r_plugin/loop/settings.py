"""Settings of the loop: what it starts from, how phases differ from their defaults, assumptions of its forecast."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.backends import LLMSpec
from agentic_r_plugin.config import FREE, LATER, section_of
from agentic_r_plugin.data.candidates import CandidatesConfig
from agentic_r_plugin.data.correctness import CorrectnessConfig
from agentic_r_plugin.data.groups import GroupsConfig
from agentic_r_plugin.data.relevance import RelevanceConfig
from agentic_r_plugin.data.sub_answers import SubAnswersConfig
from agentic_r_plugin.data.trajectories import TrajectoriesConfig
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.evaluation.evaluate import EvaluateConfig
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.questions import FORMAT
from agentic_r_plugin.report.report import ReportConfig
from agentic_r_plugin.retriever.settings import TrainRetrieverConfig
from agentic_r_plugin.search.indexing.index import IndexConfig
from agentic_r_plugin.search.service.server import ServeConfig
from agentic_r_plugin.world.settings import WorldConfig

_CHOICES = {
    "agent_from": ("previous", "first"),
    "retriever_from": ("previous", "first"),
    "critic_from": ("new", "previous"),
}

_SECTION = {"decides": "phases"}
"""Metadata of a section. On a resume, the settings of the phases composed from it are compared (`Phases.deciding`)."""


def _section(cls: type, text: str = "the loop fills in the rest") -> dict[str, Any]:
    return {**section_of(cls), **_SECTION, "help": text}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Assumptions of the forecast; the defaults are guesses for the paper's models on 80 GB accelerators."""

    gpus: int = field(default=8, metadata={"help": "accelerators in all"})
    train_questions: int = field(default=0, metadata={"help": "0: as many as the train split has"})
    corpus_passages: int = field(default=0, metadata={"help": "0: as many lines as the corpus has"})

    queries_per_question: float = field(default=2.06, metadata={"help": "searches the agent makes for a question"})
    rollouts_per_query: float = field(default=4.0, metadata={"help": "candidates rolled out once pruned, all queries"})
    calls_per_rollout: float = field(default=1.7, metadata={"help": "turns of the agent after the candidate"})
    positive_share: float = field(default=0.3, metadata={"help": "queries that give a group"})

    turn_prompt_tokens: int = field(default=1400, metadata={"help": "prompt of one turn of the agent"})
    turn_cached_share: float = field(default=0.8, metadata={"help": "of it taken from the prefix cache"})
    turn_generated_tokens: int = field(default=110, metadata={"help": "written in one turn"})
    passage_tokens: int = field(default=150, metadata={"help": "of one passage in a prompt"})
    judge_generated_tokens: int = field(default=90, metadata={"help": "of one reply"})

    agent_gpus: int = field(default=1, metadata={"help": "accelerators of one engine of the agent"})
    agent_prompt_tokens_per_s: float = field(default=20_000, metadata={"help": "one engine"})
    agent_generated_tokens_per_s: float = field(default=3_000, metadata={"help": "one engine"})
    judge_gpus: int = field(default=8, metadata={"help": "accelerators of one engine of the judge"})
    judge_prompt_tokens_per_s: float = field(default=7_000, metadata={"help": "one engine"})
    judge_generated_tokens_per_s: float = field(default=1_200, metadata={"help": "one engine"})
    ppo_step_s: float = field(default=300, metadata={"help": "one step of PPO on all accelerators"})
    encoded_passages_per_s: float = field(default=1_500, metadata={"help": "one accelerator"})
    trained_groups_per_s: float = field(default=4, metadata={"help": "one accelerator"})

    def __post_init__(self) -> None:
        may_be_0 = ("train_questions", "corpus_passages", "turn_cached_share", "positive_share")
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name not in may_be_0):
                least = "at least 0" if name in may_be_0 else "above 0"
                raise ConfigError(f"plan.{name}: expected {least}, found {value}")
        if self.turn_cached_share > 1 or self.positive_share > 1:
            raise ConfigError("plan: turn_cached_share and positive_share are shares, expected at most 1")


@dataclass(frozen=True, kw_only=True)
class IterateConfig:
    """Agent and retriever train each other, K times.

    A section named after a command holds fields of that command. The loop fills in paths, models, protocol and limits.
    A section may override these field by field, except for the location of the output.
    """

    out: str = field(metadata={"help": "run folder", **FREE})
    agent: str = field(metadata={"help": "folder of the agent to start from"})
    retriever: str = field(metadata={"help": "retriever to start from: folder, or builtin:NAME"})
    benchmark: str = field(default="", metadata={"help": "benchmark in FlashRAG layout; empty: generate one (world)"})
    corpus: str = field(default="", metadata={"help": "corpus, where it is not the benchmark's corpus.jsonl"})
    format: str = field(default="", metadata=FORMAT)
    iterations: int = field(default=2, metadata={"help": "K"})
    dry_run: bool = field(
        default=False, metadata={"help": "compose every phase, check paths, print a forecast, stop", **FREE}
    )
    seed: int = field(default=0, metadata={"help": "of training, sampling and selection; the world has its own"})
    train_agents: bool = field(
        default=True, metadata={"help": "off: no PPO; the given agent is that of every iteration", **LATER}
    )
    agent_from: str = field(default="previous", metadata={"help": "PPO of iteration k starts from: previous, first"})
    critic_from: str = field(
        default="new", metadata={"help": "critic of iteration k > 1 starts from: new (as train_agent says), previous"}
    )
    retriever_from: str = field(default="previous", metadata={"help": "retriever k starts from: previous, first"})
    protocol: str = field(default="search_r1", metadata={"help": "registered agent_protocol"})
    protocol_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the protocol that differ from its own", **LATER}
    )
    limits: Limits = field(default_factory=Limits, metadata={"help": "how far a trajectory may go"})
    topk: int = field(default=3, metadata={"help": "passages shown for a search"})
    train_split: str = field(default="train", metadata={"help": "questions of PPO and of data construction"})
    dev_split: str = field(default="dev", metadata={"help": "questions PPO is validated on; empty: none"})
    test_split: str = field(default="test", metadata={"help": "questions of the evaluation"})
    judge: bool = field(default=False, metadata={"help": "ask a judge for sub-answers (needs a sub_answers section)"})
    llm: LLMSpec = field(default_factory=LLMSpec, metadata={"help": "how the agent is run outside PPO"})
    world: WorldConfig = field(default_factory=WorldConfig, metadata={"help": "the generated benchmark", **_SECTION})
    index: dict[str, Any] = field(default_factory=dict, metadata=_section(IndexConfig))
    serve: ServeConfig = field(
        default_factory=lambda: ServeConfig(port=0), metadata={"help": "the retrieval service", **_SECTION}
    )
    train_agent: dict[str, Any] = field(default_factory=dict, metadata=_section(TrainAgentConfig))
    train_agent_later: dict[str, Any] = field(
        default_factory=dict,
        metadata=_section(TrainAgentConfig, "what differs in train_agent from the second iteration on"),
    )
    trajectories: dict[str, Any] = field(default_factory=dict, metadata=_section(TrajectoriesConfig))
    candidates: dict[str, Any] = field(default_factory=dict, metadata=_section(CandidatesConfig))
    sub_answers: dict[str, Any] = field(default_factory=dict, metadata=_section(SubAnswersConfig))
    relevance: dict[str, Any] = field(default_factory=dict, metadata=_section(RelevanceConfig))
    correctness: dict[str, Any] = field(default_factory=dict, metadata=_section(CorrectnessConfig))
    groups: dict[str, Any] = field(default_factory=dict, metadata=_section(GroupsConfig))
    train_retriever: dict[str, Any] = field(default_factory=dict, metadata=_section(TrainRetrieverConfig))
    evaluate: dict[str, Any] = field(default_factory=dict, metadata=_section(EvaluateConfig))
    report: dict[str, Any] = field(
        default_factory=dict, metadata={**section_of(ReportConfig), **FREE, "help": "the loop fills in the rest"}
    )
    expected_seconds: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "iteration -> phase -> seconds on some machine, for the estimate of the time left", **FREE},
    )
    plan: PlanConfig = field(default_factory=PlanConfig, metadata={"help": "assumptions of the forecast", **FREE})

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"iterations: expected at least 1, found {self.iterations}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {getattr(self, name)!r}")

    def expected(self) -> dict[tuple[int, str], float]:
        """`expected_seconds` by (iteration, phase), without iterations that the loop does not have."""
        return {
            (int(number), phase): float(seconds)
            for number, phases in self.expected_seconds.items()
            if int(number) <= self.iterations
            for phase, seconds in phases.items()
            if self.train_agents or phase != "train-agent"
        }
