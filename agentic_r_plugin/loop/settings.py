"""Settings of the loop: what it starts from, how phases differ from their defaults, assumptions of its forecast."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from agentic_r_plugin.agent.settings import TrainAgentConfig
from agentic_r_plugin.backends import LLMSpec
from agentic_r_plugin.config import FREE, LATER, check_least, section_of, setting
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


def _section(cls: type, text: str = "the loop fills in the rest") -> Any:
    return setting(text, section_of(cls), _SECTION, default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Assumptions of the forecast; the defaults are guesses for the paper's models on 80 GB accelerators."""

    gpus: int = setting("total accelerators", default=8)
    train_questions: int = setting("0: as many as the train split has", default=0)
    corpus_passages: int = setting("0: as many lines as the corpus has", default=0)

    queries_per_question: float = setting("searches the agent makes for a question", default=2.06)
    rollouts_per_query: float = setting("candidates rolled out per query, after pruning", default=4.0)
    calls_per_rollout: float = setting("turns of the agent after the candidate", default=1.7)
    positive_share: float = setting("share of queries that give a group", default=0.3)

    turn_prompt_tokens: int = setting("prompt tokens of one turn of the agent", default=1400)
    turn_cached_share: float = setting("share of them read from the prefix cache", default=0.8)
    turn_generated_tokens: int = setting("tokens written in one turn", default=110)
    passage_tokens: int = setting("tokens of one passage in a prompt", default=150)
    judge_generated_tokens: int = setting("tokens of one reply", default=90)

    agent_gpus: int = setting("accelerators of one engine of the agent", default=1)
    agent_prompt_tokens_per_s: float = setting("one engine", default=20_000)
    agent_generated_tokens_per_s: float = setting("one engine", default=3_000)
    judge_gpus: int = setting("accelerators of one engine of the judge", default=8)
    judge_prompt_tokens_per_s: float = setting("one engine", default=7_000)
    judge_generated_tokens_per_s: float = setting("one engine", default=1_200)
    ppo_step_s: float = setting("one step of PPO on all accelerators", default=300)
    encoded_passages_per_s: float = setting("one accelerator", default=1_500)
    trained_groups_per_s: float = setting("one accelerator", default=4)

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

    out: str = setting("run folder", FREE)
    agent: str = setting("folder of the agent to start from")
    retriever: str = setting("retriever to start from: folder, hub name, or builtin:NAME")
    benchmark: str = setting("benchmark in FlashRAG layout; empty: generate one (world)", default="")
    corpus: str = setting("corpus, if it is not the benchmark's corpus.jsonl", default="")
    format: str = field(default="", metadata=FORMAT)
    iterations: int = setting("K", default=2)
    dry_run: bool = setting("compose every phase, check paths, print a forecast, stop", FREE, default=False)
    seed: int = setting("seed of training, sampling and selection; world.seed is separate", default=0)
    train_agents: bool = setting("train with PPO; off: every iteration uses the given agent", LATER, default=True)
    agent_from: str = setting("PPO of iteration k starts from: previous, first", default="previous")
    critic_from: str = setting(
        "critic of iteration k > 1 starts from: new (as train_agent says), previous", default="new"
    )
    retriever_from: str = setting("retriever k starts from: previous, first", default="previous")
    protocol: str = setting("registered agent_protocol", default="search_r1")
    protocol_options: dict[str, Any] = setting(
        "options of the protocol that differ from its own", LATER, default_factory=dict
    )
    limits: Limits = setting("how far a trajectory may go", default_factory=Limits)
    topk: int = setting("passages shown for a search", default=3)
    train_split: str = setting("questions of PPO and of data construction", default="train")
    dev_split: str = setting("questions PPO is validated on; empty: none", default="dev")
    test_split: str = setting("questions of the evaluation", default="test")
    judge: bool = setting("ask a judge for sub-answers (needs a sub_answers section)", default=False)
    llm: LLMSpec = setting("how the agent is run outside PPO", default_factory=LLMSpec)
    world: WorldConfig = setting("the generated benchmark", _SECTION, default_factory=WorldConfig)
    index: dict[str, Any] = _section(IndexConfig)
    serve: ServeConfig = setting("the retrieval service", _SECTION, default_factory=lambda: ServeConfig(port=0))
    train_agent: dict[str, Any] = _section(TrainAgentConfig)
    train_agent_later: dict[str, Any] = _section(
        TrainAgentConfig, "what differs in train_agent from the second iteration on"
    )
    trajectories: dict[str, Any] = _section(TrajectoriesConfig)
    candidates: dict[str, Any] = _section(CandidatesConfig)
    sub_answers: dict[str, Any] = _section(SubAnswersConfig)
    relevance: dict[str, Any] = _section(RelevanceConfig)
    correctness: dict[str, Any] = _section(CorrectnessConfig)
    groups: dict[str, Any] = _section(GroupsConfig)
    train_retriever: dict[str, Any] = _section(TrainRetrieverConfig)
    evaluate: dict[str, Any] = _section(EvaluateConfig)
    report: dict[str, Any] = setting("the loop fills in the rest", section_of(ReportConfig), FREE, default_factory=dict)
    expected_seconds: dict[str, Any] = setting(
        "iteration -> phase -> seconds on some machine, for the estimate of the time left", FREE, default_factory=dict
    )
    plan: PlanConfig = setting("assumptions of the forecast", FREE, default_factory=PlanConfig)

    def __post_init__(self) -> None:
        check_least(self, iterations=1)
        try:
            self.expected()
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"expected_seconds: expected iteration -> phase -> seconds; {error}") from None
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
