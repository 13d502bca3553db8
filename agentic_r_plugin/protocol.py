"""The agent protocol (method section 2): how an agent searches and answers, its limits, and the mask.

`AgentProtocol` is the interface of one family of agents: prompt, calls, form of the passages. `tags` and `tools` are
its implementations. `Session` is one trajectory as a state machine without I/O. Every driver (verl's agent loop, the
data stages, the FlashRAG pipeline) follows the same steps:

    session = Session(protocol, codec, limits, question)
    while session.finished is None:
        action = session.model_wrote(generate(session.ids, session.budget))      # token ids, exactly as produced
        while isinstance(action, Search | Open):                                 # a turn may hold several
            action = session.found(retrieve(action))                             # or session.search_failed()

Token ids are stored as they are; the mask follows from who wrote them, and text is never tokenised again. (Only a
`prefix` is text; it counts as the environment's and is never trained on.) Every finished trajectory ends with a token
of the model, because verl's GAE would lose the reward on a masked last token.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Protocol

from agentic_r_plugin import components
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Passage, ScoredPassage, StopReason, Trajectory, Turn

_TAG_OPENING = re.compile(r"<(?=[/|!｜A-Za-z_])")
"""A `<` that could open or close a tag, or start a special token such as `<|im_end|>` or DeepSeek's `<｜User｜>`."""

SPILL = 16
"""Maximum number of characters after a stop string in the token that completes it."""

_CHARACTERS_PER_TOKEN = 16
"""A text longer than this per token of the limit is tokenised only in part at first."""

_LONGEST_ID = 200
"""Characters of a document's id."""

_LONGEST_WORD = 200
"""Characters before a cut in which to look for a space."""


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

    max_searches: int = 5
    max_malformed: int = 2
    """Malformed turns that get a correction; one more ends the trajectory."""
    max_tokens: int = 4096
    """Prompt and response together, in tokens."""
    max_response_tokens: int = 500
    """Tokens the model may write in one turn."""
    max_observation_tokens: int = 500
    """Tokens of one information block."""
    max_document_tokens: int = field(default=1000, metadata={"later": True})
    """Tokens of one opened document."""
    max_opens: int = field(default=5, metadata={"later": True})
    """Calls that open a document."""

    def __post_init__(self) -> None:
        for item in fields(self):
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
    """Characters of the turn through this call; None where the text of a trajectory shows it."""


@dataclass(frozen=True)
class Open:
    """The model asks for a document that it was shown; the driver calls `found` with it, or `search_failed`."""

    document: str
    """Its id. In what a protocol reads, the id of a passage shown before, or else a rank in the last search, from 1."""


@dataclass(frozen=True)
class Malformed:
    """The turn is neither a call nor an answer."""

    problem: str
    """What the environment writes to the model."""
    of_call: bool = False
    """Whether a call was attempted, which the problem answers."""


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
    """A search in the text of a trajectory: its query, and the text up to and including the call."""

    query: str
    text: str
    turn_start: int | None = None
    """Characters before the model's turn, if the turn holds earlier calls."""
    opens: int = 0
    """Calls before it that open a document."""


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


PREFIX_SEARCH = Search("", "")
"""Placeholder for the last search of a prefix, which awaits its passages; it is not a turn of the session itself."""


# --- One trajectory ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Segment:
    """A run of tokens written by the model or by the environment."""

    ids: list[int]
    text: str
    by_model: bool


@dataclass(kw_only=True)
class _Result:
    """The passages shown for a search."""

    shown: list[Passage]
    content: str
    block: str
    """The environment's text if the turn holds no other call, and its ids."""
    ids: list[int]


