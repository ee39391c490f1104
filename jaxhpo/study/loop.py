"""The one loop: ask, train every lane for a round, score, learn. Pure functions from carry to carry.

    propose   the optimizer's query; a number for every trial that begins
    train     lanes.train_round (or the host, for what JAX cannot trace)
    learn     feedback to the optimizer, the incumbent, one row of the record a lane

``run_chunk`` runs many rounds as one compiled loop; how many is a traced number, so chunks of any length share a
program and give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.core import FRESH, Array, Feedback, Query, pytree_dataclass
from jaxhpo.hypergradients import gauge
from jaxhpo.study.lanes import Outcome, Row, init_state, pad, train_round, unpad
from jaxhpo.study.problem import INIT_STREAM, ROUND_STREAM, Plan, Problem


@pytree_dataclass
class Carry:
    """The whole state of a study between rounds.

    Attributes:
        optimizer: the optimizer's state.
        number: ``i32[B]``, the trial on each lane.
        steps: ``i32[B]``, steps it has trained.
        over: ``bool[B]``, the lane's last query is answered: it takes a new one.
        next_number: ``i32[]``, the next trial to begin.
        finished: ``i32[]``, trials answered.
        diverged: ``i32[]``, those of them without a finite loss.
        round: ``i32[]``.
        best_loss: ``f32[]``; inf while there is none.
        best_number: ``i32[]``; -1 while there is none.
        best_cube: ``f32[D]``.
        train_state: the lanes' training states, leading size ``P``.
    """

    optimizer: Any
    number: Array
    steps: Array
    over: Array
    next_number: Array
    finished: Array
    diverged: Array
    round: Array
    best_loss: Array
    best_number: Array
    best_cube: Array
    train_state: Any


@pytree_dataclass
class Trials:
    """Answered queries as rows of the record, ``[..., B]``; a row counts where ``done``."""

    done: Array
    number: Array
    round: Array
    cube: Array
    values: Sequence[Array]
    loss: Array
    steps: Array
    metrics: dict[str, Array]


def first_carry(problem: Problem, plan: Plan, with_states: bool = True) -> Carry:
    """The carry before the first round; training states are zeros until a lane begins."""
    lanes, num_dims = plan.num_lanes, problem.space.num_dims
    zero, nobody = jnp.zeros((), jnp.int32), jnp.full(lanes, -1, jnp.int32)
    states = ()
    if with_states and not problem.has_gradient:
        row = Row(problem.space.decode_arrays(jnp.zeros(num_dims)), zero, zero > 0, zero, zero, zero > 0)
        shapes = jax.eval_shape(init_state, problem, row)
        states = jax.tree.map(lambda x: jnp.zeros((plan.padded_lanes, *x.shape), x.dtype), shapes)
    return Carry(
        optimizer=problem.optimizer.init(jax.random.fold_in(problem.key, INIT_STREAM), problem.space.spec),
        number=nobody,
        steps=jnp.zeros(lanes, jnp.int32),
        over=jnp.ones(lanes, bool),
        next_number=zero,
        finished=zero,
        diverged=zero,
        round=zero,
        best_loss=jnp.array(jnp.inf, jnp.float32),
        best_number=jnp.array(-1, jnp.int32),
        best_cube=jnp.zeros(num_dims, jnp.float32),
        train_state=states,
    )


def _round_keys(problem: Problem, round: Array) -> tuple[jax.Array, jax.Array]:
    key = jax.random.fold_in(jax.random.fold_in(problem.key, ROUND_STREAM), round)
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def propose(problem: Problem, carry: Carry) -> tuple[Query, Row, Array]:
    """What every lane does in this round: the query, the rows for training and whose state each lane takes over.

    A lane that starts afresh or copies another's state begins a new trial; one that goes on keeps its number.
    """
    ask_key, _ = _round_keys(problem, carry.round)
    query = problem.optimizer.ask(ask_key, carry.optimizer)
    lanes = carry.number.shape[0]
    chex.assert_shape(query.cube, (lanes, problem.space.num_dims))
    chex.assert_shape((query.parent, query.budget), (lanes,))
    own = jnp.arange(query.parent.shape[0], dtype=jnp.int32)
    fresh = carry.over & (query.parent == FRESH)
    copies = carry.over & (query.parent != FRESH) & (query.parent != own)
    begins = fresh | copies
    number = jnp.where(begins, carry.next_number + jnp.cumsum(begins, dtype=jnp.int32) - 1, carry.number).astype(jnp.int32)
    source = jnp.where(copies, query.parent, own)
    steps = jnp.where(fresh, 0, carry.steps[source])
    rounds_due = (jnp.minimum(query.budget, problem.num_steps) + problem.round_steps - 1) // problem.round_steps
    due = jnp.maximum(rounds_due * problem.round_steps, steps + jnp.where(carry.over, problem.round_steps, 0))
    # Decoded once and fenced: what is trained and what is recorded are the same bits.
    values = lax.optimization_barrier(problem.space.decode_arrays(query.cube))
    return query, Row(values, number, fresh, steps, due.astype(jnp.int32), number >= problem.num_trials), source


def learn(problem: Problem, carry: Carry, query: Query, row: Row, outcome: Outcome, train_state: Any) -> tuple[Carry, Trials]:
    """Tell the optimizer what became of its lanes and keep the incumbent.

    Lanes that run beyond the last trial of the study count for nothing.
    """
    _, update_key = _round_keys(problem, carry.round)
    value = outcome.metrics[problem.metric] * problem.sign
    loss = jnp.where(outcome.sound & jnp.isfinite(value), value, jnp.nan)
    done = outcome.over & (row.number < problem.num_trials)
    grad, metrics = None, outcome.metrics
    if outcome.grad is not None:
        grad = problem.cube_gradient(query.cube, outcome.grad)
        metrics = metrics | {gauge.GRADIENT: jnp.linalg.norm(grad, axis=1)}
    feedback = Feedback(jnp.where(done, loss, jnp.nan), done, outcome.steps, grad)
    ranked = jnp.where(done & ~jnp.isnan(loss), loss, jnp.inf)
    lane = jnp.argmin(ranked)
    better = ranked[lane] < carry.best_loss
    carry = Carry(
        optimizer=problem.optimizer.update(update_key, carry.optimizer, query, feedback),
        number=row.number,
        steps=outcome.steps,
        over=done,
        next_number=jnp.maximum(carry.next_number, row.number.max() + 1),
        finished=carry.finished + done.sum(dtype=jnp.int32),
        diverged=carry.diverged + (done & jnp.isnan(loss)).sum(dtype=jnp.int32),
        round=carry.round + 1,
        best_loss=jnp.where(better, ranked[lane], carry.best_loss),
        best_number=jnp.where(better, row.number[lane], carry.best_number),
        best_cube=jnp.where(better, query.cube[lane], carry.best_cube),
        train_state=train_state,
    )
    rounds = jnp.broadcast_to(carry.round - 1, done.shape)
    return carry, Trials(done, row.number, rounds, query.cube, row.values, loss, outcome.steps, metrics)


def _take_over(source: Array, state: Any) -> Any:
    """Training states gathered along the lanes, only where some lane copies another's."""
    own = jnp.arange(source.shape[0], dtype=source.dtype)
    gather = lambda state: jax.tree.map(lambda x: x[source], state)
    return lax.cond((source != own).any(), gather, lambda state: state, state)


