"""Gaussian process regression on masked tables: factors, marginal likelihood, posterior, pending points.

Notation in :mod:`jaxhpo.surrogates.kernels`. Solves go through the Cholesky factor, never through an explicit inverse:
in float32 the variance between neighbours would drown in its rounding errors.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxhpo.core import CubeSpec, pytree_dataclass, setting
from jaxhpo.surrogates.kernels import KernelParams, covariance
from jaxhpo.surrogates.linalg import Factor, cholesky, inverse, rounding, solve_lower, solve_upper, with_row

_LOG_2PI = math.log(2.0 * math.pi)


def masked_covariance(matrix: jax.Array, noise: jax.Array, mask: jax.Array) -> jax.Array:
    """``K + t2 I`` where both rows are observed, the identity elsewhere; ``[N, N]``."""
    both = mask[:, None] & mask[None, :]
    return jnp.where(both, matrix, 0.0) + jnp.diag(jnp.where(mask, noise, 1.0))


@jax.custom_vjp
def gaussian_log_density(matrix: jax.Array, residual: jax.Array, mask: jax.Array) -> jax.Array:
    """Log density of a centred Gaussian (RW eq. 5.8), with its gradient in closed form (RW eq. 5.9).

    Args:
        matrix: ``[N, N]``, :func:`masked_covariance`.
        residual: ``[N]``, z - c, and 0 where not observed.
        mask: ``bool[N]``.
    """
    return _density_forward(matrix, residual, mask)[0]


def _density_forward(matrix: jax.Array, residual: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple[Factor, jax.Array]]:
    factor = cholesky(matrix)
    b = solve_lower(factor, residual)
    value = -0.5 * b @ b - jnp.log(jnp.diagonal(factor.lower)).sum() - 0.5 * _LOG_2PI * mask.sum()
    return value, (factor, b)


def _density_backward(kept: tuple[Factor, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    factor, b = kept
    a = solve_upper(factor, b)
    return 0.5 * cotangent * (a[:, None] * a[None, :] - inverse(factor)), -cotangent * a, None


gaussian_log_density.defvjp(_density_forward, _density_backward)


@pytree_dataclass
class GPParams:
    """Hyperparameters of a Gaussian process.

    Attributes:
        kernel: lengthscales, signal variance, input warping.
        log_noise: ``f[]``, log t2.
        mean: ``f[]``, c.
    """

    kernel: KernelParams
    log_noise: jax.Array
    mean: jax.Array

    def noise(self, size: int) -> jax.Array:
        """t2, and what rounding adds to it in a table of N rows."""
        signal = jnp.exp(self.kernel.log_signal)
        return jnp.exp(self.log_noise) + rounding(size, signal.dtype) * signal


def log_likelihood(params: GPParams, spec: CubeSpec, kernel: str, x: jax.Array, z: jax.Array, mask: jax.Array) -> jax.Array:
    """Log marginal likelihood ``f[]`` of the observed rows of ``x [N, D]`` and ``z [N]``."""
    with jax.default_matmul_precision("highest"):
        x = jnp.where(mask[:, None], x, 0.0)
        matrix = covariance(params.kernel, spec, kernel, x, x)
        matrix = masked_covariance(matrix, params.noise(mask.size), mask)
        return gaussian_log_density(matrix, jnp.where(mask, z - params.mean, 0.0), mask)


@pytree_dataclass
class Posterior:
    """A Gaussian process that has seen a table.

    Attributes:
        params: its hyperparameters.
        x: ``[N, D]``.
        mask: ``bool[N]``, rows with a loss and pending ones.
        factor: L.
        weights: ``[N]``, b.
        spec, kernel: static.
    """

    params: GPParams
    x: jax.Array
    mask: jax.Array
    factor: Factor
    weights: jax.Array
    spec: CubeSpec = setting(static=True)
    kernel: str = setting("matern52", static=True)

    @property
    def noise(self) -> jax.Array:
        return self.params.noise(self.mask.size)

    @property
    def signal(self) -> jax.Array:
        return jnp.exp(self.params.kernel.log_signal)


def condition(params: GPParams, spec: CubeSpec, kernel: str, x: jax.Array, z: jax.Array, mask: jax.Array) -> Posterior:
    """The posterior given the rows of ``mask bool[N]`` (Rasmussen & Williams 2006, algorithm 2.1).

    Args:
        params: ``fit`` finds them, as ``model.unpack(theta)[0]``.
        spec: the cube, ``space.spec``.
        kernel: one of ``KERNELS``.
        x: ``[N, D]``, points of the cube as :func:`jaxhpo.surrogates.inputs_of` makes them.
        z: ``[N]``, losses, standardised as by ``model.targets(theta, excess(loss, mask), mask)[0]``; means, variances and
            samples are in their units.
        mask: which rows are observations; a power of two of rows is fastest.
    """
    x = jnp.where(mask[:, None], x, 0.0)
    with jax.default_matmul_precision("highest"):
        matrix = covariance(params.kernel, spec, kernel, x, x)
    factor = cholesky(masked_covariance(matrix, params.noise(mask.size), mask))
    weights = solve_lower(factor, jnp.where(mask, z - params.mean, 0.0))
    return Posterior(params, x, mask, factor, weights, spec, kernel)


def cross(posterior: Posterior, points: jax.Array) -> jax.Array:
    """``v = L^-1 k`` for points ``[M, D]``: ``[N, M]``."""
    with jax.default_matmul_precision("highest"):
        k = covariance(posterior.params.kernel, posterior.spec, posterior.kernel, posterior.x, points)
        return solve_lower(posterior.factor, jnp.where(posterior.mask[:, None], k, 0.0))


def moments(posterior: Posterior, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the signal, ``[M]`` each (RW eqs. 2.25 and 2.26), from ``v [N, M]``."""
    with jax.default_matmul_precision("highest"):
        mean = posterior.params.mean + posterior.weights @ v
    floor = float(jnp.finfo(v.dtype).eps) * posterior.signal
    return mean, jnp.maximum(posterior.signal - (v * v).sum(0), floor)


