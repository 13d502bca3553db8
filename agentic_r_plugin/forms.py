"""Formats of questions and passages written by other projects, converted to the fields of our records.

A row is one parsed JSON line or Parquet row. Unknown fields are ignored. `null` and NaN count as absent. The functions
raise RecordError with the name of the field; the caller adds file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.field_values import (
    Row,
    absent,
    answers,
    column_value,
    decoded_text,
    described,
    field_names,
    listed,
    mapping,
    mappings,
    name_of,
    plain,
    unique,
    without_absent,
)

LISTS = ("gold_doc_ids", "supporting_titles", "hop_answers")
"""Metadata fields that our commands use, each a list of texts; checked when a question is read."""

_ANSWER_FIELDS = ("gold_answers", "golden_answer", "gold", "target")
"""Field names accepted in place of `golden_answers`."""

_GOLD_FIELDS = ("answers", "answer", "possible_answers", "ground_truth")
"""Gold answers of other data sets (SQuAD, TriviaQA, MS MARCO, PopQA), read if `golden_answers` is absent."""

_QUESTION_IDS = ("id", "_id", "question_id", "query_id")
ID_FIELDS = ("id", "_id", "docid")
"""Fields that hold a passage's id, the first that is there."""

PASSAGE_FIELDS = (*ID_FIELDS, "contents", "title", "text")
"""All fields that `passage_fields` reads."""

_MESSAGES = re.compile(r"""\s*(array\()?\[\s*\{\s*["'](role|content)["']""")
"""How a list of chat messages that is written as text begins."""

_FRONT_TITLE = re.compile(r"---\r?\ntitle:[ \t]*(\S.*?)[ \t\r]*\n")
"""The title in the front matter with which a text begins."""

_LINE_BREAKS = re.compile(r"[\r\n]+")


# --- Questions --------------------------------------------------------------------------------------------------------


def question_fields(row: Row, form: QuestionForm | None = None) -> dict[str, Any]:
    """`id`, `question`, `golden_answers` and `metadata` of a question.

    FlashRAG's fields are used as they are; an answer that is an index into the list `choices` becomes that choice. If
    they are absent, those of Search-R1's and verl's Parquet are used: the question from `extra_info` or from the last
    user message of `prompt` (after its last "Question:"), the answers from `reward_model.ground_truth`, the id from
    `data_source`, `extra_info.split` and `extra_info.index`.

    Args:
        form: format of the row; None: the first of `QUESTION_FORMS` whose fields it has.

    Raises:
        RecordError: no id or question, a field of the wrong type, a field whose name is nearly one of ours, or a row
            without the fields of `form`.
    """
    if form is not None and (missing := sorted(form.has - row.keys())):
        raise RecordError(f"expected a field {missing[0]!r}, as format={form.name} says, found only {field_names(row)}")
    # Dropped before the form is chosen: `golden_answers: null` next to `answer` must not hide the answer.
    row = {name: value for name, value in row.items() if not absent(value)}
    form = form or next((f for f in QUESTION_FORMS if f.has <= row.keys() and not f.lacks & row.keys()), None)
    if form is not None:
        row |= form.parse(row)
    if not answers(row.get("golden_answers")):
        given = (row[name] for name in _GOLD_FIELDS if name in row and answers(row[name], name))
        row |= {"golden_answers": found} if (found := next(given, None)) is not None else {}
    info = mapping(row, "extra_info")
    golden = golden_answers(row) or answers(info.get("golden_answers"), "extra_info.golden_answers")
    if not golden:
        golden = answers(mapping(row, "reward_model").get("ground_truth"), "reward_model.ground_truth")
    if not golden and (other := _misnamed(tuple(name for name, value in row.items() if not absent(value)))):
        raise RecordError(f"unknown field {other!r} and no 'golden_answers'; rename it to 'golden_answers'")
    return {
        "id": _question_id(row) or name_of(info.get("id"), "extra_info.id") or place(row),
        "question": _question(row, info),
        "golden_answers": golden,
        "metadata": _metadata(row.get("metadata")),
    }


def _question_id(row: Row) -> str | None:
    return next(filter(None, (name_of(row.get(field), field) for field in _QUESTION_IDS)), None)


def place(row: Row) -> str:
    """Origin of a row in a file of several data sets: Search-R1's data source, split and index, which together identify
    it; without an index, data source and id.

    Raises:
        RecordError: neither an index nor an id.
    """
    info = mapping(row, "extra_info")
    parts = [name_of(row.get("data_source"), "data_source")]
    if not absent(info.get("index")):
        parts += [name_of(info.get(field), f"extra_info.{field}") for field in ("split", "index")]
    elif (identifier := _question_id(row)) is not None:
        parts.append(identifier)
    else:
        if all(isinstance(value, list | Mapping) for value in row.values()):
            raise RecordError(f"expected a question, found an object of {field_names(row)}; give its questions alone")
        empty = row.get("id") is not None
        problem = "field 'id' is empty" if empty else f"missing field 'id', found only {field_names(row)}"
        raise RecordError(
            f"{problem}; give each question an id, which "
            "outputs and resumed work refer to, or name its column (format=question=COLUMN,id=COLUMN)"
        )
    return "/".join(part for part in parts if part is not None)


