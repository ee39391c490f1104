"""Hyperparameters of a Gaussian process by maximum a posteriori: priors, starts, and a warm start from the last fit.

The power that warps the losses is one of them: its likelihood carries the Jacobian of the warp, as in Snelson, Rasmussen &
Ghahramani, "Warped Gaussian processes", NeurIPS 2003, eq. 6. The prior of lengthscales grows with the root of the dimension,
as in Hvarfner, Hellsten & Nardi, "Vanilla Bayesian optimization performs great in high dimensions", ICML 2024, eq. 5. Theirs
is a density of l, whose mode lies at a log of ``sqrt(2) - 3``; ours, of log l, has its mode between that and their median.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxhpo.core import CubeSpec, pytree_dataclass, setting
from jaxhpo.surrogates.kernels import KernelParams
from jaxhpo.surrogates.outputs import standardised
from jaxhpo.surrogates.quasi_newton import minimise_in_box
from jaxhpo.surrogates.regression import GPParams, log_likelihood

_SMALL = 4  # parameters besides lengthscales and input warps: signal, noise, mean, power


@pytree_dataclass
class Priors:
    """Normal priors, ``(mean, standard deviation)``, of the parameters of a fit.

    Attributes:
        log_lengthscale: plus half the log of D.
        log_signal, log_noise: of standardised losses.
        mean: of standardised losses.
        power: of :func:`jaxhpo.surrogates.outputs.power_warp`; a deviation of 0 pins it.
        log_warp: of the exponents of the input warp.
        noise_floor: the lowest variance of the noise.
    """

    log_lengthscale: tuple[float, float] = (-0.5, math.sqrt(3.0))
    log_signal: tuple[float, float] = (1.0, 1.5)
    log_noise: tuple[float, float] = (-8.0, 3.0)
    mean: tuple[float, float] = (0.0, 1.0)
    power: tuple[float, float] = (0.0, 0.3)
    log_warp: tuple[float, float] = (0.0, 0.3)
    noise_floor: float = setting(1e-6, low=1e-12)


@dataclasses.dataclass(frozen=True)
class Model:
    """The static part of a surrogate.

    Attributes:
        spec: the cube.
        kernel: one of ``jaxhpo.surrogates.kernels.KERNELS``.
        input_warping: whether floats are warped.
        output_warping: whether losses are warped and standardised; labels are taken as they are.
    """

    spec: CubeSpec
    kernel: str = "matern52"
    input_warping: bool = False
    output_warping: bool = True

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return self.spec.num_dims * (3 if self.input_warping else 1) + _SMALL

    def unpack(self, theta: jax.Array) -> tuple[GPParams, jax.Array]:
        """Parameters and power from a vector ``[P]``."""
        dims = self.spec.num_dims
        signal, noise, mean, power = theta[dims : dims + _SMALL]
        warp = theta[dims + _SMALL :].reshape(2, dims) if self.input_warping else None
        return GPParams(KernelParams(theta[:dims], signal, warp), noise, mean), power

    def targets(self, theta: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array | float]:
        """``z [N]`` and the log Jacobian of its warp, from ``v [N]``."""
        return standardised(v, mask, self.unpack(theta)[1]) if self.output_warping else (v, 0.0)

    def prior_moments(self, priors: Priors) -> tuple[jax.Array, jax.Array]:
        """Means and standard deviations ``[P]``."""
        dims = self.spec.num_dims
        lengthscale = (priors.log_lengthscale[0] + 0.5 * math.log(dims), priors.log_lengthscale[1])
        rows = [lengthscale] * dims + [priors.log_signal, priors.log_noise, priors.mean, priors.power]
        rows += [priors.log_warp] * (2 * dims if self.input_warping else 0)
        table = jnp.stack([jnp.stack([jnp.asarray(value, float) for value in row]) for row in rows])
        return table[:, 0], table[:, 1]

    def start(self, priors: Priors) -> jax.Array:
        """The middle of the priors, ``[P]``."""
        lower, upper = self.bounds(priors)
        return jnp.clip(self.prior_moments(priors)[0], lower, upper)

    def random_start(self, key: jax.Array, priors: Priors) -> jax.Array:
        """A draw from priors of half the width, ``[P]``."""
        mean, deviation = self.prior_moments(priors)
        return mean + 0.5 * deviation * jax.random.normal(key, mean.shape, mean.dtype)

    def bounds(self, priors: Priors) -> tuple[jax.Array, jax.Array]:
        """Lowest and highest values ``[P]``: four deviations, and the floor of the noise."""
        mean, deviation = self.prior_moments(priors)
        lower, upper = mean - 4.0 * deviation, mean + 4.0 * deviation
        dims = self.spec.num_dims
        lower = lower.at[:dims].max(math.log(5e-3))
        lower = lower.at[dims + 1].set(jnp.log(priors.noise_floor))
        upper = upper.at[dims + 1].set(jnp.maximum(1.0, lower[dims + 1]))
        return lower, upper


def negative_log_posterior(
    model: Model, priors: Priors, theta: jax.Array, x: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    """What a fit minimises, ``f[]``; ``v [N]`` as made by :func:`jaxhpo.surrogates.outputs.excess`."""
    params, _ = model.unpack(theta)
    z, log_jacobian = model.targets(theta, v, mask)
    mean, deviation = model.prior_moments(priors)
    pinned = deviation <= 0
    score = jnp.where(pinned, 0.0, (theta - mean) / jnp.where(pinned, 1.0, deviation))
    return 0.5 * jnp.sum(score**2) - log_likelihood(params, model.spec, model.kernel, x, z, mask) - log_jacobian


def fit(
    model: Model, priors: Priors, starts: jax.Array, x: jax.Array, v: jax.Array, mask: jax.Array, num_steps: jax.Array | int
) -> jax.Array:
    """The best parameters ``[P]`` found from ``starts [S, P]`` in ``num_steps`` evaluations each.

    ``x [N, D]`` as made by :func:`jaxhpo.surrogates.inputs_of`, ``v [N]`` from losses by :func:`jaxhpo.surrogates.excess`.
    """
    value_and_grad = jax.vmap(jax.value_and_grad(lambda theta: negative_log_posterior(model, priors, theta, x, v, mask)))
    lower, upper = model.bounds(priors)
    theta, value = minimise_in_box(value_and_grad, jnp.clip(starts, lower, upper), lower, upper, num_steps, first_step=0.5)
    return theta[jnp.argmin(value)]
