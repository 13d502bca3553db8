"""The agent protocol (method section 2): the only module that knows the tags, the limits and the mask.

`AgentProtocol` holds the wording: instruction, tags, rendering of passages, and the correction of a malformed turn.
`Session` is one trajectory as a state machine without I/O. Every driver (verl's agent loop, the data stages, the
FlashRAG pipeline) follows the same four steps:

    session = Session(protocol, codec, limits, question)
    while session.finished is None:
        action = session.model_wrote(generate(session.ids, session.budget))      # token ids, exactly as produced
        if isinstance(action, Search):
            session.found(retrieve(action.query))                                # or session.search_failed()

Token ids are stored as they are; the mask follows from who wrote them, and text is never tokenised again. Every
finished trajectory ends with a token of the model, because verl's GAE would lose the reward on a masked last token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.records import Passage, ScoredPassage, StopReason, Turn

_TAG_OPENING = re.compile(r"<(?=[/|!｜A-Za-z_])")
"""A `<` that could open or close a tag, or start a special token such as `<|im_end|>` or DeepSeek's `<｜User｜>`."""

_BALANCED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"
"""Text whose braces are balanced, two levels deep."""

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")

_SPILL = 16
"""Maximum number of characters after a stop string in the token that completes it."""


_CHARACTERS_PER_TOKEN = 16
"""A text longer than this per token of the limit is tokenised only in part at first."""

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

    def __post_init__(self) -> None:
        for name in ("max_searches", "max_malformed", "max_tokens", "max_response_tokens", "max_observation_tokens"):
            least = 0 if name in ("max_malformed", "max_searches") else 1
            if getattr(self, name) < least:
                raise ConfigError(f"limits.{name}: expected at least {least}, found {getattr(self, name)}")


# --- What the model's turn asks for -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Search:
    """The model asks for passages; the driver calls `found` or `search_failed`."""

    query: str
    reasoning: str


@dataclass(frozen=True)
class Retry:
    """The turn was malformed; a correction has been appended and the model may continue."""


@dataclass(frozen=True)
class Finished:
    """The trajectory is over."""

    stop_reason: StopReason
    answer: str | None = None


Action = Search | Retry | Finished


