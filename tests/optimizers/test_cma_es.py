"""CMA-ES: its update against a peer and by its symmetries, restarts, late answers, failures, integers and choices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import ndtr

from jaxhpo.benchmarks import functions
from jaxhpo.core import CubeSpec, Feedback, Kind, Query, Run
from jaxhpo.optimizers import cma_distributions as parts
from jaxhpo.optimizers.cma_distributions import Gaussian
from jaxhpo.optimizers.cma_es import CMAES, STALE
from jaxhpo.optimizers.eigen import eigh

MIXED = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 9, count=2), Run(Kind.CHOICE, 4)))

init = jax.jit(lambda optimizer, key, spec: optimizer.init(key, spec), static_argnums=2)
update = jax.jit(lambda optimizer, key, state, loss, done: optimizer.update(
    key, state, optimizer.ask(key, state), Feedback(loss, done, jnp.ones(loss.shape, jnp.int32))))  # fmt: skip
adapted = jax.jit(parts.adapted)


def told(optimizer, state, loss, seed=0, done=True):
    shape = (optimizer.num_lanes,)
    return update(optimizer, jax.random.key(seed), state, jnp.broadcast_to(loss, shape), jnp.broadcast_to(done, shape))


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def best_losses(loss, spec, optimizer, keys, rounds, share=1.0):
    """The lowest loss of a search for each key, when a share of the lanes at random is done in each round."""

    def search(key):
        def one_round(carry, key):
            state, lowest = carry
            query = optimizer.ask(key, state)
            done = jax.random.uniform(key, (optimizer.num_lanes,)) < share
            losses = loss(query.cube)
            state = optimizer.update(key, state, query, Feedback(losses, done, jnp.ones(done.shape, jnp.int32)))
            return (state, jnp.fmin(lowest, jnp.nanmin(jnp.where(done, losses, jnp.nan)))), None

        start = (optimizer.init(jax.random.fold_in(key, 0), spec), jnp.asarray(jnp.inf))
        return jax.lax.scan(one_round, start, jax.random.split(key, rounds))[0][1]

    return jax.vmap(search)(keys)


def cube_loss(problem):
    return jax.vmap(lambda z: problem.loss(None, problem.space.decode(z)) - problem.optimum)


def in_float64(state):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_eigenvalues_are_lapacks(size, x64):
    rng = np.random.default_rng(size)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = (turn * np.logspace(0, 5, size)) @ turn.T
    for dtype, rtol in ((np.float64, 1e-10), (np.float32, 1e-1)):
        values, vectors = jax.jit(eigh)(jnp.asarray(matrix, dtype), jnp.eye(size, dtype=dtype))
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix), rtol=rtol)
        eps = 20 * size * np.finfo(dtype).eps
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(size), atol=eps)
        np.testing.assert_allclose((vectors * values) @ vectors.T, matrix, atol=1e5 * eps)
        # Started from the answer and from a slightly wrong basis it says the same.
        again, _ = jax.jit(eigh)(jnp.asarray(matrix, dtype), vectors + dtype(1e-5))
        np.testing.assert_allclose(np.sort(again), np.sort(values), atol=1e5 * eps)


def test_with_all_lanes_done_it_is_the_textbook(x64):
    """Mean, step size, covariance and paths are those of cmaes.CMA, fed with the same samples, for 40 generations."""
    cmaes = pytest.importorskip("cmaes")
    size, lanes = 5, 9
    optimizer = CMAES(lanes, sigma=0.1)
    state = in_float64(init(optimizer, jax.random.key(0), CubeSpec.floats(size)))
    peer = cmaes.CMA(np.full(size, 0.5), 0.1, population_size=lanes)
    turned = np.random.default_rng(0).normal(size=(size, size))
    start = None
    for generation in range(40):
        x = np.asarray(state.gaussian.mean + state.gaussian.sigma * state.step)
        loss = (((x - 0.53) @ turned) ** 2).sum(1)
        start = start or loss.min()
        peer.tell([(point.copy(), value) for point, value in zip(x, loss, strict=True)])
        state = told(optimizer, state, loss, generation)
        ours = state.gaussian
        # The peer adds 1e-8 to squared lengths, from which the difference comes.
        np.testing.assert_allclose(ours.mean, peer.mean, atol=1e-9)
        np.testing.assert_allclose(ours.sigma, peer._sigma, rtol=1e-6)
        np.testing.assert_allclose(ours.cov, peer._C, atol=1e-6 * np.abs(peer._C).max())
        np.testing.assert_allclose(ours.path_sigma, peer._p_sigma, atol=1e-6)
        np.testing.assert_allclose(ours.path_c, peer._pc, atol=1e-6)
    assert loss.min() < 1e-3 * start


def test_the_diagonal_variant_is_the_diagonal_of_the_whole(x64):
    """At C = I one update with the same rates has the same mean, step size, paths, and diagonal of C."""
    size, rows = 6, 12
    rng = np.random.default_rng(1)
    steps, loss = rng.normal(size=(rows, size)), rng.random(rows)
    rates = parts.rates_of(rows, rows, size, True, 1.0, jnp.dtype("float64"))
    weights = parts.weights_by_rank(rates.weights, jnp.asarray(loss), jnp.ones(rows, bool))
    mean, late = jnp.asarray(rng.random(size)), jnp.zeros(rows, bool)
    kinds = (Gaussian.start(mean, 0.2, separable) for separable in (False, True))
    whole, diagonal = (adapted(start, rates, steps, weights, late) for start in kinds)
    np.testing.assert_allclose(diagonal.cov, jnp.diagonal(whole.cov), rtol=1e-12)
    for field in ("mean", "sigma", "path_sigma", "path_c"):
        np.testing.assert_allclose(getattr(diagonal, field), getattr(whole, field), rtol=1e-10, atol=1e-12)
    plain = parts.rates_of(rows, rows, size, False, 1.0, jnp.dtype("float64"))
    np.testing.assert_allclose([rates.c_1, rates.c_mu], [plain.c_1 * (size + 2) / 3, plain.c_mu * (size + 2) / 3], rtol=1e-12)


def test_turned_and_moved_samples_give_the_turned_and_moved_distribution(x64):
    size, rows = 5, 10
    rng = np.random.default_rng(2)
    turn, move = np.linalg.qr(rng.normal(size=(size, size)))[0], rng.normal(size=size)
    rates = parts.rates_of(rows, rows, size, False, 1.0, jnp.dtype("float64"))
    mean, late = rng.random(size), jnp.asarray(rng.random(rows) < 0.3)
    one = Gaussian.start(jnp.asarray(mean), 0.3, False)
    other = Gaussian.start(jnp.asarray(turn @ mean + move), 0.3, False)
    for _ in range(6):
        steps = rng.normal(size=(rows, size)) * 2.0
        weights = parts.weights_by_rank(rates.weights, jnp.asarray(rng.random(rows)), jnp.ones(rows, bool))
        one, other = adapted(one, rates, steps, weights, late), adapted(other, rates, steps @ turn.T, weights, late)
    np.testing.assert_allclose(other.mean, turn @ one.mean + move, atol=1e-9)
    np.testing.assert_allclose(other.sigma, one.sigma, rtol=1e-9)
    np.testing.assert_allclose(other.cov, turn @ one.cov @ turn.T, atol=1e-9)
    np.testing.assert_allclose(other.path_sigma, turn @ one.path_sigma, atol=1e-9)


def test_rates_are_those_of_the_table_in_the_tutorial(x64):
    """Weights and rates for lambda = 10 and N = 5, computed by NumPy from the tutorial's table 1."""
    raw = np.log(11 / 2) - np.log(np.arange(1, 11))
    mu, mu_below = raw[:5].sum() ** 2 / (raw[:5] ** 2).sum(), raw[5:].sum() ** 2 / (raw[5:] ** 2).sum()
    c_1 = 2 / (6.3**2 + mu)
    c_mu = min(1 - c_1, 2 * (mu - 2 + 1 / mu) / (7**2 + mu))
    alpha = min(1 + c_1 / c_mu, 1 + 2 * mu_below / (mu + 2), (1 - c_1 - c_mu) / (5 * c_mu))
    weights = np.where(raw > 0, raw / raw[:5].sum(), alpha * raw / -raw[5:].sum())
    rates = parts.rates_of(10, 14, 5, False, 1.0, jnp.dtype("float64"))
    np.testing.assert_allclose(rates.weights, [*weights, 0, 0, 0, 0], rtol=1e-12)
    np.testing.assert_allclose([rates.c_1, rates.c_mu], [c_1, c_mu], rtol=1e-12)
    np.testing.assert_allclose(rates.c_sigma, (mu + 2) / (5 + mu + 5), rtol=1e-12)
    np.testing.assert_allclose(rates.c_c, (4 + mu / 5) / (9 + 2 * mu / 5), rtol=1e-12)


