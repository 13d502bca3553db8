"""Logs of other agents, read as searches and an answer.

| form | known by | one trajectory |
|---|---|---|
| chat | `messages` | OpenAI's messages with tool calls; reasoning in `reasoning_content` or `<think>` |
| dump | `input`, `output` | Search-R1's and verl's rollout dumps: text with the protocol's tags |
| BrowseComp-Plus | `query_id`, `result` | a run file: reasoning, tool calls and the final text |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.field_values import Row, absent, name_of
from agentic_r_plugin.protocol import Finished
from agentic_r_plugin.records import Passage
from agentic_r_plugin.storage.json_text import parse_json
from agentic_r_plugin.tags import TagProtocol, search_r1

Step = tuple[str, str, Sequence[Any]]
"""One search: reasoning, query, and the passages shown (`Passage`, `Hit`, an object with id and text, or text)."""

_QUERY_ARGUMENTS = ("query", "q", "search_query", "queries", "query_list")
"""Arguments of a tool call that make it a search; a call without them (a calculator, a page by id) is left out."""

_RESULT_FIELDS = ("result", "results", "documents", "passages", "hits")
TEXT_FIELDS = ("text", "contents", "snippet", "content", "page_content")
_EXACT_ANSWER = re.compile(r"(?:\*\*)?Exact Answer:(?:\*\*)?\s*(.+?)\s*$", re.MULTILINE)
"""How BrowseComp-Plus asks for the answer in the final text."""

# Special tokens at the end of a dump, such as <|im_end|>; those of DeepSeek have full-width bars.
_END_TOKENS = re.compile(r"(\s*<[|｜][^<>]+[|｜]>)+\s*$")


@dataclass(kw_only=True)
class Log:
    """What a log says about one trajectory."""

    id: str | None
    asked: tuple[str, ...]
    """The user's messages, which hold the question; empty if the log has none."""
    steps: list[Step] = field(default_factory=list)
    reasoning: str = ""
    answer: str | None = None
    text: str | None = None
    """In place of the steps: what model and environment wrote, with tags."""
    left_out: int = 0
    """Tool calls that were no search, or that have no result."""


def read_log(row: Row, protocol: TagProtocol) -> Log:
    """Read one row of any form.

    Raises:
        RecordError: another form, or a broken part of it.
    """
    if isinstance(row.get("messages"), list):
        return _chat(row, protocol)
    if isinstance(row.get("input"), str) and isinstance(row.get("output"), str):
        return Log(id=_id_of(row), asked=(row["input"],), text=_END_TOKENS.sub("", row["output"]))
    if "query_id" in row and isinstance(row.get("result"), list):
        return _browsecomp_plus(row, protocol)
    raise RecordError(
        "expected 'messages' (chat), 'input' and 'output' (Search-R1, verl), or 'query_id' and 'result' "
        f"(BrowseComp-Plus), found only {', '.join(map(repr, row))}"
    )


def _id_of(row: Row) -> str | None:
    return next(filter(None, (name_of(row.get(name), name) for name in ("id", "query_id", "question_id", "_id"))), None)


class _Steps:
    """Collects the events of a log in order."""

    def __init__(self, log: Log, protocol: TagProtocol) -> None:
        self.log, self._protocol, self._thoughts = log, protocol, list[str]()
        self._tags = (protocol.answer_tag, protocol.search_tag)

    def think(self, text: Any) -> None:
        if isinstance(text, list):  # parts of a message or of a summary
            text = "\n".join(_part(part) for part in text)
        if isinstance(text, str) and text.strip():
            self._thoughts.append(text)

    def call(self, arguments: Any, result: Any) -> None:
        queries = _queries(arguments)
        results = _results(result, self._protocol) if queries else None
        if results is None:
            self.log.left_out += 1
            return
        # With one query the results are its passages, unless they are a list per query already.
        if len(queries) == 1 and not (results and isinstance(results[0], list)):
            results = [results]
        if len(results) != len(queries):
            raise RecordError(f"expected {len(queries)} results, one per query, found {len(results)}")
        for query, passages in zip(queries, results, strict=True):
            # The reasoning goes to the first query of a call; `_reasoning` is empty for the others.
            self.log.steps.append((self._reasoning(), query, passages))

    def answer(self, text: str) -> None:
        """The final text: an answer in the protocol's tags, after "Exact Answer:", or the whole of it.

        A search in tags was never carried out, and a cut answer is incomplete: neither gives an answer.
        """
        thought, closed, rest = text.rpartition("</think>")
        action = self._protocol.parse(rest)
        exact = _EXACT_ANSWER.search(rest)
        if isinstance(action, Finished):
            self.log.answer = action.answer
            thought += closed + rest.partition(self._protocol.opening(self._protocol.answer_tag))[0]
        elif exact is not None:
            self.log.answer = exact[1]
            thought += closed + rest[: exact.start()]
        elif rest.strip() and not any(self._protocol.opening(tag) in rest for tag in self._tags):
            self.log.answer = rest.strip()
            thought += closed
        self.think(thought)
        self.log.reasoning = self._reasoning()

    def _reasoning(self) -> str:
        """Text since the last search. One with the protocol's own tag stays as it was written."""
        tag = self._protocol.think_tag
        thoughts, self._thoughts = self._thoughts, []
        if len(thoughts) == 1 and self._protocol.opening(tag) in thoughts[0]:
            return thoughts[0]
        tags = re.compile(
            "</?think>|" + "|".join(map(re.escape, (self._protocol.opening(tag), self._protocol.closing(tag))))
        )
        return "\n".join(filter(None, (tags.sub("", thought).strip() for thought in thoughts)))


