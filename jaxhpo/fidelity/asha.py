"""ASHA: asynchronous successive halving that stops trials.

    a trial reaches a rung -> its loss is entered there -> it goes on if it is among the best 1 / reduction so far

Li, Jamieson, Rostamizadeh, Gonina, Ben-tzur, Hardt, Recht & Talwalkar, "A system for massively parallel hyperparameter
tuning", MLSys 2020. Theirs pauses trials and may take them up later; here, as in the variant of Ray Tune and Syne Tune, a
trial that is not among the best when it arrives is stopped for good, so that a training state is never put aside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import Array, CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.fidelity.inner import check_inner, fitted_inner, lifted, tell
from jaxhpo.fidelity.rungs import ask_for_rungs, check_budgets, check_training, geometric_rungs, given_rungs
from jaxhpo.fidelity.table import empty_table, enlarged_both, entered, holds_both, rank_and_count


@pytree_dataclass
class AshaState:
    """State of :class:`ASHA`.

    Attributes:
        inner: the inner optimizer's.
        rung: ``i32[B]``, the rung that each lane's trial trains for; 0 for one that begins, K for the whole training.
        table: ``f32[K, N]``, the losses at each rung, see :mod:`jaxhpo.fidelity.table`.
        worst: ``f32[K + 1]``, see :func:`jaxhpo.fidelity.inner.lifted`.
    """

    inner: Any
    rung: Array
    table: Array
    worst: Array


@pytree_dataclass
class ASHA:
    """Asynchronous successive halving: trials that are not among the best at a rung are stopped and their lanes refilled.

    All lanes that reach a rung in the same round are entered first. Then a trial goes on if ``rank * reduction < m``, where
    ``rank`` counts the strictly lower of the ``m`` losses of that rung, its own among them: the first to arrive goes on
    always, and equal losses fare alike. Nobody waits for anybody. A trial that diverges frees its lane at once and is not
    entered.

    The inner optimizer is told one loss for each trial, one of a stopped trial lifted so that it is no better than any of a
    trial that got further.

    The tables of losses grow in ``minimize`` and ``pure_study``. In a loop of your own call
    ``state = optimizer.enlarged(state)`` between updates when ``optimizer.holds(state)`` trials have ended; a full table
    forgets its highest losses.

    Attributes:
        inner: the optimizer that proposes the trials, with the lanes; its queries start afresh.
        reduction: eta; about one in so many trials goes on from each rung.
        grace: steps of the first rung; each further one is ``reduction`` times the one before. None: the last is a
            ``reduction``-th of the training.
        num_rungs: rungs at most.
        budgets: total training steps of the rungs, ascending, without the whole training. None: a study sets them.

    Raises:
        JaxhpoError: by ``init`` where ``budgets`` is None, and by ``for_training`` for what does not fit the training.
    """

    inner: Optimizer
    reduction: float = setting(3.0, low=1.1)
    grace: int | None = setting(None, low=1)
    num_rungs: int = setting(3, static=True, low=1)
    budgets: tuple[int, ...] | None = None

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    @property
    def needs_gradient(self) -> bool:
        return getattr(self.inner, "needs_gradient", False)

    def for_training(self, num_steps: int, round_steps: int) -> ASHA:
        """The same optimizer with the rungs of a training of ``num_steps`` in rounds of ``round_steps``."""
        inner = fitted_inner("ASHA", self.inner, num_steps, round_steps)
        check_training("ASHA", num_steps, round_steps)
        if self.budgets is not None:
            budgets = given_rungs("ASHA", self.budgets, num_steps, round_steps)
        else:
            budgets = geometric_rungs("ASHA", num_steps, round_steps, self.reduction, self.grace, self.num_rungs)
        return dataclasses.replace(self, inner=inner, budgets=budgets)

    def init(self, key: jax.Array, spec: CubeSpec) -> AshaState:
        check_inner("ASHA", self.inner)
        check_budgets("ASHA", self.budgets)
        num_rungs = len(self.budgets or ())
        return AshaState(
            inner=self.inner.init(key, spec),
            rung=jnp.zeros(self.num_lanes, jnp.int32),
            table=empty_table(num_rungs, self.num_lanes),
            worst=jnp.full(num_rungs + 1, -jnp.inf, jnp.float32),
        )

    def ask(self, key: jax.Array, state: AshaState) -> Query:
        return ask_for_rungs(self.inner, key, state.inner, state.rung, self.budgets or ())

    def update(self, key: jax.Array, state: AshaState, query: Query, feedback: Feedback) -> AshaState:
        done, rung = jnp.asarray(feedback.done), jnp.asarray(state.rung)
        loss = jnp.asarray(feedback.loss, jnp.float32)
        loss = jnp.where(done & jnp.isfinite(loss), loss, jnp.nan)
        arrived = ~jnp.isnan(loss) & (rung < state.table.shape[0])
        table = entered(state.table, rung, loss, arrived)
        rank, count = rank_and_count(table, rung, loss)
        goes_on = arrived & (rank * self.reduction < count)
        ended = done & ~goes_on
        told, worst = lifted(state.worst, rung, loss, ended)
        return AshaState(
            inner=tell(self.inner, key, state.inner, query, feedback, told, ended),
            rung=jnp.where(ended, 0, rung + goes_on),
            table=table,
            worst=worst,
        )

    def holds(self, state: AshaState) -> int:
        """Trials ended for which the tables have room, the inner optimizer's too."""
        return holds_both(self, state)

    def enlarged(self, state: AshaState) -> AshaState:
        """The state with the smaller of its tables enlarged; between updates, for shapes change."""
        return enlarged_both(self, state)
