"""Content words of a question, as a search query."""

from __future__ import annotations

from agentic_r_plugin.answers import normalize

_STOP_WORDS = frozenset(
    "a about after also an and are as at be been before both but by did do does during for from had has have he her "  # noqa: SIM905
    "him his how if in into is it its many more most much name named not of on one or other out over she since so some "
    "such than that the their them then there these they this those through to under until up was were what when where "
    "which while who whom whose why will with would you your".split()
)


def keywords(text: str, *, limit: int, without: str = "") -> list[str]:
    """Up to `limit` content words of `text` in order, without repeats and without the words of `without`.

    >>> keywords("Which band was formed first, Suede or Pulp?", limit=4, without="Pulp")
    ['band', 'formed', 'first', 'Suede']
    """
    left_out = _STOP_WORDS | set(normalize(without).split())
    words = [word.strip(".,;:!?()[]\"'`“”‘’") for word in text.split()]
    words = [word.removesuffix("'s").removesuffix("’s") for word in words]
    return [word for word in dict.fromkeys(words) if normalize(word) and normalize(word) not in left_out][:limit]
