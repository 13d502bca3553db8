"""The agent protocol (method section 2): how an agent searches and answers, and its limits.

`AgentProtocol` is the interface of one family of agents: prompt, calls, form of the passages. `tags` and `tools` are
its implementations. `session.Session` is one trajectory as a state machine.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from agentic_r_plugin import components
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Passage, StopReason, Trajectory

_TAG_OPENING = re.compile(r"<(?=[/|!｜A-Za-z_])")
"""A `<` that could open or close a tag, or start a special token such as `<|im_end|>` or DeepSeek's `<｜User｜>`."""

SPILL = 16
"""Maximum number of characters after a stop string in the token that completes it."""


class Codec(Protocol):
    """Converts text to token ids and back (`llm.codec.TokenizerCodec` wraps a Hugging Face tokenizer)."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of the prompt, in the tokenizer's chat template if it has one."""

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without special tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, including special tokens."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far one trajectory may go. All token counts are exact."""

    max_searches: int = field(default=5, metadata={"help": "searches per question"})
    max_malformed: int = field(default=2, metadata={"help": "malformed turns that are corrected; the next one ends it"})
    max_tokens: int = field(default=4096, metadata={"help": "tokens of prompt and response together"})
    max_response_tokens: int = field(default=500, metadata={"help": "tokens that the model may write in one turn"})
    max_observation_tokens: int = field(default=500, metadata={"help": "tokens of one information block"})
    max_document_tokens: int = field(default=1000, metadata={"help": "tokens of one opened document", "later": True})
    max_opens: int = field(default=5, metadata={"help": "calls that open a document", "later": True})

    def __post_init__(self) -> None:
        for item in fields(self):
            # 0 is allowed here: no search, no open, or the end at the first malformed turn, as in the released agents.
            least = 0 if item.name in ("max_malformed", "max_searches", "max_opens") else 1
            if getattr(self, item.name) < least:
                raise ConfigError(f"limits.{item.name}: expected at least {least}, found {getattr(self, item.name)}")


# --- What the model's turn asks for -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """The model asks for passages; the driver calls `found` or `search_failed`."""

    query: str
    reasoning: str
    end: int | None = None
    """Number of characters of the turn up to the end of this call; None if tags in the text mark it."""


@dataclass(frozen=True)
class Open:
    """The model asks for a document that it was shown; the driver calls `found` with it, or `search_failed`."""

    document: str
    """Its id. In what the model writes, the id of a passage shown before, or else a rank in the last search, from 1."""


@dataclass(frozen=True)
class Malformed:
    """The turn is neither a call nor an answer."""

    problem: str
    """What the environment writes to the model."""
    of_call: bool = False
    """Whether the turn attempted a call; the problem is then the reply to it."""


@dataclass(frozen=True)
class Retry:
    """The environment has replied without the driver, and the model may continue: the turn was malformed and got a
    correction, or it opened only unknown documents and got a message that says so."""


@dataclass(frozen=True)
class Finished:
    """The trajectory is over."""

    stop_reason: StopReason
    answer: str | None = None


Action = Search | Open | Retry | Finished


# --- One family of agents ---------------------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """A trajectory up to and including one of its searches, from which it can continue.

    The fields after `opens` are in the trajectory's record; `AgentProtocol.prefixes` may leave them out.
    """

    query: str
    text: str
    """What model and environment wrote, up to and including the call."""
    turn_start: int | None = None
    """Characters before the model's turn, if the turn holds earlier calls."""
    opens: int = 0
    """Calls before it that open a document."""
    searches: int = 1
    """Number of searches, including this one."""
    history: tuple[str, ...] = ()
    """Queries of the earlier searches."""
    last_shown: tuple[str, ...] = ()
    """Ids of the passages of the last search before a turn that holds several calls; their ranks name documents."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of a trajectory's text of one kind, for display."""

    kind: str
    """think, search, answer or other (written by the model); information or correction (by the environment)."""
    text: str
    """The text without its tags."""

    @property
    def by_model(self) -> bool:
        """Whether the model wrote it."""
        return self.kind not in ("information", "correction")


