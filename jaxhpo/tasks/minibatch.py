"""Minibatches without replacement in counter mode: a permutation that is computed where it is read, never stored.

The swap-or-not shuffle (Hoang, Morris and Rogaway, "An enciphering scheme based on a card shuffle", CRYPTO 2012,
figure 1) is a permutation of exactly ``n`` elements under any round function; a few integer operations an element.
A lane needs five numbers instead of a permutation of the whole training set.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxhpo.core import pytree_dataclass


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of ``u32`` with good avalanche: multiplications by odd constants between shifted exclusive ors."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def num_shuffle_rounds(n: int) -> int:
    """Rounds of the shuffle of ``n`` elements: the expected number that no round moves is below ``2**-10``."""
    return math.ceil(math.log2(n)) + 10 if n > 1 else 0


def epoch_keys(n: int, seed: jax.Array, epoch: jax.Array) -> jax.Array:
    """The round keys of one epoch's permutation of ``n`` elements, ``u32[R]``, from ``seed`` ``u32[2]``."""
    stream = _mix(seed[0] ^ _mix(seed[1] + epoch.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)))
    rounds = jnp.arange(num_shuffle_rounds(n), dtype=jnp.uint32)
    return _mix(stream + (2 * rounds + 1) * jnp.uint32(0x9E3779B9))


def shuffled(position: jax.Array, n: int, round_keys: jax.Array) -> jax.Array:
    """Which element stands at a position of the permutation of ``0 .. n-1`` given by its round keys.

    Args:
        position: ``i32[...]`` in ``0 .. n-1``.
        n: static.
        round_keys: ``u32[R]``, or ``u32[R, ...]`` to give each position its own permutation.

    Returns:
        ``i32`` of the shape of ``position``.
    """
    x = position.astype(jnp.uint32)
    for r in range(num_shuffle_rounds(n)):
        shift = round_keys[r] % jnp.uint32(n)  # K_r
        partner = jnp.where(x <= shift, shift - x, shift + jnp.uint32(n) - x)  # X' = K_r - X mod n
        swap = _mix(jnp.maximum(x, partner) * jnp.uint32(0x9E3779B1) + round_keys[r]) >> 31  # F_r(max(X, X'))
        # Fenced: compilers that fuse the unrolled rounds compute x anew for each of its uses, again in every round.
        x = jax.lax.optimization_barrier(jnp.where(swap == 1, partner, x))
    return x.astype(jnp.int32)


@pytree_dataclass
class Order:
    """Where a lane stands in its data.

    Attributes:
        seed: ``u32[2]``, fixes the permutation of every epoch.
        epoch: ``i32[]``.
        position: ``i32[]``, the next position of the epoch's permutation.
    """

    seed: jax.Array
    epoch: jax.Array
    position: jax.Array


def first_order(key: jax.Array) -> Order:
    """The start of the first epoch."""
    zero = jnp.zeros((), jnp.int32)
    return Order(jax.random.bits(key, (2,), jnp.uint32), zero, zero)


def next_batch(order: Order, n: int, batch_size: int, taken: jax.Array | int | None = None) -> tuple[jax.Array, Order]:
    """The next ``batch_size`` of ``n`` elements, ``i32[batch_size]``, and where that leaves the lane.

    Epochs follow each other without a gap: a batch may end one epoch and begin the next, so that every element is
    seen once an epoch whether or not ``batch_size`` divides ``n``. ``batch_size`` is at most ``n``. With ``taken``, which may
    be traced, only so many of them count, the first ones: the next batch begins behind those.
    """
    place = order.position + jnp.arange(batch_size, dtype=jnp.int32)
    wrapped = place >= n
    now, then = (epoch_keys(n, order.seed, order.epoch + later) for later in (0, 1))
    round_keys = jnp.where(wrapped, then[:, None], now[:, None])
    index = shuffled(jnp.where(wrapped, place - n, place), n, round_keys)
    position = order.position + (batch_size if taken is None else taken)
    over = position >= n
    return index, Order(order.seed, order.epoch + over, jnp.where(over, position - n, position))