def test_failures_rank_last_and_never_pull():
    weights = parts.rates_of(8, 10, 3, False, 1.0, jnp.dtype("float32")).weights
    inf = np.inf
    loss = np.asarray([inf, 2.0, inf, 0.0, inf, inf, 1.0, inf, inf, inf], np.float32)  # the last two rows are empty
    used = np.arange(10) < 8
    got = np.asarray(parts.weights_by_rank(weights, jnp.asarray(loss), jnp.asarray(used)))
    np.testing.assert_allclose(got[[3, 6, 1]], weights[:3] / weights[:3].sum(), rtol=1e-5)
    np.testing.assert_allclose(got[[0, 2, 4, 5, 7]], weights[4:8].sum() / 5, rtol=1e-5)
    assert (got[8:] == 0.0).all()
    sound = np.asarray(parts.weights_by_rank(weights, jnp.arange(10.0), jnp.asarray(used)))
    np.testing.assert_array_equal(sound, weights)


SMALL = CMAES(6, population=12, separable=True, max_doublings=1)
SMALL_SPEC = CubeSpec.floats(3)


def test_a_flat_function_doubles_the_population_up_to_its_limit():
    """EqualFunValues after as many generations as the history holds: restarts elsewhere after 12, 24 and 24 answers each."""
    state = init(SMALL, jax.random.key(0), SMALL_SPEC)
    history = state.recent.size
    assert history == 10 + np.ceil(30 * 3 / 12)
    seen = []
    for number in range(history * (2 + 4 + 4)):  # rounds of six answers
        old, before = state.gaussian, int(state.population)
        state = told(SMALL, state, 1.0, number)
        if int(state.gaussian.generation) < int(old.generation):
            seen.append((before, int(old.generation) + 1))
            assert float(state.gaussian.sigma) == np.float32(SMALL.sigma)
            assert np.abs(state.gaussian.mean - old.mean).max() > 1e-3
    assert seen == [(12, history), (24, history), (24, history)]