@dataclass
class Session:
    """One trajectory: what was written, by whom, and what comes next.

    Args:
        protocol: the family of agents.
        codec: tokenizer of the agent.
        limits: limits of the trajectory.
        question: the user's question.
        prefix: text of a trajectory that this one continues, up to a closing search tag (correctness stage); it counts
            as written by the environment. The passages of that search come next, through `found`.
        searches: number of searches in the prefix, including its last one.
        opens: number of calls in the prefix that open a document.
        history: queries of the prefix, including its last one; later searches include them.
        turn_start: characters of the prefix before its last turn, if that holds several calls. The earlier ones are
            carried out again before the passages of the last one are shown.
        last_shown: ids of the passages of the last search before that turn, whose ranks its calls may name.

    A prompt or a prefix that leaves no room for the model finishes the session at once (`StopReason.MAX_TOKENS`); in
    the case of a prompt, `refusal` gives the reason.

    Raises:
        ConfigError: an information block leaves no room for passages, or the protocol does not fit the tokenizer.
    """

    protocol: AgentProtocol
    codec: Codec
    limits: Limits
    question: str
    prefix: str = ""
    searches: int = 0
    history: tuple[str, ...] = ()
    turn_start: int | None = None
    opens: int = 0
    last_shown: tuple[str, ...] = ()

    prompt_ids: list[int] = field(init=False)
    segments: list[Segment] = field(init=False, default_factory=list)
    turns: list[Turn] = field(init=False, default_factory=list)
    malformed: int = field(init=False, default=0)
    finished: Finished | None = field(init=False, default=None)
    refusal: str | None = field(init=False, default=None)
    """Reason why the limits, the model or the retriever refuse this trajectory, which is then finished."""
    shown: list[tuple[Passage, ...]] = field(init=False, default_factory=list)
    """The passages that the model was shown in each of `turns`."""
    passages_read: list[Passage] = field(init=False, default_factory=list)
    """All passages and documents that the model was shown, in order and as they were cut."""
    _read: tuple[Turn, ...] = field(init=False, default=())
    """The turns before the model's last one, whose results it has read."""
    _pending: deque[Search | Open] = field(init=False, default_factory=deque)
    """Calls of the model's last turn that have no result yet."""
    _of_prefix: int = field(init=False, default=0)
    """Number of those that belong to the prefix; they are not turns of the session itself."""
    _results: list[_Result] = field(init=False, default_factory=list)
    """Results of the other calls of that turn."""

    def __post_init__(self) -> None:
        self.prompt_ids = self.protocol.prompt_ids(self.question, self.codec)
        empty = Passage(id="", title="", text="")
        self._check_room("max_observation_tokens", self.protocol.render([empty]))
        self._check_room("max_document_tokens", self.protocol.render_document(empty))
        if self._room < 1:
            self.refused(
                f"limits.max_tokens={self.limits.max_tokens}: the {len(self.prompt_ids)} prompt tokens of "
                f"{self.question[:60]!r} leave none for the model"
            )
        elif self.prefix:
            self._append(self.codec.encode(self.prefix), self.prefix, by_model=False)
            # `searches` and `opens` include these calls, and `_next_call` counts them again as they are carried out.
            self._pending.extend([*self._earlier_calls(), PREFIX_SEARCH])
            self._of_prefix = len(self._pending)
            self.searches -= _count(Search, self._pending)
            self.opens -= _count(Open, self._pending)
            self._next_call()
            if self._room < 1:
                self._finish(Finished(StopReason.MAX_TOKENS))

    def _check_room(self, name: str, content: str) -> None:
        """A call that found something must be able to show a passage."""
        bare, most = len(self.codec.encode(self._block(content))), getattr(self.limits, name)
        if bare > most:
            raise ConfigError(f"limits.{name}={most}: a block with one empty passage takes {bare}")

    # What was written

    @property
    def ids(self) -> list[int]:
        """Prompt and response so far: the model's next input."""
        return self.prompt_ids + self.response_ids

    @property
    def response_ids(self) -> list[int]:
        """All ids after the prompt."""
        return [token for segment in self.segments for token in segment.ids]

    @property
    def response_mask(self) -> list[int]:
        """1 for each id written by the model, 0 for each written by the environment; as long as `response_ids`."""
        return [int(segment.by_model) for segment in self.segments for _ in segment.ids]

    @property
    def text(self) -> str:
        """Full text after the prompt."""
        return "".join(segment.text for segment in self.segments)

    @property
    def generated_tokens(self) -> int:
        """Number of tokens written by the model."""
        return sum(len(segment.ids) for segment in self.segments if segment.by_model)

    @property
    def budget(self) -> int:
        """Maximum tokens for the model's next turn; at least 1 until the session is finished."""
        return min(self.limits.max_response_tokens, self._room)

    @property
    def _room(self) -> int:
        return self.limits.max_tokens - len(self.prompt_ids) - sum(len(segment.ids) for segment in self.segments)

    # What happens

    def model_wrote(self, ids: Sequence[int]) -> Action:
        """Take the model's turn, exactly the ids it produced, and return the action it asks for.

        Raises:
            ValueError: called out of turn, with no ids, or with more than `budget`.
        """
        self._expect(pending=False)
        if not 0 < len(ids) <= self.budget:
            raise ValueError(f"expected 1..{self.budget} ids from the model, found {len(ids)}")
        text = self.codec.decode(ids)
        self._append(list(ids), text, by_model=True)
        self._read = tuple(self.turns)
        asked = self.protocol.read(text, self.codec)
        # The order matters: an answer counts even after the last allowed search, a further search does not.
        if isinstance(asked, Finished):
            return self._finish(asked)
        if isinstance(asked, Malformed):
            return self._malformed(asked)
        searches, opens = self.searches + _count(Search, asked), self.opens + _count(Open, asked)
        if searches > self.limits.max_searches or opens > self.limits.max_opens:
            return self._finish(Finished(StopReason.MAX_TURNS))
        self._pending.extend(asked)
        return self._next_call() or Retry()  # no call left for the driver: every document was unknown

    @property
    def pending(self) -> Search | Open | None:
        """The call that awaits its result; `PREFIX_SEARCH` for the last one of a prefix."""
        return self._pending[0] if self._pending else None

    @property
    def earlier_queries(self) -> tuple[str, ...]:
        """The queries before the pending search."""
        of_prefix = _count(Search, list(self._pending)[: self._of_prefix])
        return (*self.history[: len(self.history) - of_prefix], *(turn.query for turn in self.turns))

    def found(
        self, passages: Sequence[Passage], scores: Sequence[float] | None = None
    ) -> Search | Open | Finished | None:
        """Take the result of the pending call: the passages of a search, or the opened document (none: it is unknown).

        As many whole passages as fit are shown, and as much of a document. The results of all calls of a turn are
        appended together, after the last one.

        Returns:
            The turn's next call; Finished if the results leave no room for the model (then nothing is appended); else
            None.
        """
        self._expect(pending=True)
        call, of_prefix = self._pending.popleft(), self._of_prefix > 0
        self._of_prefix -= of_prefix
        passages = [self._harmless(passage) for passage in passages]
        if isinstance(call, Open):
            self._results.append(self._document(call, passages))
        else:
            result = self._fit(passages, self.protocol.render, self.limits.max_observation_tokens)
            self._results.append(result)
            self.last_shown = tuple(passage.id for passage in result.shown)
            if not of_prefix:
                self._record(call, result.shown, scores if scores is not None else [0.0] * len(result.shown))
        return self._next_call()

    def fitting(self, passages: Sequence[Passage]) -> int:
        """How many of the passages a search would show."""
        return len(self._fit(passages, self.protocol.render, self.limits.max_observation_tokens).shown)

    def refused(self, reason: str) -> Finished:
        """End without an answer: the prompt leaves no room, or the model refuses it."""
        self._expect(pending=False)
        self.refusal = reason
        return self._finish(Finished(StopReason.MAX_TOKENS))

    def search_failed(self, refusal: str | None = None) -> Finished:
        """End because the search failed. A failed search is never rendered as an empty result.

        Args:
            refusal: the reason, if the retriever refuses this query but may accept others.
        """
        self._expect(pending=True)
        self._pending.clear()
        self.refusal = refusal
        return self._finish_unread(StopReason.SEARCH_FAILED)

    # Inside

    def _expect(self, *, pending: bool) -> None:
        if self.finished is not None:
            raise ValueError(f"the session is finished ({self.finished.stop_reason.value})")
        if bool(self._pending) != pending:
            raise ValueError("a call awaits its result" if self._pending else "no call is pending")

    def _earlier_calls(self) -> tuple[Search | Open, ...]:
        """The calls of the prefix's last turn before its last one."""
        if self.turn_start is None:
            return ()
        asked = self.protocol.read(self.prefix[self.turn_start :], self.codec)
        if not isinstance(asked, tuple):
            raise ConfigError(f"the prefix does not end with a call; was it written with {self.protocol.name!r}?")
        return asked[:-1]

    def _next_call(self) -> Search | Open | Finished | None:
        """The next call that needs the driver; after the last one, append the results of all."""
        while self._pending:
            call = self._pending[0]
            if isinstance(call, Search):
                self.searches += 1
                return call
            self.opens += 1
            if (document := self._known_document(call.document)) is not None:
                self._pending[0] = Open(document)
                return self._pending[0]
            self._pending.popleft()
            self._of_prefix -= self._of_prefix > 0
            self._results.append(self._document(call, []))
        return self._show_results()

    def _known_document(self, name: str) -> str | None:
        """Id of the document with this id or rank; None if the model was not shown it.

        An id wins over a rank. What a prefix showed is not known, so any id may be opened after it.
        """
        if any(name == passage.id for passages in self.shown for passage in passages) or name in self.last_shown:
            return name
        if name.isdecimal() and 1 <= int(name[:9]) <= len(self.last_shown):
            return self.last_shown[int(name[:9]) - 1]
        return name if self.prefix and len(name) <= _LONGEST_ID else None

    def _harmless(self, passage: Passage) -> Passage:
        """The passage without the tokens of `without_tokens`."""
        title, text = (without_tokens(part, self.codec) for part in (passage.title, passage.text))
        return passage if (title, text) == (passage.title, passage.text) else replace(passage, title=title, text=text)

    def _document(self, call: Open, passages: Sequence[Passage]) -> _Result:
        """The opened document, as far as it fits, recorded in the last search that showed it."""
        if not passages:
            content = f"Error: no document {disarm(call.document[:60])!r} was shown."
            block = self._block(content)
            return _Result(shown=[], content=content, block=block, ids=self.codec.encode(block))
        result = self._fit(
            passages[:1], lambda shown: self.protocol.render_document(shown[0]), self.limits.max_document_tokens
        )
        of_search = [i for i, shown in enumerate(self.shown) if call.document in {passage.id for passage in shown}]
        if of_search and call.document not in (turn := self.turns[of_search[-1]]).opened:
            self.turns[of_search[-1]] = replace(turn, opened=(*turn.opened, call.document))
        return result

    def _show_results(self) -> Finished | None:
        """Append the results of the turn's calls."""
        results, self._results = self._results, []
        text, ids = results[0].block, results[0].ids
        if len(results) > 1:
            text = self.protocol.reply([result.content for result in results], self._last_ids, self.codec)
            ids = self.codec.encode(text)
        # The results must leave room for at least one token of the model, so that it can still answer.
        if len(ids) < self._room:
            self._append(ids, text, by_model=False)
            self.passages_read += [passage for result in results for passage in result.shown]
            return None
        return self._finish_unread(StopReason.MAX_TOKENS)

    def _finish_unread(self, reason: StopReason) -> Finished:
        """End before the model reads the results of its last turn: they do not count as shown."""
        unread = self.turns[len(self._read) :]
        self.turns = [*self._read, *(replace(turn, passages=(), opened=()) for turn in unread)]
        self.shown[len(self._read) :] = [()] * len(unread)
        return self._finish(Finished(reason))

    @property
    def _last_ids(self) -> list[int]:
        """Ids of the model's last turn, or of the prefix."""
        return self.segments[-1].ids if self.segments else []

    def _block(self, content: str) -> str:
        """The environment's text that shows one result alone."""
        return self.protocol.reply([content], self._last_ids, self.codec)

    def _record(self, search: Search, shown: Sequence[Passage], scores: Sequence[float]) -> None:
        """Record a search of this session with the passages shown to the model."""
        read = tuple(ScoredPassage(id=p.id, score=score) for p, score in zip(shown, scores, strict=False))
        # The results of a turn are appended after its last search, so the model's turn is the last segment.
        before = sum(len(segment.text) for segment in self.segments[:-1])
        end = 0 if search.end is None else before + search.end
        self.shown.append(tuple(shown))
        self.turns.append(
            Turn(turn=self.searches, reasoning=search.reasoning, query=search.query, passages=read, end=end)
        )

    def _append(self, ids: list[int], text: str, *, by_model: bool) -> None:
        self.segments.append(Segment(ids=ids, text=text, by_model=by_model))

    def _finish(self, outcome: Finished) -> Finished:
        self.finished = outcome
        return outcome

    def _malformed(self, turn: Malformed) -> Retry | Finished:
        self.malformed += 1
        text = self.protocol.reply([turn.problem], self._last_ids, self.codec, of_call=turn.of_call)
        correction = self.codec.encode(text)
        # Token room first: without it the correction could not be followed by a turn of the model.
        if len(correction) >= self._room:
            return self._finish(Finished(StopReason.MAX_TOKENS))
        if self.malformed > self.limits.max_malformed:
            return self._finish(Finished(StopReason.MALFORMED))
        self._append(correction, text, by_model=False)
        return Retry()

    def _fit(self, passages: Sequence[Passage], render: Callable[[Sequence[Passage]], str], most: int) -> _Result:
        """As many leading passages as fit into `most` tokens, at least one if there is one.

        If the first is too long, its text is cut, and if no text is left, its title.

        Raises:
            ConfigError: the first does not fit without title and text, because its id is too long.
        """
        shown = list(passages)
        ids: list[int] = []
        encoded = ""
        while True:
            content = render(shown)
            block = self._block(content)
            # With fewer passages the block often begins with the same text that was already too long.
            if not encoded or not block.startswith(encoded):
                ids, encoded = self._encode_start(block, most)
            if encoded == block and (len(ids) <= most or not shown):
                return _Result(shown=shown, content=content, block=block, ids=ids)
            if len(shown) > 1:
                shown.pop()
                continue
            # Tokens per word vary, so the cut is an estimate; the loop repeats until the block fits.
            title, text = shown[0].title, shown[0].text
            if not title and not text:
                raise ConfigError(
                    f"agent protocol {self.protocol.name!r}: without title and text, {shown[0].id[:60]!r} takes "
                    f"more than {most} tokens; leave its id out of passage_form, or raise limits.max_observation_tokens"
                )
            if text:
                text = _shortened(text[: len(encoded)], most, len(ids))
            else:
                title = _shortened(title[: len(encoded)], most, len(ids))
            shown, encoded = [Passage(id=shown[0].id, title=title, text=text)], ""

    def _encode_start(self, block: str, most: int) -> tuple[list[int], str]:
        """Ids of a block, or of a prefix of it that is already too long, with the text that they encode.

        A block may be a hundred times longer than the limit, and tokenising all of it would block the event loop. The
        number of characters per token is not bounded, so the prefix grows until it has too many tokens.
        """
        length = _CHARACTERS_PER_TOKEN * most
        while length < len(block):
            # A word that is cut in two may have more tokens than the whole word.
            space = block.rfind(" ", length - _LONGEST_WORD, length)
            start = block[: space if space > 0 else length]
            ids = self.codec.encode(start)
            if len(ids) > most + SPILL:
                return ids, start
            length *= 2
        return self.codec.encode(block), block


def _count(kind: type, calls: Iterable[Search | Open]) -> int:
    return sum(isinstance(call, kind) for call in calls)


def _shortened(text: str, most: int, tokens: int) -> str:
    """`most / tokens` of a text's words, or of its characters if it has few words (Chinese, Thai); always shorter.

    >>> _shortened("one two three four", 1, 2), _shortened("一二三四", 1, 2), _shortened("x", 9, 10)
    ('one two', '一二', '')
    """
    words = text.split(" ")
    keep = min(len(words) - 1, len(words) * most // tokens)
    # No words are left of a text that begins with a space and one long word.
    return " ".join(words[:keep]) or text[: max(0, min(len(text) - 1, len(text) * most // tokens))]
