"""Lanes: trials trained side by side, in shards of one fixed width, shards over devices.

Notation: B lanes of the optimizer, W lanes to a shard, P padded lanes (a whole number of shards on every device),
D dimensions of the cube. A trial's bits depend on its number, its point and W; not on the devices.

What devices tell each other is written out here, in one exchange a time, each of which needs the one before: two that do not
may start in another order on each device, and then wait for each other for ever (seen on CPUs with few threads).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jaxhpo.core import Array, pytree_dataclass
from jaxhpo.study.lane_bytes import from_bytes, to_bytes
from jaxhpo.study.problem import SEED_STREAM, TRIAL_STREAM, Plan, Problem
from jaxhpo.tasks.plain_loss import scalar_metrics
from jaxhpo.tasks.task import has_no_nan, init_and_step_keys

LANES, EVERYWHERE = PartitionSpec("lanes"), PartitionSpec()


@pytree_dataclass
class Row:
    """What one lane is told to do in a round: all of leading size ``P``, or ``W`` within a shard.

    Attributes:
        values: the decoded hyperparameters, an array ``[P, *shape]`` a leaf of the space.
        number: ``i32[P]``, the trial.
        seed: ``i32[P]``, which of the study's seeds it trains on; of no account where a trial has one seed of its own.
        fresh: ``bool[P]``, start afresh in this round.
        steps: ``i32[P]``, steps trained before this round.
        due: ``i32[P]``, steps at which the loss is due, a multiple of the steps in a round.
        waits: ``bool[P]``, is not trained in this round: the loss that was due is answered again.
        idle: ``bool[P]``, trains beyond the last trial of the study: nobody waits for its loss.
    """

    values: Sequence[Array]
    number: Array
    seed: Array
    fresh: Array
    steps: Array
    due: Array
    waits: Array
    idle: Array


def one_row(problem: Problem) -> Row:
    """A row of one lane, for its shapes."""
    zero = jnp.zeros((), jnp.int32)
    values = problem.space.decode_arrays(jnp.zeros(problem.space.num_dims))
    return Row(values, zero, zero, zero > 0, zero, zero, zero > 0, zero > 0)


def whole_training(values: Sequence[Array], number: Array, num_steps: Array | int) -> Row:
    """Lanes ``[P]`` at the start of trainings to the end."""
    zeros = jnp.zeros(number.shape, jnp.int32)
    never = jnp.zeros(number.shape, bool)
    return Row(values, number, zeros, ~never, zeros, zeros + num_steps, never, never)


@pytree_dataclass
class Outcome:
    """What became of one lane in a round.

    Attributes:
        metrics: ``f32[P]`` each; mean nothing where the trial is not over.
        over: ``bool[P]``, the loss is due or the training diverged.
        sound: ``bool[P]``, no NaN in the training state.
        steps: ``i32[P]``, steps survived.
        rounds: ``i32[P]``, rounds that were spent on it.
        grad: derivative of the metric by each float of the space by name, ``[P, *shape]``; None without an estimator.
    """

    metrics: dict[str, Array]
    over: Array
    sound: Array
    steps: Array
    rounds: Array
    grad: dict[str, Array] | None = None


def trial_key(key: Array, number: Array) -> Array:
    """The key of a trial: from the study's key and the trial's number alone."""
    return jax.random.fold_in(jax.random.fold_in(key, TRIAL_STREAM), number)


def key_of(problem: Problem, row: Row) -> Array:
    """The key that one lane trains with: its trial's, or that of the seed which all trials share."""
    if problem.num_seeds == 1:
        return trial_key(problem.key, row.number)
    return jax.random.fold_in(jax.random.fold_in(problem.key, SEED_STREAM), row.seed)


def init_state(problem: Problem, row: Row) -> Any:
    """The training state of one lane at the start of its trial."""
    init_key, _ = init_and_step_keys(key_of(problem, row))
    return problem.task.init(init_key, problem.hparams(row.values))


def _estimate_shard(problem: Problem, row: Row) -> Outcome:
    """Whole trainings of ``W`` lanes with the derivative of their metric."""

    def one(row: Row) -> tuple[dict[str, Array], dict[str, Array]]:
        estimate = problem.task.estimate(key_of(problem, row), *problem.floats(row.values))
        return scalar_metrics(estimate.metrics), estimate.grad

    metrics, grad = jax.vmap(one)(row)
    sound = jnp.isfinite(metrics[problem.metric])
    steps = jnp.where(sound, problem.num_steps, 0).astype(jnp.int32)
    return Outcome(metrics, ~row.idle, sound, steps, jnp.ones_like(steps), grad)


