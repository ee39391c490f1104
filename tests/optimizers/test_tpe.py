import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxhpo.benchmarks import nan_cliff, styblinski_tang
from jaxhpo.core import CubeSpec, Feedback, Kind, Query, Run
from jaxhpo.optimizers.random import RandomSearch
from jaxhpo.optimizers.tpe import TPE, Mixture, bandwidths, draw, kernels_at, log_density, log_kernels, neighbour_gaps, untried

MIXED = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 7), Run(Kind.INT, 40, log_low=2), Run(Kind.CHOICE, 3)))
PLANE = CubeSpec.floats(2)
DISCRETE = CubeSpec((Run(Kind.INT, 4), Run(Kind.CHOICE, 3)))

kernels = jax.jit(
    lambda spec, centre, bandwidth, x: log_kernels(spec, kernels_at(spec, centre, bandwidth), x), static_argnums=0
)
density = jax.jit(log_density, static_argnums=0)
draws = jax.jit(draw, static_argnums=(1, 3))
WIDE = {"equal_prior": True, "scott_factor": 1.0, "clip_good": 1.0}
each_kind = pytest.mark.parametrize("densities_of", [{}, WIDE], ids=["narrow", "wide"])
update = jax.jit(lambda tpe, key, state, query, feedback: tpe.update(key, state, query, feedback))
init = jax.jit(lambda tpe, key, spec: tpe.init(key, spec), static_argnums=2)
densities = jax.jit(lambda tpe, state: tpe.densities(state))
gaps = jax.jit(neighbour_gaps)
widths = jax.jit(bandwidths, static_argnums=0)


def told(tpe, state, cube, loss, seed=0, done=True):
    """The state after every lane (or those ``done``) was told a point and a loss of the test's choice."""
    lanes = tpe.num_lanes
    feedback = Feedback(
        jnp.broadcast_to(jnp.asarray(loss, jnp.float32), (lanes,)), jnp.broadcast_to(done, (lanes,)), jnp.ones(lanes, jnp.int32)
    )
    cube = jnp.broadcast_to(jnp.asarray(cube, jnp.float32), state.cube.shape)
    return update(tpe, jax.random.key(seed), state, Query.fresh(cube), feedback)


def random_mixture(rng, spec, rows, used):
    centre = spec.snap(rng.random((rows, spec.num_dims), np.float32))
    weight = np.where(np.arange(rows) < used, rng.random(rows), 0.0)
    weight /= weight.sum() / 0.8
    with np.errstate(divide="ignore"):
        return Mixture(
            kernels_at(spec, centre, rng.uniform(0.02, 0.9, centre.shape).astype(np.float32)),
            jnp.asarray(np.log(weight), jnp.float32),
            jnp.asarray(np.log(0.2), jnp.float32),
        )


def naive_kernel(spec, mean, sd, x, dim):
    """One kernel in one dimension, in float64: density of a float, mass of a level."""
    normal = stats.truncnorm(-mean / sd, (1 - mean) / sd, mean, sd)
    if spec.is_float[dim]:
        return normal.pdf(x)
    level = lambda value: int(spec.level_of(np.full(spec.num_dims, value, np.float32))[dim])
    if spec.is_choice[dim]:
        labels = spec.levels[dim]
        return sd / labels + (1 - sd) * (level(x) == level(mean))
    run, edge = [run for run in spec.runs for _ in range(run.count)][dim], level(x) + np.arange(2)
    if run.log_low:
        edge = np.log1p(edge / (run.log_low - 0.5)) / np.log1p(run.levels / (run.log_low - 0.5))
    else:
        edge = edge / run.levels
    return normal.cdf(edge[1]) - normal.cdf(edge[0])


