"""BatchNorm whose running statistics have derivatives: that of Flax NNX stops their gradient.

Validation reads the running statistics, so without it a hypergradient would miss all that goes through them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class DifferentiableBatchNorm(nnx.BatchNorm):
    """Flax's BatchNorm, bit for bit, with the derivative of its running statistics by the inputs and by their past."""

    def __call__(self, x: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Any:
        old = self.mean[...], self.var[...]
        result = super().__call__(x, use_running_average, mask=mask)
        running = self.use_running_average if use_running_average is None else use_running_average
        if running or self.axis_name is not None:  # statistics shared between devices stay as Flax makes them
            return result
        features = {axis % x.ndim for axis in (self.axis if isinstance(self.axis, tuple) else (self.axis,))}
        axes = tuple(axis for axis in range(x.ndim) if axis not in features)
        x = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        batch = jnp.mean(x, axes, where=mask), jnp.var(x, axes, where=mask)
        for variable, before, now in zip((self.mean, self.var), old, batch, strict=True):
            moved = (self.momentum * before + (1 - self.momentum) * now).astype(variable[...].dtype)
            variable[...] = variable[...] + (moved - jax.lax.stop_gradient(moved))  # Flax's value, our derivative
        return result


def with_derivatives(module: nnx.Module) -> nnx.Module:
    """The module itself, each of its BatchNorms turned into one whose statistics have derivatives."""
    for _, part in nnx.iter_modules(module):
        if type(part) is nnx.BatchNorm:
            object.__setattr__(part, "__class__", DifferentiableBatchNorm)
    return module
