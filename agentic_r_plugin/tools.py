"""Agents that call tools in their own chat template: Qwen3, Hermes, Llama 3.1 and most current models.

The prompt is the template's rendering of system message, question and tool schemas. What the model writes is never
rendered again, because templates drop the reasoning of earlier turns. Only what the environment adds is rendered: the
template's text after a placeholder for the model's turn, with the results as messages of role `tool`. So the ids of a
trajectory are those that the model has read and written, and they decode to the template's own rendering wherever no
reasoning was dropped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.reply import after_thoughts, opens_thought
from agentic_r_plugin.protocol import (
    AgentProtocol,
    Codec,
    Finished,
    Malformed,
    Open,
    Piece,
    Prefix,
    Search,
    disarm,
    without_tokens,
)
from agentic_r_plugin.records import Passage, StopReason, Trajectory
from agentic_r_plugin.tags import TagProtocol


def _tool(name: str, description: str, argument: str, meaning: str) -> dict[str, Any]:
    """Schema of a tool with one text argument."""
    properties = {argument: {"type": "string", "description": meaning}}
    parameters = {"type": "object", "properties": properties, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SEARCH = _tool("search", "Search the corpus; returns the most relevant passages.", "query", "What to search for.")
OPEN = _tool(
    "open",
    "Open a document that a search has shown, to read more of it.",
    "id",
    "Its id, or its rank in the last search.",
)
TOOLS = {"search": SEARCH, "open": OPEN}
"""Schemas of the tools, by name."""

_WROTE = "(the turn of the model)"
"""Placeholder for what the model wrote."""

_MARK_LENGTH = 64
"""Characters at the end of a turn that hold its end-of-turn token."""


# --- Forms of a call --------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call in the text of a turn, from `start` to `end`."""

    name: str
    arguments: Mapping[str, Any]
    start: int
    end: int


class _BrokenCallError(Exception):
    """A call that cannot be carried out; the text says why."""


_BLOCK = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>]*)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>]*)>(.*?)</parameter>", re.DOTALL)


def _blocks(text: str) -> Iterator[re.Match[str]]:
    for match in _BLOCK.finditer(text):
        if not match[2]:
            raise _BrokenCallError("the call is not closed by </tool_call>")
        yield match


def _json_calls(text: str) -> Iterator[_Call]:
    for match in _blocks(text):
        yield _Call(*_function(_loaded(json.loads, match[1])), match.start(), match.end())


def _xml_calls(text: str) -> Iterator[_Call]:
    for match in _blocks(text):
        function = _FUNCTION.fullmatch(match[1])
        if function is None:
            raise _BrokenCallError("expected <function=NAME> and </function> in the call")
        arguments = {name.strip(): value for name, value in _PARAMETER.findall(function[2])}
        yield _Call(function[1].strip(), arguments, match.start(), match.end())


def _bare_json_calls(text: str) -> Iterator[_Call]:
    # The JSON must begin the message: an object after other text is not a call.
    decoder, at = json.JSONDecoder(), _after(r"\s*(?:<\|python_tag\|>)?\s*", text, 0)
    while text[at : at + 1] == "{":
        data, end = _loaded(partial(decoder.raw_decode, idx=at), text)
        yield _Call(*_function(data), at, end)
        at = _after(r"[\s;]*", text, end)


def _after(pattern: str, text: str, at: int) -> int:
    """End of the match of `pattern` at position `at`; `at` if it does not match there."""
    match = re.compile(pattern).match(text, at)
    return match.end() if match else at


def _loaded(load: Callable[[str], Any], text: str) -> Any:
    try:
        # The model may write any text, also brackets nested too deeply for the parser.
        return load(text)
    except (ValueError, RecursionError) as error:
        raise _BrokenCallError(f"the call is not valid JSON: {str(error) or 'too deep'}") from error


