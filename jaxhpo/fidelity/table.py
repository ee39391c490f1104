"""Values seen at each rung, as one sorted table that grows.

``f32[K, N]``: row k has the values of rung k in ascending order, inf in entries that are free. Where a row is full its
highest values are lost; between updates a table is enlarged before that (see :mod:`jaxhpo.study.room`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import Array
from jaxhpo.fidelity.inner import LIMITLESS, inner_enlarged, inner_holds

_FIRST = 4096  # entries of a first table at least: most studies never compile for a larger one
_MOST = 1 << 20  # entries to which a table grows


def empty_table(num_rungs: int, num_lanes: int) -> jax.Array:
    """A table without values, ``f32[K, N]``."""
    return jnp.full((num_rungs, max(_FIRST, 1 << (4 * max(num_lanes, 1) - 1).bit_length())), jnp.inf, jnp.float32)


def entered(table: Array, rung: Array, value: Array, which: Array) -> jax.Array:
    """The table with a finite value ``f32[B]`` for each of the lanes ``which``, ``bool[B]``, at rung ``i32[B]``."""
    here = (rung == jnp.arange(table.shape[0])[:, None]) & which
    return jax.vmap(_merged)(jnp.asarray(table), jnp.where(here, value, jnp.inf).astype(table.dtype))


def _merged(row: jax.Array, new: jax.Array) -> jax.Array:
    """The lowest ``N`` of a sorted row ``[N]`` and new values ``[B]``, sorted: much cheaper than to sort them all again."""
    new = jnp.sort(new)
    moved = jnp.arange(row.size) + jnp.searchsorted(new, row, side="left")  # each is moved up by the new ones below it
    placed = jnp.arange(new.size) + jnp.searchsorted(row, new, side="right")
    kept = jnp.full_like(row, jnp.inf).at[moved].set(row, mode="drop", unique_indices=True)
    return kept.at[placed].set(new, mode="drop", unique_indices=True)


def rank_and_count(table: Array, rung: Array, value: Array) -> tuple[jax.Array, jax.Array]:
    """How many values at the lane's rung are strictly lower than its value, and how many there are, ``i32[B]`` each."""
    rung = jnp.minimum(rung, table.shape[0] - 1)
    below = jax.vmap(lambda row: jnp.searchsorted(row, value))(table)
    count = jnp.isfinite(table).sum(axis=1, dtype=jnp.int32)
    return below[rung, jnp.arange(rung.size)].astype(jnp.int32), count[rung]


def table_holds(table: Array, num_lanes: int) -> int:
    """Trials ended for which no value is lost: each lane under way may have a value at every rung, too."""
    return table.shape[1] - num_lanes if table.shape[1] < _MOST else LIMITLESS


def holds_both(wrapper: Any, state: Any) -> int:
    """What the table of a wrapper and that of its inner optimizer hold."""
    return min(table_holds(state.table, wrapper.num_lanes), inner_holds(wrapper.inner, state.inner))


def enlarged_both(wrapper: Any, state: Any) -> Any:
    """The state with the smaller of the two tables enlarged, both if they are equal; the same object where neither grows."""
    own, its = table_holds(state.table, wrapper.num_lanes), inner_holds(wrapper.inner, state.inner)
    table, inner = state.table, state.inner
    if own <= its and own < LIMITLESS:
        table = jnp.pad(table, ((0, 0), (0, table.shape[1])), constant_values=jnp.inf)
    if its <= own and its < LIMITLESS:
        inner = inner_enlarged(wrapper.inner, inner)
    if table is state.table and inner is state.inner:
        return state
    return dataclasses.replace(state, table=table, inner=inner)
