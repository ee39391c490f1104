"""A population whose members train side by side and copy each other: what :class:`PBT` and :class:`PB2` share.

    feedback -> answered -> who has come to an end, who copies whom (truncation, tournament)
             -> the inner optimizer is told of members that ended and gives new first points -> begun

Every lane is a member. Lanes decide when they are done, at once, each by the last known losses of all, those of this round
included: nobody waits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import FRESH, FULL, Array, CubeSpec, Feedback, Query, pytree_dataclass
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.inner import check_inner, fitted_inner, lifted, tell
from jaxhpo.fidelity.rungs import check_training

EXPLOITS = ("truncation", "binary_tournament")

_HAIR = 1e-3  # of a member: what the product of a share and a number may fall short of a whole one


@pytree_dataclass
class Population:
    """The members, one a lane. Hyperparameters are kept here, beside the training states that lanes copy, never in them.

    Attributes:
        cube: ``f32[B, D]``, the point of the trial on each lane.
        parent: ``i32[B]``, ``budget``: ``i32[B]``: the rest of its query.
        loss: ``f32[B]``, the last answer of the trial; infinite before the first.
        steps: ``i32[B]``, training steps at that answer.
        generation: ``i32[B]``, in which population the lane trains: lanes that have finished begin the next one.
        is_start: ``bool[B]``, the trial is the one that began at the inner optimizer's point.
        start: ``f32[B, D]``, that point.
        start_loss: ``f32[B]``, the last answer of the trial that began there; infinite before, and if it diverged.
        worst: ``f32[2]``, the highest loss so far of the inner optimizer's points that were given up, and of those trained
            to the end; ``-inf`` before.
    """

    cube: Array
    parent: Array
    budget: Array
    loss: Array
    steps: Array
    generation: Array
    is_start: Array
    start: Array
    start_loss: Array
    worst: Array

    @property
    def query(self) -> Query:
        return Query(self.cube, self.parent, self.budget)


def filled_in(optimizer: Any, num_steps: int, round_steps: int) -> Any:
    """The wrapper with ``interval`` and ``max_steps`` for a training of ``num_steps`` in rounds of ``round_steps``.

    Raises:
        JaxhpoError: for settings that do not fit such a training.
    """
    name, interval, max_steps = type(optimizer).__name__, optimizer.interval, optimizer.max_steps
    inner = fitted_inner(name, optimizer.inner, num_steps, round_steps)
    check_training(name, num_steps, round_steps)
    if interval is None:
        interval = max(round(num_steps / round_steps / 10), 1) * round_steps
    if max_steps not in (None, num_steps):
        raise JaxhpoError(f"{name}: max_steps = {max_steps!r}: must be the {num_steps} steps of the training, or left out")
    most = num_steps - round_steps
    if not isinstance(interval, (int, np.integer, np.ndarray)) or isinstance(interval, bool) or not 1 <= interval <= most:
        raise JaxhpoError(f"{name}: interval = {interval!r}: must be a whole number between 1 and {most} of {num_steps} steps")
    return dataclasses.replace(optimizer, inner=inner, interval=int(interval), max_steps=num_steps)


def check(optimizer: Any) -> None:
    """Refuses, in one line, a wrapper that cannot begin."""
    name = type(optimizer).__name__
    check_inner(name, optimizer.inner)
    if optimizer.interval is None or optimizer.max_steps is None:
        raise JaxhpoError(
            f"{name}: interval and max_steps are not set: a study sets them; in a loop of your own call "
            "for_training(num_steps, round_steps) or give both"
        )


def begin(start: Array, interval: Any, max_steps: Any) -> Population:
    """A population at the first points ``f32[B, D]`` of its members."""
    lanes = start.shape[0]
    zeros = jnp.zeros(lanes, jnp.int32)
    unknown = jnp.full(lanes, jnp.inf, jnp.float32)
    budget = next_budget(zeros, interval, max_steps)
    worst = jnp.full(2, -jnp.inf, jnp.float32)
    return Population(start, zeros + FRESH, budget, unknown, zeros, zeros, zeros == 0, start, unknown, worst)


def next_budget(steps: Array, interval: Any, max_steps: Any) -> jax.Array:
    """The next multiple of the interval after ``steps i32[B]``; ``FULL`` where that is the whole training."""
    due = (steps // jnp.asarray(interval, jnp.int32) + 1) * jnp.asarray(interval, jnp.int32)
    return jnp.where(due >= jnp.asarray(max_steps, jnp.int32), FULL, due).astype(jnp.int32)


def answered(population: Population, query: Query, feedback: Feedback) -> Population:
    """The answers of lanes that are done entered; a trial that diverged has an infinite loss.

    Points are those that were really trained: a study does not let a copy change what its training state depends on.
    """
    done = jnp.asarray(feedback.done)
    loss = jnp.where(jnp.isfinite(feedback.loss), feedback.loss, jnp.inf).astype(population.loss.dtype)
    return dataclasses.replace(
        population,
        cube=jnp.where(done[:, None], jnp.asarray(query.cube), population.cube),
        loss=jnp.where(done, loss, population.loss),
        steps=jnp.where(done, feedback.steps, population.steps).astype(jnp.int32),
        start_loss=jnp.where(done & population.is_start, loss, population.start_loss),
    )


def finished(population: Population, done: Array, max_steps: Any) -> jax.Array:
    """Which lanes have come to the end of the whole training, ``bool[B]``."""
    whole = (population.steps >= jnp.asarray(max_steps, jnp.int32)) | (population.budget == FULL)
    return done & whole & jnp.isfinite(population.loss)


def peers(population: Population, ended: Array) -> jax.Array:
    """Whom each lane is compared with and may copy, ``bool[B, B]``, itself included.

    Those of its own generation whose trial has an answer and that have not ``ended bool[B]``: a member near the end of its
    training is no measure for one at its beginning.
    """
    known = jnp.isfinite(population.loss) & ~ended
    return known & (population.generation[:, None] == population.generation)


def _drawn(key: jax.Array, among: Array) -> jax.Array:
    """For each row of ``bool[B, B]`` one of its true columns, uniformly, ``i32[B]``; the own row where there is none."""
    lanes = among.shape[0]
    count = among.sum(1, dtype=jnp.int32)
    place = jnp.floor(jax.random.uniform(key, (lanes,), jnp.float32) * count).astype(jnp.int32)
    place = jnp.minimum(place, count - 1)
    at = among & (jnp.cumsum(among, axis=1, dtype=jnp.int32) - 1 == place[:, None])
    return jnp.where(count > 0, jnp.argmax(at, axis=1), jnp.arange(lanes)).astype(jnp.int32)


def truncation(key: jax.Array, loss: Array, peers: Array, fraction: Array | float) -> jax.Array:
    """Whom each lane copies, ``i32[B]``, itself if nobody (truncation selection, Jaderberg et al. 2017).

    A lane among the worst ``fraction`` of its ``peers bool[B, B]`` by ``loss f32[B]`` copies one of the best ``fraction``,
    drawn uniformly; both are rounded down, to at least one. Lanes that are equal rank by their number. A lane that is no
    peer of itself has diverged, or has no answer: it copies one of the best, too.
    """
    own = jnp.arange(loss.shape[0], dtype=jnp.int32)
    better = (loss < loss[:, None]) | ((loss == loss[:, None]) & (own < own[:, None]))  # [b, c]: c than b
    rank, size = (peers & better).sum(1), peers.sum(1)
    few = jnp.maximum(jnp.floor(fraction * size + _HAIR), 1.0).astype(jnp.int32)
    best = peers & (rank < few[:, None])
    copies = ~jnp.diagonal(peers) | ((size > 1) & (rank >= size - few))
    return jnp.where(copies, _drawn(key, best), own)


def tournament(key: jax.Array, loss: Array, peers: Array) -> jax.Array:
    """Whom each lane copies, ``i32[B]``, itself if nobody (binary tournament, Jaderberg et al. 2017).

    A lane meets another of its ``peers bool[B, B]``, drawn uniformly, and copies it if that one's loss is lower; a loss
    that is not finite is higher than any.
    """
    own = jnp.arange(loss.shape[0], dtype=jnp.int32)
    other = _drawn(key, peers & (own != own[:, None]))
    return jnp.where(loss[other] < loss, other, own)


def moves(source: Array, loss: Array, done: Array, ended: Array) -> jax.Array:
    """The next parent of every lane that is done, ``i32[B]``, from whom it would copy; its own where it is not done.

    A lane that has ended begins afresh, and so does one that diverged and finds nobody to copy.
    """
    own = jnp.arange(source.shape[0], dtype=jnp.int32)
    lost = ~jnp.isfinite(loss) & (source == own)
    return jnp.where(done, jnp.where(ended | lost, FRESH, source), own).astype(jnp.int32)


def restarted(
    inner: Any, key: jax.Array, inner_state: Any, population: Population, parent: Array, ended: Array, feedback: Feedback
) -> tuple[Any, Population]:
    """The inner optimizer told of members that end here (``parent`` is ``FRESH``), and new first points for them.

    It is told one loss for the point it gave: that of the trial which began there. Where that was given up for a copy of
    another it is told no better than any whole training so far; NaN where it diverged.
    """
    key_update, key_ask = jax.random.split(key)
    fresh = parent == FRESH
    whole = (ended & population.is_start).astype(jnp.int32)
    told, worst = lifted(population.worst, whole, population.start_loss, fresh)
    if feedback.grad is not None:  # a gradient at the point of a copy is none at the start
        grad = jnp.where(population.is_start[:, None], feedback.grad, jnp.nan)
        feedback = dataclasses.replace(feedback, grad=grad)
    inner_state = tell(inner, key_update, inner_state, Query.fresh(population.start), feedback, told, fresh)
    start = jnp.where(fresh[:, None], inner.ask(key_ask, inner_state).cube, population.start)
    return inner_state, dataclasses.replace(population, start=start, worst=worst)


def moved(
    population: Population,
    parent: Array,
    cube: Array,
    done: Array,
    ended: Array,
    interval: Any,
    max_steps: Any,
) -> Population:
    """The population after lanes that are done have gone on, copied (``cube f32[B, D]`` is their new point) or begun afresh.

    A member that begins afresh joins the newest generation; where one of that has come to its end, a newer one.
    """
    fresh = parent == FRESH
    own = jnp.arange(parent.shape[0], dtype=jnp.int32)
    begins = parent != own
    source = jnp.where(fresh, own, parent)
    newest = population.generation.max()
    newest += (ended & (population.generation == newest)).any()
    steps = jnp.where(fresh, 0, population.steps[source])
    point = jnp.where(fresh[:, None], population.start, jnp.where(begins[:, None], cube, population.cube))
    return dataclasses.replace(
        population,
        cube=point.astype(population.cube.dtype),
        parent=jnp.where(done, parent, population.parent),
        budget=jnp.where(done, next_budget(steps, interval, max_steps), population.budget),
        loss=jnp.where(begins, jnp.inf, population.loss),
        steps=steps.astype(jnp.int32),
        generation=jnp.where(fresh, newest, population.generation).astype(jnp.int32),
        is_start=fresh | (population.is_start & ~begins),
        start_loss=jnp.where(fresh, jnp.inf, population.start_loss),
    )


def first_points(inner: Any, key: jax.Array, spec: CubeSpec) -> tuple[Any, jax.Array]:
    """The inner optimizer's state, and the first points ``f32[B, D]``."""
    key_init, key_ask = jax.random.split(key)
    state = inner.init(key_init, spec)
    return state, jnp.asarray(inner.ask(key_ask, state).cube)
