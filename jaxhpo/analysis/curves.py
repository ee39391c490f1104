"""Curves over the finished trials of a study; losses are minimised, a diverged trial has loss infinity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxhpo.study.record import TrialRow


def losses_of(trials: Sequence[TrialRow]) -> np.ndarray:
    """Losses ``f64[N]`` in the order given; infinity where a trial diverged or its loss is not a number."""
    found = [math.inf if trial.diverged or trial.loss is None else float(trial.loss) for trial in trials]
    array = np.array(found, np.float64)
    return np.where(np.isfinite(array), array, math.inf)


def _of_incumbents(trials: Sequence[TrialRow]) -> np.ndarray:
    """The same, with infinity for trials that were not trained to the end, if any was: they are no incumbents."""
    losses, whole = losses_of(trials), np.array([trial.whole for trial in trials], bool)
    return np.where(whole, losses, math.inf) if np.isfinite(losses[whole]).any() else losses


def incumbent_by_trial(trials: Sequence[TrialRow]) -> np.ndarray:
    """Lowest loss after 1, 2, ..., N finished trials ``f64[N]``, in the order of their numbers."""
    return np.minimum.accumulate(_of_incumbents(sorted(trials, key=lambda trial: trial.number)))


def incumbent_by_seconds(trials: Sequence[TrialRow]) -> tuple[np.ndarray, np.ndarray]:
    """Seconds ``f64[K]`` at which results arrived, and the lowest loss known from then on ``f64[K]``.

    Trials that became known together give one point.
    """
    if not trials:
        return np.empty(0), np.empty(0)
    seconds = np.array([trial.seconds for trial in trials], np.float64)
    order = np.argsort(seconds, kind="stable")
    seconds, best = seconds[order], np.minimum.accumulate(_of_incumbents(trials)[order])
    last = np.append(seconds[1:] != seconds[:-1], True)
    return seconds[last], best[last]


def diverged_share(trials: Sequence[TrialRow], window: int | None = None) -> tuple[np.ndarray, int]:
    """Share of diverged trials among the last ``window`` ``f64[N]``, by trial number, and the window.

    By default the window is a twentieth of the trials, at least 10. Early points have fewer trials behind them.
    """
    lost = np.isinf(losses_of(sorted(trials, key=lambda trial: trial.number))).astype(np.float64)
    window = max(10, lost.size // 20) if window is None else window
    total = np.concatenate([[0.0], np.cumsum(lost)])
    end = np.arange(1, lost.size + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start), window


def edf(losses: Any) -> tuple[np.ndarray, np.ndarray]:
    """Empirical distribution: sorted finite losses ``f64[K]``, and the share of all losses at or below each.

    Infinite losses count in the total, so that the curve of a study with failures ends below 1.
    """
    array = np.asarray(losses, np.float64)
    found = np.sort(array[np.isfinite(array)])
    return found, np.arange(1, found.size + 1) / max(array.size, 1)
