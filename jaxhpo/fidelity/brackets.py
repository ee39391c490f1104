"""Synchronous brackets: the machine of successive halving and Hyperband.

    begin n trials -> when all have answered a rung, the best go on, the others end -> ... -> the whole training

A trial stays on the lane where its training state lives. Several brackets are under way: a lane that becomes free begins
the next trial of the newest bracket, which opens when the one before has all its trials. Brackets are of several kinds in
turn, trials are counted as they begin, and a trial's number says to which bracket it belongs. So the state has
no list of brackets, only lanes.

A lane that has answered its rung waits until the others of its bracket have. It does not idle: it trains on, a round at a
time, up to the next rung, where it holds. What it is ranked by is its loss at the rung.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.core import FRESH, Array, Feedback, Query, pytree_dataclass
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.inner import lifted, tell
from jaxhpo.fidelity.rungs import geometric_rungs, given_rungs

_LAST = np.iinfo(np.int32).max
_RUNGS = 3  # at most, where their number is not given


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kinds of brackets, which are opened in turn; static.

    Attributes:
        sizes: trials of each kind at each of the rungs 0 to K, where K is the whole training; 0 at rungs below the first.
    """

    sizes: tuple[tuple[int, ...], ...]

    @property
    def first(self) -> np.ndarray:
        """The first rung of each kind, ``i32[kinds]``."""
        return np.argmax(np.asarray(self.sizes) > 0, axis=1).astype(np.int32)

    @property
    def ends(self) -> np.ndarray:
        """Trials up to the end of each kind in a cycle of all kinds, ``i32[kinds]``."""
        return np.cumsum(np.max(self.sizes, axis=1), dtype=np.int32)

    def bracket_of(self, number: Array) -> jax.Array:
        """The bracket of the trial that begins as the ``number``-th, ``i32[...]``."""
        ends = self.ends
        place = jnp.searchsorted(ends, number % ends[-1], side="right").astype(jnp.int32)
        return number // ends[-1] * len(ends) + place

    def kind_of(self, bracket: Array) -> Array:
        return bracket % len(self.sizes)

    def end_of(self, bracket: Array) -> Array:
        """How many trials have begun when the bracket has all of its own."""
        ends = self.ends
        return bracket // len(ends) * ends[-1] + jnp.asarray(ends)[self.kind_of(bracket)]


