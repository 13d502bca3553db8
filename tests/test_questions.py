"""Questions: the same records from every form of a file, and an error with file and line for what is none."""

from __future__ import annotations

import codecs
import gzip
import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentic_r_plugin.agent.dataset import read_sourced_questions
from agentic_r_plugin.errors import RecordError
from agentic_r_plugin.evaluation.benchmarks import split_file
from agentic_r_plugin.questions import read_questions
from agentic_r_plugin.records import Question
from agentic_r_plugin.storage.lookup import KeyedRecords
from agentic_r_plugin.store import read_records

FORMS = ("q.jsonl", "lines.json", "list.json", "pretty.json", "q.jsonl.gz", "crlf.jsonl", "bom.jsonl", "q.parquet")


def write_form(file: Path, rows: list[dict]) -> Path:
    """One benchmark in one of `FORMS`."""
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.name in ("list.json", "pretty.json"):
        indent = 2 if file.name == "pretty.json" else None
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=indent), encoding="utf-8")
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(b"".join(lines)))
    elif file.name == "crlf.jsonl":
        file.write_bytes(b"".join(lines).replace(b"\n", b"\r\n"))
    else:
        file.write_bytes((codecs.BOM_UTF8 if file.name == "bom.jsonl" else b"") + b"".join(lines))
    return file


def write(folder: Path, row: dict, name: str = "q.jsonl") -> Path:
    return write_form(folder / name, [row])


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)
ANSWERS = st.lists(TEXT.filter(lambda text: not text.lstrip().startswith("[")), min_size=1, max_size=3)
METADATA = st.none() | st.fixed_dictionaries(
    {"gold_doc_ids": st.none() | st.lists(TEXT, max_size=2), "type": st.none() | TEXT}
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, ANSWERS, METADATA), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_every_form_of_a_benchmark_gives_the_same_records(tmp_path, benchmark, number_ids, with_columns):
    rows = [
        {
            "id": number if number_ids else f"q{number}",
            "question": f"{question}\u2028?",
            "golden_answers": golden,
            "metadata": metadata,
        }
        | ({"__index_level_0__": number, "index": number, "split": "test"} if with_columns else {})
        for number, (question, golden, metadata) in enumerate(benchmark)
    ]
    wanted = [
        Question(
            id=str(row["id"]),
            question=row["question"],
            golden_answers=tuple(row["golden_answers"]),
            metadata={key: value for key, value in (row["metadata"] or {}).items() if value is not None},
        )
        for row in rows
    ]
    for form in FORMS:
        file = write_form(tmp_path / form, rows)
        assert list(read_questions(file)) == wanted, form
        assert list(read_records(file, Question)) == wanted, form
        assert [item.record for item in read_sourced_questions(file)] == wanted, form


FAULTS = [
    ({"id": None}, "missing field 'id'"),
    ({"id": "q0"}, "question id 'q0' occurs twice, the first is at"),
    ({"id": ""}, "field 'id' is empty; give each question an id"),
    ({"question": None}, "expected a text field 'question'"),
    ({"golden_answers": "[1921, 1922]"}, "a list that is written as text"),
    ({"metadata": "plain"}, "field 'metadata': expected an object, found str 'plain'"),
    ({"golden_answers": 1921.5}, "field 'golden_answers': expected text, found float '1921.5'; write each answer"),
    ({"golden_answers": True}, "field 'golden_answers': expected text, found bool 'True'"),
    ({"metadata": {"gold_doc_ids": True}}, "field 'metadata.gold_doc_ids': expected text or a whole number"),
]


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [(form, *fault) for form in FORMS for fault in (FAULTS[:6] if form == "q.parquet" else FAULTS)],
)
def test_a_broken_question_is_refused_with_file_and_line_in_every_form(tmp_path, form, change, message):
    good = {"id": "q0", "question": "Q", "golden_answers": ["x"], "metadata": {"gold_doc_ids": ["1"]}}
    bad = good | {"id": "q1"} | change
    if form == "q.parquet":  # whose columns have one type
        good |= {key: None for key, value in bad.items() if type(value) is not type(good[key])} | {"id": "q0"}
        good["question"] = "Q"
    with pytest.raises(RecordError) as caught:
        list(read_questions(write_form(tmp_path / form, [good, bad])))
    assert message in str(caught.value)
    assert caught.value.path == str(tmp_path / form)
    assert caught.value.line == {"list.json": 1, "pretty.json": 14}.get(form, 2)


