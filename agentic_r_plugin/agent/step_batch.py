"""The trajectories of one training step: whether enough of them arrived, which are trained on, and in which order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from agentic_r_plugin.agent.agent_loop import request_seed
from agentic_r_plugin.errors import TrainingError

T = TypeVar("T")


class BatchRow(NamedTuple):
    """A trajectory in verl's store: its key and tag there, and the agent loop's `extra_fields`."""

    key: str
    tag: Any
    extra: dict[str, Any]

    @property
    def place(self) -> tuple[int, ...]:
        """(data set row, sample number)."""
        return tuple(self.extra["place"])


def trainable(rows: Sequence[BatchRow], *, compared: bool) -> list[BatchRow]:
    """The trajectories whose searches all succeeded.

    Args:
        compared: whether the trajectories of a question are compared (GRPO); one that is left alone is removed too.
    """
    kept = [row for row in rows if not row.extra["search_failed"]]
    left = Counter(row.place[0] for row in kept)
    # For a trajectory without others verl takes 0 as the baseline: its reward would be its advantage.
    return [row for row in kept if left[row.place[0]] > 1] if compared else kept


def by_length_within(rows: Sequence[T], size: int, length: Callable[[T], int]) -> list[T]:
    """Sort each block of `size` rows by length, to reduce padding within micro-batches.

    With one worker, a block is a mini-batch. With several, verl distributes the rows of the batch by length and then
    takes each worker's share of a mini-batch from its rows in this order, so rows near a block boundary may move to the
    neighbouring mini-batch.

    >>> by_length_within(["ccc", "a", "bb", "dd", "e"], 3, len)
    ['a', 'bb', 'ccc', 'e', 'dd']
    """
    starts = range(0, len(rows), size)
    return [row for start in starts for row in sorted(rows[start : start + size], key=length)]


def drawn(place: tuple[int, ...], seed: int, step: int) -> tuple[int, tuple[int, ...]]:
    """Sort key that shuffles the trajectories of a step; repeating the step gives the same order.

    >>> sorted([(0, 0), (1, 0), (2, 0), (3, 0)], key=lambda place: drawn(place, 0, 1))
    [(3, 0), (0, 0), (2, 0), (1, 0)]
    """
    return request_seed(seed, step, *place), place


def check_trajectories(trajectories: Sequence[dict[str, Any]], expected: int, max_share: float, step: int) -> None:
    """Stop if a step would silently train on fewer trajectories than expected.

    Raises:
        TrainingError: trajectories are missing because their agent loop raised, or too many searches failed.
    """
    if len(trajectories) < expected:
        raise TrainingError(
            f"step {step}: {expected - len(trajectories)} of {expected} trajectories did not arrive because their "
            "agent loop raised an error; the training log shows it ('Error in _run_prompt')"
        )
    share = sum(item["search_failed"] for item in trajectories) / len(trajectories)
    if share > max_share or share == 1:  # with none left, nothing can be trained on
        raise too_many_failed(f"step {step}", share, max_share)


def check_masks(trajectories: Sequence[dict[str, Any]], trained: Sequence[int], step: int) -> None:
    """Check for each trajectory that verl trains on as many tokens as the agent loop selected.

    Args:
        trained: sum of each trajectory's mask in verl's batch.

    Raises:
        TrainingError: a count differs.
    """
    for item, found in zip(trajectories, trained, strict=True):
        chosen = item["trained_tokens"]
        if found != chosen:
            raise TrainingError(
                f"step {step}: trajectory {item['trajectory']['id']!r}: the agent loop selected {chosen} tokens for "
                f"training, but verl's batch has {found}; the response mask was changed in between"
            )


def too_many_failed(where: str, share: float, max_share: float) -> TrainingError:
    """The error that ends a run in which too large a share of the searches failed."""
    return TrainingError(
        f"{where}: the search of {share:.0%} of the trajectories failed, more than the {max_share:.0%} allowed "
        "(max_failed_search_share). Check the retrieval service, then continue with --resume"
    )
