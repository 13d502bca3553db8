"""Observations from passages of any length: the same ids as from tokenising all of it, without tokenising all of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from agentic_r_plugin.blocks import shortened
from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.llm.codec import TokenizerCodec
from agentic_r_plugin.protocol import Limits
from agentic_r_plugin.records import Passage
from agentic_r_plugin.search.encoder import resolve
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import compact

MOST = 60
BOUND = 16 * MOST
"""Characters up to which a block is tokenised whole."""

PIECES = (
    "river", "Bergen", "antidisestablishmentarianism", "x" * 150, "-" * 40, " " * 30, "\t\n", "字字字", "กรุงเทพ", "é🙂",
    "<", "12345", "a", "https://example.org/" + "q" * 60, "\u200b" * 20, "don't", "...",
)  # fmt: skip


class CountingCodec(TokenizerCodec):
    """Counts the characters that are tokenised."""

    characters = 0

    def encode(self, text: str) -> list[int]:
        self.characters += len(text)
        return super().encode(text)


@cache
def tokenizer(name: str) -> Any:
    folder = Path(__file__).parent.parent / "recipes/quickstart/agent" if name == "bpe" else resolve("builtin:minilm")
    return AutoTokenizer.from_pretrained(folder)


def observation(codec: TokenizerCodec, passages: Sequence[Passage]) -> tuple[list[str], list[int], str]:
    """Ids of the passages shown, the token ids and the text of the information block."""
    session = Session(compact, codec, Limits(max_observation_tokens=MOST, max_tokens=100_000), "Who?")
    block = session._writer.fit(passages, compact.render, MOST)
    return [passage.id for passage in block.shown], block.ids, block.text


def from_all(codec: TokenizerCodec, passages: Sequence[Passage]) -> tuple[list[str], list[int], str]:
    """The same by tokenising whole blocks, also those that are too long."""
    shown = list(passages)
    while True:
        block = compact.render(shown)
        ids = codec.encode(block)
        if len(ids) <= MOST or not shown:
            return [passage.id for passage in shown], ids, block
        if len(shown) > 1:
            shown.pop()
        else:
            text = shortened(shown[0].text, MOST, len(ids))
            shown = [Passage(id=shown[0].id, title=shown[0].title, text=text)]


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
def test_observations_are_those_of_tokenising_everything(name: str) -> None:
    draw, seen = random.Random(name), dict.fromkeys(("fits", "long, fits", "shortened", "long, shortened"), 0)
    for _ in range(150):
        pieces = draw.choices(PIECES, k=draw.randint(1, 4))
        texts = [
            "".join(draw.choice((" ", "")) + draw.choice(pieces) for _ in range(draw.choice((1, 5, 20, 90, 800))))
            for _ in range(draw.randint(1, 3))
        ]
        passages = [Passage(id=str(rank), title="T", text=text) for rank, text in enumerate(texts)]
        codec = CountingCodec(tokenizer(name))
        shown, ids, block = observation(codec, passages)
        first, expected = compact.render(passages[:1]), from_all(codec, passages)
        fits = len(codec.encode(first)) <= MOST
        seen[f"{'long, ' if len(first) > BOUND else ''}{'fits' if fits else 'shortened'}"] += 1
        if fits or len(first) <= BOUND:
            assert (shown, ids, block) == expected
        else:  # its last words are lost, perhaps one more or less than where all of it is tokenised
            assert ids == codec.encode(block) and len(ids) <= MOST
            assert first.startswith(block.removesuffix("</information>\n\n")) and shown == ["0"]
    assert min(count for kind, count in seen.items() if (name, kind) != ("bpe", "long, fits")) > 0, seen


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
def test_little_more_than_an_observation_holds_is_tokenised_of_long_passages(name: str) -> None:
    text = " ".join(f"word{number}" for number in range(12_000))
    passages = [Passage(id=str(rank), title="T", text=text) for rank in range(3)]
    codec = CountingCodec(tokenizer(name))
    shown, ids, _ = observation(codec, passages)
    assert shown == ["0"] and MOST * 0.7 < len(ids) <= MOST
    assert codec.characters < 3 * BOUND


@pytest.mark.parametrize("name", ["bpe", "wordpiece"])
@pytest.mark.parametrize(
    "line", ["lighthouse keeper " * 400, "字" * 2_000, "a/" * 2_500], ids=["words", "字", "slashes"]
)
def test_a_title_too_long_is_cut_and_a_passage_is_always_shown(name: str, line: str) -> None:
    passages = [Passage.from_contents(str(rank), f"{line}\nThe text of {rank}.") for rank in range(3)]
    codec = CountingCodec(tokenizer(name))
    shown, ids, block = observation(codec, passages)
    assert shown == ["0"] and ids == codec.encode(block) and len(ids) <= MOST
    head, tail = compact.render([Passage(id="", title="|", text="")]).split("|")
    assert block.startswith(head + line[:5]) and block.endswith(tail)


def test_limits_that_hold_no_passage_are_an_error() -> None:
    codec = TokenizerCodec(tokenizer("bpe"))
    empty = len(codec.encode(compact.render([Passage(id="", title="", text="")])))
    Session(compact, codec, Limits(max_observation_tokens=empty), "Who?")
    with pytest.raises(ConfigError, match=f"={empty - 1}: a block with one empty passage takes {empty}"):
        Session(compact, codec, Limits(max_observation_tokens=empty - 1), "Who?")
