import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.core import CubeSpec, Kind, Run
from jaxhpo.surrogates.trust_region import FIRST, GREATEST, LEAST, box_of, first_region, moved_region

move = jax.jit(moved_region, static_argnums=4)


def region_at(length, best=0.0):
    return dataclasses.replace(first_region(), length=jnp.float32(length), best=jnp.float32(best))


def after(region, losses, num_dims=2, counts=True):
    ended = []
    for loss in losses:
        loss = np.atleast_1d(np.asarray(loss, np.float32))
        region, ends = move(region, loss, np.ones(loss.shape, bool), counts, num_dims)
        ended.append(bool(ends))
    return region, ended


def test_grows_after_three_successes_in_a_row_up_to_its_greatest_length():
    region, _ = after(region_at(0.4), [-1.0, -2.0])
    assert region.length == np.float32(0.4)
    region, _ = after(region, [-1.5, -3.0, -4.0])  # one that does not improve: from the beginning
    assert region.length == np.float32(0.4)
    region, _ = after(region, [-5.0])
    assert region.length == np.float32(0.8)
    assert region.successes == 0
    region, _ = after(region, -6.0 - np.arange(9))
    assert region.length == np.float32(GREATEST)
    assert region.best == -14.0


@pytest.mark.parametrize(("dims", "failures"), [(2, 4), (4, 4), (7, 7)])
def test_shrinks_after_as_many_failures_as_dimensions_or_four(dims, failures):
    region, _ = after(region_at(0.8), np.ones(failures - 1), dims)
    assert region.length == np.float32(0.8)
    region, _ = after(region, [1.0], dims)
    assert region.length == np.float32(0.4)
    assert region.failures == 0
    region, _ = after(region, [*np.ones(failures - 1), -1.0, *np.ones(failures - 1)], dims)  # a success in between
    assert region.length == np.float32(0.4)


def test_lanes_count_as_failures_each_but_as_one_success():
    region, _ = after(region_at(0.8), [np.ones(3)])
    assert region.failures == 3
    region, _ = after(region, [[-1.0, -2.0, 3.0, np.inf]])
    assert (region.successes, region.failures, region.best) == (1, 0, -2.0)


def test_lanes_that_are_not_done_are_not_looked_at():
    loss = np.array([-9.0, 5.0, np.nan], np.float32)
    region, _ = move(region_at(0.8), loss, np.array([False, True, False]), True, 2)
    assert (region.best, region.failures) == (0.0, 1)
    region, _ = move(region_at(0.8), loss, np.zeros(3, bool), True, 2)
    assert (region.best, region.failures, region.successes) == (0.0, 0, 0)


def test_an_improvement_must_be_a_thousandth():
    region, _ = after(region_at(0.8, best=-1000.0), [-1000.5])
    assert (region.successes, region.failures, region.best) == (0, 1, -1000.5)
    region, _ = after(region, [-1002.0])
    assert region.successes == 1


def test_the_initial_design_neither_succeeds_nor_fails():
    region, ended = after(first_region(), [3.0, 2.0, 1.0, *np.full(9, 5.0)], counts=False)
    assert region.length == np.float32(FIRST)
    assert (region.successes, region.failures, region.best) == (0, 0, 1.0)
    assert not any(ended)


def test_restarts_below_the_least_length():
    """From 0.8 seven halvings, 28 failures, lead below 2^-7; the new life begins as the first did, with its number."""
    region, ended = after(region_at(FIRST), np.ones(28))
    assert ended == [False] * 27 + [True]
    assert FIRST / 2**6 >= LEAST > FIRST / 2**7
    expected = dataclasses.replace(first_region(), life=jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, region, expected)


def test_trials_that_all_fail_give_no_nan():
    region, _ = after(first_region(), np.full(9, np.inf))
    assert region.best == np.inf
    assert np.isfinite(region.length)


def test_boxes_contain_their_centre_inside_the_cube():
    """Sides in proportion to the lengthscales, of a geometric mean of the length; choices are free."""
    spec = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 9), Run(Kind.CHOICE, 3)))
    log_lengthscale = jnp.log(jnp.array([0.2, 0.8, 0.4, 55.0]))
    centre = jnp.array([0.5, 0.5, 0.5, 0.5], jnp.float32)
    lower, upper = jax.jit(box_of, static_argnums=1)(region_at(0.1), spec, centre, log_lengthscale)
    np.testing.assert_allclose((upper - lower)[:3], [0.05, 0.2, 0.1], rtol=1e-5)
    np.testing.assert_allclose((upper + lower)[:3] / 2, 0.5, rtol=1e-6)
    assert (lower[3], upper[3]) == (0.0, 1.0)
    for seed in range(20):
        centre, scales = jax.random.uniform(jax.random.key(seed), (2, 4))
        lower, upper = jax.jit(box_of, static_argnums=1)(region_at(1.6), spec, centre, 20.0 * scales - 10.0)
        assert ((lower >= 0) & (upper <= 1) & (lower <= centre) & (centre <= upper)).all()
    lower, upper = jax.jit(box_of, static_argnums=1)(region_at(0.1), spec, jnp.array([0.0, 1.0, 0.5, 0.5]), log_lengthscale)
    assert (lower[0], upper[1]) == (0.0, 1.0)


def test_boxes_of_choices_alone_are_the_cube():
    spec = CubeSpec((Run(Kind.CHOICE, 3, count=2),))
    lower, upper = box_of(region_at(0.1), spec, jnp.full(2, 0.5), jnp.zeros(2))
    np.testing.assert_array_equal([lower, upper], [[0, 0], [1, 1]])
