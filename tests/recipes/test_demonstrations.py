"""Scripted demonstrations: they search only for what they can know, and end with the gold answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from agentic_r_plugin.errors import ConfigError, RecordError, SearchRefusedError
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Question
from agentic_r_plugin.search.backends import BM25Backend
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.search.corpus import Corpus
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact
from recipes.hotpotqa_cpu.warm_start.demonstrations import DemonstrationSettings, demonstrate, describe
from recipes.retriever.keywords import keywords

PASSAGES = {
    "0": ("Ada Quell", "Ada Quell is a painter. She was born in the town of Mirel."),
    "1": ("Mirel", "Mirel is a harbour town in the province of Ostrand."),
    "2": ("Bo Varn (painter)", "Bo Varn was a painter who was born in 1902."),
    "3": ("Ostrand cheese", "A cheese."),
    "4": ("Painter", "A painter paints. Ada is a first name."),
}
BRIDGE = Question(
    id="bridge",
    question="In which province was the painter Ada Quell born?",
    golden_answers=("Ostrand",),
    metadata={"gold_doc_ids": ["1", "0"]},
)
COMPARISON = Question(
    id="comparison",
    question="Were Bo Varn and Ada Quell both painters?",
    golden_answers=("yes",),
    metadata={"gold_doc_ids": ["0", "2"]},
)
LIMITS = Limits(max_searches=3, max_tokens=4000, max_response_tokens=400, max_observation_tokens=900)


class Letters:
    """A codec with one id a character."""

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": key, "contents": f'"{title}"\n{text}'}) for key, (title, text) in PASSAGES.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _demonstrate(
    corpus_file: Path, questions: list[Question], seed: int = 0, limits: Limits = LIMITS, **settings: object
) -> list[Session]:
    options = DemonstrationSettings(**{"fewer_passages_share": 0.0, "retry_share": 0.0, "topk": 1, **settings})
    with Corpus(corpus_file) as corpus:
        return demonstrate(questions, BM25Backend(corpus_file), corpus, compact, Letters(), limits, options, seed=seed)


def _written(session: Session) -> list[str]:
    return [segment.text for segment in session.segments if segment.by_model]


def test_a_bridge_question_is_answered_in_two_searches_the_second_for_a_title_read_in_the_first_passage(
    corpus_file: Path,
) -> None:
    (session,) = _demonstrate(corpus_file, [BRIDGE])
    assert _written(session) == [
        "<think> I look up Ada Quell. </think>\n<search> Ada Quell province painter born </search>",
        "<think> I look up Mirel. </think>\n<search> Mirel province painter born </search>",
        "<think> In which province was the painter Ada Quell born? </think>\n<answer> Ostrand </answer>",
    ]
    assert [[passage.id for passage in turn.passages] for turn in session.turns] == [["0"], ["1"]]
    assert session.finished is not None and session.finished.answer == "Ostrand"


def test_an_excerpt_copies_the_words_around_the_answer(corpus_file: Path) -> None:
    (session,) = _demonstrate(corpus_file, [BRIDGE], thoughts="excerpt")
    assert _written(session)[1].startswith("<think> Ada Quell: a painter. She was born in the town of Mirel.")
    assert "<think> Mirel: Mirel is a harbour town in the province of Ostrand. </think>" in _written(session)[2]


def test_a_comparison_looks_up_both_titles_in_the_order_of_the_question(corpus_file: Path) -> None:
    (session,) = _demonstrate(corpus_file, [COMPARISON])
    assert [turn.query for turn in session.turns] == ["Bo Varn painters", "Ada Quell painters"]


def test_passages_that_show_all_that_is_needed_are_answered_from_at_once(corpus_file: Path) -> None:
    (session,) = _demonstrate(corpus_file, [COMPARISON], topk=3)
    assert session.searches == 1
    assert {"0", "2"} <= {passage.id for passage in session.turns[0].passages}


def test_a_missed_passage_is_looked_for_again_in_other_words_when_the_demonstration_is_to_show_that(
    corpus_file: Path,
) -> None:
    hidden = Question(
        id="hidden",
        question="Which cheese is made by a painter called Ada?",
        golden_answers=("Ostrand cheese",),
        metadata={"gold_doc_ids": ["2"]},
    )
    (session,) = _demonstrate(corpus_file, [hidden], retry_share=1.0)
    queries = [turn.query for turn in session.turns]
    assert len(queries) == len(set(queries)) == 2
    assert [passage.id for passage in session.turns[1].passages] == ["2"]


def test_the_mask_covers_the_script_and_nothing_that_was_shown(corpus_file: Path) -> None:
    (session,) = _demonstrate(corpus_file, [BRIDGE])
    masked = [token for token, mask in zip(session.response_ids, session.response_mask, strict=True) if mask]
    assert Letters().decode(masked) == "".join(_written(session))
    assert session.response_mask[-1] == 1


def test_the_same_seed_gives_the_same_demonstrations(corpus_file: Path) -> None:
    settings = {"topk": 3, "fewer_passages_share": 0.5, "retry_share": 0.5}
    once, again, other = (_demonstrate(corpus_file, [BRIDGE, COMPARISON], seed, **settings) for seed in (1, 1, 2))
    assert [session.text for session in once] == [session.text for session in again]
    assert [session.text for session in once] != [session.text for session in other]


def test_a_demonstration_that_runs_out_of_searches_is_left_out(corpus_file: Path) -> None:
    limits = Limits(max_searches=1, max_tokens=4000, max_response_tokens=400, max_observation_tokens=900)
    assert _demonstrate(corpus_file, [BRIDGE], limits=limits) == []


def test_unknown_supporting_passages_and_settings_are_refused(corpus_file: Path) -> None:
    unknown = Question(id="x", question="Who?", golden_answers=("y",), metadata={"gold_doc_ids": ["99"]})
    without = Question(id="x", question="Who?", golden_answers=("y",))
    with pytest.raises(RecordError, match="'99'"):
        _demonstrate(corpus_file, [unknown])
    with pytest.raises(RecordError, match=r"in metadata\.gold_doc_ids, found none"):
        _demonstrate(corpus_file, [without])
    with pytest.raises(ConfigError, match="question, title, excerpt, short"):
        DemonstrationSettings(thoughts="long")


def test_keywords_leave_out_articles_and_function_words() -> None:
    assert keywords("The name of a town in the USA's north?", limit=5) == ["town", "USA", "north"]


def test_describe_counts_searches_and_tokens(corpus_file: Path) -> None:
    sessions = _demonstrate(corpus_file, [BRIDGE])
    assert describe(sessions)["mean_searches"] == 2
    assert describe(sessions)["mean_model_tokens"] == sum(len(text) for text in _written(sessions[0]))


def test_a_question_with_a_refused_search_is_left_out_and_named(
    corpus_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    search, refused = BM25Backend.search, "province"

    def refusing(self: BM25Backend, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        if any(refused in str(request.question) for request in requests):
            raise SearchRefusedError("HTTP 413: too long", status=413)
        return search(self, requests, topk)

    monkeypatch.setattr(BM25Backend, "search", refusing)
    (session,) = _demonstrate(corpus_file, [BRIDGE, COMPARISON])
    assert session.question == COMPARISON.question
    said = "the retriever refused a search of 1 of 2 questions; first, bridge: HTTP 413: too long"
    assert said in capsys.readouterr().err
    with pytest.raises(SearchRefusedError, match="refused a search of 1 of 1 questions; first, bridge: HTTP 413"):
        _demonstrate(corpus_file, [BRIDGE])
