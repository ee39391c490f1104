"""Recorded learning curves played against a wrapper, a round at a time, as a study trains its lanes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import FRESH, CubeSpec, Feedback, Query, pytree_dataclass, setting

SPEC = CubeSpec.floats(2)


@pytree_dataclass
class NotesState:
    cube: Any
    told: Any
    count: Any


@pytree_dataclass
class Notes:
    """Random points, and a note of what was told last on each lane and how often."""

    num_lanes: int = setting(static=True, low=1)

    starts_afresh = True

    def init(self, key, spec):
        lanes = self.num_lanes
        cube = jax.random.uniform(key, (lanes, spec.num_dims))
        return NotesState(cube, jnp.full(lanes, -jnp.inf), jnp.zeros(lanes, jnp.int32))

    def ask(self, key, state):
        return Query.fresh(state.cube)

    def update(self, key, state, query, feedback):
        done = feedback.done
        return NotesState(
            jnp.where(done[:, None], jax.random.uniform(key, state.cube.shape), state.cube),
            jnp.where(done, jnp.where(jnp.isnan(feedback.loss), jnp.inf, feedback.loss), state.told),
            state.count + done,
        )


@dataclasses.dataclass
class Trial:
    """What became of a trial: when it began, the rounds it trained, how it ended, and what the inner optimizer was told."""

    number: int
    lane: int
    began: int
    trained: int = 0
    held: int = 0
    ended: str = ""  # "", "whole", "diverged" or "stopped"
    told: float = np.nan
    cube: Any = None

    @property
    def fate(self) -> tuple[int, int, int, str]:
        return self.lane, self.began, self.trained, self.ended


@jax.jit
def _ask(optimizer, key, state):
    return optimizer.ask(key, state)


@jax.jit
def _update(optimizer, key, state, query, feedback):
    return optimizer.update(key, state, query, feedback)


def curves_of(seed: int, num_trials: int, num_rounds: int, diverging: float = 0.2) -> np.ndarray:
    """``f32[trials, rounds]``, the loss after each round: falling, noisy, crossing; NaN from where a trial diverges."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, num_rounds + 1) / num_rounds
    end, rate, noise = rng.random((num_trials, 1)), rng.gamma(2.0, 4.0, (num_trials, 1)), rng.random((num_trials, 1)) * 0.1
    curve = end + np.exp(-rate * t) + noise * rng.normal(size=(num_trials, num_rounds))
    curve = np.round(curve, 2)  # some losses are equal
    breaks = np.where(rng.random(num_trials) < diverging, rng.integers(0, num_rounds, num_trials), num_rounds)
    return np.where(np.arange(num_rounds) >= breaks[:, None], np.nan, curve).astype(np.float32)


def pace_of(seed: int, rounds: int, num_lanes: int, slow: float = 0.25) -> np.ndarray:
    """``bool[rounds, B]``: whether a lane trains in that round."""
    return np.random.default_rng(seed + 1000).random((rounds, num_lanes)) >= slow


def play(optimizer: Any, curves: np.ndarray, pace: np.ndarray, round_steps: int = 1) -> list[Trial]:
    """The trials that begin, in order of their numbers. ``curves[number, r - 1]`` is the loss after r rounds."""
    lanes, whole = optimizer.num_lanes, curves.shape[1]
    key = jax.random.key(7)
    state = optimizer.init(key, SPEC)
    trials: list[Trial] = []
    on: list[Trial] = [None] * lanes  # ty: ignore[invalid-assignment]
    due, done = [0] * lanes, np.ones(lanes, bool)
    for number in range(len(pace)):
        query = _ask(optimizer, key, state)
        parent, budget = np.asarray(query.parent), np.asarray(query.budget)
        cube, told = np.asarray(query.cube), np.asarray(getattr(state.inner, "told", np.zeros(lanes)))
        for lane in np.flatnonzero(done):
            if parent[lane] == FRESH:
                if number > 0:
                    before = on[lane]
                    before.told = float(told[lane])
                    before.ended = before.ended or "stopped"
                if len(trials) == len(curves):
                    return trials
                on[lane] = Trial(len(trials), int(lane), number, cube=cube[lane])
                trials.append(on[lane])
            else:
                assert parent[lane] == lane
                assert on[lane].ended == "", "a trial that has ended was asked to go on"
            due[lane] = min(-(-int(min(budget[lane], 2**30)) // round_steps), whole)
        assert (cube == np.stack([trial.cube for trial in on])).all(), "a trial's point changed"
        loss, steps = np.full(lanes, -1e9, np.float32), np.full(lanes, -77, np.int32)  # junk where not done
        for lane in range(lanes):
            trial = on[lane]
            holds = bool(done[lane]) and trial.trained >= due[lane]
            trial.held += holds
            trial.trained += bool(pace[number, lane]) and not holds
            value = curves[trial.number, trial.trained - 1] if trial.trained else np.float32(0)
            done[lane] = np.isnan(value) or trial.trained >= due[lane]
            if done[lane]:
                loss[lane], steps[lane] = value, trial.trained * round_steps
                trial.ended = "diverged" if np.isnan(value) else "whole" if trial.trained == whole else ""
        feedback = Feedback(jnp.asarray(loss), jnp.asarray(done), jnp.asarray(steps))
        state = grown(optimizer, state, len(trials))
        state = _update(optimizer, jax.random.fold_in(key, number), state, query, feedback)
    return trials


def grown(optimizer: Any, state: Any, begun: int) -> Any:
    """The state with tables for so many trials."""
    while optimizer.holds(state) < begun:
        state = optimizer.enlarged(state)
    return state


@functools.cache
def lifts_of(ended: tuple[tuple[tuple[int, float], ...], ...]) -> tuple[tuple[float, ...], ...]:
    """What is told of trials that ended, round by round, each as ``(rung, loss)``, NaN diverged: told in order of rungs."""
    so_far: list[tuple[int, float]] = []
    told = []
    for of_round in ended:
        now = {}
        for place, (rung, loss) in sorted(enumerate(of_round), key=lambda one: -one[1][0]):
            if np.isnan(loss):
                now[place] = np.inf
                continue
            now[place] = max([loss, *(value for other, value in so_far if other > rung)])
            so_far.append((rung, now[place]))
        told.append(tuple(now[place] for place in range(len(of_round))))
    return tuple(told)
