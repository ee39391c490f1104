"""Random search: independent uniform points.

Bergstra & Bengio, "Random search for hyper-parameter optimization", JMLR 13, 2012.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxhpo.core import CubeSpec, Feedback, Query, pytree_dataclass, setting


@pytree_dataclass
class RandomState:
    """``cube`` is ``f32[B, D]``, the point that each lane is at."""

    cube: jax.Array


@pytree_dataclass
class RandomSearch:
    """Random search: each lane gets a new uniform point of the cube as soon as it is done.

    Attributes:
        num_lanes: B.
    """

    num_lanes: int = setting(static=True, low=1)

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> RandomState:
        return RandomState(jax.random.uniform(key, (self.num_lanes, spec.num_dims), jnp.float32))

    def ask(self, key: jax.Array, state: RandomState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: RandomState, query: Query, feedback: Feedback) -> RandomState:
        del query
        fresh = jax.random.uniform(key, state.cube.shape, jnp.float32)
        return RandomState(jnp.where(feedback.done[:, None], fresh, state.cube))