def test_the_density_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    mixture = random_mixture(rng, MIXED, rows=6, used=4)
    x = np.asarray(MIXED.snap(rng.random((20, MIXED.num_dims), np.float32)))
    expected = []
    for point in x:
        edges = np.log1p((int(MIXED.level_of(point)[3]) + np.arange(2)) / 1.5) / np.log1p(40 / 1.5)
        total = 0.2 * (1 / 7) * np.diff(edges)[0] * (1 / 3)
        for k in range(4):
            product = np.exp(np.float64(mixture.log_weight[k]))
            for dim in range(MIXED.num_dims):
                product *= naive_kernel(
                    MIXED,
                    float(mixture.kernels.centre[k, dim]),
                    float(mixture.kernels.bandwidth[k, dim]),
                    float(point[dim]),
                    dim,
                )
            total += product
        expected.append(np.log(total))
    np.testing.assert_allclose(density(MIXED, mixture, jnp.asarray(x)), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("levels", "log_low"), [(9, 0), (100_000, 1)])
def test_masses_of_an_integer_sum_to_one(levels, log_low):
    """Also far in the tails and for levels much narrower than the kernel."""
    spec = CubeSpec((Run(Kind.INT, levels, log_low=log_low),))
    x = spec.cube_of(jnp.arange(levels)[:, None])
    centre, sd = jnp.asarray([[0.01], [0.3], [0.99]]), jnp.asarray([[0.5], [0.01], [0.1]])
    logs = np.asarray(kernels(spec, spec.snap(centre), sd, x), np.float64)
    assert np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs).sum(0), 1.0, rtol=1e-3)


def test_narrow_kernels_keep_their_digits_in_the_tails():
    spec = CubeSpec((Run(Kind.INT, 50), Run(Kind.FLOAT)))
    x = jnp.asarray([[0.25, 0.3], [0.75, 0.9]])
    centre, sd = jnp.full((1, 2), 0.51), jnp.full((1, 2), 0.03)
    normal = stats.truncnorm(-0.51 / 0.03, 0.49 / 0.03, 0.51, 0.03)
    low = np.floor(np.asarray(x[:, 0]) * 50) / 50
    mass = np.log(np.where(low < 0.5, normal.cdf(low + 0.02) - normal.cdf(low), normal.sf(low) - normal.sf(low + 0.02)))
    expected = mass + normal.logpdf(np.asarray(x[:, 1], np.float64))
    np.testing.assert_allclose(kernels(spec, centre, sd, x)[:, 0], expected, rtol=1e-3)


def test_draws_follow_the_density():
    """Cell counts of 2^15 draws against the density; chi-square over 60 cells, fails by chance in 1 of 10^4 keys."""
    spec = CubeSpec((Run(Kind.FLOAT), Run(Kind.INT, 5), Run(Kind.CHOICE, 3)))
    mixture = random_mixture(np.random.default_rng(3), spec, rows=5, used=3)
    cells, fine, count = 4, 64, 2**15
    grid = np.stack(
        np.meshgrid((np.arange(cells * fine) + 0.5) / (cells * fine), np.arange(5), np.arange(3), indexing="ij"), -1
    )
    flat = grid.reshape(-1, 3)
    x = np.stack([flat[:, 0], (flat[:, 1] + 0.5) / 5, (flat[:, 2] + 0.5) / 3], 1).astype(np.float32)
    mass = np.exp(np.asarray(density(spec, mixture, x), np.float64)).reshape(cells, fine, 15).mean(1).ravel() / cells
    np.testing.assert_allclose(mass.sum(), 1.0, rtol=1e-3)
    points = np.asarray(draws(jax.random.key(0), spec, mixture, count))
    level = np.asarray(spec.level_of(points))
    cell = (np.minimum(points[:, 0] * cells, cells - 1).astype(int) * 5 + level[:, 1]) * 3 + level[:, 2]
    seen = np.bincount(cell, minlength=60)
    assert ((seen - count * mass) ** 2 / (count * mass)).sum() < stats.chi2.isf(1e-4, 59)


