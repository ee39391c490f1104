import numpy as np
import pytest
from scipy import stats

from jaxhpo.analysis import statistics as st

INF = float("inf")


def binomial_floor(coverage, draws, sigmas=4.0):
    """A share of hits that a true ``coverage`` falls below with a chance of about 3e-5."""
    return coverage - sigmas * np.sqrt(coverage * (1 - coverage) / draws)


def test_mean_interval_is_that_of_scipy():
    x = np.array([1.0, 2.0, 4.0, 8.0])
    found = st.mean_interval(x, 0.9)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 3, x.mean(), stats.sem(x)))
    assert found.estimate == 3.75
    assert st.mean_interval([2.0]).high == INF
    assert st.mean_interval([1.0, INF]).estimate == INF
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        st.mean_interval([1.0, np.nan])
    with pytest.raises(ValueError, match="at least one"):
        st.mean_interval([])


def test_mean_interval_covers():
    # 4000 normal samples: exact coverage 0.95. Bound at 4 sigma on either side: fails falsely about 6 in 100 000.
    draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 5))
    hits = np.mean([(f := st.mean_interval(row)).low <= 3.0 <= f.high for row in draws])
    assert binomial_floor(0.95, 4000) < hits < 2 * 0.95 - binomial_floor(0.95, 4000)


def test_median_interval_covers_and_repeats():
    # The percentile bootstrap of a median of 25 covers 0.93 to 0.95 (order statistics); 1000 samples, seeded, at least 0.91.
    draws = np.random.default_rng(2).exponential(1.0, (1000, 25))
    found = [st.median_interval(row, resamples=400) for row in draws]
    assert np.mean([f.low <= np.log(2) <= f.high for f in found]) > binomial_floor(0.93, 1000, 2.5)
    assert [f.estimate for f in found] == np.median(draws, axis=1).tolist()
    assert st.median_interval(draws[0]) == st.median_interval(draws[0])
    assert len({st.median_interval(draws[0], resamples=20, seed=seed) for seed in range(5)}) > 1


def test_median_interval_agrees_with_scipy():
    x = np.random.default_rng(3).normal(size=40)
    ours = st.median_interval(x, resamples=20000)
    theirs = stats.bootstrap(
        (x,), np.median, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.05)


def test_median_interval_holds_infinity():
    found = st.median_interval([1.0, INF, INF])
    assert (found.estimate, found.low, found.high) == (INF, 1.0, INF)


def test_paired_comparison_is_that_of_scipy():
    rng = np.random.default_rng(4)
    a, b = rng.normal(0, 1, 12), rng.normal(0.8, 1, 12)
    found = st.paired_comparison(a, b)
    assert found.p_value == pytest.approx(stats.wilcoxon(a, b).pvalue)
    ranks, sign = stats.rankdata(np.abs(a - b)), np.sign(a - b)
    assert found.effect == pytest.approx((ranks * sign).sum() / ranks.sum())
    assert (found.difference.low, found.difference.high) == pytest.approx(
        stats.t.interval(0.95, 11, (a - b).mean(), stats.sem(a - b))
    )
    assert (found.wins, found.ties, found.losses) == (int((a < b).sum()), 0, int((a > b).sum()))


def test_paired_comparison_with_ties_is_the_exact_permutation_test():
    a, b = np.array([1.0, 2, 3, 4, 5, 6, 7]), np.array([2.0, 3, 4, 4, 7, 8, 6])
    found = st.paired_comparison(a, b)
    assert (found.wins, found.ties, found.losses) == (5, 1, 1)
    d = (a - b)[a != b]
    ranks = stats.rankdata(np.abs(d))
    signs = np.array(np.meshgrid(*[[-1, 1]] * d.size)).reshape(d.size, -1)
    sums = ranks @ signs
    assert found.p_value == pytest.approx(np.mean(np.abs(sums) >= abs(ranks @ np.sign(d)) - 1e-9))