# Formats of other data sets, each converted to FlashRAG's fields. The first match is used.


@dataclass(frozen=True, kw_only=True)
class QuestionForm:
    """One format of question rows, recognised by the fields that it has and lacks."""

    name: str
    has: frozenset[str]
    lacks: frozenset[str] = frozenset({"golden_answers"})
    """Not checked if the format is named in a setting."""
    numbered: bool = False
    """Whether rows without an id get their place in the file."""
    parse: Callable[[Row], dict[str, Any]] = lambda _: {}


def _hotpotqa(row: Row) -> dict[str, Any]:
    """HotpotQA and 2WikiMultihopQA."""
    return {"metadata": _named_gold(row) | {key: row.get(key) for key in ("type", "level")}}


def _musique(row: Row) -> dict[str, Any]:
    """MuSiQue: an answer with aliases."""
    golden = [*answers(row.get("answer")), *answers(row.get("answer_aliases"))]
    return {"golden_answers": unique(golden), "metadata": _named_gold(row) | {"answerable": row.get("answerable")}}


def _named_gold(row: Row) -> dict[str, list[Any]]:
    """Titles of gold documents and the answer of every hop, where a row (or FlashRAG's metadata) names them.

    HotpotQA's and 2WikiMultihopQA's supporting facts are [title, sentence] pairs, on the hub a dict of two lists.
    2WikiMultihopQA's evidences are triples that end with the answer of a hop. MuSiQue marks supporting paragraphs and
    decomposes the question. Each may be written as JSON text.
    """
    facts, evidences = (_decoded(row, field) for field in ("supporting_facts", "evidences"))
    found: dict[str, list[Any]] = {}
    if facts is not None:
        found["supporting_titles"] = unique(
            listed(facts if isinstance(facts, Mapping) else {"title": _at(facts, 0)}, "title")
        )
    elif "question_decomposition" in row:
        paragraphs = [item for item in mappings(row.get("paragraphs")) if item.get("is_supporting")]
        found["supporting_titles"] = unique(title for item in paragraphs for title in listed(item, "title"))
    if isinstance(evidences, Mapping):
        found["hop_answers"] = listed(evidences, "entity")
    elif evidences:
        found["hop_answers"] = _at(evidences, 2) or [item.get("entity") for item in mappings(evidences)]
    elif "question_decomposition" in row:
        found["hop_answers"] = [item.get("answer") for item in mappings(row["question_decomposition"])]
    return found


def _decoded(row: Row, field: str) -> Any:
    value = plain(row.get(field))
    return decoded_text(value, field) if isinstance(value, str) else value


def _at(rows: Any, place: int) -> list[Any]:
    """One item of each list in a list."""
    rows = map(plain, rows if isinstance(rows, list) else ())
    return [row[place] for row in rows if isinstance(row, list | tuple) and len(row) > place]


def _browsecomp_plus(row: Row) -> dict[str, Any]:
    """BrowseComp-Plus: gold documents hold the answer, evidence documents lead to it. Also MS MARCO's queries."""
    metadata = {
        f"{kind}_doc_ids": [name for item in mappings(row.get(f"{kind}_docs")) for name in listed(item, "docid")]
        for kind in ("gold", "evidence")
        if f"{kind}_docs" in row
    }
    named = {"id": row.get("query_id"), "question": row.get("query")}
    return named | {"metadata": metadata | dict(mapping(row, "metadata"))}


_NAMED_GOLD = frozenset({"supporting_facts", "evidences", "question_decomposition"})

QUESTION_FORMS = (
    QuestionForm(name="flashrag", has=frozenset({"question", "golden_answers"}), lacks=frozenset()),
    QuestionForm(name="hotpotqa", has=frozenset({"question", "supporting_facts"}), parse=_hotpotqa),
    QuestionForm(name="musique", has=frozenset({"question", "question_decomposition"}), parse=_musique),
    QuestionForm(name="browsecomp_plus", has=frozenset({"query_id", "query"}), parse=_browsecomp_plus),
    QuestionForm(
        name="beir",
        has=frozenset({"_id", "text"}),
        lacks=frozenset({"golden_answers", "question"}),
        parse=lambda row: {"question": row.get("text")},
    ),
    QuestionForm(name="search_r1", has=frozenset({"prompt", "reward_model"})),
)

