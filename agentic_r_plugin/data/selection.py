"""The rule that turns a query's candidates into training groups (method sections 4 and 4a). No I/O.

Candidates are ordered by (correctness, relevance), both falling. Correctness is needed only to find the positives: that
is why the correctness stage may stop at the first correct candidate (or, where several ties are taken, at the first
level with one), and why negatives are sampled from retrieval order, which no score changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_r_plugin.errors import ConfigError, RecordError
from agentic_r_plugin.records import Candidates, Group

NO_RELEVANCE = "no_relevance"
BELOW_THRESHOLD = "relevance_below_threshold"
NOT_ROLLED_OUT = "not_rolled_out"
NO_CORRECT = "no_correct_candidate"
TOO_FEW_NEGATIVES = "too_few_negatives"
DUPLICATE_QUERY = "duplicate_query"


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """How groups are picked; the defaults are the paper's."""

    threshold: int = 60
    """A positive's least relevance."""
    num_negatives: int = 15
    max_positives: int = 1
    """Candidates tied for the first place that are taken, one group each."""
    further_ties_are_negatives: bool = True
    """False: ties beyond `max_positives` are neither positives nor negatives."""
    use_relevance: bool = True
    """False: ablation without relevance; all candidates are one level."""
    use_correctness: bool = True
    """False: ablation without correctness; the level of highest relevance wins."""
    seed: int = 0
    false_negative_relevance: int = 0
    """Ours, 0 is off: candidates of at least this relevance are no negatives."""
    hard_negatives: int = 0
    """Ours: so many of the negatives are the best-ranked others in retrieval order, the rest is sampled."""

    def __post_init__(self) -> None:
        if not (self.use_relevance or self.use_correctness):
            raise ConfigError("use_relevance and use_correctness are both off; a positive needs one of them")
        if self.num_negatives < 0 or self.max_positives < 1:
            raise ConfigError(
                f"num_negatives={self.num_negatives}, max_positives={self.max_positives}: expected at least 0 and 1"
            )
        if not 0 <= self.hard_negatives <= self.num_negatives:
            raise ConfigError(f"hard_negatives={self.hard_negatives}: expected 0 to num_negatives={self.num_negatives}")
        if self.false_negative_relevance and not self.use_relevance:
            raise ConfigError("false_negative_relevance needs use_relevance: it is told by the relevance")

    @property
    def whole_levels(self) -> bool:
        """Whether the correctness of every candidate of the winning level is needed, not only of the first ones."""
        return self.max_positives > 1 or not self.further_ties_are_negatives


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"max_positives": 1},
    "released_code": {"max_positives": 3, "further_ties_are_negatives": False},
}
"""What each preset sets (method section 4, step 6)."""