def test_a_generation_that_failed_as_a_whole_is_a_restart_elsewhere():
    state = told(SMALL, init(SMALL, jax.random.key(0), SMALL_SPEC), np.nan)
    after = told(SMALL, state, np.nan, 1)
    assert int(after.gaussian.generation) == 0
    assert int(after.population) == int(state.population)
    assert np.abs(after.gaussian.mean - 0.5).max() > 1e-3
    partly = told(SMALL, state, np.asarray([np.nan, 1.0, np.nan, np.nan, np.nan, np.nan]), 1)
    place = state.gaussian.mean + state.gaussian.sigma * state.step[1]
    np.testing.assert_allclose(partly.gaussian.mean, place, atol=1e-6)  # the only one of twelve that did not fail


def test_late_answers_are_steps_from_the_mean_of_now_and_those_before_a_restart_are_dropped():
    optimizer = dataclasses.replace(SMALL, sigma=0.05)
    state = init(optimizer, jax.random.key(3), SMALL_SPEC)
    others = np.arange(6) != 2
    for number in range(5):  # 25 answers: one generation of 15, and ten of the next
        state = told(optimizer, state, jnp.sum((state.cube - 0.4) ** 2, axis=1), number, others)
    assert int(state.gaussian.generation) == 1
    assert np.asarray(state.age).tolist() == [0, 0, 1, 0, 0, 0]
    place = state.gaussian.mean + state.gaussian.sigma * state.step
    np.testing.assert_allclose(place, state.cube, atol=1e-6)
    after = told(optimizer, state, 0.5, 9, ~others)
    assert int(after.count) == int(state.count) + 1
    assert bool(after.late[int(state.count)])
    stale = dataclasses.replace(state, age=jnp.full(6, STALE))
    assert int(told(optimizer, stale, 0.5, 9, ~others).count) == int(state.count)


