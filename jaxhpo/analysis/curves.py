"""Curves over the finished trials of a study; losses are minimised, a diverged trial has loss infinity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow


def losses_of(trials: Sequence[TrialRow]) -> np.ndarray:
    """Losses ``f64[N]`` in the order given; infinity where a trial diverged or its loss is not a number."""
    found = [math.inf if trial.diverged or trial.loss is None else float(trial.loss) for trial in trials]
    array = np.array(found, np.float64)
    return np.where(np.isfinite(array), array, math.inf)


def in_order_of_ends(trials: Sequence[TrialRow]) -> list[TrialRow]:
    """Trials as they ended: with early stopping a low number may end late."""
    return sorted(trials, key=lambda trial: (trial.round, trial.lane, trial.number))


def _of_incumbents(trials: Sequence[TrialRow]) -> np.ndarray:
    """The same, with infinity for trials that were not trained to the end, if any was: they are no incumbents."""
    losses, whole = losses_of(trials), np.array([trial.whole for trial in trials], bool)
    return np.where(whole, losses, math.inf) if np.isfinite(losses[whole]).any() else losses


def incumbent_by_trial(trials: Sequence[TrialRow]) -> np.ndarray:
    """Lowest loss after 1, 2, ..., N finished trials ``f64[N]``, in the order in which they ended.

    Trials that were stopped are no incumbents, unless no trial was trained to its end.
    """
    return np.minimum.accumulate(_of_incumbents(in_order_of_ends(trials)))


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


def incumbent_by_steps(trials: Sequence[TrialRow]) -> tuple[np.ndarray, np.ndarray]:
    """Training steps spent ``f64[N]`` and the lowest loss known from then on ``f64[N]``, trials in the order of their ends.

    The steps are those of all trials ended until then; of a training state that was taken over only the new steps count.
    """
    ended = in_order_of_ends(trials)
    spent = np.cumsum([max(trial.steps - trial.start, 0) for trial in ended], dtype=np.float64)
    return spent, np.minimum.accumulate(_of_incumbents(ended))


@dataclass(frozen=True)
class Curve:
    """What was known of one trial on its way: finite ``losses`` ``f64[K]`` after ``steps`` ``f64[K]``, ``K >= 1``."""

    trial: TrialRow
    steps: np.ndarray
    losses: np.ndarray


def learning_curves(record: StudyRecord) -> list[Curve]:
    """Curves of the trials that have a loss, by number; one that took over a training state begins with that state's loss."""
    from jaxhpo.study.record import holds_study, read_answers

    answers = read_answers(record.folder) if holds_study(record.folder) else {}
    known = {number: {steps: loss for steps, loss in told if _sound(loss)} for number, told in answers.items()}
    curves = []
    for trial in sorted(record.trials, key=lambda trial: trial.number):
        points = dict(known.get(trial.number, {}))
        if _sound(trial.loss) and not trial.diverged:
            points[trial.steps] = trial.loss
        inherited = known.get(trial.parent, {}).get(trial.start)
        if inherited is not None:
            points.setdefault(trial.start, inherited)
        if points:
            steps, losses = (np.array(column, np.float64) for column in zip(*sorted(points.items()), strict=True))
            curves.append(Curve(trial, steps, losses))
    return curves


def _sound(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def diverged_share(trials: Sequence[TrialRow], window: int | None = None) -> tuple[np.ndarray, int]:
    """Share of diverged trials among the last ``window`` ``f64[N]``, as they ended, and the window.

    By default the window is a twentieth of the trials, at least 10. Early points have fewer trials behind them.
    """
    lost = np.isinf(losses_of(in_order_of_ends(trials))).astype(np.float64)
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
