"""Split the text of a trajectory into pieces for display, by author and purpose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from agentic_r_plugin.protocol import AgentProtocol


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of text of one kind."""

    kind: str
    """think, search, answer or other (written by the model); information or correction (by the environment)."""
    text: str
    """The text without its tags."""

    @property
    def by_model(self) -> bool:
        """Whether the model wrote it."""
        return self.kind not in ("information", "correction")


def pieces(text: str, protocol: AgentProtocol) -> list[Piece]:
    """Split the text of a trajectory.

    An information block directly after a search was written by the environment. Any other one is the model's invention.

    >>> from agentic_r_plugin.protocol import compact
    >>> [(piece.kind, piece.text) for piece in pieces("<think>Hm.</think><search> Nile </search>", compact)]
    [('think', 'Hm.'), ('search', 'Nile')]
    """
    found: list[Piece] = []
    information = re.compile(rf"\s*{_block(protocol, protocol.information_tag)}\s*", re.DOTALL)
    tags = {"think": protocol.think_tag, "search": protocol.search_tag, "answer": protocol.answer_tag}
    named = (f"(?P<{kind}>{_block(protocol, tag, may_end=True)})" for kind, tag in tags.items())
    block = re.compile("|".join(named), re.DOTALL)
    correction = protocol.correction.strip()
    position = 0
    while position < len(text):
        if found and found[-1].kind == "search" and (match := information.match(text, position)):
            found.append(Piece(kind="information", text=match[1].strip()))
            position = match.end()
            continue
        candidates = [match for match in (block.search(text, position),) if match]
        at = text.find(correction, position) if correction else -1
        start = min([match.start() for match in candidates] + ([at] if at >= 0 else []), default=len(text))
        if text[position:start].strip():
            found.append(Piece(kind="other", text=text[position:start].strip()))
        if start == len(text):
            break
        if start == at:
            found.append(Piece(kind="correction", text=correction))
            position = at + len(correction)
        else:
            match = candidates[0]
            inner = next(text for text in match.groups()[1::2] if text is not None)
            found.append(Piece(kind=str(match.lastgroup), text=inner.strip()))
            position = match.end()
    return found


def _block(protocol: AgentProtocol, tag: str, *, may_end: bool = False) -> str:
    closing, end = re.escape(protocol.closing(tag)), r"|\Z" if may_end else ""
    return rf"{re.escape(protocol.opening(tag))}(.*?)(?:{closing}{end})"
