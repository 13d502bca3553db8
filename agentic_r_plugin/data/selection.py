"""The rule that turns a query's candidates into training groups (method sections 4 and 4a). No I/O.

A preset is the name of a registered `Selection`. Its function `pick` makes the groups of one query; paper and released
code share one (`select`) and differ in the `SelectionRule` it follows.

Candidates are ordered by (correctness, relevance), both descending. Correctness is needed only to find the positives.
So the correctness stage may stop at the first correct candidate (or, if ties are taken, after the first level with a
correct one), and negatives are sampled in retrieval order, which no score changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from agentic_r_plugin import components
from agentic_r_plugin.config import setting
from agentic_r_plugin.errors import ConfigError, RecordError, UnknownComponentError
from agentic_r_plugin.records import Candidates, Group, Trajectory

NO_RELEVANCE = "no_relevance"
BELOW_THRESHOLD = "relevance_below_threshold"
NOT_ROLLED_OUT = "not_rolled_out"
NO_CORRECT = "no_correct_candidate"
TOO_FEW_NEGATIVES = "too_few_negatives"
NO_TRAJECTORY = "no_trajectory"
NOTHING_OPENED = "nothing_opened"


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """What a user may set, whatever the preset; the defaults are the paper's."""

    threshold: int = setting("a positive's least relevance", default=60)
    num_negatives: int = setting("negatives per group", default=15)
    use_relevance: bool = setting("off: ablation without relevance", default=True)
    use_correctness: bool = setting("off: ablation without correctness", default=True)
    seed: int = setting("of the negatives' sampling", default=0)
    false_negative_relevance: int = setting(
        "ours: candidates of at least this relevance are no negatives; 0: off", default=0
    )
    hard_negatives: int = setting("ours: N negatives are the best-ranked others", default=0)


@dataclass(frozen=True, kw_only=True)
class SelectionRule(SelectionSettings):
    """How groups are selected: the settings, and what a preset fixes (`Selection.rule`)."""

    max_positives: int = 1
    """Maximum number of candidates tied for first place that become positives, one group each."""
    further_ties_are_negatives: bool = True
    """False: ties beyond `max_positives` are neither positives nor negatives."""
    any_of_ties: bool = False
    """Not in the paper: the positive is the tied candidate that was found correct first (correctness.order), not the
    first in retrieval order; the others may have no correctness."""

    def __post_init__(self) -> None:
        if not (self.use_relevance or self.use_correctness):
            raise ConfigError("use_relevance and use_correctness are both off; a positive needs one of them")
        for name in ("threshold", "false_negative_relevance"):
            if not 0 <= getattr(self, name) <= 100:
                raise ConfigError(f"{name}={getattr(self, name)}: expected a relevance, 0 to 100")
        if self.num_negatives < 0 or self.max_positives < 1:
            raise ConfigError(
                f"num_negatives={self.num_negatives}, max_positives={self.max_positives}: expected at least 0 and 1"
            )
        if not 0 <= self.hard_negatives <= self.num_negatives:
            raise ConfigError(f"hard_negatives={self.hard_negatives}: expected 0 to num_negatives={self.num_negatives}")
        if self.false_negative_relevance and not self.use_relevance:
            raise ConfigError("false_negative_relevance needs use_relevance: it compares relevance scores")

    @property
    def whole_levels(self) -> bool:
        """Whether all candidates of the winning level need correctness, not only those up to the first correct one."""
        return self.max_positives > 1 or not self.further_ties_are_negatives


@dataclass(frozen=True, kw_only=True)
class SelectionTask:
    """One query with all that is known about its candidates."""

    query: Candidates
    relevance: Mapping[str, int] | None = None
    """Passage id -> 0..100; None when the query has none."""
    correctness: Mapping[str, int] | None = None
    """Passage id -> 0 or 1 for the candidates rolled out; None when there are none."""
    trajectory: Trajectory | None = None
    """The query's trajectory, for selections that read it."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A component of kind `selection`: how groups are made of a query's candidates."""

    description: str
    needs: frozenset[str]
    """Files that it reads in addition to the candidates: `relevance`, `correctness`, `trajectories`. The first two are
    left out with `use_relevance=false` and `use_correctness=false`. The loop runs the stages of these files alone."""
    pick: Callable[[SelectionTask, SelectionRule], list[Group] | str]
    """The groups of one query, or the reason why it has none. RecordError: scores that it needs are missing."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SelectionRule` that it sets."""


