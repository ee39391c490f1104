"""How a member of a population changes the hyperparameters that it has copied ("explore" of Jaderberg et al. 2017)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import Array, CubeSpec

EXPLORES = ("perturb", "resample")


def reflected(x: Array) -> jax.Array:
    """Coordinates that left ``[0, 1]`` mirrored at the bounds."""
    return jnp.abs(x - 2.0 * jnp.round(0.5 * x))  # a triangle wave of period 2


def perturbed(key: jax.Array, spec: CubeSpec, cube: Array, size: Array | float) -> jax.Array:
    """Points ``f32[B, D]`` moved by ``size`` up or down in every dimension, each at random; reflected at the bounds.

    Integers move by at least one level, and end at the middle of a level; choices stay.
    """
    side = jnp.where(jax.random.bernoulli(key, shape=cube.shape), 1, -1)
    moved = reflected(cube + side * size).astype(cube.dtype)
    if not spec.is_int.any():
        return jnp.where(spec.is_choice, cube, moved)
    top = np.maximum(spec.levels, 1) - 1
    level, new = spec.level_of(cube), spec.level_of(moved)
    beside = jnp.where((level + side < 0) | (level + side > top), level - side, level + side)
    new = jnp.where(new == level, jnp.clip(beside, 0, top), new)
    return jnp.where(spec.is_int, spec.cube_of(new).astype(cube.dtype), jnp.where(spec.is_choice, cube, moved))


def redrawn(key: jax.Array, spec: CubeSpec, cube: Array, dims: Array, chance: Array | float) -> jax.Array:
    """Points ``f32[B, D]`` of which each of the dimensions ``bool[D]`` is drawn anew, uniformly, with probability ``chance``.

    Integers and choices end at the middle of their level.
    """
    key_which, key_place = jax.random.split(key)
    which = (jax.random.uniform(key_which, cube.shape, jnp.float32) < chance) & dims
    return jnp.asarray(spec.snap(jnp.where(which, jax.random.uniform(key_place, cube.shape, cube.dtype), cube)))


def explored(
    key: jax.Array, spec: CubeSpec, cube: Array, explore: str, size: Array | float, chance: Array | float
) -> jax.Array:
    """New points ``f32[B, D]`` from those that were copied.

    Args:
        cube: ``f32[B, D]``, the points of the lanes that are copied.
        explore: ``"perturb"``: floats and integers as in :func:`perturbed`, choices drawn anew with probability ``chance``;
            ``"resample"``: every dimension drawn anew with probability ``chance``, else perturbed.
        size: of a move, in cube units.
        chance: see ``explore``.
    """
    key_move, key_draw = jax.random.split(key)
    dims = spec.is_choice if explore == "perturb" else np.ones(spec.num_dims, bool)
    return redrawn(key_draw, spec, perturbed(key_move, spec, cube, size), dims, chance)
