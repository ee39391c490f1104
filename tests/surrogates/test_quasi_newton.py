import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import lsq_linear

from jaxhpo.surrogates.quasi_newton import minimise_in_box


def rosenbrock(x):
    return ((1 - x[..., :-1]) ** 2 + 100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2).sum(-1)


def batched(function):
    def value_and_grad(x):
        return function(x), jax.grad(lambda x: function(x).sum())(x)

    return value_and_grad


@jax.jit
def solve_quadratics(root, target, start, lower, upper):
    function = lambda x: 0.5 * ((jnp.einsum("ij,sj->si", root, x) - target) ** 2).sum(-1)
    return minimise_in_box(batched(function), start, lower, upper, 30)


@pytest.mark.parametrize("seed", range(4))
def test_quadratics_in_a_box_end_at_the_solution_of_their_conditions(x64, seed):
    """scipy's exact solver of bounded least squares; coordinates at a bound are there exactly (KKT), from every start."""
    rng = np.random.default_rng(seed)
    root, target = rng.normal(size=(7, 5)), 3 * rng.normal(size=7)
    lower, upper = np.full(5, -0.5), np.full(5, 0.75)
    start = rng.uniform(lower, upper, size=(3, 5))
    start[0], start[1] = lower, upper  # a corner may be the wrong one
    got, value = solve_quadratics(root, target, start, lower, upper)
    peer = lsq_linear(root, target, (lower, upper), method="bvls", tol=1e-14)
    for x in got:
        np.testing.assert_allclose(x, peer.x, atol=1e-7)
        np.testing.assert_array_equal(x[peer.active_mask < 0], -0.5)
        np.testing.assert_array_equal(x[peer.active_mask > 0], 0.75)
    assert (peer.active_mask != 0).any()
    np.testing.assert_allclose(value, peer.cost, rtol=1e-10)


@jax.jit
def solve_rosenbrock(start):
    return minimise_in_box(batched(rosenbrock), start, -2.0, 2.0, 120)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_rosenbrock_from_far_away(dtype):
    start = np.array([[-1.2, 1.0], [2.0, -2.0], [-2.0, -2.0], [0.0, 0.0]], dtype)
    with jax.enable_x64(dtype == np.float64):
        x, value = solve_rosenbrock(start)
    assert x.dtype == dtype
    np.testing.assert_allclose(x, 1.0, atol=1e-6 if dtype == np.float64 else 3e-3)
    np.testing.assert_allclose(value, rosenbrock(np.asarray(x)), rtol=1e-3, atol=1e-12)


def test_a_batch_is_its_rows_one_by_one(x64):
    start = np.array([[-1.2, 1.0], [2.0, -2.0]])
    x, value = solve_rosenbrock(start)
    for i in range(2):
        one, least = solve_rosenbrock(start[i : i + 1])
        np.testing.assert_allclose(one[0], x[i], atol=1e-8)
        np.testing.assert_allclose(least[0], value[i], atol=1e-12)


def test_starts_that_are_not_finite_stay(x64):
    """And do not touch their neighbours; a function that is not finite beyond a wall is followed up to it."""

    def walled(x):
        return jnp.where(x[:, 0] > 0.5, jnp.nan, (x[:, 0] - 0.45) ** 2 + x[:, 1] ** 2)

    start = np.array([[0.9, 0.3], [0.1, 0.3], [np.nan, 0.3]])
    x, value = jax.jit(lambda start: minimise_in_box(batched(walled), start, 0.0, 1.0, 40))(start)
    np.testing.assert_array_equal(x[0], start[0])
    np.testing.assert_array_equal(x[2], start[2])
    assert value[0] == value[2] == np.inf
    np.testing.assert_allclose(x[1], [0.45, 0.0], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_scales_six_orders_apart(dtype):
    """A smooth function, not quadratic, whose coordinates have curvatures of 1e-3 to 1e3."""
    weight, centre = np.array([1e3, 1.0, 1e-3], dtype), np.array([0.3, 0.7, 0.9], dtype)
    function = lambda x: (weight * (jnp.cosh(x - centre) - 1.0)).sum(-1)
    with jax.enable_x64(dtype == np.float64):
        x, value = jax.jit(lambda start: minimise_in_box(batched(function), start, 0.0, 1.0, 60))(np.full((1, 3), 0.5, dtype))
    x, value = np.asarray(x), np.asarray(value)
    np.testing.assert_allclose(x[0], centre, atol=1e-5 if dtype == np.float64 else 0.02)
    assert value[0] < (1e-9 if dtype == np.float64 else 1e-6)


def test_never_above_the_start(x64):
    """Of a rough function from many starts after any number of steps; all inside the box."""
    function = lambda x: jnp.sin(40 * x).sum(-1) + jnp.abs(x - 0.3).sum(-1) + jnp.where(x[:, 0] < 0.2, 5.0, 0.0)
    start = np.random.default_rng(0).uniform(size=(16, 2))
    solve = jax.jit(lambda steps: minimise_in_box(batched(function), start, 0.0, 1.0, steps))
    for steps in (0, 1, 25):
        x, value = solve(steps)
        assert (value <= function(start)).all()
        np.testing.assert_allclose(value, function(x), rtol=1e-12)
        assert ((x >= 0) & (x <= 1)).all()
        if steps == 0:
            np.testing.assert_array_equal(x, start)
