"""A trust region: the box around the incumbent in which a local search proposes, and when it grows, shrinks, restarts.

TuRBO-1 of Eriksson, Pearce, Gardner, Turner & Poloczek, "Scalable global optimization via local Bayesian optimization",
NeurIPS 2019, section 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxhpo.core import CubeSpec, pytree_dataclass

FIRST, GREATEST, LEAST = 0.8, 1.6, 2.0**-7  # sides of the box, in units of the cube
_SUCCESSES = 3  # updates in a row before it grows
_MARGIN = 1e-3  # improvement that counts, relative to the incumbent


@pytree_dataclass
class Region:
    """State of a trust region.

    Attributes:
        length: ``f32[]``, its side.
        best: ``f32[]``, the lowest loss of this life.
        successes: ``i32[]``, updates in a row that improved on it.
        failures: ``i32[]``, trials in a row that did not.
        life: ``i32[]``, restarts so far.
    """

    length: jax.Array
    best: jax.Array
    successes: jax.Array
    failures: jax.Array
    life: jax.Array


def first_region() -> Region:
    """The region of a search that begins."""
    zero = jnp.zeros((), jnp.int32)
    return Region(jnp.float32(FIRST), jnp.float32(jnp.inf), zero, zero, zero)


def moved_region(
    region: Region, loss: jax.Array, done: jax.Array, counts: jax.Array, num_dims: int
) -> tuple[Region, jax.Array]:
    """The region after the losses ``f32[B]`` of the lanes that are done, and whether it starts a new life.

    ``counts`` is False as long as trials belong to the initial design, which neither succeeds nor fails.
    """
    lowest = jnp.min(jnp.where(done, loss, jnp.inf))
    known = jnp.isfinite(region.best)
    success = lowest < region.best - _MARGIN * jnp.where(known, jnp.abs(region.best), 0.0)
    counted = counts & done.any() & known
    successes = jnp.where(counted, jnp.where(success, region.successes + 1, 0), region.successes)
    failures = jnp.where(counted, jnp.where(success, 0, region.failures + done.sum(dtype=jnp.int32)), region.failures)
    grows, shrinks = successes >= _SUCCESSES, failures >= max(4, num_dims)
    length = jnp.where(
        grows, jnp.minimum(2.0 * region.length, GREATEST), jnp.where(shrinks, region.length / 2.0, region.length)
    )
    ends = length < LEAST
    moved = Region(
        jnp.where(ends, FIRST, length),
        jnp.where(ends, jnp.inf, jnp.minimum(region.best, lowest)),
        jnp.where(grows | ends, 0, successes),
        jnp.where(shrinks | ends, 0, failures),
        region.life + ends.astype(jnp.int32),
    )
    return moved, ends


def box_of(region: Region, spec: CubeSpec, centre: jax.Array, log_lengthscale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Bounds ``[D]`` of the box around ``centre [D]``, its sides in proportion to the lengthscales; choices are free."""
    relative = jnp.exp(log_lengthscale - jnp.mean(log_lengthscale, where=~spec.is_choice))
    side = 0.5 * region.length * jnp.clip(relative, 0.1, 10.0)
    lower = jnp.where(spec.is_choice, 0.0, jnp.clip(centre - side, 0.0, 1.0))
    upper = jnp.where(spec.is_choice, 1.0, jnp.clip(centre + side, 0.0, 1.0))
    return lower.astype(jnp.float32), upper.astype(jnp.float32)
