"""What the conformance tests share: cubes, a test function, and one compiled run that every check reads.

:func:`run` drives any optimizer of the protocol for some rounds under one scan. What is done when, what fails and
what stands in the loss and the gradient of lanes that are not done are arguments, so that one compiled program serves
all checks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.core import FRESH, Array, CubeSpec, Feedback, Kind, Optimizer, Query, Run
from jaxhpo.optimizers import registry

T = TypeVar("T")

ROUNDS = 40

MIXED = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 7), Run(Kind.INT, 40, log_low=2), Run(Kind.CHOICE, 3, count=2)))


class Case(NamedTuple):
    """A cube and a number of lanes."""

    spec: CubeSpec
    num_lanes: int


CASES = {"floats": Case(CubeSpec.floats(3), 5), "mixed": Case(MIXED, 5), "line, one lane": Case(CubeSpec.floats(1), 1)}


def cases(least_lanes: int = 1) -> list[Any]:
    """Parameters of a test. "floats" is slow: the other two have several lanes and a cube of floats alone, too."""
    marks = {"floats": pytest.mark.slow}
    return [pytest.param(name, marks=marks.get(name, ())) for name, case in CASES.items() if case.num_lanes >= least_lanes]


class Plan(NamedTuple):
    """What happens in each round.

    Attributes:
        done: ``bool[R, B]``.
        junk: ``f32[R, B]``, what stands in the loss and the gradient of lanes that are not done.
        fails: ``bool[R, B]``, whose loss is ``bad`` whatever the point, and whose gradient is NaN.
        cliff: ``f32[]``, where the first coordinate is above it the loss is ``bad``.
        bad: ``f32[]``, the loss of what fails.
        salt: ``i32[]``, changes the keys of ``ask`` and nothing else.
    """

    done: Any
    junk: Any
    fails: Any
    cliff: Any
    bad: Any
    salt: Any


class Trace(NamedTuple):
    """What was seen in each round: the query ``[R, B, ...]``, what was told ``f32[R, B]``, and two flags ``bool[R]``.

    ``kept`` says that the rows of lanes not done in the round before came back bit for bit, for two keys;
    ``clean`` that there is no NaN in the state after the round.
    """

    query: Query
    loss: jax.Array
    kept: jax.Array
    clean: jax.Array


def plan(num_lanes: int, rounds: int = ROUNDS, **changes: Any) -> Plan:
    """All lanes done in every round, nothing fails; fields may be given instead, also scalars for all lanes."""
    fields: dict[str, Any] = {"done": True, "junk": 0.0, "fails": False, "cliff": 2.0, "bad": np.nan, "salt": 0} | changes
    for name, dtype in (("done", bool), ("junk", np.float32), ("fails", bool)):
        fields[name] = np.broadcast_to(np.asarray(fields[name], dtype), (rounds, num_lanes))
    return Plan(**fields | {name: np.float32(fields[name]) for name in ("cliff", "bad")} | {"salt": np.int32(fields["salt"])})


def random_done(num_lanes: int, rounds: int = ROUNDS, seed: int = 0) -> np.ndarray:
    """Lanes that end at different times: each round about half of them, sometimes none."""
    return np.random.default_rng(seed).random((rounds, num_lanes)) < 0.45


def bowl(spec: CubeSpec, cube: Array) -> jax.Array:
    """A smooth bowl over the cube, ``f32[B, D] -> f32[B]``; integers and choices count by the middle of their level."""
    target = np.linspace(0.3, 0.6, spec.num_dims).astype(np.float32)
    return (np.arange(1, spec.num_dims + 1, dtype=np.float32) * (jnp.asarray(spec.snap(cube)) - target) ** 2).sum(-1)


def told(spec: CubeSpec, cube: Array) -> Feedback:
    """Every lane done, with the loss of the bowl and its gradient."""
    gradient = jax.grad(lambda cube: bowl(spec, cube).sum())
    return dataclasses.replace(Feedback.finished(bowl(spec, cube)), grad=gradient(cube))


def run(optimizer: Optimizer, spec: CubeSpec, key: jax.Array, plan: Plan) -> tuple[Any, Trace]:
    """Drive ``optimizer`` through ``plan``; the state at the end and what was seen."""
    key_init, key_ask, key_update = jax.random.split(key, 3)

    def one_round(carry: tuple[Any, Query, jax.Array], xs: tuple[jax.Array, ...]) -> tuple[Any, Trace]:
        state, before, pending = carry
        number, done, junk, fails = xs
        key_first = jax.random.fold_in(jax.random.fold_in(key_ask, number), plan.salt)
        query, again = optimizer.ask(key_first, state), optimizer.ask(jax.random.fold_in(key_first, 7), state)
        kept = jnp.bool_(True)
        for now in (query, again):
            same = jax.tree.map(lambda a, b: jnp.all((a == b).reshape(a.shape[0], -1), axis=1), now, before)
            kept &= jnp.all(~pending | (same.cube & same.parent & same.budget))
        truth, failed = told(spec, query.cube), fails | (query.cube[:, 0] > plan.cliff)
        loss = jnp.where(done, jnp.where(failed, plan.bad, truth.loss), junk)
        grad = jnp.where(done[:, None], jnp.where(failed[:, None], jnp.nan, truth.grad), junk[:, None])
        feedback = Feedback(loss, done, jnp.full(done.shape, 10, jnp.int32) * (number + 1), grad)
        state = optimizer.update(jax.random.fold_in(key_update, number), state, query, feedback)
        clean = jnp.stack(
            [~jnp.isnan(x).any() for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)] or [True]
        )
        return (state, query, ~done), Trace(query, loss, kept, jnp.all(clean))

    state = optimizer.init(key_init, spec)
    start = (state, optimizer.ask(key_ask, state), jnp.zeros(plan.done.shape[1:], bool))
    xs = (jnp.arange(plan.done.shape[0]), plan.done, plan.junk, plan.fails)
    (state, _, _), trace = jax.lax.scan(one_round, start, xs)
    return state, trace


run_jit = jax.jit(run, static_argnums=1)
"""Compiled once for each (structure of the optimizer, spec, rounds)."""


@functools.cache
def example_run(name: str, case: str, seed: int = 0, **changes: Any) -> tuple[Any, Trace]:
    """:func:`run` of the registry's example of an optimizer; ``changes`` are scalars of the plan."""
    spec, num_lanes = CASES[case]
    return run_jit(registry.example(name, num_lanes), spec, jax.random.key(seed), plan(num_lanes, **changes))