def test_gaps_and_bandwidths():
    points = jnp.asarray([[0.5, 0.1], [0.9, 0.9], [0.2, 0.15], [0.99, 0.5]])
    used = jnp.asarray([True, True, True, False])
    np.testing.assert_allclose(gaps(points, used), [[0.4, 0.05], [0.4, 0.75], [0.3, 0.75], [0, 0]], atol=1e-6)
    alone = gaps(points, jnp.arange(4) == 1)
    np.testing.assert_allclose(alone, [[0, 0], [0.9, 0.9], [0, 0], [0, 0]], atol=1e-6)
    spec = CubeSpec((Run(Kind.FLOAT), Run(Kind.FLOAT)))
    found = widths(spec, points, used, 0.5)
    np.testing.assert_allclose(found[:3], [[0.4, 0.1], [0.4, 0.75], [0.3, 0.75]], atol=1e-6)
    spec = CubeSpec((Run(Kind.INT, 2), Run(Kind.CHOICE, 3)))
    np.testing.assert_allclose(widths(spec, points, used, 0.5)[:3], [[0.4, 0.5], [0.4, 0.5], [0.3, 0.5]], atol=1e-6)


def test_no_bandwidth_falls_below_scotts_rule():
    """100 normal points of deviation 0.1 in three dimensions: neighbours lie near, Scott's rule gives 0.1 * 100^(-1 / 7)."""
    points = np.clip(np.random.default_rng(5).normal(0.5, 0.1, (128, 3)), 0, 1).astype(np.float32)
    used, spec = np.arange(128) < 100, CubeSpec.floats(3)
    scott = 0.6 * points[:100].std(0) * 100 ** (-1 / 7)
    assert (np.abs(scott - 0.6 * 0.1 * 0.518) < 0.005).all()
    found = widths(spec, points, used, 0.5, 0.6)[:100]
    np.testing.assert_allclose(found, np.maximum(np.maximum(gaps(points, used)[:100], 0.005), scott), rtol=1e-4)
    assert (np.isclose(found, scott, rtol=1e-4).mean(0) > 0.8).all()
    without = np.maximum(gaps(points, used)[:100], 0.005)
    np.testing.assert_allclose(widths(spec, points, used, 0.5, 0.0)[:100], without, rtol=1e-5)
    assert (without < found).any()


def test_gaps_are_those_of_a_stable_sort():
    """At every size of table, with points at both bounds, levels that many share, and rows that are free."""
    rng = np.random.default_rng(4)
    for rows in (1, 2, 8, 25, 64, 1000, 1024, 2048):
        apart = rng.permutation(1 << 14)[:rows] / (1 << 14)
        points = np.stack([apart, rng.integers(0, 5, rows) / 4, (rng.integers(0, 100, rows) + 0.5) / 100], 1)
        points[0, 0], points[-1, 0] = 0.0, 1.0
        used = rng.random(rows) < 0.7
        used[[0, -1]] = True
        expected = np.zeros_like(points)
        for d in range(3):
            order = np.flatnonzero(used)[np.argsort(points[used, d], kind="stable")]
            steps = np.concatenate([[0.0], np.diff(points[order, d]), [0.0]])
            alone = max(points[0, d], 1 - points[0, d])
            expected[order, d] = np.maximum(steps[:-1], steps[1:]) if order.size > 1 else alone
        np.testing.assert_allclose(gaps(points.astype(np.float32), used), expected, atol=1e-6)


def test_points_too_near_for_the_sort_share_their_gaps():
    """Three in reverse order, nearer to each other than the sort tells apart: one has a neighbour at 0.2, one at 0.5."""
    points = np.zeros((1024, 1), np.float32)
    points[:5, 0] = 0.25 + 2.0**-22, 0.25 + 2.0**-23, 0.25, 0.05, 0.75
    found = gaps(points, np.arange(1024) < 5)[:5, 0]
    assert (found >= 0).all()
    np.testing.assert_allclose(np.sort(found[:3]), [0.0, 0.2, 0.5], atol=1e-6)
    np.testing.assert_allclose(found[3:], [0.2, 0.5], atol=1e-6)


