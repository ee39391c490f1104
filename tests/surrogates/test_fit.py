import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxhpo.core import CubeSpec
from jaxhpo.surrogates.fit import Model, Priors, fit, negative_log_posterior
from jaxhpo.surrogates.outputs import excess, standardised
from jaxhpo.surrogates.regression import log_likelihood

MODEL = Model(CubeSpec.floats(2))
SIGNAL, NOISE, MEAN, POWER = range(2, 6)
PRIORS = Priors(
    log_lengthscale=(1.4, 1.7), log_signal=(1.0, 1.5), log_noise=(-8.0, 3.0), mean=(0.0, 1.0), power=(0.5, 0.5),
    log_warp=(0.0, 0.3), noise_floor=1e-6,
)  # fmt: skip
PADDED = np.arange(32) < 30


@jax.jit
def fitted(loss, x, starts, priors):
    v = excess(loss, PADDED)
    return fit(MODEL, priors, starts, x, v, PADDED, 80)


@jax.jit
def objective(theta, loss, x, priors):
    v = excess(loss, PADDED)
    return jax.vmap(lambda theta: negative_log_posterior(MODEL, priors, theta, x, v, PADDED))(theta)


@jax.jit
def starts_of(key, priors):
    return jnp.stack([MODEL.start(priors), MODEL.random_start(key, priors)])


def table(loss, x):
    return np.pad(loss, (0, 2)).astype(np.float32), np.pad(x, ((0, 2), (0, 0))).astype(np.float32)


def drawn(seed):
    """30 losses from a Gaussian process of lengthscales 0.25 and 50: the second dimension hardly matters."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(30, 2))
    scaled = x / [0.25, 50.0]
    r = np.sqrt(5 * ((scaled[:, None] - scaled[None]) ** 2).sum(-1))
    whole = (1 + r + r * r / 3) * np.exp(-r) + 1e-4 * np.eye(30)
    return table(np.linalg.cholesky(whole) @ rng.normal(size=30), x)


@pytest.mark.parametrize("seed", range(4))
def test_lengthscales_of_a_known_process_are_found(seed):
    """The one that matters within a factor of 2.5 (its posterior has a deviation of about 30 % with 30 losses), the other at
    least three times as long; and never above the starts."""
    loss, x = drawn(seed)
    starts = starts_of(jax.random.key(seed), PRIORS)
    theta = fitted(loss, x, starts, PRIORS)
    scales = np.exp(theta[:2])
    assert 0.1 < scales[0] < 0.625
    assert scales[1] > 3 * scales[0]
    values = objective(jnp.stack([theta, *starts]), loss, x, PRIORS)
    assert values[0] <= values[1:].min()


def test_a_warm_start_stays_at_the_optimum():
    """Begun where the last fit ended, nothing gets worse, and little changes."""
    loss, x = drawn(0)
    first = fitted(loss, x, starts_of(jax.random.key(0), PRIORS), PRIORS)
    again = fitted(loss, x, jnp.stack([first, first]), PRIORS)
    before, after = objective(jnp.stack([first, again]), loss, x, PRIORS)
    assert before - 0.2 < after <= before
    np.testing.assert_allclose(again[:2], first[:2], atol=0.2)


def test_a_warm_start_that_is_not_finite_is_passed_over():
    loss, x = drawn(0)
    starts = starts_of(jax.random.key(0), PRIORS)
    theta = fitted(loss, x, starts.at[0].set(jnp.nan), PRIORS)
    assert np.isfinite(theta).all()


@pytest.mark.parametrize("seed", range(2))
def test_heavy_tailed_losses_get_a_lower_power(seed):
    """The exponential of a smooth function against the function: the logarithm undoes it."""
    x = np.random.default_rng(seed).uniform(size=(30, 2))
    smooth = np.sin(4 * x[:, 0]) + (x[:, 1] - 0.4) ** 2
    power = []
    for loss in (smooth, np.exp(5 * smooth)):
        args = table(loss, x)
        power.append(fitted(*args, starts_of(jax.random.key(seed), PRIORS), PRIORS)[POWER])
    assert power[1] < power[0] - 0.3
    assert power[1] < 0.5


def test_pinned_and_bounded_parameters():
    """A deviation of 0 pins the power; noise and all else stays within the bounds."""
    loss, x = drawn(1)
    priors = dataclasses.replace(PRIORS, power=(1.0, 0.0), noise_floor=1e-3)
    theta = fitted(loss, x, starts_of(jax.random.key(0), priors), priors)
    assert theta[POWER] == 1.0
    assert theta[NOISE] >= np.float32(np.log(1e-3))
    lower, upper = MODEL.bounds(priors)
    assert ((theta >= lower) & (theta <= upper)).all()


def test_degenerate_tables_are_fitted_to_finite_values():
    """No spread at all, one point many times, and no observation."""
    _, x = drawn(0)
    theta = fitted(np.full(32, 3.0, np.float32), x, starts_of(jax.random.key(0), PRIORS), PRIORS)
    assert np.isfinite(theta).all()
    none = fit(MODEL, PRIORS, starts_of(jax.random.key(0), PRIORS), x, np.zeros(32, np.float32), np.zeros(32, bool), 5)
    assert np.isfinite(none).all()
    duplicates = np.broadcast_to(x[:1], x.shape)
    loss = np.random.default_rng(0).normal(size=32).astype(np.float32)
    assert np.isfinite(fitted(loss, duplicates, starts_of(jax.random.key(0), PRIORS), PRIORS)).all()


@pytest.mark.parametrize("warped", [False, True])
def test_objective_is_the_sum_of_its_parts(x64, warped):
    """Normal priors without their constants, the likelihood, the Jacobian of the warp; parameters in their order."""
    model = Model(CubeSpec.floats(2), input_warping=warped)
    x = np.random.default_rng(0).uniform(size=(12, 2))
    v, mask = np.random.default_rng(1).exponential(size=12), np.arange(12) < 10
    theta = np.random.default_rng(2).normal(size=model.size) * 0.3
    assert model.size == (10 if warped else 6)
    params, power = model.unpack(jnp.asarray(theta))
    assert power == theta[5]
    np.testing.assert_array_equal(params.kernel.log_lengthscale, theta[:2])
    np.testing.assert_array_equal([params.kernel.log_signal, params.log_noise, params.mean], theta[2:5])
    if warped:
        np.testing.assert_array_equal(params.kernel.input_warp, theta[6:].reshape(2, 2))
    means = [1.4 + 0.5 * np.log(2)] * 2 + [1.0, -8.0, 0.0, 0.5] + [0.0] * 4 * warped
    deviations = [1.7] * 2 + [1.5, 3.0, 1.0, 0.5] + [0.3] * 4 * warped
    prior = (stats.norm.logpdf(theta, means, deviations) - stats.norm.logpdf(0.0, 0.0, deviations)).sum()
    labels = dataclasses.replace(model, output_warping=False)

    @jax.jit
    def both(theta):
        z, log_jacobian = standardised(v, mask, power)
        likelihood = [log_likelihood(params, model.spec, "matern52", x, part, mask) for part in (z, v)]
        got = [negative_log_posterior(m, PRIORS, theta, x, v, mask) for m in (model, labels)]
        return got, [-likelihood[0] - log_jacobian, -likelihood[1]]

    got, expected = both(jnp.asarray(theta))
    np.testing.assert_allclose(got, np.asarray(expected) - prior, rtol=1e-9)