class AgentProtocol(ABC):
    """How one family of agents is prompted, searches, is shown passages and answers (component kind `agent_protocol`).

    Implementations: `tags.TagProtocol`, `tools.ToolProtocol`. An object of it holds no state of a trajectory.
    """

    name: str
    description: str
    text_shows_authors: ClassVar[bool] = True
    """Whether a trajectory's text shows who wrote what and which searches were carried out; else its record does."""

    def __new__(cls, *args: Any, **kwargs: Any) -> AgentProtocol:
        """In earlier versions `AgentProtocol(...)` was the protocol with tags; packages may still call it so."""
        if cls is AgentProtocol:
            from agentic_r_plugin.tags import TagProtocol

            return object.__new__(TagProtocol)
        return object.__new__(cls)

    @property
    @abstractmethod
    def stop(self) -> tuple[str, ...]:
        """Strings after which generation stops (they stay in the output)."""

    @abstractmethod
    def prompt(self, question: str) -> str:
        """Text of the user's message, before any chat template."""

    @abstractmethod
    def prompt_ids(self, question: str, codec: Codec) -> list[int]:
        """Token ids of the whole prompt."""

    @abstractmethod
    def read(self, text: str, codec: Codec) -> tuple[Search | Open, ...] | Finished | Malformed:
        """What a turn of the model asks for: at least one call, or the end. Any text is allowed."""

    @abstractmethod
    def render(self, passages: Sequence[Passage]) -> str:
        """The result of one search. No passage can imitate a tag or a special token (`disarm`)."""

    def render_document(self, passage: Passage) -> str:
        """The result of an opened document."""
        return f"Title: {disarm(passage.title)}\n{disarm(passage.text)}"

    @abstractmethod
    def reply(self, contents: Sequence[str], wrote: Sequence[int], codec: Codec, *, of_call: bool = True) -> str:
        """The environment's text between two turns of the model.

        Args:
            contents: the results of the turn's calls (`render`), in order, or the problem of a malformed turn.
            wrote: ids of the turn.
            of_call: whether the turn held a call.
        """

    @abstractmethod
    def prefixes(self, trajectory: Trajectory) -> list[Prefix]:
        """The searches that were carried out in a trajectory, in order."""

    @abstractmethod
    def pieces(self, trajectory: Trajectory) -> list[Piece]:
        """Split the text of a trajectory by author and purpose."""

    @abstractmethod
    def answered(self, answer: str) -> tuple[str, str]:
        """A turn that only gives this answer, in two parts: what precedes the answer, and the answer with its end."""

    @abstractmethod
    def write_search(self, thought: str, query: str, codec: Codec, *, gap: str = "\n") -> str:
        """A turn that searches, as a demonstration; `gap` is between thought and call."""

    @abstractmethod
    def write_answer(self, thought: str, answer: str, codec: Codec, *, gap: str = "\n") -> str:
        """A turn that answers, as a demonstration."""


def load_protocol(name: str, options: Mapping[str, Any]) -> AgentProtocol:
    """The registered protocol with some of its fields set to `options`.

    Raises:
        UnknownComponentError: the name is not registered.
        ConfigError: the protocol has no such option, or refuses its value.
    """
    protocol: AgentProtocol = components.load("agent_protocol", name)
    if not options:
        return protocol
    # `name` and `description` identify the registered protocol; they are not options.
    known = sorted(item.name for item in fields(protocol) if item.name not in ("name", "description"))  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"agent protocol {name!r} has no option {unknown[0]!r}; it has {', '.join(known)}")
    return replace(protocol, **options)  # type: ignore[type-var]


def without_tokens(text: str, codec: Codec) -> str:
    """Text from outside that writes no added token of the tokenizer, where `disarm` leaves one (Mistral's `[INST]`).

    Codecs without `without_tokens` (`llm.codec.TokenizerCodec`) know no such tokens.
    """
    break_tokens: Callable[[str], str] = getattr(codec, "without_tokens", str)
    return break_tokens(text)


def disarm(text: str) -> str:
    """Passage text in which every `<` that could begin a tag or a special token is replaced by a harmless `‹`.

    >>> disarm("a < b, </answer> <|im_end|>")
    'a < b, ‹/answer> ‹|im_end|>'
    """
    return _TAG_OPENING.sub("‹", text)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """In earlier versions the session was in this module; packages may still import it from here."""
        if name == "Session":
            from agentic_r_plugin.session import Session

            return Session
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
