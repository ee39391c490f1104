"""When a study ends, and how many seeds its trials have."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.stats

from jaxhpo.core import Optimizer

MOST_TRIALS = 2**30 - 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a study ends, whichever comes first.

    Attributes:
        num_trials: trials to answer; None for no limit.
        max_steps: training steps, over all lanes and seeds; None for no limit.
        target: value of the metric that is good enough, of a whole training on all its seeds; None for no limit.
    """

    num_trials: int | None
    max_steps: int | None = None
    target: float | None = None


@dataclasses.dataclass(frozen=True)
class Seeding:
    """How many seeds a trial has.

    Attributes:
        count: k; with more than one, all trials train on the same k keys, and a trial's loss is the mean over them.
        quantile: which quantile of the seeds is the loss instead of their mean: 0.5 for the median, 1 for the worst.
        race: level of the paired test that drops a trial before all its seeds are trained; None trains all at once.
    """

    count: int = 1
    quantile: float | None = None
    race: float | None = None

    @property
    def at_once(self) -> int:
        """``S``, seeds that train side by side: all, or in a race two, or one of an odd number."""
        return self.count if self.race is None else 2 - self.count % 2


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def number_between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and low <= value <= high


def check_limits(limits: Limits) -> list[str]:
    """What is wrong with limits, one line each."""
    found = []
    if limits.num_trials is not None and not (_is_whole(limits.num_trials) and 1 <= limits.num_trials <= MOST_TRIALS):
        found.append(f"num_trials = {limits.num_trials!r}: must be a whole number between 1 and 2**30 - 1")
    if limits.max_steps is not None and not (_is_whole(limits.max_steps) and limits.max_steps >= 1):
        found.append(f"max_steps = {limits.max_steps!r}: must be a whole number of at least 1")
    if limits.target is not None and not number_between(limits.target, -np.inf, np.inf):
        found.append(f"target = {limits.target!r}: must be a number, in units of the metric")
    return found


def check_seeding(seeding: Seeding, optimizer: Optimizer, has_gradient: bool) -> list[str]:
    """What is wrong with the seeds, one line each."""
    found = []
    if not (_is_whole(seeding.count) and 1 <= seeding.count <= 4096):
        found.append(f"seeds = {seeding.count!r}: must be a whole number of at least 1")
    if seeding.quantile is not None and not number_between(seeding.quantile, 0.0, 1.0):
        found.append(f"seed_quantile = {seeding.quantile!r}: must be between 0 and 1")
    elif seeding.quantile is not None and seeding.count == 1:
        found.append(f"seed_quantile = {seeding.quantile!r}: needs seeds of at least 2")
    if seeding.quantile is not None and has_gradient:
        found.append("seed_quantile: a hypergradient is that of the mean over seeds; leave it out")
    if seeding.race is None:
        return found
    if seeding.quantile is not None:
        found.append("race: its test compares means; leave out seed_quantile, or the race")
    if not (number_between(seeding.race, 0.0, 0.5) and seeding.race > 0.0):
        found.append(f"race = {seeding.race!r}: must be the level of a test, such as 0.05, above 0 and at most 0.5")
    if not found and seeding.count < 3:
        found.append(f"race = {seeding.race!r}: a race needs seeds of at least 3, not {seeding.count}")
    if has_gradient:
        found.append("race: a race drops trials between seeds, which an estimator of hypergradients does not survive")
    if not getattr(optimizer, "starts_afresh", False):
        name = type(optimizer).__name__
        found.append(f"race: {name} stops trials by itself; race with the optimizer that it wraps, or leave race out")
    return found


def race_bounds(seeding: Seeding) -> np.ndarray:
    """The t statistic above which a trial is dropped, by the number of seeds answered, ``f32[k + 1]``.

    A one-sided paired t test; infinite for fewer than two seeds, for all of them, and everywhere without a race.
    """
    bounds = np.full(seeding.count + 1, np.inf, np.float32)
    if seeding.race is not None:
        for n in range(2, seeding.count):
            bounds[n] = scipy.stats.t.ppf(1.0 - seeding.race, n - 1)
    return bounds
