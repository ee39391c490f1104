"""The median stopping rule.

    at each check: the best loss so far is worse than the median of the other trials' running averages -> stop

Golovin, Solnik, Moitra, Kochanski, Karro & Sculley, "Google Vizier: a service for black-box optimization", KDD 2017,
section 3.2.2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import Array, CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.inner import check_inner, fitted_inner, lifted, tell
from jaxhpo.fidelity.rungs import ask_for_rungs, check_budgets, check_training, due_steps, even_rungs
from jaxhpo.fidelity.table import empty_table, enlarged_both, entered, holds_both, rank_and_count

_NAME = "MedianStopping"


@pytree_dataclass
class MedianState:
    """State of :class:`MedianStopping`.

    Attributes:
        inner: the inner optimizer's.
        rung: ``i32[B]``, the check that each lane's trial trains for; 0 for one that begins, K for the whole training.
        total: ``f32[B]``, the sum of the trial's losses at the checks so far.
        best: ``f32[B]``, the lowest of them; inf while there is none.
        table: ``f32[K, N]``, the running averages of all trials at each check, see :mod:`jaxhpo.fidelity.table`.
        worst: ``f32[K + 1]``, see :func:`jaxhpo.fidelity.inner.lifted`.
    """

    inner: Any
    rung: Array
    total: Array
    best: Array
    table: Array
    worst: Array


def median_of_others(table: Array, rung: Array, value: Array) -> tuple[jax.Array, jax.Array]:
    """The median of a rung's values but one, ``f32[B]``, and of how many it is the median, ``i32[B]``.

    Args:
        table: ``f32[K, N]``.
        rung: ``i32[B]``.
        value: ``f32[B]``, the value of the rung that is left out.
    """
    place, count = rank_and_count(table, rung, value)
    others = count - 1
    row = jnp.minimum(rung, table.shape[0] - 1)

    def other(i: Array) -> jax.Array:
        i = jnp.maximum(i, 0)
        return jnp.asarray(table)[row, jnp.minimum(i + (i >= place), table.shape[1] - 1)]

    return 0.5 * other((others - 1) // 2) + 0.5 * other(others // 2), others


@pytree_dataclass
class MedianStopping:
    """The median stopping rule: a trial is stopped when it is worse than the median trial was up to there.

    At every multiple of ``interval`` a trial reports its loss. It is stopped if the best of its losses so far is strictly
    higher than the median of the running averages, up to the same check, of all other trials that reached it, those of the
    same round included. A trial that diverges frees its lane at once; only its averages before stay.

    The inner optimizer is told one loss for each trial, one of a stopped trial lifted so that it is no better than any of a
    trial that got further.

    Tables grow as those of :class:`jaxhpo.ASHA` do.

    Attributes:
        inner: the optimizer that proposes the trials, with the lanes; its queries start afresh.
        interval: steps between two checks. None: a tenth of the training.
        grace: steps before which no trial is stopped. None: nothing is stopped at the first check, if there are two.
        min_trials: other trials that must have reached a check before it stops one.
        budgets: total training steps of the checks, ascending, without the whole training. None: a study sets them.

    Raises:
        JaxhpoError: by ``init`` where ``budgets`` is None, and by ``for_training`` for what does not fit the training.
    """

    inner: Optimizer
    interval: int | None = setting(None, low=1)
    grace: int | None = setting(None, low=0)
    min_trials: int = setting(5, low=1)
    budgets: tuple[int, ...] | None = None

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    @property
    def needs_gradient(self) -> bool:
        return getattr(self.inner, "needs_gradient", False)

    def for_training(self, num_steps: int, round_steps: int) -> MedianStopping:
        """The same optimizer with the checks of a training of ``num_steps`` in rounds of ``round_steps``."""
        inner = fitted_inner(_NAME, self.inner, num_steps, round_steps)
        check_training(_NAME, num_steps, round_steps)
        budgets = even_rungs(_NAME, self.interval, self.budgets, 10, num_steps, round_steps)
        if self.grace is not None and self.grace > budgets[-1]:
            raise JaxhpoError(f"{_NAME}: grace = {self.grace}: at most {budgets[-1]}, the steps of the last check, are due")
        return dataclasses.replace(self, inner=inner, budgets=budgets)

    def init(self, key: jax.Array, spec: CubeSpec) -> MedianState:
        check_inner(_NAME, self.inner)
        check_budgets(_NAME, self.budgets)
        num_rungs, lanes = len(self.budgets or ()), self.num_lanes
        return MedianState(
            inner=self.inner.init(key, spec),
            rung=jnp.zeros(lanes, jnp.int32),
            total=jnp.zeros(lanes, jnp.float32),
            best=jnp.full(lanes, jnp.inf, jnp.float32),
            table=empty_table(num_rungs, lanes),
            worst=jnp.full(num_rungs + 1, -jnp.inf, jnp.float32),
        )

    def ask(self, key: jax.Array, state: MedianState) -> Query:
        return ask_for_rungs(self.inner, key, state.inner, state.rung, self.budgets or ())

    def update(self, key: jax.Array, state: MedianState, query: Query, feedback: Feedback) -> MedianState:
        budgets, done, rung = self.budgets or (), jnp.asarray(feedback.done), jnp.asarray(state.rung)
        loss = jnp.asarray(feedback.loss, jnp.float32)
        loss = jnp.where(done & jnp.isfinite(loss), loss, jnp.nan)
        arrived = ~jnp.isnan(loss) & (rung < len(budgets))
        finite = jnp.finfo(jnp.float32)
        total = jnp.where(arrived, jnp.clip(state.total + loss, finite.min, finite.max), state.total)
        best = jnp.where(arrived, jnp.minimum(state.best, loss), state.best)
        average = total / (rung + 1)
        table = entered(state.table, rung, average, arrived)
        median, others = median_of_others(table, rung, average)
        grace = budgets[min(1, len(budgets) - 1)] if self.grace is None else self.grace
        judged = (others >= self.min_trials) & (due_steps(budgets)[rung] >= grace)
        goes_on = arrived & ~(judged & (best > median))
        ended = done & ~goes_on
        told, worst = lifted(state.worst, rung, loss, ended)
        return MedianState(
            inner=tell(self.inner, key, state.inner, query, feedback, told, ended),
            rung=jnp.where(ended, 0, rung + goes_on),
            total=jnp.where(ended, 0.0, total),
            best=jnp.where(ended, jnp.inf, best),
            table=table,
            worst=worst,
        )

    def holds(self, state: MedianState) -> int:
        """Trials ended for which the tables have room, the inner optimizer's too."""
        return holds_both(self, state)

    def enlarged(self, state: MedianState) -> MedianState:
        """The state with the smaller of its tables enlarged; between updates, for shapes change."""
        return enlarged_both(self, state)