def test_a_late_step_is_no_longer_than_samples_hardly_ever_are(x64):
    """Hansen 2011: a late sample far away moves the mean by no more than one at sqrt(N) + 2 N / (N + 2)."""
    size, rows = 4, 6
    rates = parts.rates_of(rows, rows, size, False, 0.0, jnp.dtype("float64"))
    start = Gaussian.start(jnp.zeros(size), 0.1, False)
    steps = np.zeros((rows, size))
    steps[0, 0] = 1000.0
    weights = jnp.asarray([1.0, 0, 0, 0, 0, 0])
    mean = lambda late: adapted(start, rates, steps, weights, jnp.full(rows, late)).mean[0]
    np.testing.assert_allclose(mean(True), 0.1 * (np.sqrt(size) + 2 * size / (size + 2)), rtol=1e-12)
    np.testing.assert_allclose(mean(False), 100.0)


def test_integers_keep_a_chance_of_their_neighbours():
    """After the correction each side of the mean's level has at least half the margin, and at an end the whole."""
    rng = np.random.default_rng(0)
    edges = np.arange(1, 9) / 9
    ints, least = np.arange(40), 0.02
    mean = rng.uniform(-0.1, 1.1, 40).astype(np.float32)
    level = np.clip(np.floor(mean * 9), 0, 8).astype(int)
    low, high = (edges[np.clip(i, 0, 7)].astype(np.float32) for i in (level - 1, level))
    sigma = np.exp(rng.uniform(-8, 0, 40)).astype(np.float32)
    narrow = dataclasses.replace(Gaussian.start(jnp.asarray(mean), 1.0, True), cov=jnp.asarray(sigma**2))
    new = parts.with_margin(narrow, (low, high), ints, least)
    wide = sigma * new.margin
    below, above = np.asarray(ndtr((low - new.mean) / wide)), np.asarray(ndtr((new.mean - high) / wide))
    ends = low == high
    assert ends.any()
    assert (~ends).any()
    assert (np.minimum(below, above)[ends] > 0.999 * least).all()
    assert (np.minimum(below, above)[~ends] > 0.499 * least).all()
    assert ((new.mean > low) & (new.mean < high))[~ends].all()
    # Where both sides have more than the margin nothing changes.
    free = (ndtr((low - mean) / sigma) > least) & (ndtr((mean - high) / sigma) > least)
    assert free.any()
    np.testing.assert_allclose(new.mean[free], mean[free], atol=1e-3)


def test_integers_away_from_the_mean_are_told_as_steps_to_the_middle_of_their_level():
    optimizer = CMAES(8)
    state = init(optimizer, jax.random.key(0), MIXED)
    narrow = dataclasses.replace(state.gaussian, sigma=jnp.asarray(0.01), margin=jnp.asarray([1.0, 1.0, 5.0, 5.0]))
    state = dataclasses.replace(state, gaussian=narrow)
    steps = np.asarray(jax.jit(optimizer._centred)(state))
    ints, mean_level = np.asarray(state.cube)[:, 2:4], 4
    moved = np.floor(ints * 9) != mean_level
    assert moved.any()
    assert (~moved).any()
    np.testing.assert_allclose((0.5 + 0.01 * 5.0 * steps[:, 2:])[moved], ints[moved], atol=1e-6)
    np.testing.assert_array_equal(steps[:, 2:][~moved], np.asarray(state.step)[:, 2:][~moved])
    np.testing.assert_array_equal(steps[:, :2], np.asarray(state.step)[:, :2])