@each_kind
def test_the_best_are_good_by_rank_and_failures_never(densities_of):
    """Ten of 100, with the weights of ranks; of 100 with 3 finite losses only these; of none the prior alone."""
    tpe, rng = TPE(20, num_initial=1, **densities_of), np.random.default_rng(0)
    cube, loss = rng.random((100, 2)).astype(np.float32), rng.normal(size=100)
    expected = np.log(10.5) - np.log(np.arange(1, 11))
    for failed, num_good in ((np.array([], int), 10), (np.argsort(loss)[:97], 3), (np.arange(100), 0)):
        state, losses = init(tpe, jax.random.key(0), PLANE), loss.copy()
        losses[failed] = np.resize([np.nan, np.inf, -np.inf], failed.size)
        for part in np.arange(100).reshape(5, 20):
            state = told(tpe, state, cube[part], losses[part])
        assert not np.isnan(state.loss).any()
        assert np.isfinite(state.cube).all()
        good, bad = densities(tpe, state)
        best = np.argsort(np.where(np.isfinite(losses), losses, np.inf))[:num_good]
        weight = np.exp(np.asarray(good.log_weight))
        np.testing.assert_array_equal(good.kernels.centre[:num_good], cube[best])
        assert (weight[num_good:] == 0).all()
        if num_good == 10:
            np.testing.assert_allclose(weight[:10], expected / expected.sum() * 10 / 11, rtol=1e-5)
        np.testing.assert_allclose(weight.sum() + np.exp(good.log_prior), 1.0, rtol=1e-5)
        others = np.setdiff1d(np.arange(100), best)
        np.testing.assert_array_equal(np.isfinite(bad.log_weight), np.isin(np.arange(bad.log_weight.size), others))
        np.testing.assert_allclose(np.exp(bad.log_weight).sum() + np.exp(bad.log_prior), 1.0, rtol=1e-5)


def test_an_equal_prior_makes_the_ratio_one_where_nothing_was_observed():
    """200 observations around the middle, 20 of them good: in a far corner l and g are their priors."""
    rng, corner = np.random.default_rng(6), jnp.asarray([[0.02, 0.98]])
    cube = np.clip(rng.normal(0.5, 0.05, (200, 2)), 0, 1).astype(np.float32)
    loss = ((cube - 0.5) ** 2).sum(1)
    for equal, expected in ((False, 181 / 21), (True, 1.0)):
        tpe = TPE(20, num_initial=1, equal_prior=equal)
        state = init(tpe, jax.random.key(0), PLANE)
        for part in np.arange(200).reshape(10, 20):
            state = told(tpe, state, cube[part], loss[part])
        good, bad = densities(tpe, state)
        ratio = np.exp(density(PLANE, good, corner) - density(PLANE, bad, corner))
        np.testing.assert_allclose(ratio, expected, rtol=1e-3)
        np.testing.assert_allclose(np.exp(bad.log_weight).sum() + np.exp(bad.log_prior), 1.0, rtol=1e-5)
        middle = jnp.full((1, 2), 0.5)
        assert density(PLANE, good, middle) > density(PLANE, bad, middle)


