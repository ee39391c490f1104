"""A learning rate that is moved by its own hypergradient while training goes on.

Baydin, Cornish, Martinez Rubio, Schmidt & Wood, "Online learning rate adaptation with hypergradient descent", ICLR 2018.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxhpo.core import Array


class OnlineState(NamedTuple):
    """State of :func:`hypergradient_descent`.

    Attributes:
        learning_rate: ``f[]``, the present rate.
        direction: the last update for a rate of one, shaped as the parameters: the derivative of the update by the rate.
        inner: state of the inner optimizer.
    """

    learning_rate: Array
    direction: Any
    inner: Any


def hypergradient_descent(
    optimizer: Callable[..., optax.GradientTransformation],
    learning_rate: Array | float,
    hyper_learning_rate: Array | float,
    multiplicative: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optax optimizer whose learning rate descends along the inner product of gradient and last update.

    The paper's rule for a general update: after ``u_t = rate_t * d_t`` the loss has the derivative ``g . d_t`` by the rate,
    where ``g`` is the next gradient; so the rate is lowered where two steps point against each other, and raised where
    they agree. With ``hyper_learning_rate=0`` it is the inner optimizer itself. Nothing keeps the rate positive.

    All numbers may be traced, and the whole is differentiable by them.

    Args:
        optimizer: called with a learning rate; its updates must be proportional to it, as those of ``optax.sgd``, with or
            without momentum, and of ``optax.adam`` are. Other settings by ``functools.partial``.
        learning_rate: the first rate.
        hyper_learning_rate: the rate of the rate; in units of rate per squared gradient for plain descent, without unit where
            ``multiplicative``.
        multiplicative: change the rate by a factor instead, ``1 - hyper_learning_rate * cos(g, d)``, whatever the size of
            the gradients.

    Returns:
        The transformation; its state holds the present ``learning_rate``.
    """
    inner = optax.with_extra_args_support(optimizer(1.0))

    def init(params: Any) -> OnlineState:
        direction = jax.tree.map(jnp.zeros_like, params)
        return OnlineState(jnp.asarray(learning_rate, _dtype_of(params)), direction, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, OnlineState]:
        slope = _dot(updates, state.direction)  # g . d, the derivative of the loss by the last rate
        if multiplicative:
            change = 1.0 - hyper_learning_rate * slope / (_norm(updates) * _norm(state.direction))
            rate = state.learning_rate * change
        else:
            rate = state.learning_rate - hyper_learning_rate * slope
        rate = rate.astype(state.learning_rate.dtype)
        direction, inner_state = inner.update(updates, state.inner, params, **extra)
        updates = jax.tree.map(lambda d: (rate * d).astype(d.dtype), direction)
        return updates, OnlineState(rate, direction, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _dtype_of(tree: Any) -> Any:
    return jnp.result_type(*jax.tree.leaves(tree))


def _dot(a: Any, b: Any) -> Array:
    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))))


def _norm(tree: Any) -> Array:
    """The Euclidean norm of a tree; 1 for zeros, where it is not differentiable."""
    square = _dot(tree, tree)
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))