def test_choices_follow_the_ranks_and_keep_a_margin():
    counts = np.asarray([4, 2])
    start = parts.even_categories(counts, jnp.float32)
    options = np.asarray([[1, 0], [1, 1], [3, 1], [0, 0]])
    weights = jnp.asarray([0.7, 0.3, -0.4, -0.6])
    new = parts.with_options(start, counts, options, weights, 0.15)
    # One step of length 1 in the metric of Fisher, and then the margin.
    gradient = np.asarray([[-0.25, 0.75, -0.25, -0.25], [0.2, -0.2, 0, 0]])
    length = np.sqrt((gradient[0] ** 2 / 0.25).sum() + (gradient[1, :2] ** 2 / 0.5).sum())
    moved = np.asarray(start.chance) + gradient / length
    least = 0.15 / (counts - 1)
    expected = []
    for row, low, count in zip(moved, least, counts, strict=True):
        above = np.maximum(row[:count], low) - low
        expected.append([*(low + above * (1 - low * count) / above.sum()), *np.zeros(4 - count)])
    np.testing.assert_allclose(new.chance, expected, atol=1e-6)
    for _ in range(200):
        new = parts.with_options(new, counts, options, weights, 0.15)
    np.testing.assert_allclose(new.chance.sum(1), 1.0, atol=1e-5)
    assert (np.asarray(new.chance) >= least[:, None] * (np.arange(4) < counts[:, None]) - 1e-6).all()
    assert int(new.chance[0].argmax()) == 1


SEEDS = jax.random.split(jax.random.key(11), 6)


@pytest.mark.slow
def test_it_finds_the_bottom_of_a_turned_valley_when_lanes_end_at_different_times():
    """A level that the median of 6 seeds passes by a factor of 10."""
    problem = functions.ellipsoid(5, shift=2.0)
    lowest = best_losses(cube_loss(problem), problem.space.spec, CMAES(8, max_doublings=0), SEEDS, 375, 0.4)
    assert np.median(lowest) < 1e-2


def test_it_finds_optima_at_the_bounds():
    target = np.asarray([0.0, 1.0, 0.0, 1.0, 0.3], np.float32)
    loss = lambda cube: jnp.abs(cube - target).sum(1)
    lowest = best_losses(loss, CubeSpec.floats(5), CMAES(8, separable=True, max_doublings=0), SEEDS, 150)
    assert np.median(lowest) < 1e-3


def test_it_searches_mixed_spaces_when_lanes_end_at_different_times():
    """A level that the median of 6 seeds passes by a factor of 10."""
    mixed = functions.mixed_integer(8, shift=1.0)
    lowest = best_losses(cube_loss(mixed), mixed.space.spec, CMAES(16, max_doublings=1), SEEDS, 300, 0.4)
    assert np.median(lowest) < 1.0


@pytest.mark.slow
def test_it_searches_spaces_without_floats():
    options = functions.categorical(6, 4)
    lowest = best_losses(cube_loss(options), options.space.spec, CMAES(16, max_doublings=1), SEEDS, 60)
    assert np.median(lowest) < 0.3


LARGE = CMAES(32, separable=True, max_doublings=0)


def test_no_array_of_a_separable_state_is_larger_than_the_table():
    state = jax.eval_shape(lambda: LARGE.init(jax.random.key(0), CubeSpec.floats(1000)))
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 64 * 1000


@pytest.mark.slow
def test_a_thousand_dimensions_come_a_hundred_times_closer():
    loss = lambda cube: ((cube - 0.45) ** 2).sum(1)
    first = best_losses(loss, CubeSpec.floats(1000), LARGE, SEEDS[:1], 1)
    assert best_losses(loss, CubeSpec.floats(1000), LARGE, SEEDS[:1], 1500)[0] < 1e-2 * first[0]


def test_the_query_is_that_of_a_plain_optimizer():
    optimizer = CMAES(4)
    state = init(optimizer, jax.random.key(0), MIXED)
    query = optimizer.ask(jax.random.key(1), state)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), query, Query.fresh(state.cube)))
    assert optimizer.first_population(5) == 8
    assert CMAES(4, population=7).first_population(5) == 7
    assert CMAES(64).first_population(5) == 64
