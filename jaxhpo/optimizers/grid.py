"""Grid search: every combination of a few values for each dimension."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import CubeSpec, Feedback, Kind, Query, Run, pytree_dataclass, setting


@pytree_dataclass
class GridState:
    """State of :class:`GridSearch`: places in the grid as mixed radix numbers, one digit a dimension, the last fastest.

    Attributes:
        digits: ``i32[B, D]``, where each lane is.
        next: ``i32[D]``, the next place to give out.
        spec: static.
    """

    digits: jax.Array
    next: jax.Array
    spec: CubeSpec = setting(static=True)


@pytree_dataclass
class GridSearch:
    """Grid search, in the order of nested loops with the last dimension innermost.

    A float takes ``points_per_float`` values equally spaced in the cube (by its logarithm if it is a log
    leaf), both ends included; one value alone is the middle. A choice takes every option. An integer takes
    every level, or if it has more than ``points_per_int``, those at that many places equally spaced in the
    cube, both ends included (fewer where two places fall into one level, as for small log integers).
    After the last combination the first comes again: :meth:`size` says when.

    Attributes:
        num_lanes: B.
        points_per_float: values of a continuous dimension.
        points_per_int: the most values of an integer dimension.
    """

    num_lanes: int = setting(static=True, low=1)
    points_per_float: int = setting(5, static=True, low=1)
    points_per_int: int = setting(10, static=True, low=1)

    def counts(self, spec: CubeSpec) -> np.ndarray:
        """The number of values of each dimension, ``i32[D]``."""
        counts = [len(self._picks(run)) if run.kind == Kind.INT else run.levels or self.points_per_float for run in spec.runs]
        return np.repeat(np.asarray(counts, np.int32), [run.count for run in spec.runs])

    def size(self, spec: CubeSpec) -> int:
        """The number of points of the whole grid."""
        return math.prod(int(count) for count in self.counts(spec))

    def _picks(self, run: Run) -> np.ndarray:
        """The levels that a dimension of integers takes."""
        if run.levels <= self.points_per_int:
            return np.arange(run.levels)
        return _thinned(run, self.points_per_int)

    def _picks_table(self, spec: CubeSpec) -> np.ndarray:
        """The levels of all integer dimensions, padded, ``i32[D, points_per_int]``."""
        rows = [self._picks(run) if run.kind == Kind.INT else np.zeros(1) for run in spec.runs]
        table = np.stack([np.pad(row, (0, self.points_per_int - len(row))) for row in rows]).astype(np.int32)
        return np.repeat(table, [run.count for run in spec.runs], axis=0)

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> GridState:
        del key
        origin = jnp.zeros(spec.num_dims, jnp.int32)
        counts = self.counts(spec)
        digits = _advance(origin, jnp.arange(self.num_lanes, dtype=jnp.int32), counts)
        return GridState(digits, _advance(origin, jnp.int32(self.num_lanes), counts), spec)

    def ask(self, key: jax.Array, state: GridState) -> Query:
        del key
        spec, counts, digits = state.spec, self.counts(state.spec), state.digits
        cube = jnp.where(counts == 1, 0.5, digits / np.maximum(counts - 1, 1).astype(np.float32))
        if not spec.is_float.all():
            picked = jnp.asarray(self._picks_table(spec))[np.arange(spec.num_dims), jnp.where(spec.is_int, digits, 0)]
            cube = jnp.where(spec.is_float, cube, spec.cube_of(jnp.where(spec.is_int, picked, digits)))
        return Query.fresh(cube)

    def update(self, key: jax.Array, state: GridState, query: Query, feedback: Feedback) -> GridState:
        del key, query
        counts = self.counts(state.spec)
        done = feedback.done.astype(jnp.int32)
        # Lanes that are done, counted from the left.
        refill = _advance(state.next, jnp.cumsum(done, dtype=jnp.int32) - done, counts)
        digits = jnp.where(feedback.done[:, None], refill, state.digits)
        return GridState(digits, _advance(state.next, done.sum(dtype=jnp.int32), counts), state.spec)


@functools.lru_cache(maxsize=256)
def _thinned(run: Run, points: int) -> np.ndarray:
    """The levels at ``points`` places equally spaced in the cube; the wide low levels of log integers count once."""
    places = np.array([0.5]) if points == 1 else np.linspace(0.0, 1.0, points)
    with jax.ensure_compile_time_eval():
        levels = CubeSpec((dataclasses.replace(run, count=1),)).level_of(jnp.asarray(places, jnp.float32)[:, None])
    return np.unique(np.asarray(levels))


def _advance(digits: jax.Array, by: jax.Array, counts: np.ndarray) -> jax.Array:
    """``digits`` (``i32[D]``) plus each of ``by`` (``i32[...]``) as mixed radix numbers, ``i32[..., D]``.

    Digit by digit with a carry, so no product of counts is ever formed. A carry out of the first is dropped.
    """

    def add(carry: jax.Array, column: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        digit, count = column
        total = digit + carry
        return total // count, total % count

    _, columns = jax.lax.scan(add, by, (digits, jnp.asarray(counts, jnp.int32)), reverse=True)
    return jnp.moveaxis(columns, 0, -1)