# --- The words --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AgentProtocol:
    """Instruction, tags and rendering for one family of agents; the defaults are Search-R1's.

    Tags are written `<tag>` and `</tag>` unless `marks` overrides them.
    """

    name: str
    instruction: str
    """Prompt with one `{question}`."""
    description: str = ""
    think_tag: str = "think"
    search_tag: str = "search"
    answer_tag: str = "answer"
    information_tag: str = "information"
    marks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Tag -> (opening, closing) strings. A block closed by `}` may contain balanced braces."""
    stop_at_answer: bool = True
    """Whether generation stops at the end of an answer; otherwise the model ends its turn itself."""
    chat: bool = True
    """Whether the prompt is put into the tokenizer's chat template, if there is one."""
    passage_form: str = 'Doc {rank}(Title: "{title}") {text}'
    """Template of one passage in an information block; passages are joined by newlines."""
    block_form: str = "\n\n{opening}{passages}{closing}\n\n"
    """Template of the information block."""
    correction: str = (
        "\n\nThat was neither a search nor an answer. Write <search> query </search> to look something up, "
        "or <answer> answer </answer> to finish.\n\n"
    )

    def __post_init__(self) -> None:
        if self.instruction.count("{question}") != 1:
            raise ConfigError(f"agent protocol {self.name!r}: the instruction must hold '{{question}}' exactly once")
        if re.findall(r"\{\w+\}", self.block_form) != ["{opening}", "{passages}", "{closing}"] or not self.correction:
            raise ConfigError(
                f"agent protocol {self.name!r}: block_form must hold '{{opening}}', '{{passages}}' and '{{closing}}', "
                "and correction some text: both tell where a trajectory's searches were carried out"
            )

    def prompt(self, question: str) -> str:
        """The prompt text for a question."""
        return self.instruction.replace("{question}", question)

    def prompt_ids(self, question: str, codec: Codec) -> list[int]:
        """Token ids of the prompt."""
        plain = getattr(codec, "encode_plain_prompt", codec.encode)  # codecs of earlier versions lack it
        return (codec.encode_prompt if self.chat else plain)(self.prompt(question))

    def opening(self, tag: str) -> str:
        """String that opens a tag."""
        return self.marks[tag][0] if tag in self.marks else f"<{tag}>"

    def closing(self, tag: str) -> str:
        """String that closes a tag."""
        return self.marks[tag][1] if tag in self.marks else f"</{tag}>"

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings after which generation stops (they stay in the output); the search's is first."""
        search, answer = self.closing(self.search_tag), self.closing(self.answer_tag)
        return (search, answer) if self.stop_at_answer else (search,)

    @cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(f"{self._pattern(self.search_tag)}|{self._pattern(self.answer_tag)}", re.DOTALL)

    def _pattern(self, tag: str) -> str:
        opening, closing = re.escape(self.opening(tag)), re.escape(self.closing(tag))
        body = _BALANCED if self.closing(tag) == "}" else ".*?"
        return f"{opening}({body}){closing}"

    def parse(self, text: str) -> Search | Finished | None:
        """The action of one turn, decided by its first complete block; None if there is none.

        A search needs a query. If the first block is an answer and others follow, the last complete answer counts.
        """
        match = self._block.search(text)
        if match is None:
            return None
        query, answer = match.groups()
        if answer is not None:
            # The model may write several answers in one turn; the last one is what it settled on.
            answers = [found.group(2) for found in self._block.finditer(text) if found.group(2) is not None]
            return Finished(StopReason.ANSWERED, self._inner(self.answer_tag, answers[-1]))
        query = self._inner(self.search_tag, query)
        return Search(query, self._reasoning(text[: match.start()])) if query else None

    def answered(self, answer: str) -> tuple[str, str]:
        """A turn that only gives this answer, in two parts: what precedes the answer, and the answer with its end."""
        opening, closing = self.opening(self.answer_tag), self.closing(self.answer_tag)
        return (opening, answer + closing) if closing == "}" else (opening, f" {answer} {closing}")

    def _inner(self, tag: str, body: str) -> str:
        """Content of a block: the text after its last opening, without LaTeX text commands if it is closed by `}`."""
        body = body.rpartition(self.opening(tag))[2].strip()
        return _LATEX_TEXT.sub(r"\1", body).strip() if self.closing(tag) == "}" else body

    def _reasoning(self, text: str) -> str:
        inner = text.rpartition(self.opening(self.think_tag))[2]
        return inner.partition(self.closing(self.think_tag))[0].strip()

    def through_search(self, text: str) -> str:
        """Text of a turn up to and including its closing search tag."""
        head, closing, _ = text.partition(self.stop[0])
        return head + closing

    def searches(self, text: str) -> list[tuple[str, str]]:
        """Searches of a whole trajectory's text, in order: (query, text up to and including its closing tag).

        A search was carried out if its closing tag is directly before an information block; the last one may end the
        text. Tags in passages are disarmed. A search followed by a correction was not carried out.
        """
        opening, closing = self.opening(self.search_tag), re.escape(self.stop[0])
        before = self.block_form.partition("{opening}")[0]
        block, correction = re.escape(before + self.opening(self.information_tag)), re.escape(self.correction)
        spill = f"[^<]{{0,{_SPILL}}}?"
        ends = re.finditer(f"{closing}(?!{spill}{correction})(?={spill}(?:{block}|\\Z))", text)
        return [(text[: end.start()].rpartition(opening)[2].strip(), text[: end.end()]) for end in ends]

    def exchanges(self, text: str) -> list[tuple[str, str | None]]:
        """A whole trajectory's text: (what the model wrote, content of the information block after it).

        The last item has no block: it holds the answer, or what else follows the last block.
        """
        before, after = self.block_form.partition("{opening}")[0], self.block_form.rpartition("{closing}")[2]
        opening, closing = self.opening(self.information_tag), self.closing(self.information_tag)
        head, tail = re.escape(before + opening), re.escape(closing)
        block = re.compile(f"[^<]{{0,{_SPILL}}}?{head}(.*?){tail}(?:{re.escape(after)})?", re.DOTALL)
        found: list[tuple[str, str | None]] = []
        start = 0
        for _, through in self.searches(text):
            if (shown := block.match(text, len(through))) is not None:
                found.append((text[start : len(through)], shown[1]))
                start = shown.end()
        return [*found, (text[start:], None)]

    def write(self, reasoning: str, tag: str, body: str) -> str:
        """A turn in the model's place: its reasoning, if there is one, and a search or an answer.

        Reasoning that holds its tag already is kept as it is, white space included.
        """
        opening, closing = self.opening(self.think_tag), self.closing(self.think_tag)
        thought = f"{opening} {reasoning} {closing}\n" if reasoning and opening not in reasoning else reasoning
        return f"{thought}{self.opening(tag)} {body} {self.closing(tag)}"

    def read_block(self, block: str) -> list[tuple[str, str]]:
        """(title, text) of each passage in an information block; empty if it has another form than `passage_form`.

        White space and the quotation marks around a title may be missing, as in the blocks of Search-R1 and verl.

        >>> compact.read_block("Doc 1 (Title: Emma)\\nA novel.\\nDoc 2(Title: \\"Ulm (city)\\") A city.")
        [('Emma', 'A novel.'), ('Ulm (city)', 'A city.')]
        """
        title = r'(?:"([^\n]*?)"|([^\n]*?))'
        head = re.escape(self.passage_form.partition("{text}")[0]).replace(r"\{rank\}", r"\d+")
        head = re.sub(r'"?\\{title\\}"?', lambda _: title, head).replace(r"\(", r"\s*\(").replace(r"\ ", r"\s*")
        head = head.removesuffix(r"\s*") + r"(?=\s|\Z)\s*"
        found = list(re.finditer(f"^{head}", block, re.MULTILINE))
        ends = [match.start() for match in found[1:]] + [len(block)]
        return [(m[1] or m[2] or "", block[m.end() : end].strip()) for m, end in zip(found, ends, strict=False)]

    def render(self, passages: Sequence[Passage]) -> str:
        """The information block. No passage can open or close a tag of the protocol."""
        docs = "\n".join(
            self.passage_form.format(rank=rank, title=disarm(passage.title), text=disarm(passage.text))
            for rank, passage in enumerate(passages, start=1)
        )
        tag = self.information_tag
        return self.block_form.format(opening=self.opening(tag), passages=docs, closing=self.closing(tag))


