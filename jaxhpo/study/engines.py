"""Engines: how a study is moved on from carry to carry.

CompiledEngine   whole chunks of rounds as one program on the devices
HostEngine       the optimizer compiled, the trials wherever an evaluator runs them: host functions in processes,
                 or one compiled program for each combination of static choices
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxhpo.errors import JaxhpoError
from jaxhpo.space import Space
from jaxhpo.study.executors import Executor, Job, process_executor, serial_executor
from jaxhpo.study.lanes import EVERYWHERE, LANES, Outcome, Row, train_to_end, trial_key
from jaxhpo.study.loop import Carry, Trials, first_carry, learn, propose, run_chunk
from jaxhpo.study.problem import Plan, Problem


@dataclasses.dataclass(frozen=True)
class Told:
    """What the host knows of trials beyond their rows, by trial number: what went wrong, and all metrics."""

    errors: dict[int, str] = dataclasses.field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)


class Engine(Protocol):
    """What the driver needs: a first carry, and a way on. ``advance`` gives rows ``[rounds, B]`` on the host."""

    plan: Plan
    max_rounds: int

    def first(self) -> Carry: ...

    def place(self, carry: Carry) -> Carry: ...

    def advance(self, carry: Carry, num_rounds: int) -> tuple[Carry, Trials, Told]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a plan; one object a plan, so that studies alike share what is compiled."""

    first: Callable[..., Carry]
    chunk: Callable[..., tuple[Carry, Trials]]
    to_end: Callable[..., tuple[Outcome, dict[str, jax.Array]]]
    placement: Carry
    everywhere: NamedSharding


@functools.lru_cache(maxsize=64)
def programs_of(plan: Plan) -> Programs:
    """Compiled lazily, kept for the life of the process."""
    assert plan.mesh is not None
    everywhere, lanes = NamedSharding(plan.mesh, EVERYWHERE), NamedSharding(plan.mesh, LANES)
    names = [field.name for field in dataclasses.fields(Carry)]
    shardings: dict[str, Any] = {name: lanes if name == "train_state" else everywhere for name in names}
    placement = Carry(**shardings)
    return Programs(
        first=jax.jit(lambda problem: first_carry(problem, plan), out_shardings=placement),
        chunk=jax.jit(
            lambda problem, carry, num_rounds: run_chunk(problem, plan, carry, num_rounds),
            out_shardings=(placement, everywhere),
            donate_argnums=1,
        ),
        to_end=jax.jit(lambda problem, values, number: train_to_end(problem, plan, values, number), out_shardings=everywhere),
        placement=placement,
        everywhere=everywhere,
    )


class CompiledEngine:
    """Propose, train and learn in one program."""

    def __init__(self, problem: Problem, plan: Plan):
        self.plan, self.max_rounds = plan, plan.max_rounds
        self._programs = programs_of(plan)
        self._problem = jax.device_put(problem, self._programs.everywhere)

    def first(self) -> Carry:
        return self._programs.first(self._problem)

    def place(self, carry: Carry) -> Carry:
        placement = self._programs.placement
        fields = {f.name: jax.device_put(getattr(carry, f.name), getattr(placement, f.name)) for f in dataclasses.fields(Carry)}
        return Carry(**fields)

    def advance(self, carry: Carry, num_rounds: int) -> tuple[Carry, Trials, Told]:
        carry, trials = self._programs.chunk(self._problem, carry, np.int32(num_rounds))
        return carry, jax.tree.map(lambda x: np.asarray(x)[:num_rounds], jax.device_get(trials)), Told()

    def close(self) -> None:
        pass


@jax.jit
def _first_on_host(problem: Problem) -> Carry:
    plan = Plan(problem.optimizer.num_lanes, 1, None)
    return first_carry(problem, plan, with_states=False)


@jax.jit
def _propose(problem: Problem, carry: Carry) -> tuple[Any, Row, jax.Array]:
    query, row, _ = propose(problem, carry)
    return query, row, jax.vmap(lambda n: jax.random.bits(trial_key(problem.key, n), dtype=jnp.uint32) >> 1)(row.number)


@jax.jit
def _learn(problem: Problem, carry: Carry, query: Any, row: Row, outcome: Outcome) -> tuple[Carry, Trials]:
    return learn(problem, carry, query, row, outcome, ())


class Evaluator(Protocol):
    """Runs trials for a HostEngine.

    ``answers`` takes the lanes of a round, a seed for each trial and which lanes wait for an answer, and gives the
    outcome of those that are over.
    """

    def answers(self, row: Row, seeds: np.ndarray, waiting: np.ndarray) -> tuple[Outcome, Told]: ...

    def close(self) -> None: ...