def test_a_full_table_keeps_the_best_and_the_newest_others():
    tpe, rng = TPE(5, capacity=32, quantile=0.2), np.random.default_rng(1)
    state = init(tpe, jax.random.key(0), PLANE)
    losses, cubes = rng.normal(size=(40, 5)).astype(np.float32), rng.random((40, 5, 2)).astype(np.float32)
    losses[0, 0] = losses.min() - 1.0  # the first stays for ever
    order = np.zeros(0, np.float32)  # losses as they came
    for number, (cube, loss) in enumerate(zip(cubes, losses, strict=True)):
        done = rng.random(5) < 0.8
        done[0] |= number == 0
        state = told(tpe, state, cube, loss, number, done)
        order = np.append(order, loss[done])
        kept = np.asarray(state.loss)[np.asarray(state.number) >= 0]
        assert int(state.told) == order.size
        assert kept.size == min(order.size, 32)
        np.testing.assert_array_equal(np.sort(kept)[:16], np.sort(order)[:16])  # half of the table can ever be good
        assert set(order[-5:]) <= set(kept)
        rows = np.flatnonzero(np.asarray(state.number) >= 0)
        np.testing.assert_array_equal(np.asarray(state.loss)[rows], order[np.asarray(state.number)[rows]])
    assert order.size > 100
    # Each of the others in the table is newer than every one that was dropped and is worse than the best 16.
    others = np.sort(np.asarray(state.number)[np.argsort(state.loss)[16:]])
    assert others[8] > order.size - 16


def test_an_enlarged_state_proposes_the_same():
    tpe, rng = TPE(5, capacity=32), np.random.default_rng(2)
    small = init(tpe, jax.random.key(0), PLANE)
    large = tpe.enlarged(small)
    assert large.loss.shape == (64,)
    assert (tpe.holds(small), tpe.holds(large)) == (32, 64)
    full = TPE(5, capacity=32, max_capacity=64)
    assert init(TPE(5, max_capacity=64), jax.random.key(0), PLANE).loss.size == 64
    assert full.enlarged(large) is large
    assert full.holds(large) > 10**6
    for number in range(6):
        loss = rng.normal(size=5)
        small, large = (told(tpe, state, state.cube, loss, number) for state in (small, large))
        np.testing.assert_allclose(large.cube, small.cube, atol=1e-5)
    np.testing.assert_array_equal(large.loss[:32], small.loss)
    np.testing.assert_array_equal(large.number[32:], -1)


@each_kind
def test_lanes_of_a_batch_keep_apart(densities_of):
    """20 lanes refilled at once lie further apart than 20 lanes refilled one by one, the others far away, with other keys.

    The same observations of a bowl, 10 batches each. Compared are the mean distances to the nearest neighbour.
    """
    tpe, rng = TPE(20, num_initial=1, **densities_of), np.random.default_rng(0)
    points = np.concatenate([0.5 + 0.1 * rng.normal(size=(10, 2)), rng.random((30, 2))]).astype(np.float32)
    loss = ((points - 0.5) ** 2).sum(1)
    state = init(tpe, jax.random.key(0), PLANE)
    state = told(tpe, state, points[:20], loss[:20])
    state = dataclasses.replace(state, cube=jnp.full((20, 2), 0.99))
    batches = [told(tpe, state, points[20:], loss[20:], seed).cube for seed in range(10)]
    state = told(tpe, state, points[20:], loss[20:], 0)
    state = dataclasses.replace(state, cube=jnp.full((20, 2), 0.99))
    apart = [
        told(tpe, state, points[20:], loss[20:], seed, np.arange(20) == seed % 20).cube[seed % 20] for seed in range(100, 300)
    ]

    def nearest(cube):
        cube = np.asarray(cube).reshape(10, 20, 2)
        return (np.linalg.norm(cube[:, :, None] - cube[:, None], axis=-1) + 9.0 * np.eye(20)).min(2).mean()

    assert nearest(batches) > 1.3 * nearest(apart)


