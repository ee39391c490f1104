"""Kernels over the unit cube: Matern-5/2 or RBF on floats and integers, Hamming on choices, their product for both.

Notation of this room:

    symbol      shape     what
    N, n        static    capacity of a table, and how many of its rows hold an observation
    D, M        static    dimensions of the cube, points at which something is predicted
    x           [N, D]    inputs: floats and integers as cube coordinates (integers at the middle of their level), choices as
                          the number of their option
    y, z        [N]       losses, and losses warped and standardised
    l_d         [D]       lengthscales
    s2, t2      []        variances of the signal and of the noise, both of z
    c           []        constant mean of z
    K, L        [N, N]    covariance of z at x, and its lower Cholesky factor
    a, b        [N]       a = K^-1 (z - c), b = L^-1 (z - c)
    k, v        [N, M]    covariance with new points, v = L^-1 k

Rows of a table without an observation have the identity in K and 0 elsewhere: they change nothing.
Rasmussen & Williams, "Gaussian processes for machine learning", MIT Press 2006 (RW).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import CubeSpec, pytree_dataclass

KERNELS = ("matern52", "rbf")

_SQRT5 = math.sqrt(5.0)
_EDGE = 1e-6  # warped inputs stay this far from the bounds, where the slope of the warp may be infinite


@pytree_dataclass
class KernelParams:
    """What a kernel depends on.

    Attributes:
        log_lengthscale: ``f[D]``, log l_d; of a choice, the log of 1 over the weight of a difference.
        log_signal: ``f[]``, log s2.
        input_warp: ``f[2, D]``, log of the exponents of :func:`kumaraswamy`, or None for no warping.
    """

    log_lengthscale: jax.Array
    log_signal: jax.Array
    input_warp: jax.Array | None = None


def inputs_of(spec: CubeSpec, cube: jax.Array) -> jax.Array:
    """Cube coordinates as inputs of a kernel, ``[..., D]``; differentiable in floats."""
    if spec.is_float.all():
        return jnp.asarray(cube)
    level = spec.level_of(cube)
    middle = jnp.where(spec.is_choice, level.astype(cube.dtype), spec.cube_of(level).astype(cube.dtype))
    return jnp.where(spec.is_float, cube, middle)


@jax.custom_jvp
def matern52(r2: jax.Array) -> jax.Array:
    """Matern-5/2 correlation of a squared scaled distance (RW eq. 4.17); differentiable at 0."""
    r = _SQRT5 * jnp.sqrt(r2)
    return (1.0 + r + r * r / 3.0) * jnp.exp(-r)


@matern52.defjvp
def _matern52_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (r2,), (dot,) = primals, tangents
    r = _SQRT5 * jnp.sqrt(r2)
    decay = jnp.exp(-r)
    return (1.0 + r + r * r / 3.0) * decay, -5.0 / 6.0 * (1.0 + r) * decay * dot


def rbf(r2: jax.Array) -> jax.Array:
    """Squared exponential correlation of a squared scaled distance (RW eq. 4.9)."""
    return jnp.exp(-0.5 * r2)


def kumaraswamy(log_exponents: jax.Array, x: jax.Array) -> jax.Array:
    """``1 - (1 - x^p)^q``, a monotone map of [0, 1] onto itself, ``[..., D]``; Snoek et al., ICML 2014, use a Beta CDF."""
    p, q = jnp.exp(log_exponents)
    inner = jnp.power(jnp.clip(x, _EDGE, 1.0 - _EDGE), p)
    return 1.0 - jnp.power(jnp.clip(1.0 - inner, _EDGE), q)


def covariance(params: KernelParams, spec: CubeSpec, kernel: str, x: jax.Array, other: jax.Array) -> jax.Array:
    """Covariance of the signal between inputs ``[M, D]`` and ``[N, D]`` of :func:`inputs_of`, as ``[M, N]``.

    Raises:
        ValueError: for a kernel that is not one of ``KERNELS``, and for inputs of another D.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel {kernel!r}: must be one of {', '.join(KERNELS)}")
    if x.shape[-1] != spec.num_dims or other.shape[-1] != spec.num_dims:
        raise ValueError(f"inputs of shapes {x.shape} and {other.shape}: must have {spec.num_dims} columns, as the space")
    if params.input_warp is not None:
        warps = spec.is_float
        x = jnp.where(warps, kumaraswamy(params.input_warp, x), x)
        other = jnp.where(warps, kumaraswamy(params.input_warp, other), other)
    inverse = jnp.exp(-params.log_lengthscale)
    ordered, choices = np.flatnonzero(~spec.is_choice), np.flatnonzero(spec.is_choice)
    exponent = params.log_signal
    correlation: jax.Array | float = 1.0
    if ordered.size:
        scaled, scaled_other = x[:, ordered] * inverse[ordered], other[:, ordered] * inverse[ordered]
        r2 = ((scaled[:, None, :] - scaled_other[None, :, :]) ** 2).sum(-1)
        correlation = matern52(r2) if kernel == "matern52" else rbf(r2)
    if choices.size:
        differs = x[:, None, choices] != other[None, :, choices]
        exponent = exponent - jnp.where(differs, inverse[choices], 0.0).sum(-1)
    return correlation * jnp.exp(exponent)
