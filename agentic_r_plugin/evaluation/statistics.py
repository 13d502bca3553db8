"""Uncertainty of results: bootstrap intervals, paired comparison of two runs on the same questions, several seeds.

Legend: N questions, R resamples, S seeds. All resampling is seeded, so the same input gives the same figures.

Not on `scipy.stats.bootstrap` and `permutation_test`: they draw other samples, so that recorded figures would change,
and N indices per resample where the counts of a few distinct values do. Its Wilson interval differs in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_CHUNK = 4_000_000
"""Maximum number of random numbers drawn at once; bounds the memory."""

Values = Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and the interval that covers it."""

    mean: float
    low: float
    high: float
    num_questions: int


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of `second - first` over the same questions."""

    difference: float
    low: float
    high: float
    p_value: float
    """Two-sided p-value of a sign-flip permutation test: how often chance alone gives a difference this large."""
    num_questions: int
    level: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval excludes 0 and the permutation test agrees at the same level."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - self.level


def bootstrap_interval(values: Values, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean.

    Args:
        values: [N] one score per question.
        level: share of resampled means inside the interval.
        resamples: number of resamples, R.
        seed: seed of the resampling.

    Raises:
        ValueError: there are no values, or the level is outside (0, 1).
    """
    values_N = _checked(values, level)
    means_R = np.concatenate(list(_resampled_means(values_N, resamples, seed)))
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(values_N.mean()), low=float(low), high=float(high), num_questions=len(values_N))


def paired_difference(
    first: Values, second: Values, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Compare two runs question by question: bootstrap interval of the difference, and a permutation test.

    Raises:
        ValueError: the runs have different numbers of questions, or none.
    """
    if len(first) != len(second):
        raise ValueError(f"expected the same questions in both runs, found {len(first)} and {len(second)}")
    difference_N = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    interval = bootstrap_interval(difference_N, level=level, resamples=resamples, seed=seed)
    return PairedDifference(
        difference=interval.mean,
        low=interval.low,
        high=interval.high,
        # `seed + 1`: other random numbers than those of the interval.
        p_value=_sign_flip_p_value(difference_N, resamples, seed + 1),
        num_questions=len(difference_N),
        level=level,
    )


@dataclass(frozen=True, kw_only=True)
class SeedsInterval:
    """A mean over seeds and questions, and an interval for the mean over other seeds and other questions."""

    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided p-value for a mean of 0: 1 minus the level at which the interval just touches 0."""
    num_questions: int
    num_seeds: int
    per_seed: tuple[float, ...]
    """The mean of each seed."""


def seeds_interval(values: Sequence[Values], *, level: float = 0.95) -> SeedsInterval:
    """Mean score of several seeds on the same questions. Seeds and questions are both treated as random samples.

    There are two Student's t intervals, over the means of the seeds and over the means of the questions. Their
    half-widths are added in quadrature. The residual variance enters both, so the interval is conservative. With only
    three seeds that differ it is wide.

    Args:
        values: [S, N] one row per seed, with the questions in the same order.

    Raises:
        ValueError: there are fewer than two seeds or questions, or rows of different lengths.
    """
    from scipy.optimize import brentq
    from scipy.stats import t as student

    if len({len(row) for row in values}) != 1:
        raise ValueError(f"expected the same questions for every seed, found {[len(row) for row in values]}")
    values_SN = np.asarray(values, dtype=np.float64)
    if min(values_SN.shape) < 2 or not 0 < level < 1:
        raise ValueError(f"expected 2 seeds, 2 questions and a level in (0, 1), found {values_SN.shape} and {level}")
    sides = (values_SN.mean(axis=1), values_SN.mean(axis=0))

    def half_width(level: float) -> float:
        return math.hypot(*(student.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5 for x in sides))

    # The p-value comes from inverting the interval: find the level at which it just reaches 0.
    mean, surest = float(values_SN.mean()), 1 - 1e-9
    # Without spread the interval never reaches 0, unless the mean is 0. `surest`: at level 1 it would be infinite.
    touching = float(mean != 0)
    if abs(mean) < half_width(surest):
        touching = brentq(lambda level: half_width(level) - abs(mean), 0, surest)
    half = half_width(level)
    return SeedsInterval(
        mean=mean,
        low=mean - half,
        high=mean + half,
        p_value=1 - touching,
        num_questions=values_SN.shape[1],
        num_seeds=values_SN.shape[0],
        per_seed=tuple(float(value) for value in sides[0]),
    )


def wilson_interval(successes: int, total: int, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share. It also works at 0 and 1, where a bootstrap interval has zero width.

    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 4), round(high, 4)
    (0.4902, 0.9433)
    """
    if not 0 <= successes <= total or total == 0:
        raise ValueError(f"expected 0 <= successes <= total and total > 0, found {successes} of {total}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share, weight = successes / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    # Exactly 0 and 1 at the ends, where rounding would leave a small difference.
    return (centre - half if successes else 0.0), (centre + half if successes < total else 1.0)


def _checked(values: Values, level: float) -> NDArray[np.float64]:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or len(values_N) == 0:
        raise ValueError(f"expected at least one score, found an array of shape {values_N.shape}")
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    return values_N


def _chunks(resamples: int, size: int) -> Iterator[int]:
    """Number of rows of each chunk, so that a chunk holds at most `_CHUNK` numbers."""
    rows = max(1, _CHUNK // max(size, 1))
    for start in range(0, resamples, rows):
        yield min(rows, resamples - start)


def _resampled_means(values_N: NDArray[np.float64], resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield the means of R resamples, in chunks."""
    rng, size = np.random.default_rng(seed), len(values_N)
    distinct_K, counts_K = np.unique(values_N, return_counts=True)
    # With few distinct values (exact match has two), the counts of a resample are multinomial. Drawing K counts instead
    # of N indices gives the same distribution at a fraction of the cost.
    if len(distinct_K) <= max(16, size // 50):
        for rows in _chunks(resamples, len(distinct_K)):
            yield rng.multinomial(size, counts_K / size, size=rows) @ distinct_K / size
        return
    for rows in _chunks(resamples, size):
        yield values_N[rng.integers(0, size, size=(rows, size))].mean(axis=1)


def _sign_flip_p_value(difference_N: NDArray[np.float64], resamples: int, seed: int) -> float:
    moved_M = difference_N[difference_N != 0]  # a zero stays zero under any sign
    if len(moved_M) == 0:
        return 1.0
    rng, observed, extreme = np.random.default_rng(seed), abs(moved_M.sum()), 0
    for rows in _chunks(resamples, len(moved_M)):
        signs = rng.integers(0, 2, size=(rows, len(moved_M)), dtype=np.int8) * 2 - 1
        # The tolerance: equal sums may differ by rounding.
        extreme += int((np.abs(signs @ moved_M) >= observed - 1e-9).sum())
    # Count the observed arrangement as one of the permutations, so that p is never 0.
    return (extreme + 1) / (resamples + 1)
