"""The vocabulary as data: one frozen type per kind of line in a data file (contract, section Files).

Every record is checked when it is read: schema tag, fields and types. A record of our own format with an unknown field
is refused, because a misspelt name is the most common way to lose data. Questions and passages come from other
projects; `forms` defines which of their formats are read.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, ClassVar, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.forms import QuestionForm, contents_of, question_fields

RecordType = TypeVar("RecordType", bound="Record")


_WRITERS = {
    "trajectory": "trajectories", "candidates": "candidates", "sub_answer": "sub-answers", "relevance": "relevance",
    "correctness": "correctness", "group": "groups",
}  # fmt: skip
"""Schema -> the command that writes its files."""


class StopReason(str, Enum):
    """Why a trajectory ended."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"
    MALFORMED = "malformed"
    SEARCH_FAILED = "search_failed"
    MAX_TOKENS = "max_tokens"


def since(number: int) -> Mapping[str, Any]:
    """Metadata of a field that came with schema number `number`; such a field has a default.

    It is written only if its value is not the default, and a record has the lowest schema number that holds the fields
    written. So records that do not use a new field do not change, and earlier versions read them.
    """
    return {"since": number}


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base class: converts a record to a plain dict and back, with checks."""

    schema: ClassVar[str | None] = None
    """Newest schema tag, `name/number`, of which lower numbers are read, too; None for FlashRAG's own formats."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, schema tag first, fields in declaration order."""
        unused = [name for name, item in _later(type(self)).items() if getattr(self, name) == item.default]
        values = {item.name: _plain(getattr(self, item.name)) for item in fields(self) if item.name not in unused}
        return values if self.schema is None else {"schema": self._tag()} | values

    def _tag(self) -> str:
        """The schema tag with the lowest number that holds the fields in use."""
        return f"{str(self.schema).partition('/')[0]}/{max(_numbers(self))}"

    @classmethod
    def from_dict(cls: type[RecordType], data: Any) -> RecordType:
        """Build from a parsed line.

        Raises:
            RecordError: not an object, another schema, a missing or unknown field, or a wrong type or value. The caller
                adds file and line.
        """
        if not isinstance(data, Mapping):
            raise RecordError(f"expected a JSON object, found {type(data).__name__}")
        data = dict(data)
        if cls.schema is not None:
            found, (name, _, newest) = data.pop("schema", None), cls.schema.partition("/")
            known = [f"{name}/{number}" for number in range(1, int(newest) + 1)]
            if found not in known:
                writer = f" (a file of agentic-r {_WRITERS[name]})" if name in _WRITERS else ""
                raise RecordError(f"expected schema {' or '.join(map(repr, known))}{writer}, found {found!r}")
            for key, item in _later(cls).items():
                if data.get(key) is not None and item.metadata["since"] > 1 + known.index(found):
                    raise RecordError(f"unknown field {key!r} of {found}; it came with number {item.metadata['since']}")
        try:
            return cast(RecordType, _reader(cls)(data))  # type: ignore[arg-type]
        except _Refusal as refusal:
            raise RecordError(str(refusal)) from None


def _later(cls: type) -> dict[str, Any]:
    """Fields that came with a later schema number than the record, by name."""
    known: dict[str, Any] | None = _LATER.get(cls)
    if known is None:
        known = _LATER[cls] = {item.name: item for item in fields(cls) if "since" in item.metadata}  # type: ignore[arg-type]
    return known


_LATER: dict[type, dict[str, Any]] = {}


def _numbers(record: Record) -> Iterator[int]:
    """Schema numbers that the fields in use need, those of records within the record included."""
    yield 1
    for name, item in _later(type(record)).items():
        if getattr(record, name) != item.default:
            yield item.metadata["since"]
    for inner in (value for item in fields(record) if isinstance(value := getattr(record, item.name), tuple)):
        if inner and isinstance(inner[0], Record) and _later(type(inner[0])):
            yield from (number for part in inner for number in _numbers(part))


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


class _Refusal(Exception):
    """A value that does not fit; on its way out it collects the names of the fields that lead to it."""

    def __init__(self, message: Callable[[str], str], *names: str) -> None:
        self.message, self.names = message, names

    def inside(self, name: str) -> _Refusal:
        self.names = (name, *self.names)
        return self

    def __str__(self) -> str:
        return self.message("".join(self.names).removeprefix("."))


@cache
def _reader(cls: Any) -> Callable[[Mapping[str, Any]], Any]:
    """Function that builds a record from its fields or raises `_Refusal`; cached, because it is called per passage."""
    hints, later = get_type_hints(cls), _later(cls)
    required = {item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING}
    checks = {item.name: _check(hints[item.name]) for item in fields(cls)}
    names = f"{cls.__name__} has {', '.join(checks)}"

    def read(data: Mapping[str, Any]) -> Any:
        if not data.keys() <= checks.keys():
            unknown = min(data.keys() - checks.keys())
            raise _Refusal(lambda where: f"unknown field {where and where + '.'}{unknown!r}; {names}")
        values = {}
        for name, value in data.items():
            if value is None and name in later:
                continue  # in a Parquet file, a field that a record does not use is null
            try:
                values[name] = checks[name](value)
            except _Refusal as refusal:
                raise refusal.inside(f".{name}") from None
        if not required <= values.keys():
            missing = next(name for name in checks if name in required and name not in values)
            raise _Refusal(lambda where: f"missing field {(where and where + '.') + missing!r} of {cls.__name__}")
        return cls(**values)

    return read