_COLUMNS = ("question", "answers", "id", *LISTS)
"""What columns of any data set can be mapped to."""


def question_form(text: str) -> QuestionForm | None:
    """The format that a setting `format` names; None if it is empty.

    Args:
        text: a name of `QUESTION_FORMS`, or `question=COLUMN,answers=COLUMN,id=COLUMN` with the columns of any data
            set; `a.b` is field b of column a, or of each object in it if it is a list. `gold_doc_ids`,
            `supporting_titles` and `hop_answers` can be mapped, too.

    Raises:
        ConfigError: an unknown name, or no column for the question.

    >>> form = question_form("question=q.text,answers=a.aliases,id=key")
    >>> question_fields({"key": 7, "q": {"text": "Who?"}, "a": {"value": "x", "aliases": ["y", "z"]}}, form)
    {'id': '7', 'question': 'Who?', 'golden_answers': ['y', 'z'], 'metadata': {}}
    """
    if not text:
        return None
    names = {form.name: form for form in QUESTION_FORMS}
    if "=" not in text and text in names:
        return names[text]
    columns = {name.strip(): path.strip() for name, _, path in (part.partition("=") for part in text.split(","))}
    if "question" not in columns or not all(columns.values()) or not set(columns) <= set(_COLUMNS):
        raise ConfigError(
            f"format={text}: expected one of {', '.join(names)}, or question=COLUMN with any of "
            f"{', '.join(f'{name}=COLUMN' for name in _COLUMNS[1:])}, separated by commas"
        )

    def parse(row: Row) -> dict[str, Any]:
        values = {name: column_value(row, path) for name, path in columns.items()}
        # All other fields become absent, so that only the named columns count.
        return dict.fromkeys(row) | {
            "id": values.get("id") if "id" in values else _question_id(row),
            "question": values["question"],
            "golden_answers": values.get("answers"),
            "metadata": {name: values[name] for name in LISTS if name in values},
        }

    has = frozenset(path.partition(".")[0] for path in columns.values())
    return QuestionForm(name=text, has=has, numbered="id" not in columns, parse=parse)


def has_question_id(row: Row) -> bool:
    """Whether a row has one of the fields that hold a question's id."""
    return any(not absent(row.get(field)) for field in _QUESTION_IDS)


def context_documents(row: Row) -> list[dict[str, Any]]:
    """Documents in a question's own row, as `{id, title, text, gold}`, the id empty if there is none.

    HotpotQA and 2WikiMultihopQA: `context`, pairs of title and sentences (on the hub two lists), gold if the title is a
    supporting one. MuSiQue: `paragraphs`. BrowseComp-Plus: `gold_docs`, `evidence_docs` and `negative_docs`.

    >>> context_documents({"context": [["Nile", ["It flows.", " Far."]]], "supporting_facts": [["Nile", 0]]})
    [{'id': '', 'title': 'Nile', 'text': 'It flows. Far.', 'gold': True}]
    """
    context = row.get("context")
    context = plain(decoded_text(context, "context") or context)
    if isinstance(context, Mapping):
        lists = (plain(context.get(name)) for name in ("title", "sentences" if "sentences" in context else "content"))
        context = list(zip(*(found if isinstance(found, list) else () for found in lists), strict=False))
    items = map(plain, context if isinstance(context, list) else ())
    pairs = [item for item in items if isinstance(item, list | tuple) and len(item) == 2]
    supporting = _named_gold(row).get("supporting_titles", ()) if pairs else ()
    found: list[tuple[Any, ...]] = []
    for title, parts in ((str(title), plain(parts)) for title, parts in pairs):
        sentences = parts if isinstance(parts, list | tuple) else [parts]
        found.append(("", title, " ".join(str(part).strip() for part in sentences), title in supporting))
    for item in mappings(row.get("paragraphs")):
        if "paragraph_text" in item:
            found.append(("", item.get("title"), item["paragraph_text"], bool(item.get("is_supporting"))))
    for kind in ("gold", "evidence", "negative"):
        for item in mappings(row.get(f"{kind}_docs")):
            if item.get("docid") is not None and "text" in item:
                found.append((name_of(item["docid"], "docid"), item.get("title"), item.get("text"), kind == "gold"))
    return [dict(zip(("id", "title", "text", "gold"), values, strict=True)) for values in found]


