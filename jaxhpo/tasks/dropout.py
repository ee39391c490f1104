"""Dropout whose rate may be a traced hyperparameter; that of Flax decides by Python whether the rate is zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def dropout(key: jax.Array, rate: jax.Array | float, x: jax.Array) -> jax.Array:
    """Each element of ``x`` is zero with probability ``rate``, else divided by ``1 - rate``.

    ``rate`` in ``[0, 1)`` may be traced. A hypergradient by it goes through the division alone, not through which elements
    are dropped: it is biased; use ``jaxhpo.hypergradients.Evolution`` for it.
    In a Linen module: ``dropout(self.make_rng("dropout"), rate, x)``.
    """
    keep = 1 - jnp.asarray(rate, x.dtype)
    return jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep, 0)


class TracedDropout(nnx.Module):
    """:func:`dropout` as an NNX module, switched by ``train()`` and ``eval()`` of the module that holds it."""

    def __init__(self, rate: jax.Array | float, *, rngs: nnx.Rngs) -> None:
        self.rate = nnx.data(jnp.asarray(rate))
        self.deterministic = False
        self.rngs = rngs["dropout"].fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.deterministic else dropout(self.rngs(), self.rate, x)