@pytest.mark.parametrize(
    ("golden", "wanted"),
    [
        ("Lindholm", ("Lindholm",)),
        (["a", None, math.nan, " "], ("a",)),
        (1921, ("1921",)),
        ([1921, "x"], ("1921", "x")),
        (None, ()),
        (math.nan, ()),
        ([], ()),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, ("a", "b")),
        ({"value": "a", "aliases": ["a", "b"]}, ("a", "b")),
        ({"target": "a"}, ("a",)),
        ("['Paris', \"Côte d'Or\"]", ("Paris", "Côte d'Or")),
        ('["Paris", "Côte d\'Or"]', ("Paris", "Côte d'Or")),
        (['["Paris", "Lutetia"]', "Rome"], ("Paris", "Lutetia", "Rome")),
        ("{'target': ['a', 'b']}", ("a", "b")),
        ("[]", ()),
        ("[Intro] of (", ("[Intro] of (",)),
        ("{1, 2}", ("{1, 2}",)),
        ({"text": [], "answer_start": []}, ()),
        ({"target": []}, ()),
        ({"value": "", "aliases": []}, ()),
        ({"value": "<unk>", "normalized_value": "<unk>", "aliases": []}, ()),
    ],
)  # fmt: skip
def test_gold_answers_are_texts_and_never_letters(tmp_path, golden, wanted):
    (question,) = read_questions(write(tmp_path, {"id": 0, "question": "Q", "golden_answers": golden}))
    assert (question.id, question.golden_answers) == ("0", wanted)


@pytest.mark.parametrize("golden", ["['Paris' 'Lutetia']", "{'target': array(['x'], dtype=object)}", "array(['x'])"])
def test_gold_answers_that_numpy_wrote_as_text_are_refused(tmp_path, golden):
    with pytest.raises(RecordError, match=r"q\.jsonl:1: field 'golden_answers': found a NumPy array written as text"):
        list(read_questions(write(tmp_path, {"id": "a", "question": "Q", "golden_answers": golden})))


@pytest.mark.parametrize("golden", [1921.0, [1921.0], True, ["x", False], {"a": 1}, [["x"]]])
def test_gold_answers_of_other_types_are_refused(tmp_path, golden):
    with pytest.raises(RecordError, match=r"q\.jsonl:1: field 'golden_answers': expected text"):
        list(read_questions(write(tmp_path, {"id": "a", "question": "Q", "golden_answers": golden})))


def test_a_place_among_choices_is_that_choice(tmp_path):
    row = {"id": "a", "question": "Q", "golden_answers": [1], "choices": ["Oslo", "Rome"]}
    assert next(read_questions(write(tmp_path, row))).golden_answers == ("Rome",)
    with pytest.raises(RecordError, match="expected places in the 2 choices"):
        list(read_questions(write(tmp_path, row | {"golden_answers": [2]})))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("12", ["12"]),
        (12, ["12"]),
        (12.0, ["12"]),
        ([1, "b", None], ["1", "b"]),
        ('["12", "13"]', ["12", "13"]),
        ("['12', 13]", ["12", "13"]),
        ("[12] b", ["[12] b"]),
        (None, None),
        (math.nan, None),
    ],
)
def test_one_gold_document_is_a_list_of_one_and_null_is_absent(tmp_path, value, wanted):
    row = {"id": "a", "question": "Q", "golden_answers": ["x"], "metadata": {"gold_doc_ids": value, "hops": 2}}
    (question,) = read_questions(write(tmp_path, row))
    assert question.metadata.get("gold_doc_ids") == wanted and question.metadata["hops"] == 2


def test_questions_without_labels_are_read_unless_labels_are_wanted(tmp_path):
    file = write(tmp_path, {"id": "a", "question": "Q"})
    assert next(read_questions(file)).golden_answers == ()
    with pytest.raises(RecordError, match=r"q\.jsonl:1: question 'a' has no golden answers"):
        list(read_questions(file, labelled=True))


# --- Search-R1 and verl -----------------------------------------------------------------------------------------------

PROMPT = [
    {"role": "system", "content": "Question: none"},
    {"role": "user", "content": "Answer it. For example, Question: x. Question: Who is it?\n"},
]
VERL = {
    "data_source": "nq",
    "prompt": PROMPT,
    "ability": "fact-reasoning",
    "reward_model": {"style": "rule", "ground_truth": {"target": ["a", "b"]}},
    "extra_info": {"split": "train", "index": 3},
}


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, ("nq/train/3", "Who is it?", ("a", "b"))),
        ({"id": "q3", "question": "Q?", "golden_answers": ["c"]}, ("q3", "Q?", ("c",))),
        ({"question": "Q?", "golden_answers": []}, ("nq/train/3", "Q?", ("a", "b"))),
        ({"extra_info": {"split": "train", "index": 3, "question": "E?"}}, ("nq/train/3", "E?", ("a", "b"))),
        ({"reward_model": {"ground_truth": {"target": "a"}}}, ("nq/train/3", "Who is it?", ("a",))),
        ({"reward_model": {"ground_truth": "a"}}, ("nq/train/3", "Who is it?", ("a",))),
        ({"extra_info": {"index": 3}}, ("nq/3", "Who is it?", ("a", "b"))),
        ({"reward_model": '{"ground_truth": {"target": ["c"]}}'}, ("nq/train/3", "Who is it?", ("c",))),
        ({"extra_info": "{'split': 'dev', 'index': 4}"}, ("nq/dev/4", "Who is it?", ("a", "b"))),
        ({"prompt": json.dumps(PROMPT)}, ("nq/train/3", "Who is it?", ("a", "b"))),
        ({"golden_answers": None, "reward_model": None, "ground_truth": "c"}, ("nq/train/3", "Who is it?", ("c",))),
    ],
)
def test_rows_of_search_r1_and_verl_are_read(tmp_path, name, change, wanted):
    (item,) = read_sourced_questions(write_form(tmp_path / name, [VERL | change]))
    assert (item.record.id, item.record.question, item.record.golden_answers) == wanted
    assert item.source == "nq"