def test_paired_comparison_at_its_edges():
    same = st.paired_comparison([1.0, 2.0, INF], [1.0, 2.0, INF])
    assert (same.ties, same.p_value, same.effect, same.smallest_p) == (3, 1.0, 0.0, 1.0)
    clear = st.paired_comparison([1.0, 2.0, 3.0, 4.0, 5.0], [INF, 3.0, 5.0, 7.0, 9.0])
    assert clear.effect == -1.0
    assert clear.p_value == clear.smallest_p == 2 / 2**5
    with pytest.raises(ValueError, match="pairs are due, not 2 and 1"):
        st.paired_comparison([1.0, 2.0], [1.0])


def test_paired_test_rarely_cries_wolf():
    # Under equality p < 0.05 happens in at most 5 % of 1000 draws; 4 sigma above that: fails falsely about 3 in 100 000.
    rng = np.random.default_rng(5)
    false = np.mean([st.paired_comparison(*rng.normal(size=(2, 8))).p_value < 0.05 for _ in range(1000)])
    assert false < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 1000)


def test_win_probability_counts_pairs():
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 5, 9).astype(float), rng.integers(1, 6, 7).astype(float)
    found = st.win_probability(a, b)
    assert found.estimate == pytest.approx(((a[:, None] < b).sum() + 0.5 * (a[:, None] == b).sum()) / 63)
    back = st.win_probability(b, a)
    assert (back.low, back.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-6)
    all_won = st.win_probability([1.0, 2.0, 3.0], [4.0, 5.0, INF])
    assert (all_won.estimate, all_won.high) == (1.0, 1.0)
    assert 0.2 < all_won.low < 0.8
    assert st.win_probability([1.0], [1.0]).estimate == 0.5


def test_win_probability_covers():
    # True probability by the normal distribution. Method 5 covers close to 0.95; 1500 draws, asked for at least 0.92
    # (a true 0.945 falls below that with a chance of about 2 in 100 000), and not much more than stated.
    rng, truth = np.random.default_rng(7), stats.norm.cdf(1 / np.sqrt(2))
    found = [st.win_probability(rng.normal(0, 1, 10), rng.normal(1, 1, 12)) for _ in range(1500)]
    assert 0.92 < np.mean([f.low <= truth <= f.high for f in found]) < 0.985


def test_friedman_is_that_of_scipy_also_with_ties():
    rng = np.random.default_rng(8)
    for values in (rng.normal(size=(9, 4)), rng.integers(0, 3, (9, 4)).astype(float)):
        found, theirs = st.friedman(values), stats.friedmanchisquare(*values.T)
        assert (found.statistic, found.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
        assert found.mean_ranks == pytest.approx(stats.rankdata(values, axis=1).mean(axis=0))
    assert st.friedman(np.ones((3, 3))).p_value == 1.0
    assert st.friedman([[1.0, INF], [2.0, INF]]).mean_ranks.tolist() == [1.0, 2.0]


def test_holm():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])


def test_quantile_bands_are_numpys_and_hold_infinity():
    curves = np.random.default_rng(9).normal(size=(7, 5))
    assert st.quantile_bands(curves, (0.1, 0.5, 0.8)) == pytest.approx(np.quantile(curves, (0.1, 0.5, 0.8), axis=0))
    with_infinity = st.quantile_bands([[INF, 1.0], [INF, 2.0], [3.0, INF]])
    assert with_infinity.tolist() == [[INF, 1.5], [INF, 2.0], [INF, INF]]


def test_association_finds_what_matters():
    rng = np.random.default_rng(10)
    x, noise, kind = rng.uniform(size=(3, 400))
    label = np.floor(3 * kind)
    loss = (x - 0.5) ** 2 + 0.02 * rng.normal(size=400)
    assert st.association(x, loss) > 0.7
    assert st.association(noise, loss) < 0.08
    assert st.association(label, label + 0.0, categorical=True) == 1.0
    assert st.association(np.ones(5), np.arange(5.0)) == 0.0
    assert st.association(x[:0], loss[:0]) == 0.0
    assert st.association(np.where(x > 0.9, np.nan, x), np.where(x > 0.8, INF, loss)) > 0.5
    # Unrelated values: mean 0 before clipping; with 60 points the mean of the clipped ones stays small.
    assert np.mean([st.association(rng.uniform(size=60), rng.uniform(size=60)) for _ in range(200)]) < 0.08