def golden_answers(row: Row) -> list[str]:
    """FlashRAG's gold answers; in its multiple-choice sets they are indices (from 0) into `choices`.

    Raises:
        RecordError: another type, or an index out of range.
    """
    golden, choices = plain(row.get("golden_answers")), plain(row.get("choices"))
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
            raise RecordError(f"field 'question': expected text, found {described(value)}")
    prompt = plain(row.get("prompt"))
    if isinstance(prompt, str) and _MESSAGES.match(prompt):
        messages = decoded_text(prompt, "prompt")
        if messages is None:
            raise RecordError(f"field 'prompt': expected messages as JSON, found {described(prompt)}")
        prompt = messages
    if isinstance(prompt, list):
        asked = [message.get("content") for message in mappings(prompt) if message.get("role") == "user"]
        prompt = asked[-1] if asked else None
    if isinstance(prompt, str):
        _, marker, question = prompt.rpartition("Question:")
        if marker and question.strip():
            return question.strip()
    found = "an empty one" if "question" in row else f"only {field_names(row)}"
    raise RecordError(
        f"expected a text field 'question' (or a prompt with 'Question:'), found {found}; other columns can be named: "
        "format=question=COLUMN,answers=COLUMN,id=COLUMN"
    )


def _metadata(value: Any) -> dict[str, Any]:
    if (decoded := decoded_text(value, "metadata")) is not None:  # our Parquet files store it as text
        value = decoded
    if absent(value) or value == "":
        return {}
    if not isinstance(value, Mapping):
        raise RecordError(f"field 'metadata': expected an object, found {described(value)}; rename or drop this field")
    metadata: dict[str, Any] = without_absent(value)
    if _NAMED_GOLD & metadata.keys():  # FlashRAG keeps the fields of HotpotQA, 2WikiMultihopQA and MuSiQue there
        metadata = without_absent(_named_gold(metadata)) | metadata
    return metadata | {field: listed(metadata, field) for field in LISTS if field in metadata}


@lru_cache(maxsize=256)
def _misnamed(names: tuple[str, ...]) -> str | None:
    """The field that was probably meant to be `golden_answers`; ignoring it would leave all questions unlabelled."""
    if {"golden_answers", "reward_model", "extra_info"} & set(names):
        return None
    near = get_close_matches("golden_answers", names, n=1, cutoff=0.8)
    return next(iter(near + [name for name in _ANSWER_FIELDS if name in names]), None)


# --- Passages ---------------------------------------------------------------------------------------------------------


def contents_of(title: str, text: str) -> str:
    """FlashRAG's form of a passage, `"Title"\\ntext`; a one-line text without a title is unchanged."""
    return text if not title and "\n" not in text else f'"{title}"\n{text}'


def passage_fields(row: Any) -> tuple[str, str]:
    """(id, contents) of a passage.

    Accepted: FlashRAG's `{id, contents}`, `{id, title, text}` and `{id, text}`, BEIR's `{_id, title, text}` and
    Tevatron's `{docid, title, text}`. If there are contents, title and text are ignored. A text without a title that
    begins with `---` and `title: ...`, as in BrowseComp-Plus, has that title; the text is kept whole.

    Raises:
        RecordError: no id, neither contents nor text, or a wrong type.
    """
    if not isinstance(row, Mapping):
        raise RecordError(f"expected a JSON object, found {type(row).__name__}")
    identifier = next((name for field in ID_FIELDS if (name := name_of(row.get(field), field)) is not None), None)
    if identifier is None:
        raise RecordError(f"expected an id in field 'id' ('_id', 'docid'), found only {field_names(row)}")
    if contents := _text(row, "contents"):
        return identifier, contents
    if not {"contents", "text"} & row.keys():
        raise RecordError(
            f"expected text in field 'contents', or in 'text' next to 'title', found only {field_names(row)}; "
            "rename the field that holds it"
        )
    title, text = name_of(row.get("title"), "title") or "", _text(row, "text")
    if not title and (found := _FRONT_TITLE.match(text)):
        title = found[1].strip("\"'")
    # The title must be one line, because the first line of the contents is the title.
    return identifier, contents_of(_LINE_BREAKS.sub(" ", title), text)


def passage_metadata(row: Row) -> dict[str, Any]:
    """Metadata of a passage in its corpus row: the object `metadata` (also as JSON text), and `url` if present.

    >>> passage_metadata({"id": 1, "text": "x", "url": "https://u", "metadata": {"page": 2}})
    {'page': 2, 'url': 'https://u'}
    """
    metadata = row.get("metadata")
    if isinstance(metadata, str) and metadata.startswith("{"):  # our Parquet files store it as text
        with suppress(ValueError, RecursionError):
            metadata = json.loads(metadata)
    found: dict[str, Any] = without_absent(metadata) if isinstance(metadata, Mapping) else {}
    return found | ({"url": row["url"]} if isinstance(row.get("url"), str) else {})


def _text(row: Row, field: str) -> str:
    """Text of a passage, empty if absent: the passage must stay, since row i of an index belongs to line i."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    if absent(value):
        return ""
    raise RecordError(f"field {field!r}: expected text, found {described(value)}")
