"""Greedy local search: moves around one incumbent, step sizes that adapt by success, restarts.

Step sizes follow the 1/5 success rule: Rechenberg, "Evolutionsstrategie", 1973; Schumer & Steiglitz, "Adaptive step
size random search", IEEE Trans. Automatic Control 13, 1968. The moves along the path of past successes are the
pattern moves of Hooke & Jeeves, "Direct search", J. ACM 8, 1961, made random, with the cumulated path of
Hansen & Ostermeier, "Completely derandomized self-adaptation in evolution strategies", Evol. Comput. 9, 2001, eq. 14.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxhpo.core import CubeSpec, Feedback, Query, pytree_dataclass, setting

START, ALL, SOME, ONE, PATH = range(5)
"""The moves: a uniform point; all dimensions; a random few; a single one; along the path."""

_MOST = math.log(4.0)  # no step size changes by more in one update, however many lanes ended
_SCALES = (math.log(1e-4), math.log(10.0))  # of the steps in many dimensions, relative to those in one
_RELABEL = 0.1  # chance that a move in all dimensions changes a choice
_CUMULATION = 0.2
_PATH_MEAN, _PATH_SPREAD = 0.75, 1.5  # how far to move along the path, in its length


@pytree_dataclass
class LocalState:
    """State of :class:`LocalSearch`.

    Attributes:
        cube: ``f32[B, D]``, the point of each lane.
        move: ``i32[B]``, the move that made it.
        dim: ``i32[B]``, the dimension that a single move changed.
        base: ``f32[B]``, the loss of the incumbent from which it moved: success is to be below it.
        epoch: ``i32[B]``, the value of ``restarts`` at that time.
        incumbent: ``f32[D]``.
        loss: ``f32[]``, of the incumbent; infinite before the first finite loss after a (re)start.
        log_steps: ``f32[D]``, log of the step of each dimension.
        log_scales: ``f32[2]``, log of the factor on these steps in moves of all, and of a few, dimensions.
        path: ``f32[D]``, cumulated steps of the incumbent.
        stalled: ``i32[]``, trials since the last improvement.
        restarts: ``i32[]``.
        spec: static.
    """

    cube: jax.Array
    move: jax.Array
    dim: jax.Array
    base: jax.Array
    epoch: jax.Array
    incumbent: jax.Array
    loss: jax.Array
    log_steps: jax.Array
    log_scales: jax.Array
    path: jax.Array
    stalled: jax.Array
    restarts: jax.Array
    spec: CubeSpec = setting(static=True)


@pytree_dataclass
class LocalSearch:
    """Greedy local search: all lanes move around one incumbent, which a loss as low or lower replaces.

    A lane that is done makes one of four moves from the incumbent: Gaussian in all dimensions, in a random few, in a
    single one, or along the path of past successes. A move of a few or one dimensions changes integers by at least one
    level and choices to another label. Each dimension has its own step, and moves in all and in a few dimensions a
    factor on it; all grow with success and shrink with failure, where success means below the incumbent from which
    the lane moved. Bounds reflect. If the steps have shrunk below ``min_step``, or nothing has improved for long,
    the search starts again at the best of new uniform points; lanes still under way from the last start are ignored.

    Defaults chosen on spheres, axis-parallel and rotated ellipsoids (condition 10^3 and 10^4), Rosenbrock, Rastrigin,
    Levy, Ackley, and rotated quadratics of floats with integers and choices, in 2 to 20 dimensions, with 1, 8 and 32
    lanes and 200 to 3000 trials.

    Attributes:
        num_lanes: B. Few lanes suffice: trials of the same round do not learn from each other.
        initial_step: standard deviation of the first moves, in units of the cube.
        min_step: steps below it lead to a restart.
        share_one: share of moves in a single dimension.
        share_some: share of moves in a few dimensions (two on average, besides the first).
        share_path: share of moves along the path; the rest move in all dimensions.
        success_rate: share of successes at which steps stay as they are.
        patience: trials without improvement before a restart, for each dimension and lane.
    """

    num_lanes: int = setting(static=True, low=1)
    initial_step: float = setting(0.2, low=1e-6, high=1.0)
    min_step: float = setting(1e-5, low=0.0, high=1.0)
    share_one: float = setting(0.3, low=0.0, high=1.0)
    share_some: float = setting(0.2, low=0.0, high=1.0)
    share_path: float = setting(0.2, low=0.0, high=1.0)
    success_rate: float = setting(0.2, low=0.01, high=0.9)
    patience: float = setting(20.0, low=1.0)

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> LocalState:
        lanes, dims = self.num_lanes, spec.num_dims
        cube = jnp.asarray(spec.snap(jax.random.uniform(key, (lanes, dims), jnp.float32)))
        zeros, zero, no_loss = jnp.zeros(lanes, jnp.int32), jnp.asarray(0, jnp.int32), jnp.asarray(jnp.inf, jnp.float32)
        return LocalState(
            cube=cube,
            move=zeros,
            dim=zeros,
            base=jnp.full(lanes, no_loss),
            epoch=zeros,
            incumbent=jnp.full(dims, 0.5, jnp.float32),
            loss=no_loss,
            log_steps=self._first_steps(dims),
            log_scales=jnp.zeros(2, jnp.float32),
            path=jnp.zeros(dims, jnp.float32),
            stalled=zero,
            restarts=zero,
            spec=spec,
        )

    def ask(self, key: jax.Array, state: LocalState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: LocalState, query: Query, feedback: Feedback) -> LocalState:
        done = jnp.asarray(feedback.done)
        state = dataclasses.replace(state, cube=jnp.where(done[:, None], state.spec.snap(query.cube), state.cube))
        loss = jnp.where(done & jnp.isfinite(feedback.loss), feedback.loss, jnp.inf)
        counted = done & (state.epoch == state.restarts)
        new = self._restarted(self._accepted(self._adapted(state, loss, counted), loss, counted), done)
        cube, move, dim = self._proposals(key, new)
        return dataclasses.replace(
            new,
            cube=jnp.where(done[:, None], cube, state.cube),
            move=jnp.where(done, move, state.move),
            dim=jnp.where(done, dim, state.dim),
            base=jnp.where(done, new.loss, state.base),
            epoch=jnp.where(done, new.restarts, state.epoch),
        )

    def _first_steps(self, dims: int) -> jax.Array:
        return jnp.broadcast_to(jnp.log(jnp.asarray(self.initial_step, jnp.float32)), (dims,))

    def _adapted(self, state: LocalState, loss: jax.Array, counted: jax.Array) -> LocalState:
        """Steps after the lanes ``counted`` succeeded or failed: log step += rate * (success - p) / (1 - p)."""
        spec, p = state.spec, self.success_rate
        dims = spec.num_dims
        gain = jnp.where(counted, ((loss < state.base) - p) / (1 - p), 0.0)
        by_dim = ((gain * (state.move == ONE))[:, None] * (state.dim[:, None] == jnp.arange(dims))).sum(0)
        by_move = jnp.stack([(gain * (state.move == move)).sum() for move in (ALL, SOME)])
        steps = state.log_steps + jnp.clip(0.5 * by_dim, -_MOST, _MOST)
        # Integers move by a level at least, so smaller steps mean nothing; choices have no step.
        floor = jnp.where(spec.is_int, -jnp.log(2.0 * jnp.maximum(spec.levels, 1)), -jnp.inf)
        steps = jnp.where(spec.is_choice, state.log_steps, jnp.clip(steps, floor, 0.0))
        rates = jnp.asarray([1 / (1 + dims / 2), 0.5], jnp.float32)  # a step in D dimensions adapts in about D trials
        scales = jnp.clip(state.log_scales + jnp.clip(rates * by_move, -_MOST, _MOST), *_SCALES)
        return dataclasses.replace(state, log_steps=steps, log_scales=scales)

    def _accepted(self, state: LocalState, loss: jax.Array, counted: jax.Array) -> LocalState:
        """The best of the lanes ``counted`` replaces the incumbent if it is not worse."""
        masked = jnp.where(counted, loss, jnp.inf)
        best = jnp.argmin(masked)
        found, point = masked[best], state.cube[best]
        accept, better = jnp.isfinite(found) & (found <= state.loss), found < state.loss
        # Hansen & Ostermeier 2001, eq. 14, with the incumbent's own steps; no path into the first incumbent.
        path = (1 - _CUMULATION) * state.path + math.sqrt(_CUMULATION * (2 - _CUMULATION)) * (point - state.incumbent)
        waited = jnp.where(jnp.isfinite(state.loss), state.stalled + counted.sum(dtype=jnp.int32), 0)
        return dataclasses.replace(
            state,
            incumbent=jnp.where(accept, point, state.incumbent),
            loss=jnp.where(accept, found, state.loss),
            path=jnp.where(better & jnp.isfinite(state.loss), path, state.path),
            stalled=jnp.where(better, 0, waited),
        )

    def _restarted(self, state: LocalState, done: jax.Array) -> LocalState:
        """Start again where the steps of all floats have shrunk or nothing has improved for long."""
        dims = state.spec.num_dims
        shrunk = jnp.asarray(False)
        if state.spec.is_float.any():
            mean = jnp.mean(state.log_steps, where=state.spec.is_float)
            shrunk = mean + jnp.maximum(state.log_scales[0], 0.0) < jnp.log(self.min_step)
        again = done.any() & (shrunk | (state.stalled > self.patience * (dims + self.num_lanes)))
        return dataclasses.replace(
            state,
            loss=jnp.where(again, jnp.inf, state.loss),
            log_steps=jnp.where(again, self._first_steps(dims), state.log_steps),
            log_scales=jnp.where(again, 0.0, state.log_scales),
            path=jnp.where(again, 0.0, state.path),
            stalled=jnp.where(again, 0, state.stalled),
            restarts=state.restarts + again.astype(jnp.int32),
        )

    def _proposals(self, key: jax.Array, state: LocalState) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A move for every lane: points ``f32[B, D]``, moves ``i32[B]`` and single dimensions ``i32[B]``."""
        spec, (lanes, dims) = state.spec, state.cube.shape
        key_normal, key_uniform = jax.random.split(key)
        normal = jax.random.normal(key_normal, (lanes, dims + 1), jnp.float32)
        normal, along = normal[:, :dims], normal[:, dims:]
        uniform = jax.random.uniform(key_uniform, (4 * dims + 2, lanes), jnp.float32)
        start, chance, relabel, label = uniform[:-2].reshape(4, dims, lanes).transpose(0, 2, 1)
        edges = jnp.cumsum(jnp.stack([self.share_one, self.share_some, self.share_path]))
        moves = jnp.asarray([ONE, SOME, PATH, ALL], jnp.int32)[(uniform[-2][:, None] >= edges).sum(1)]
        moves = jnp.where(jnp.isfinite(state.loss), moves, START)
        dim = jnp.minimum((uniform[-1] * dims).astype(jnp.int32), dims - 1)

        is_one = (moves == ONE)[:, None]
        picked = (dim[:, None] == jnp.arange(dims)) | ((moves == SOME)[:, None] & (chance < 2 / dims))
        picked = picked & (is_one | (moves == SOME)[:, None])  # the dimensions of moves in one or a few
        # Moves in many dimensions follow the proportions of the single steps half way: quite, and narrow valleys
        # across the axes would suffer from what helps along them.
        proportions = 0.5 * (state.log_steps + state.log_steps.mean())
        scales = jnp.where((moves == SOME)[:, None], state.log_scales[1], state.log_scales[0])
        step = normal * jnp.exp(jnp.where(is_one, state.log_steps, proportions + scales))
        step = jnp.where(picked | (moves == ALL)[:, None], step, 0.0)
        step = jnp.where((moves == PATH)[:, None], (_PATH_MEAN + _PATH_SPREAD * along) * state.path, step)
        cube = reflected(state.incumbent + step)

        if not spec.is_float.all():
            levels, here, there = jnp.maximum(spec.levels, 1), spec.level_of(state.incumbent), spec.level_of(cube)
            neighbour = jnp.where(normal > 0, here + 1, here - 1)
            neighbour = jnp.where((neighbour < 0) | (neighbour >= levels), 2 * here - neighbour, neighbour)
            number = jnp.where(picked & (there == here), neighbour, there)
            other = (here + 1 + jnp.floor(label * (levels - 1)).astype(jnp.int32)) % levels
            changes = picked | ((moves == ALL)[:, None] & (relabel < min(_RELABEL, 0.5 / max(int(spec.is_choice.sum()), 1))))
            level = jnp.where(spec.is_choice, jnp.where(changes, other, here), number)
            cube = jnp.where(spec.is_float, cube, spec.cube_of(jnp.clip(level, 0, levels - 1)))
        return jnp.where((moves == START)[:, None], spec.snap(start), cube), moves, dim


def reflected(x: jax.Array) -> jax.Array:
    """Coordinates outside [0, 1] mirrored at the bounds as often as needed; those inside keep their bits."""
    return jnp.where((x >= 0) & (x <= 1), x, 1 - jnp.abs(1 - jnp.mod(x, 2.0)))
