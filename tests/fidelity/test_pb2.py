"""Population based bandits: the model against dense float64 linear algebra, what is observed, and where copies go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.core import FRESH, CubeSpec, Feedback, Kind, Run
from jaxhpo.fidelity import bandit
from jaxhpo.fidelity.bandit import Params
from jaxhpo.fidelity.pb2 import PB2, confidence
from jaxhpo.surrogates.kernels import inputs_of

SPEC = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 6), Run(Kind.CHOICE, 3)))
LINE = CubeSpec.floats(1)

init = jax.jit(lambda optimizer, key, spec: optimizer.init(key, spec), static_argnums=2)
ask = jax.jit(lambda optimizer, state: optimizer.ask(jax.random.key(0), state))
predict, with_pending = jax.jit(bandit.predict), jax.jit(bandit.with_pending)
update = jax.jit(lambda optimizer, key, state, query, feedback: optimizer.update(key, state, query, feedback))


def dense(params, x, t, other, other_t):
    """The formula of the kernel, in float64: floats and integers by distance, the last coordinate by equality."""
    x, t, other, other_t = (np.asarray(a, np.float64) for a in (x, t, other, other_t))
    r2 = ((x[:, None, :3] - other[None, :, :3]) ** 2).sum(-1) / float(params.lengthscale) ** 2
    differs = x[:, None, 3] != other[None, :, 3]
    time = (1 - float(params.forgetting)) ** (np.abs(t[:, None] - other_t) / 2)
    return float(params.signal) * np.exp(-0.5 * r2 - differs) * time


def observations(seed, rows, used):
    rng = np.random.default_rng(seed)
    x = np.asarray(inputs_of(SPEC, jnp.asarray(rng.random((rows, 4)), jnp.float32)))
    t = rng.integers(0, 9, rows).astype(np.float32)
    z = np.sin(5 * x[:, 0]) * (1 - t / 10) + 0.1 * rng.normal(size=rows)
    return x, t, z.astype(np.float32), np.arange(rows) < used


def test_the_time_varying_kernel_is_its_closed_form():
    t, other = jnp.asarray([0.0, 1.0, 4.5]), jnp.asarray([0.0, 3.0])
    expected = 0.7 ** (np.abs(np.asarray(t)[:, None] - np.asarray(other)) / 2)
    np.testing.assert_allclose(bandit.decay(0.3, t, other), expected, rtol=1e-6)
    np.testing.assert_array_equal(bandit.decay(0.0, t, other), np.ones((3, 2)))
    forgotten = np.asarray(bandit.decay(1.0, t, other))  # of the same time alone is anything left
    assert forgotten[0, 0] == 1
    assert (forgotten.ravel()[1:] < 1e-2).all()
    params = Params(*map(jnp.float32, (0.4, 0.1, 0.2, 1.0)))
    x, t, _, _ = observations(0, 12, 12)
    got = bandit.correlation(params, SPEC, x[:5], t[:5], x, t)
    np.testing.assert_allclose(got, dense(params, x[:5], t[:5], x, t), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("used", [40, 23, 1])
def test_posterior_and_pending_points_are_those_of_dense_float64(used):
    params = Params(*map(jnp.float32, (0.35, 0.02, 0.15, 1.7)))
    x, t, z, mask = observations(1, 40, used)
    points, _, _, _ = observations(2, 9, 9)
    pending, when = observations(3, 3, 3)[:2]
    belief = jax.jit(bandit.condition, static_argnums=(1, 6))(params, SPEC, x, t, z, mask, 3)
    for point, time in zip(pending, when, strict=True):
        belief = with_pending(belief, jnp.asarray(point), time)
    mean, variance = predict(belief, jnp.asarray(points), 4.0)

    x, t, z = x[:used], t[:used], z[:used].astype(np.float64)
    noise = float(params.noise * params.signal)
    at = np.full(9, 4.0)
    k = dense(params, x, t, points, at)
    # The mean is that of the observations alone, the variance that of observations and pending points.
    np.testing.assert_allclose(mean, k.T @ np.linalg.solve(dense(params, x, t, x, t) + noise * np.eye(used), z), atol=2e-4)
    every, times = np.concatenate([x, pending]), np.concatenate([t, when])
    k = dense(params, every, times, points, at)
    matrix = dense(params, every, times, every, times) + noise * np.eye(len(every))
    np.testing.assert_allclose(variance, 1.7 - (k * np.linalg.solve(matrix, k)).sum(0), atol=2e-4)


@pytest.mark.parametrize("forgetting", [None, 0.05])
def test_the_fit_is_the_most_probable_of_the_grid(forgetting):
    x, t, z, mask = observations(4, 32, 27)
    got = jax.jit(bandit.fit, static_argnums=0)(SPEC, x, t, z, mask, forgetting)
    x, t, z = x[:27], t[:27], z[:27].astype(np.float64)
    middle = np.sqrt(3 / 6)
    scores = {}
    for length in (0.25, 0.5, 1.0, 2.0, 4.0):
        for noise in (0.01, 0.1, 1.0):
            for rate in (0.01, 0.1, 0.3, 0.6) if forgetting is None else (forgetting,):
                params = Params(length * middle, noise, rate, 1.0)
                matrix = dense(params, x, t, x, t) + noise * np.eye(27)
                signal = np.clip(z @ np.linalg.solve(matrix, z) / 27, 0.05, 20.0)
                sign, logdet = np.linalg.slogdet(signal * matrix)
                assert sign == 1
                value = -0.5 * z @ np.linalg.solve(signal * matrix, z) - 0.5 * logdet - 0.5 * np.log(length) ** 2
                scores[length * middle, noise, rate] = value, signal
    best = max(scores, key=lambda at: scores[at][0])
    np.testing.assert_allclose((got.lengthscale, got.noise, got.forgetting), best, rtol=1e-5)
    np.testing.assert_allclose(got.signal, scores[best][1], rtol=1e-2)


def test_changes_are_kept_in_a_ring_and_made_robust():
    changes = bandit.no_changes(5, 1)
    z, mask = bandit.targets(changes)
    assert not mask.any()
    assert (np.asarray(z) == 0).all()
    record = jax.jit(bandit.recorded)
    told = [(-1.0, True), (9.0, False), (-2.0, True), (np.nan, True)]
    for first in range(4):  # three a round: the last five of twelve are left
        change = jnp.asarray([value for value, _ in told]) - first
        which = jnp.asarray([which for _, which in told])
        cube = jnp.full((4, 1), first / 10) + jnp.arange(4)[:, None] / 100
        changes = record(changes, cube, jnp.full(4, float(first)), change, which)
    rows = sorted(
        zip(np.asarray(changes.time), np.asarray(changes.cube)[:, 0].round(3), np.asarray(changes.change), strict=True)
    )
    np.testing.assert_allclose(
        rows, [(2, 0.22, -4), (2, 0.23, np.inf), (3, 0.3, -4), (3, 0.32, -5), (3, 0.33, np.inf)], rtol=1e-5
    )

    values = jnp.asarray([-1.0, -1.2, -0.8, -1.1, -0.9, -1e30, jnp.inf, 7.0], jnp.float32)
    full = bandit.Changes(jnp.zeros((8, 1)), jnp.zeros(8), values, jnp.int32(7))
    z, mask = (np.asarray(x) for x in bandit.targets(full))
    np.testing.assert_array_equal(mask, np.arange(8) < 7)
    assert z[7] == 0
    assert z[6] == z[2] == z[:7].max()  # a failure counts as the worst that did not fail
    assert (np.argsort(z[:6]) == [5, 1, 3, 0, 4, 2]).all()
    np.testing.assert_allclose((z[:7].mean(), z[:7].std()), (0, 1), atol=1e-5)
    only = bandit.Changes(jnp.zeros((4, 1)), jnp.zeros(4), jnp.full(4, jnp.inf), jnp.int32(3))
    assert not bandit.targets(only)[1].any()


def feed(optimizer, state, loss, steps, seed=0):
    loss = jnp.asarray(loss, jnp.float32)
    told = Feedback(loss, jnp.ones(loss.shape, bool), jnp.broadcast_to(jnp.asarray(steps, jnp.int32), loss.shape))
    return update(optimizer, jax.random.key(seed), state, ask(optimizer, state), told)


def test_what_is_observed():
    """The change of the loss over an interval at its rate, at the point it was trained with, from the parent's loss on."""
    optimizer = PB2(jh.RandomSearch(4), interval=4, max_steps=10, window=16, fraction=0.25)
    state = init(optimizer, jax.random.key(0), SPEC)
    state = feed(optimizer, state, [0.5, 0.7, 0.6, 0.9], 4)
    assert int(state.changes.count) == 0  # there is no loss before the first
    query = ask(optimizer, state)
    np.testing.assert_array_equal(query.parent, [0, 1, 2, 0])
    state = feed(optimizer, state, [0.4, 0.6, np.nan, 0.45], [8, 8, 6, 8])
    second = ask(optimizer, state)
    np.testing.assert_array_equal(second.parent, [0, 0, 0, 3])  # the worst of three, and the one that diverged
    state = feed(optimizer, state, [0.3, 0.35, 0.38, 0.44], 10)
    assert (np.asarray(ask(optimizer, state).parent) == FRESH).all()
    count = int(state.changes.count)
    assert count == 8
    np.testing.assert_allclose(state.changes.time[:8], [1, 1, 1, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(state.changes.change[:4], [-0.1, -0.1, np.inf, -0.05], rtol=1e-5)
    np.testing.assert_allclose(state.changes.change[4:8], [-0.2, -0.1, -0.04, -0.02], rtol=1e-5)  # two steps of four
    np.testing.assert_array_equal(state.changes.cube[:8], SPEC.snap(jnp.concatenate([query.cube, second.cube])))
    state = feed(optimizer, state, [0.3, np.nan, 0.3, 0.3], 4)
    assert int(state.changes.count) == 9  # a failure needs no loss before
    assert np.isinf(state.changes.change[8])
    assert state.changes.time[8] == 0


def test_a_copy_takes_the_point_of_the_highest_bound():
    """On a line the bound is looked up on a fine grid, with the member that goes on and the copies before as pending."""
    optimizer = PB2(jh.RandomSearch(6), interval=1, max_steps=100, window=32, fraction=0.4, forgetting=0.1)
    state = init(optimizer, jax.random.key(3), LINE)
    progress = lambda cube: jnp.exp(-20 * (cube[:, 0] - 0.65) ** 2)
    loss = jnp.full(6, 9.0)
    for step in range(1, 7):
        before, query = state, ask(optimizer, state)
        loss = jnp.where(query.parent < 0, 9.0, loss[query.parent]) - progress(query.cube)
        state = feed(optimizer, state, loss, step, seed=step)
    query = ask(optimizer, state)
    copies = np.flatnonzero(np.asarray(query.parent) != np.arange(6))
    assert copies.size == 2
    belief, beta = jax.jit(PB2._belief)(optimizer, state)
    assert float(beta) == pytest.approx(float(confidence(1.0, jnp.int32(30))))
    grid = jnp.linspace(0, 1, 2001)[:, None]
    for lane in range(6):
        if lane not in copies:
            belief = with_pending(belief, query.cube[lane], jnp.float32(6.0))
    for lane in copies:
        mean, variance = predict(belief, jnp.concatenate([grid, query.cube[lane][None]]), jnp.float32(6.0))
        bound = np.asarray(jnp.sqrt(beta * variance) - mean)
        assert bound[-1] >= bound[:-1].max() - 1e-3
        belief = with_pending(belief, query.cube[lane], jnp.float32(6.0))
    assert not np.array_equal(before.population.cube, state.population.cube)


def test_copies_keep_levels_and_change_choices_by_chance_alone():
    """With no redraws every copy has the choice of its parent, and integers lie at the middle of their level."""
    optimizer = PB2(jh.RandomSearch(6), interval=1, max_steps=9, window=32, fraction=0.4, resample_probability=0.0)
    state = init(optimizer, jax.random.key(0), SPEC)
    modelled = 0
    for step in range(1, 9):
        before = ask(optimizer, state)
        loss = 9.0 - 0.1 * step - (before.cube * jnp.asarray([1.0, -1.0, 0.5, 0.2])).sum(1)
        state = feed(optimizer, state, loss, step, seed=step)
        after = ask(optimizer, state)
        for b in np.flatnonzero(np.asarray(after.parent) != np.arange(6)):
            parent = before.cube[after.parent[b]]
            assert SPEC.level_of(after.cube[b])[3] == SPEC.level_of(parent)[3]
            np.testing.assert_allclose(after.cube[b][2:], SPEC.snap(after.cube[b])[2:], rtol=1e-6)
            far = np.abs(np.asarray(after.cube[b] - parent))[:2].max() > 0.11  # further than without the model
            modelled += far
            assert step > 1 or not far
    assert modelled > 5


def test_copies_go_where_progress_is():
    """Progress peaks at 0.7 with a width of 0.15 and is otherwise nothing: more than half of the copies made in the second
    half of a population train within 0.15 of it. Random points do by 0.3 each: half of 70 in less than 1 of 3000 runs."""
    optimizer = PB2(jh.RandomSearch(6), interval=1, max_steps=16, window=32, fraction=0.4, forgetting=0.1)
    near, made = 0, 0
    for seed in range(5):
        state = init(optimizer, jax.random.key(seed), LINE)
        loss = jnp.full(6, 20.0)
        for step in range(1, 16):
            query = ask(optimizer, state)
            loss = jnp.where(query.parent < 0, 20.0, loss[query.parent])
            loss -= jnp.exp(-0.5 * ((query.cube[:, 0] - 0.7) / 0.15) ** 2)
            if step > 8:
                copies = np.asarray(query.parent) != np.arange(6)
                made += copies.sum()
                near += (np.abs(np.asarray(query.cube)[copies, 0] - 0.7) < 0.15).sum()
            state = feed(optimizer, state, loss, step, seed=100 * seed + step)
    assert made == 70
    assert near > 0.5 * made
