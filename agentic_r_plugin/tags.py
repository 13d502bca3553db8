"""Agents that search and answer in tags written into one running text, such as Search-R1's (method section 2)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from agentic_r_plugin import components
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import (
    SPILL,
    AgentProtocol,
    Codec,
    Finished,
    Malformed,
    Open,
    Piece,
    Prefix,
    Search,
    disarm,
)
from agentic_r_plugin.records import Passage, StopReason, Trajectory

# A regular expression cannot match braces of any depth; `\boxed{\text{Emma}}` needs one level.
_BALANCED = r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*"
"""Text whose braces are balanced, two levels deep."""

_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm)\{([^{}]*)\}")


@dataclass(frozen=True, kw_only=True)
class TagProtocol(AgentProtocol):
    """An agent that writes tags into one running text; the defaults are Search-R1's.

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
                "and correction some text: both show where a trajectory's searches were carried out"
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

    def read(self, text: str, codec: Codec) -> tuple[Search | Open, ...] | Finished | Malformed:
        """See `AgentProtocol.read`."""
        action = self.parse(text)
        if action is None:
            return Malformed(self.correction)
        return (action,) if isinstance(action, Search) else action

    @cached_property
    def _block(self) -> re.Pattern[str]:
        return re.compile(f"{self._pattern(self.search_tag)}|{self._pattern(self.answer_tag)}", re.DOTALL)

    def _pattern(self, tag: str) -> str:
        opening, closing = re.escape(self.opening(tag)), re.escape(self.closing(tag))
        # Lazy: a block ends at its first closing tag. `}` may also close a brace within the answer.
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
        """See `AgentProtocol.answered`."""
        opening, closing = self.opening(self.answer_tag), self.closing(self.answer_tag)
        return (opening, answer + closing) if closing == "}" else (opening, f" {answer} {closing}")

    def _inner(self, tag: str, body: str) -> str:
        """Content of a block: the text after its last opening, without LaTeX text commands if it is closed by `}`."""
        # The match begins at the first opening tag; another one in the body restarts the block.
        body = body.rpartition(self.opening(tag))[2].strip()
        return _LATEX_TEXT.sub(r"\1", body).strip() if self.closing(tag) == "}" else body

    def _reasoning(self, text: str) -> str:
        # The opening tag may be missing, because a chat template may have written it into the prompt.
        inner = text.rpartition(self.opening(self.think_tag))[2]
        return inner.partition(self.closing(self.think_tag))[0].strip()

    def searches(self, text: str) -> list[tuple[str, str]]:
        """Searches of a whole trajectory's text, in order: (query, text up to and including its closing tag).

        A search was carried out if its closing tag is directly before an information block; the last one may end the
        text. Tags in passages are disarmed. A search followed by a correction was not carried out.
        """
        opening, closing = self.opening(self.search_tag), re.escape(self.stop[0])
        before = self.block_form.partition("{opening}")[0]
        block, correction = re.escape(before + self.opening(self.information_tag)), re.escape(self.correction)
        # The token that completes the stop string may hold further characters; `[^<]` never skips another tag.
        spill = f"[^<]{{0,{SPILL}}}?"
        # A short correction fits into the spill. It is excluded, because the model may write a false block after it.
        ends = re.finditer(f"{closing}(?!{spill}{correction})(?={spill}(?:{block}|\\Z))", text)
        return [(text[: end.start()].rpartition(opening)[2].strip(), text[: end.end()]) for end in ends]

    def exchanges(self, text: str) -> list[tuple[str, str | None]]:
        """A whole trajectory's text: (what the model wrote, content of the information block after it).

        The last item has no block: it holds the answer, or what else follows the last block.
        """
        before, after = self.block_form.partition("{opening}")[0], self.block_form.rpartition("{closing}")[2]
        opening, closing = self.opening(self.information_tag), self.closing(self.information_tag)
        head, tail = re.escape(before + opening), re.escape(closing)
        block = re.compile(f"[^<]{{0,{SPILL}}}?{head}(.*?){tail}(?:{re.escape(after)})?", re.DOTALL)
        found: list[tuple[str, str | None]] = []
        start = 0
        for _, through in self.searches(text):
            if (shown := block.match(text, len(through))) is not None:
                found.append((text[start : len(through)], shown[1]))
                start = shown.end()
        return [*found, (text[start:], None)]

    def write(self, reasoning: str, tag: str, body: str, *, gap: str = "\n") -> str:
        """A turn in the model's place: its reasoning, if there is one, and a search or an answer.

        Reasoning that holds its tag already is kept as it is, white space included.
        """
        opening, closing = self.opening(self.think_tag), self.closing(self.think_tag)
        thought = f"{opening} {reasoning} {closing}{gap}" if reasoning and opening not in reasoning else reasoning
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
        # White space must follow: an unquoted title such as `Ulm (city)` would end at its own bracket otherwise.
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

    def reply(self, contents: Sequence[str], wrote: Sequence[int], codec: Codec, *, of_call: bool = True) -> str:
        """See `AgentProtocol.reply`; a turn holds one call at most."""
        (content,) = contents
        return content

    def prefixes(self, trajectory: Trajectory) -> list[Prefix]:
        """See `AgentProtocol.prefixes`; found in the text."""
        # The text may end with a search that was not carried out (over the limit, or failed), which is not a turn.
        return [Prefix(*found) for found in self.searches(trajectory.text)][: len(trajectory.turns)]

    def write_search(self, thought: str, query: str, codec: Codec, *, gap: str = "\n") -> str:
        """See `AgentProtocol.write_search`."""
        return self.write(thought, self.search_tag, query, gap=gap)

    def write_answer(self, thought: str, answer: str, codec: Codec, *, gap: str = "\n") -> str:
        """See `AgentProtocol.write_answer`."""
        return self.write(thought, self.answer_tag, answer, gap=gap)

    def pieces(self, trajectory: Trajectory) -> list[Piece]:
        """See `AgentProtocol.pieces`."""
        return self.split(trajectory.text)

    def split(self, text: str) -> list[Piece]:
        """Split the text of a trajectory.

        An information block directly after a search was written by the environment. Any other one is the model's
        invention.

        >>> [(piece.kind, piece.text) for piece in compact.split("<think>Hm.</think><search> Nile </search>")]
        [('think', 'Hm.'), ('search', 'Nile')]
        """
        found: list[Piece] = []
        information = re.compile(rf"\s*{self._shown(self.information_tag)}\s*", re.DOTALL)
        tags = {"think": self.think_tag, "search": self.search_tag, "answer": self.answer_tag}
        named = (f"(?P<{kind}>{self._shown(tag, may_end=True)})" for kind, tag in tags.items())
        block = re.compile("|".join(named), re.DOTALL)
        correction = self.correction.strip()
        position = 0
        while position < len(text):
            if found and found[-1].kind == "search" and (match := information.match(text, position)):
                found.append(Piece(kind="information", text=match[1].strip()))
                position = match.end()
                continue
            candidates = [match for match in (block.search(text, position),) if match]
            at = text.find(correction, position) if correction else -1
            start = min([match.start() for match in candidates] + ([at] if at >= 0 else []), default=len(text))
            if text[position:start].strip():
                found.append(Piece(kind="other", text=text[position:start].strip()))
            if start == len(text):
                break
            if start == at:
                found.append(Piece(kind="correction", text=correction))
                position = at + len(correction)
            else:
                match = candidates[0]
                # The groups alternate: the whole block of a kind, then its content.
                inner = next(text for text in match.groups()[1::2] if text is not None)
                found.append(Piece(kind=str(match.lastgroup), text=inner.strip()))
                position = match.end()
        return found

    def _shown(self, tag: str, *, may_end: bool = False) -> str:
        closing, end = re.escape(self.closing(tag)), r"|\Z" if may_end else ""
        return rf"{re.escape(self.opening(tag))}(.*?)(?:{closing}{end})"


def with_tags(name: str) -> TagProtocol:
    """The registered protocol, which writes tags.

    Raises:
        UnknownComponentError: the name is not registered.
        ConfigError: the protocol does not write tags.
    """
    protocol = components.load("agent_protocol", name)
    if not isinstance(protocol, TagProtocol):
        raise ConfigError(f"agent protocol {name!r}: expected one with tags, such as search_r1")
    return protocol


# --- Registered protocols ---------------------------------------------------------------------------------------------

search_r1 = TagProtocol(
    name="search_r1",
    description="Search-R1's tags; the instruction of released agents is read from FlashRAG (agent.protocols).",
    instruction=(
        "Answer the question below. Think inside <think> and </think> whenever you learn something new. When you miss "
        "a fact, write <search> query </search>; the passages found are shown between <information> and "
        "</information>. Search as often as you need. When you know the answer, give it alone inside <answer> and "
        "</answer>, for example <answer> Beijing </answer>.\nQuestion: {question}\n"
    ),
)

compact = TagProtocol(
    name="compact",
    description="Search-R1's tags with the bare question as prompt: for small agents trained on the form itself.",
    instruction="Question: {question}\n",
    correction="\n\nInvalid.\n\n",
)
