import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tinygp
from jax.flatten_util import ravel_pytree
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk

from jaxhpo.core import CubeSpec, Kind, Run
from jaxhpo.surrogates.acquisition import incumbent_mean, log_ei
from jaxhpo.surrogates.kernels import KernelParams, covariance, inputs_of
from jaxhpo.surrogates.regression import GPParams, add_pending, condition, cross, fitted, joint_samples, log_likelihood, predict

FLOATS = CubeSpec.floats(3)
MIXED = CubeSpec((Run(Kind.FLOAT), Run(Kind.INT, 5), Run(Kind.CHOICE, 3)))
PARAMS = GPParams(KernelParams(np.log([0.4, 0.7, 1.9]), np.log(1.7)), np.log(0.02), np.float64(0.3))


def cast(tree, dtype=np.float64):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if np.asarray(leaf).dtype.kind == "f" else None), tree)


def data(spec=FLOATS, n=23, new=5):
    rng = np.random.default_rng(0)
    cube = rng.uniform(size=(n + new, spec.num_dims))
    x = np.asarray(inputs_of(spec, cube))
    return x[:n], np.sin(5 * x[:n, 0]) + x[:n, 1] + 0.1 * rng.normal(size=n), x[n:]


def padded(x, z, rows, fill=0.0):
    """A table of ``rows`` rows, the last ones without an observation."""
    more = rows - len(z)
    return np.pad(x, ((0, more), (0, 0)), constant_values=fill), np.pad(z, (0, more)), np.arange(rows) < len(z)


@jax.jit(static_argnums=(1, 2))
def everything(params, spec, kernel, x, z, mask, points):
    """Likelihood, its gradient, mean and variance at points, mean at the rows, log of the expected improvement."""
    value, grad = jax.value_and_grad(log_likelihood)(params, spec, kernel, x, z, mask)
    posterior = condition(params, spec, kernel, x, z, mask)
    mean, variance = predict(posterior, points)
    return value, grad, mean, variance, fitted(posterior), log_ei(mean, variance, incumbent_mean(posterior))


def sklearn_gp(kernel):
    scales = np.exp(PARAMS.kernel.log_lengthscale)
    part = sk.Matern(scales, nu=2.5) if kernel == "matern52" else sk.RBF(scales)
    whole = sk.ConstantKernel(1.7) * part + sk.WhiteKernel(0.02)
    return GaussianProcessRegressor(whole, alpha=0.0, optimizer=None)


@pytest.mark.parametrize("kernel", ["matern52", "rbf"])
def test_likelihood_and_posterior_are_those_of_scikit_learn(x64, kernel):
    """To 1e-8, with the gradient of the likelihood, in a table of 32 rows for 23 observations."""
    x, z, points = data()
    value, grad, mean, variance, at_rows, _ = everything(cast(PARAMS), FLOATS, kernel, *padded(x, z, 32), points)
    peer = sklearn_gp(kernel).fit(x, z - 0.3)
    expected, slope = peer.log_marginal_likelihood(peer.kernel_.theta, eval_gradient=True)
    np.testing.assert_allclose(value, expected, rtol=1e-8)
    got = np.concatenate([[grad.kernel.log_signal], grad.kernel.log_lengthscale, [grad.log_noise]])
    np.testing.assert_allclose(got, slope, rtol=1e-8, atol=1e-8)
    expected, deviation = peer.predict(points, return_std=True)
    np.testing.assert_allclose(mean, expected + 0.3, rtol=1e-8)
    np.testing.assert_allclose(variance, deviation**2 - 0.02, rtol=1e-8)  # without the noise of a new observation
    np.testing.assert_allclose(at_rows[:23], peer.predict(x) + 0.3, rtol=1e-8)


