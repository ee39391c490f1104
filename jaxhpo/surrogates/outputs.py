"""Losses made fit for a Gaussian process: shifted, scaled, warped by a power that the fit chooses, standardised."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_LARGEST = 1e37  # losses beyond count as this: their differences would overflow
_HIGHEST = 1e4  # winsorised beyond: this many times as far from the best as the median


def masked_quantile(values: jax.Array, mask: jax.Array, share: float) -> jax.Array:
    """The value at ``share`` (0 to 1) of the masked ones in order, the lower of two; inf where there are none."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    return ordered[jnp.floor(share * jnp.maximum(mask.sum() - 1, 0)).astype(jnp.int32)]


def excess(loss: jax.Array, mask: jax.Array) -> jax.Array:
    """How far losses ``[N]`` lie above the best, in units of the median's distance, winsorised; 0 where masked out."""
    loss = jnp.clip(loss, -_LARGEST, _LARGEST)
    best, median = masked_quantile(loss, mask, 0.0), masked_quantile(loss, mask, 0.5)
    highest = jnp.max(jnp.where(mask, loss, -jnp.inf))
    scale = jnp.where(median > best, median - best, highest - best)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1.0)
    return jnp.where(mask, jnp.clip((loss - best) / scale, 0.0, _HIGHEST), 0.0)


def power_warp(v: jax.Array, power: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``((1 + v)^power - 1) / power`` (Box & Cox 1964, eq. 2) and the log of its slope; the logarithm at power 0."""
    w = jnp.log1p(v)
    exponent = power * w
    small = jnp.abs(exponent) < 1e-3
    ratio = jnp.where(small, 1.0 + exponent * (0.5 + exponent / 6.0), jnp.expm1(exponent) / jnp.where(small, 1.0, exponent))
    return w * ratio, (power - 1.0) * w


def standardised(v: jax.Array, mask: jax.Array, power: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Warped and standardised losses ``z [N]``, 0 where masked out, and ``log |dz / dv|`` summed over the observed."""
    count = jnp.maximum(mask.sum(), 1)
    t, log_slope = power_warp(v, power)
    t = t - jnp.sum(jnp.where(mask, t, 0.0)) / count
    variance = jnp.sum(jnp.where(mask, t * t, 0.0)) / count
    variance = jnp.where(variance > 1e-12, variance, 1.0)
    log_jacobian = jnp.sum(jnp.where(mask, log_slope, 0.0)) - 0.5 * mask.sum() * jnp.log(variance)
    return jnp.where(mask, t / jnp.sqrt(variance), 0.0), log_jacobian
