"""Engines: how a study is moved on from carry to carry.

CompiledEngine   whole chunks of rounds as one program on the devices
HostEngine       the optimizer compiled, the trials wherever an evaluator runs them: host functions in processes,
                 or (static_groups) one compiled program for each combination of static choices
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from jaxhpo.core import Array
from jaxhpo.errors import JaxhpoError
from jaxhpo.space import Space
from jaxhpo.study import seeds
from jaxhpo.study.executors import Executor, Job, process_executor, serial_executor
from jaxhpo.study.lanes import EVERYWHERE, LANES, Outcome, Row, train_round, train_schedule, trial_key
from jaxhpo.study.loop import Carry, Trials, Turn, first_carry, is_over, learn, propose, run_chunk
from jaxhpo.study.problem import Plan, Problem


@dataclasses.dataclass(frozen=True)
class Told:
    """What the host knows of trials beyond their rows, by trial number: what went wrong, and all metrics."""

    errors: dict[int, str] = dataclasses.field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)


is_over_jit = jax.jit(is_over)


class Engine(Protocol):
    """What the driver needs: a first carry, and a way on. ``advance`` gives rows ``[rounds, B]`` on the host."""

    plan: Plan
    max_rounds: int

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        """Seconds to compile each program of trainings, by what it is for, as far as the engine knows."""
        ...

    def first(self) -> Carry: ...

    def place(self, carry: Carry) -> Carry: ...

    def advance(self, carry: Carry, num_rounds: int) -> tuple[Carry, Trials, Told]: ...

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of a plan; one object a plan, so that studies alike share what is compiled."""

    first: Callable[..., Carry]
    chunk: Callable[..., tuple[Carry, Trials]]
    round: Callable[..., tuple[Any, Outcome]]
    schedule: Callable[..., tuple[Outcome, dict[str, jax.Array]]]
    placement: Carry
    everywhere: NamedSharding


def _one_round(problem: Problem, plan: Plan, cube: Array, row: Row, state: Any) -> tuple[Any, Outcome]:
    """A round of ``P`` lanes at ``cube``, decoded in the program, as the search does it: rounding depends on that."""
    values = lax.optimization_barrier(problem.space.decode_arrays(cube))
    return train_round(problem, plan, dataclasses.replace(row, values=values), state)


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
        round=jax.jit(lambda problem, cube, row, state: _one_round(problem, plan, cube, row, state), out_shardings=lanes),
        schedule=jax.jit(lambda problem, schedule: train_schedule(problem, plan, schedule), out_shardings=everywhere),
        placement=placement,
        everywhere=everywhere,
    )


class CompiledEngine:
    """Propose, train and learn in one program."""

    compile_seconds: Mapping[str, float] = MappingProxyType({})

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


@functools.partial(jax.jit, static_argnums=1)
def _first_on_host(problem: Problem, seeds_at_once: int) -> Carry:
    plan = Plan(problem.optimizer.num_lanes, 1, None, seeds_at_once=seeds_at_once)
    return first_carry(problem, plan, with_states=False)


@jax.jit
def _propose(problem: Problem, carry: Carry) -> tuple[Turn, Row, Row, Array, jax.Array]:
    turn, row = propose(problem, carry)
    rows, source = seeds.spread(problem, carry.seeds, row, turn.source)
    bits = jax.vmap(lambda n: jax.random.bits(trial_key(problem.key, n), dtype=jnp.uint32) >> 1)(row.number)
    return turn, row, rows, source, bits


@jax.jit
def _learn(problem: Problem, carry: Carry, turn: Turn, row: Row, outcome: Outcome) -> tuple[Carry, Trials]:
    return learn(problem, carry, turn, row, outcome, ())


class Evaluator(Protocol):
    """Runs trials for a HostEngine.

    ``answers`` takes the rows of a round, ``[B * S]``, whose state each takes over, a seed for each trial, which of them wait
    for an answer and the training states. It gives the outcome, with the trainings that are over, and the states after it.
    """

    max_rounds: int

    def states(self) -> Any: ...

    def answers(
        self, row: Row, source: np.ndarray, bits: np.ndarray, waiting: np.ndarray, states: Any
    ) -> tuple[Outcome, Told, Any]: ...

    def close(self) -> None: ...


class HostEngine:
    """The optimizer compiled; its queries answered by an evaluator, a round at a time."""

    def __init__(self, problem: Problem, plan: Plan, evaluator: Evaluator):
        self.plan, self._problem, self._evaluator = plan, problem, evaluator
        self.max_rounds = evaluator.max_rounds

    @property
    def compile_seconds(self) -> Mapping[str, float]:
        return getattr(self._evaluator, "compile_seconds", {})

    def first(self) -> Carry:
        carry = _first_on_host(self._problem, self.plan.seeds_at_once)
        return dataclasses.replace(carry, train_state=self._evaluator.states())

    def place(self, carry: Carry) -> Carry:
        return dataclasses.replace(jax.device_put(dataclasses.replace(carry, train_state=())), train_state=carry.train_state)

    def advance(self, carry: Carry, num_rounds: int) -> tuple[Carry, Trials, Told]:
        rounds, told = [], Told()
        for _ in range(num_rounds):
            carry, trials, news = self._one_round(carry)
            rounds.append(jax.device_get(trials))
            told.errors.update(news.errors)
            told.metrics.update(news.metrics)
            if is_over_jit(self._problem, carry):
                break
        return carry, jax.tree.map(lambda *rows: np.stack(rows), *rounds), told

    def _one_round(self, carry: Carry) -> tuple[Carry, Trials, Told]:
        states = carry.train_state
        carry = dataclasses.replace(carry, train_state=())
        turn, row, rows, source, bits = _propose(self._problem, carry)
        rows, source = jax.device_get((rows, source))
        waiting = rows.number < int(self._problem.num_trials)
        outcome, told, states = self._evaluator.answers(rows, source, np.asarray(bits), waiting, states)
        carry, trials = _learn(self._problem, carry, turn, row, outcome)
        return dataclasses.replace(carry, train_state=states), trials, told

    def close(self) -> None:
        self._evaluator.close()


class HostTrials:
    """Trials of a host function, run by an executor.

    Args:
        in_turn: wait for all lanes of a round, so that a study's trials do not depend on how long each takes;
            otherwise a lane is refilled as soon as it ends.
    """

    max_rounds = 1

    def __init__(self, space: Space, executor: Executor, metric: str, in_turn: bool = True):
        self._space, self._executor, self._metric, self._in_turn = space, executor, metric, in_turn
        self._running: set[int] = set()

    def states(self) -> Any:
        return ()

    def answers(
        self, row: Row, source: np.ndarray, bits: np.ndarray, waiting: np.ndarray, states: Any
    ) -> tuple[Outcome, Told, Any]:
        lanes = row.number.shape[0]
        if np.any(waiting & ((source != np.arange(lanes)) | row.waits)):
            raise JaxhpoError("this objective cannot continue a trial; use an optimizer that starts each trial afresh")
        lane_of = {int(n): lane for lane, n in enumerate(row.number) if waiting[lane]}
        for number, lane in lane_of.items():
            if number not in self._running:
                hparams = self._space.to_host(self._space.assemble([value[lane] for value in row.values]))
                self._executor.submit(Job(number, hparams, int(bits[lane])))
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
        return Outcome({self._metric: loss}, over, sound, steps, steps), told, states

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