def _set_lanes(plan: Plan, chosen: Array, one: Callable[[Any], Any], of: Any, into: Any) -> Any:
    """``into`` with ``one(of)`` in the lanes ``chosen``, ``bool[W]``; ``of`` and ``into`` have leading size ``W``."""
    if not plan.lanes_in_turn:
        at_once = lambda into: _where(chosen, jax.vmap(one)(of), into)
        return lax.cond(chosen.any(), at_once, lambda into: into, into)
    order = jnp.argsort(~chosen, stable=True)

    def next_one(i: Array, into: Any) -> Any:
        at = order[i]
        found = one(jax.tree.map(lambda x: x[at], of))
        return jax.tree.map(lambda x, y: x.at[at].set(y), into, found)

    return lax.fori_loop(0, chosen.sum(), next_one, into)


def train_shard(plan: Plan, problem: Problem, row: Row, state: Any) -> tuple[Any, Outcome]:
    """One round of ``W`` lanes: begin where fresh, train but where one waits, score where due."""
    if problem.has_gradient:
        return state, _estimate_shard(problem, row)
    step_keys = jax.vmap(lambda row: init_and_step_keys(key_of(problem, row))[1])(row)

    def train(i: Array, state: Any) -> Any:
        keys = jax.vmap(jax.random.fold_in)(step_keys, row.steps + i)
        return jax.vmap(lambda key, v, s: problem.task.step(key, problem.hparams(v), s))(keys, row.values, state)

    state = _set_lanes(plan, row.fresh, functools.partial(init_state, problem), row, state)
    trained = lax.fori_loop(0, problem.round_steps, train, state)
    state = lax.cond(row.waits.any(), lambda new, old: _where(row.waits, old, new), lambda new, old: new, trained, state)
    steps = row.steps + jnp.where(row.waits, 0, problem.round_steps)
    watched = problem.watch_state and jax.tree.leaves(state)
    sound = jax.vmap(has_no_nan)(state) if watched else jnp.ones(steps.shape, bool)
    over = ((steps >= row.due) | ~sound) & ~row.idle

    def score(lane: tuple[Sequence[Array], Any]) -> dict[str, Array]:
        values, state = lane
        return scalar_metrics(problem.task.evaluate(problem.hparams(values), state))

    shapes = jax.eval_shape(jax.vmap(score), (row.values, state))
    nothing = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes)
    metrics = _set_lanes(plan, over, score, (row.values, state), nothing)
    rounds = jnp.where(row.waits, 0, 1).astype(jnp.int32)
    return state, Outcome(metrics, over, sound, jnp.where(sound, steps, row.steps), rounds)


def _where(mask: Array, there: Any, elsewhere: Any) -> Any:
    """Lane by lane one of two trees."""
    pick = lambda x, y: jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), x, y)
    return jax.tree.map(pick, there, elsewhere)


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
    """One round of all ``P`` lanes; each device knows the states and the outcome of its own ones."""
    return in_shards(plan, functools.partial(train_shard, plan), problem, _known_everywhere(plan, row), state)


def _known_everywhere(plan: Plan, tree: Any) -> Any:
    """Arrays ``[P, ...]`` that every device computes for all lanes: from here on it takes those of its own."""
    return tree if plan.mesh is None else lax.with_sharding_constraint(tree, NamedSharding(plan.mesh, EVERYWHERE))


def whole_everywhere(plan: Plan, tree: Any) -> Any:
    """Arrays ``[P, ...]`` of which each device has its own lanes, whole on every device by one exchange of their bytes."""
    if plan.mesh is None or plan.num_devices == 1:
        return tree
    return jax.shard_map(_exchanged, mesh=plan.mesh, in_specs=LANES, out_specs=EVERYWHERE, check_vma=False)(tree)


def _exchanged(tree: Any) -> Any:
    """From the lanes of this device to those of all; within ``shard_map``."""
    like = jax.eval_shape(lambda tree: jax.tree.map(lambda x: x[0], tree), tree)
    whole = lax.all_gather(jax.vmap(to_bytes)(tree), "lanes", tiled=True)
    return jax.vmap(lambda data: from_bytes(like, data))(whole)