def test_likelihood_and_posterior_are_those_of_tinygp(x64):
    """To 1e-8, with the gradient by the constant mean, too."""
    x, z, points = data()

    def peer(params):
        distance = tinygp.kernels.distance.L2Distance()
        part = tinygp.transforms.Linear(jnp.exp(-params.kernel.log_lengthscale), tinygp.kernels.Matern52(distance=distance))
        noise = jnp.full(len(z), jnp.exp(params.log_noise))
        return tinygp.GaussianProcess(jnp.exp(params.kernel.log_signal) * part, x, diag=noise, mean=params.mean)

    value, grad, mean, variance, *_ = everything(cast(PARAMS), FLOATS, "matern52", *padded(x, z, 32), points)
    expected, slope = jax.jit(jax.value_and_grad(lambda params: peer(params).log_probability(z)))(cast(PARAMS))
    np.testing.assert_allclose(value, expected, rtol=1e-8)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-8), grad, slope)
    there = jax.jit(lambda params: (lambda gp: (gp.mean, gp.variance))(peer(params).condition(z, points, diag=0.0).gp))(
        cast(PARAMS)
    )
    np.testing.assert_allclose(mean, there[0], rtol=1e-8)
    np.testing.assert_allclose(variance, there[1], rtol=1e-8)


@pytest.mark.parametrize(("spec", "warp"), [(FLOATS, True), (MIXED, False)], ids=["warped", "mixed"])
def test_gradient_is_the_central_difference(x64, spec, warp):
    """Of every hyperparameter; steps of 1e-5 leave errors of about 1e-9."""
    x, z, points = data(spec)
    params = cast(PARAMS)
    if warp:
        exponents = jnp.array([[0.3, -0.2, 0.1], [-0.4, 0.2, 0.3]])
        params = dataclasses.replace(params, kernel=dataclasses.replace(params.kernel, input_warp=exponents))
    args = spec, "matern52", *padded(x, z, 32), points
    flat, unravel = ravel_pytree(params)
    got = ravel_pytree(everything(params, *args)[1])[0]
    for i, step in enumerate(1e-5 * np.eye(flat.size)):
        high, low = (everything(unravel(jnp.asarray(flat + s)), *args)[0] for s in (step, -step))
        np.testing.assert_allclose(got[i], (high - low) / 2e-5, rtol=1e-6, atol=1e-7)


def test_posterior_of_a_mixed_cube_is_the_textbook_formula(x64):
    """RW eqs. 2.25, 2.26 and 5.8 with numpy's solver."""
    x, z, points = data(MIXED)
    value, _, mean, variance, *_ = everything(cast(PARAMS), MIXED, "matern52", *padded(x, z, 32), points)
    cov = lambda a, b: np.asarray(covariance(cast(PARAMS).kernel, MIXED, "matern52", a, b))
    whole, k = cov(x, x) + 0.02 * np.eye(23), cov(x, points)
    np.testing.assert_allclose(mean, 0.3 + k.T @ np.linalg.solve(whole, z - 0.3), rtol=1e-8)
    np.testing.assert_allclose(variance, 1.7 - np.einsum("nm,nm->m", k, np.linalg.solve(whole, k)), rtol=1e-8)
    quadratic = (z - 0.3) @ np.linalg.solve(whole, z - 0.3)
    expected = -0.5 * (quadratic + np.linalg.slogdet(whole)[1] + 23 * np.log(2 * np.pi))
    np.testing.assert_allclose(value, expected, rtol=1e-8)


def check_same(got, expected, rows, tolerance):
    for left, right in zip(jax.tree.leaves((got[:4], got[5:])), jax.tree.leaves((expected[:4], expected[5:])), strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(got[4][rows], expected[4][: len(got[4][rows])], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fill", [0.0, np.inf, 1e30, np.nan], ids=str)
def test_rows_without_an_observation_change_nothing(x64, fill):
    """Tables of 32 and 64 rows for 32 observations and for 23; whatever stands in the others."""
    for count in (32, 23):
        x, z, points = data(n=count)
        expected = everything(cast(PARAMS), FLOATS, "matern52", *padded(x, z, 32), points)
        for rows in (32, 64):
            got = everything(cast(PARAMS), FLOATS, "matern52", *padded(x, z, rows, fill), points)
            check_same(got, expected, slice(count), 1e-11)


def test_the_order_of_rows_changes_nothing(x64):
    """Not even with rows without an observation in between."""
    x, z, points = data()
    table = padded(x, z, 32, np.inf)
    order = np.random.default_rng(1).permutation(32)
    expected = everything(cast(PARAMS), FLOATS, "matern52", *table, points)
    got = everything(cast(PARAMS), FLOATS, "matern52", *(part[order] for part in table), points)
    check_same(got, expected, np.argsort(order)[:23], 1e-10)


def test_without_observations_the_posterior_is_the_prior(x64):
    x, z, points = data()
    value, grad, mean, variance, *_ = everything(cast(PARAMS), FLOATS, "matern52", *padded(x[:0], z[:0], 32), points)
    assert value == 0.0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grad))
    np.testing.assert_allclose(mean, 0.3)
    np.testing.assert_allclose(variance, 1.7)


