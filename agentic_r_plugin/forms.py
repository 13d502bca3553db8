"""Forms of questions and passages that other projects write, as the fields of our records.

A row is one parsed JSON line or Parquet row. Fields that we do not know are left out. `null` and NaN are as good as
absent. The functions raise RecordError with the field's name; the caller adds file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from agentic_r_plugin.errors import RecordError

Row = Mapping[str, Any]

LISTS = ("gold_doc_ids", "supporting_titles", "hop_answers")
"""Metadata that our commands read, each a list of texts; checked when a question is read."""

_ANSWER_FIELDS = ("gold_answers", "golden_answer", "gold", "target")
"""Names that a file may have in place of `golden_answers`."""

_ID_FIELDS = ("id", "_id", "docid")
PASSAGE_FIELDS = (*_ID_FIELDS, "contents", "title", "text")
"""All that `passage_fields` looks at."""

_LINE_BREAKS = re.compile(r"[\r\n]+")


def absent(value: Any) -> bool:
    """Whether a field's value says nothing: null or NaN."""
    return value is None or (isinstance(value, float) and value != value)


def name_of(value: Any, field: str) -> str | None:
    """An id or title as text: `12` and `12.0` (a column of pandas with gaps) are "12". None where it is absent.

    Raises:
        RecordError: another type.
    """
    if absent(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return value
    raise RecordError(f"field {field!r}: expected text or a whole number, found {_found(value)}")


def listed(metadata: Row | None, field: str) -> list[str]:
    """A metadata field that holds a list of texts; a single text or number is a list of one, an absent field is empty.

    Raises:
        RecordError: another type.

    >>> listed({"gold_doc_ids": "12"}, "gold_doc_ids"), listed({"gold_doc_ids": [3, None]}, "gold_doc_ids")
    (['12'], ['3'])
    """
    value = _plain((metadata or {}).get(field))
    values = value if isinstance(value, list | tuple) else [value]
    names = [name_of(item, f"metadata.{field}") for item in values]
    return [name for name in names if name is not None]


def answers(value: Any, field: str = "golden_answers") -> list[str]:
    """Gold answers: a text is one answer, a list holds several; `{"target"}`, `{"text"}` and `{"value", "aliases"}` of
    other data sets hold either. Blank and absent answers are left out.

    A whole number is taken as it is written: 1921 is "1921". `1921.0` and `true` are refused, because "1921.0" and
    "True" are hardly the answers that were meant.

    Raises:
        RecordError: another type.
    """
    value = _plain(value)
    if isinstance(value, Mapping):
        parts = [value.get(name) for name in ("target", "text", "value", "aliases")]
        found = [answer for part in parts for answer in answers(part, field)]
        if not found and any(not absent(item) for item in value.values()):
            raise RecordError(f"field {field!r}: expected text or a list of texts, found {_found(value)}")
        return _unique(found)
    if isinstance(value, list | tuple):
        return [answer for item in value for answer in _answer(item, field)]
    if isinstance(value, str) and value.lstrip().startswith("[") and _is_json_list(value):
        raise RecordError(f"field {field!r}: expected a list, found a list that is written as text: {value[:80]!r}")
    return _answer(value, field)


def _answer(value: Any, field: str) -> list[str]:
    if absent(value):
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        return [str(value)]
    if isinstance(value, str):
        return [value] if value.strip() else []
    raise RecordError(f"field {field!r}: expected text, found {_found(value)}; write each answer as text")


def _is_json_list(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list)
    except (ValueError, RecursionError):
        return False


def _plain(value: Any) -> Any:
    """A NumPy array, as frameworks hand it on, as a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _found(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:80]!r}"


# --- Questions --------------------------------------------------------------------------------------------------------


def question_fields(row: Row) -> dict[str, Any]:
    """`id`, `question`, `golden_answers` and `metadata` of a question, in FlashRAG's form or one of `QUESTION_FORMS`.

    FlashRAG's fields are taken as they are; an answer that is a place in the list `choices` becomes that choice. Where
    they are absent, those of Search-R1's and verl's Parquet are taken: the question from `extra_info` or from the last
    user message of `prompt` (after its last "Question:"), the answers from `reward_model.ground_truth`, the id from
    `data_source`, `extra_info.split` and `extra_info.index`.

    Raises:
        RecordError: no id or question, a field of a wrong type, or a field whose name is nearly one of ours.
    """
    for form in QUESTION_FORMS:
        if form.has <= row.keys() and not form.lacks & row.keys():
            row = form.parse(row)
            break
    if other := _misnamed(tuple(row)):
        raise RecordError(f"unknown field {other!r} and no 'golden_answers'; rename it to 'golden_answers'")
    info = _mapping(row.get("extra_info"))
    golden = golden_answers(row) or answers(info.get("golden_answers"), "extra_info.golden_answers")
    if not golden:
        golden = answers(_mapping(row.get("reward_model")).get("ground_truth"), "reward_model.ground_truth")
    return {
        "id": name_of(row.get("id"), "id") or name_of(info.get("id"), "extra_info.id") or place(row),
        "question": _question(row, info),
        "golden_answers": golden,
        "metadata": _metadata(row.get("metadata")),
    }


def place(row: Row) -> str:
    """Where a row of Search-R1 comes from: its data source, split and index, which together name it.

    Raises:
        RecordError: it does not say.
    """
    info = _mapping(row.get("extra_info"))
    parts = [name_of(part, "extra_info") for part in (row.get("data_source"), info.get("split"), info.get("index"))]
    if absent(info.get("index")):
        raise RecordError(
            f"missing field 'id', found only {', '.join(map(repr, row))}; give every question an id of its own: "
            "outputs and resumed work know it by that"
        )
    return "/".join(part for part in parts if part is not None)


# Forms of other data sets, each made a row in FlashRAG's fields. The first one that fits is taken.


@dataclass(frozen=True, kw_only=True)
class QuestionForm:
    """One form of question row, known by the fields that it has and lacks."""

    has: frozenset[str]
    lacks: frozenset[str] = frozenset({"golden_answers"})
    parse: Callable[[Row], dict[str, Any]]


def _hotpotqa(row: Row) -> dict[str, Any]:
    """HotpotQA and 2WikiMultihopQA: supporting facts are [title, sentence] pairs, on the hub a dict of two lists."""
    facts = _plain(row["supporting_facts"])
    if not isinstance(facts, Mapping):
        pairs = facts if isinstance(facts, list) else ()
        facts = {"title": [fact[0] for fact in pairs if isinstance(fact, list | tuple) and fact]}
    metadata = {"supporting_titles": _unique(listed(facts, "title")), **{k: row.get(k) for k in ("type", "level")}}
    return _row(row, id=row.get("_id", row.get("id")), golden_answers=row.get("answer"), metadata=metadata)


def _musique(row: Row) -> dict[str, Any]:
    """MuSiQue: the decomposition has the answer of every hop."""
    golden = [*answers(row.get("answer")), *answers(row.get("answer_aliases"))]
    supporting = [item for item in _mappings(row.get("paragraphs")) if item.get("is_supporting")]
    metadata = {
        "supporting_titles": _unique(title for item in supporting for title in listed(item, "title")),
        "hop_answers": [hop.get("answer") for hop in _mappings(row["question_decomposition"])],
        "answerable": row.get("answerable"),
    }
    return _row(row, golden_answers=_unique(golden), metadata=metadata)


def _browsecomp_plus(row: Row) -> dict[str, Any]:
    """BrowseComp-Plus: gold documents hold the answer, evidence documents what leads to it."""
    metadata = {
        f"{kind}_doc_ids": [name for item in _mappings(row.get(f"{kind}_docs")) for name in listed(item, "docid")]
        for kind in ("gold", "evidence")
    }
    return _row(
        row, id=row["query_id"], question=row["query"], golden_answers=row.get("answer"), metadata=metadata
    )  # fmt: skip


def _beir(row: Row) -> dict[str, Any]:
    """BEIR's queries, which have no answers."""
    return _row(row, id=row["_id"], question=row["text"], golden_answers=None)


def _answer_column(row: Row) -> dict[str, Any]:
    """Sets of the hub with `answer` or `answers` (SQuAD, Natural Questions, TriviaQA)."""
    identifier = next((row[name] for name in ("id", "_id", "question_id") if not absent(row.get(name))), None)
    return _row(row, id=identifier, golden_answers=row["answers"] if "answers" in row else row["answer"])


def _row(row: Row, **fields: Any) -> dict[str, Any]:
    return {name: row.get(name) for name in ("id", "question", "metadata", "choices")} | fields


def _mappings(value: Any) -> list[Row]:
    value = _plain(value)
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


QUESTION_FORMS = (
    QuestionForm(has=frozenset({"question", "answer", "supporting_facts"}), parse=_hotpotqa),
    QuestionForm(has=frozenset({"question", "question_decomposition"}), parse=_musique),
    QuestionForm(has=frozenset({"query_id", "query"}), parse=_browsecomp_plus),
    QuestionForm(has=frozenset({"_id", "text"}), lacks=frozenset({"golden_answers", "question", "title"}), parse=_beir),
    QuestionForm(has=frozenset({"question", "answers"}), parse=_answer_column),
    QuestionForm(has=frozenset({"question", "answer"}), parse=_answer_column),
)


def golden_answers(row: Row) -> list[str]:
    """FlashRAG's gold answers; in its multiple-choice sets they are places (from 0) in `choices`.

    Raises:
        RecordError: another type, or no such place.
    """
    golden, choices = _plain(row.get("golden_answers")), _plain(row.get("choices"))
    if not choices or not isinstance(choices, list):
        return answers(golden)
    golden = golden if isinstance(golden, list) else [golden]
    places = [place for place in golden if isinstance(place, int) and not isinstance(place, bool)]
    if any(not 0 <= place < len(choices) for place in places):
        raise RecordError(f"field 'golden_answers': expected places in the {len(choices)} choices, found {golden}")
    return answers([choices[item] if item in places else item for item in golden])


def _question(row: Row, info: Row) -> str:
    for value in (row.get("question"), info.get("question")):
        if isinstance(value, str) and value.strip():
            return value
        if not absent(value) and not isinstance(value, str):
            raise RecordError(f"field 'question': expected text, found {_found(value)}")
    prompt = _plain(row.get("prompt"))
    if isinstance(prompt, list):
        asked = [_mapping(message).get("content") for message in prompt if _mapping(message).get("role") == "user"]
        prompt = asked[-1] if asked else None
    if isinstance(prompt, str):
        _, marker, question = prompt.rpartition("Question:")
        if marker and question.strip():
            return question.strip()
    found = "an empty one" if "question" in row else f"only {', '.join(map(repr, row))}"
    raise RecordError(f"expected a text field 'question' (or a prompt with 'Question:'), found {found}")


def _metadata(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.strip():  # our Parquet keeps it as text
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    if absent(value) or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise RecordError(f"field 'metadata': expected an object, found {_found(value)}; rename or drop this field")
    metadata: dict[str, Any] = _without_absent(value)
    return metadata | {field: listed(metadata, field) for field in LISTS if field in metadata}


def _without_absent(value: Any) -> Any:
    """Parquet gives every object the keys of all rows, and null where a row has none."""
    if isinstance(value, Mapping):
        return {key: _without_absent(item) for key, item in value.items() if not absent(item)}
    if isinstance(value, list | tuple):
        return [_without_absent(item) for item in value]
    return value


def _mapping(value: Any) -> Row:
    return value if isinstance(value, Mapping) else {}


@lru_cache(maxsize=256)
def _misnamed(names: tuple[str, ...]) -> str | None:
    """The field that was surely meant to be `golden_answers`: without it, all questions would go without answers."""
    if {"golden_answers", "reward_model", "extra_info"} & set(names):
        return None
    near = get_close_matches("golden_answers", names, n=1, cutoff=0.8)
    return next(iter(near + [name for name in _ANSWER_FIELDS if name in names]), None)


# --- Passages ---------------------------------------------------------------------------------------------------------


def contents_of(title: str, text: str) -> str:
    """FlashRAG's form of a passage, `"Title"\\ntext`; text of one line without a title is its own contents."""
    return text if not title and "\n" not in text else f'"{title}"\n{text}'


def passage_fields(row: Any) -> tuple[str, str]:
    """(id, contents) of a passage.

    Read: FlashRAG's `{id, contents}`, `{id, title, text}` and `{id, text}`, BEIR's `{_id, title, text}` and Tevatron's
    `{docid, title, text}`. Contents, where there are any, are the passage whatever title and text say.

    Raises:
        RecordError: no id, or neither contents nor text, or a wrong type.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"expected a JSON object, found {type(row).__name__}")
    identifier = next((name for field in _ID_FIELDS if (name := name_of(row.get(field), field)) is not None), None)
    if identifier is None:
        raise RecordError(f"expected an id in field 'id' ('_id', 'docid'), found only {', '.join(map(repr, row))}")
    if contents := _text(row, "contents"):
        return identifier, contents
    if not {"contents", "text"} & row.keys():
        raise RecordError(
            f"expected text in field 'contents', or in 'text' next to 'title', found only {', '.join(map(repr, row))}; "
            "rename the field that holds it"
        )
    title = name_of(row.get("title"), "title") or ""
    return identifier, contents_of(_LINE_BREAKS.sub(" ", title), _text(row, "text"))


def _text(row: Row, field: str) -> str:
    """A passage's text; absent text is empty: the passage must stay, since row i of an index belongs to line i."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    if absent(value):
        return ""
    raise RecordError(f"field {field!r}: expected text, found {_found(value)}")