@cache
def _check(hint: Any) -> Callable[[Any], Any]:
    """Function that gives a value as the annotated type or raises `_Refusal`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: value
    if origin in (Union, types.UnionType):
        present = _check(next(option for option in arguments if option is not type(None)))
        return lambda value: None if value is None else present(value)
    if origin is tuple:
        return _tuple(hint, _check(arguments[0]))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return _mapping(hint, _check(arguments[1]))
    if is_dataclass(hint):
        read = _reader(hint)  # type: ignore[arg-type]
        return lambda value: read(value) if isinstance(value, Mapping) else _refuse(hint, value)
    if isinstance(hint, type) and issubclass(hint, Enum):
        values = [option.value for option in hint]  # a list, not a set: the value may not be hashable
        return lambda value: hint(value) if value in values else _refuse(hint, value)
    if hint is float:
        return lambda value: (
            float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _refuse(hint, value)
        )
    # The exact type, because in Python `True` is an int.
    return lambda value: value if type(value) is hint else _refuse(hint, value)


def _tuple(hint: Any, item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            _refuse(hint, value)
        found: list[Any] = []
        try:
            for part in value:
                found.append(item(part))
        except _Refusal as refusal:
            raise refusal.inside(f"[{len(found)}]") from None
        return tuple(found)

    return check


def _mapping(hint: Any, item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            _refuse(hint, value)
        found = {}
        for key, part in value.items():
            try:
                found[key] = item(part)
            except _Refusal as refusal:
                raise refusal.inside(f"[{key!r}]") from None
        return found

    return check


def _refuse(hint: Any, value: Any) -> NoReturn:
    raise _Refusal(
        lambda where: f"field {where!r}: expected {_name(hint)}, found {type(value).__name__} {str(value)[:80]!r}"
    )


def _name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(option.value for option in hint)
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


# --- FlashRAG's formats -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Question(Record):
    """A question with its gold answers (FlashRAG data set line)."""

    id: str
    question: str
    golden_answers: tuple[str, ...]
    """Empty for an unlabelled question, which can be asked, but neither scored nor trained on."""
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Any, form: QuestionForm | None = None) -> Question:
        """Build from any format that `forms.question_fields` reads, or from `form`; unknown fields are ignored."""
        return super().from_dict(question_fields(data, form) if isinstance(data, Mapping) else data)

    def require_label(self) -> None:
        """Raise RecordError if there is no gold answer."""
        if not self.golden_answers:
            raise RecordError(f"question {self.id!r} has no golden answers; expected at least one in 'golden_answers'")


@dataclass(frozen=True, kw_only=True)
class CorpusLine(Record):
    """A corpus line in FlashRAG's format: the first line of `contents` is the quoted title."""

    id: str
    contents: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A unit of the corpus."""

    id: str
    title: str
    text: str
    contents: str = ""
    """FlashRAG's form, `"Title"\\ntext`, as in the corpus: the string that is encoded. If it is not given, it is made
    from title and text; a one-line text without a title is used unchanged."""
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Further metadata of the corpus line, such as the source of the text."""

    def __post_init__(self) -> None:
        if not self.contents:
            object.__setattr__(self, "contents", contents_of(self.title, self.text))

    @classmethod
    def from_contents(cls, id: str, contents: str, metadata: Mapping[str, Any] | None = None) -> Passage:
        """Build from FlashRAG's form; one-line contents have no title.

        >>> Passage.from_contents("1", '""Heroes""\\nA song.').title
        '"Heroes"'
        """
        first, newline, text = contents.partition("\n")
        if not newline:
            return cls(id=id, title="", text=contents, contents=contents, metadata=metadata or {})
        title = first.strip()
        # One pair of quotes only: the title itself may be quoted.
        if len(title) > 1 and title[0] == title[-1] == '"':
            title = title[1:-1]
        return cls(id=id, title=title, text=text, contents=contents, metadata=metadata or {})


TEXT_ID = "text-"
"""Prefix of the ids of passages that a retrieval service returned without an id."""


