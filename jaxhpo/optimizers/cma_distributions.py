"""The distributions of :mod:`jaxhpo.optimizers.cma_es`, and how each follows the ranks of its samples: pure functions.

Equation numbers are those of Hansen, "The CMA evolution strategy: a tutorial", arXiv:1604.00772, 2016; the other papers are
named in :mod:`jaxhpo.optimizers.cma_es`. No LAPACK: eigenvectors come from :func:`jaxhpo.optimizers.eigen.eigh`, started at
those of the generation before. A Cholesky factor in place of the root of C would do without them, but then the path of the
step size is another one than the tutorial's.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from jaxhpo.core import Array, pytree_dataclass
from jaxhpo.optimizers.eigen import eigh

_FIRST_RATE, _RATE_DAMPING = 1.0, 1.5  # delta and alpha of Akimoto et al. 2019


@pytree_dataclass
class Gaussian:
    """The distribution of floats and integers, of ``N`` dimensions, and its paths.

    Attributes:
        mean: ``f32[N]``; the cube is reflected at its bounds for floats, so that it may lie outside.
        sigma: ``f32[]``, the step size.
        cov: ``f32[N, N]``, or its diagonal ``f32[N]``.
        basis: ``f32[N, N]``, eigenvectors of ``cov``; ``f32[0, 0]`` with a diagonal.
        scales: ``f32[N]``, roots of the eigenvalues.
        path_sigma, path_c: ``f32[N]``, the evolution paths.
        margin: ``f32[N]``, the factor on the steps of integers (A of Hamano et al. 2022); 1 for floats.
        generation: ``i32[]``, updates since the start.
    """

    mean: jax.Array
    sigma: jax.Array
    cov: jax.Array
    basis: jax.Array
    scales: jax.Array
    path_sigma: jax.Array
    path_c: jax.Array
    margin: jax.Array
    generation: jax.Array

    @classmethod
    def start(cls, mean: jax.Array, sigma: Array | float, separable: bool) -> Gaussian:
        """An isotropic one."""
        size, dtype = mean.shape[0], mean.dtype
        one, zero = jnp.ones(size, dtype), jnp.zeros(size, dtype)
        basis = jnp.zeros((0, 0), dtype) if separable else jnp.eye(size, dtype=dtype)
        cov = one if separable else basis
        return cls(mean, jnp.asarray(sigma, dtype), cov, basis, one, zero, zero, one, jnp.zeros((), jnp.int32))

    @property
    def variances(self) -> jax.Array:
        """The diagonal of C, ``f32[N]``."""
        return self.cov if self.cov.ndim == 1 else jnp.diagonal(self.cov)

    def coloured(self, z: Array) -> jax.Array:
        """``y = B D z``, ``[..., N]`` (eq. 39)."""
        return jnp.asarray(z * self.scales) if self.cov.ndim == 1 else _product(z * self.scales, self.basis.T)

    def whitened(self, y: Array) -> jax.Array:
        """``C^(-1/2) y``, ``[..., N]``."""
        return y / self.scales if self.cov.ndim == 1 else _product(_product(y, self.basis) / self.scales, self.basis.T)


@pytree_dataclass
class Categories:
    """The distributions of ``C`` choices with at most ``K`` options, and the adaptation of their rate.

    Attributes:
        chance: ``f32[C, K]``, 0 beyond the options that there are.
        path: ``f32[C, K]``, the cumulated natural gradient, whitened.
        gamma: ``f32[]``, the expected square of its length under random ranks.
        damping: ``f32[]``, Delta: the inverse of the rate.
    """

    chance: jax.Array
    path: jax.Array
    gamma: jax.Array
    damping: jax.Array


class Rates(NamedTuple):
    """Weights ``f32[M]`` and learning rates of a population, see :func:`rates_of`."""

    weights: jax.Array
    c_sigma: jax.Array
    d_sigma: jax.Array
    c_c: jax.Array
    c_1: jax.Array
    c_mu: jax.Array


def _product(a: Array, b: Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _chi(size: int) -> float:
    """E ||N(0, I)||, as the tutorial has it below eq. 44."""
    return math.sqrt(size) * (1.0 - 1.0 / (4.0 * size) + 1.0 / (21.0 * size * size))


def rates_of(population: Array, rows: int, size: int, separable: bool, active: Array | float, dtype: jnp.dtype) -> Rates:
    """The tutorial's table 1 for a traced population size and ``N = size``; weights beyond the population are 0."""
    count, n = jnp.asarray(population).astype(dtype), float(size)
    rank = np.arange(1, rows + 1)
    raw = jnp.log(0.5 * (count + 1.0)) - jnp.log(rank).astype(dtype)  # eq. 49
    raw = jnp.where(rank <= count, raw, 0.0)
    above, below = jnp.maximum(raw, 0.0), jnp.maximum(-raw, 0.0)
    mu = above.sum() ** 2 / (above**2).sum()
    mu_below = below.sum() ** 2 / (below**2).sum()
    c_sigma = (mu + 2.0) / (n + mu + 5.0)  # eq. 55
    d_sigma = 1.0 + 2.0 * jnp.maximum(0.0, jnp.sqrt((mu - 1.0) / (n + 1.0)) - 1.0) + c_sigma  # eq. 55
    c_c = (4.0 + mu / n) / (n + 4.0 + 2.0 * mu / n)  # eq. 56
    faster = (n + 2.0) / 3.0 if separable else 1.0  # Ros & Hansen 2008
    c_1 = faster * 2.0 / ((n + 1.3) ** 2 + mu)  # eq. 57
    c_mu = jnp.minimum(1.0 - c_1, faster * 2.0 * (mu - 2.0 + 1.0 / mu) / ((n + 2.0) ** 2 + mu))  # eq. 58
    c_mu = jnp.maximum(c_mu, 1e-8)  # 0 with a single parent
    alpha = jnp.minimum(1.0 + c_1 / c_mu, 1.0 + 2.0 * mu_below / (mu + 2.0))  # eq. 50, 51
    alpha = active * jnp.minimum(alpha, (1.0 - c_1 - c_mu) / (n * c_mu))  # eq. 52
    weights = above / above.sum() - alpha * below / below.sum()  # eq. 53
    return Rates(weights, c_sigma, d_sigma, c_c, c_1, c_mu)


