import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from sklearn.gaussian_process import kernels as sk

from jaxhpo.core import CubeSpec, Kind, Run
from jaxhpo.surrogates.kernels import KernelParams, inputs_of, kumaraswamy, matern52, rbf
from jaxhpo.surrogates.kernels import covariance as eager_covariance

covariance = jax.jit(eager_covariance, static_argnums=(1, 2))
MIXED = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 5), Run(Kind.CHOICE, 3, count=2)))


def params_of(spec, signal=1.7, warp=None):
    lengthscale = np.linspace(0.3, 1.1, spec.num_dims)
    return KernelParams(jnp.log(lengthscale), jnp.log(jnp.asarray(signal)), warp)


@pytest.mark.parametrize("kernel", ["matern52", "rbf"])
def test_covariance_of_floats_is_that_of_scikit_learn(x64, kernel):
    spec = CubeSpec.floats(3)
    x, other = np.random.default_rng(0).uniform(size=(2, 7, 3))
    params = params_of(spec)
    scales = np.exp(params.log_lengthscale)
    part = sk.Matern(scales, nu=2.5) if kernel == "matern52" else sk.RBF(scales)
    got = covariance(params, spec, kernel, x, other[:5])
    np.testing.assert_allclose(got, (sk.ConstantKernel(1.7) * part)(x, other[:5]), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["matern52", "rbf"])
def test_covariance_of_a_mixed_cube_is_the_product_over_pairs(x64, kernel):
    """Distance of floats and integers, times exp of minus the weights of the choices that differ, pair by pair."""
    cube = np.random.default_rng(1).uniform(size=(12, 5))
    x = np.asarray(inputs_of(MIXED, cube))
    params = params_of(MIXED)
    scales = np.exp(params.log_lengthscale)
    expected = np.empty((12, 9))
    for i in range(12):
        for j in range(9):
            r2 = sum(((x[i, d] - x[j, d]) / scales[d]) ** 2 for d in range(3))
            r = np.sqrt(5 * r2)
            value = (1 + r + r * r / 3) * np.exp(-r) if kernel == "matern52" else np.exp(-r2 / 2)
            for d in (3, 4):
                value *= np.exp(-1 / scales[d]) if x[i, d] != x[j, d] else 1.0
            expected[i, j] = 1.7 * value
    np.testing.assert_allclose(covariance(params, MIXED, kernel, x, x[:9]), expected, rtol=1e-12)


def test_covariance_of_choices_alone(x64):
    spec = CubeSpec((Run(Kind.CHOICE, 3, count=2),))
    x = np.array([[0.0, 0.0], [0.0, 2.0], [1.0, 2.0]])
    a, b = np.exp(-np.exp(-np.asarray(params_of(spec).log_lengthscale)))
    expected = 1.7 * np.array([[1, b, a * b], [b, 1, a], [a * b, a, 1]])
    np.testing.assert_allclose(covariance(params_of(spec), spec, "matern52", x, x), expected, rtol=1e-12)


def test_inputs_are_middles_of_integers_and_numbers_of_choices():
    cube = jnp.array([0.123, 0.9, 0.39, 0.34, 0.99], jnp.float32)
    np.testing.assert_allclose(inputs_of(MIXED, cube), [0.123, 0.9, 0.3, 1.0, 2.0], rtol=1e-6)
    slope = jax.jacobian(lambda cube: inputs_of(MIXED, cube))(cube)
    np.testing.assert_array_equal(slope, np.diag([1.0, 1.0, 0, 0, 0]))


def test_slopes_of_the_correlations(x64):
    """In closed form, and finite at 0 where a square root has none."""
    r2 = jnp.array([0.0, 1e-12, 0.3, 4.0])
    slope = jax.vmap(jax.grad(matern52))(r2)
    r = np.sqrt(5 * np.asarray(r2))
    np.testing.assert_allclose(slope, -5 / 6 * (1 + r) * np.exp(-r), rtol=1e-12)
    h = 1e-5
    central = (matern52(r2[2:] + h) - matern52(r2[2:] - h)) / (2 * h)
    np.testing.assert_allclose(slope[2:], central, rtol=1e-8)
    np.testing.assert_allclose(jax.vmap(jax.grad(rbf))(r2), -0.5 * np.exp(-0.5 * np.asarray(r2)), rtol=1e-12)


def test_kumaraswamy_is_a_distribution_function(x64):
    """Its slope is the density p q x^(p-1) (1 - x^p)^(q-1); exponents of 1 change nothing; 0 and 1 stay, up to the edge."""
    p, q = 1.7, 0.6
    warp = jnp.log(jnp.array([[p], [q]]))
    x = np.array([0.1, 0.4, 0.8])
    density = lambda t: p * q * t ** (p - 1) * (1 - t**p) ** (q - 1)
    got = kumaraswamy(warp, x[:, None])[:, 0]
    np.testing.assert_allclose(got, [quad(density, 0, end)[0] for end in x], rtol=1e-7)
    np.testing.assert_allclose(kumaraswamy(jnp.zeros((2, 1)), x[:, None])[:, 0], x, rtol=1e-12)
    ends = jnp.array([[0.0], [1.0]])
    slopes = jax.jit(jax.jacobian(kumaraswamy, (0, 1)))
    np.testing.assert_allclose(kumaraswamy(warp, ends), ends, atol=1e-3)
    for log_exponents in (warp, -3.0 * warp, 3.0 * warp):
        assert all(np.isfinite(slope).all() for slope in slopes(log_exponents, ends))


def test_only_floats_are_warped(x64):
    cube = np.random.default_rng(2).uniform(size=(6, 5))
    x = np.asarray(inputs_of(MIXED, cube))
    warp = jnp.log(jnp.full((2, 5), 1.5))
    warped = x.copy()
    warped[:, :2] = 1 - (1 - x[:, :2] ** 1.5) ** 1.5
    got = covariance(params_of(MIXED, warp=warp), MIXED, "matern52", x, x)
    np.testing.assert_allclose(got, covariance(params_of(MIXED), MIXED, "matern52", warped, warped), rtol=1e-12)


def test_unknown_kernels_and_inputs_of_another_space_are_refused():
    params = KernelParams(jnp.zeros(2), jnp.zeros(()))
    x = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="'matern': must be one of matern52, rbf"):
        covariance(params, CubeSpec.floats(2), "matern", x, x)
    with pytest.raises(ValueError, match=r"\(3, 1\).*must have 2 columns"):
        covariance(params, CubeSpec.floats(2), "rbf", x[:, :1], x[:, :1])