def _function(data: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of a call in JSON; Llama writes `parameters`."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        raise _BrokenCallError("expected an object with 'name' and 'arguments' as the call")
    arguments = data.get("arguments", data.get("parameters", {}))
    if not isinstance(arguments, dict):
        raise _BrokenCallError("expected an object as the call's arguments")
    return data["name"], arguments


@dataclass(frozen=True, kw_only=True)
class _Form:
    calls: Callable[[str], Iterator[_Call]]
    end: tuple[str, ...]
    """Strings that end a call."""


CALL_FORMS: Mapping[str, _Form] = {
    "json": _Form(calls=_json_calls, end=("</tool_call>",)),
    "xml": _Form(calls=_xml_calls, end=("</tool_call>",)),
    "bare_json": _Form(calls=_bare_json_calls, end=()),
}
"""How a family writes its calls: JSON in `<tool_call>` (Qwen3, Hermes), XML parameters in it (Qwen3-Coder), or JSON as
the whole message (Llama 3.1)."""


# --- The answer -------------------------------------------------------------------------------------------------------

# A search tag that no model writes: these protocols find answers only.
_NEVER = "\0"
ANSWER_RULES: Mapping[str, tuple[str, TagProtocol | None]] = {
    "tag": (
        "Give the final answer alone inside <answer> and </answer>.",
        TagProtocol(name="tag", instruction="{question}", search_tag=_NEVER),
    ),
    "boxed": (
        "Give the final answer alone inside \\boxed{}.",
        TagProtocol(
            name="boxed",
            instruction="{question}",
            search_tag=_NEVER,
            answer_tag="boxed",
            marks={"boxed": ("\\boxed{", "}")},
        ),
    ),
    "message": ("Reply with the final answer alone.", None),
}
"""Rule -> the sentence of the system message that asks for it, and the tags that hold the answer."""


# --- The protocol -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ToolProtocol(AgentProtocol):
    """An agent that calls the tools `search` and perhaps `open` in its chat template.

    The answer is in a message without a call. An unknown tool, broken JSON or a missing argument is a malformed turn;
    none of its calls is carried out, and the tool message says what is wrong.

    Raises:
        ConfigError: an unknown form or rule, or an instruction without the question.
    """

    text_shows_authors: ClassVar[bool] = False

    name: str
    description: str = ""
    system: str = (
        "Answer the user's question. Call the tool search whenever you miss a fact, as often as you need. {answer}"
    )
    """System message; empty: none. `{answer}` becomes the sentence of the answer rule."""
    instruction: str = "{question}"
    """The user's message, with one `{question}`."""
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, such as `enable_thinking`."""
    call_form: str = "json"
    """How calls are written: `json`, `xml` or `bare_json`."""
    tools: tuple[str, ...] = ("search",)
    """Names of the tools: `search`, and `open` if the agent may open documents that it was shown."""
    several_calls: bool = True
    """Whether a turn may hold several calls; otherwise generation stops after the first, and later ones are ignored."""
    answer: str = "tag"
    """Where the answer is: `tag` (`<answer>`), `boxed` (`\\boxed{}`) or `message` (the whole message)."""
    passage_form: str = 'Doc {rank}(Title: "{title}") {text}'
    """Template of one passage with `{rank}`, `{id}`, `{title}` and `{text}`; passages are joined by newlines.
    `{text:.99}` is the first 99 characters, for an agent that opens what it wants to read."""
    thought_form: str = "<think>\n{thought}\n</think>\n"
    """Template of a thought in demonstrations."""

    def __post_init__(self) -> None:
        for name, known in (("call_form", CALL_FORMS), ("answer", ANSWER_RULES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"agent protocol {self.name!r}: {name}={getattr(self, name)!r}: expected {', '.join(known)}"
                )
        object.__setattr__(self, "tools", tuple(self.tools))  # a list in a settings file
        if "search" not in self.tools or set(self.tools) - set(TOOLS):
            raise ConfigError(
                f"agent protocol {self.name!r}: tools={list(self.tools)}: expected search, or search, open"
            )
        if self.instruction.count("{question}") != 1:
            raise ConfigError(f"agent protocol {self.name!r}: the instruction must hold '{{question}}' exactly once")

    # The prompt

    def prompt(self, question: str) -> str:
        """See `AgentProtocol.prompt`."""
        return self.instruction.replace("{question}", question)

    def prompt_ids(self, question: str, codec: Codec) -> list[int]:
        """See `AgentProtocol.prompt_ids`.

        Raises:
            ConfigError: the template refuses the messages, or shows no tools or no tool messages.
        """
        text = self._chat(codec, self._messages(question))
        # Some templates silently drop tools or tool messages. A schema shows as JSON or XML; if the template drops it,
        # the system message must name the tool.
        shown = self.reply(["result"], (), codec)
        if ('"search"' not in text and ">search<" not in text and "search" not in self.system) or "result" not in shown:
            raise ConfigError(
                f"agent protocol {self.name!r}: the tokenizer's chat template does not show tools or their results; "
                "take a protocol with tags, such as search_r1, or a tokenizer whose template knows tools"
            )
        return codec.encode(text)

    def _messages(self, question: str) -> list[dict[str, Any]]:
        system = self.system.replace("{answer}", ANSWER_RULES[self.answer][0])
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": self.prompt(question)}]

    def _chat(self, codec: Codec, messages: Sequence[Mapping[str, Any]], *, reply: bool = True) -> str:
        render = getattr(codec, "chat", None)
        if render is None:
            raise ConfigError(f"agent protocol {self.name!r} needs a codec with chat() (llm.codec.TokenizerCodec)")
        return str(render(messages, [TOOLS[name] for name in self.tools], self.template_arguments, reply=reply))

    # The model's turn

    @property
    def stop(self) -> tuple[str, ...]:
        """See `AgentProtocol.stop`; with several calls the model ends its turn itself."""
        return () if self.several_calls else CALL_FORMS[self.call_form].end

    def read(self, text: str, codec: Codec) -> tuple[Search | Open, ...] | Finished | Malformed:
        """See `AgentProtocol.read`; calls before the end of the thoughts do not count, nor do answers in thoughts.

        A call in a thought that is not closed counts, and its reasoning is the thought so far. Whether the model or the
        template opened the thought makes no difference.
        """
        try:
            if found := self._calls(text):
                return found
        except _BrokenCallError as error:
            return Malformed(f"Error: {disarm(str(error))}. No call of this turn was carried out.", of_call=True)
        # If the template opens the thought in the prompt, the turn begins inside it.
        opened = "<think>" if opens_thought(self._chat(codec, self._messages("?"))) else ""
        answer = self._answer(*after_thoughts(opened + text), codec)
        if answer is None:
            return Malformed(f"That was neither a call nor an answer. {ANSWER_RULES[self.answer][0]}")
        return Finished(StopReason.ANSWERED, answer)

    def _calls(self, text: str) -> tuple[Search | Open, ...]:
        """The calls of a turn.

        Raises:
            _BrokenCallError: one of them cannot be carried out.
        """
        message, _ = after_thoughts(text)
        thoughts = len(text) - len(message)
        found: list[Search | Open] = []
        reasoning = ""
        for call in CALL_FORMS[self.call_form].calls(message):
            if call.name not in self.tools:
                raise _BrokenCallError(f"there is no tool {call.name[:60]!r}; there is {' and '.join(self.tools)}")
            # All calls of a turn share the reasoning before the first one.
            reasoning = reasoning if found else _reasoning(text[: thoughts + call.start])
            if call.name == "open":
                found.append(Open(_argument(call, "id")))
            else:
                found.append(Search(_argument(call, "query"), reasoning, thoughts + call.end))
        return tuple(found if self.several_calls else found[:1])

    def _answer(self, message: str, within_thought: bool, codec: Codec) -> str | None:
        tags = ANSWER_RULES[self.answer][1]
        if tags is not None:
            # Only the text before the answer decides whether the answer is in a thought.
            _, in_thought = after_thoughts(message.partition(tags.opening(tags.answer_tag))[0])
            action = None if in_thought else tags.parse(message)
            return action.answer if isinstance(action, Finished) else None
        special, text = tuple(getattr(codec, "special_tokens", ())), message.strip()
        # The decoded turn may end with special tokens, such as the end of the turn; they are not part of the answer.
        while (mark := next((mark for mark in special if text.endswith(mark)), None)) is not None:
            text = text.removesuffix(mark).strip()
        return text if text and not within_thought else None

    # The environment's text

    def render(self, passages: Sequence[Passage]) -> str:
        """See `AgentProtocol.render`: the content of a tool message."""
        if not passages:
            return "No passage was found."
        return "\n".join(
            self.passage_form.format(
                rank=rank, id=disarm(passage.id), title=disarm(passage.title), text=disarm(passage.text)
            )
            for rank, passage in enumerate(passages, start=1)
        )

    def reply(self, contents: Sequence[str], wrote: Sequence[int], codec: Codec, *, of_call: bool = True) -> str:
        """See `AgentProtocol.reply`: the rest of the turn, messages of role `tool` or `user`, the next turn's start.

        The end-of-turn token is left out if the model wrote it. No message can write a special token (`disarm`,
        `without_tokens`).
        """
        role = "tool" if of_call else "user"
        contents = [without_tokens(content, codec) for content in contents]
        turn = [{"role": "assistant", "content": _WROTE}, *({"role": role, "content": content} for content in contents)]
        # Any question will do, because only the text after the placeholder is kept.
        text = self._after(self._chat(codec, [*self._messages("?"), *turn]))
        # Compared by id: the end-of-turn token is left out only if the model wrote exactly this token.
        mark = codec.encode(text[:_MARK_LENGTH])[:1]
        return text.removeprefix(codec.decode(mark)) if mark == list(wrote[-1:]) else text

    def _after(self, rendered: str) -> str:
        _, found, rest = rendered.partition(_WROTE)
        if not found:
            raise ConfigError(f"agent protocol {self.name!r}: the tokenizer's chat template drops the assistant's text")
        return rest

    # Finished trajectories

    def prefixes(self, trajectory: Trajectory) -> list[Prefix]:
        """See `AgentProtocol.prefixes`; the record says where each call ends."""
        runs, found = _runs_of_model(trajectory.runs), []
        for turn in trajectory.turns:
            # The model's turns up to this search, the last one cut after it: later calls of that turn do not count.
            begun = [(start, min(end, turn.end)) for start, end in runs if start < turn.end]
            made = [self._made(trajectory.text[start:end]) for start, end in begun]
            # No call at the end: it has another form, or is of a tool that these options do not have.
            *earlier, last = (made[-1] if made else ()) or (Search("", ""),)
            query = last.query if isinstance(last, Search) else ""
            opens = sum(isinstance(call, Open) for calls in made for call in calls)
            found.append(Prefix(query, trajectory.text[: turn.end], begun[-1][0] if earlier else None, opens))
        return found

    def _made(self, text: str) -> tuple[Search | Open, ...]:
        """The calls of a turn that were carried out."""
        try:
            return self._calls(text)
        except _BrokenCallError:
            return ()

    def pieces(self, trajectory: Trajectory) -> list[Piece]:
        """See `AgentProtocol.pieces`."""
        found, at = [], 0
        for place, length in enumerate(trajectory.runs):
            text, at = trajectory.text[at : at + length], at + length
            answers = trajectory.answer is not None and place == len(trajectory.runs) - 1
            # Runs alternate; the first is the model's.
            found += (
                self._turn_pieces(text, answers) if place % 2 == 0 else [Piece(kind="information", text=text.strip())]
            )
        return [piece for piece in found if piece.text]

    def _turn_pieces(self, text: str, answers: bool) -> list[Piece]:
        message, _ = after_thoughts(text)
        thoughts = text[: len(text) - len(message)]
        try:
            calls = list(CALL_FORMS[self.call_form].calls(message))
        except _BrokenCallError:
            calls = []
        found, at = [Piece(kind="think", text=re.sub(r"</?think>", "", thoughts).strip())], 0
        for call in calls:
            found.append(Piece(kind="other", text=message[at : call.start].strip()))
            asked = call.arguments.get("query") if call.name == "search" else None
            kind, text = ("other", message[call.start : call.end]) if asked is None else ("search", str(asked))
            found.append(Piece(kind=kind, text=text))
            at = call.end
        return [*found, Piece(kind="answer" if answers else "other", text=message[at:].strip())]

    def answered(self, answer: str) -> tuple[str, str]:
        """See `AgentProtocol.answered`."""
        tags = ANSWER_RULES[self.answer][1]
        return ("", answer) if tags is None else tags.answered(answer)

    # Demonstrations

    def write_search(self, thought: str, query: str, codec: Codec, *, gap: str = "\n") -> str:
        """See `AgentProtocol.write_search`; in the template's own form, with the end-of-turn token."""
        return self._write_call(thought, gap, codec, "search", query=query)

    def write_open(self, thought: str, document: str, codec: Codec, *, gap: str = "\n") -> str:
        """A turn that opens a document by its id or rank, as a demonstration."""
        return self._write_call(thought, gap, codec, "open", id=document)

    def write_answer(self, thought: str, answer: str, codec: Codec, *, gap: str = "\n") -> str:
        """See `AgentProtocol.write_answer`."""
        return self._written(thought, gap, "".join(self.answered(answer)), codec)

    def _write_call(self, thought: str, gap: str, codec: Codec, name: str, **arguments: str) -> str:
        function = {"name": name, "arguments": arguments}
        return self._written(thought, gap, "", codec, tool_calls=[{"type": "function", "function": function}])

    def _written(self, thought: str, gap: str, body: str, codec: Codec, **calls: Any) -> str:
        content = f"{self.thought_form.replace('{thought}', thought)}{gap}{body}" if thought else body
        asked = self._messages("?")
        prompt = self._chat(codec, asked)
        whole = self._chat(codec, [*asked, {"role": "assistant", "content": content, **calls}], reply=False)
        # What the template writes after a turn; only its first token, the end of the turn, is the model's.
        end = self._after(self._chat(codec, [*asked, {"role": "assistant", "content": _WROTE}], reply=False))
        if not whole.startswith(prompt) or not whole.endswith(end):
            raise ConfigError(
                f"agent protocol {self.name!r}: the chat template renders a turn of the model in another form than its "
                "generation prompt begins; set template_arguments (enable_thinking) so that they agree"
            )
        return whole[len(prompt) : len(whole) - len(end)] + codec.decode(codec.encode(end[:_MARK_LENGTH])[:1])


def _reasoning(before: str) -> str:
    """The thought before a turn's calls, or the text before them if the turn has no thought.

    >>> _reasoning("<think>Who?</think> I search."), _reasoning("I search. ")
    ('Who?', 'I search.')
    """
    inner, end, _ = before.rpartition("</think>")
    return (inner if end else before).rpartition("<think>")[2].strip()


def _runs_of_model(runs: Sequence[int]) -> list[tuple[int, int]]:
    """Start and end of each turn of the model: the runs of a text are the model's and the environment's in turn.

    >>> _runs_of_model([4, 3, 2])
    [(0, 4), (7, 9)]
    """
    return [(sum(runs[:place]), sum(runs[: place + 1])) for place in range(0, len(runs), 2)]


def _argument(call: _Call, name: str) -> str:
    value = call.arguments.get(name)
    text = str(value).strip() if isinstance(value, str | int) else ""
    if not text:
        raise _BrokenCallError(f"{call.name} needs the argument {name!r}, a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _BrokenCallError(f"the argument {name!r} holds half a character") from error
    return text


tool_calls = ToolProtocol(
    name="tool_calls",
    description="Calls of the tool search in the model's own chat template (Qwen3, Hermes, Llama 3.1, ...).",
)