def changed_settings(optimizer: T) -> T:
    """The same optimizer with every traced float a little smaller."""
    return jax.tree.map(lambda x: x * 0.97 if isinstance(x, float) else x, optimizer)


def check_query(query: Query, spec: CubeSpec, num_lanes: int) -> None:
    """Shapes, dtypes and ranges of queries with any leading axes."""
    lead = query.cube.shape[:-2]
    chex.assert_shape(query.cube, (*lead, num_lanes, spec.num_dims))
    chex.assert_shape([query.parent, query.budget], (*lead, num_lanes))
    chex.assert_type([query.cube, query.parent, query.budget], [jnp.float32, jnp.int32, jnp.int32])
    cube, parent, budget = np.asarray(query.cube), np.asarray(query.parent), np.asarray(query.budget)
    assert ((cube >= 0) & (cube <= 1)).all(), "a point outside the cube, or NaN"
    assert ((parent >= FRESH) & (parent < num_lanes)).all(), "a parent that is no lane"
    assert (budget >= 1).all(), "a budget of no steps"


def wrong_settings(optimizer: Any) -> dict[str, Any]:
    """For each setting with a range or choices, the same optimizer with a value outside, by the setting's name."""
    wrong = {}
    for field in dataclasses.fields(optimizer):
        low, high, choices = (field.metadata.get(k) for k in ("low", "high", "choices"))
        if choices is not None:
            wrong[field.name] = dataclasses.replace(optimizer, **{field.name: "no such choice"})
        elif low is not None:
            wrong[field.name] = dataclasses.replace(optimizer, **{field.name: low - 1})
        elif high is not None:
            wrong[field.name] = dataclasses.replace(optimizer, **{field.name: high + 1})
    return wrong
