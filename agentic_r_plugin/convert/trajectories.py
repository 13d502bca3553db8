"""`agentic-r convert trajectories`: other agents' logs as trajectories, so that data construction works on them.

| form | known by | one trajectory |
|---|---|---|
| chat | `messages` | OpenAI's messages with tool calls; reasoning in `reasoning_content` or `<think>` |
| dump | `input`, `output` | Search-R1's and verl's rollout dumps: text with the protocol's tags |
| BrowseComp-Plus | `query_id`, `result` | a run file: reasoning, tool calls and the final text |

`trajectory` does the same for anything else, from Python.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from agentic_r_plugin.answers import exact_match, f1
from agentic_r_plugin.config import BY_CONTENTS, FREE, LATER
from agentic_r_plugin.convert.hub import HubConfig, push_file
from agentic_r_plugin.convert.output import convert_once
from agentic_r_plugin.convert.passages import PassageFinder
from agentic_r_plugin.errors import RecordError, SearchError
from agentic_r_plugin.forms import absent, name_of
from agentic_r_plugin.protocol import Finished, Search
from agentic_r_plugin.questions import FORMAT, read_questions
from agentic_r_plugin.records import Passage, Question, ScoredPassage, StopReason, Trajectory, Turn, text_id
from agentic_r_plugin.search.base import Hit
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.search.wire import decode_hit
from agentic_r_plugin.storage.lookup import HashSet, KeyedRecords, key_hash
from agentic_r_plugin.store import atomic_path, dump_line, parse_json, read_lines, shards, write_records
from agentic_r_plugin.tags import TagProtocol, search_r1, with_tags

Row = Mapping[str, Any]
Step = tuple[str, str, Sequence[Any]]
"""One search: reasoning, query, and the passages shown (`Passage`, `Hit`, an object with id and text, or text)."""

_QUERY_ARGUMENTS = ("query", "q", "search_query", "queries", "query_list")
"""Arguments of a tool call that make it a search; a call without them (a calculator, a page by id) is left out."""

_RESULT_FIELDS = ("result", "results", "documents", "passages", "hits")
_TEXT_FIELDS = ("text", "contents", "snippet", "content", "page_content")
_EXACT_ANSWER = re.compile(r"(?:\*\*)?Exact Answer:(?:\*\*)?\s*(.+?)\s*$", re.MULTILINE)
"""How BrowseComp-Plus asks for the answer in the final text."""

_END_TOKENS = re.compile(r"(\s*<[|｜][^<>]+[|｜]>)+\s*$")


@dataclass(frozen=True, kw_only=True)
class ConvertTrajectoriesConfig(HubConfig):
    """Write other agents' logs as trajectories."""

    in_: str = field(metadata={"help": "log file, or a folder of them", **BY_CONTENTS})
    out: str = field(metadata={"help": "trajectories file to write", **FREE})
    corpus: str = field(metadata={"help": "corpus in which the passages are found by id or text", **BY_CONTENTS})
    questions: str = field(
        default="",
        metadata={"help": "questions with gold answers, joined by id or text; empty: from the log", **BY_CONTENTS},
    )
    format: str = field(default="", metadata={**FORMAT, **LATER})
    protocol: str = field(default="search_r1", metadata={"help": "registered agent_protocol to write them in"})


def trajectory(
    question: Question,
    steps: Iterable[Step],
    answer: str | None,
    *,
    reasoning: str = "",
    protocol: TagProtocol = search_r1,
    finder: PassageFinder | None = None,
) -> Trajectory:
    """The record of an agent that searched in `steps` and then answered.

    Args:
        steps: (reasoning, query, passages) of each search.
        answer: None if there is none.
        reasoning: before the answer.
        protocol: the form of `Trajectory.text`, with which `candidates` and `correctness` must be run.
        finder: finds the passages in the corpus; None keeps them as they are.

    Raises:
        RecordError: no query, a passage without text, or words that the protocol's tags make ambiguous.
    """
    text, found, queries = "", [], []
    for thought, query, passages in steps:
        hits = _found(passages, finder)
        text += protocol.write(thought, protocol.search_tag, query.strip())
        text += protocol.render([hit.passage for hit in hits])
        found.append(hits)
        queries.append(query.strip())
    if answer is not None:
        text += protocol.write(reasoning, protocol.answer_tag, answer.strip())
    record = _record(question, text, protocol, lambda number, _: found[number])
    read = ([turn.query for turn in record.turns], record.answer)
    if read != (queries, answer.strip() if answer is not None else None):
        raise RecordError(
            f"the text in the form of agent protocol {protocol.name!r} is not read as it was meant: expected queries "
            f"and answer {queries}, {answer!r}, found {read[0]}, {read[1]!r}; do they hold its tags?"
        )
    return record