def preset_rule(preset: str, **settings: Any) -> SelectionRule:
    """The rule of a preset, with further settings.

    Raises:
        ConfigError: an unknown preset, or settings that contradict each other.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r}: expected one of {', '.join(PRESETS)}")
    return SelectionRule(**settings, **PRESETS[preset])


def tie_levels(passages: Sequence[str], relevance: Mapping[str, int], threshold: int) -> list[list[str]]:
    """Passages of relevance at least `threshold`, best first, equals together; retrieval order within a level.

    Raises:
        RecordError: a passage has no relevance.

    >>> tie_levels(["a", "b", "c", "d"], {"a": 70, "b": 90, "c": 70, "d": 10}, 60)
    [['b'], ['a', 'c']]
    """
    unscored = [passage for passage in passages if passage not in relevance]
    if unscored:
        raise RecordError(f"no relevance for passage {unscored[0]!r}; the relevance file is of other candidates")
    scores = sorted({relevance[passage] for passage in passages if relevance[passage] >= threshold}, reverse=True)
    return [[passage for passage in passages if relevance[passage] == score] for score in scores]


def rollout_order(passages: Sequence[str], relevance: Mapping[str, int], rule: SelectionRule) -> list[list[str]]:
    """Steps in which to roll out a query's candidates: its groups are known after the first step with a success.

    Where only the first correct candidate matters, a step is a single candidate, in falling relevance and, among
    equals, in retrieval order. Where ties are taken too, a step is a whole level.

    Raises:
        RecordError: a passage has no relevance.

    >>> rollout_order(["a", "b", "c", "d"], {"a": 70, "b": 90, "c": 70, "d": 10}, preset_rule("paper"))
    [['b'], ['a'], ['c']]
    >>> rollout_order(["a", "b", "c", "d"], {"a": 70, "b": 90, "c": 70, "d": 10}, preset_rule("released_code"))
    [['b'], ['a', 'c']]
    """
    levels = tie_levels(passages, relevance, rule.threshold)
    return levels if rule.whole_levels else [[passage] for level in levels for passage in level]


def select(
    candidates: Candidates,
    relevance: Mapping[str, int] | None,
    correctness: Mapping[str, int] | None,
    rule: SelectionRule,
    same_text: Mapping[str, str] | None = None,
) -> list[Group] | str:
    """The training groups of one query, or why it has none.

    Args:
        candidates: in retrieval order.
        relevance: passage id -> 0..100; None when the query has none.
        correctness: passage id -> 0 or 1, of those rolled out; None when the query has none.
        rule: how to pick.
        same_text: ours, passage id -> what its text is known by: of equal ones only the first can be a negative, and
            none where a positive has that text. None keeps all.

    Raises:
        RecordError: scores are missing that the decision needs.
    """
    passages = [passage.id for passage in candidates.passages]
    if len(set(passages)) != len(passages):
        raise RecordError(f"query {candidates.key}: a passage occurs twice among its candidates")
    levels = [passages]
    if rule.use_relevance:
        if relevance is None:
            return NO_RELEVANCE
        levels = tie_levels(passages, relevance, rule.threshold)
        if not levels:
            return BELOW_THRESHOLD
    if rule.use_correctness and not correctness:
        return NOT_ROLLED_OUT
    winners = _winners(candidates, levels, correctness if rule.use_correctness else None, rule)
    positives = winners[: rule.max_positives]
    if not positives:
        return NO_CORRECT
    taken = positives if rule.further_ties_are_negatives else winners
    others = [passage for passage in passages if passage not in taken]
    if rule.false_negative_relevance and relevance is not None:
        others = [passage for passage in others if relevance[passage] < rule.false_negative_relevance]
    if same_text is not None:
        others = _without_repeats(others, positives, same_text)
    if len(others) < rule.num_negatives:
        return TOO_FEW_NEGATIVES
    hard, rest = others[: rule.hard_negatives], others[rule.hard_negatives :]
    sampler = random.Random(f"{rule.seed}/{candidates.id}/{candidates.turn}")
    negatives = hard + sampler.sample(rest, rule.num_negatives - len(hard))
    return [
        Group(
            id=candidates.id,
            turn=candidates.turn,
            question=candidates.question,
            query=candidates.query,
            history=candidates.history,
            positive=positive,
            negatives=tuple(negatives),
        )
        for positive in positives
    ]


def _without_repeats(others: Sequence[str], positives: Sequence[str], same_text: Mapping[str, str]) -> list[str]:
    """The first candidate of each text, without the positives' texts."""
    seen = {same_text[passage] for passage in positives}
    kept = []
    for passage in others:
        if same_text[passage] not in seen:
            seen.add(same_text[passage])
            kept.append(passage)
    return kept


def _winners(
    candidates: Candidates, levels: Sequence[Sequence[str]], correctness: Mapping[str, int] | None, rule: SelectionRule
) -> list[str]:
    """Candidates that tie for the first place, in retrieval order (only the first one, where no more is needed).

    None when no candidate is correct.
    """
    if correctness is None:
        return list(levels[0])
    for level in levels:
        winners = []
        for passage in level:
            if passage not in correctness:
                raise RecordError(
                    f"query {candidates.key}: the correctness of passage {passage!r} is needed and unknown; the "
                    "correctness file was made with other relevance scores, a higher threshold or another preset, "
                    "make it again"
                )
            if correctness[passage]:
                winners.append(passage)
                if not rule.whole_levels:
                    break
        if winners:
            return winners
    return []
