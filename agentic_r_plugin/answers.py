"""Answers: normalisation, exact match and F1 (method section 2; SQuAD's rules).

PPO rewards, correctness rollouts and evaluation all score with these functions, so the three cannot disagree.

SQuAD's normalisation drops articles and punctuation, so nothing is left of the answers "The The", "!!!" and "A". Such
an answer is compared with its articles, and if it has no words at all, with its punctuation; letter case and white
space never count. An empty prediction therefore matches nothing. All other answers are compared as in FlashRAG.

Chinese, Japanese, Thai and other scripts do not separate words by spaces (and Korean joins particles to them). Answer
recall and F1 count each character of these scripts as one word.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ARTICLE_WORDS = frozenset({"a", "an", "the"})
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e50-\u0e59\u0e81-\u0edf"  # Thai, Lao
    "\u0f20-\u0f33\u0f40-\u0f84\u0f86-\u0fbc\u1000-\u1049\u1050-\u109d\u1780-\u17d3"  # Tibetan, Burmese, Khmer
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7af"  # Korean, whose words carry their particles
    "\u3041-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese kana
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Characters of scripts that do not separate words by spaces, without their punctuation; part of a character class."""

_UNSPACED = re.compile(f"[{UNSPACED}\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3130-\u318f]")
"""With the punctuation of these scripts."""


def normalize(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop a/an/the, collapse white space.

    >>> normalize("The  Beatles!")
    'beatles'
    """
    # SQuAD's order: with articles removed first, "U.S.A." would lose its last letter.
    text = text.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def tokens(text: str) -> list[str]:
    """Words of the normalised text; in scripts without spaces, each character is a word.

    >>> tokens("The Tokyo 東京!")
    ['tokyo', '東', '京']
    """
    text = normalize(text)
    return (text if text.isascii() else _UNSPACED.sub(r" \g<0> ", text)).split()


def _levels(text: str) -> tuple[str, str, str]:
    """The text normalised; with its articles; with its articles and punctuation."""
    plain = " ".join(text.lower().split())
    return normalize(text), " ".join(plain.translate(_PUNCTUATION).split()), plain


def _compared(text: str) -> str:
    """The first non-empty level of the text."""
    return next(filter(None, _levels(text)), "")


def _holds_words(text: str, gold: str) -> bool:
    """Whether the text contains, as whole words, a gold answer that normalises to nothing; compared level by level."""
    levels = zip(_levels(text), _levels(gold), strict=True)
    return any(wanted and f" {wanted} " in f" {given} " for given, wanted in levels)


def _as_list(golden_answers: str | Iterable[str]) -> list[str]:
    return [golden_answers] if isinstance(golden_answers, str) else list(golden_answers)


def is_closed(golden_answers: str | Iterable[str]) -> bool:
    """Whether answer recall does not apply: all gold answers are yes, no or an article, or there are none.

    >>> is_closed(["Yes."]), is_closed(["no", "Norway"]), is_closed([])
    (True, False, True)
    """
    return all(_compared(gold) in {"yes", "no", *_ARTICLE_WORDS} for gold in _as_list(golden_answers))


def exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> bool:
    """Whether the prediction equals a gold answer after normalisation; an empty or missing prediction never matches.

    >>> exact_match("the Nile", ["Nile", "River Nile"])
    True
    >>> exact_match(None, ["None"]), exact_match("", ["The The"]), exact_match("the the", ["The The"])
    (False, False, True)
    """
    found = _compared(prediction or "")
    return bool(found) and any(found == _compared(gold) for gold in _as_list(golden_answers))


def sub_exact_match(prediction: str | None, golden_answers: str | Iterable[str]) -> bool:
    """Whether the prediction contains a gold answer after normalisation, also within words (FlashRAG's `acc`).

    A gold answer that normalises to nothing must occur as whole words.

    >>> sub_exact_match("It is the Nile.", ["Nile"]), sub_exact_match(None, ["The"]), sub_exact_match("Paris", ["The"])
    (True, False, False)
    """
    if prediction is None:
        return False
    found = normalize(prediction)
    wanted = {gold: normalize(gold) for gold in _as_list(golden_answers)}
    return any(name in found if name else _holds_words(prediction, gold) for gold, name in wanted.items())


def _f1_one(prediction: str, gold: str) -> float:
    found, wanted = normalize(prediction), normalize(gold)
    # If one side normalises to nothing, both are compared with their articles or punctuation.
    if not found or not wanted:
        found, wanted = _compared(prediction), _compared(gold)
        found_tokens, wanted_tokens = found.split(), wanted.split()
    else:
        found_tokens, wanted_tokens = tokens(prediction), tokens(gold)
    closed = {"yes", "no", "noanswer"}
    if found != wanted and (found in closed or wanted in closed):
        return 0.0
    common = sum((Counter(found_tokens) & Counter(wanted_tokens)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found_tokens), common / len(wanted_tokens)
    return 2 * precision * recall / (precision + recall)


def f1(prediction: str | None, golden_answers: str | Iterable[str]) -> float:
    """Highest token F1 over the gold answers, in 0..1; a missing prediction scores 0.

    Yes, no and "noanswer" only match themselves, as in the scorers of HotpotQA and FlashRAG.

    >>> f1("Marie Curie", ["Curie"])
    0.6666666666666666
    """
    if prediction is None:
        return 0.0
    return max((_f1_one(prediction, gold) for gold in _as_list(golden_answers)), default=0.0)


def contains_answer(text: str, golden_answers: str | Iterable[str]) -> bool:
    """Whether the text contains a gold answer as a run of whole normalised words (answer recall).

    A gold answer that normalises to nothing is searched for with its articles and punctuation. A lone article, which
    nearly every text contains, is never found.

    >>> contains_answer("He was born in Paris, France.", ["paris"])
    True
    >>> contains_answer("Parisian cafes", ["Paris"]), contains_answer("他出生于东京。", ["东京"])
    (False, True)
    """
    haystack = f" {' '.join(tokens(text))} "

    def holds(gold: str) -> bool:
        if words := tokens(gold):
            return f" {' '.join(words)} " in haystack
        return _compared(gold) not in _ARTICLE_WORDS and _holds_words(text, gold)

    return any(map(holds, _as_list(golden_answers)))
