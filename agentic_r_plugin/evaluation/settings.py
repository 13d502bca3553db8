"""Typed settings under `agentic_r` in a FlashRAG configuration, and the `agent.json` of an agent folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, check_least, load_config, section_of, setting
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.base import Sampling, check_sampling
from agentic_r_plugin.protocol import AgentProtocol, Limits, load_protocol
from agentic_r_plugin.store import read_json

KEY = "agentic_r"
AGENT_FILE = "agent.json"
JUDGED = "agentic_judge"
"""Metric of the judge of answers."""
DEFAULT_PROTOCOL = "search_r1"

LimitsType = TypeVar("LimitsType", "Limits", "LimitOverrides")


@dataclass(frozen=True, kw_only=True)
class LimitOverrides:
    """Limits of a trajectory (`protocol.Limits`), each only where it differs from the agent folder's."""

    max_searches: int | None = setting("searches per question", default=None)
    max_malformed: int | None = setting("malformed turns that are corrected", default=None)
    max_tokens: int | None = setting("prompt and response together", default=None)
    max_response_tokens: int | None = setting("the model's tokens in one turn", default=None)
    max_observation_tokens: int | None = setting("tokens of one information block", default=None)
    max_document_tokens: int | None = setting("tokens of one opened document", LATER, default=None)
    max_opens: int | None = setting("calls that open a document", LATER, default=None)

    def over(self, limits: LimitsType) -> LimitsType:
        """Apply the values that are set here to `limits`, or to other overrides."""
        return replace(limits, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class AgenticRSettings:
    """How the agent searches and how much of it is measured."""

    protocol: str | None = setting("agent protocol; none: the one in the agent's folder", default=None)
    protocol_options: dict[str, Any] = setting(
        "options of the protocol, added to the agent folder's if it is the same protocol", LATER, default_factory=dict
    )
    limits: LimitOverrides = setting("limits that differ from the agent's folder", default_factory=LimitOverrides)
    topk: int | None = setting("passages shown per search; none: as in the agent's folder", default=None)
    depth: int = setting("passages per search for the recalls at 20; below 20 they are empty", default=20)
    temperature: float = setting("0 is greedy", default=0.0)
    top_p: float = setting("nucleus of the sampled tokens", default=1.0)
    seed: int | None = setting("seed of sampling", default=None)
    batch_size: int = setting("questions that are answered together", FREE, default=64)
    agent: LLMSpec = setting("the agent's language model", default_factory=LLMSpec)
    search: SearchSpec = setting("the retriever", default_factory=SearchSpec)

    def __post_init__(self) -> None:
        check_least(self, f"{KEY}.", topk=1, depth=0, batch_size=1)
        check_sampling(self.temperature, self.top_p, f"{KEY}.")

    def sampling(self) -> Sampling:
        """Sampling parameters of the agent."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """Settings of one agent that differ from the shared `settings`."""

    protocol: str | None = setting("agent protocol; none: as `settings` says", default=None)
    protocol_options: dict[str, Any] = setting("options of that protocol", LATER, default_factory=dict)
    topk: int | None = setting("passages shown for a search; none: as `settings` says", default=None)
    limits: LimitOverrides = setting("where they differ", default_factory=LimitOverrides)
    llm: dict[str, Any] = setting("what differs from `settings.agent`", section_of(LLMSpec), default_factory=dict)

    def over(self, settings: AgenticRSettings) -> AgenticRSettings:
        """Apply these values to `settings`, except those of the language model."""
        return replace(
            settings,
            protocol=self.protocol or settings.protocol,
            # Shared options belong to the shared protocol.
            protocol_options=({} if self.protocol else settings.protocol_options) | self.protocol_options,
            topk=settings.topk if self.topk is None else self.topk,
            limits=self.limits.over(settings.limits),
        )


@dataclass(frozen=True, kw_only=True)
class AnswerJudgeSettings:
    """A language model that judges the answers (metric `agentic_judge`). It is asked if `llm.model` is given."""

    llm: LLMSpec = setting("the judge; without a model, answers are not judged", default_factory=LLMSpec)
    prompt: str = setting("prompt file in place of answer_correct.txt", BY_CONTENTS, default="")
    max_tokens: int = setting("tokens of a reply", default=512)
    max_retries: int = setting("retries after a reply that cannot be parsed", default=2)
    max_error_share: float = setting("fail if more than this share of the judgements fail", FREE, default=0.1)

    def __post_init__(self) -> None:
        check_least(self, "judge.", max_tokens=1, max_retries=0)


@dataclass(frozen=True, kw_only=True)
class AgentCard:
    """Protocol, limits and topk that an agent was trained with, from `agent.json` in its folder."""

    protocol: str = DEFAULT_PROTOCOL
    protocol_options: dict[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    topk: int = 3


def read_settings(config: Any) -> AgenticRSettings:
    """Read our settings from a FlashRAG `Config`; the defaults if it has none.

    Raises:
        ConfigError: an unknown key or a wrong type under `agentic_r`.
    """
    data = config[KEY]
    if data is None:
        return AgenticRSettings()
    if isinstance(data, AgenticRSettings):
        return data
    if not isinstance(data, Mapping):
        raise ConfigError(f"{KEY}: expected a mapping, found {type(data).__name__}")
    return load_config(AgenticRSettings, values=data)


def read_agent_card(folder: str | Path) -> AgentCard | None:
    """Read `agent.json` of a folder; None if there is none, as in an ordinary Hugging Face folder.

    Raises:
        ConfigError: a key or value in the file is wrong.
        RecordError: the file is not JSON.
    """
    file = Path(folder) / AGENT_FILE
    if not str(folder) or not file.is_file():
        return None
    data = read_json(file)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{file}: expected an object with protocol, limits and topk, found {type(data).__name__}")
    known = {name: data[name] for name in ("protocol", "protocol_options", "limits", "topk") if name in data}
    try:
        return load_config(AgentCard, values=known)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def resolve_agent(settings: AgenticRSettings, card: AgentCard | None) -> tuple[AgentProtocol, Limits, int]:
    """Protocol, limits and topk: from the settings if given, else from the agent's card, else the defaults.

    Raises:
        UnknownComponentError: the protocol is not registered.
    """
    card = card or AgentCard()
    protocol = load_protocol(settings.protocol or card.protocol, protocol_options(settings, card))
    return protocol, settings.limits.over(card.limits), settings.topk or card.topk


def protocol_options(settings: AgenticRSettings, card: AgentCard | None) -> dict[str, Any]:
    """Options of the protocol of `resolve_agent`."""
    # The card's options belong to the protocol that the agent was trained with.
    of_card = card.protocol_options if card and settings.protocol in (None, card.protocol) else {}
    return {**of_card, **settings.protocol_options}