def _opened(task: SelectionTask, rule: SelectionRule) -> list[Group] | str:
    """One group per opened passage (LRAT, arXiv 2604.04949).

    The relevance, if used, is the judge that filters positives: opened passages below the threshold, or without a
    relevance because they are no candidates, are neither positives nor negatives. Negatives are at most `num_negatives`
    passages that were shown and not opened, best first. With w words of reasoning before the next search, the weight is
    2 (w + 1) / (w + 51): near 1 for 50 words, and 1 after the last search.
    """
    query = task.query
    turns = {} if task.trajectory is None else {turn.turn: turn for turn in task.trajectory.turns}
    if query.turn not in turns:
        return NO_TRAJECTORY
    shown = [passage.id for passage in turns[query.turn].passages]
    opened = turns[query.turn].opened
    positives = [passage for passage in shown if passage in opened]
    if not positives:
        return NOTHING_OPENED
    if rule.use_relevance:
        if task.relevance is None:
            return NO_RELEVANCE
        judged = {passage: task.relevance[passage] for passage in positives if passage in task.relevance}
        positives = [passage for passage, relevance in judged.items() if relevance >= rule.threshold]
        if not positives:
            return BELOW_THRESHOLD if judged else NO_RELEVANCE
    others = [passage for passage in shown if passage not in opened]
    if not others:
        return TOO_FEW_NEGATIVES
    weight = 1.0
    if query.turn + 1 in turns:
        words = len(turns[query.turn + 1].reasoning.split())
        weight = 2 * (words + 1) / (words + 1 + _HALF_WORDS)
    return [replace(_group(query, one, others[: rule.num_negatives]), weight=weight) for one in positives]


_HALF_WORDS = 50
"""Words of reasoning after opening at which a group has half of the largest weight."""


def selection_named(preset: str) -> Selection:
    """The registered selection of this name.

    Raises:
        ConfigError: none has this name; the message lists the registered names.
    """
    try:
        found: Selection = components.load("selection", preset)
    except UnknownComponentError as error:
        raise ConfigError(f"preset={preset!r}: expected one of {', '.join(components.names('selection'))}") from error
    return found


def preset_rule(preset: str, **settings: Any) -> SelectionRule:
    """The selection rule of a preset, with further settings.

    Raises:
        ConfigError: an unknown preset, or settings that contradict each other.
    """
    return SelectionRule(**settings, **selection_named(preset).rule)


def tie_levels(passages: Sequence[str], relevance: Mapping[str, int], threshold: int) -> list[list[str]]:
    """Passages at or above `threshold`, grouped by relevance, best level first; retrieval order within a level.

    Raises:
        RecordError: a passage has no relevance.

    >>> tie_levels(["a", "b", "c", "d"], {"a": 70, "b": 90, "c": 70, "d": 10}, 60)
    [['b'], ['a', 'c']]
    """
    check_scored(passages, relevance)
    scores = sorted({relevance[passage] for passage in passages if relevance[passage] >= threshold}, reverse=True)
    return [[passage for passage in passages if relevance[passage] == score] for score in scores]


def check_scored(passages: Sequence[str], relevance: Mapping[str, int]) -> None:
    """Raise RecordError if a passage has no relevance."""
    unscored = [passage for passage in passages if passage not in relevance]
    if unscored:
        raise RecordError(f"no relevance for passage {unscored[0]!r}; the relevance file is of other candidates")


def rollout_order(passages: Sequence[str], relevance: Mapping[str, int], rule: SelectionRule) -> list[list[str]]:
    """Steps in which to roll out a query's candidates; its groups are known after the first step with a success.

    If only the first correct candidate matters, a step is one candidate, by descending relevance and, within ties, in
    retrieval order. If ties are taken too, a step is a whole level.

    Raises:
        RecordError: a passage has no relevance.

    >>> rollout_order(["a", "b", "c", "d"], {"a": 70, "b": 90, "c": 70, "d": 10}, preset_rule("paper"))
    [['b'], ['a'], ['c']]
    >>> rollout_order(["a", "b", "c", "d"], {"a": 70, "b": 90, "c": 70, "d": 10}, preset_rule("released_code"))
    [['b'], ['a', 'c']]
    """
    levels = tie_levels(passages, relevance, rule.threshold)
    return levels if rule.whole_levels else [[passage] for level in levels for passage in level]


