"""Predictive stopping: a trial is stopped when its predicted final loss will hardly be the lowest.

    a trial reaches a check -> a line through the trials trained whole that had about the same loss there predicts its final
    loss -> the chance that this is the lowest so far is below ``least_chance`` -> stop

Domhan, Springenberg & Hutter, "Speeding up automatic hyperparameter optimization of deep neural networks by extrapolation of
learning curves", IJCAI 2015: the criterion (section 3.3). Baker, Gupta, Raskar & Naik, "Accelerating neural architecture
search using performance prediction", arXiv:1705.10823, 2017: one regression for each length of training, on the curves of
the search itself, with normal errors (sections 3 and 4). The regression here is local (Cleveland, J. Am. Stat. Assoc. 74,
1979, with equal weights), so that trials that went wrong tell nothing of those that go well.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc

from jaxhpo.core import FRESH, Array, CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.inner import check_inner, fitted_inner, inner_holds, tell, with_larger_inner
from jaxhpo.fidelity.rungs import check_budgets, check_training, due_steps, even_rungs

_NAME = "PredictiveStopping"
_TINY = 1e-30


@pytree_dataclass
class PredictiveState:
    """State of :class:`PredictiveStopping`.

    Attributes:
        inner: the inner optimizer's.
        rung: ``i32[B]``, the check that each lane's trial trains for; 0 for one that begins, K for the whole training.
        curve: ``f32[B, K]``, the trial's losses at the checks so far.
        curves: ``f32[N, K + 1]``, the losses of the last N trials trained whole: at each check, and the final one.
        count: ``i32[]``, trials trained whole so far.
        best: ``f32[]``, the lowest final loss; inf while there is none.
    """

    inner: Any
    rung: Array
    curve: Array
    curves: Array
    count: Array
    best: Array


def local_line(x: Array, y: Array, used: Array, nearest: Array, at: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ordinary least squares of ``y`` on ``x`` over the points nearest to ``at``, and its prediction there.

    Draper & Smith, "Applied regression analysis", 3rd ed., Wiley, 1998, section 3.1: an observation at ``at`` has a Student
    distribution about the line.

    Args:
        x, y: ``f32[N]``.
        used: ``bool[N]``, the points that count, at least three.
        nearest: ``i32[]``, over how many of them, at least three; more where distances tie.
        at: ``f32[]``.

    Returns:
        its location, its scale, above 0, and its degrees of freedom; ``f32[]`` each.
    """
    far = jnp.where(used, jnp.abs(x - at), jnp.inf)
    near = used & (far <= jnp.sort(far)[nearest - 1])
    count = jnp.maximum(near.sum(), 3).astype(x.dtype)

    def centred(values: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The mean, the largest deviation, and the deviations in units of it: their squares are safe in float32."""
        mean = jnp.where(near, values / count, 0.0).sum()
        from_mean = jnp.where(near, values - mean, 0.0)
        unit = jnp.maximum(jnp.abs(from_mean).max(), _TINY)
        return mean, unit, from_mean / unit

    mean_x, unit_x, dx = centred(x)
    mean_y, unit_y, dy = centred(y)
    square = jnp.maximum((dx**2).sum(), _TINY)
    slope, away = (dx * dy).sum() / square, (at - mean_x) / unit_x
    freedom = count - 2.0
    variance = ((dy - slope * dx) ** 2).sum() / freedom
    scale = unit_y * jnp.sqrt(variance * (1.0 + 1.0 / count + away**2 / square))
    return mean_y + unit_y * slope * away, jnp.maximum(scale, _TINY), freedom


def student_cdf(t: Array, freedom: Array) -> jax.Array:
    """Student's distribution function (Abramowitz & Stegun, 1964, 26.7.1)."""
    tail = 0.5 * betainc(0.5 * freedom, 0.5, freedom / (freedom + t**2))
    return jnp.where(t < 0, tail, 1.0 - tail)


@pytree_dataclass
class PredictiveStopping:
    """Stops the trials that will hardly be the best, by what trials trained whole tell of the rest of a training.

    At every multiple of ``interval`` a trial reports its loss. Its final loss is predicted by a regression line through the
    half of the remembered trials (``min_trials`` at least) whose loss at that check was nearest to its own. It is stopped if
    the chance that it ends below the lowest final loss so far is less than ``least_chance``. So the curves themselves tell
    how early a trial may be stopped: where the loss at a check says little of the final one, nothing is stopped there; where
    it says all, nearly everything is, also of trials that only their random numbers set apart. A trial that diverges frees
    its lane at once and is not remembered.

    The inner optimizer is told the final loss of each trial, the predicted one if it was stopped (but no lower than the
    lowest so far), so that trials stopped early and late are told alike.

    Attributes:
        inner: the optimizer that proposes the trials, with the lanes; its queries start afresh.
        interval: steps between two checks. None: a tenth of the training.
        least_chance: a trial goes on while the chance that it will be the best is at least this.
        min_trials: trials trained whole before any is stopped, at least 4.
        memory: N, how many of the last trials trained whole the regression knows; at least as many as there are lanes are
            kept.
        budgets: total training steps of the checks, ascending, without the whole training. None: a study sets them.

    Raises:
        JaxhpoError: by ``init`` where ``budgets`` is None or ``memory`` is below ``min_trials``, and by ``for_training`` for
            what does not fit the training.
    """

    inner: Optimizer
    interval: int | None = setting(None, low=1)
    least_chance: float = setting(0.01, low=0.0, high=1.0)
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
        budgets = even_rungs(_NAME, self.interval, self.budgets, num_steps, round_steps)
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
            curve=jnp.zeros((lanes, num_checks), jnp.float32),
            curves=jnp.zeros((max(self.memory, lanes), num_checks + 1), jnp.float32),
            count=jnp.zeros((), jnp.int32),
            best=jnp.asarray(jnp.inf, jnp.float32),
        )

    def ask(self, key: jax.Array, state: PredictiveState) -> Query:
        lane = jnp.arange(self.num_lanes, dtype=jnp.int32)
        cube = self.inner.ask(key, state.inner).cube
        return Query(cube, jnp.where(state.rung > 0, lane, FRESH), due_steps(self.budgets or ())[state.rung])

    def update(self, key: jax.Array, state: PredictiveState, query: Query, feedback: Feedback) -> PredictiveState:
        done, rung = jnp.asarray(feedback.done), jnp.asarray(state.rung)
        num_checks = len(self.budgets or ())
        loss = jnp.asarray(feedback.loss, jnp.float32)
        loss = jnp.where(done & jnp.isfinite(loss), loss, jnp.nan)
        arrived = ~jnp.isnan(loss) & (rung < num_checks)
        whole = ~jnp.isnan(loss) & (rung == num_checks)
        here = arrived[:, None] & (rung[:, None] == jnp.arange(num_checks))
        curve = jnp.where(here, loss[:, None], state.curve)

        rows = state.curves.shape[0]
        row = jnp.where(whole, (state.count + jnp.cumsum(whole) - 1) % rows, rows)  # beyond the end: dropped
        curves = state.curves.at[row].set(jnp.column_stack([curve, loss]), mode="drop")
        count = state.count + whole.sum(dtype=jnp.int32)
        best = jnp.minimum(state.best, jnp.where(whole, loss, jnp.inf).min())

        known = jnp.minimum(count, rows)
        nearest = jnp.clip((known + 1) // 2, self.min_trials, rows)
        used = jnp.arange(rows) < known
        final = jax.vmap(lambda check, at: local_line(curves[:, check], curves[:, -1], used, nearest, at))
        location, scale, freedom = final(jnp.minimum(rung, num_checks - 1), loss)
        chance = student_cdf((best - location) / scale, freedom)
        stopped = arrived & (known >= self.min_trials) & (chance < self.least_chance)
        ended = done & ~(arrived & ~stopped)
        told = jnp.where(stopped, jnp.maximum(location, best), loss)
        return PredictiveState(
            inner=tell(self.inner, key, state.inner, query, feedback, told, ended),
            rung=jnp.where(ended, 0, rung + (arrived & ~stopped)),
            curve=jnp.where(ended[:, None], 0.0, curve),
            curves=curves,
            count=count,
            best=best,
        )

    def holds(self, state: PredictiveState) -> int:
        """Trials ended for which the inner optimizer's table has room."""
        return inner_holds(self.inner, state.inner)

    def enlarged(self, state: PredictiveState) -> PredictiveState:
        """The state with the inner optimizer's table enlarged; between updates, for shapes change."""
        return with_larger_inner(self.inner, state)
