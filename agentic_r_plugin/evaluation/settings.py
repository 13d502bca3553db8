"""Typed settings under `agentic_r` in a FlashRAG configuration, and the `agent.json` of an agent folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from agentic_r_plugin.backends import LLMSpec, SearchSpec
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER, load_config, section_of
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.base import Sampling
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

    max_searches: int | None = field(default=None, metadata={"help": "searches per question"})
    max_malformed: int | None = field(default=None, metadata={"help": "malformed turns that are corrected"})
    max_tokens: int | None = field(default=None, metadata={"help": "prompt and response together"})
    max_response_tokens: int | None = field(default=None, metadata={"help": "the model's tokens in one turn"})
    max_observation_tokens: int | None = field(default=None, metadata={"help": "tokens of one information block"})
    max_document_tokens: int | None = field(default=None, metadata={"help": "tokens of one opened document", **LATER})
    max_opens: int | None = field(default=None, metadata={"help": "calls that open a document", **LATER})

    def over(self, limits: LimitsType) -> LimitsType:
        """Apply the values that are set here to `limits`, or to other overrides."""
        return replace(limits, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class AgenticRSettings:
    """How the agent searches and how much of it is measured."""

    protocol: str | None = field(default=None, metadata={"help": "agent protocol; none: as the agent folder says"})
    protocol_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of the protocol; those of the agent folder hold for its own", **LATER},
    )
    limits: LimitOverrides = field(default_factory=LimitOverrides, metadata={"help": "where they differ from it"})
    topk: int | None = field(default=None, metadata={"help": "passages shown for a search; none: as the agent folder"})
    depth: int = field(default=20, metadata={"help": "passages looked at for recall at 20; less, such as 0: none"})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus of the sampled tokens"})
    seed: int | None = field(default=None, metadata={"help": "seed of sampling"})
    batch_size: int = field(default=64, metadata={"help": "questions that are answered together", **FREE})
    agent: LLMSpec = field(default_factory=LLMSpec, metadata={"help": "the agent's language model"})
    search: SearchSpec = field(default_factory=SearchSpec, metadata={"help": "the retriever"})

    def __post_init__(self) -> None:
        for name, least in (("topk", 1), ("depth", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{KEY}.{name}: expected at least {least}, found {value}")

    def sampling(self) -> Sampling:
        """Sampling parameters of the agent."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class AgentSettings:
    """What one agent of several needs for itself."""

    protocol: str | None = field(default=None, metadata={"help": "agent protocol; none: as `settings` says"})
    protocol_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of that protocol", **LATER}
    )
    topk: int | None = field(default=None, metadata={"help": "passages shown for a search; none: as `settings` says"})
    limits: LimitOverrides = field(default_factory=LimitOverrides, metadata={"help": "where they differ"})
    llm: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "what differs from `settings.agent`", **section_of(LLMSpec)}
    )

    def over(self, settings: AgenticRSettings) -> AgenticRSettings:
        """Apply these values to `settings`, except those of the language model."""
        return replace(
            settings,
            protocol=self.protocol or settings.protocol,
            protocol_options=({} if self.protocol else settings.protocol_options) | self.protocol_options,
            topk=self.topk or settings.topk,
            limits=self.limits.over(settings.limits),
        )


@dataclass(frozen=True, kw_only=True)
class AnswerJudgeSettings:
    """A language model that judges the answers (metric `agentic_judge`). It is asked if `llm.model` is given."""

    llm: LLMSpec = field(default_factory=LLMSpec, metadata={"help": "the judge; without a model there is none"})
    prompt: str = field(default="", metadata={"help": "prompt file in place of answer_correct.txt", **BY_CONTENTS})
    max_tokens: int = field(default=512, metadata={"help": "tokens of a reply"})
    max_retries: int = field(default=2, metadata={"help": "further attempts after a reply that cannot be read"})
    max_error_share: float = field(
        default=0.1, metadata={"help": "fail if more than this share of the judgements fail", **FREE}
    )


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
    of_card = card.protocol_options if card and settings.protocol in (None, card.protocol) else {}
    return {**of_card, **settings.protocol_options}