def disarm(text: str) -> str:
    """Passage text in which every `<` that could begin a tag or a special token is replaced by a harmless `‹`.

    >>> disarm("a < b, </answer> <|im_end|>")
    'a < b, ‹/answer> ‹|im_end|>'
    """
    return _TAG_OPENING.sub("‹", text)


_PREFIX_SEARCH = Search("", "")
"""Placeholder for the last search of a prefix, which awaits its passages; it is not a turn of the session itself."""


# --- One trajectory ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Segment:
    """A run of tokens written by the model or by the environment."""

    ids: list[int]
    text: str
    by_model: bool


@dataclass
class Session:
    """One trajectory: what was written, by whom, and what comes next.

    Args:
        protocol: tags and wording.
        codec: tokenizer of the agent.
        limits: limits of the trajectory.
        question: the user's question.
        prefix: text of a trajectory that this one continues, up to a closing search tag (correctness stage); it counts
            as written by the environment. The passages of that search come next, through `found`.
        searches: number of searches in the prefix, including its last one.
        history: queries of the prefix, including its last one; later searches include them.

    A prompt or a prefix that leaves no room for the model finishes the session at once (`StopReason.MAX_TOKENS`); in
    the case of a prompt, `refusal` gives the reason.

    Raises:
        ConfigError: an information block leaves no room for passages.
    """

    protocol: AgentProtocol
    codec: Codec
    limits: Limits
    question: str
    prefix: str = ""
    searches: int = 0
    history: tuple[str, ...] = ()

    prompt_ids: list[int] = field(init=False)
    segments: list[Segment] = field(init=False, default_factory=list)
    turns: list[Turn] = field(init=False, default_factory=list)
    malformed: int = field(init=False, default=0)
    finished: Finished | None = field(init=False, default=None)
    refusal: str | None = field(init=False, default=None)
    """Reason why the limits, the model or the retriever refuse this trajectory, which is then finished."""
    _pending: Search | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompt_ids = self.protocol.prompt_ids(self.question, self.codec)
        # A search that found something must be able to show a passage.
        bare = len(self.codec.encode(self.protocol.render([Passage(id="", title="", text="")])))
        if bare > self.limits.max_observation_tokens:
            raise ConfigError(
                f"limits.max_observation_tokens={self.limits.max_observation_tokens}: a block with one empty passage "
                f"takes {bare}"
            )
        if self._room < 1:
            self.refused(
                f"limits.max_tokens={self.limits.max_tokens}: the {len(self.prompt_ids)} prompt tokens of "
                f"{self.question[:60]!r} leave none for the model"
            )
        elif self.prefix:
            self._append(self.codec.encode(self.prefix), self.prefix, by_model=False)
            self._pending = _PREFIX_SEARCH
            if self._room < 1:
                self._finish(Finished(StopReason.MAX_TOKENS))

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
        action = self.protocol.parse(text)
        # The order matters: an answer counts even after the last allowed search, a further search does not.
        if isinstance(action, Finished):
            return self._finish(action)
        if action is None:
            return self._malformed()
        if self.searches >= self.limits.max_searches:
            return self._finish(Finished(StopReason.MAX_TURNS))
        self.searches += 1
        self._pending = action
        return action

    def found(self, passages: Sequence[Passage], scores: Sequence[float] | None = None) -> Finished | None:
        """Append the information block of the pending search, with as many whole passages as fit.

        Returns:
            Finished if the block leaves no room for the model (then nothing is appended), else None.
        """
        self._expect(pending=True)
        search, self._pending = self._pending, None
        shown, block, block_ids = self._fit(passages)
        # The block must leave room for at least one token of the model, so that it can still answer.
        fits = len(block_ids) < self._room
        if search != _PREFIX_SEARCH:
            self._record(search, shown if fits else [], scores if scores is not None else [0.0] * len(shown))
        if not fits:
            return self._finish(Finished(StopReason.MAX_TOKENS))
        self._append(block_ids, block, by_model=False)
        return None

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
        self._pending, self.refusal = None, refusal
        return self._finish(Finished(StopReason.SEARCH_FAILED))

    # Inside

    def _expect(self, *, pending: bool) -> None:
        if self.finished is not None:
            raise ValueError(f"the session is finished ({self.finished.stop_reason.value})")
        if (self._pending is not None) != pending:
            raise ValueError("a search awaits its passages" if self._pending is not None else "no search is pending")

    def _record(self, search: Search | None, shown: Sequence[Passage], scores: Sequence[float]) -> None:
        """Record a search of this session with the passages shown to the model."""
        assert search is not None
        read = tuple(ScoredPassage(id=p.id, score=score) for p, score in zip(shown, scores, strict=False))
        self.turns.append(Turn(turn=self.searches, reasoning=search.reasoning, query=search.query, passages=read))

    def _append(self, ids: list[int], text: str, *, by_model: bool) -> None:
        self.segments.append(Segment(ids=ids, text=text, by_model=by_model))

    def _finish(self, outcome: Finished) -> Finished:
        self.finished = outcome
        return outcome

    def _malformed(self) -> Retry | Finished:
        self.malformed += 1
        correction = self.codec.encode(self.protocol.correction)
        # Token room first: without it the correction could not be followed by a turn of the model.
        if len(correction) >= self._room:
            return self._finish(Finished(StopReason.MAX_TOKENS))
        if self.malformed > self.limits.max_malformed:
            return self._finish(Finished(StopReason.MALFORMED))
        self._append(correction, self.protocol.correction, by_model=False)
        return Retry()

    def _fit(self, passages: Sequence[Passage]) -> tuple[list[Passage], str, list[int]]:
        """As many leading passages as fit the observation limit, at least one if there is one.

        If the first is too long, its text is cut, and if no text is left, its title.
        """
        shown, most = list(passages), self.limits.max_observation_tokens
        ids: list[int] = []
        encoded = ""
        while True:
            block = self.protocol.render(shown)
            # With fewer passages the block often begins with the same text that was already too long.
            if not encoded or not block.startswith(encoded):
                ids, encoded = self._encode_start(block)
            if encoded == block and (len(ids) <= most or not shown):
                return shown, block, ids
            if len(shown) > 1:
                shown.pop()
                continue
            # Tokens per word vary, so the cut is an estimate; the loop repeats until the block fits.
            title, text = shown[0].title, shown[0].text
            if text:
                text = _shortened(text[: len(encoded)], most, len(ids))
            else:
                title = _shortened(title[: len(encoded)], most, len(ids))
            shown, encoded = [Passage(id=shown[0].id, title=title, text=text)], ""

    def _encode_start(self, block: str) -> tuple[list[int], str]:
        """Ids of a block, or of a prefix of it that is already too long, with the text that they encode.

        A block may be a hundred times longer than the limit, and tokenising all of it would block the event loop. The
        number of characters per token is not bounded, so the prefix grows until it has too many tokens.
        """
        most = self.limits.max_observation_tokens
        length = _CHARACTERS_PER_TOKEN * most
        while length < len(block):
            # A word that is cut in two may have more tokens than the whole word.
            space = block.rfind(" ", length - _LONGEST_WORD, length)
            start = block[: space if space > 0 else length]
            ids = self.codec.encode(start)
            if len(ids) > most + _SPILL:
                return ids, start
            length *= 2
        return self.codec.encode(block), block