def weights_by_rank(weights: Array, loss: Array, used: Array) -> jax.Array:
    """The weight of every row ``f32[M]``, of which those ``used`` have answered; infinite losses are failures.

    A failure never has a positive weight, whatever its rank: all failures share the mean of what is left of theirs, and
    the positive weights of the others sum to one as before.
    """
    failed = used & ~jnp.isfinite(loss)
    order = jnp.lexsort((jnp.where(used, loss, jnp.inf), ~used))
    by_row = jnp.zeros_like(weights).at[order].set(weights)
    shared = jnp.where(failed, jnp.minimum(by_row, 0.0), 0.0).sum() / jnp.maximum(failed.sum(), 1)
    by_row = jnp.where(used, jnp.where(failed, shared, by_row), 0.0)
    positive = jnp.maximum(by_row, 0.0)
    total = positive.sum()
    scale = jnp.where(failed.any() & (total > 0.0), 1.0 / jnp.where(total > 0.0, total, 1.0), 1.0)
    return jnp.where(by_row > 0.0, by_row * scale, by_row)


def adapted(gaussian: Gaussian, rates: Rates, steps: Array, weights: Array, late: Array) -> Gaussian:
    """The Gaussian after one generation (eq. 41 to 47).

    Args:
        gaussian: of N dimensions.
        rates: of its population.
        steps: ``f32[M, N]``, y: samples relative to the mean in units of sigma.
        weights: ``f32[M]``, by rank; 0 where there is no sample.
        late: ``bool[M]``, samples of an older distribution.
    """
    size = steps.shape[1]
    chi = _chi(size)
    lengths = jnp.linalg.norm(gaussian.whitened(steps), axis=1)
    # Hansen 2011: an external solution is no further away than samples hardly ever are.
    most = math.sqrt(size) + 2.0 * size / (size + 2.0)
    shorter = jnp.where(late & (lengths > most), most / jnp.where(lengths > 0.0, lengths, 1.0), 1.0)
    steps, lengths = steps * shorter[:, None], lengths * shorter
    positive = jnp.maximum(weights, 0.0)
    mu = 1.0 / jnp.maximum((positive**2).sum(), 1e-12)  # eq. 8, of those really used

    mean_step = _product(positive, steps)  # eq. 41
    mean = gaussian.mean + gaussian.sigma * mean_step  # eq. 42
    c_sigma, c_c = rates.c_sigma, rates.c_c
    path_sigma = (1.0 - c_sigma) * gaussian.path_sigma  # eq. 43
    path_sigma += jnp.sqrt(c_sigma * (2.0 - c_sigma) * mu) * gaussian.whitened(mean_step)
    length = jnp.linalg.norm(path_sigma)
    sigma = gaussian.sigma * jnp.exp(jnp.minimum(c_sigma / rates.d_sigma * (length / chi - 1.0), 1.0))  # eq. 44

    generation = gaussian.generation + 1
    settled = jnp.sqrt(1.0 - (1.0 - c_sigma) ** (2.0 * generation))
    h_sigma = jnp.where(length / settled < (1.4 + 2.0 / (size + 1.0)) * chi, 1.0, 0.0)
    path_c = (1.0 - c_c) * gaussian.path_c + h_sigma * jnp.sqrt(c_c * (2.0 - c_c) * mu) * mean_step  # eq. 45
    scaled = weights * jnp.where(weights < 0.0, size / jnp.maximum(lengths**2, 1e-12), 1.0)  # eq. 46
    delta = (1.0 - h_sigma) * c_c * (2.0 - c_c)
    keep = 1.0 + rates.c_1 * delta - rates.c_1 - rates.c_mu * weights.sum()
    if gaussian.cov.ndim == 1:
        cov = keep * gaussian.cov + rates.c_1 * path_c**2 + rates.c_mu * _product(scaled, steps**2)  # eq. 47, the diagonal
        cov = jnp.maximum(cov, jnp.finfo(cov.dtype).tiny)
        basis, scales = gaussian.basis, jnp.sqrt(cov)
    else:
        rank_mu = _product((scaled[:, None] * steps).T, steps)
        cov = keep * gaussian.cov + rates.c_1 * jnp.outer(path_c, path_c) + rates.c_mu * rank_mu  # eq. 47
        cov = 0.5 * (cov + cov.T)
        values, basis = eigh(cov, gaussian.basis)
        # Eigenvalues below the rounding errors of the largest are not known.
        scales = jnp.sqrt(jnp.maximum(values, jnp.finfo(cov.dtype).eps * jnp.max(values)))
    return Gaussian(mean, sigma.astype(mean.dtype), cov, basis, scales, path_sigma, path_c, gaussian.margin, generation)