def _chat(row: Row, protocol: TagProtocol) -> Log:
    messages = [message for message in row["messages"] if isinstance(message, Mapping)]
    log = Log(id=_id_of(row), asked=_asked(messages))
    steps = _Steps(log, protocol)
    results = _tool_results(messages)
    last = max((place for place, message in enumerate(messages) if message.get("role") == "assistant"), default=None)
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        steps.think(message.get("reasoning_content") or message.get("reasoning"))
        content, calls = _part(message.get("content")), message.get("tool_calls") or ()
        # Only the last message answers: text before a later search is reasoning.
        if not calls and place == last:
            steps.answer(content)
            continue
        steps.think(content)
        for number, call in enumerate(calls):
            function = call.get("function") if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping):
                raise RecordError(f"field 'tool_calls': expected objects with 'function', found {str(call)[:80]!r}")
            steps.call(function.get("arguments"), results.get((place, number)))
    return log


def _asked(messages: Sequence[Row]) -> tuple[str, ...]:
    """The user's messages before the assistant's first reply to them.

    Raises:
        RecordError: the user writes again later: another question, or demonstrations before the question. What was
            found for one question is not the trajectory of another.
    """
    asked: list[str] = []
    replied = False
    for place, message in enumerate(messages, start=1):
        text = _part(message.get("content")) if message.get("role") == "user" else ""
        if text.strip() and replied:
            raise RecordError(
                "field 'messages': expected one question of the user, found another message of the user after the "
                f"assistant's reply (message {place}: {text.strip()[:80]!r}); write one chat for each question, "
                "without demonstrations"
            )
        if text.strip():
            asked.append(text)
        replied = replied or bool(asked and message.get("role") == "assistant")
    return tuple(asked)


def _tool_results(messages: Sequence[Row]) -> dict[tuple[int, int], Any]:
    """(place of a message, number of its call) -> the result of the call.

    Calls belong to the tool messages that follow before the next call: by id, or in order where ids are absent or
    repeated. Some servers give none, or count from zero in every turn.
    """
    found: dict[tuple[int, int], Any] = {}
    calls: list[tuple[tuple[int, int], str | None]] = []
    replies: list[tuple[str | None, Any]] = []

    def name(message: Any, field: str) -> str | None:
        value = message.get(field) if isinstance(message, Mapping) else None
        return None if absent(value) else str(value)

    def match() -> None:
        ids, known = [key for key, _ in replies], [key for _, key in calls]
        if None not in ids and len(set(ids)) == len(ids) and len(set(known)) == len(known):
            by_id = dict(replies)
            found.update((place, by_id[key]) for place, key in calls if key in by_id)
        elif len(ids) == len(known):
            found.update((place, content) for (place, _), (_, content) in zip(calls, replies, strict=True))
        calls.clear()
        replies.clear()

    for place, message in enumerate(messages):
        if message.get("role") == "assistant":
            if replies:
                match()
            made = enumerate(message.get("tool_calls") or ())
            calls += [((place, number), name(call, "id")) for number, call in made]
        elif message.get("role") == "tool":
            replies.append((name(message, "tool_call_id"), message.get("content")))
    match()
    return found


def _browsecomp_plus(row: Row, protocol: TagProtocol) -> Log:
    log = Log(id=_id_of(row), asked=())
    steps = _Steps(log, protocol)
    for item in row["result"]:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "reasoning":
            steps.think(item.get("output"))
        elif kind == "tool_call":
            steps.call(item.get("arguments"), item.get("output"))
        elif kind == "output_text" and item is row["result"][-1]:
            steps.answer(_part(item.get("output")))
        elif kind == "output_text":
            steps.think(item.get("output"))
        else:
            raise RecordError(f"field 'result': expected reasoning, tool_call or output_text, found {str(item)[:80]!r}")
    return log


def _part(content: Any) -> str:
    """Text of a message: a string, or a list of parts with `text`."""
    if isinstance(content, list):
        return "\n".join(_part(part) for part in content)
    if isinstance(content, Mapping):
        content = content.get("text")
    return content if isinstance(content, str) else ""


def _queries(arguments: Any) -> list[str]:
    """The queries of a tool call; none if it is no search, such as a call without arguments.

    Raises:
        RecordError: the arguments are no object.
    """
    values = _decoded(arguments or {})
    if not isinstance(values, Mapping):
        raise RecordError(f"arguments of a tool call: expected a JSON object, found {str(arguments)[:80]!r}")
    value: Any = next((values[name] for name in _QUERY_ARGUMENTS if name in values), [])
    return [
        query for query in (value if isinstance(value, list) else [value]) if isinstance(query, str) and query.strip()
    ]


def _results(content: Any, protocol: TagProtocol) -> list[Any] | None:
    """The passages of a tool's result, or lists of them, one per query; None if there is no result, or an error."""
    parts = isinstance(content, list) and all(
        isinstance(part, Mapping) and part.get("type") == "text" for part in content
    )
    value = _decoded(_part(content) if parts else content)
    if isinstance(value, Mapping):
        inner = next((value[name] for name in _RESULT_FIELDS if name in value), None)
        if inner is not None:
            return _results(inner, protocol)
        return [value] if any(name in value for name in ("document", *TEXT_FIELDS)) else None
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.strip():
        read = protocol.read_block(value) or search_r1.read_block(value)
        return [Passage(id="", title=title, text=text) for title, text in read] or [value.strip()]
    return None


def _decoded(value: Any) -> Any:
    """JSON that is written as text, decoded; other text as it is."""
    # Other text that is valid JSON, such as a number, stays text.
    if isinstance(value, str) and value.lstrip().startswith(("{", "[", '"')):
        try:
            return parse_json(value)
        except (ValueError, RecursionError):
            return value
    return value