def test_ids_that_begin_again_in_every_data_set_are_distinguished(tmp_path):
    rows = [
        VERL
        | {"id": "train_0", "question": source, "data_source": source, "extra_info": {"split": "train", "index": 0}}
        for source in ("nq", "hotpotqa")
    ]
    file = write_form(tmp_path / "t.parquet", rows)
    assert [question.id for question in read_questions(file)] == ["nq/train/0", "hotpotqa/train/0"]
    by_id = KeyedRecords(file, Question, lambda question: question.id, reader=read_questions)
    (found,) = by_id.find("hotpotqa/train/0")
    by_id.close()
    assert found.question == "hotpotqa"
    file = write_form(tmp_path / "t.parquet", [rows[0], rows[1] | {"id": "train_1"}])
    assert [question.id for question in read_questions(file)] == ["train_0", "train_1"]


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_ids_that_begin_again_without_an_index_are_distinguished_by_their_data_set(tmp_path, name):
    row = {"id": "test_0", "question": "Q", "golden_answers": ["x"]}
    file = write_form(tmp_path / name, [row | {"data_source": "nq"}, row | {"data_source": "hotpotqa"}])
    assert [question.id for question in read_questions(file)] == ["nq/test_0", "hotpotqa/test_0"]
    file = write_form(tmp_path / name, [row | {"data_source": "nq"}, row | {"data_source": "nq"}])
    with pytest.raises(RecordError, match="question id 'test_0' occurs twice"):
        list(read_questions(file))


@pytest.mark.parametrize("field", ["reward_model", "extra_info"])
def test_an_object_that_is_written_as_text_and_broken_is_refused(tmp_path, field):
    with pytest.raises(RecordError, match=rf"q\.jsonl:1: field '{field}': expected an object, found str"):
        list(read_questions(write(tmp_path, VERL | {field: '{"index": 3'})))


def test_a_prompt_without_a_question_is_refused(tmp_path):
    row = VERL | {"prompt": [{"role": "user", "content": "Compute 1 + 1"}]}
    with pytest.raises(RecordError, match=r"q\.jsonl:1: expected a text field 'question' \(or a prompt with"):
        list(read_questions(write(tmp_path, row)))


def test_a_split_is_found_under_every_suffix(tmp_path):
    for name in ("test.jsonl.gz", "test.parquet", "test.json", "test.jsonl"):  # later ones are preferred
        write(tmp_path, {"id": "a", "question": "Q", "golden_answers": ["x"]}, name)
        assert split_file(tmp_path, "test").name == name


# --- Other data sets --------------------------------------------------------------------------------------------------