def with_margin(gaussian: Gaussian, edges: tuple[Array, Array], ints: np.ndarray, least: float) -> Gaussian:
    """Mean and steps of integers corrected so that levels beside the mean's keep the chance ``least`` (Hamano et al. 2022).

    Args:
        gaussian: of N dimensions.
        edges: below and above the mean's level, ``f32[I]`` each; the same edge twice at the lowest and the highest level.
        ints: ``i32[I]``, which of the dimensions are integers.
        least: alpha.
    """
    low, high = edges
    mean, spread = gaussian.mean[ints], gaussian.sigma * jnp.sqrt(gaussian.variances[ints])
    wide = spread * gaussian.margin[ints]
    below, above = ndtr((low - mean) / wide), ndtr((mean - high) / wide)
    outermost = low == high
    # At an end: the mean no further from the only edge than where the other side has the chance alpha.
    reach = -ndtri(jnp.asarray(least, mean.dtype)) * wide
    at_end = jnp.where(jnp.minimum(below, above) < least, high + jnp.where(mean > high, reach, -reach), mean)
    # Between two edges: both sides at least alpha / 2, with what is missing taken from the larger one.
    half = 0.5 * least
    low_chance, high_chance = jnp.maximum(below, half), jnp.maximum(above, half)
    inside = jnp.maximum(1.0 - below - above, 0.0)
    excess = 1.0 - low_chance - high_chance - inside
    spare = jnp.maximum(low_chance + inside + high_chance - 3.0 * half, half)
    low_chance, high_chance = (
        jnp.clip(chance + excess * (chance - half) / spare, 1e-7, 0.5 - 1e-5) for chance in (low_chance, high_chance)
    )
    to_low, to_high = -ndtri(low_chance), -ndtri(high_chance)
    between = (low * to_high + high * to_low) / (to_low + to_high)
    margin = jnp.where(outermost, gaussian.margin[ints], (high - low) / ((to_low + to_high) * spread))
    return dataclasses.replace(
        gaussian,
        mean=gaussian.mean.at[ints].set(jnp.where(outermost, at_end, between)),
        margin=gaussian.margin.at[ints].set(margin),
    )