def select(task: SelectionTask, rule: SelectionRule) -> list[Group] | str:
    """The paper's groups of one query, or those of the released code; or the reason why it has none.

    Raises:
        RecordError: the decision needs scores that are missing.
    """
    candidates, relevance, correctness = task.query, task.relevance, task.correctness
    passages = [passage.id for passage in candidates.passages]
    # Without relevance every candidate is equally good: a single level in retrieval order.
    levels = [passages]
    if rule.use_relevance:
        if relevance is None:
            return NO_RELEVANCE
        levels = tie_levels(passages, relevance, rule.threshold)
        if not levels:
            return BELOW_THRESHOLD
    # The correctness stage left the query out: no gold answer, a refused rollout, max_turn or num_candidates.
    if rule.use_correctness and not correctness:
        return NOT_ROLLED_OUT
    winners = _winners(candidates, levels, correctness if rule.use_correctness else None, rule)
    positives = winners[: rule.max_positives]
    if not positives:
        return NO_CORRECT
    # In the released code, further ties are dropped: they score as high as the positives, so they make bad negatives.
    taken = positives if rule.further_ties_are_negatives else winners
    # In retrieval order, not by score: the sample must not depend on correctness that was pruned (section 4a).
    others = [passage for passage in passages if passage not in taken]
    if rule.false_negative_relevance and relevance is not None:
        others = [passage for passage in others if relevance[passage] < rule.false_negative_relevance]
    if len(others) < rule.num_negatives:
        return TOO_FEW_NEGATIVES
    # The best-ranked others are the hard negatives. A seed per query makes the sample independent of the other queries.
    hard, rest = others[: rule.hard_negatives], others[rule.hard_negatives :]
    sampler = random.Random(f"{rule.seed}/{candidates.id}/{candidates.turn}")
    negatives = hard + sampler.sample(rest, rule.num_negatives - len(hard))
    return [_group(candidates, positive, negatives) for positive in positives]


def _group(candidates: Candidates, positive: str, negatives: Sequence[str]) -> Group:
    return Group(
        id=candidates.id,
        turn=candidates.turn,
        question=candidates.question,
        query=candidates.query,
        history=candidates.history,
        positive=positive,
        negatives=tuple(negatives),
        reasoning=candidates.reasoning,
    )


def _winners(
    candidates: Candidates, levels: Sequence[Sequence[str]], correctness: Mapping[str, int] | None, rule: SelectionRule
) -> list[str]:
    """Candidates tied for first place, in retrieval order (only the first one if no more are needed).

    Empty when no candidate is correct.

    Args:
        levels: candidates that may be positives, by falling relevance; retrieval order within a level.
        correctness: passage id -> 0 or 1; None: not used, and the whole best level wins.

    Raises:
        RecordError: a candidate that decides has no correctness.
    """
    if correctness is None:
        return list(levels[0])
    for level in levels:
        winners = []
        # With order=likelihood the tied candidates before the success in retrieval order may not have been rolled out.
        if rule.any_of_ties and any(correctness.get(passage) for passage in level):
            level = [passage for passage in level if passage in correctness]
        for passage in level:
            if passage not in correctness:
                raise RecordError(
                    f"query {candidates.key}: the correctness of passage {passage!r} is needed and unknown; the "
                    "correctness file was made with other relevance scores, a higher threshold or another preset, "
                    "make it again"
                )
            if correctness[passage]:
                winners.append(passage)
                # The correctness stage stopped here too: later candidates of the level may have no record.
                if not rule.whole_levels:
                    break
        if winners:
            return winners
    return []


_SCORES = frozenset({"relevance", "correctness"})
paper = Selection(
    description="The first of the correct candidates of highest relevance, and sampled negatives.",
    needs=_SCORES, pick=select,
)  # fmt: skip
released_code = Selection(
    description="As the paper, with up to 3 tied positives; further ties are left out.",
    needs=_SCORES, pick=select, rule={"max_positives": 3, "further_ties_are_negatives": False},
)  # fmt: skip
opened = Selection(
    description="Opened passages are positives, those shown and not opened negatives, weighted by the reasoning after.",
    needs=frozenset({"relevance", "trajectories"}), pick=_opened,
)  # fmt: skip