@pytest.mark.parametrize("lengthscale", [0.3, 5.0, 50.0])
@pytest.mark.parametrize("points", ["spread", "clustered", "duplicates"])
@pytest.mark.parametrize(("kernel", "rows"), [("matern52", 256), ("rbf", 200)])  # in many blocks, and in one
def test_float32_is_float64_on_ill_conditioned_data(kernel, rows, points, lengthscale):
    """200 points: spread, in two clusters 1e-3 wide, or each twice; the noise at its floor of 1e-6, the signal of variance 1.

    float32 takes the noise to be about 3e-5 (see :meth:`GPParams.noise`). Against float64 with that noise, errors were: of the
    mean up to 2e-3, far from two clusters 1e-2; of the deviation 1.3e-3; of the likelihood 0.5; of its gradient by the signal
    1.1, by the others 0.3 or 3 % (another compiler rounds otherwise).
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(200, 2))
    if points == "clustered":
        x = np.where(np.arange(200)[:, None] < 100, 0.3, 0.6) + 1e-3 * x
    if points == "duplicates":
        x[100:] = x[:100]
    x = x.astype(np.float32).astype(np.float64)
    new = np.concatenate([rng.uniform(size=(20, 2)), x[:10], x[:10] + 1e-4]).astype(np.float32).astype(np.float64)
    part = sk.Matern(np.full(2, lengthscale), nu=2.5) if kernel == "matern52" else sk.RBF(np.full(2, lengthscale))
    rounding = rows * 2.0**-23
    whole = sk.ConstantKernel(1.0) * part + sk.WhiteKernel(1e-6 + rounding)
    z = np.linalg.cholesky(whole(x)) @ rng.normal(size=200)

    spec, zero = CubeSpec.floats(2), np.float64(0.0)
    params = GPParams(KernelParams(np.log(np.full(2, lengthscale)), zero), np.log(1e-6), zero)
    got = everything(cast(params, np.float32), spec, kernel, *cast(padded(x, z, rows), np.float32), new.astype(np.float32))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    value, grad, mean, variance, at_rows, _ = got
    peer = GaussianProcessRegressor(whole, alpha=0.0, optimizer=None).fit(x, z)
    expected, (signal, *scales, noise) = peer.log_marginal_likelihood(peer.kernel_.theta, eval_gradient=True)
    share = rounding / (1e-6 + rounding)  # of the noise, in proportion to the signal
    np.testing.assert_allclose(value, expected, atol=1.5)
    np.testing.assert_allclose(grad.kernel.log_lengthscale, scales, rtol=0.06, atol=0.6)
    np.testing.assert_allclose(grad.kernel.log_signal, signal + share * noise, atol=2.0)
    np.testing.assert_allclose(grad.log_noise, (1 - share) * noise, atol=0.06)
    np.testing.assert_allclose(grad.mean, peer.alpha_.sum(), rtol=0.02, atol=0.1)
    there, deviation = peer.predict(new, return_std=True)
    np.testing.assert_allclose(mean, there, atol=0.03 if points == "clustered" else 5e-3)
    np.testing.assert_allclose(np.sqrt(variance), np.sqrt(deviation**2 - 1e-6 - rounding), atol=4e-3)
    np.testing.assert_allclose(at_rows[:200], peer.predict(x), atol=5e-3)


@jax.jit
def add(posterior, point):
    return add_pending(posterior, point)


@jax.jit
def look(posterior, points):
    return *predict(posterior, points), fitted(posterior), cross(posterior, points)


conditioned = jax.jit(lambda x, z, mask: condition(cast(PARAMS), FLOATS, "matern52", x, z, mask))


def test_a_pending_point_is_an_observation_of_its_mean(x64):
    """To 1e-8: means stay, variances are those after observing the means; one after the other, over the edge of a block."""
    x, z, points = data(n=29, new=12)
    new, there = points[:5], points[5:]
    before = after = conditioned(*padded(x, z, 64))
    for point in new:
        after = add(after, point)
    mean = look(before, new)[0]
    expected = conditioned(*padded(np.concatenate([x, new]), np.concatenate([z, mean]), 64))
    np.testing.assert_array_equal(after.mask, expected.mask)
    np.testing.assert_array_equal(after.x, expected.x)
    np.testing.assert_allclose(after.factor.lower, expected.factor.lower, atol=1e-10)
    np.testing.assert_allclose(after.factor.inverses, expected.factor.inverses, atol=1e-8)
    old, got, want = (look(posterior, there) for posterior in (before, after, expected))
    np.testing.assert_allclose(got[0], old[0], rtol=1e-10)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-8)
    np.testing.assert_allclose(got[2][:34], want[2][:34], rtol=1e-8)
    assert (got[1] < old[1]).all()


def test_where_no_point_is_added_all_stays(x64):
    """No row is free; and the first row is taken in an empty table."""
    x, z, points = data(n=64)
    full = conditioned(x, z, np.ones(64, bool))
    jax.tree.map(np.testing.assert_array_equal, add(full, points[0]), full)
    empty = add(conditioned(*padded(x[:0], z[:0], 64)), points[0])
    one = conditioned(*padded(points[:1], np.array([0.3]), 64))
    np.testing.assert_allclose(look(empty, points[1:])[1], look(one, points[1:])[1], rtol=1e-10)


def test_pending_duplicates_in_float32_stay_finite():
    """The same point eight times, at the floor of the noise: the variance there falls and does not grow again."""
    x, z, points = (part.astype(np.float32) for part in data())
    params = dataclasses.replace(cast(PARAMS, np.float32), log_noise=jnp.float32(np.log(1e-6)))
    posterior = jax.jit(condition, static_argnums=(1, 2))(params, FLOATS, "matern52", *padded(x, z, 32))
    mean, variance = [], []
    for _ in range(9):
        there = look(posterior, points)
        mean.append(there[0])
        variance.append(there[1][0])
        posterior = add(posterior, points[0])
    np.testing.assert_allclose(mean, np.broadcast_to(mean[0], np.shape(mean)), atol=1e-4)
    assert variance[0] > 1e-2
    assert 0 < min(variance[1:]) <= max(variance[1:]) < 2e-5


def test_joint_samples_have_the_posterior_of_the_textbook(x64):
    """20000 samples at 4 points, RW eq. 2.24. Means and covariances stay within 5 standard errors of the closed form: with
    other keys 14 numbers of that many fail in 1 of 10^5."""
    x, z, points = data(new=4)
    posterior = conditioned(*padded(x, z, 64))
    samples = np.asarray(jax.jit(joint_samples, static_argnums=3)(jax.random.key(0), posterior, points, 20000))
    cov = lambda a, b: np.asarray(covariance(cast(PARAMS).kernel, FLOATS, "matern52", a, b))
    whole, k = cov(x, x) + 0.02 * np.eye(23), cov(x, points)
    expected = cov(points, points) - k.T @ np.linalg.solve(whole, k)
    mean = 0.3 + k.T @ np.linalg.solve(whole, z - 0.3)
    variance = np.diag(expected)
    assert samples.shape == (20000, 4)
    assert (np.abs(samples.mean(0) - mean) < 5 * np.sqrt(variance / 20000)).all()
    error = np.sqrt((np.outer(variance, variance) + expected**2) / 20000)  # of a sample covariance of Gaussians
    assert (np.abs(np.cov(samples.T) - expected) < 5 * error).all()