def halved(num_configs: int, reduction: int, num_rungs: int, first: int = 0) -> tuple[int, ...]:
    """The sizes of one kind of bracket: ``floor(n / reduction^i)`` at its i-th rung, at least one."""
    return (0,) * first + tuple(max(num_configs // reduction**i, 1) for i in range(num_rungs + 1 - first))


@pytree_dataclass
class Brackets:
    """The state of all lanes.

    Attributes:
        inner: the inner optimizer's.
        bracket: ``i32[B]``, the bracket of each lane's trial.
        rung: ``i32[B]``, the rung that the trial trains for or at which it waits, K for the whole training.
        loss: ``f32[B]``, its loss there; inf until it has answered.
        ahead: ``f32[B]``, its loss at the next rung, if it has come so far while it waited; inf else.
        budget: ``i32[B]``, the budget of its query.
        goes_on: ``bool[B]``, the query goes on with a training state.
        stopped: ``bool[B]``, the trial ends as soon as its query is answered.
        begun: ``i32[]``, trials begun.
        worst: ``f32[K + 1]``, see :func:`jaxhpo.fidelity.inner.lifted`.
    """

    inner: Any
    bracket: Array
    rung: Array
    loss: Array
    ahead: Array
    budget: Array
    goes_on: Array
    stopped: Array
    begun: Array
    worst: Array


def first_brackets(plan: Plan, due: Array, inner: Any, num_lanes: int) -> Brackets:
    """A trial on every lane. ``due``, ``i32[K + 1]``, has the steps of the rungs."""
    bracket = plan.bracket_of(jnp.arange(num_lanes, dtype=jnp.int32))
    rung = jnp.asarray(plan.first)[plan.kind_of(bracket)]
    return Brackets(
        inner=inner,
        bracket=bracket,
        rung=rung,
        loss=jnp.full(num_lanes, jnp.inf, jnp.float32),
        ahead=jnp.full(num_lanes, jnp.inf, jnp.float32),
        budget=jnp.asarray(due)[rung],
        goes_on=jnp.zeros(num_lanes, bool),
        stopped=jnp.zeros(num_lanes, bool),
        begun=jnp.asarray(num_lanes, jnp.int32),
        worst=jnp.full(jnp.shape(due), -jnp.inf, jnp.float32),
    )


def asked(state: Brackets, cube: Array) -> Query:
    """The query with the inner optimizer's points ``f32[B, D]``."""
    lane = jnp.arange(state.rung.shape[0], dtype=jnp.int32)
    return Query(cube, jnp.where(state.goes_on, lane, FRESH), jnp.asarray(state.budget))


def answered(
    plan: Plan,
    due: Array,
    wait_until: Array | int | None,
    inner: Any,
    key: jax.Array,
    state: Brackets,
    query: Query,
    feedback: Feedback,
) -> Brackets:
    """The state after feedback.

    Args:
        due: ``i32[K + 1]``, the steps of the rungs.
        wait_until: the steps to which a trial that waits at the last rung trains on; None: it holds there.
        inner: the inner optimizer.
    """
    top, done, steps = due.shape[0] - 1, jnp.asarray(feedback.done), jnp.asarray(feedback.steps)
    seen = jnp.asarray(feedback.loss, jnp.float32)
    seen = jnp.where(done & jnp.isfinite(seen), seen, jnp.inf)
    sound, waits = jnp.isfinite(seen), jnp.isfinite(state.loss)

    def reached(rung: Array) -> Array:
        return sound & ((state.budget >= due[rung]) | (steps >= due[rung]))

    loss = jnp.where(~waits & reached(state.rung), seen, state.loss)
    next_rung = jnp.minimum(state.rung + 1, top)
    ahead = jnp.where(waits & (state.rung < top) & reached(next_rung) & jnp.isinf(state.ahead), seen, state.ahead)
    whole = (state.rung == top) & jnp.isfinite(loss)
    ended = done & (~sound | state.stopped | whole)
    state = dataclasses.replace(state, loss=loss, ahead=ahead)

    member = ~ended & ~state.stopped
    # As often as there are rungs: a bracket whose best all came to the next rung while they waited is decided there at once.
    state, member = lax.fori_loop(0, top, lambda _, one: _decided(plan, *one), (state, member))
    ended |= done & ~member

    told, worst = lifted(state.worst, state.rung, jnp.where(sound, state.loss, jnp.nan), ended)
    inner = tell(inner, key, state.inner, query, feedback, told, ended)
    number = state.begun + jnp.cumsum(ended, dtype=jnp.int32) - 1
    bracket = jnp.where(ended, plan.bracket_of(number), state.bracket)
    rung = jnp.where(ended, jnp.asarray(plan.first)[plan.kind_of(bracket)], state.rung)
    loss, ahead = jnp.where(ended, jnp.inf, state.loss), jnp.where(ended, jnp.inf, state.ahead)
    # Where a lane that waits may train to: the next rung, never the whole training, in which its trial would end.
    last = due[-2] if wait_until is None else jnp.maximum(due[-2], wait_until)
    limit = jnp.append(due[1:-1], last)[jnp.minimum(rung, top - 1)]
    budget = jnp.where(jnp.isfinite(loss), jnp.minimum(steps + 1, limit), due[rung])
    return Brackets(
        inner=inner,
        bracket=bracket,
        rung=rung,
        loss=loss,
        ahead=ahead,
        budget=jnp.where(done, budget, state.budget),
        goes_on=jnp.where(done, ~ended, state.goes_on),
        stopped=~member & ~ended,
        begun=state.begun + ended.sum(dtype=jnp.int32),
        worst=worst,
    )


def _decided(plan: Plan, state: Brackets, member: Array) -> tuple[Brackets, Array]:
    """Takes every bracket that is ready one rung further: all its trials have begun, and those left have answered.

    Returns:
        the state, and which lanes are still members of their bracket, ``bool[B]``.
    """
    lane = jnp.arange(member.shape[0], dtype=jnp.int32)
    bracket = jnp.where(member, state.bracket, _LAST)
    ordered, _, order = lax.sort((bracket, jnp.asarray(state.loss), lane), num_keys=3)  # ties by lane
    group = jnp.searchsorted(ordered, bracket)  # where the bracket begins in that order: one number for each bracket
    rank = jnp.zeros_like(lane).at[order].set(lane) - group
    pending = jnp.zeros_like(member).at[group].max(jnp.isinf(state.loss))
    ready = member & (state.begun >= plan.end_of(state.bracket)) & ~pending[group]
    sizes = jnp.asarray(plan.sizes, jnp.int32)
    room = sizes[plan.kind_of(state.bracket), jnp.minimum(state.rung + 1, sizes.shape[1] - 1)]
    on = ready & (rank < room)
    state = dataclasses.replace(
        state,
        rung=state.rung + on,
        loss=jnp.where(on, state.ahead, state.loss),
        ahead=jnp.where(on, jnp.inf, state.ahead),
    )
    return state, member & (on | ~ready)


def bracket_rungs(name: str, one: Any, share: int, num_steps: int, round_steps: int) -> tuple[int, ...]:
    """The rungs of a wrapper with brackets, from its ``budgets`` or from ``grace``, ``num_rungs`` and ``reduction``.

    Args:
        share: where their number is not given, ``reduction^rungs`` trials take one in so many lanes at most: those of the
            newest bracket wait for its last ones, whose lanes must come from other brackets.

    Raises:
        JaxhpoError: if they do not fit the training or the lanes.
    """
    if one.budgets is not None:
        return given_rungs(name, one.budgets, num_steps, round_steps)
    lanes, reduction = one.num_lanes, one.reduction
    if lanes < reduction:
        raise JaxhpoError(
            f"{name}: num_lanes = {lanes}: at least reduction = {reduction} are due, for the trials of a bracket train side by "
            "side; ASHA works with any number"
        )
    fit = [k for k in range(1, _RUNGS + 1) if share * reduction**k <= lanes]
    most = max(fit, default=1) if one.num_rungs is None else one.num_rungs
    return geometric_rungs(name, num_steps, round_steps, reduction, one.grace, most)