def with_options(categories: Categories, counts: np.ndarray, options: Array, weights: Array, least: float) -> Categories:
    """The categorical distributions after one generation: a natural gradient step of adaptive length.

    Args:
        categories: of C choices.
        counts: ``i32[C]``, how many options there are of each.
        options: ``i32[M, C]``, the samples'.
        weights: ``f32[M]``, by rank; negative ones count as 0 (Hamano et al. 2024).
        least: the chance that a choice keeps for other options than the best, evenly among them.
    """
    chance = categories.chance
    there = np.arange(chance.shape[1]) < counts[:, None]
    weights = jnp.maximum(weights, 0.0)
    chosen = (options[:, :, None] == np.arange(chance.shape[1])).astype(chance.dtype)
    gradient = jnp.einsum("m,mck->ck", weights, chosen) - weights.sum() * chance
    white = jnp.where(there, gradient / jnp.sqrt(jnp.where(there, chance, 1.0)), 0.0)  # in the metric of Fisher
    length = jnp.sqrt((white**2).sum()) + 1e-30
    rate = _FIRST_RATE / categories.damping  # Akimoto et al. 2019: the length of the step
    moved = chance + rate * gradient / length
    beta = rate / math.sqrt(max(int((counts - 1).sum()), 1))
    path = (1.0 - beta) * categories.path + jnp.sqrt(beta * (2.0 - beta)) * white / length
    gamma = (1.0 - beta) ** 2 * categories.gamma + beta * (2.0 - beta)
    damping = categories.damping * jnp.exp(beta * (gamma - (path**2).sum() / _RATE_DAMPING))
    # A margin, so that no option dies out (Hamano et al. 2024); what is above it gives way in proportion.
    low = np.where(counts > 1, least / np.maximum(counts - 1, 1), 1.0)[:, None]
    above = jnp.where(there, jnp.maximum(moved, low) - low, 0.0)
    left = 1.0 - low * counts[:, None]
    moved = jnp.where(there, low + above * left / jnp.maximum(above.sum(1, keepdims=True), 1e-30), 0.0)
    moved = jnp.where(above.sum(1, keepdims=True) > 0.0, moved, there / counts[:, None])
    return Categories(moved.astype(chance.dtype), path, gamma, jnp.maximum(damping, _FIRST_RATE))


def even_categories(counts: np.ndarray, dtype: jnp.dtype) -> Categories:
    """All options equally likely."""
    there = np.arange(max([*counts, 1])) < counts[:, None]
    chance = jnp.asarray(there / np.maximum(counts, 1)[:, None], dtype)
    return Categories(chance, jnp.zeros_like(chance), jnp.zeros((), dtype), jnp.ones((), dtype))