class HostEngine:
    """The optimizer compiled; its queries answered by an evaluator, a round at a time."""

    max_rounds = 1

    def __init__(self, problem: Problem, plan: Plan, evaluator: Evaluator):
        self.plan, self._problem, self._evaluator = plan, problem, evaluator

    def first(self) -> Carry:
        return _first_on_host(self._problem)

    def place(self, carry: Carry) -> Carry:
        return jax.device_put(carry)

    def advance(self, carry: Carry, num_rounds: int) -> tuple[Carry, Trials, Told]:
        query, row, seeds = _propose(self._problem, carry)
        host = jax.device_get(row)
        waiting = host.number < int(self._problem.num_trials)
        if not np.all(jax.device_get(query.parent)[waiting & np.asarray(carry.over)] < 0):
            raise JaxhpoError("this objective cannot continue a trial; use an optimizer that starts each trial afresh")
        outcome, told = self._evaluator.answers(host, np.asarray(seeds), waiting)
        carry, trials = _learn(self._problem, carry, query, row, outcome)
        return carry, jax.tree.map(lambda x: np.asarray(x)[None], jax.device_get(trials)), told

    def close(self) -> None:
        self._evaluator.close()


class StaticGroups:
    """Trials grouped by their static choices: one compiled program a combination, each run in batches of one size."""

    def __init__(self, problem: Problem, plan: Plan):
        self._plan = dataclasses.replace(plan, num_lanes=plan.width * plan.num_devices)
        self._programs = programs_of(self._plan)
        self._problem = jax.device_put(problem, self._programs.everywhere)

    def answers(self, row: Row, seeds: np.ndarray, waiting: np.ndarray) -> tuple[Outcome, Told]:
        lanes, size = row.number.shape[0], self._plan.num_lanes
        statics = self._problem.space.static_among(row.values)
        over, sound, steps = waiting.copy(), np.ones(lanes, bool), np.zeros(lanes, np.int32)
        metrics: dict[str, Any] = {}
        grads: dict[str, Any] = {}

        def put(columns: dict[str, Any], found: dict[str, Any], batch: np.ndarray) -> None:
            for name, values in found.items():
                columns.setdefault(name, np.full((lanes, *values.shape[1:]), np.nan, np.float32))[batch] = values[: len(batch)]

        for static in sorted({tuple(map(int, s)) for s in statics[waiting]}):
            group = np.flatnonzero(waiting & (statics == static).all(axis=1))
            problem = dataclasses.replace(self._problem, static=static)
            for start in range(0, len(group), size):
                batch = group[start : start + size]
                filled = np.concatenate([batch, np.repeat(batch[-1], size - len(batch))])
                values = [value[filled] for value in row.values]
                outcome, _ = jax.device_get(self._programs.to_end(problem, values, row.number[filled]))
                sound[batch], steps[batch] = outcome.sound[: len(batch)], outcome.steps[: len(batch)]
                put(metrics, outcome.metrics, batch)
                put(grads, outcome.grad or {}, batch)
        return Outcome(metrics, over, sound, steps, grads or None), Told()

    def close(self) -> None:
        pass


class HostTrials:
    """Trials of a host function, run by an executor.

    Args:
        in_turn: wait for all lanes of a round, so that a study's trials do not depend on how long each takes;
            otherwise a lane is refilled as soon as it ends.
    """

    def __init__(self, space: Space, executor: Executor, metric: str, in_turn: bool = True):
        self._space, self._executor, self._metric, self._in_turn = space, executor, metric, in_turn
        self._running: set[int] = set()

    def answers(self, row: Row, seeds: np.ndarray, waiting: np.ndarray) -> tuple[Outcome, Told]:
        lanes = row.number.shape[0]
        lane_of = {int(n): lane for lane, n in enumerate(row.number) if waiting[lane]}
        for number, lane in lane_of.items():
            if number not in self._running:
                hparams = self._space.to_host(self._space.assemble([value[lane] for value in row.values]))
                self._executor.submit(Job(number, hparams, int(seeds[lane])))
                self._running.add(number)
        over, sound, told = np.zeros(lanes, bool), np.ones(lanes, bool), Told()
        loss = np.full(lanes, np.nan, np.float32)
        for _ in range(len(self._running) if self._in_turn else min(1, len(self._running))):
            result = self._executor.next()
            self._running.discard(result.number)
            lane = lane_of[result.number]
            over[lane] = True
            if result.error is not None or result.metrics is None:
                sound[lane], told.errors[result.number] = False, result.error or "failed"
                continue
            told.metrics[result.number] = result.metrics
            if self._metric not in result.metrics:
                names = ", ".join(result.metrics)
                raise JaxhpoError(f"metric: the function returned {names}, and no {self._metric!r}; set metric to one of these")
            loss[lane] = result.metrics[self._metric]
        steps = np.where(over & sound, 1, 0).astype(np.int32)
        return Outcome({self._metric: loss}, over, sound, steps), told

    def close(self) -> None:
        self._executor.close()


def host_trials(objective: Any, space: Space, metric: str) -> HostTrials:
    """The evaluator of a :class:`jaxhpo.tasks.HostFunction`."""
    if objective.processes:
        executor = process_executor(
            objective.fn, processes=objective.processes, timeout=objective.timeout, retries=objective.retries
        )
    else:
        if objective.timeout is not None:
            raise JaxhpoError("HostFunction: a timeout needs processes of at least 1: a call cannot be stopped from within")
        executor = serial_executor(objective.fn, retries=objective.retries)
    return HostTrials(space, executor, metric, in_turn=not objective.asynchronous)