def trajectory_from_text(
    question: Question, text: str, *, protocol: TagProtocol = search_r1, finder: PassageFinder | None = None
) -> Trajectory:
    """The record of what model and environment wrote after the prompt, in the protocol's form; the text is kept.

    Raises:
        RecordError: neither a search nor an answer of this protocol.
    """

    def shown(number: int, block: str) -> list[Hit]:
        read = protocol.read_block(block) or ([("", block.strip())] if block.strip() else [])
        return _found([Passage(id="", title=title, text=text) for title, text in read], finder)

    record = _record(question, text, protocol, shown)
    if not record.turns and record.answer is None:
        raise RecordError(f"neither a search nor an answer of agent protocol {protocol.name!r} in {text[:80]!r}")
    return record


def _record(question: Question, text: str, protocol: TagProtocol, shown: Callable[[int, str], list[Hit]]) -> Trajectory:
    *exchanges, (rest, _) = protocol.exchanges(text)
    turns = []
    for number, (written, block) in enumerate(exchanges):
        action = protocol.parse(written.rpartition(protocol.correction)[2])
        if not isinstance(action, Search):
            raise RecordError(f"search {number + 1}: expected a query, found {written[-80:]!r}")
        passages = tuple(ScoredPassage(id=hit.passage.id, score=hit.score) for hit in shown(number, block or ""))
        turns.append(Turn(turn=number + 1, reasoning=action.reasoning, query=action.query, passages=passages))
    last = protocol.parse(rest.rpartition(protocol.correction)[2])
    answer = last.answer if isinstance(last, Finished) else None
    # Why an agent stopped without an answer is not in its log: after a search it had no turn left.
    stopped = StopReason.MALFORMED if rest.strip() and not isinstance(last, Search) else StopReason.MAX_TURNS
    return Trajectory(
        id=question.id,
        question=question.question,
        golden_answers=question.golden_answers,
        turns=tuple(turns),
        answer=answer,
        stop_reason=stopped if answer is None else StopReason.ANSWERED,
        em=int(exact_match(answer, question.golden_answers)),
        f1=f1(answer, question.golden_answers),
        text=text,
        malformed_turns=text.count(protocol.correction),
    )


def _found(passages: Iterable[Any], finder: PassageFinder | None) -> list[Hit]:
    hits = []
    for rank, item in enumerate(passages):
        hit = item if isinstance(item, Hit) else _hit(item, f"passage {rank + 1}")
        passage = finder.find(hit.passage) if finder is not None else hit.passage
        if passage is None or not passage.id:
            passage = Passage(
                id=text_id(hit.passage.contents), title=hit.passage.title, text=hit.passage.text
            )  # fmt: skip
        hits.append(Hit(passage=passage, score=hit.score))
    return hits


def _hit(item: Any, where: str) -> Hit:
    if isinstance(item, Passage):
        return Hit(passage=item, score=0.0)
    if isinstance(item, Mapping) and "document" not in item:
        text = next((item[name] for name in _TEXT_FIELDS if isinstance(item.get(name), str)), "")
        item = {**item, "text": text} if "contents" not in item else item
    try:
        return decode_hit(item, where)
    except SearchError as error:
        raise RecordError(str(error)) from error


# --- Forms of logs ----------------------------------------------------------------------------------------------------


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
        if len(queries) == 1 and not (results and isinstance(results[0], list)):
            results = [results]
        if len(results) != len(queries):
            raise RecordError(f"expected {len(queries)} results, one per query, found {len(results)}")
        for query, passages in zip(queries, results, strict=True):
            self.log.steps.append((self._reasoning(), query, passages))

    def answer(self, text: str) -> None:
        """The final text: an answer in the protocol's tags, after "Exact Answer:", or the whole of it.

        A search in tags was not carried out, and an answer that is cut off is none.
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
        return [value] if any(name in value for name in ("document", *_TEXT_FIELDS)) else None
    if isinstance(value, list):
        return value
    if isinstance(value, str) and value.strip():
        read = protocol.read_block(value) or search_r1.read_block(value)
        return [Passage(id="", title=title, text=text) for title, text in read] or [value.strip()]
    return None


def _decoded(value: Any) -> Any:
    """JSON that is written as text, decoded; other text as it is."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[", '"')):
        try:
            return parse_json(value)
        except (ValueError, RecursionError):
            return value
    return value


# --- The command ------------------------------------------------------------------------------------------------------


