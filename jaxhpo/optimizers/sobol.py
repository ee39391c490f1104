"""Sobol search: scrambled Sobol points, which fill the cube more evenly than random ones.

Sobol', "On the distribution of points in a cube and the approximate evaluation of integrals", 1967, with the
direction numbers of Joe & Kuo, SIAM J. Sci. Comput. 30, 2008. Scrambled by a random lower triangular matrix of
bits for each dimension and a digital shift: Matousek, "On the L2-discrepancy for anchored boxes", J. Complexity 14, 1998.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import qmc

from jaxhpo.core import CubeSpec, Feedback, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError

BITS = 20
"""The sequence has ``2^BITS`` points, then it begins again."""

_KEPT = 23  # bits of a coordinate: with the half that centres it in its cell, as many as a float32 holds


@functools.lru_cache(maxsize=16)
def direction_numbers(num_dims: int) -> np.ndarray:
    """The direction numbers ``u32[D, BITS]`` of the Sobol sequence, the first binary digit in the highest bit.

    Computed on the host, once for each D: 0.4 s for 1000 dimensions, 13 s for the most there are.

    Raises:
        JaxhpoError: for more dimensions than there are direction numbers.
    """
    if num_dims > qmc.Sobol.MAXDIM:
        raise JaxhpoError(f"SobolSearch: the space has {num_dims} dimensions, Sobol points have at most {qmc.Sobol.MAXDIM}")
    engine = qmc.Sobol(num_dims, scramble=False, bits=BITS)
    columns = []
    for k in range(BITS):
        # In Gray-code order point i is the XOR of the direction numbers at the bits of i ^ (i >> 1), and for
        # i = 2^(k+1) - 1 this is the single bit k.
        engine.fast_forward(2 ** (k + 1) - 1 - engine.num_generated)
        columns.append(np.ldexp(engine.random(1)[0], BITS).astype(np.uint32) << np.uint32(32 - BITS))
    return np.stack(columns, axis=1)


def sobol_points(directions: jax.Array, shift: jax.Array, index: jax.Array) -> jax.Array:
    """Points of a digital sequence, at the middle of cells of width 2^-23.

    Args:
        directions: ``u32[D, BITS]``, direction numbers, scrambled or not.
        shift: ``u32[D]``, the digital shift.
        index: ``i32[B]``, which points.

    Returns:
        ``f32[B, D]``, inside (0, 1).
    """
    gray = index ^ (index >> 1)
    chosen = (gray[:, None] >> jnp.arange(BITS)) & 1  # [B, BITS]
    terms = jnp.where(chosen[:, None, :] == 1, directions, jnp.uint32(0))  # [B, D, BITS]
    digits = jax.lax.reduce_xor(terms, axes=(2,)) ^ shift
    cell = (digits >> (32 - _KEPT)).astype(jnp.float32)
    return (cell + 0.5) * 2.0**-_KEPT


def scrambled_sobol(key: jax.Array, num_dims: int) -> tuple[jax.Array, jax.Array]:
    """Scrambled direction numbers ``u32[D, BITS]`` and a digital shift ``u32[D]`` for :func:`sobol_points`.

    The direction numbers are multiplied by a random unit lower triangular bit matrix for each dimension.
    """
    key_matrix, key_shift = jax.random.split(key)
    directions = direction_numbers(num_dims)
    digit = jnp.arange(BITS, dtype=jnp.uint32)
    bits = jax.random.bits(key_matrix, (num_dims, BITS), jnp.uint32)
    matrix = (bits >> (digit + 1)) | (jnp.uint32(1 << 31) >> digit)  # column j: a one at digit j, random digits below
    has_digit = (jnp.asarray(directions)[:, :, None] >> (31 - digit)) & 1  # [D, BITS, BITS]
    terms = jnp.where(has_digit == 1, matrix[:, None, :], jnp.uint32(0))
    return jax.lax.reduce_xor(terms, axes=(2,)), jax.random.bits(key_shift, (num_dims,), jnp.uint32)


@pytree_dataclass
class InitialDesign:
    """Scrambled Sobol points with which an optimizer that learns a model begins.

    Attributes:
        directions, shift: the sequence, as :func:`scrambled_sobol` draws it.
        next: ``i32[]``, its next point.
        left: ``i32[]``, points still to be given out.
    """

    directions: jax.Array
    shift: jax.Array
    next: jax.Array
    left: jax.Array


def initial_design(key: jax.Array, num_dims: int, num_lanes: int, num_points: int) -> tuple[InitialDesign, jax.Array]:
    """A design of at least one point for every lane, and the first ``f32[B, D]`` of them."""
    directions, shift = scrambled_sobol(key, num_dims)
    first = jnp.arange(num_lanes, dtype=jnp.int32) % 2**BITS
    left = jnp.asarray(max(num_points - num_lanes, 0), jnp.int32)
    following = jnp.asarray(num_lanes % 2**BITS, jnp.int32)
    return InitialDesign(directions, shift, following, left), sobol_points(directions, shift, first)


def given_out(
    design: InitialDesign, done: jax.Array, goes_on: jax.Array | bool = False
) -> tuple[InitialDesign, jax.Array, jax.Array]:
    """The design after lanes that are done have taken what is left, from the first lane on; all of them if it ``goes_on``.

    Returns:
        the design, points ``f32[B, D]``, and which lanes ``bool[B]`` are given theirs.
    """
    rank = jnp.cumsum(done, dtype=jnp.int32) - 1
    given = done & ((rank < design.left) | goes_on)
    points = sobol_points(design.directions, design.shift, (design.next + rank) % 2**BITS)
    count = given.sum(dtype=jnp.int32)
    left = jnp.maximum(design.left - count, 0)
    return dataclasses.replace(design, next=(design.next + count) % 2**BITS, left=left), points, given


@pytree_dataclass
class SobolState:
    """State of :class:`SobolSearch`.

    Attributes:
        directions: ``u32[D, BITS]``, scrambled direction numbers.
        shift: ``u32[D]``, the digital shift.
        index: ``i32[B]``, the point that each lane is at.
        next: ``i32[]``, the next point to give out.
    """

    directions: jax.Array
    shift: jax.Array
    index: jax.Array
    next: jax.Array


@pytree_dataclass
class SobolSearch:
    """Scrambled Sobol search: each lane that is done takes the next point of the sequence.

    Every key gives another scrambling. Of the first ``2^m`` points exactly one lies in each of the ``2^m``
    equal intervals of every coordinate, and pairs and triples of coordinates are covered evenly too.
    After ``2^20`` points the same points come again.

    Attributes:
        num_lanes: B; a power of two keeps each batch evenly spread.

    Raises:
        JaxhpoError: by ``init``, for more than 21201 dimensions.
    """

    num_lanes: int = setting(static=True, low=1)

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> SobolState:
        directions, shift = scrambled_sobol(key, spec.num_dims)
        index = jnp.arange(self.num_lanes, dtype=jnp.int32) % 2**BITS
        return SobolState(directions, shift, index, jnp.asarray(self.num_lanes % 2**BITS, jnp.int32))

    def ask(self, key: jax.Array, state: SobolState) -> Query:
        del key
        return Query.fresh(sobol_points(state.directions, state.shift, state.index))

    def update(self, key: jax.Array, state: SobolState, query: Query, feedback: Feedback) -> SobolState:
        del key, query
        done = feedback.done.astype(jnp.int32)
        refill = (state.next + jnp.cumsum(done, dtype=jnp.int32) - done) % 2**BITS  # lanes that are done, counted from the left
        index = jnp.where(feedback.done, refill, state.index)
        return SobolState(state.directions, state.shift, index, (state.next + done.sum(dtype=jnp.int32)) % 2**BITS)
