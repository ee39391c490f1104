"""Intervals, paired tests and ranks for few, noisy, possibly infinite numbers. Lower is better throughout."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats


@dataclass(frozen=True)
class Interval:
    """An estimate from ``count`` values between the bounds of its interval (infinite where there is none)."""

    estimate: float
    low: float
    high: float
    level: float
    count: int


@dataclass(frozen=True)
class PairedComparison:
    """``a`` against ``b`` over the same blocks (seeds, data sets); lower is better.

    Attributes:
        wins, ties, losses: blocks where ``a`` is lower, equal, higher.
        difference: mean of ``a - b`` with its t interval; infinite values (no trial finished) make it infinite.
        effect: matched-pairs rank-biserial correlation in ``[-1, 1]``; -1 where ``a`` is lower in every block.
        p_value: two-sided Wilcoxon signed-rank test.
        smallest_p: the smallest p-value that so many untied pairs can give.
    """

    count: int
    wins: int
    ties: int
    losses: int
    difference: Interval
    effect: float
    p_value: float
    smallest_p: float


@dataclass(frozen=True)
class Ranks:
    """Mean rank of each of the ``K`` columns (1 is best), and the Friedman test that they all are alike."""

    mean_ranks: np.ndarray
    statistic: float
    p_value: float
    count: int


def _sample(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values, np.float64).ravel()
    if array.size == 0:
        raise ValueError(f"{name}: at least one value is needed")
    if np.isnan(array).any():
        raise ValueError(f"{name}: {int(np.isnan(array).sum())} of {array.size} values are NaN; leave them out and say so")
    return array


def mean_interval(values: Any, level: float = 0.95) -> Interval:
    """Mean with Student's t interval; for one value, or where one is infinite, the bounds are infinite.

    Raises:
        ValueError: for no values, or NaN among them.
    """
    array = _sample("mean_interval", values)
    if not np.isfinite(array).all():
        with np.errstate(invalid="ignore"):
            return Interval(float(array.mean()), -math.inf, math.inf, level, array.size)
    mean = float(array.mean())
    if array.size < 2:
        return Interval(mean, -math.inf, math.inf, level, array.size)
    half = stats.t.ppf(0.5 + level / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
    return Interval(mean, float(mean - half), float(mean + half), level, array.size)


def median_interval(values: Any, level: float = 0.95, resamples: int = 4000, seed: int = 0) -> Interval:
    """Median with its percentile bootstrap interval (Efron 1979); the same seed gives the same interval.

    With fewer than about six values the interval is the range of the values and covers less than ``level``.

    Raises:
        ValueError: for no values, or NaN among them.
    """
    array = _sample("median_interval", values)
    drawn = np.random.default_rng(seed).integers(array.size, size=(resamples, array.size), dtype=np.int32)
    medians = np.sort(_middle(array[drawn]))
    tail = (1 - level) / 2
    low, high = medians[math.floor(tail * (resamples - 1))], medians[math.ceil((1 - tail) * (resamples - 1))]
    return Interval(float(_middle(array[None])[0]), float(low), float(high), level, array.size)


def _middle(rows: np.ndarray) -> np.ndarray:
    """Median of each row; two infinities in the middle give infinity, not NaN."""
    size = rows.shape[1]
    low, high = (size - 1) // 2, size // 2
    part = np.partition(rows, (low, high), axis=1)
    return np.where(part[:, low] == part[:, high], part[:, low], part[:, low] / 2 + part[:, high] / 2)


def paired_comparison(a: Any, b: Any, level: float = 0.95) -> PairedComparison:
    """Compare ``a[N]`` and ``b[N]`` pair by pair; infinity (nothing finished) is worse than any number.

    Equal pairs are ties: they count for neither side and Wilcoxon's test leaves them out.

    Raises:
        ValueError: for different lengths, no pairs, or NaN.
    """
    a, b = _sample("a", a), _sample("b", b)
    if a.size != b.size:
        raise ValueError(f"pairs are due, not {a.size} and {b.size} values")
    with np.errstate(invalid="ignore"):
        difference = np.where(a == b, 0.0, a - b)
    untied = difference[difference != 0]
    wins, losses = int((untied < 0).sum()), int((untied > 0).sum())
    effect, p = 0.0, 1.0
    if untied.size:
        ranks = stats.rankdata(np.abs(untied))
        effect = float((ranks[untied > 0].sum() - ranks[untied < 0].sum()) / ranks.sum())  # Kerby 2014
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            p = float(stats.wilcoxon(np.sign(untied) * ranks).pvalue)  # ranks: an infinite difference is just the largest
    smallest = min(1.0, 2.0 ** (1 - untied.size))
    return PairedComparison(a.size, wins, a.size - untied.size, losses, mean_interval(difference, level), effect, p, smallest)


def win_probability(a: Any, b: Any, level: float = 0.95) -> Interval:
    """Probability that a draw of ``a[M]`` is lower than one of ``b[N]``, ties counted half.

    The interval is method 5 of Newcombe (2006): the variance of Hanley and McNeil at the bound itself, so
    that it stays within ``[0, 1]`` and has a width even where one sample wins every time.
    """
    a, b = _sample("a", a), _sample("b", b)
    rank_sum = stats.rankdata(np.concatenate([a, b]))[a.size :].sum()
    share = float(rank_sum - b.size * (b.size + 1) / 2) / (a.size * b.size)  # Mann-Whitney U of b over M N
    z, half = float(stats.norm.ppf(0.5 + level / 2)), (a.size + b.size) / 2 - 1

    def excess(x: float) -> float:
        variance = x * (1 - x) * (1 + half * ((1 - x) / (2 - x) + x / (1 + x))) / (a.size * b.size)
        return abs(x - share) - z * math.sqrt(max(variance, 0.0))

    tiny = 1e-9  # at 0 and 1 the excess vanishes too; the roots sought lie inside
    low = optimize.brentq(excess, tiny, share - tiny) if share > 2 * tiny and excess(tiny) > 0 else 0.0
    high = optimize.brentq(excess, share + tiny, 1 - tiny) if share < 1 - 2 * tiny and excess(1 - tiny) > 0 else 1.0
    return Interval(share, float(low), float(high), level, a.size + b.size)


def friedman(values: Any) -> Ranks:
    """Mean ranks of ``values[N, K]`` (blocks by competitors, lower is better) and Friedman's test.

    The p-value is the chi-square approximation with correction for ties; rough below about ten blocks.

    Raises:
        ValueError: for NaN, or fewer than two competitors.
    """
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2 or np.isnan(array).any():
        raise ValueError("friedman needs values [blocks, competitors] with at least two competitors and no NaN")
    count, competitors = array.shape
    ranks = stats.rankdata(array, axis=1)
    mean = ranks.mean(axis=0)
    spread = float(((ranks - (competitors + 1) / 2) ** 2).sum())
    if spread == 0:  # every block is one tie
        return Ranks(mean, 0.0, 1.0, count)
    # Conover 1999, equation 5.8.5: the form that holds with and without ties.
    statistic = count**2 * (competitors - 1) * float(((mean - (competitors + 1) / 2) ** 2).sum()) / spread
    return Ranks(mean, statistic, float(stats.chi2.sf(statistic, competitors - 1)), count)


def holm(p_values: Any) -> np.ndarray:
    """Holm's step-down adjustment ``f64[N]``: below alpha with a chance of at most alpha that any claim is false."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1.0)
    return adjusted