class _Questions:
    """Questions by id and by text; without a file, each row's own."""

    def __init__(self, path: str, format: str, folder: Path) -> None:
        reader = partial(read_questions, format=format)
        self._by_id, self._by_text = (
            KeyedRecords(path, Question, key, many=True, folder=folder, reader=reader)
            for key in (lambda question: question.id, lambda question: _words(question.question))
        )
        self._path = path

    def find(self, log: Log, row: Row) -> Question:
        """The question of a log.

        An id is trusted if the user's message, where there is one, holds the question: logs number from zero again.

        Raises:
            RecordError: there is none, or (without a file) the row lacks id, question or a field's type is wrong.
        """
        whole, asked = "\n".join(log.asked), list[str]()
        if log.asked:
            _, marker, marked = whole.rpartition("Question:")
            question_text = marked if marker else log.asked[-1]
            asked = [whole, question_text, re.split(r"\n|<[|｜]", question_text.strip())[0]]
        if not self._path:
            own: dict[str, Any] = {"question": asked[-1] if asked else None} | {
                key: row[key] for key in row if key not in ("input", "output", "messages")
            }
            return Question.from_dict(own)
        for question in self._by_id.find(log.id) if log.id is not None else ():
            if not log.asked or _words(question.question) in _words(whole):
                return question
        for text in asked:
            for question in self._by_text.find(_words(text)):
                return question
        raise RecordError(
            f"no question with id {log.id!r} or text {asked[-1][:80] if asked else None!r} in {self._path}"
        )

    def close(self) -> None:
        """Close both lookups."""
        self._by_id.close()
        self._by_text.close()


def _words(text: str) -> str:
    return " ".join(text.split())


def run(config: ConvertTrajectoriesConfig, *, resume: bool = False) -> None:
    """Run the command `convert trajectories`.

    A record that cannot be read is kept apart in `OUT.errors.jsonl`; of several trajectories of a question the first is
    written.

    Raises:
        RecordError: no record could be read.
        BackendError: the upload failed; the file is written and whole.
    """
    inputs = {"in": config.in_, "corpus": config.corpus, "questions": config.questions}
    report = convert_once(config, lambda out: _write(config, out), inputs=inputs, resume=resume)
    rows = report["trajectories"]
    text = (
        f"# Trajectories of a search agent\n\n{rows} trajectories with {report['searches']} searches, written by "
        f"`agentic-r convert trajectories` in the form of agent protocol `{config.protocol}`: `text` is what model and "
        "environment wrote after the prompt, `turns` holds each query and the ids and scores of its passages."
    )
    push_file(config, text, rows=rows, task="question-answering", tags=["trajectories"])


def _write(config: ConvertTrajectoriesConfig, out: Path) -> dict[str, Any]:
    counts = Counter(dict.fromkeys(("read", "trajectories", "errors", "repeated", "searches", "calls_left_out"), 0))
    first_error: str | None = None
    errors_file = out.with_name(out.name + ".errors.jsonl")
    protocol = with_tags(config.protocol)
    with ExitStack() as stack:
        corpus = stack.enter_context(Corpus(config.corpus))
        finder = stack.enter_context(closing(PassageFinder(corpus, out.parent)))
        questions = stack.enter_context(closing(_Questions(config.questions, config.format, out.parent)))
        errors = stack.enter_context(stack.enter_context(atomic_path(errors_file)).open("wb"))
        seen = HashSet()

        def converted() -> Iterator[Trajectory]:
            nonlocal first_error
            for place, row in _rows(config.in_):
                counts["read"] += 1
                try:
                    if isinstance(row, RecordError):
                        raise row
                    if not isinstance(row, Mapping):
                        raise RecordError(f"expected a JSON object, found {type(row).__name__}")
                    log = read_log(row, protocol)
                    question = questions.find(log, row)
                    if (hashed := key_hash(question.id)) in seen:
                        counts["repeated"] += 1
                        continue
                    record = _of_log(question, log, protocol, finder)
                except RecordError as error:
                    counts["errors"] += 1
                    first_error = first_error or f"{place}: {error}"
                    errors.write(dump_line({"unit": place, "error": str(error)}))
                    continue
                seen.add(hashed)
                counts["trajectories"] += 1
                counts["searches"] += len(record.turns)
                counts["calls_left_out"] += log.left_out
                yield record

        write_records(out, converted())
        if not counts["trajectories"]:
            out.unlink()
            raise RecordError(f"none of {counts['read']} records could be read; first, {first_error}", path=config.in_)
    if first_error is None:
        errors_file.unlink()
    return {**counts, "first_error": first_error, "passages": finder.counts}


def _of_log(question: Question, log: Log, protocol: TagProtocol, finder: PassageFinder) -> Trajectory:
    if log.text is not None:
        return trajectory_from_text(question, log.text, protocol=protocol, finder=finder)
    return trajectory(question, log.steps, log.answer, reasoning=log.reasoning, protocol=protocol, finder=finder)


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    for shard in shards(path):
        for number, row in read_lines(shard, keep_errors=True):
            yield f"{shard}:{number}", row
