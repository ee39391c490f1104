"""List search: given points, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import CubeSpec, Feedback, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.space import as_space


@pytree_dataclass
class ListState:
    """State of :class:`ListSearch`: ``cube``, ``f32[B, D]``, where each lane is; ``next``, ``i32[]``, the next point."""

    cube: jax.Array
    next: jax.Array


@pytree_dataclass
class ListSearch:
    """The points of a list in their order, each once; independent uniform points after the last one.

    For settings that are known beforehand: those of a sweep written by hand, or of earlier studies.
    ``num_trials=len(points)`` evaluates them and nothing else.

    Attributes:
        num_lanes: B.
        points: ``[N, D]``, points of the cube; :meth:`of` makes them from hyperparameters.

    Raises:
        JaxhpoError: by ``init``, for points that do not lie in the cube of the space.
    """

    num_lanes: int = setting(static=True, low=1)
    points: tuple[tuple[float, ...], ...] = setting((), static=True)

    starts_afresh = True

    @classmethod
    def of(cls, space: Any, settings: Sequence[Any], num_lanes: int) -> ListSearch:
        """The search of hyperparameters, each a tree of plain values in the shape of the space.

        Raises:
            JaxhpoError: for settings that do not fit the space, naming the first.
        """
        space, points = as_space(space), []
        for place, values in enumerate(settings):
            try:
                points.append(tuple(np.asarray(space.encode(space.from_host(values))).tolist()))
            except (ValueError, TypeError) as error:
                raise JaxhpoError(f"ListSearch: settings[{place}]: {error}") from None
        return cls(num_lanes, tuple(points))

    def init(self, key: jax.Array, spec: CubeSpec) -> ListState:
        for place, point in enumerate(self.points):
            if len(point) != spec.num_dims:
                raise JaxhpoError(
                    f"ListSearch: points[{place}] has {len(point)} coordinates where the space has {spec.num_dims} dimensions"
                )
            if not all(0.0 <= x <= 1.0 for x in point):
                raise JaxhpoError(f"ListSearch: points[{place}] = {list(point)}: coordinates must lie between 0 and 1")
        lanes = jnp.arange(self.num_lanes, dtype=jnp.int32)
        return ListState(self._points_at(key, lanes, spec.num_dims), jnp.int32(self.num_lanes))

    def ask(self, key: jax.Array, state: ListState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: ListState, query: Query, feedback: Feedback) -> ListState:
        del query
        done = feedback.done.astype(jnp.int32)
        # Lanes that are done, counted from the left.
        place = state.next + jnp.cumsum(done, dtype=jnp.int32) - done
        fresh = self._points_at(key, place, state.cube.shape[1])
        # Beyond the list the place says nothing any more; held, it never overflows.
        following = jnp.minimum(state.next + done.sum(dtype=jnp.int32), max(len(self.points), self.num_lanes))
        return ListState(jnp.where(feedback.done[:, None], fresh, state.cube), following)

    def _points_at(self, key: jax.Array, place: jax.Array, num_dims: int) -> jax.Array:
        """The points at places of the list, random ones beyond it, ``i32[B] -> f32[B, D]``."""
        beyond = jax.random.uniform(key, (self.num_lanes, num_dims), jnp.float32)
        if not self.points:
            return beyond
        points = jnp.asarray(self.points, jnp.float32)
        return jnp.where((place < len(points))[:, None], points[jnp.minimum(place, len(points) - 1)], beyond)
