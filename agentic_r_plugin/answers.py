"""Answers: normalisation, exact match and F1 (method section 2; SQuAD's rules).

The same function scores PPO rewards, correctness rollouts and evaluation, so the three can never disagree.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop a/an/the, collapse white space.

    >>> normalize("The  Beatles!")
    'beatles'
    """
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def _as_list(golden_answers: str | Iterable[str]) -> list[str]:
    return [golden_answers] if isinstance(golden_answers, str) else list(golden_answers)


def is_closed(golden_answers: str | Iterable[str]) -> bool:
    """Whether every gold answer is yes or no: such words stand in most passages, so finding them says nothing.

    >>> is_closed(["Yes."]), is_closed(["no", "Norway"])
    (True, False)
    """
    return all(normalize(gold) in {"yes", "no"} for gold in _as_list(golden_answers))


def exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> bool:
    """Whether the prediction equals any gold answer after normalisation; no prediction never matches.

    >>> exact_match("the Nile", ["Nile", "River Nile"])
    True
    >>> exact_match(None, ["None"])
    False
    """
    if prediction is None:
        return False
    found = normalize(prediction)
    return any(found == normalize(gold) for gold in _as_list(golden_answers))


def sub_exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> bool:
    """Whether the prediction holds any gold answer after normalisation, words cut or not (FlashRAG's `acc`).

    >>> sub_exact_match("It is the Nile.", ["Nile"]), sub_exact_match(None, ["The"])
    (True, False)
    """
    if prediction is None:
        return False
    found = normalize(prediction)
    return any(normalize(gold) in found for gold in _as_list(golden_answers))


def _f1_one(prediction: str, gold: str) -> float:
    found, wanted = normalize(prediction), normalize(gold)
    closed = {"yes", "no", "noanswer"}
    if found != wanted and (found in closed or wanted in closed):
        return 0.0
    found_tokens, wanted_tokens = found.split(), wanted.split()
    common = sum((Counter(found_tokens) & Counter(wanted_tokens)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found_tokens), common / len(wanted_tokens)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """Highest token F1 over the gold answers, in 0..1; no prediction scores 0.

    Yes, no and "noanswer" only ever match themselves, as in HotpotQA's scorer and FlashRAG's.

    >>> f1("Marie Curie", ["Curie"])
    0.6666666666666666
    """
    if prediction is None:
        return 0.0
    return max((_f1_one(prediction, gold) for gold in _as_list(golden_answers)), default=0.0)


def contains_answer(text: str, golden_answers: str | Iterable[str]) -> bool:
    """Whether the text holds any gold answer as a run of whole normalised words (answer recall).

    >>> contains_answer("He was born in Paris, France.", ["paris"])
    True
    >>> contains_answer("Parisian cafes", ["Paris"])
    False
    """
    haystack = f" {normalize(text)} "
    return any(gold and f" {gold} " in haystack for gold in map(normalize, _as_list(golden_answers)))