@each_kind
def test_a_discrete_space_is_asked_once_through(densities_of):
    """Twelve points, three lanes of which one waits now and then: no point twice before all were asked."""
    tpe = TPE(3, num_initial=2, capacity=16, **densities_of)
    state = init(tpe, jax.random.key(4), DISCRETE)
    asked = [tuple(level) for level in np.asarray(DISCRETE.level_of(state.cube)).tolist()]
    first, turn = len(set(asked)), 0
    while len(asked) < 3 + 12 - first:
        done = np.arange(3) != turn % 3
        before = state
        state = told(tpe, state, state.cube, np.sin(7.0 * np.asarray(state.cube).sum(1)), turn, done)
        np.testing.assert_array_equal(state.cube[~done], before.cube[~done])
        asked += [tuple(level) for level in np.asarray(DISCRETE.level_of(state.cube))[done].tolist()]
        turn += 1
    new = asked[3 : 3 + 12 - first]
    assert len(set(new) | set(asked[:3])) == 12


def test_an_untried_point_is_found_where_there_is_one():
    spec = CubeSpec((Run(Kind.INT, 5), Run(Kind.CHOICE, 2), Run(Kind.INT, 3, log_low=1)))
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(2), np.arange(3), indexing="ij"), -1).reshape(-1, 3)
    cube = spec.cube_of(jnp.asarray(grid))
    other = jax.jit(untried, static_argnums=1)
    for free in (0, 7, 29):
        point = other(jax.random.key(free), spec, cube, jnp.arange(30) != free, cube[3])
        np.testing.assert_array_equal(spec.level_of(point), grid[free])
    np.testing.assert_array_equal(other(jax.random.key(0), spec, cube, jnp.ones(30, bool), cube[3]), cube[3])


def _lowest(optimizer, problem, key, rounds):
    """The lowest finite loss and all losses ``[R, B]``."""
    spec, loss = problem.space.spec, jax.vmap(lambda z: problem.loss(None, problem.space.decode(z)))

    def one_round(state, key):
        query = optimizer.ask(key, state)
        losses = loss(query.cube)
        return optimizer.update(key, state, query, Feedback.finished(losses)), losses

    key_init, key_rounds = jax.random.split(key)
    _, losses = jax.lax.scan(one_round, optimizer.init(key_init, spec), jax.random.split(key_rounds, rounds))
    return jnp.nanmin(losses), losses


def _searches(optimizer, problem, seeds, rounds):
    keys = jax.random.split(jax.random.key(11), seeds)
    return jax.jit(jax.vmap(lambda key: _lowest(optimizer, problem, key, rounds)))(keys)


def test_it_beats_random_search():
    """100 trials, 20 keys each. Of one run each TPE's is lower in 19 of 20; so a wrong order of the medians, or not 15 of 20
    pairs, comes in less than 1 of 10^4."""
    problem = styblinski_tang(5, shift=0.7)
    ours, _ = _searches(TPE(1), problem, 20, 100)
    random, _ = _searches(RandomSearch(1), problem, 20, 100)
    assert (ours < random).sum() >= 15
    assert jnp.median(ours) < jnp.median(random)


@each_kind
def test_it_stays_away_from_a_cliff_of_failures(densities_of):
    """60 trials, 40 keys: share and median are 5 standard errors and more from these bounds."""
    problem = nan_cliff()
    best, losses = _searches(TPE(1, **densities_of), problem, 40, 60)
    assert float(jnp.isnan(losses[:, 10:]).mean()) < 0.35
    assert float(jnp.median(best)) < 1e-2


@each_kind
def test_it_keeps_the_type_of_its_state(densities_of, x64):
    tpe, key = TPE(2, num_initial=1, **densities_of), jax.random.key(0)
    for spec in (DISCRETE, MIXED):
        state = jax.eval_shape(lambda spec=spec: tpe.init(key, spec))
        for dtype in (jnp.float32, jnp.float64):
            cast = lambda x, dtype=dtype: jax.ShapeDtypeStruct(
                x.shape, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
            )
            before = jax.tree.map(cast, state)
            feedback = Feedback.finished(jnp.arange(2, dtype=jnp.float64))
            after = jax.eval_shape(lambda s, f: tpe.update(key, s, tpe.ask(key, s), f), before, feedback)
            assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, before)
