import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxhpo.core import CubeSpec, Feedback, Kind, Query, Run, problems_of
from jaxhpo.optimizers import GridSearch
from jaxhpo.optimizers.grid import _advance

SPEC = CubeSpec((Run(Kind.FLOAT), Run(Kind.INT, 4), Run(Kind.CHOICE, 3), Run(Kind.FLOAT)))


ask = jax.jit(lambda search, state: search.ask(jax.random.key(1), state).cube)
update = jax.jit(lambda search, state, cube, done: search.update(jax.random.key(2), state, Query.fresh(cube), told(done)))


def told(done: jax.Array) -> Feedback:
    return Feedback(jnp.zeros(done.shape), done, jnp.ones(done.shape, jnp.int32))


def visited(search: GridSearch, spec: CubeSpec, trials: int) -> np.ndarray:
    """The points of the first trials in the order in which they are given out; lanes end at random."""
    state, rng = search.init(jax.random.key(0), spec), np.random.default_rng(0)
    cube = ask(search, state)
    points = list(np.asarray(cube))
    while len(points) < trials:
        done = rng.random(search.num_lanes) < 0.5
        state = update(search, state, cube, jnp.asarray(done))
        cube = ask(search, state)
        points += list(np.asarray(cube)[done])
    return np.array(points[:trials])


def test_every_combination_once_in_the_order_of_nested_loops_and_then_again():
    search = GridSearch(num_lanes=5, points_per_float=3)
    ends, ints, labels = [0.0, 0.5, 1.0], [0.125, 0.375, 0.625, 0.875], [1 / 6, 0.5, 5 / 6]
    expected = np.array(list(itertools.product(ends, ints, labels, ends)), np.float32)
    assert search.size(SPEC) == len(expected) == 108
    np.testing.assert_allclose(visited(search, SPEC, 150), np.concatenate([expected, expected[:42]]), rtol=1e-6)


@pytest.mark.parametrize(
    ("run", "levels"),
    [
        (Run(Kind.INT, 10), range(10)),  # as many as points_per_int
        (Run(Kind.INT, 1000), [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]),  # thinned
        # 1 to 20 by the logarithm: places 1/9 apart in log(0.5 .. 20.5); 1 covers the first three of them
        (Run(Kind.INT, 20, log_low=1), [0, 1, 2, 3, 5, 8, 13, 19]),
        (Run(Kind.CHOICE, 23), range(23)),  # never thinned
    ],
)
def test_levels_of_integers_and_choices(run, levels):
    search, spec = GridSearch(num_lanes=2), CubeSpec((run,))
    assert search.size(spec) == len(levels)
    points = jnp.asarray(visited(search, spec, len(levels)))
    np.testing.assert_array_equal(spec.level_of(points)[:, 0], list(levels))
    np.testing.assert_allclose(points, spec.snap(points))


def test_one_point_is_the_middle():
    search = GridSearch(num_lanes=1, points_per_float=1, points_per_int=1)
    spec = CubeSpec((Run(Kind.FLOAT), Run(Kind.INT, 101)))
    assert search.size(spec) == 1
    np.testing.assert_allclose(visited(search, spec, 2), [[0.5, 0.5]] * 2)
    assert problems_of(GridSearch(num_lanes=1, points_per_float=0)) == ["points_per_float = 0: must be at least 1"]


def test_a_grid_larger_than_any_machine_integer():
    search, spec = GridSearch(num_lanes=7), CubeSpec.floats(100)
    assert search.size(spec) == 5**100
    points = visited(search, spec, 40)
    digits = [(i // 25, i // 5 % 5, i % 5) for i in range(40)]
    np.testing.assert_array_equal(points[:, -3:] * 4, digits)
    assert (points[:, :-3] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 2**30), st.integers(0, 2**30)), min_size=4, max_size=4), st.integers(0, 2**30))
def test_mixed_radix_addition_is_that_of_python_integers(places, by):
    counts = np.array([count for count, _ in places], np.int32)
    start = [digit % count for count, digit in places]
    number = 0
    for count, digit in zip(counts.tolist(), start, strict=True):
        number = number * count + digit
    number += by
    expected = []
    for count in counts.tolist()[::-1]:
        expected.append(number % count)
        number //= count
    got = _advance(jnp.asarray(start, jnp.int32), jnp.asarray([by], jnp.int32), counts)
    np.testing.assert_array_equal(got[0], expected[::-1])
