"""One trajectory as a state machine without I/O (method section 2): what was written, by whom, and what comes next.

Every driver (verl's agent loop, the data stages, the FlashRAG pipeline) follows the same steps:

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

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from agentic_r_plugin.blocks import Block, BlockWriter
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import (
    Action,
    AgentProtocol,
    Codec,
    Finished,
    Limits,
    Malformed,
    Open,
    Prefix,
    Retry,
    Search,
    disarm,
    without_tokens,
)
from agentic_r_plugin.records import Passage, ScoredPassage, StopReason, Turn

_LONGEST_ID = 200
"""Characters of a document's id."""

PREFIX_SEARCH = Search("", "")
"""Placeholder for the last search of a prefix, which awaits its passages; it is not a turn of the session itself."""


@dataclass(kw_only=True)
class Segment:
    """A run of tokens written by the model or by the environment."""

    ids: list[int]
    text: str
    by_model: bool


@dataclass
class Session:
    """One trajectory.

    Args:
        protocol: the family of agents.
        codec: tokenizer of the agent.
        limits: limits of the trajectory.
        question: the user's question.
        prefix: a trajectory that this one continues (correctness stage); it counts as written by the environment. The
            passages of its search come next, through `found`. If its last turn holds earlier calls, these are carried
            out again before.

    A prompt or a prefix that leaves no room for the model finishes the session at once (`StopReason.MAX_TOKENS`); in
    the case of a prompt, `refusal` gives the reason.

    Raises:
        ConfigError: an information block leaves no room for passages, or the protocol does not fit the tokenizer.
    """

    protocol: AgentProtocol
    codec: Codec
    limits: Limits
    question: str
    prefix: Prefix | None = None

    prompt_ids: list[int] = field(init=False)
    segments: list[Segment] = field(init=False, default_factory=list)
    turns: list[Turn] = field(init=False, default_factory=list)
    searches: int = field(init=False, default=0)
    opens: int = field(init=False, default=0)
    malformed: int = field(init=False, default=0)
    finished: Finished | None = field(init=False, default=None)
    refusal: str | None = field(init=False, default=None)
    """Reason why the limits, the model or the retriever refuse this trajectory, which is then finished."""
    shown: list[tuple[Passage, ...]] = field(init=False, default_factory=list)
    """The passages that the model was shown in each of `turns`."""
    passages_read: list[Passage] = field(init=False, default_factory=list)
    """All passages and documents that the model was shown, in order and as they were cut."""
    _last_shown: tuple[str, ...] = field(init=False, default=())
    """Ids of the passages of the last search, by whose ranks documents are opened."""
    _read: tuple[Turn, ...] = field(init=False, default=())
    """The turns before the model's last one, whose results it has read."""
    _pending: deque[Search | Open] = field(init=False, default_factory=deque)
    """Calls of the model's last turn, or of the prefix's, that have no result yet."""
    _results: list[Block] = field(init=False, default_factory=list)
    """Results of the other calls of that turn."""

    def __post_init__(self) -> None:
        self.prompt_ids = self.protocol.prompt_ids(self.question, self.codec)
        # The smallest blocks: a limit below them is refused now, not after the first search.
        empty = Passage(id="", title="", text="")
        self._check_room("max_observation_tokens", self.protocol.render([empty]))
        self._check_room("max_document_tokens", self.protocol.render_document(empty))
        if self._room < 1:
            self.refused(
                f"limits.max_tokens={self.limits.max_tokens}: the {len(self.prompt_ids)} prompt tokens of "
                f"{self.question[:60]!r} leave none for the model"
            )
        elif self.prefix is not None:
            self._continue(self.prefix)

    def _check_room(self, name: str, content: str) -> None:
        """A call that found something must be able to show a passage."""
        bare, most = len(self._writer.write(content).ids), getattr(self.limits, name)
        if bare > most:
            raise ConfigError(f"limits.{name}={most}: a block with one empty passage takes {bare}")

    def _continue(self, prefix: Prefix) -> None:
        """Write the prefix; the calls of its last turn await their results."""
        self._append(self.codec.encode(prefix.text), prefix.text, by_model=False)
        self._pending.extend([*self._earlier_calls(prefix), PREFIX_SEARCH])
        # The prefix's numbers include these calls, and `_next_call` counts them again as they are carried out.
        self.searches = prefix.searches - _count(Search, self._pending)
        self.opens = prefix.opens - _count(Open, self._pending)
        # Before `_next_call`, which resolves the ranks of the documents that the turn opens.
        self._last_shown = prefix.last_shown
        self._next_call()
        if self._room < 1:
            self._finish(Finished(StopReason.MAX_TOKENS))

    def _earlier_calls(self, prefix: Prefix) -> tuple[Search | Open, ...]:
        """The calls of the prefix's last turn before its search."""
        if prefix.turn_start is None:
            return ()
        asked = self.protocol.read(prefix.text[prefix.turn_start :], self.codec)
        if not isinstance(asked, tuple):
            raise ConfigError(f"the prefix does not end with a call; was it written with {self.protocol.name!r}?")
        return asked[:-1]

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
    def pending(self) -> Search | Open | None:
        """The call that awaits its result; `PREFIX_SEARCH` for the last one of a prefix."""
        return self._pending[0] if self._pending else None

    @property
    def earlier_queries(self) -> tuple[str, ...]:
        """The queries before the pending search."""
        of_prefix = (*self.prefix.history, self.prefix.query) if self.prefix is not None else ()
        # The pending search is not an earlier one. In the last turn of a prefix, others may wait behind it.
        waiting = _count(Search, self._pending) if self._in_prefix else 0
        return (*of_prefix[: len(of_prefix) - waiting], *(turn.query for turn in self.turns))

    def fitting(self, passages: Sequence[Passage]) -> int:
        """How many of the passages a search would show."""
        return len(self._search_block(passages).shown)

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
        # The model wrote this turn after reading the results of all earlier ones (`_finish_unread`).
        self._read = tuple(self.turns)
        asked = self.protocol.read(text, self.codec)
        # The order matters: an answer counts even after the last allowed search, a further search does not.
        if isinstance(asked, Finished):
            return self._finish(asked)
        if isinstance(asked, Malformed):
            return self._malformed(asked)
        # A turn that would exceed a limit is not carried out in part: the trajectory ends with the model's own tokens.
        searches, opens = self.searches + _count(Search, asked), self.opens + _count(Open, asked)
        if searches > self.limits.max_searches or opens > self.limits.max_opens:
            return self._finish(Finished(StopReason.MAX_TURNS))
        self._pending.extend(asked)
        return self._next_call() or Retry()  # no call left for the driver: every document was unknown

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
        call = self._pending.popleft()
        passages = [self._harmless(passage) for passage in passages]
        if isinstance(call, Open):
            self._results.append(self._document(call, passages))
        else:
            block = self._search_block(passages)
            self._results.append(block)
            # Ranks name what the model reads, so passages that did not fit do not count.
            self._last_shown = tuple(passage.id for passage in block.shown)
            # The searches of a prefix are turns of the trajectory that it was cut from.
            if not self._in_prefix:
                self._record(call, block.shown, scores if scores is not None else [0.0] * len(block.shown))
        return self._next_call()

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

    @property
    def _room(self) -> int:
        return self.limits.max_tokens - len(self.prompt_ids) - sum(len(segment.ids) for segment in self.segments)

    @property
    def _in_prefix(self) -> bool:
        """Whether pending calls belong to the prefix: they are not turns of the session itself."""
        # Results are appended after the last call of a turn, so the model's turn is last while one of its calls waits.
        return bool(self.segments) and not self.segments[-1].by_model

    @property
    def _last_ids(self) -> list[int]:
        """Ids of the model's last turn, or of the prefix."""
        return self.segments[-1].ids if self.segments else []

    @property
    def _writer(self) -> BlockWriter:
        return BlockWriter(self.protocol, self.codec, self._last_ids)

    def _expect(self, *, pending: bool) -> None:
        if self.finished is not None:
            raise ValueError(f"the session is finished ({self.finished.stop_reason.value})")
        if bool(self._pending) != pending:
            raise ValueError("a call awaits its result" if self._pending else "no call is pending")

    def _append(self, ids: list[int], text: str, *, by_model: bool) -> None:
        self.segments.append(Segment(ids=ids, text=text, by_model=by_model))

    def _next_call(self) -> Search | Open | Finished | None:
        """The next call that needs the driver; after the last one, append the results of all."""
        while self._pending:
            call = self._pending[0]
            if isinstance(call, Search):
                self.searches += 1
                return call
            # An unknown document counts against `max_opens` as well.
            self.opens += 1
            if (document := self._known_document(call.document)) is not None:
                self._pending[0] = Open(document)
                return self._pending[0]
            self._pending.popleft()
            self._results.append(self._document(call, []))
        return self._show_results()

    def _known_document(self, name: str) -> str | None:
        """Id of the document with this id or rank; None if the model was not shown it.

        An id wins over a rank. What a prefix showed is not known, so any id may be opened after it.
        """
        if any(name == passage.id for passages in self.shown for passage in passages) or name in self._last_shown:
            return name
        # Nine digits are enough for a rank; Python refuses to convert texts of thousands of digits.
        if name.isdecimal() and 1 <= int(name[:9]) <= len(self._last_shown):
            return self._last_shown[int(name[:9]) - 1]
        # The model may write any text as an id; a long one is not sent to the retriever.
        return name if self.prefix is not None and len(name) <= _LONGEST_ID else None

    def _harmless(self, passage: Passage) -> Passage:
        """The passage without the tokens of `without_tokens`."""
        title, text = (without_tokens(part, self.codec) for part in (passage.title, passage.text))
        return passage if (title, text) == (passage.title, passage.text) else replace(passage, title=title, text=text)

    def _search_block(self, passages: Sequence[Passage]) -> Block:
        return self._writer.fit(passages, self.protocol.render, self.limits.max_observation_tokens)

    def _document(self, call: Open, passages: Sequence[Passage]) -> Block:
        """The opened document, as far as it fits, recorded in the last search that showed it."""
        if not passages:
            return self._writer.write(f"Error: no document {disarm(call.document[:60])!r} was shown.")
        block = self._writer.fit(
            passages[:1], lambda shown: self.protocol.render_document(shown[0]), self.limits.max_document_tokens
        )
        of_search = [i for i, shown in enumerate(self.shown) if call.document in {passage.id for passage in shown}]
        if of_search and call.document not in (turn := self.turns[of_search[-1]]).opened:
            self.turns[of_search[-1]] = replace(turn, opened=(*turn.opened, call.document))
        return block

    def _record(self, search: Search, shown: Sequence[Passage], scores: Sequence[float]) -> None:
        """Record a search of this session with the passages shown to the model."""
        read = tuple(ScoredPassage(id=p.id, score=score) for p, score in zip(shown, scores, strict=False))
        # The results of a turn are appended after its last call, so the model's turn is the last segment.
        before = sum(len(segment.text) for segment in self.segments[:-1])
        end = 0 if search.end is None else before + search.end
        self.shown.append(tuple(shown))
        self.turns.append(
            Turn(turn=self.searches, reasoning=search.reasoning, query=search.query, passages=read, end=end)
        )

    def _show_results(self) -> Finished | None:
        """Append the results of the turn's calls."""
        results, self._results = self._results, []
        text, ids = results[0].text, results[0].ids
        # A single result was already rendered as a whole reply; several share one reply of the protocol.
        if len(results) > 1:
            text = self.protocol.reply([result.content for result in results], self._last_ids, self.codec)
            ids = self.codec.encode(text)
        # The results must leave room for at least one token of the model, so that it can still answer.
        if len(ids) < self._room:
            self._append(ids, text, by_model=False)
            self.passages_read += [passage for result in results for passage in result.shown]
            return None
        return self._finish_unread(StopReason.MAX_TOKENS)

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

    def _finish_unread(self, reason: StopReason) -> Finished:
        """End before the model reads the results of its last turn: they do not count as shown."""
        unread = self.turns[len(self._read) :]
        self.turns = [*self._read, *(replace(turn, passages=(), opened=()) for turn in unread)]
        # `shown` stays parallel to `turns`.
        self.shown[len(self._read) :] = [()] * len(unread)
        return self._finish(Finished(reason))

    def _finish(self, outcome: Finished) -> Finished:
        self.finished = outcome
        return outcome


def _count(kind: type, calls: Iterable[Search | Open]) -> int:
    return sum(isinstance(call, kind) for call in calls)
