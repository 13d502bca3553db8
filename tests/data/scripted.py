"""An agent and a retriever whose behaviour is a plain function of what they are given.

Used where a test needs to decide what the agent says; the stages drive them through the same interfaces as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from agentic_r_plugin.data import selection
from agentic_r_plugin.data.selection import SelectionRule, SelectionTask
from agentic_r_plugin.llm.base import Completion, Request, Sampling
from agentic_r_plugin.records import Candidates, Group, Passage
from agentic_r_plugin.search.base import Hit, SearchRequest


class CharCodec:
    """One id a character."""

    def encode_prompt(self, text: str) -> list[int]:
        return self.encode(text)

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class ScriptedAgent:
    """Writes `policy(text so far)`, and remembers what it was given."""

    def __init__(self, policy: Callable[[str], str]) -> None:
        self.policy, self.codec = policy, CharCodec()
        self.prompts: list[str] = []
        self.batches: list[int] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        assert sampling.stop == ("</search>", "</answer>")
        self.batches.append(len(requests))
        self.prompts += [self.codec.decode(request.prompt_ids) for request in requests]
        return [
            Completion(
                token_ids=tuple(self.codec.encode(self.policy(self.codec.decode(request.prompt_ids))))[
                    : request.max_tokens
                ],
                prompt_tokens=len(request.prompt_ids),
            )
            for request in requests
        ]

    def fingerprint(self) -> str:
        return "scripted"

    def close(self) -> None:
        pass


class ListedSearch:
    """Finds the passages listed for a query, and remembers its requests."""

    def __init__(self, found: dict[str, list[Passage]]) -> None:
        self.found = found
        self.requests: list[SearchRequest] = []

    def search(self, requests: Sequence[SearchRequest], topk: int) -> list[list[Hit]]:
        self.requests += requests
        return [
            [
                Hit(passage=passage, score=1.0 / rank)
                for rank, passage in enumerate(self.found.get(request.query, [])[:topk], start=1)
            ]
            for request in requests
        ]

    def fingerprint(self) -> str:
        return "listed"

    def close(self) -> None:
        pass


class Passages(dict[str, Passage]):
    """A corpus in memory."""

    def by_id(self, identifier: str) -> Passage:
        return self[identifier]


def passage(identifier: str, text: str = "") -> Passage:
    return Passage(id=identifier, title=f"T {identifier}", text=text or f"text of {identifier}")


def select(
    query: Candidates, relevance: Mapping[str, int] | None, correctness: Mapping[str, int] | None, rule: SelectionRule
) -> list[Group] | str:
    """The groups of one query, as `selection.select`."""
    return selection.select(SelectionTask(query=query, relevance=relevance, correctness=correctness), rule)
