"""Whatever a model writes and whatever passages hold: the driver raises nothing, and mask, answer and limits are right.

Every registered protocol is driven by `run_sessions`, with a codec whose tokens hold one to three characters, so that
tags are cut anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agentic_r_plugin import components
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.protocol import Finished, Limits
from agentic_r_plugin.records import Passage, StopReason
from agentic_r_plugin.rollout import run_sessions
from agentic_r_plugin.search.base import Hit, SearchRequest
from agentic_r_plugin.session import Session
from agentic_r_plugin.tags import TagProtocol

EVERY = (components.load("agent_protocol", name) for name in components.names("agent_protocol"))
PROTOCOLS = {protocol.name: protocol for protocol in EVERY if isinstance(protocol, TagProtocol)}
MARKS = sorted(
    {
        mark
        for protocol in PROTOCOLS.values()
        for tag in (protocol.think_tag, protocol.search_tag, protocol.answer_tag, protocol.information_tag)
        for mark in (protocol.opening(tag), protocol.closing(tag))
    }
)
PIECES = [
    *MARKS,
    "<|im_end|>",
    "<|endoftext|>",
    "<",
    "</",
    "|>",
    "{",
    "}",
    "\\boxed",
    "\n\n",
    " ",
    "Paris",
    "\ufffd",
    "é🙂",
]


class ChunkCodec:
    """An id for each run of characters it has met: three where a text's place is even, else one."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        found, place = [], 0
        while place < len(text):
            piece = text[place : place + (1 if place % 2 else 3)]
            found.append(self.ids.setdefault(piece, len(self.pieces)))
            if found[-1] == len(self.pieces):
                self.pieces.append(piece)
            place += len(piece)
        return found

    encode_prompt = encode

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[number] for number in ids)


class AnyModel:
    """Writes what it is given, as far as it may; keeps what it wrote for each session."""

    def __init__(self, codec: ChunkCodec, texts: Sequence[str]) -> None:
        self.codec, self.texts, self.wrote = codec, list(texts), []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        (request,) = requests
        text = self.texts[len(self.wrote) % len(self.texts)] or "x"
        ids = tuple(self.codec.encode(text)[: request.max_tokens])
        assert request.max_tokens >= 1
        self.wrote.append(list(ids))
        return [Completion(token_ids=ids, prompt_tokens=len(request.prompt_ids))]


class AnySearch:
    """Finds the passages it is given."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        passages = [Passage(id=str(i), title=text[:9], text=text) for i, text in enumerate(self.texts[:topk])]
        return [[Hit(passage=passage, score=1.0) for passage in passages] for _ in requests]


texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(PROTOCOLS)),
    written=st.lists(texts, min_size=1, max_size=5),
    found=st.lists(texts, max_size=3),
    limits=st.builds(
        Limits,
        max_searches=st.integers(0, 4),
        max_malformed=st.integers(0, 2),
        max_tokens=st.integers(700, 1100),
        max_response_tokens=st.integers(1, 30),
        max_observation_tokens=st.integers(60, 160),
    ),
)
def test_any_model_and_any_passages_keep_mask_answer_and_limits(
    name: str, written: list[str], found: list[str], limits: Limits
) -> None:
    protocol = PROTOCOLS[name]
    codec = ChunkCodec()
    session = Session(protocol, codec, limits, "Who?")
    model = AnyModel(codec, written)
    run_sessions([session], model, AnySearch(found), topk=3, sampling=Sampling())  # type: ignore[arg-type]
    check(session, model, limits)


def check(session: Session, model: Any, limits: Limits) -> None:
    protocol, codec = session.protocol, session.codec
    assert isinstance(protocol, TagProtocol)
    ids, mask = session.response_ids, session.response_mask
    finished = session.finished
    assert isinstance(finished, Finished)
    assert len(mask) == len(ids) and set(mask) <= {0, 1} and mask[-1] == 1
    assert [number for number, kept in zip(ids, mask, strict=True) if kept] == list(chain.from_iterable(model.wrote))
    environment = [segment for segment in session.segments if not segment.by_model]
    assert [number for number, kept in zip(ids, mask, strict=True) if not kept] == list(
        chain.from_iterable(segment.ids for segment in environment)
    )
    assert len(session.ids) <= limits.max_tokens
    assert all(len(turn) <= limits.max_response_tokens for turn in model.wrote)
    assert session.searches <= limits.max_searches and len(session.turns) <= session.searches
    assert session.malformed <= limits.max_malformed + 1
    opening, closing = (f(protocol.information_tag) for f in (protocol.opening, protocol.closing))
    for segment in environment:
        if segment.text == protocol.correction:
            continue
        assert len(segment.ids) <= limits.max_observation_tokens
        assert (segment.text.count(opening), segment.text.count(closing)) == (1, 1)
        inside = segment.text.partition(opening)[2].rpartition(closing)[0]
        assert "<|" not in inside and "</" not in inside
    last = protocol.parse(codec.decode(model.wrote[-1]))
    if finished.stop_reason is StopReason.ANSWERED:
        assert last == finished and finished.answer is not None
        assert finished.answer in codec.decode(model.wrote[-1]) or "\\" in codec.decode(model.wrote[-1])
    else:
        assert finished.answer is None and not isinstance(last, Finished)
