"""Answers: what normalises to nothing, empty predictions, and scripts without spaces."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from agentic_r_plugin.answers import contains_answer, exact_match, f1, is_closed, normalize, sub_exact_match, tokens

NOTHING_LEFT = ["The The", "!!!", "A"]


@pytest.mark.parametrize("gold", [*NOTHING_LEFT, "", " ", "Paris"])
@pytest.mark.parametrize("prediction", [None, "", " \n"])
def test_an_empty_prediction_matches_nothing(prediction, gold):
    assert not exact_match(prediction, [gold])
    assert not sub_exact_match(prediction, [gold])
    assert f1(prediction, [gold]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "gold", "same"),
    [
        ("the  THE", "The The", True),
        ("The The.", "The The", True),
        ("the", "The The", False),
        ("!!!", "!!!", True),
        ("!!", "!!!", False),
        ("?", "!!!", False),
        ("a", "A", True),
        ("(A)", "A", True),
        ("an", "A", False),
        ("the", "A", False),
        ("B", "A", False),
        ("!!!", "The The", False),
        ("Paris", "The", False),
        ("The Paris", "Paris", True),
    ],
)
def test_what_normalises_to_nothing_is_compared_with_its_articles_or_as_it_is_written(prediction, gold, same):
    assert exact_match(prediction, [gold]) is same
    assert f1(prediction, [gold]) == float(same) or gold == "The The"  # one shared article is a part of it


def test_f1_of_an_answer_of_articles_counts_its_articles():
    assert f1("the", ["The The"]) == pytest.approx(2 / 3) and f1("Paris", ["The The"]) == 0.0


@pytest.mark.parametrize("gold", NOTHING_LEFT)
def test_a_gold_answer_that_normalises_to_nothing_is_not_within_every_prediction(gold):
    assert not sub_exact_match("Paris", [gold]) and not contains_answer("Paris, France", [gold])
    assert sub_exact_match(f"It is {gold} of course", [gold])


def test_passages_are_searched_for_bands_but_not_for_a_bare_article():
    assert contains_answer("The band The The is from London.", ["The The"])
    assert contains_answer("The band !!! is from Sacramento", ["!!!"])
    assert not contains_answer("a town", ["A"]) and is_closed(["A"]) and not is_closed(["A", "The The"])


def test_a_question_without_gold_answers_is_closed_and_never_right():
    assert is_closed([]) and not exact_match("x", []) and f1("x", []) == 0.0 and not contains_answer("x", [])


@pytest.mark.parametrize(
    ("passage", "gold"),
    [
        ("他于1921年出生于东京都。", "东京"),
        ("彼は東京で生まれた。", "東京"),
        ("彼は東京 タワーを見た。", "東京タワー"),
        ("เขาเกิดที่กรุงเทพมหานคร", "กรุงเทพ"),
        ("그는 서울에서 태어났다.", "서울"),
        ("他出生于Paris市", "Paris"),
        ("他于1921年出生", "1921"),
        ("ລາວເກີດຢູ່ວຽງຈັນ", "ວຽງຈັນ"),
    ],
)
def test_answers_are_found_in_scripts_without_spaces(passage, gold):
    assert contains_answer(passage, [gold])


def test_characters_out_of_order_or_parts_of_latin_words_are_not_found():
    assert not contains_answer("京东", ["东京"]) and not contains_answer("住在Parisian区", ["Paris"])


def test_f1_counts_characters_of_scripts_without_spaces():
    assert f1("东京都", ["东京"]) == pytest.approx(0.8)
    assert f1("大阪", ["东京"]) == 0.0 and f1("東京 タワー", ["東京タワー"]) == 1.0
    assert f1("Tokyo 塔", ["Tokyo"]) == pytest.approx(2 / 3)


LATIN = st.text(st.characters(max_codepoint=0x24F), max_size=30)


@settings(max_examples=300, deadline=None)
@given(LATIN, LATIN)
def test_latin_text_is_scored_as_flashrag_scores_it(prediction, gold):
    from flashrag.evaluator.metrics import F1_Score, Sub_ExactMatch

    assume(normalize(prediction) and normalize(gold))
    assert tokens(prediction) == normalize(prediction).split()
    assert exact_match(prediction, [gold]) == (normalize(prediction) == normalize(gold))
    assert sub_exact_match(prediction, [gold]) == bool(
        Sub_ExactMatch.calculate_sub_em(SimpleNamespace(is_regex=False), prediction, [gold])
    )
    assert f1(prediction, [gold]) == pytest.approx(F1_Score.token_level_scores(None, prediction, [gold])["f1"])
