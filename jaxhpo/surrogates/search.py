"""Where an acquisition function is highest: a pool of candidates, then gradient ascent on floats and single moves on levels."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import CubeSpec
from jaxhpo.surrogates.quasi_newton import minimise_in_box

Score = Callable[[jax.Array], jax.Array]


_MOVES = 3  # turns of single moves of integers and choices, each followed by an ascent of the floats


def spread_points(key: jax.Array, num_points: int, num_dims: int) -> jax.Array:
    """Points ``[M, D]`` of a Latin hypercube: one in each of M equal intervals of every dimension (McKay et al. 1979)."""
    key_order, key_place = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(key_order, (num_points, num_dims), jnp.float32), axis=0)
    return (order + jax.random.uniform(key_place, (num_points, num_dims), jnp.float32)) / num_points


def neighbours(key: jax.Array, spec: CubeSpec, centres: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """A point near each of ``centres [M, D]``: some dimensions moved by steps of many lengths, some levels redrawn."""
    points, dims = centres.shape
    keys = jax.random.split(key, 5)
    length = (upper - lower) * jnp.exp(jax.random.uniform(keys[0], (points, 1), minval=-7.0, maxval=-1.0))
    moved = centres + length * jax.random.normal(keys[1], (points, dims))
    chance = jnp.maximum(jax.random.uniform(keys[2], (points, 1)) ** 2, 1.0 / dims)
    picked = jax.random.uniform(keys[3], (points, dims)) < chance
    if not spec.is_float.all():
        other = lower + (upper - lower) * jax.random.uniform(keys[4], (points, dims))
        level = spec.level_of(centres)
        side = jnp.where(moved > centres, 1, -1)
        beside = spec.cube_of(jnp.clip(level + side, 0, np.maximum(spec.levels, 1) - 1))
        far = spec.level_of(moved) != level
        moved = jnp.where(spec.is_choice, other, jnp.where(spec.is_int & ~far, beside, moved))
    return jnp.clip(jnp.where(picked, moved, centres), lower, upper)


def _others(spec: CubeSpec) -> tuple[np.ndarray, np.ndarray]:
    """All single moves of integers and choices: which dimension, and by how many levels."""
    moves = []
    for dim in np.flatnonzero(~spec.is_float):
        levels = int(spec.levels[dim])
        if spec.is_choice[dim]:
            shifts = list(range(1, levels)) if levels <= 12 else sorted({*np.linspace(1, levels - 1, 11).astype(int).tolist()})
        else:
            shifts = [s for length in (1, 2, 5, 15) for s in (-length, length) if length < levels]
        moves += [(dim, shift) for shift in shifts]
    table = np.array(moves, np.int32).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def single_moves(spec: CubeSpec, points: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """Points ``[S, D]`` after each move of one integer (by 1, 2, 5 or 15 levels) or one choice; ``[S, C, D]``."""
    dim, shift = _others(spec)
    level = spec.level_of(points)[:, dim] + shift
    levels = spec.levels[dim]
    level = jnp.where(spec.is_choice[dim], level % levels, jnp.clip(level, 0, levels - 1))
    cubes = spec.cube_of(jnp.broadcast_to(level[..., None], (*level.shape, spec.num_dims)))
    moved = jnp.where(np.arange(spec.num_dims) == dim[:, None], cubes, points[:, None, :])
    return jnp.where((moved < lower) | (moved > upper), points[:, None, :], moved)


def pool_of(
    key: jax.Array, spec: CubeSpec, centres: jax.Array, lower: jax.Array, upper: jax.Array, num_candidates: int
) -> jax.Array:
    """Candidates ``[M, D]`` on their levels: the first half over the box, the second around ``centres [E, D]``."""
    key_spread, key_near = jax.random.split(key)
    half = num_candidates // 2
    wide = lower + (upper - lower) * spread_points(key_spread, half, spec.num_dims)
    near = neighbours(key_near, spec, jnp.tile(centres, (-(-half // centres.shape[0]), 1))[:half], lower, upper)
    return jnp.asarray(spec.snap(jnp.concatenate([wide, near])))


def maximise(
    score: Score, pool: jax.Array, spec: CubeSpec, lower: jax.Array, upper: jax.Array, num_starts: int = 8, num_steps: int = 24
) -> tuple[jax.Array, jax.Array]:
    """The best point ``[D]`` found from a pool ``[M, D]``, and its score.

    Args:
        score: points of the cube ``[M, D]``, integers and choices on their levels, to ``[M]``.
        lower, upper: ``[D]``; floats may end exactly there.
        num_starts: how many of the pool are refined, half of them from each of its halves.
        num_steps: evaluations of a refinement, shared between the turns in spaces with integers or choices.
    """
    values = score(pool)
    values = jnp.where(jnp.isnan(values), -jnp.inf, values)
    half = pool.shape[0] // 2
    few = min(num_starts // 2, half)
    starts = jnp.concatenate([
        pool[:half][jax.lax.top_k(values[:half], few)[1]], pool[half:][jax.lax.top_k(values[half:], few)[1]]
    ])  # fmt: skip
    floats = np.flatnonzero(spec.is_float)

    def ascend(points: jax.Array, num_steps: int) -> tuple[jax.Array, jax.Array]:
        def value_and_grad(part: jax.Array) -> tuple[jax.Array, jax.Array]:
            def total(part: jax.Array) -> tuple[jax.Array, jax.Array]:
                values = -score(points.at[:, floats].set(part))
                return values.sum(), values

            (_, values), grad = jax.value_and_grad(total, has_aux=True)(part)
            return values, grad

        part, negated = minimise_in_box(value_and_grad, points[:, floats], lower[floats], upper[floats], num_steps)
        return points.at[:, floats].set(part), -negated

    def turn(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        points, _ = carry
        moved = jnp.concatenate([points[:, None, :], single_moves(spec, points, lower, upper)], axis=1)
        values = score(moved.reshape(-1, spec.num_dims)).reshape(moved.shape[:2])
        values = jnp.where(jnp.isnan(values), -jnp.inf, values)
        points = moved[jnp.arange(moved.shape[0]), jnp.argmax(values, axis=1)]
        return ascend(points, num_steps // _MOVES) if floats.size else (points, values.max(1))

    if spec.is_float.all():
        points, values = ascend(starts, num_steps)
    else:
        points, values = jax.lax.fori_loop(0, _MOVES, turn, (starts, jnp.zeros(starts.shape[0], values.dtype)))
    best = jnp.argmax(values)
    return points[best], values[best]
