"""The environment's text after a call, cut to a limit of tokens: as many passages as fit, or as much of a document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from agentic_r_plugin.errors import ConfigError
from agentic_r_plugin.protocol import AgentProtocol, Codec
from agentic_r_plugin.records import Passage

_CHARACTERS_PER_TOKEN = 16
"""A text longer than this per token of the limit is tokenised only in part at first."""

_LONGEST_WORD = 200
"""Characters before a cut in which to look for a space."""

_MARGIN = 16
"""Tokens above the limit from which a part of a text is too long whatever follows it."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """The result of one call, as the model reads it if its turn holds no other call."""

    content: str
    """The result alone (`AgentProtocol.render`)."""
    text: str
    """The environment's text around it (`AgentProtocol.reply`)."""
    ids: list[int]
    shown: list[Passage] = field(default_factory=list)
    """The passages in it, as they were cut."""


@dataclass(frozen=True)
class BlockWriter:
    """Writes blocks after one turn of the model.

    Args:
        protocol: the family of agents.
        codec: tokenizer of the agent.
        wrote: ids of the turn, or of the prefix that the trajectory continues.
    """

    protocol: AgentProtocol
    codec: Codec
    wrote: Sequence[int]

    def write(self, content: str) -> Block:
        """The block that shows this content, of any length."""
        text = self._text(content)
        return Block(content=content, text=text, ids=self.codec.encode(text))

    def fit(self, passages: Sequence[Passage], render: Callable[[Sequence[Passage]], str], most: int) -> Block:
        """As many leading passages as fit into `most` tokens, at least one if there is one.

        If the first is too long, its text is cut, and if no text is left, its title.

        Args:
            render: makes the content from passages.

        Raises:
            ConfigError: the first does not fit without title and text, because its id is too long.
        """
        shown = list(passages)
        ids: list[int] = []
        encoded = ""
        while True:
            content = render(shown)
            text = self._text(content)
            # With fewer passages the block often begins with the same text that was already too long.
            if not encoded or not text.startswith(encoded):
                ids, encoded = self._encode_start(text, most)
            # A result without passages has nothing that could be cut.
            if encoded == text and (len(ids) <= most or not shown):
                return Block(content=content, text=text, ids=ids, shown=shown)
            if len(shown) > 1:
                shown.pop()
            else:
                shown, encoded = [self._cut(shown[0], len(encoded), most, len(ids))], ""

    def _text(self, content: str) -> str:
        return self.protocol.reply([content], self.wrote, self.codec)

    def _cut(self, passage: Passage, characters: int, most: int, tokens: int) -> Passage:
        """The passage with a shorter text, or without text a shorter title.

        Tokens per word vary, so the cut is an estimate; the caller repeats it until the block fits.
        """
        if passage.text:
            # `tokens` were counted for the first `characters` of the block, so text beyond them is dropped first.
            text = shortened(passage.text[:characters], most, tokens)
            return Passage(id=passage.id, title=passage.title, text=text)
        if passage.title:
            return Passage(id=passage.id, title=shortened(passage.title[:characters], most, tokens), text="")
        raise ConfigError(
            f"agent protocol {self.protocol.name!r}: without title and text, {passage.id[:60]!r} takes more than "
            f"{most} tokens; leave its id out of passage_form, or raise limits.max_observation_tokens"
        )

    def _encode_start(self, text: str, most: int) -> tuple[list[int], str]:
        """Ids of a text, or of a prefix of it that is already too long, with what they encode.

        A block may be a hundred times longer than the limit, and tokenising all of it would block the event loop. The
        number of characters per token is not bounded, so the prefix grows until it has too many tokens.
        """
        length = _CHARACTERS_PER_TOKEN * most
        while length < len(text):
            # A word that is cut in two may have more tokens than the whole word.
            space = text.rfind(" ", length - _LONGEST_WORD, length)
            start = text[: space if space > 0 else length]
            ids = self.codec.encode(start)
            if len(ids) > most + _MARGIN:
                return ids, start
            length *= 2
        return self.codec.encode(text), text


def shortened(text: str, most: int, tokens: int) -> str:
    """`most / tokens` of a text's words, or of its characters if it has few words (Chinese, Thai); always shorter.

    >>> shortened("one two three four", 1, 2), shortened("一二三四", 1, 2), shortened("x", 9, 10)
    ('one two', '一二', '')
    """
    words = text.split(" ")
    keep = min(len(words) - 1, len(words) * most // tokens)
    # No words are left of a text that begins with a space and one long word.
    return " ".join(words[:keep]) or text[: max(0, min(len(text) - 1, len(text) * most // tokens))]
