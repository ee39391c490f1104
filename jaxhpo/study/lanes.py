"""Lanes: trials trained side by side, in shards of one fixed width, shards over devices.

Notation: B lanes of the optimizer, W lanes to a shard, P padded lanes (a whole number of shards on every device),
D dimensions of the cube. A trial's bits depend on its number, its point and W; not on the devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxhpo.core import Array, pytree_dataclass
from jaxhpo.study.problem import TRIAL_STREAM, Plan, Problem
from jaxhpo.tasks.plain_loss import scalar_metrics
from jaxhpo.tasks.task import has_no_nan, init_and_step_keys

LANES, EVERYWHERE = PartitionSpec("lanes"), PartitionSpec()


@pytree_dataclass
class Row:
    """What one lane is told to do in a round: all of leading size ``P``, or ``W`` within a shard.

    Attributes:
        values: the decoded hyperparameters, an array ``[P, *shape]`` a leaf of the space.
        number: ``i32[P]``, the trial.
        fresh: ``bool[P]``, start afresh in this round.
        steps: ``i32[P]``, steps trained before this round.
        due: ``i32[P]``, steps at which the loss is due, a multiple of the steps in a round.
        idle: ``bool[P]``, trains beyond the last trial of the study: nobody waits for its loss.
    """

    values: Sequence[Array]
    number: Array
    fresh: Array
    steps: Array
    due: Array
    idle: Array


@pytree_dataclass
class Outcome:
    """What became of one lane in a round.

    Attributes:
        metrics: ``f32[P]`` each; mean nothing where the trial is not over.
        over: ``bool[P]``, the loss is due or the training diverged.
        sound: ``bool[P]``, no NaN in the training state.
        steps: ``i32[P]``, steps survived.
        grad: derivative of the metric by each float of the space by name, ``[P, *shape]``; None without an estimator.
    """

    metrics: dict[str, Array]
    over: Array
    sound: Array
    steps: Array
    grad: dict[str, Array] | None = None


def trial_key(key: Array, number: Array) -> Array:
    """The key of a trial: from the study's key and the trial's number alone."""
    return jax.random.fold_in(jax.random.fold_in(key, TRIAL_STREAM), number)


def init_state(problem: Problem, row: Row) -> Any:
    """The training state of one lane at the start of its trial."""
    init_key, _ = init_and_step_keys(trial_key(problem.key, row.number))
    return problem.task.init(init_key, problem.hparams(row.values))


def _estimate_shard(problem: Problem, row: Row) -> Outcome:
    """Whole trainings of ``W`` lanes with the derivative of their metric."""

    def one(values: Sequence[Array], number: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        estimate = problem.task.estimate(trial_key(problem.key, number), *problem.floats(values))
        return scalar_metrics(estimate.metrics), estimate.grad

    metrics, grad = jax.vmap(one)(row.values, row.number)
    sound = jnp.isfinite(metrics[problem.metric])
    steps = jnp.where(sound, problem.num_steps, 0).astype(jnp.int32)
    return Outcome(metrics, ~row.idle, sound, steps, grad)


def _train_shard(problem: Problem, row: Row, state: Any) -> tuple[Any, Outcome]:
    """One round of ``W`` lanes: begin where fresh, train, score where due."""
    if problem.has_gradient:
        return state, _estimate_shard(problem, row)
    step_keys = jax.vmap(lambda number: init_and_step_keys(trial_key(problem.key, number))[1])(row.number)

    def begin(state: Any) -> Any:
        started = jax.vmap(init_state, (None, 0))(problem, row)
        return jax.tree.map(lambda new, old: jnp.where(_like(row.fresh, new), new, old), started, state)

    def train(i: Array, state: Any) -> Any:
        keys = jax.vmap(jax.random.fold_in)(step_keys, row.steps + i)
        return jax.vmap(lambda key, v, s: problem.task.step(key, problem.hparams(v), s))(keys, row.values, state)

    state = lax.cond(row.fresh.any(), begin, lambda state: state, state)
    state = lax.fori_loop(0, problem.round_steps, train, state)
    steps = row.steps + problem.round_steps
    watched = problem.watch_state and jax.tree.leaves(state)
    sound = jax.vmap(has_no_nan)(state) if watched else jnp.ones(steps.shape, bool)
    over = ((steps >= row.due) | ~sound) & ~row.idle

    def score(state: Any) -> dict[str, Any]:
        return jax.vmap(lambda v, s: scalar_metrics(problem.task.evaluate(problem.hparams(v), s)))(row.values, state)

    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), jax.eval_shape(score, state))
    metrics = lax.cond(over.any(), score, lambda state: nothing, state)
    return state, Outcome(metrics, over, sound, jnp.where(sound, steps, row.steps))


def _like(mask: Array, array: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))


def in_shards(plan: Plan, shard: Callable[..., Any], shared: Any, *lanes: Any) -> Any:
    """``shard(shared, *lanes)`` for every shard of ``W`` lanes: side by side over devices, in turn on each.

    ``lanes`` and the results have leading size ``P``. Nothing is exchanged between devices.
    """

    def on_device(shared: Any, *lanes: Any) -> Any:
        count = plan.shards_per_device
        cut = jax.tree.map(lambda x: x.reshape((count, plan.width, *x.shape[1:])), lanes)

        def fenced(lanes: Any) -> Any:
            # The fences keep the shard's arithmetic from fusing with what surrounds it, which differs
            # with the number of shards in turn, and with it the last bits.
            return lax.optimization_barrier(shard(*lax.optimization_barrier((shared, *lanes))))

        results = lax.map(fenced, cut)
        return jax.tree.map(lambda x: x.reshape((count * plan.width, *x.shape[2:])), results)

    if plan.mesh is None:
        return on_device(shared, *lanes)
    # Varying-axes checks are off: user code may make constants inside scans, which they would refuse.
    specs = (EVERYWHERE, *(LANES for _ in lanes))
    return jax.shard_map(on_device, mesh=plan.mesh, in_specs=specs, out_specs=LANES, check_vma=False)(shared, *lanes)


def train_round(problem: Problem, plan: Plan, row: Row, state: Any) -> tuple[Any, Outcome]:
    """One round of all ``P`` lanes."""
    return in_shards(plan, _train_shard, problem, row, state)


def pad(plan: Plan, tree: Any) -> Any:
    """Leading size ``B`` to ``P``; the padding repeats the last lane and its results are dropped."""
    extra = plan.padded_lanes - plan.num_lanes

    def one(x: Array) -> Array:
        return jnp.concatenate([x, jnp.broadcast_to(x[-1:], (extra, *x.shape[1:]))]) if extra else x

    return jax.tree.map(one, tree)


def unpad(plan: Plan, tree: Any) -> Any:
    """Leading size ``P`` back to ``B``."""
    return jax.tree.map(lambda x: x[: plan.num_lanes], tree)


def train_to_end(problem: Problem, plan: Plan, values: Sequence[Array], number: Array) -> tuple[Outcome, dict[str, Any]]:
    """Whole trainings at decoded hyperparameters ``[B, *shape]``, numbered ``i32[B]``, all at once, nothing refilled.

    Returns:
        the outcome with validation metrics, and the metrics on the test split ({} where the task has none), ``[B]``.
    """
    lanes = plan.padded_lanes
    due = jnp.full(lanes, problem.num_steps, jnp.int32)
    values, number = pad(plan, (values, number))

    def shard(problem: Problem, values: Sequence[Array], number: Array, due: Array) -> tuple[Outcome, dict[str, Any]]:
        if problem.has_gradient:
            return _estimate_shard(problem, Row(values, number, due > 0, jnp.zeros_like(due), due, due < 0)), {}

        def one_round(i: Array, carry: tuple[Any, Outcome]) -> tuple[Any, Outcome]:
            steps = jnp.full(due.shape, i * problem.round_steps, jnp.int32)
            row = Row(values, number, jnp.broadcast_to(i == 0, due.shape), steps, due, due < 0)
            state, outcome = _train_shard(problem, row, carry[0])
            sound = outcome.sound & carry[1].sound
            return state, Outcome(outcome.metrics, outcome.over, sound, jnp.where(sound, outcome.steps, carry[1].steps))

        first = Row(values, number, due > 0, jnp.zeros(due.shape, jnp.int32), due, due < 0)
        states = jax.vmap(init_state, (None, 0))(problem, first)
        nothing = jax.eval_shape(_train_shard, problem, first, states)[1]
        start = Outcome(
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing.metrics),
            jnp.zeros(due.shape, bool),
            jnp.ones(due.shape, bool),
            jnp.zeros(due.shape, jnp.int32),
        )
        state, outcome = lax.fori_loop(0, problem.num_steps // problem.round_steps, one_round, (states, start))
        test = problem.task.test
        if test is None:
            return outcome, {}
        return outcome, jax.vmap(lambda v, s: scalar_metrics(test(problem.hparams(v), s)))(values, state)

    return unpad(plan, in_shards(plan, shard, problem, values, number, due))