def take_over(plan: Plan, source: Array, state: Any) -> Any:
    """Training states ``[P, ...]``, each that of the lane ``source``, ``i32[P]``; nothing moves where all keep their own."""
    if not jax.tree.leaves(state):
        return state
    here = plan.padded_lanes // plan.num_devices

    def taken(source: Array, state: Any) -> Any:
        mine = lax.dynamic_slice_in_dim(source, lax.axis_index("lanes") * here, here)
        return jax.tree.map(lambda x: x[mine], _exchanged(state))

    def gathered(state: Any) -> Any:
        if plan.mesh is None or plan.num_devices == 1:
            return jax.tree.map(lambda x: x[source], state)
        specs = (EVERYWHERE, LANES)
        return jax.shard_map(taken, mesh=plan.mesh, in_specs=specs, out_specs=LANES, check_vma=False)(source, state)

    own = jnp.arange(source.shape[0], dtype=source.dtype)
    return lax.cond((source != own).any(), gathered, lambda state: state, state)


def pad(plan: Plan, tree: Any) -> Any:
    """Leading size ``B``, or ``B * S`` with ``S`` seeds at once, to ``P``; the padding repeats the last row, for nothing."""
    extra = plan.padded_lanes - plan.num_trainings

    def one(x: Array) -> Array:
        return jnp.concatenate([x, jnp.broadcast_to(x[-1:], (extra, *x.shape[1:]))]) if extra else x

    return jax.tree.map(one, tree)


def unpad(plan: Plan, tree: Any) -> Any:
    """Leading size ``P`` back to that before :func:`pad`."""
    return jax.tree.map(lambda x: x[: plan.num_trainings], tree)


@pytree_dataclass
class Schedule:
    """Trainings whose hyperparameters change between rounds; ``T`` parts, each with constant ones.

    Attributes:
        values: decoded hyperparameters, ``[B, T, *shape]`` each.
        number: ``i32[B, T]``, the trials that the parts are, for their keys.
        seed: ``i32[B]``, as in a :class:`Row`.
        part: ``i32[R]``, the part that each round belongs to, R the rounds of a whole training.
        rounds: ``i32[]``, rounds to train, at most R.
    """

    values: Sequence[Array]
    number: Array
    seed: Array
    part: Array
    rounds: Array


def train_schedule(problem: Problem, plan: Plan, schedule: Schedule) -> tuple[Outcome, dict[str, Any]]:
    """Trainings from the start, all at once, nothing refilled.

    Returns:
        the outcome with validation metrics, and the metrics on the test split ({} where the task has none), ``[B]``.
    """
    values, number, seed = pad(plan, (schedule.values, schedule.number, schedule.seed))

    def shard(
        shared: tuple[Problem, Array, Array], values: Sequence[Array], number: Array, seed: Array
    ) -> tuple[Outcome, dict[str, Any]]:
        problem, part, rounds = shared
        last = rounds * problem.round_steps

        def row_of(i: Array | int) -> Row:
            values_now, number_now = jax.tree.map(lambda x: x[:, part[i]], (values, number))
            row = whole_training(values_now, number_now, last)
            return dataclasses.replace(row, seed=seed, fresh=row.fresh & (i == 0), steps=row.steps + i * problem.round_steps)

        first = row_of(0)
        if problem.has_gradient:
            return _estimate_shard(problem, first), {}

        def one_round(i: Array, carry: tuple[Any, Outcome]) -> tuple[Any, Outcome]:
            state, outcome = train_shard(plan, problem, row_of(i), carry[0])
            sound = outcome.sound & carry[1].sound
            steps = jnp.where(sound, outcome.steps, carry[1].steps)
            return state, Outcome(outcome.metrics, outcome.over, sound, steps, outcome.rounds)

        states = jax.vmap(init_state, (None, 0))(problem, first)
        nothing = jax.eval_shape(functools.partial(train_shard, plan), problem, first, states)[1]
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
        start = dataclasses.replace(start, sound=jnp.ones_like(first.fresh))
        state, outcome = lax.fori_loop(0, rounds, one_round, (states, start))
        test = problem.task.test
        if test is None:
            return outcome, {}
        return outcome, jax.vmap(lambda v, s: scalar_metrics(test(problem.hparams(v), s)))(row_of(rounds - 1).values, state)

    values, number, seed = _known_everywhere(plan, (values, number, seed))
    told = in_shards(plan, shard, (problem, schedule.part, schedule.rounds), values, number, seed)
    return unpad(plan, whole_everywhere(plan, told))
