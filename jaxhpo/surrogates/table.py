"""The observations of a surrogate: a masked table of fixed capacity, rows in use first."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.core import pytree_dataclass

_SAFE_SHARE = 0.25  # of the rows of this life, the best, are never given up


@pytree_dataclass
class Table:
    """``N`` rows, of which the first ``count`` are in use.

    Attributes:
        cube: ``f32[N, D]``, points with integers and choices at the middle of their level.
        loss: ``f32[N]``; infinite for a trial that failed, 0 in rows that are free.
        epoch: ``i32[N]``, in which life of the search a row was observed.
        count: ``i32[]``.
    """

    cube: jax.Array
    loss: jax.Array
    epoch: jax.Array
    count: jax.Array

    @property
    def used(self) -> jax.Array:
        """``bool[N]``"""
        return jnp.arange(self.loss.shape[0]) < self.count

    @property
    def failed(self) -> jax.Array:
        """``bool[N]``"""
        return self.used & jnp.isinf(self.loss)

    @property
    def sound(self) -> jax.Array:
        """``bool[N]``, rows with a loss."""
        return self.used & jnp.isfinite(self.loss)


def empty_table(num_rows: int, num_dims: int) -> Table:
    """A table without observations."""
    return Table(
        jnp.zeros((num_rows, num_dims), jnp.float32),
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def enlarged(table: Table, num_rows: int) -> Table:
    """The table with more rows."""
    more = num_rows - table.loss.shape[0]
    grow = lambda x: jnp.concatenate([x, jnp.zeros((more, *x.shape[1:]), x.dtype)]) if x.ndim else x
    return jax.tree.map(grow, table)


def observe(table: Table, cube: jax.Array, loss: jax.Array, epoch: jax.Array, done: jax.Array, reserve: int) -> Table:
    """The table with the lanes that are done, points ``[B, D]``, losses and epochs ``[B]``, at its end.

    Where fewer than ``reserve`` rows would stay free, the most redundant ones make room: see :func:`redundancy`.
    """
    rows, incoming = table.loss.shape[0], done.sum(dtype=jnp.int32)
    surplus = jnp.maximum(table.count + incoming - (rows - reserve), 0)
    table = lax.cond(surplus > 0, lambda: _without(table, surplus), lambda: table)
    place = jnp.where(done, table.count + jnp.cumsum(done, dtype=jnp.int32) - 1, rows)  # beyond the end: dropped
    return Table(
        table.cube.at[place].set(cube, mode="drop"),
        table.loss.at[place].set(loss, mode="drop"),
        table.epoch.at[place].set(epoch, mode="drop"),
        table.count + incoming,
    )


def redundancy(table: Table) -> jax.Array:
    """How little the model loses with a row, ``f32[N]``, highest first to go.

    First the rows of earlier lives, then by the distance to the nearest row with a lower loss: what lies close to something
    better says little that is new, and local minima are far from anything better. The best quarter of this life's stays.
    """
    stale = table.epoch < jnp.max(jnp.where(table.used, table.epoch, 0))
    rank = jnp.argsort(jnp.argsort(jnp.where(table.used & ~stale, table.loss, jnp.inf)))
    gaps = ((table.cube[:, None, :] - table.cube[None, :, :]) ** 2).sum(-1)
    nearest = jnp.min(jnp.where(rank[None, :] < rank[:, None], gaps, jnp.inf), axis=1)
    worth = jnp.where(rank < _SAFE_SHARE * (table.used & ~stale).sum(), jnp.inf, nearest)
    return jnp.where(table.used, jnp.where(stale, 1.0, -worth), -jnp.inf)


def _without(table: Table, surplus: jax.Array) -> Table:
    """The ``surplus`` most redundant rows taken out, the others closed up in their order."""
    order = jnp.argsort(-redundancy(table))
    gone = jnp.zeros(order.shape, bool).at[order].set(jnp.arange(order.size) < surplus)
    kept = jnp.argsort(gone, stable=True)
    left = table.count - surplus
    free = jnp.arange(order.size) >= left
    take = lambda x: jnp.where(free.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x[kept])
    return dataclasses.replace(table, cube=take(table.cube), loss=take(table.loss), epoch=take(table.epoch), count=left)
