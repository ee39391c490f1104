"""Predictive stopping: a trial is stopped when its predicted final loss is unlikely to be the lowest.

    a trial reaches a check -> a line through the fully trained trials that had about the same loss there predicts its final
    loss -> the probability that this is the lowest so far has fallen to a fraction of what it is for any trial -> stop

Domhan, Springenberg & Hutter, "Speeding up automatic hyperparameter optimization of deep neural networks by extrapolation of
learning curves", IJCAI 2015: a trial is stopped when it is unlikely to exceed the best, and the search is told the value
expected of it. Baker, Gupta, Raskar & Naik, "Accelerating neural architecture search using performance prediction",
arXiv:1705.10823, 2017: the curves of the search itself predict, by one regression for each length of training. Here that is a
line through the nearest neighbours, as in Cleveland, "Robust locally weighted regression and smoothing scatterplots", J. Am.
Stat. Assoc. 74, 1979, with equal weights; and the probability is compared with that of any other trial, so that a lucky best
trial does not stop all others where losses at a check say nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

from jaxhpo.core import Array, CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.inner import check_inner, fitted_inner, inner_holds, tell, with_larger_inner
from jaxhpo.fidelity.rungs import ask_for_rungs, check_budgets, check_training, even_rungs

_NAME = "PredictiveStopping"
_SPARED = 1  # distinguishes the key for the spared trials
_TINY = 1e-30


@pytree_dataclass
class PredictiveState:
    """State of :class:`PredictiveStopping`.

    Attributes:
        inner: the inner optimizer's.
        rung: ``i32[B]``, the check that each lane's trial trains for; 0 for one that begins, K for the whole training.
        spared: ``bool[B]``, whether the trial is trained whole whatever is predicted.
        curve: ``f32[B, K]``, the trial's losses at the checks so far.
        memory: ``f32[N, K + 1]``, the losses of the last N fully trained trials: at each check, and the final one.
        count: ``i32[]``, fully trained trials so far.
        best: ``f32[]``, the lowest final loss; inf while there is none.
    """

    inner: Any
    rung: Array
    spared: Array
    curve: Array
    memory: Array
    count: Array
    best: Array


def local_line(x: Array, y: Array, used: Array, count: Array, at: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ordinary least squares of ``y`` on ``x`` over the points whose ``x`` is nearest to ``at``, and its prediction there.

    A new observation at ``at`` follows Student's t distribution around the line (Draper & Smith, "Applied regression
    analysis", 3rd ed., Wiley, 1998, section 3.1). Beyond the highest ``x`` of those points the line is level, so that a huge
    loss predicts no huger one; below the lowest it goes on.

    Args:
        x, y: ``f32[N]``.
        used: ``bool[N]``, the points that count, at least three.
        count: ``i32[]``, over how many of them, at least three; more where distances tie.
        at: ``f32[]``.

    Returns:
        location, scale and degrees of freedom, ``f32[]`` each. The scale is infinite where all points have the same ``x``
        and ``at`` is below it, for then nothing is known.
    """
    distance = jnp.where(used, jnp.abs(x - at), jnp.inf)
    near = used & (distance <= jnp.sort(distance)[count - 1])
    number = jnp.maximum(near.sum(), 3).astype(x.dtype)
    origin = jnp.argmin(distance)  # differences from a point: exact zeros where all are equal, digits where an offset is large

    def centred(values: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The mean from the origin, the largest deviation, and deviations in units of it: float32 holds their squares."""
        values = jnp.where(near, values - values[origin], 0.0)
        mean = (values / number).sum()
        deviation = jnp.where(near, values - mean, 0.0)
        unit = jnp.maximum(jnp.abs(deviation).max(), _TINY)
        return mean, unit, deviation / unit

    mean_x, unit_x, dx = centred(x)
    mean_y, unit_y, dy = centred(y)
    square = (dx**2).sum()
    level = square == 0
    slope = (dx * dy).sum() / jnp.where(level, 1.0, square)
    away = (jnp.minimum(at, jnp.where(near, x, -jnp.inf).max()) - x[origin] - mean_x) / unit_x
    dof = number - 2.0
    variance = ((dy - slope * dx) ** 2).sum() / dof
    leverage = 1.0 / number + away**2 / jnp.where(level, 1.0, square)
    scale = unit_y * jnp.sqrt(variance) * jnp.sqrt(1.0 + leverage)
    rounding = 4 * jnp.finfo(x.dtype).eps * jnp.abs(jnp.where(near, y, 0.0)).max()
    location = y[origin] + mean_y + unit_y * slope * jnp.where(level, 0.0, away)
    return location, jnp.where(level & (away < 0), jnp.inf, jnp.maximum(jnp.maximum(scale, rounding), _TINY)), dof


def student_t_cdf(t: Array, dof: Array) -> jax.Array:
    """Student's t distribution function, from its two tails (Abramowitz & Stegun, 1964, 26.7.1)."""
    tail = 0.5 * betainc(0.5 * dof, 0.5, dof / (dof + t**2))
    return jnp.where(t < 0, tail, 1.0 - tail)


@pytree_dataclass
class PredictiveStopping:
    """Stops the trials that are unlikely to become the best, by what fully trained trials say about the rest of a training.

    At every multiple of ``interval`` a trial reports its loss. A line through those fully trained trials whose loss at that
    check was nearest to its own (half of those in memory, but ``min_trials`` at least) predicts its final loss. The trial is
    stopped if the probability that this is below the lowest final loss so far is less than ``ratio`` times that of a trial of
    which nothing is known. So the curves tell how early trials may be stopped: where the loss at a check says little about
    the final one few are stopped there, and where it says much nearly all are, also those which only their random numbers set
    apart. A trial that diverges frees its lane at once and is not remembered.

    From those that went on the rule cannot learn how those would have ended that it stopped. Hence a random ``spared`` share
    of the trials is never stopped.

    The inner optimizer is told one loss for each trial: the final one, or the predicted one if it was stopped. Since trials
    with a bad end are mostly stopped, the memory has few of them, and predictions err on the low side.

    Attributes:
        inner: the optimizer that proposes the trials, with the lanes; its queries start afresh.
        interval: steps between two checks. None: a thirtieth of the training, a round at least.
        ratio: by how much the loss at a check must lower the probability of becoming the best for the trial to be stopped.
        spared: share of the trials that are trained whole whatever is predicted.
        min_trials: fully trained trials before any trial is stopped.
        memory: N, of how many of the last fully trained trials the losses are kept.
        budgets: total training steps of the checks, ascending, without the whole training. None: a study sets them.

    Raises:
        JaxhpoError: by ``init`` where ``budgets`` is None or ``memory`` is below ``min_trials``, and by ``for_training`` for
            what does not fit the training.
    """

    inner: Optimizer
    interval: int | None = setting(None, low=1)
    ratio: float = setting(0.1, low=0.0, high=1.0)
    spared: float = setting(0.02, low=0.0, high=1.0)
    min_trials: int = setting(10, static=True, low=4)
    memory: int = setting(64, static=True, low=4)
    budgets: tuple[int, ...] | None = None

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    @property
    def needs_gradient(self) -> bool:
        return getattr(self.inner, "needs_gradient", False)

    def for_training(self, num_steps: int, round_steps: int) -> PredictiveStopping:
        """The same optimizer with the checks of a training of ``num_steps`` in rounds of ``round_steps``."""
        inner = fitted_inner(_NAME, self.inner, num_steps, round_steps)
        check_training(_NAME, num_steps, round_steps)
        budgets = even_rungs(_NAME, self.interval, self.budgets, 30, num_steps, round_steps)
        return dataclasses.replace(self, inner=inner, budgets=budgets)

    def init(self, key: jax.Array, spec: CubeSpec) -> PredictiveState:
        check_inner(_NAME, self.inner)
        check_budgets(_NAME, self.budgets)
        if self.memory < self.min_trials:
            raise JaxhpoError(f"{_NAME}: memory = {self.memory}: at least min_trials = {self.min_trials} is due")
        num_checks, lanes = len(self.budgets or ()), self.num_lanes
        return PredictiveState(
            inner=self.inner.init(key, spec),
            rung=jnp.zeros(lanes, jnp.int32),
            spared=jax.random.uniform(jax.random.fold_in(key, _SPARED), (lanes,)) < self.spared,
            curve=jnp.zeros((lanes, num_checks), jnp.float32),
            memory=jnp.zeros((self.memory, num_checks + 1), jnp.float32),
            count=jnp.zeros((), jnp.int32),
            best=jnp.asarray(jnp.inf, jnp.float32),
        )

    def ask(self, key: jax.Array, state: PredictiveState) -> Query:
        return ask_for_rungs(self.inner, key, state.inner, state.rung, self.budgets or ())

    def update(self, key: jax.Array, state: PredictiveState, query: Query, feedback: Feedback) -> PredictiveState:
        done, rung = jnp.asarray(feedback.done), jnp.asarray(state.rung)
        num_checks = len(self.budgets or ())
        loss = jnp.asarray(feedback.loss, jnp.float32)
        loss = jnp.where(done & jnp.isfinite(loss), loss, jnp.nan)
        arrived = ~jnp.isnan(loss) & (rung < num_checks)
        whole = ~jnp.isnan(loss) & (rung == num_checks)
        here = arrived[:, None] & (rung[:, None] == jnp.arange(num_checks))
        curve = jnp.where(here, loss[:, None], state.curve)

        rows, order = self.memory, jnp.cumsum(whole, dtype=jnp.int32)
        kept = whole & (order > order[-1] - rows)  # of more than fit in the memory the last
        row = jnp.where(kept, (state.count + order - 1) % rows, rows)  # beyond the end: dropped
        memory = jnp.asarray(state.memory).at[row].set(jnp.column_stack([curve, loss]), mode="drop")
        count = state.count + order[-1]
        best = jnp.minimum(state.best, jnp.where(whole, loss, jnp.inf).min())

        known, final = jnp.minimum(count, rows), memory[:, -1]
        used = jnp.arange(rows) < known
        nearest = jnp.clip((known + 1) // 2, self.min_trials, rows)

        def probability(x: Array, count: Array, at: Array) -> tuple[jax.Array, jax.Array]:
            """That a final loss is below the lowest so far, and its predicted value."""
            location, scale, dof = local_line(x, final, used, count, at)
            return student_t_cdf((best - location) / scale, dof), location

        at = jnp.where(arrived, loss, 0.0)
        chance, predicted = jax.vmap(lambda check, at: probability(memory[:, check], nearest, at))(
            jnp.minimum(rung, num_checks - 1), at
        )
        unknown, _ = probability(jnp.zeros(rows), jnp.maximum(known, self.min_trials), jnp.zeros(()))
        stopped = arrived & ~state.spared & (known >= self.min_trials) & (chance < self.ratio * unknown)
        goes_on = arrived & ~stopped
        ended = done & ~goes_on
        spared = jax.random.uniform(jax.random.fold_in(key, _SPARED), (self.num_lanes,)) < self.spared
        return PredictiveState(
            inner=tell(self.inner, key, state.inner, query, feedback, jnp.where(stopped, predicted, loss), ended),
            rung=jnp.where(ended, 0, rung + goes_on),
            spared=jnp.where(ended, spared, state.spared),
            curve=jnp.where(ended[:, None], 0.0, curve),
            memory=memory,
            count=count,
            best=best,
        )

    def holds(self, state: PredictiveState) -> int:
        """Trials ended for which the inner optimizer's table has room."""
        return inner_holds(self.inner, state.inner)

    def enlarged(self, state: PredictiveState) -> PredictiveState:
        """The state with the inner optimizer's table enlarged; between updates, for shapes change."""
        return with_larger_inner(self.inner, state)
