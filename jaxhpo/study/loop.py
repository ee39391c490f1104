"""The one loop: train every lane for a round, score, learn, ask. Pure functions from carry to carry.

    propose   what the lanes do about the query: a number for every trial that begins, whose state it takes over
    train     lanes.train_round (or the host, for what JAX cannot trace)
    learn     feedback to the optimizer, the incumbent, one row of the record a lane, the next query

``run_chunk`` runs many rounds as one compiled loop; how many is a traced number, so chunks of any length share a
program and give the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.core import FRESH, Array, Feedback, Query, pytree_dataclass
from jaxhpo.hypergradients import gauge
from jaxhpo.study import seeds
from jaxhpo.study.lanes import Outcome, Row, init_state, one_row, pad, take_over, train_round, unpad, whole_everywhere
from jaxhpo.study.problem import INIT_STREAM, ROUND_STREAM, Plan, Problem


@pytree_dataclass
class Carry:
    """The whole state of a study between rounds.

    Attributes:
        optimizer: the optimizer's state.
        query: what the lanes are to do next, or are doing.
        number: ``i32[B]``, the trial on each lane.
        parent: ``i32[B]``, the trial whose training state it took over; -1 if it began afresh.
        start: ``i32[B]``, steps at which it did.
        steps: ``i32[B]``, steps it has trained.
        over: ``bool[B]``, the lane's last query is answered: it takes a new one.
        seeds: which seeds of its trial each lane has trained; ``()`` where a trial has one.
        next_number: ``i32[]``, the next trial to begin.
        finished: ``i32[]``, trials ended: answered, and not asked to go on.
        diverged: ``i32[]``, those of them without a finite loss.
        round: ``i32[]``.
        busy: ``i32[]``, rounds that lanes spent on trials that had not ended, over all lanes.
        stuck: ``bool[]``, no lane would train a trial of the study in the next round.
        best_loss: ``f32[]``; inf while there is none.
        best_number: ``i32[]``; -1 while there is none.
        best_cube: ``f32[D]``.
        best_whole: ``bool[]``, the incumbent is fully trained; until one is, the best loss of any is the incumbent.
        train_state: the lanes' training states, leading size ``P``.
    """

    optimizer: Any
    query: Query
    number: Array
    parent: Array
    start: Array
    steps: Array
    over: Array
    seeds: Any
    next_number: Array
    finished: Array
    diverged: Array
    round: Array
    busy: Array
    stuck: Array
    best_loss: Array
    best_number: Array
    best_cube: Array
    best_whole: Array
    train_state: Any


@pytree_dataclass
class Trials:
    """Answered queries as rows of the record, ``[..., B]``; a row counts where ``done``.

    ``parent`` and ``start`` are as in the carry; ``whole`` says that the trial was trained to the end, on all its seeds.
    """

    done: Array
    number: Array
    parent: Array
    start: Array
    round: Array
    cube: Array
    values: Sequence[Array]
    loss: Array
    steps: Array
    whole: Array
    metrics: dict[str, Array]


@pytree_dataclass
class Turn:
    """What the lanes are about to do, ``[B]`` each.

    Attributes:
        number, parent, start: as in the carry, after trials have begun.
        fresh: the lane starts afresh.
        source: the lane whose training state it takes over; its own where it goes on.
        steps: steps trained before the round.
        due: steps at which the loss is due.
        waits: it goes on, with a budget that it has reached already.
        idle: its trial lies beyond the last one of the study.
    """

    number: Array
    parent: Array
    start: Array
    fresh: Array
    source: Array
    steps: Array
    due: Array
    waits: Array
    idle: Array


def first_carry(problem: Problem, plan: Plan, with_states: bool = True) -> Carry:
    """The carry before the first round; training states are zeros until a lane begins."""
    lanes, num_dims = plan.num_lanes, problem.space.num_dims
    zero, nobody = jnp.zeros((), jnp.int32), jnp.full(lanes, -1, jnp.int32)
    states = ()
    if with_states and not problem.has_gradient:
        shapes = jax.eval_shape(init_state, problem, one_row(problem))
        states = jax.tree.map(lambda x: jnp.zeros((plan.padded_lanes, *x.shape), x.dtype), shapes)
    optimizer = problem.optimizer.init(jax.random.fold_in(problem.key, INIT_STREAM), problem.space.spec)
    return Carry(
        optimizer=optimizer,
        query=_asked(problem, zero, optimizer),
        number=nobody,
        parent=nobody,
        start=jnp.zeros(lanes, jnp.int32),
        steps=jnp.zeros(lanes, jnp.int32),
        over=jnp.ones(lanes, bool),
        seeds=seeds.first(problem, lanes),
        next_number=zero,
        finished=zero,
        diverged=zero,
        round=zero,
        busy=zero,
        stuck=jnp.zeros((), bool),
        best_loss=jnp.array(jnp.inf, jnp.float32),
        best_number=jnp.array(-1, jnp.int32),
        best_cube=jnp.zeros(num_dims, jnp.float32),
        best_whole=jnp.zeros((), bool),
        train_state=states,
    )


def _round_keys(problem: Problem, round: Array) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(jax.random.fold_in(problem.key, ROUND_STREAM), round)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def _asked(problem: Problem, round: Array, optimizer: Any, before: Query | None = None, over: Array | None = None) -> Query:
    """The optimizer's query for a round; ``before`` is that of the last one, ``over`` the lanes which it is answered for.

    A training state fits its static choices only, so whoever takes it over takes them over, too.
    """
    ask_key, _ = _round_keys(problem, round)
    query = problem.optimizer.ask(ask_key, optimizer)
    lanes = problem.optimizer.num_lanes
    chex.assert_shape(query.cube, (lanes, problem.space.num_dims))
    chex.assert_shape((query.parent, query.budget), (lanes,))
    static = problem.space.static_dims
    if before is None or over is None or not static.any():
        return query
    own = jnp.arange(lanes)
    fresh = over & (query.parent == FRESH)
    kept = before.cube[jnp.where(over & ~fresh, query.parent, own)]
    return dataclasses.replace(query, cube=jnp.where(static & ~fresh[:, None], kept, query.cube))


def _turn(problem: Problem, carry: Carry) -> Turn:
    """What every lane does about the query.

    A lane that starts afresh or copies another's state begins a new trial; one that goes on keeps its number.
    """
    query, over = carry.query, carry.over
    own = jnp.arange(over.shape[0], dtype=jnp.int32)
    fresh = over & (query.parent == FRESH)
    # A lane that waits for its turn has begun a trial, or its next seeds, without a step.
    not_begun = ~over & (carry.steps == 0)
    copies = over & (query.parent != FRESH) & (query.parent != own)
    begins = fresh | copies
    number = jnp.where(begins, carry.next_number + jnp.cumsum(begins, dtype=jnp.int32) - 1, carry.number).astype(jnp.int32)
    source = jnp.where(copies, query.parent, own)
    again = seeds.begins_again(carry.seeds)  # the same trial with its next seeds
    steps = jnp.where(fresh | again, 0, carry.steps[source])
    parent = jnp.where(copies, carry.number[source], jnp.where(fresh, -1, carry.parent))
    start = jnp.where(begins, steps, carry.start)
    rounds_due = (jnp.minimum(query.budget, problem.num_steps) + problem.round_steps - 1) // problem.round_steps
    due = (rounds_due * problem.round_steps).astype(jnp.int32)
    waits = due <= steps  # a lane under way is short of what is due
    return Turn(number, parent, start, fresh | again | not_begun, source, steps, due, waits, number >= problem.num_trials)


def propose(problem: Problem, carry: Carry) -> tuple[Turn, Row]:
    """What every lane does in this round, and the rows for training."""
    turn = _turn(problem, carry)
    # Decoded once and fenced: what is trained and what is recorded are the same bits.
    values = lax.optimization_barrier(problem.space.decode_arrays(carry.query.cube))
    seed = jnp.zeros_like(turn.number)
    return turn, Row(values, turn.number, seed, turn.fresh, turn.steps, turn.due, turn.waits, turn.idle)


def learn(problem: Problem, carry: Carry, turn: Turn, row: Row, outcome: Outcome, train_state: Any) -> tuple[Carry, Trials]:
    """Tell the optimizer what became of its lanes, keep the incumbent, and ask for the next round.

    ``outcome`` has a row for each training, ``[B * S]``. Lanes that run beyond the last trial of the study count for nothing.
    """
    _, update_key = _round_keys(problem, carry.round)
    query = carry.query
    outcome, verdict = seeds.gathered(problem, carry.seeds, turn.fresh, outcome)
    loss = jnp.where(outcome.sound & jnp.isfinite(verdict.loss), verdict.loss, jnp.nan)
    done = outcome.over & ~turn.idle
    grad, metrics = None, outcome.metrics
    if outcome.grad is not None:
        grad = problem.cube_gradient(query.cube, outcome.grad)
        metrics = metrics | {gauge.GRADIENT: jnp.linalg.norm(grad, axis=1)}
    feedback = Feedback(jnp.where(done, loss, jnp.nan), done, outcome.steps, grad)

    whole = (outcome.steps >= problem.num_steps) & verdict.complete
    ranked = jnp.where(done & ~jnp.isnan(loss), loss, jnp.inf)
    best_of_whole = jnp.where(whole, ranked, jnp.inf)
    any_whole = jnp.isfinite(best_of_whole.min())
    lane = jnp.where(any_whole, jnp.argmin(best_of_whole), jnp.argmin(ranked))
    better = jnp.where(any_whole == carry.best_whole, ranked[lane] < carry.best_loss, any_whole)

    optimizer = problem.optimizer.update(update_key, carry.optimizer, query, feedback)
    carry = Carry(
        optimizer=optimizer,
        query=_asked(problem, carry.round + 1, optimizer, query, done),
        number=turn.number,
        parent=turn.parent,
        start=turn.start,
        steps=outcome.steps,
        over=done,
        seeds=seeds.with_incumbent(problem, verdict, better, lane),
        next_number=jnp.maximum(carry.next_number, turn.number.max() + 1),
        finished=carry.finished,
        diverged=carry.diverged,
        round=carry.round + 1,
        busy=carry.busy + jnp.where(turn.idle, 0, outcome.rounds).sum(dtype=jnp.int32),
        stuck=carry.stuck,
        best_loss=jnp.where(better, ranked[lane], carry.best_loss),
        best_number=jnp.where(better, turn.number[lane], carry.best_number),
        best_cube=jnp.where(better, query.cube[lane], carry.best_cube),
        best_whole=carry.best_whole | (better & any_whole),
        train_state=train_state,
    )
    rounds = jnp.broadcast_to(carry.round - 1, done.shape)
    place = (turn.number, turn.parent, turn.start, rounds)
    rows = Trials(done, *place, query.cube, row.values, loss, outcome.steps, whole, metrics)
    return _counted(problem, carry, loss), rows


def _counted(problem: Problem, carry: Carry, loss: Array) -> Carry:
    """The carry with the trials counted that the next query ends."""
    then = _turn(problem, carry)
    ended = carry.over & (then.number != carry.number)
    return dataclasses.replace(
        carry,
        finished=carry.finished + ended.sum(dtype=jnp.int32),
        diverged=carry.diverged + (ended & jnp.isnan(loss)).sum(dtype=jnp.int32),
        stuck=(then.idle | then.waits).all(),
    )


def is_over(problem: Problem, carry: Carry) -> Array:
    """Whether a study has reached its last trial, its last round or its target, ``bool[]``."""
    reached = carry.best_whole & (carry.best_loss <= problem.target)
    return (carry.finished >= problem.num_trials) | carry.stuck | (carry.busy >= problem.max_rounds) | reached


def run_round(problem: Problem, plan: Plan, carry: Carry) -> tuple[Carry, Trials]:
    """One pass of the loop."""
    turn, row = propose(problem, carry)
    rows, source = seeds.spread(problem, carry.seeds, row, turn.source)
    # A padding lane takes over from itself: its state is nobody's.
    own = jnp.arange(plan.num_trainings, plan.padded_lanes, dtype=source.dtype)
    state = take_over(plan, jnp.concatenate([source, own]), carry.train_state)
    rows = pad(plan, rows)
    rows = dataclasses.replace(rows, idle=rows.idle | (jnp.arange(plan.padded_lanes) >= plan.num_trainings))
    state, outcome = train_round(problem, plan, rows, state)
    return learn(problem, carry, turn, row, unpad(plan, whole_everywhere(plan, outcome)), state)


def empty_trials(problem: Problem, plan: Plan, carry: Carry, rounds: int) -> Trials:
    """Buffers for the rows of ``rounds`` rounds, ``[rounds, B, ...]``."""
    shapes = jax.eval_shape(lambda problem, carry: run_round(problem, plan, carry)[1], problem, carry)
    return jax.tree.map(lambda x: jnp.zeros((rounds, *x.shape), x.dtype), shapes)


def run_chunk(problem: Problem, plan: Plan, carry: Carry, num_rounds: Array) -> tuple[Carry, Trials]:
    """Up to ``num_rounds`` (traced, at most ``plan.max_rounds``) rounds; stops when the study is over.

    Returns:
        the carry and the rows, ``[max_rounds, B, ...]``; those of rounds that did not run have ``done`` False.
    """

    def unfinished(loop: tuple[Array, Carry, Trials]) -> Array:
        return (loop[0] < num_rounds) & ~is_over(problem, loop[1])

    def one(loop: tuple[Array, Carry, Trials]) -> tuple[Array, Carry, Trials]:
        i, carry, rows = loop
        carry, row = run_round(problem, plan, carry)
        return i + 1, carry, jax.tree.map(lambda buffer, x: lax.dynamic_update_index_in_dim(buffer, x, i, 0), rows, row)

    start = (jnp.zeros((), jnp.int32), carry, empty_trials(problem, plan, carry, plan.max_rounds))
    _, carry, rows = lax.while_loop(unfinished, one, start)
    return carry, rows