def quantile_bands(curves: Any, levels: tuple[float, ...] = (0.25, 0.5, 0.75)) -> np.ndarray:
    """Quantiles over the repeats of ``curves[S, T]`` at every point -> ``f64[len(levels), T]``.

    Linear between order statistics; between a number and infinity the band is infinite, never NaN.
    """
    ordered = np.sort(np.asarray(curves, np.float64), axis=0)
    place = np.asarray(levels) * (ordered.shape[0] - 1)
    below = np.floor(place).astype(int)
    above, part = np.ceil(place).astype(int), (place - below)[:, None]
    low, high = ordered[below], ordered[above]
    with np.errstate(invalid="ignore"):
        between = low + part * (high - low)
    return np.where((part == 0) | (low == high), low, np.where(np.isfinite(low) & np.isfinite(high), between, high))


def association(values: Any, losses: Any, categorical: bool = False, bins: int = 8) -> float:
    """Share of the variance of the ranks of ``losses[N]`` that one hyperparameter's ``values[N]`` explain by themselves.

    Epsilon squared (Kelley 1935): 0 for unrelated values in expectation, clipped below; values that are
    numbers are cut into ``bins`` of equal counts. It describes the trials made: a search that gathers near its
    best sees less of a hyperparameter than the whole space would show. Infinite losses share the worst rank.
    """
    values, losses = np.asarray(values, np.float64), np.asarray(losses, np.float64)
    known = ~np.isnan(values) & ~np.isnan(losses)
    values, ranks = values[known], stats.rankdata(losses[known]) if known.any() else np.empty(0)
    if not categorical and np.unique(values).size > bins:
        values = np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1])), values, side="right")
    _, group = np.unique(values, return_inverse=True)
    groups = int(group.max()) + 1 if group.size else 0
    total = float(((ranks - ranks.mean()) ** 2).sum()) if ranks.size else 0.0
    if groups < 2 or ranks.size <= groups or total == 0:
        return 0.0
    sizes = np.bincount(group)
    means = np.bincount(group, ranks) / sizes
    within = float(((ranks - means[group]) ** 2).sum())
    return float(np.clip(1 - (within / (ranks.size - groups)) / (total / (ranks.size - 1)), 0.0, 1.0))
