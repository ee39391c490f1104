"""What a next trial is worth, from the posterior of the loss; higher is better.

Notation in :mod:`jaxhpo.surrogates.kernels`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jaxhpo.surrogates.kernels import covariance
from jaxhpo.surrogates.linalg import cholesky, rounding, solve_lower, solve_upper
from jaxhpo.surrogates.regression import Posterior, cross, fitted, masked_covariance, moments, predict

ACQUISITIONS = ("log_ei", "noisy_ei", "ucb", "thompson")

_LOG_ROOT_2PI = 0.5 * math.log(2.0 * math.pi)
_FRACTION_TERMS = 16


def log_h(u: jax.Array) -> jax.Array:
    """``log(phi(u) + u Phi(u))``, accurate for any u (the log of Ament et al. 2023, eq. 8).

    Far below 0 the sum cancels. There it is the first repeated integral of the normal density, whose ratios obey
    ``r_(n-1) = 1 / (x + n r_n)`` with ``x = -u``: a continued fraction of positive terms.
    """
    low = u < -2.5
    safe = jnp.where(low, 0.0, u)
    direct = jnp.log(jnp.exp(-0.5 * safe * safe - _LOG_ROOT_2PI) + safe * 0.5 * jax.lax.erfc(-safe / math.sqrt(2.0)))
    x = jnp.where(low, -u, 3.0)
    ratio = 2.0 / (x + jnp.sqrt(x * x + 4.0 * (_FRACTION_TERMS + 1.0)))
    for n in range(_FRACTION_TERMS, 1, -1):
        ratio = 1.0 / (x + n * ratio)
    second = ratio  # J_1 / J_0
    first = 1.0 / (x + second)  # J_0 / phi
    tail = -0.5 * x * x - _LOG_ROOT_2PI + jnp.log(first) + jnp.log(second)
    return jnp.where(low, tail, direct)


def log_ei(mean: jax.Array, variance: jax.Array, best: jax.Array) -> jax.Array:
    """Log of the expected improvement below ``best`` (Ament et al., "Unexpected improvements to expected improvement for
    Bayesian optimization", NeurIPS 2023, eq. 8)."""
    deviation = jnp.sqrt(variance)
    return log_h((best - mean) / deviation) + jnp.log(deviation)


def incumbent_mean(posterior: Posterior) -> jax.Array:
    """The lowest posterior mean at an observed or pending row: the incumbent where losses may be noisy.

    Without any row it is the prior mean, so that what else is known of points still orders them.
    """
    lowest = jnp.min(jnp.where(posterior.mask, fitted(posterior), jnp.inf))
    return jnp.where(posterior.mask.any(), lowest, posterior.params.mean)


def upper_confidence(mean: jax.Array, variance: jax.Array, beta: jax.Array | float) -> jax.Array:
    """``sqrt(beta)`` deviations below the mean, negated (Srinivas et al., ICML 2010, eq. 6, for losses)."""
    return jnp.sqrt(beta) * jnp.sqrt(variance) - mean


def log_feasibility(labels: Posterior, points: jax.Array) -> jax.Array:
    """Log probability ``[M]`` that trials at points ``[M, D]`` succeed.

    ``labels`` is a Gaussian process of +1 for success and -1 for failure (least-squares classification, RW section 6.5);
    success is that a label is above 0.
    """
    mean, variance = predict(labels, points)
    return log_ndtr(mean / jnp.sqrt(variance + labels.noise))


def latent_samples(key: jax.Array, posterior: Posterior, num_samples: int) -> tuple[Posterior, jax.Array]:
    """Guesses of what the losses at the rows would have been without noise.

    Samples of the signal by Matheron's rule (Wilson et al., "Pathwise conditioning of Gaussian processes", 2021, eq. 8).

    Returns:
        a posterior without noise whose ``weights [S, N]`` fit each sample, and the lowest sampled loss ``[S]``.
    """
    key_signal, key_noise = jax.random.split(key)
    size, dtype, mask = posterior.x.shape[0], posterior.x.dtype, posterior.mask
    with jax.default_matmul_precision("highest"):
        prior = covariance(posterior.params.kernel, posterior.spec, posterior.kernel, posterior.x, posterior.x)
        jitter = rounding(size, dtype) * posterior.signal
        factor = cholesky(masked_covariance(prior, jitter, mask))
        signal = jnp.where(mask, jax.random.normal(key_signal, (num_samples, size), dtype) @ factor.lower.T, 0.0)
        noise = jnp.where(mask, jnp.sqrt(posterior.noise) * jax.random.normal(key_noise, (num_samples, size), dtype), 0.0)
        gap = posterior.weights - solve_lower(posterior.factor, (signal + noise).T).T
        a = solve_upper(posterior.factor, gap.T).T
        sample = signal + jnp.where(mask, gap @ posterior.factor.lower.T - posterior.noise * a, 0.0)
        weights = solve_lower(factor, sample.T).T
    best = posterior.params.mean + jnp.where(mask.any(), jnp.min(jnp.where(mask, sample, jnp.inf), axis=1), 0.0)
    return dataclasses.replace(posterior, factor=factor, weights=weights), best


def log_noisy_ei(latent: Posterior, best: jax.Array, points: jax.Array) -> jax.Array:
    """Expected improvement ``[M]`` over the lowest latent loss, averaged over samples of it (Letham et al. 2019, eq. 6)."""
    v = cross(latent, points)
    with jax.default_matmul_precision("highest"):
        mean = latent.params.mean + latent.weights @ v  # [S, M]
    _, variance = moments(dataclasses.replace(latent, weights=latent.weights[0]), v)
    values = log_ei(mean, variance, best[:, None])
    return jax.scipy.special.logsumexp(values, axis=0) - math.log(best.shape[0])
