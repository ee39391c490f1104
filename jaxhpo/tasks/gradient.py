"""The gradient that a training step takes, and how it is itself differentiated.

Reverse mode through a gradient differentiates a backward pass backwards. In mixed mode it is one forward derivative of the
gradient instead: Kemaev et al., "Scalable meta-learning via mixed-mode differentiation", 2025 (MixFlow-MG). By the symmetry
of second derivatives a cotangent ``u`` of the gradient ``dL/dp`` pulls back to the derivative of ``dL/d(p, rest)`` along it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_MIXED = contextvars.ContextVar("mixed_mode", default=False)


@contextlib.contextmanager
def mixed_mode(active: bool = True) -> Generator[None]:
    """While this is entered, what is traced takes gradients that are differentiated in mixed mode, by reverse mode alone."""
    token = _MIXED.set(active)
    try:
        yield
    finally:
        _MIXED.reset(token)


def value_and_grad(loss: Callable[..., tuple[jax.Array, Any]], params: Any, *rest: Any) -> tuple[tuple[jax.Array, Any], Any]:
    """``jax.value_and_grad(loss, has_aux=True)(params, *rest)``; a training step calls it so that estimators have a say.

    Args:
        loss: ``(params, *rest) -> (scalar, aux)``, closing over nothing that is traced.
        params: floats.
        rest: everything else that is traced; may hold labels and other values that are no arrays, too.
    """
    if not _MIXED.get():
        return jax.value_and_grad(loss, has_aux=True)(params, *rest)
    leaves, treedef = jax.tree.flatten(rest)
    is_array = [isinstance(x, (jax.Array, np.ndarray, np.generic)) for x in leaves]
    is_float = [a and jnp.issubdtype(x.dtype, jnp.floating) for a, x in zip(is_array, leaves, strict=True)]
    fixed = [None if a else x for a, x in zip(is_array, leaves, strict=True)]

    def rebuilt(floats: list[Any], others: list[Any]) -> Any:
        float_, other = iter(floats), iter(others)
        kinds = zip(is_array, is_float, fixed, strict=True)
        return jax.tree.unflatten(treedef, [next(float_) if f else next(other) if a else x for a, f, x in kinds])

    def plain(params: Any, floats: list[Any], others: list[Any]) -> tuple[jax.Array, Any]:
        return loss(params, *rebuilt(floats, others))

    @jax.custom_vjp
    def gradient(params: Any, floats: list[Any], others: list[Any]) -> Any:
        return jax.value_and_grad(plain, has_aux=True)(params, floats, others)

    def forward(params: Any, floats: list[Any], others: list[Any]) -> tuple[Any, Any]:
        return gradient(params, floats, others), (params, floats, others)

    def backward(saved: Any, cotangents: Any) -> Any:
        params, floats, others = saved
        (loss_bar, aux_bar), along = cotangents
        by_all = jax.grad(lambda params, floats: plain(params, floats, others)[0], argnums=(0, 1))
        first, second = jax.jvp(lambda params: by_all(params, floats), (params,), (along,))
        total = jax.tree.map(lambda a, b: (loss_bar * a + b).astype(a.dtype), first, second)
        aux = lambda params, floats: _floats(plain(params, floats, others)[1])
        if jax.eval_shape(aux, params, floats):
            _, pull = jax.vjp(aux, params, floats)
            total = jax.tree.map(jnp.add, total, pull(_floats(aux_bar)))
        return (*total, None)

    gradient.defvjp(forward, backward)
    floats = [x for x, f in zip(leaves, is_float, strict=True) if f]
    others = [x for x, a, f in zip(leaves, is_array, is_float, strict=True) if a and not f]
    return gradient(params, floats, others)


def _floats(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