def text_id(contents: str) -> str:
    """Id for a passage without one: a hash of its contents.

    >>> text_id("A song.")
    'text-387fb93a06af808c'
    """
    return TEXT_ID + hashlib.blake2b(contents.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ScoredPassage(Record):
    """A passage's id and the retriever's score for it."""

    id: str
    score: float


# --- Our formats ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Turn(Record):
    """One search of a trajectory."""

    turn: int
    """Counted from 1."""
    reasoning: str
    query: str
    passages: tuple[ScoredPassage, ...]
    """What the agent was shown, in order."""
    end: int = field(default=0, metadata=since(2))
    """Number of characters of the trajectory's text up to the end of this search, for agents that call tools; 0 if tags
    mark the end."""
    opened: tuple[str, ...] = field(default=(), metadata=since(2))
    """Ids of the passages that the agent opened as documents before another search showed them, in order."""


@dataclass(frozen=True, kw_only=True)
class Trajectory(Record):
    """The agent's work on one question, answered or not."""

    schema: ClassVar[str | None] = "trajectory/2"

    id: str
    question: str
    golden_answers: tuple[str, ...]
    turns: tuple[Turn, ...]
    answer: str | None
    stop_reason: StopReason
    em: int
    f1: float
    text: str
    """All that model and environment wrote after the prompt."""
    malformed_turns: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    runs: tuple[int, ...] = field(default=(), metadata=since(2))
    """Characters of the text by the model, by the environment, by the model again, ..., for agents that call tools."""


@dataclass(frozen=True, kw_only=True)
class Candidates(Record):
    """A query with the passages the previous retriever found for it, in retrieval order."""

    schema: ClassVar[str | None] = "candidates/2"

    id: str
    turn: int
    question: str
    golden_answers: tuple[str, ...]
    query: str
    history: tuple[str, ...]
    prefix: str
    """The trajectory's text up to and with this turn's closing search tag."""
    passages: tuple[ScoredPassage, ...]
    reasoning: str = field(default="", metadata=since(2))
    """The agent's reasoning of this turn, if it was kept for formulations that read it."""
    turn_start: int | None = field(default=None, metadata=since(2))
    """Characters of the prefix before its last turn, if that turn holds several searches up to this one."""
    last_shown: tuple[str, ...] = field(default=(), metadata=since(2))
    """Ids of the passages of the last search before such a turn; documents are opened by their ranks."""
    opens: int = field(default=0, metadata=since(2))
    """Calls before this search that open a document."""

    def __post_init__(self) -> None:
        if len({passage.id for passage in self.passages}) < len(self.passages):
            raise RecordError(f"query {self.key}: a passage occurs twice among its candidates")

    @property
    def key(self) -> tuple[str, int]:
        """(question id, turn): names a query everywhere."""
        return self.id, self.turn


@dataclass(frozen=True, kw_only=True)
class SubAnswer(Record):
    """The fact that a query looked for, according to the judge; None if the judge is "Not Sure"."""

    schema: ClassVar[str | None] = "sub_answer/1"

    id: str
    turn: int
    query: str
    sub_answer: str | None


@dataclass(frozen=True, kw_only=True)
class Relevance(Record):
    """Listwise relevance (LR) of one query's candidates."""

    schema: ClassVar[str | None] = "relevance/1"

    id: str
    turn: int
    scores: dict[str, int]
    """Passage id -> 0..100."""

    def __post_init__(self) -> None:
        for passage, score in self.scores.items():
            if not 0 <= score <= 100:
                raise RecordError(f"relevance of passage {passage!r}: expected 0..100, found {score}")


@dataclass(frozen=True, kw_only=True)
class Correctness(Record):
    """Outcome of continuing from a query with one candidate alone (GAC). A pruned candidate has no record."""

    schema: ClassVar[str | None] = "correctness/2"

    id: str
    turn: int
    passage_id: str
    em: int
    answer: str | None
    searches: int
    """Searches made after the candidate was shown."""
    log_likelihood: float | None = field(default=None, metadata=since(2))
    """Logarithm of the probability of the first gold answer after the candidate, if it was computed."""

    def __post_init__(self) -> None:
        if self.em not in (0, 1) or self.turn < 1 or self.searches < 0:
            raise RecordError(
                "expected em 0 or 1, turn from 1, searches from 0; "
                f"found em {self.em}, turn {self.turn}, searches {self.searches}"
            )


@dataclass(frozen=True, kw_only=True)
class Group(Record):
    """A training group: what the retriever learns from one query."""

    schema: ClassVar[str | None] = "group/2"

    id: str
    turn: int
    question: str
    query: str
    history: tuple[str, ...]
    positive: str
    """Passage id."""
    negatives: tuple[str, ...]
    """Passage ids, in sampled order."""
    reasoning: str = field(default="", metadata=since(2))
    """The agent's reasoning of this turn, if the candidates hold it."""
    weight: float = field(default=1.0, metadata=since(2))
    """Factor of this group's loss."""

    def __post_init__(self) -> None:
        if self.positive in self.negatives:
            raise RecordError(f"expected negatives without the positive, found {self.positive!r} as both")


@dataclass(frozen=True, kw_only=True)
class Judgement(Record):
    """A judge's verdict on the answer to one question (`evaluate`)."""

    schema: ClassVar[str | None] = "judgement/1"

    id: str
    answer: str | None
    correct: bool | None
    """None: no gold answer to compare with, or the judgement failed."""
    reason: str = ""
    error: str | None = None
    """Why the judgement failed."""