def run_round(problem: Problem, plan: Plan, carry: Carry) -> tuple[Carry, Trials]:
    """One pass of the loop."""
    query, row, source = propose(problem, carry)
    # A padding lane takes over from itself: its state is nobody's.
    own = jnp.arange(plan.num_lanes, plan.padded_lanes, dtype=source.dtype)
    state = _take_over(jnp.concatenate([source, own]), carry.train_state)
    state, outcome = train_round(problem, plan, pad(plan, row), state)
    return learn(problem, carry, query, row, unpad(plan, outcome), state)


def empty_trials(problem: Problem, plan: Plan, carry: Carry, rounds: int) -> Trials:
    """Buffers for the rows of ``rounds`` rounds, ``[rounds, B, ...]``."""
    shapes = jax.eval_shape(lambda problem, carry: run_round(problem, plan, carry)[1], problem, carry)
    return jax.tree.map(lambda x: jnp.zeros((rounds, *x.shape), x.dtype), shapes)


def run_chunk(problem: Problem, plan: Plan, carry: Carry, num_rounds: Array) -> tuple[Carry, Trials]:
    """Up to ``num_rounds`` (traced, at most ``plan.max_rounds``) rounds; stops when all trials are answered.

    Returns:
        the carry and the rows, ``[max_rounds, B, ...]``; those of rounds that did not run have ``done`` False.
    """

    def unfinished(loop: tuple[Array, Carry, Trials]) -> Array:
        return (loop[0] < num_rounds) & (loop[1].finished < problem.num_trials)

    def one(loop: tuple[Array, Carry, Trials]) -> tuple[Array, Carry, Trials]:
        i, carry, rows = loop
        carry, row = run_round(problem, plan, carry)
        return i + 1, carry, jax.tree.map(lambda buffer, x: lax.dynamic_update_index_in_dim(buffer, x, i, 0), rows, row)

    start = (jnp.zeros((), jnp.int32), carry, empty_trials(problem, plan, carry, plan.max_rounds))
    _, carry, rows = lax.while_loop(unfinished, one, start)
    return carry, rows