PARAGRAPHS = [
    {"idx": 0, "title": "Ann", "paragraph_text": "x", "is_supporting": True},
    {"idx": 1, "title": "Bob", "paragraph_text": "y", "is_supporting": False},
]
HOTPOTQA = {"question": "Q?", "answer": "yes", "type": "bridge", "level": "hard"}
OF_HOTPOTQA = {"supporting_titles": ["Ann", "Bob"], "type": "bridge", "level": "hard"}


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (
            HOTPOTQA | {"_id": "5a", "supporting_facts": [["Ann", 0], ["Ann", 1], ["Bob", 0]]},
            ("5a", "Q?", ("yes",), OF_HOTPOTQA),
        ),
        (
            HOTPOTQA | {"id": "5a", "supporting_facts": {"title": ["Ann", "Bob"], "sent_id": [0, 1]}},
            ("5a", "Q?", ("yes",), OF_HOTPOTQA),
        ),
        (
            {
                "id": "2hop__1", "question": "Q?", "answer": "Rome", "answer_aliases": ["Roma"], "answerable": True,
                "paragraphs": PARAGRAPHS,
                "question_decomposition": [{"question": "a", "answer": "Italy"}, {"question": "b", "answer": "Rome"}],
            },
            (
                "2hop__1", "Q?", ("Rome", "Roma"),
                {"supporting_titles": ["Ann"], "hop_answers": ["Italy", "Rome"], "answerable": True},
            ),
        ),
        (
            {
                "query_id": 7, "query": "Q?", "answer": "x", "gold_docs": [{"docid": 3, "text": "t"}],
                "evidence_docs": [{"docid": 3}, {"docid": 4}], "negative_docs": [{"docid": 9}],
            },
            ("7", "Q?", ("x",), {"gold_doc_ids": ["3"], "evidence_doc_ids": ["3", "4"]}),
        ),
        ({"_id": "PLAIN-2", "text": "Q?", "metadata": {"url": "u"}}, ("PLAIN-2", "Q?", (), {"url": "u"})),
        (
            {"id": "s", "title": "T", "question": "Q?", "answers": {"text": ["a", "b"], "answer_start": [1, 2]}},
            ("s", "Q?", ("a", "b"), {}),
        ),
        (
            {"question_id": "tc_1", "question": "Q?", "answer": {"value": "A", "aliases": ["A", "B"]}},
            ("tc_1", "Q?", ("A", "B"), {}),
        ),
        ({"id": "m", "question": "Q?", "choices": ["a", "b"], "answer": 1}, ("m", "Q?", ("b",), {})),
        ({"_id": "q", "title": "", "text": "Q?"}, ("q", "Q?", (), {})),
        ({"_id": "q", "title": "T", "text": "Q?"}, ("q", "Q?", (), {})),
        ({"id": "a", "question": "Q?", "golden_answers": None, "answer": "Paris"}, ("a", "Q?", ("Paris",), {})),
        ({"id": "a", "question": "Q?", "golden_answers": [], "answer": "Paris"}, ("a", "Q?", ("Paris",), {})),
        ({"id": "a", "question": "Q?", "answers": [], "answer": "Paris"}, ("a", "Q?", ("Paris",), {})),
        (
            {"id": "a", "question": "Q?", "query_id": None, "query": None, "golden_answers": None, "answer": "Paris"},
            ("a", "Q?", ("Paris",), {}),
        ),
        (
            {
                "id": "2hop__1", "question": "Q?", "answer": "Rome", "answer_aliases": ["Roma"],
                "supporting_facts": None, "question_decomposition": [{"answer": "Italy"}],
            },
            ("2hop__1", "Q?", ("Rome", "Roma"), {"supporting_titles": [], "hop_answers": ["Italy"]}),
        ),
        ({"query_id": 7, "query": "Q?", "answers": ["x", "y"], "query_type": "entity"}, ("7", "Q?", ("x", "y"), {})),
        ({"query_id": 7, "query": "Q?", "answers": ["No Answer Present."]}, ("7", "Q?", (), {})),
        ({"id": 7, "question": "Q?", "possible_answers": '["a", "b"]'}, ("7", "Q?", ("a", "b"), {})),
        ({"id": 7, "question": "Q?", "possible_answers": ["a", "b"]}, ("7", "Q?", ("a", "b"), {})),
        ({"id": 7, "question": "Q?", "ground_truth": "a"}, ("7", "Q?", ("a",), {})),
        ({"_id": "5a", "question": "Q?", "answer": None, "supporting_facts": None}, ("5a", "Q?", (), {})),
    ],
)  # fmt: skip
def test_questions_of_other_data_sets_are_read_as_they_are(tmp_path, name, row, wanted):
    if name.endswith("parquet") and row.get("supporting_facts") == [["Ann", 0], ["Ann", 1], ["Bob", 0]]:
        pytest.skip("Parquet has no lists of mixed types")
    (question,) = read_questions(write_form(tmp_path / name, [row]))
    assert (question.id, question.question, question.golden_answers, question.metadata) == wanted


def test_a_misnamed_field_is_refused_though_the_right_one_is_null(tmp_path):
    row = {"id": "a", "question": "Q", "golden_answers": None, "gold_answers": ["x"]}
    with pytest.raises(RecordError, match=r"q\.jsonl:1: unknown field 'gold_answers' and no 'golden_answers'"):
        list(read_questions(write(tmp_path, row)))


FIELDS = st.sampled_from(
    ["id", "_id", "question", "golden_answers", "answers", "answer", "metadata", "extra_info", "reward_model", "prompt",
     "supporting_facts", "question_decomposition", "paragraphs", "query_id", "query", "gold_docs", "text", "choices"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["x", "Question: y", "[1]", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["title", "target", "role", "content", "gold_doc_ids", "docid"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELDS, VALUES, max_size=6))
def test_any_row_is_a_question_or_a_record_error(row):
    try:
        question = Question.from_dict(row)
    except RecordError:
        return
    assert question.id and question.question.strip() and all(map(str.strip, question.golden_answers))
    assert Question.from_dict(json.loads(json.dumps(question.to_dict()))).golden_answers == question.golden_answers
