"""Trials grouped by their static choices: one compiled program a combination, batches of one size, no lane padded in vain.

The lanes of all combinations wait together; the combination with the most of them trains its batch next, so that batches
are nearly always full. Training states of any structure lie side by side as bytes, ``u8[lanes, M]``, M those of the largest.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxhpo.core import Array
from jaxhpo.errors import JaxhpoError
from jaxhpo.space import Space, label_of
from jaxhpo.study.engines import Told
from jaxhpo.study.lane_bytes import from_bytes, size_of, to_bytes
from jaxhpo.study.lanes import EVERYWHERE, LANES, Outcome, Row, init_state, one_row, train_round, whole_everywhere
from jaxhpo.study.problem import Plan, Problem

MOST_PROGRAMS = 64

_MOST_LATE = 2  # a trial goes first, however few are like it, once so many times the lanes have begun after it

Static = tuple[int, ...]

_COMPILED: dict[Any, Any] = {}  # programs of this process, the oldest first, so that studies alike share them


def batch_plan(space: Space, plan: Plan) -> Plan:
    """A batch: a combination's share of the lanes in whole shards. Devices do not matter: with it goes the order of batches."""
    groups = math.prod(len(slot.options) for slot in space.static_slots)
    share = max(-(-plan.num_trainings // groups), plan.seeds_at_once)
    return Plan(-(-share // plan.width) * plan.width, plan.width, plan.mesh, lanes_in_turn=plan.lanes_in_turn)


def _train(problem: Problem, plan: Plan, size: int, row: Row, data: Array) -> tuple[Array, Outcome]:
    """Rounds of one batch, ``[P]``, until some lane of it is over; idle lanes fill it up."""
    like = () if problem.has_gradient else jax.eval_shape(init_state, problem, jax.tree.map(lambda x: x[0], row))

    def one(loop: tuple[Row, Any, Outcome]) -> tuple[Row, Any, Outcome]:
        row, state, before = loop
        state, outcome = train_round(problem, plan, row, state)
        outcome = whole_everywhere(plan, outcome)
        row = dataclasses.replace(row, fresh=jnp.zeros_like(row.fresh), steps=outcome.steps)
        return row, state, dataclasses.replace(outcome, rounds=before.rounds + outcome.rounds)

    state = jax.vmap(functools.partial(from_bytes, like))(data)
    nothing = jax.eval_shape(lambda row, state: train_round(problem, plan, row, state)[1], row, state)
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), nothing)
    _, state, outcome = lax.while_loop(lambda loop: ~loop[2].over.any(), one, (row, state, start))
    return jax.vmap(lambda state: to_bytes(state, size))(state) if size else data, outcome


class StaticGroups:
    """Trains the lanes of a study with static choices, a batch of one combination at a time.

    The combination with the most lanes goes first, or that of a trial that has waited for too long. Programs are compiled in
    the background while others train. Which batch is next depends on the lanes alone.

    Raises:
        JaxhpoError: if there are too many combinations, each of which is a program.
    """

    max_rounds = 32

    def __init__(self, problem: Problem, plan: Plan):
        assert plan.mesh is not None
        slots = problem.space.static_slots
        every = list(itertools.product(*(range(len(slot.options)) for slot in slots)))
        if len(every) > MOST_PROGRAMS:
            names = ", ".join(f"{slot.name} ({len(slot.options)})" for slot in slots)
            raise JaxhpoError(
                f"static choices: {names} make {len(every)} combinations, each of which is a program, and {MOST_PROGRAMS} are "
                "the most; leave static=True out where a choice can be traced"
            )
        self._seeds = plan.seeds_at_once
        self._plan = batch_plan(problem.space, plan)
        self._lanes, self._batch = plan.num_lanes, self._plan.padded_lanes
        self._at_once = self._plan.num_lanes // self._seeds  # lanes to a batch
        self._placed = NamedSharding(plan.mesh, EVERYWHERE), NamedSharding(plan.mesh, LANES)
        self._problem = jax.device_put(problem, self._placed[0])
        self._size = 0 if problem.has_gradient else max(self._state_size(static) for static in every)
        self._compiler = concurrent.futures.ThreadPoolExecutor(1, "compiler")
        self._answered: tuple[np.ndarray, Outcome] | None = None
        self._programs: dict[Static, concurrent.futures.Future[tuple[Any, float]]] = {}

    def _state_size(self, static: Static) -> int:
        problem = self._problem_of(static)
        return size_of(jax.eval_shape(init_state, problem, one_row(problem)))

    def states(self) -> Any:
        return np.zeros((self._lanes * self._seeds, self._size), np.uint8)

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds that each program took to compile, by its labels."""
        done = {static: future for static, future in self._programs.items() if future.done() and not future.exception()}
        return {self._label(static): done[static].result()[1] for static in sorted(done)}

    def _label(self, static: Static) -> str:
        slots = self._problem.space.static_slots
        return ", ".join(f"{s.name}={label_of(s.options[i])}" for s, i in zip(slots, static, strict=True))

    def _compiled(self, static: Static, row: Row) -> concurrent.futures.Future[tuple[Any, float]]:
        """The program of a combination, being compiled since it was first asked for."""
        if static not in self._programs:
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((self._batch, *x.shape[1:]), x.dtype), row)
            self._programs[static] = self._compiler.submit(self._compile, static, shapes)
        return self._programs[static]

    def _compile(self, static: Static, row: Row) -> tuple[Any, float]:
        began = time.perf_counter()
        problem, data = self._problem_of(static), jax.ShapeDtypeStruct((self._batch, self._size), np.uint8)
        leaves, structure = jax.tree.flatten((problem, row))
        key = (self._plan, self._size, structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in _COMPILED:
            everywhere, lanes = self._placed
            train = jax.jit(
                lambda problem, row, data: _train(problem, self._plan, self._size, row, data),
                in_shardings=(everywhere, lanes, lanes),
                out_shardings=lanes,
            )
            while len(_COMPILED) >= MOST_PROGRAMS:
                del _COMPILED[next(iter(_COMPILED))]
            _COMPILED[key] = train.lower(problem, row, data).compile()
        return _COMPILED[key], time.perf_counter() - began

    def answers(
        self, row: Row, source: np.ndarray, bits: np.ndarray, waiting: np.ndarray, states: np.ndarray
    ) -> tuple[Outcome, Told, np.ndarray]:
        """The fullest combination's batch, trained until one of its lanes is over."""
        del bits
        copied = source != np.arange(len(source))
        states = states.copy()
        states[copied] = states[source[copied]] if copied.any() else states[copied]
        outcome = self._again(row)
        unknown = waiting & row.waits & ~outcome.over  # after a resumption
        for static, lanes in self._by_static(row, unknown).items():
            for start in range(0, len(lanes), self._at_once):
                self._train(static, lanes[start : start + self._at_once], row, states, outcome)
        members = self._by_static(row, waiting & ~row.waits)
        order = sorted(members, key=lambda static: (-len(members[static]), static))
        for static in order:
            self._compiled(static, row)
        number = row.number[:: self._seeds]
        oldest = min((lane for lanes in members.values() for lane in lanes), key=lambda lane: number[lane])
        late = number.max() - number[oldest] > _MOST_LATE * self._lanes
        due = next(static for static in order if not late or oldest in members[static])
        lanes = sorted(members[due], key=lambda lane: number[lane])
        self._train(due, lanes[: self._at_once], row, states, outcome)
        self._answered = (np.asarray(row.number), outcome)
        return outcome, Told(), states

    def _by_static(self, row: Row, which: np.ndarray) -> dict[Static, list[int]]:
        """The lanes of which the rows are, in order, by their combinations."""
        statics = self._problem.space.static_among(row.values)
        members: dict[Static, list[int]] = {}
        for at in np.flatnonzero(which)[:: self._seeds]:
            members.setdefault(tuple(map(int, statics[at])), []).append(int(at) // self._seeds)
        return members

    def _again(self, row: Row) -> Outcome:
        """Nothing trained; the last answer of the lanes that wait for others. Unknown to this process, it is found anew."""
        lanes = len(row.number)
        if self._answered is None:
            outcome: Outcome = jax.tree.map(lambda x: np.zeros((lanes, *x.shape[1:]), x.dtype), self._outcome_like())
            known = np.zeros(lanes, bool)
        else:
            number, outcome = self._answered
            known = row.waits & outcome.over & (number == row.number) & (outcome.steps == row.steps)
        keep = lambda x, otherwise: np.where(known.reshape(-1, *[1] * (x.ndim - 1)), x, otherwise)
        return Outcome(
            {name: keep(x, np.nan) for name, x in outcome.metrics.items()},
            known,
            keep(outcome.sound, True),
            np.where(known, outcome.steps, row.steps),
            np.zeros(lanes, np.int32),
            None if outcome.grad is None else {name: keep(x, np.nan) for name, x in outcome.grad.items()},
        )

    def _outcome_like(self) -> Outcome:
        """The shapes of what becomes of a batch, of whatever combination."""
        problem = self._problem_of((0,) * len(self._problem.space.static_slots))
        rows = jax.eval_shape(lambda problem: jax.tree.map(lambda x: jnp.stack([x] * self._batch), one_row(problem)), problem)
        data = jax.ShapeDtypeStruct((self._batch, self._size), np.uint8)
        return jax.eval_shape(lambda *args: _train(args[0], self._plan, self._size, *args[1:])[1], problem, rows, data)

    def _train(self, static: Static, lanes: Sequence[int], row: Row, states: np.ndarray, outcome: Outcome) -> None:
        """Lanes of a combination as one batch; what becomes of them is put into ``states`` and ``outcome``."""
        batch = np.array([lane * self._seeds + i for lane in lanes for i in range(self._seeds)])
        filled = np.concatenate([batch, np.repeat(batch[-1], self._batch - len(batch))])
        padded = np.arange(self._batch) >= len(batch)
        rows: Row = jax.tree.map(lambda x: np.asarray(x)[filled], row)
        rows = dataclasses.replace(rows, idle=rows.idle | padded)
        program, _ = self._compiled(static, row).result()
        data, found = jax.device_get(program(self._problem_of(static), rows, states[filled]))
        states[batch] = data[: len(batch)]

        def put(whole: Any, part: Any) -> None:
            whole[batch] = part[: len(batch)]

        jax.tree.map(put, outcome, found)

    def _problem_of(self, static: Static) -> Problem:
        return dataclasses.replace(self._problem, static=static)

    def close(self) -> None:
        self._compiler.shutdown(wait=False, cancel_futures=True)
