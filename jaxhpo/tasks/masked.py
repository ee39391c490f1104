"""Width as a traced hyperparameter: layers of a fixed greatest width, of whose units only the first ones are active.

A hidden layer with greatest width ``W`` and ``width`` active units behaves as an unmasked layer of that width:

- weights are drawn with the variance of the small layer (its fan-in, not ``W``), and are zero at inactive units;
- activations are multiplied by the mask, so that inactive units send nothing on;
- hence the gradients of all weights from or to an inactive unit are zero, these weights stay zero under momentum,
  adaptive steps and weight decay alike, and norms over a layer (clipping, trust ratios) are those of the small one.

The mask comes last, after the activation function: a sigmoid of zero is not zero. Layers that mix units by
statistics over the width (LayerNorm) need the mask inside and are not covered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[..., jax.Array]
LECUN = jax.nn.initializers.lecun_normal()
Width = jax.Array | int
"""Active units: a traced or a plain whole number between 1 and the greatest width."""


def width_mask(width: Width, max_width: int, dtype: Any = jnp.float32) -> jax.Array:
    """1 for the first ``width`` units, 0 for the others, ``[max_width]``."""
    return (jnp.arange(max_width) < width).astype(dtype)


def masked_init(init: Initializer, active_in: Width, active_out: Width, *, mode: str = "fan_in") -> Initializer:
    """The initializer of a kernel ``[..., in, out]`` of which only the first units on both sides are active.

    ``init`` must scale its variance by one over the fan that ``mode`` names, as the Lecun and He initializers do by
    ``fan_in``, Glorot's by ``fan_avg``; ``none`` leaves the variance as it is.

    Raises:
        ValueError: for another ``mode``.
    """
    if mode not in ("fan_in", "fan_out", "fan_avg", "none"):
        raise ValueError(f"mode = {mode!r}: must be one of 'fan_in', 'fan_out', 'fan_avg', 'none'")

    def masked(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32, **kwargs: Any) -> jax.Array:
        full, active = shape[-2:], (jnp.asarray(active_in, jnp.float32), jnp.asarray(active_out, jnp.float32))
        ratios = {
            "fan_in": full[0] / active[0],
            "fan_out": full[1] / active[1],
            "fan_avg": (full[0] + full[1]) / (active[0] + active[1]),
            "none": jnp.ones(()),
        }
        kernel = init(key, shape, dtype, **kwargs) * jnp.sqrt(ratios[mode]).astype(dtype)
        return kernel * width_mask(active_in, full[0], dtype)[:, None] * width_mask(active_out, full[1], dtype)

    return masked


class MaskedLinear(nnx.Linear):
    """A dense layer with inactive units: ``activation(x @ kernel + bias) * mask``, ``[..., in] -> [..., out]``.

    Args:
        in_features, out_features: the greatest widths, static.
        active_in, active_out: the active units on either side, traced or plain; None for all.
        activation: None for a linear layer.
        kernel_init: an initializer whose variance goes with one over the fan that ``mode`` names.
        kwargs: as those of ``nnx.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rngs: nnx.Rngs,
        active_in: Width | None = None,
        active_out: Width | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        kernel_init: Initializer = LECUN,
        mode: str = "fan_in",
        **kwargs: Any,
    ) -> None:
        active_in = in_features if active_in is None else active_in
        init = masked_init(kernel_init, active_in, out_features if active_out is None else active_out, mode=mode)
        super().__init__(in_features, out_features, kernel_init=init, rngs=rngs, **kwargs)
        self.activation = activation
        self.mask = nnx.data(None if active_out is None else width_mask(active_out, out_features))

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        y = super().__call__(inputs, out_sharding)
        y = y if self.activation is None else self.activation(y)
        return y if self.mask is None else y * self.mask.astype(y.dtype)
