"""The bottom of the package: light imports, records, answers, query formulation, components, configuration."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentic_r_plugin import components
from agentic_r_plugin.answers import contains_answer, exact_match, f1, normalize
from agentic_r_plugin.config import fingerprint, load_config, save_config
from agentic_r_plugin.errors import ConfigError, RecordError, SearchRefusedError, UnknownComponentError, UpstreamError
from agentic_r_plugin.query import MAX_REASONING, SearchRequest, needs_reasoning, retrieval_query, retriever_input
from agentic_r_plugin.records import (
    Candidates,
    Group,
    Passage,
    Question,
    Relevance,
    ScoredPassage,
    StopReason,
    Trajectory,
    Turn,
)
from agentic_r_plugin.search.wire import encode_requests
from agentic_r_plugin.store import read_records, write_records


@pytest.mark.parametrize("module", ["query", "answers", "protocol", "records", "errors"])
def test_the_bottom_imports_without_a_framework_and_quickly(module):
    code = (
        f"import time; start = time.perf_counter(); import agentic_r_plugin.{module}, sys\n"
        "taken = time.perf_counter() - start\n"
        "print(taken, [m for m in ('torch', 'verl', 'ray', 'flashrag', 'transformers') if m in sys.modules])"
    )
    tries = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    results = [out.stdout.split(maxsplit=1) for out in tries]
    assert {loaded.strip() for _, loaded in results} == {"[]"}
    assert min(float(taken) for taken, _ in results) < 0.3


# --- answers


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=30))
def test_normalisation_equals_verls_and_flashrags(text):
    from flashrag.evaluator.utils import normalize_answer as flashrags
    from verl.utils.reward_score.search_r1_like_qa_em import normalize_answer as verls

    assert normalize(text) == verls(text) == flashrags(text)


def test_no_prediction_is_not_the_string_none():
    assert not exact_match(None, ["None"]) and exact_match("None", ["None"]) and f1(None, ["None"]) == 0.0


def test_f1_counts_shared_tokens_and_closes_yes_and_no():
    assert f1("the big red house", ["red house"]) == pytest.approx(0.8)
    assert f1("no way", ["no"]) == 0.0 and f1("no", ["No."]) == 1.0


def test_an_answer_is_contained_as_whole_words_only():
    assert contains_answer("In 1912, Vienna fell.", ["1912"]) and not contains_answer("In 19123", ["1912"])
    assert not contains_answer("anything", ["the"])


# --- query formulation


def test_the_three_formulations():
    assert retrieval_query("Q", "q2", ["q1"]) == "Q [SEP] q2"
    assert retrieval_query("Q", "q2", ["q1"], "query") == "q2"
    assert retrieval_query("Q", "q2", ["q1"], "question_history_query") == "Q [SEP] q1 [SEP] q2"


def test_the_reasoning_of_the_turn_is_a_part_of_the_input_and_left_out_if_empty():
    given = {"question": "Q", "query": "q2", "history": ["q1"], "reasoning": "r"}
    assert retrieval_query(**given, formulation="reasoning_query") == "Reasoning: r\n\nQuery: q2"
    whole = "Question: Q\n\nReasoning: r\n\nQuery: q2"
    assert retrieval_query(**given, formulation="question_reasoning_query") == whole
    assert retrieval_query("Q", "q", formulation="reasoning_query") == "Query: q"
    assert retrieval_query("Q", "q", formulation="question_reasoning_query") == "Question: Q\n\nQuery: q"
    assert retrieval_query(**given) == "Q [SEP] q2"


def test_a_search_without_question_and_reasoning_is_the_query_alone_whatever_the_formulation():
    plain, thought = SearchRequest(query="q", history=("h",)), SearchRequest(query="q", reasoning="r")
    for name in components.names("query_formulation"):
        assert retriever_input(plain, name) == "q"
    assert retriever_input(thought, "reasoning_query") == "Reasoning: r\n\nQuery: q"
    assert retriever_input(thought, "question_query") == "q"


@pytest.mark.parametrize("formulation", ["reasoning_query", "question_reasoning_query"])
@pytest.mark.parametrize("most", [1, 4, 5, 6, 9, 40, 300])
def test_a_long_reasoning_loses_its_beginning_and_never_the_query(formulation: str, most: int):
    words = [f"w{i}" for i in range(200)]
    request = SearchRequest(question="Who?", query="q1 q2", reasoning=" ".join(words))
    count = lambda text: len(text.split())  # noqa: E731
    text = retriever_input(request, formulation, count_tokens=count, max_tokens=most)
    others = replace(request, reasoning="")
    bare = retriever_input(others, formulation)
    assert text.endswith("Query: q1 q2") and ("Who?" in text) == formulation.startswith("question")
    assert count(text) <= max(most, count(bare))
    kept = [word for word in text.split() if word in words]
    assert kept == words[len(words) - len(kept) :]
    if most < count(bare):
        assert text == bare
    if most in (40, 300):
        assert len(kept) > 0.7 * min(200, most - count(bare) - 1)


def test_of_a_reasoning_that_no_service_would_take_whole_the_end_is_read_everywhere():
    request = SearchRequest(query="q", reasoning="a" * MAX_REASONING + "b")
    kept = "a" * (MAX_REASONING - 1) + "b"
    assert retriever_input(request, "reasoning_query") == f"Reasoning: {kept}\n\nQuery: q"
    assert encode_requests([request], 1)["reasonings"] == [kept]


def test_a_formulation_of_three_arguments_goes_on_working(monkeypatch):
    """As third parties wrote them before the reasoning was known."""
    theirs = {
        "old": lambda question, query, history=(): f"{query} | {question} | {len(history)}",
        "oldest": lambda question, query, history: "/".join([question, *history, query]),
        "new": lambda request: f"{request.reasoning} > {request.query}",
    }
    monkeypatch.setattr(components, "load", lambda kind, name: theirs[name])
    request = SearchRequest(question="Q", query="q2", history=("q1",), reasoning="r")
    assert [retriever_input(request, name) for name in theirs] == ["q2 | Q | 1", "Q/q1/q2", "r > q2"]
    assert [retriever_input(replace(request, question=None), name) for name in theirs] == ["q2", "q2", "r > q2"]
    assert [needs_reasoning(name) for name in theirs] == [False, False, True]


def test_an_unknown_formulation_lists_the_known_ones():
    with pytest.raises(UnknownComponentError, match="question_history_query, question_query"):
        retrieval_query("Q", "q", formulation="nope")


# --- records

TRAJECTORY = Trajectory(
    id="q1",
    question="Q?",
    golden_answers=("a",),
    turns=(Turn(turn=1, reasoning="r", query="q", passages=(ScoredPassage(id="p", score=0.5),)),),
    answer=None,
    stop_reason=StopReason.MAX_TURNS,
    em=0,
    f1=0.0,
    text="…",
)


GROUP = Group(id="q", turn=1, question="Q?", query="q", history=(), positive="p", negatives=("n",))


def test_a_field_that_is_not_used_leaves_the_record_in_its_earlier_schema(tmp_path):
    old, new = GROUP.to_dict(), replace(GROUP, reasoning="r").to_dict()
    assert old == {
        "schema": "group/1", "id": "q", "turn": 1, "question": "Q?", "query": "q", "history": [], "positive": "p",
        "negatives": ["n"],
    }  # fmt: skip
    assert new == old | {"schema": "group/2", "reasoning": "r"}
    assert Group.from_dict(old) == GROUP and Group.from_dict(new).reasoning == "r"
    for name in ("groups.jsonl", "groups.parquet"):
        written = [GROUP, replace(GROUP, id="other", reasoning="r")]
        write_records(tmp_path / name, written)
        assert list(read_records(tmp_path / name, Group)) == written


def test_fields_of_a_record_within_a_record_may_be_unused_in_parquet(tmp_path):
    used = replace(TRAJECTORY, turns=(*TRAJECTORY.turns, replace(TRAJECTORY.turns[0], end=3, opened=("p",))))
    write_records(tmp_path / "trajectories.parquet", [TRAJECTORY, used])
    assert list(read_records(tmp_path / "trajectories.parquet", Trajectory)) == [TRAJECTORY, used]


def test_a_field_newer_than_the_schema_of_its_record_is_refused():
    with pytest.raises(RecordError, match="unknown field 'reasoning' of group/1; it came with number 2"):
        Group.from_dict(GROUP.to_dict() | {"reasoning": "r"})
    with pytest.raises(RecordError, match=r"'group/1' or 'group/2' \(a file of agentic-r groups\), found 'group/3'"):
        Group.from_dict(GROUP.to_dict() | {"schema": "group/3"})


def test_a_trajectory_round_trips_with_its_schema_first():
    data = TRAJECTORY.to_dict()
    assert next(iter(data.items())) == ("schema", "trajectory/1") and data["stop_reason"] == "max_turns"
    assert Trajectory.from_dict(data) == TRAJECTORY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"schema": "trajectory/9"},
            "expected schema 'trajectory/1' or 'trajectory/2' (a file of agentic-r trajectories), found 'trajectory/9'",
        ),
        ({"em": "1"}, "field 'em': expected int, found str '1'"),
        ({"em": True}, "field 'em': expected int, found bool"),
        ({"stop_reason": "bored"}, "expected one of answered"),
        ({"stop_reason": ["answered"]}, "field 'stop_reason': expected one of answered"),
        ({"stop_reason": {}}, "field 'stop_reason': expected one of answered"),
        ({"turns": [{"turn": 1}]}, "missing field 'turns[0].reasoning'"),
        ({"turns": [{"turn": 1, "reasoning": "", "query": "", "passages": [{"id": 3, "score": 1}]}]}, "passages[0].id"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"golden_answers": "a"}, "field 'golden_answers'"),
    ],
)
def test_a_wrong_record_names_the_field(change, message):
    with pytest.raises(RecordError) as error:
        Trajectory.from_dict(TRAJECTORY.to_dict() | change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fault", [RecordError("m", path="f", line=2), SearchRefusedError("m", status=401), UpstreamError("m")], ids=repr
)
def test_a_fault_comes_whole_out_of_another_process(fault):
    copy = pickle.loads(pickle.dumps(fault))
    assert (type(copy), str(copy), vars(copy)) == (type(fault), str(fault), vars(fault))


def test_a_question_without_gold_answers_is_refused_where_they_are_wanted():
    question = Question.from_dict({"id": "1", "question": "Q", "golden_answers": []})
    assert question.golden_answers == ()
    with pytest.raises(RecordError, match="question '1' has no golden answers"):
        question.require_label()


def test_relevance_outside_its_range_is_refused():
    with pytest.raises(RecordError, match=r"expected 0\.\.100, found 101"):
        Relevance(id="q", turn=1, scores={"p": 101})


def test_a_passage_keeps_flashrags_contents():
    one = Passage.from_contents("7", '"Emma"\nA novel.\nBy Austen.')
    assert (one.title, one.text, one.contents) == ("Emma", "A novel.\nBy Austen.", '"Emma"\nA novel.\nBy Austen.')
    assert one == Passage(id="7", title="Emma", text="A novel.\nBy Austen.")
    assert Passage.from_contents("8", "only text").text == "only text"


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('""Weird Al" Yankovic"\ntext', '"Weird Al" Yankovic', "text"),
        ('""Heroes""\nx', '"Heroes"', "x"),
        ("one line text", "", "one line text"),
        ("", "", ""),
        ('""\ntext', "", "text"),
        ('""\none\ntwo', "", "one\ntwo"),
        ('"\nx', '"', "x"),
        ('"T"\n', "T", ""),
        (' "T" \r\nx', "T", "x"),
        ("No quotes\nx", "No quotes", "x"),
        ('A "quoted" word\nx', 'A "quoted" word', "x"),
    ],
)
def test_contents_are_given_back_as_the_corpus_holds_them(contents, title, text):
    passage = Passage.from_contents("1", contents)
    assert (passage.title, passage.text, passage.contents) == (title, text, contents)


@pytest.mark.parametrize(("title", "text"), [('"Heroes"', "x"), ("", "one line"), ("", "two\nlines"), ("T", "")])
def test_a_passage_made_of_title_and_text_is_found_again_in_its_contents(title, text):
    passage = Passage(id="1", title=title, text=text)
    assert Passage.from_contents("1", passage.contents) == passage


def test_a_query_is_named_by_question_and_turn_and_holds_a_passage_once():
    fields = {"question": "Q", "golden_answers": ["a"], "query": "q", "history": [], "prefix": "", "passages": []}
    row = {"schema": "candidates/1", "id": "q", "turn": 2} | fields
    assert Candidates.from_dict(row).key == ("q", 2)
    with pytest.raises(RecordError, match="a passage occurs twice among its candidates"):
        Candidates.from_dict(row | {"passages": [{"id": "p", "score": 1.0}, {"id": "p", "score": 0.5}]})


def test_a_positive_is_not_among_its_own_negatives():
    with pytest.raises(RecordError, match="expected negatives without the positive, found 'p' as both"):
        Group.from_dict(GROUP.to_dict() | {"negatives": ["n", "p"]})


# --- components


def test_every_registered_component_can_be_loaded_and_says_what_it_is():
    found = list(components.components())
    assert {item.kind for item in found} == set(components.KINDS)
    for item in found:
        assert components.describe(item), f"{item.kind}.{item.name} has no description"


# --- configuration


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    path: str
    count: int = 3
    limit: int | None = 3
    inner: Inner = field(default_factory=Inner)
    verl: list[str] = field(default_factory=list)


def test_file_values_and_overrides_win_in_that_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("path: a\ncount: 4\ninner: {rate: 1}\n")
    config = load_config(Outer, file, ["inner.rate=2"], values={"count": "5"})
    assert config == Outer(path="a", count=5, inner=Inner(rate=2.0))
    save_config(config, tmp_path / "resolved.yaml")
    assert load_config(Outer, tmp_path / "resolved.yaml") == config


def test_an_override_without_a_value_is_null_where_that_is_allowed_and_else_the_empty_text():
    assert load_config(Outer, overrides=["path="]).path == ""
    assert load_config(Outer, overrides=["path=a", "limit="]).limit is None
    with pytest.raises(ConfigError, match="count"):
        load_config(Outer, overrides=["path=a", "count="])


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("path: a\ncuont: 4\n", [], "cuont.*; did you mean 'count'"),
        ("path: a\n", ["pth=b"], "did you mean 'path'"),
        ("path: a\ninner: {rat: 4}\n", [], "rat"),
        ("path: a\ncount: many\n", [], "count"),
        ("count: 1\n", [], "no value for path in .*; give path=VALUE"),
        ("path: [a\n", [], "not valid YAML"),
        ("path: a\n", ["count"], "expected key=value"),
        ("path: a\n", ["inner.x=1"], "inner.x"),
        ("path: a\n", ["count=[1"], r"override 'count=\[1': the value is not YAML: expected"),
        ("path: ${nowhere}\n", [], "key 'path': Interpolation key 'nowhere' not found"),
        ("- path\n", [], r"c\.yaml: expected a mapping of settings, found list"),
    ],
)
def test_a_wrong_configuration_names_file_or_override_and_key(tmp_path, text, overrides, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Outer, file, overrides)
    assert "not valid YAML" in message or "\n" not in str(caught.value)


def test_a_fingerprint_depends_on_values_not_on_order():
    assert (
        fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1}) != fingerprint({"a": 1, "b": [2, 1]})
    )
