"""Hypergradient descent: its steps against a loop of optax, its lives, what its explorer is told, and what it refuses."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhpo.core import Array, CubeSpec, Feedback, Kind, Query, Run, UnfitDimensions, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.optimizers import TPE, HypergradientDescent, RandomSearch
from jaxhpo.optimizers.gradient_descent import clipped

MIXED = CubeSpec((Run(Kind.INT, 5), Run(Kind.FLOAT, count=2), Run(Kind.CHOICE, 3)))
CENTRE = jnp.asarray([0.2, 0.9, 1.3], jnp.float32)  # the last coordinate's minimum is beyond the border
ROUNDS = 80
momentum = partial(optax.sgd, momentum=0.8)

init = jax.jit(lambda optimizer, key, spec: optimizer.init(key, spec), static_argnums=2)
update = jax.jit(lambda optimizer, key, state, query, feedback: optimizer.update(key, state, query, feedback))


def quadratic(cube):
    return (jnp.asarray([1.0, 3.0, 2.0]) * (cube - CENTRE) ** 2).sum()


def told(loss, grad, done=None):
    """Feedback of lanes that are all done unless said otherwise."""
    loss = jnp.asarray(loss, jnp.float32)
    done = jnp.ones(loss.shape, bool) if done is None else jnp.asarray(done)
    return Feedback(loss, done, jnp.ones(loss.shape, jnp.int32), jnp.broadcast_to(jnp.asarray(grad, jnp.float32), grad.shape))


@partial(jax.jit, static_argnums=(1, 2))
def search(optimizer, spec, rounds, key, done=None, junk=0.0):
    """A search on the quadratic over the last three dimensions: points ``[R, B, D]``, losses ``[R, B]``, the last state."""
    done = jnp.ones((rounds, optimizer.num_lanes), bool) if done is None else done
    loss = lambda cube: quadratic(cube[-3:]) + 0.1 * cube[: spec.num_dims - 3].sum()

    def one_round(state, round):
        key, done = round
        query = optimizer.ask(key, state)
        losses, grads = jax.vmap(jax.value_and_grad(loss))(query.cube)
        feedback = told(jnp.where(done, losses, junk), jnp.where(done[:, None], grads, junk), done)
        return optimizer.update(key, state, query, feedback), (query.cube, losses)

    state = optimizer.init(jax.random.fold_in(key, 0), spec)
    state, (cubes, losses) = jax.lax.scan(one_round, state, (jax.random.split(jax.random.fold_in(key, 1), rounds), done))
    return cubes, losses, state


def feed(optimizer, state, feedback, seed=0):
    return update(optimizer, jax.random.key(seed), state, optimizer.ask(jax.random.key(0), state), feedback)


@pytest.mark.parametrize("coordinates", ["cube", "unconstrained"])
@pytest.mark.parametrize("factory", [optax.adam, momentum])
def test_a_single_lane_is_a_loop_of_optax_from_the_middle(factory, coordinates):
    rate = 0.15
    optimizer = HypergradientDescent(factory, rate, 1, coordinates, clip=0.0, patience=1000, num_initial=1)
    cubes, _, _ = search(optimizer, CubeSpec.floats(3), 20, jax.random.key(0))

    to_cube = (lambda z: z) if coordinates == "cube" else jax.nn.sigmoid
    gradient = jax.grad(lambda z: quadratic(to_cube(z)))
    chain, place = factory(rate), jnp.full(3, 0.5 if coordinates == "cube" else 0.0)
    memory = chain.init(place)
    for cube in cubes[:, 0]:
        np.testing.assert_allclose(cube, to_cube(place), rtol=1e-4, atol=1e-5)
        step, memory = chain.update(gradient(place), memory, place)
        place = optax.apply_updates(place, step)
        if coordinates == "cube":
            place = jnp.clip(place, 0.0, 1.0)
    if coordinates == "cube":
        assert float(cubes[-1, 0, 2]) == 1.0


@pytest.mark.parametrize(
    ("factory", "coordinates", "rate", "close"), [(momentum, "cube", 0.1, 1e-6), (optax.adam, "unconstrained", 0.3, 1e-3)]
)
def test_it_finds_the_minimum_also_at_the_border(factory, coordinates, rate, close):
    optimizer = HypergradientDescent(factory, rate, 2, coordinates, num_initial=3)
    cubes, losses, _ = search(optimizer, CubeSpec.floats(3), ROUNDS, jax.random.key(0))
    assert float(losses.min()) < quadratic(jnp.asarray([0.2, 0.9, 1.0])) + close
    best = cubes.reshape(-1, 3)[jnp.argmin(losses)]
    np.testing.assert_allclose(best, [0.2, 0.9, 1.0], atol=close**0.5)
    assert ((cubes >= 0) & (cubes <= 1)).all()


def test_lanes_descend_from_the_best_points_of_the_design():
    """Five points on two lanes, one of which failed: the lanes start from the two best of the others, with a step."""
    optimizer = HypergradientDescent(optax.sgd, 0.1, 2, clip=0.0, num_initial=5)
    state = init(optimizer, jax.random.key(1), CubeSpec.floats(2))
    points = np.asarray(state.design.points)
    np.testing.assert_array_equal(points[0], [0.5, 0.5])
    assert len(np.unique(points, axis=0)) == 5
    grads = np.arange(10, dtype=np.float32).reshape(5, 2) / 20
    np.testing.assert_array_equal(state.cube, points[:2])
    state = feed(optimizer, state, told([3.0, np.nan], grads[:2]))
    np.testing.assert_array_equal(state.cube, points[2:4])
    # Lane 0 waits: lane 1 takes the last point, then starts from the best that is known, point 4.
    state = feed(optimizer, state, told([9.0, 7.0], grads[[2, 3]], [False, True]))
    np.testing.assert_array_equal(state.cube, points[[2, 4]])
    state = feed(optimizer, state, told([9.0, 1.0], grads[[2, 4]], [False, True]))
    np.testing.assert_allclose(state.cube, [points[2], np.clip(points[4] - 0.1 * grads[4], 0, 1)], rtol=1e-6)
    # Point 2 is worse than point 0, from which lane 0 therefore starts.
    state = feed(optimizer, state, told([4.0, 0.0], grads[[2, 4]], [True, False]))
    np.testing.assert_allclose(state.cube[0], np.clip(points[0] - 0.1 * grads[0], 0, 1), rtol=1e-6)


def test_uniform_points_around_the_middle_where_dimensions_are_many():
    design = init(HypergradientDescent(num_lanes=1, num_initial=3), jax.random.key(0), CubeSpec.floats(1500)).design
    assert (design.points[0] == 0.5).all()
    assert ((design.points >= 0.25) & (design.points <= 0.75)).all()
    assert float(design.points[1:].std()) == pytest.approx(0.5 / np.sqrt(12), rel=0.1)


def test_a_hundred_thousand_hyperparameters_take_memory_in_proportion():
    num_dims = 100_000
    optimizer, spec, key = (
        HypergradientDescent(learning_rate=0.1, num_lanes=1, num_initial=1),
        CubeSpec.floats(num_dims),
        jax.random.key(0),
    )
    state = init(optimizer, key, spec)
    feedback = told([1.0], jnp.full((1, num_dims), 1e-3))
    compiled = update.lower(optimizer, key, state, optimizer.ask(key, state), feedback).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 4 * num_dims
    np.testing.assert_allclose(compiled(optimizer, key, state, optimizer.ask(key, state), feedback).cube, 0.4, rtol=1e-3)


@pytest.mark.parametrize(
    ("loss", "slope"), [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, np.nan), (0.5, np.nan), (0.5, np.inf)]
)  # the last two have a loss that is the best so far, but nothing leads on from there
def test_a_lane_that_diverged_begins_again_near_the_best_with_half_its_rate(loss, slope):
    optimizer = HypergradientDescent(momentum, 0.1, 1, clip=0.0, num_initial=1)
    down = jnp.asarray([[1.0, 0.0]])
    state = feed(optimizer, init(optimizer, jax.random.key(0), CubeSpec.floats(2)), told([1.0], down))
    np.testing.assert_allclose(state.cube, [[0.4, 0.5]], rtol=1e-6)
    state = feed(optimizer, state, told([loss], slope * down))
    assert (jnp.abs(state.cube - 0.5) < 0.1).all()  # five standard deviations
    assert (state.cube != 0.5).all()
    start = state.cube
    state = feed(optimizer, state, told([1.1], down))
    np.testing.assert_allclose(state.cube, start - 0.05 * down, rtol=1e-6)  # without the momentum of the last life
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.descent))


def test_a_lane_without_improvement_begins_again_and_where_all_failed_anywhere():
    optimizer = HypergradientDescent(momentum, 0.1, 1, clip=0.0, num_initial=1, patience=3)
    still = jnp.zeros((1, 2))
    state = init(optimizer, jax.random.key(0), CubeSpec.floats(2))
    for loss in (1.0, 2.0, 1.5):
        state = feed(optimizer, state, told([loss], still))
        np.testing.assert_array_equal(state.cube, 0.5)
    state = feed(optimizer, state, told([1.2], still))
    assert (state.cube != 0.5).all()
    lost = init(optimizer, jax.random.key(0), CubeSpec.floats(2))
    seen = []
    for seed in range(20):
        lost = feed(optimizer, lost, told([np.nan], jnp.full((1, 2), jnp.nan)), seed)
        seen.append(np.asarray(lost.cube[0]))
    assert np.ptp(seen, axis=0).min() > 0.5  # of 20 uniform numbers: less by chance once in 20,000
    assert float(lost.design.scale[0]) == 1.0


def test_long_gradients_are_shortened_without_overflow():
    grad = np.asarray([[3.0, 4.0], [0.3, 0.4], [3e30, -4e30], [0.0, 0.0], [3e38, 3e38], [1e-30, 0.0]], np.float32)
    expected = [[1.2, 1.6], [0.3, 0.4], [1.2, -1.6], [0, 0], [np.sqrt(2), np.sqrt(2)], [1e-30, 0]]
    np.testing.assert_allclose(clipped(grad, 2.0), expected, rtol=1e-5)
    np.testing.assert_array_equal(clipped(grad, 0.0), grad)
    optimizer = HypergradientDescent(momentum, 0.1, 1, clip=2.0, num_initial=1)
    state = init(optimizer, jax.random.key(0), CubeSpec.floats(2))
    np.testing.assert_allclose(feed(optimizer, state, told([1.0], grad[2:3])).cube, [[0.38, 0.66]], rtol=1e-5)


@pytree_dataclass
class Log:
    """What the recording explorer saw: number of updates, and what it was told in each."""

    count: Array
    loss: Array
    done: Array
    cube: Array


@pytree_dataclass
class Recorder:
    """An explorer that proposes a row of ``starts``, ``[K, B, D]``, after each update in which a lane ended."""

    starts: Array
    num_lanes: int = setting(static=True)

    def init(self, key, spec):
        del key
        rows, lanes = self.starts.shape[0], self.num_lanes
        empty = jnp.zeros((rows, lanes))
        return Log(jnp.zeros((), jnp.int32), empty, empty > 0, jnp.zeros((rows, lanes, spec.num_dims)))

    def ask(self, key, state):
        del key
        return Query.fresh(self.starts[state.count])

    def update(self, key, state, query, feedback):
        del key
        at, ended = state.count, feedback.done.any()
        put = lambda log, row: jnp.where(ended, log.at[at].set(row), log)
        return Log(at + ended, put(state.loss, feedback.loss), put(state.done, feedback.done), put(state.cube, query.cube))


def test_the_explorer_is_told_the_best_of_each_life_and_gives_the_next_start():
    """Scripted losses on two lanes. Lane 0 diverges, waits, later diverges in its gradient alone; lane 1 is out of patience,
    then has a life that fails at its start, which is told as a failure there."""
    starts = jax.random.uniform(jax.random.key(0), (8, 2, 4), jnp.float32)
    optimizer = HypergradientDescent(optax.sgd, 0.1, 2, clip=0.0, patience=2, explorer=Recorder(starts, 2))
    state = init(optimizer, jax.random.key(0), MIXED)
    nan, wait = np.nan, "wait"
    script = [(3.0, 5.0), (2.0, 6.0), (nan, 4.0), (1.0, 4.5), (wait, 4.2), (7.0, nan), (0.5, 8.0)]
    lives, best, bad = [[], []], [(np.inf, None)] * 2, [0, 0]
    counts = 0
    np.testing.assert_array_equal(state.cube, starts[0])
    for number, losses in enumerate(script):
        before, ended = np.asarray(state.cube), []
        grad = np.full((2, 4), 0.5, np.float32)
        if number == 6:
            grad[0, 1] = np.inf  # a best loss that does not lead on
        for lane, loss in enumerate(losses):
            if loss == wait:
                continue
            improved = loss < best[lane][0]
            best[lane] = (loss, before[lane]) if improved else best[lane]
            best[lane] = (best[lane][0], before[lane]) if best[lane][1] is None else best[lane]
            bad[lane] = 0 if improved else bad[lane] + 1
            if np.isnan(loss) or not np.isfinite(grad[lane, 1:3]).all() or bad[lane] == 2:
                ended.append(lane)
        done = [loss != wait for loss in losses]
        state = feed(optimizer, state, told([0.0 if loss == wait else loss for loss in losses], grad, done))
        for lane in range(2):
            now = np.asarray(state.cube[lane])
            if lane in ended:
                lives[lane].append((counts, *best[lane]))
                best[lane], bad[lane] = (np.inf, None), 0
                np.testing.assert_array_equal(now, starts[counts + 1][lane])
            elif done[lane]:
                np.testing.assert_allclose(now[1:3], np.clip(before[lane][1:3] - 0.05, 0, 1), rtol=1e-5)
                np.testing.assert_array_equal(now[[0, 3]], before[lane][[0, 3]])
            else:
                np.testing.assert_array_equal(now, before[lane])
        counts += bool(ended)
    log = state.explorer
    assert int(log.count) == counts == 4
    assert [len(lane) for lane in lives] == [2, 2]
    for lane in range(2):
        np.testing.assert_array_equal(np.flatnonzero(log.done[:, lane]), [at for at, _, _ in lives[lane]])
        for at, loss, cube in lives[lane]:
            np.testing.assert_equal(float(log.loss[at, lane]), loss if np.isfinite(loss) else nan)
            np.testing.assert_array_equal(log.cube[at, lane], cube)


def test_integers_and_choices_are_held_in_a_life_and_explored_between_lives():
    optimizer = HypergradientDescent(learning_rate=0.5, num_lanes=3, patience=3, explorer=RandomSearch(3))
    cubes, _, _ = search(optimizer, MIXED, 60, jax.random.key(0))
    discrete = np.asarray(cubes[:, :, [0, 3]])
    changes = (discrete[1:] != discrete[:-1]).all(-1)
    np.testing.assert_array_equal((discrete[1:] != discrete[:-1]).any(-1), changes)  # both or none
    assert changes.sum(0).min() > 3
    assert changes.sum(0).max() < 20  # a life is three trials at least
    assert len(np.unique(MIXED.level_of(cubes)[:, :, 0])) == 5


def test_the_table_of_an_explorer_grows_with_it():
    optimizer = HypergradientDescent(num_lanes=2, explorer=TPE(2, capacity=8, max_capacity=16))
    state = init(optimizer, jax.random.key(0), MIXED)
    assert optimizer.holds(state) == 8
    assert optimizer.enlarged(state).explorer.loss.shape == (16,)
    plain = HypergradientDescent(num_lanes=2)
    state = init(plain, jax.random.key(0), CubeSpec.floats(2))
    assert plain.enlarged(state) is state
    assert plain.holds(state) > 10**9


def test_lanes_under_way_are_left_alone_during_and_after_the_design():
    optimizer, spec, rounds = HypergradientDescent(num_lanes=4, patience=3, num_initial=10), CubeSpec.floats(3), 40
    done = jnp.asarray(np.random.default_rng(0).random((rounds, 4)) < 0.45)
    runs = [search(optimizer, spec, rounds, jax.random.key(2), done, junk) for junk in (0.0, np.nan, -np.inf)]
    cubes = np.asarray(runs[0][0])
    waiting = ~np.asarray(done)[:-1]
    np.testing.assert_array_equal(cubes[1:][waiting], cubes[:-1][waiting])
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, runs[0], other)
    assert not any(np.isnan(x).any() for x in jax.tree.leaves(runs[0]))


def test_many_learning_rates_in_one_program():
    rates, key = jnp.asarray([0.02, 0.1]), jax.random.key(0)
    optimizer = HypergradientDescent(momentum, num_lanes=2, num_initial=3, patience=1000)
    axes = dataclasses.replace(jax.tree.map(lambda _: None, optimizer), learning_rate=0)
    many = dataclasses.replace(optimizer, learning_rate=rates)
    together, _, _ = jax.vmap(lambda one: search(one, CubeSpec.floats(3), ROUNDS, key), (axes,))(many)
    for i, rate in enumerate(rates):
        apart, _, _ = search(dataclasses.replace(optimizer, learning_rate=rate), CubeSpec.floats(3), ROUNDS, key)
        np.testing.assert_allclose(together[i], apart, atol=1e-4)


def test_its_state_is_the_same_in_double_precision(x64):
    optimizer, key = HypergradientDescent(num_lanes=2, num_initial=3, coordinates="unconstrained"), jax.random.key(0)
    state = init(optimizer, key, CubeSpec.floats(2))
    feedback = Feedback(jnp.ones(2), jnp.ones(2, bool), jnp.ones(2, jnp.int32), jnp.ones((2, 2)))
    after = feed(optimizer, state, feedback)
    types = [x.dtype for x in jax.tree.leaves(after)]
    assert types == [x.dtype for x in jax.tree.leaves(state)]
    assert jnp.dtype("float64") not in types


def test_what_it_refuses():
    key = jax.random.key(0)
    with pytest.raises(
        UnfitDimensions, match=r"dimensions 0, 3: .*another optimizer, or HypergradientDescent\(explorer="
    ) as error:
        HypergradientDescent().init(key, MIXED)
    assert error.value.dims == (0, 3)
    with pytest.raises(UnfitDimensions, match="floats only"):
        HypergradientDescent(num_lanes=2, explorer=RandomSearch(2)).init(key, CubeSpec((Run(Kind.INT, 5),)))
    with pytest.raises(JaxhpoError, match=r"explorer.num_lanes = 3: must be num_lanes = 2"):
        HypergradientDescent(num_lanes=2, explorer=RandomSearch(3)).init(key, MIXED)
    with pytest.raises(JaxhpoError, match=r"optax.adam, not optax.adam\(0.1\)"):
        HypergradientDescent(optax.adam(0.1)).init(key, CubeSpec.floats(2))  # ty: ignore[invalid-argument-type]
    optimizer = HypergradientDescent(num_lanes=2)
    state = optimizer.init(key, CubeSpec.floats(2))
    with pytest.raises(JaxhpoError, match=r"gives no gradients; use jaxhpo.hypergradients.Unrolled\(task, num_steps\)"):
        update(optimizer, key, state, optimizer.ask(key, state), Feedback.finished(jnp.zeros(2)))


def test_it_starts_where_it_is_told():
    """The first point of the design; from the minimum nothing improves on it."""
    start = jnp.asarray([0.2, 0.9, 1.0], jnp.float32)
    cubes, losses, _ = search(
        HypergradientDescent(num_lanes=1, num_initial=1, start=start), CubeSpec.floats(3), 5, jax.random.key(0)
    )
    np.testing.assert_array_equal(cubes[0, 0], start)
    assert losses.min() == losses[0, 0]
    for wrong in (
        HypergradientDescent(start=start[:2]),
        HypergradientDescent(num_lanes=2, start=start, explorer=RandomSearch(2)),
    ):
        with pytest.raises(JaxhpoError, match=r"start of shape \(.*is due, without an explorer"):
            wrong.init(jax.random.key(0), CubeSpec.floats(3))
