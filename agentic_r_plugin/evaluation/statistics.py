"""How sure a result is: bootstrap intervals, paired comparison of two runs on the same questions, several seeds.

Legend: N questions, R resamples, S seeds. Everything is seeded and gives the same figures again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

_CHUNK = 4_000_000
"""Numbers drawn at once; bounds the memory."""

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
    """Two-sided, of a sign-flip permutation test: how often chance alone gives a difference at least as large."""
    num_questions: int
    level: float

    @property
    def beyond_chance(self) -> bool:
        """Whether the interval leaves out 0 and the permutation test agrees at the same level."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - self.level


def bootstrap_interval(values: Values, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Percentile bootstrap of the mean.

    Args:
        values: [N] one score per question.
        level: share of resampled means inside the interval.
        resamples: R.
        seed: of the resampling.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    values_N = _checked(values, level)
    means_R = np.concatenate(list(_resampled_means(values_N, resamples, seed)))
    low, high = _percentiles(means_R, level)
    return Interval(mean=float(values_N.mean()), low=low, high=high, num_questions=len(values_N))


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
        p_value=_sign_flip_p_value(difference_N, resamples, seed + 1),
        num_questions=len(difference_N),
        level=level,
    )


@dataclass(frozen=True, kw_only=True)
class SeedsInterval:
    """A mean over seeds and questions, and the interval that covers that of other seeds and other questions."""

    mean: float
    low: float
    high: float
    p_value: float
    """Two-sided, of the mean being 0: 1 less the level at which the interval touches it."""
    num_questions: int
    num_seeds: int
    per_seed: tuple[float, ...]
    """The mean of each seed."""


def seeds_interval(values: Sequence[Values], *, level: float = 0.95) -> SeedsInterval:
    """Mean of a score that several seeds got on the same questions; both are taken as random draws.

    Two intervals of Student's t, one of the seeds' means and one of the questions' means, whose half-widths are added
    in quadrature. The chance left within seed and question counts in both, so the interval is rather too wide than too
    narrow; with three seeds that differ it is wide, as it should be.

    Args:
        values: [S, N] one row per seed, the questions in one order.

    Raises:
        ValueError: fewer than two seeds or questions, or rows of different lengths.
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

    mean, surest = float(values_SN.mean()), 1 - 1e-9
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
    """Wilson's score interval of a share; good also at 0 and 1, where a bootstrap finds no spread at all.

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
    return (centre - half if successes else 0.0), (centre + half if successes < total else 1.0)


def _checked(values: Values, level: float) -> NDArray[np.float64]:
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or len(values_N) == 0:
        raise ValueError(f"expected at least one score, found an array of shape {values_N.shape}")
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, found {level}")
    return values_N


def _chunks(resamples: int, size: int) -> Iterator[int]:
    """Rows of each chunk, so that a chunk holds at most `_CHUNK` numbers."""
    rows = max(1, _CHUNK // max(size, 1))
    for start in range(0, resamples, rows):
        yield min(rows, resamples - start)


def _resampled_means(values_N: NDArray[np.float64], resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Means of R resamples, in chunks. Few distinct values (exact match has two) are drawn by how often each occurs."""
    rng, size = np.random.default_rng(seed), len(values_N)
    distinct_K, counts_K = np.unique(values_N, return_counts=True)
    if len(distinct_K) <= max(16, size // 50):
        for rows in _chunks(resamples, len(distinct_K)):
            yield rng.multinomial(size, counts_K / size, size=rows) @ distinct_K / size
        return
    for rows in _chunks(resamples, size):
        yield values_N[rng.integers(0, size, size=(rows, size))].mean(axis=1)


def _sign_flip_p_value(difference_N: NDArray[np.float64], resamples: int, seed: int) -> float:
    moved_M = difference_N[difference_N != 0]
    if len(moved_M) == 0:
        return 1.0
    rng, observed, extreme = np.random.default_rng(seed), abs(moved_M.sum()), 0
    for rows in _chunks(resamples, len(moved_M)):
        signs = rng.integers(0, 2, size=(rows, len(moved_M)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ moved_M) >= observed - 1e-9).sum())
    return (extreme + 1) / (resamples + 1)


def _percentiles(means_R: NDArray[np.float64], level: float) -> tuple[float, float]:
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