def _shortened(text: str, most: int, tokens: int) -> str:
    """`most / tokens` of a text's words, or of its characters if it has few words (Chinese, Thai); always shorter.

    >>> _shortened("one two three four", 1, 2), _shortened("一二三四", 1, 2), _shortened("x", 9, 10)
    ('one two', '一二', '')
    """
    words = text.split(" ")
    keep = min(len(words) - 1, len(words) * most // tokens)
    # No words are left of a text that begins with a space and one long word.
    return " ".join(words[:keep]) or text[: max(0, min(len(text) - 1, len(text) * most // tokens))]


# --- Registered protocols ---------------------------------------------------------------------------------------------

search_r1 = AgentProtocol(
    name="search_r1",
    description="Search-R1's tags; the instruction of released agents is read from FlashRAG (evaluation.prompts).",
    instruction=(
        "Answer the question below. Think inside <think> and </think> whenever you learn something new. When you miss "
        "a fact, write <search> query </search>; the passages found are shown between <information> and "
        "</information>. Search as often as you need. When you know the answer, give it alone inside <answer> and "
        "</answer>, for example <answer> Beijing </answer>.\nQuestion: {question}\n"
    ),
)

compact = AgentProtocol(
    name="compact",
    description="Search-R1's tags with the bare question as prompt: for small agents trained on the form itself.",
    instruction="Question: {question}\n",
    correction="\n\nInvalid.\n\n",
)