def predict(posterior: Posterior, points: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of the signal at points ``[M, D]``, ``[M]`` each."""
    return moments(posterior, cross(posterior, points))


def fitted(posterior: Posterior) -> jax.Array:
    """Posterior mean at the rows of the table, ``[N]``; meaningless where not observed."""
    with jax.default_matmul_precision("highest"):
        a = solve_upper(posterior.factor, posterior.weights)
        z = posterior.params.mean + posterior.factor.lower @ posterior.weights
    return z - posterior.noise * a  # K a = z - c and K = signal + noise


def joint_samples(key: jax.Array, posterior: Posterior, points: jax.Array, num_samples: int) -> jax.Array:
    """Samples of the signal at points ``[M, D]`` together, ``[S, M]``."""
    v = cross(posterior, points)
    mean, _ = moments(posterior, v)
    with jax.default_matmul_precision("highest"):
        prior = covariance(posterior.params.kernel, posterior.spec, posterior.kernel, points, points)
        jitter = rounding(max(v.shape), v.dtype) * posterior.signal
        factor = cholesky(prior - v.T @ v + jitter * jnp.eye(points.shape[0], dtype=v.dtype))
        return mean + jax.random.normal(key, (num_samples, points.shape[0]), v.dtype) @ factor.lower.T


def add_pending(posterior: Posterior, point: jax.Array) -> Posterior:
    """The posterior with one more point ``[D]`` whose loss is not known yet, in the row after the last in use, if there is one.

    It is taken to be the mean there (the kriging believer of Ginsbourger, Le Riche & Carraro, "Kriging is well-suited to
    parallelize optimization", 2010): means stay, the variance falls. A rank-one update of L, O(N^2).
    """
    v = cross(posterior, point[None, :])[:, 0]
    size = posterior.mask.size
    row = size - jnp.argmax(posterior.mask[::-1])  # after the last one, so that L stays triangular
    row = jnp.where(posterior.mask.any(), row, 0)
    diagonal = jnp.sqrt(jnp.maximum(posterior.signal - (v * v).sum(), 0.0) + posterior.noise)
    fits = row < size
    grown = with_row(posterior.factor, row, jnp.where(jnp.arange(size) == row, diagonal, v))
    pick = lambda new, old: jnp.where(fits, new, old)
    return dataclasses.replace(
        posterior,
        x=pick(posterior.x.at[row].set(point), posterior.x),
        mask=pick(posterior.mask.at[row].set(True), posterior.mask),
        factor=jax.tree.map(pick, grown, posterior.factor),
        # b gains (z - mean) / diagonal, which is 0 for a believer.
    )
