import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.surrogates.outputs import excess, masked_quantile, power_warp, standardised

quantile = jax.jit(masked_quantile, static_argnums=2)
excess = jax.jit(excess)
standardised = jax.jit(standardised)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_quantile_is_the_lower_one_of_numpy(share):
    values = np.random.default_rng(0).normal(size=12).astype(np.float32)
    for count in (1, 2, 5, 12):
        mask = np.random.default_rng(count).permutation(12) < count
        expected = np.quantile(values[mask], share, method="lower")
        assert quantile(np.where(mask, values, np.nan), mask, share) == expected
    assert quantile(values, np.zeros(12, bool), share) == np.inf


@pytest.mark.parametrize("power", [-1.5, -0.3, 0.0, 1e-6, 0.5, 1.0, 2.5])
def test_power_warp_is_that_of_box_and_cox(x64, power):
    """With the log of its slope against the central difference; the logarithm at 0, and near 0 without a seam."""
    v = jnp.array([0.0, 1e-6, 0.3, 1.0, 40.0, 1e4])
    got, log_slope = power_warp(v, power)
    if power == 0.0:
        np.testing.assert_allclose(got, np.log1p(v), rtol=1e-12)
    elif abs(power) > 1e-3:
        np.testing.assert_allclose(got, ((1 + v) ** power - 1) / power, rtol=1e-9)
    else:
        np.testing.assert_allclose(got, np.log1p(v) + power * np.log1p(v) ** 2 / 2, rtol=1e-9)
    h = 1e-4 * (1 + v)
    central = (power_warp(v + h, power)[0] - power_warp(v - h, power)[0]) / (2 * h)
    np.testing.assert_allclose(np.exp(log_slope), central, rtol=1e-6)


def test_slope_by_the_power_has_no_seam(x64):
    """The branches for small and large exponents meet: value and slope by the power against its series in float64."""
    w = np.log1p(3.0)
    value_and_slope = jax.jit(jax.value_and_grad(lambda p: power_warp(3.0, p)[0]))
    for power in (-2e-3, -0.999e-3 / w, -1.001e-3 / w, 0.0, 0.999e-3 / w, 1.001e-3 / w, 2e-3):
        value, slope = value_and_slope(power)
        series = [w * (power * w) ** k / np.prod(np.arange(1.0, k + 2)) for k in range(6)]
        np.testing.assert_allclose(value, sum(series), rtol=1e-9)
        series = [k * w * w * (power * w) ** (k - 1) / np.prod(np.arange(1.0, k + 2)) for k in range(1, 7)]
        np.testing.assert_allclose(slope, sum(series), rtol=1e-6)


def test_excess_is_0_at_the_best_and_1_at_the_median():
    loss = np.array([5.0, 3.0, 4.0, 1e9, 3.5, np.nan, -7.0, np.inf], np.float32)
    mask = np.arange(8) < 5
    np.testing.assert_allclose(excess(loss, mask), [2.0, 0.0, 1.0, 1e4, 0.5, 0, 0, 0])  # winsorised at 10^4
    np.testing.assert_allclose(excess(1e-4 * loss + 1.0, mask)[:5], [2.0, 0.0, 1.0, 1e4, 0.5], rtol=0.01)  # rounding
    tied = np.array([3.0, 3.0, 3.0, 4.0, 7.0], np.float32)  # the median is the best: in units of the range
    np.testing.assert_allclose(excess(tied, np.ones(5, bool)), [0, 0, 0, 0.25, 1.0])


def test_excess_does_not_depend_on_unit_and_shift():
    loss = np.random.default_rng(0).normal(size=9).astype(np.float32)
    every = np.ones(9, bool)
    np.testing.assert_allclose(excess(1e20 * loss, every), excess(loss, every), rtol=1e-5)
    np.testing.assert_allclose(excess(4.0 * loss + 8.0, every), excess(loss, every), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_standardised_has_mean_0_deviation_1_and_its_jacobian(x64, power):
    v, mask = np.random.default_rng(0).exponential(size=10), np.arange(10) < 7
    z, log_jacobian = standardised(v, mask, power)
    np.testing.assert_allclose(z[:7].mean(), 0.0, atol=1e-12)
    np.testing.assert_allclose(z[:7].std(), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(z[7:], 0.0)
    t = np.asarray(power_warp(v, power)[0])[:7]
    h = 1e-5  # of each value with mean and deviation of the warped losses as they are
    slopes = (np.asarray(power_warp(v + h, power)[0]) - np.asarray(power_warp(v - h, power)[0]))[:7] / (2 * h) / t.std()
    np.testing.assert_allclose(log_jacobian, np.log(slopes).sum(), rtol=1e-7)


@pytest.mark.parametrize(
    "loss", [[2.0, 2.0, 2.0, 2.0], [3.0], [], [-3e38, 3e38, 0.0], [0.0, 1e-45], [1.0, 1.0, 1.0000001]], ids=str
)
def test_degenerate_losses_give_finite_values(loss):
    """All the same, one, none, the range of float32, differences of one rounding; with the slope by the power."""
    values = np.zeros(5, np.float32)
    values[: len(loss)] = loss
    mask = np.arange(5) < len(loss)
    v = excess(values, mask)
    for power in (-1.5, 0.0, 2.5):
        z, log_jacobian = standardised(v, mask, power)
        slope = degenerate_slope(power, v, mask)
        assert all(np.isfinite(part).all() for part in (v, z, log_jacobian, slope))
        assert np.abs(z).max() <= 4.0
    if len(set(loss)) < 2:
        np.testing.assert_array_equal(z, 0.0)


degenerate_slope = jax.jit(
    jax.grad(lambda power, v, mask: (lambda z, jacobian: (z**2).sum() + z[0] + jacobian)(*standardised(v, mask, power)))
)
