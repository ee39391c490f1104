import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import qmc

from jaxhpo.core import CubeSpec, Kind, Run
from jaxhpo.surrogates.search import maximise, neighbours, pool_of, single_moves, spread_points

FLOATS = CubeSpec.floats(3)
LEVELS = CubeSpec((Run(Kind.INT, 40), Run(Kind.INT, 20, log_low=2), Run(Kind.CHOICE, 5), Run(Kind.CHOICE, 30)))
MIXED = CubeSpec((Run(Kind.FLOAT, count=2), Run(Kind.INT, 40), Run(Kind.CHOICE, 5), Run(Kind.FLOAT)))


def searched(spec, score, num_candidates=64, **settings):
    """The best of a search around the middle of the cube, jitted."""
    lower, upper = np.zeros(spec.num_dims, np.float32), np.ones(spec.num_dims, np.float32)
    centres = jnp.asarray(spec.snap(jnp.full((2, spec.num_dims), 0.5, jnp.float32)))

    @jax.jit
    def run(key):
        pool = pool_of(key, spec, centres, lower, upper, num_candidates)
        return pool, *maximise(score, pool, spec, lower, upper, **settings)

    pool, point, value = run(jax.random.key(0))
    np.testing.assert_allclose(value, score(point[None])[0], rtol=1e-5, atol=1e-6)
    assert value >= np.nanmax(score(pool))
    np.testing.assert_allclose(spec.snap(point), point, rtol=2e-7)  # division differs by a rounding under jit
    return np.asarray(point)


@jax.jit
def search_floats(key, slope, curvature, top, height, wall, lower, upper):
    """Two hills, one of them smaller by ``height``, beside a wall behind which the score is NaN."""

    def score(x):
        first = x @ slope - curvature * ((x - top[0]) ** 2).sum(-1)
        second = height - 40.0 * ((x - top[1]) ** 2).sum(-1)
        return jnp.where(x[:, 0] > wall, jnp.nan, jnp.logaddexp(first, second))

    pool = pool_of(key, FLOATS, jnp.full((2, 3), 0.5), lower, upper, 512)
    return pool, score(pool), *maximise(score, pool, FLOATS, lower, upper, num_starts=4)


def searched_floats(slope=(0, 0, 0), curvature=0.0, top=((0, 0, 0), (0, 0, 0)), height=-1e30, wall=2.0, box=(0, 1), key=0):
    single = lambda value: jnp.asarray(value, jnp.float32)
    bounds = [jnp.broadcast_to(single(bound), 3) for bound in box]
    parts = (single(part) for part in (slope, curvature, top, height, wall))
    pool, values, point, value = search_floats(jax.random.key(key), *parts, *bounds)
    assert ((pool >= bounds[0]) & (pool <= bounds[1])).all()
    assert value >= np.nanmax(values)
    return point


def test_floats_reach_an_optimum_inside_and_at_exact_bounds():
    """The top at (1.3, 0.4, -0.2) is beyond the cube: at the faces, exactly."""
    point = searched_floats(curvature=5.0, top=((1.3, 0.4, -0.2), (0, 0, 0)))
    assert (point[0], point[2]) == (1.0, 0.0)
    np.testing.assert_allclose(point[1], 0.4, atol=1e-4)


def test_a_box_is_kept_to_its_exact_bounds():
    """That of a trust region; the pool lies in it, too."""
    point = searched_floats(slope=(1, -2, 3), box=((0.2, 0.3, 0.1), (0.6, 0.7, 0.9)))
    np.testing.assert_array_equal(point, np.array([0.6, 0.3, 0.9], np.float32))


@pytest.mark.parametrize("key", range(4))
def test_a_narrow_top_away_from_the_centre_is_found(key):
    """It stands above the wide one in 2 % of the cube, where about 5 of 256 candidates are."""
    tops = ((0.4, 0.4, 0.4), (0.8, 0.2, 0.7))
    point = searched_floats(curvature=8.0, top=tops, height=np.log(3.0), key=key)
    np.testing.assert_allclose(point, tops[1], atol=0.02)


def test_scores_that_are_nan_are_not_chosen():
    """The score grows up to the wall."""
    point = searched_floats(slope=(1, -1, 0), wall=0.5)
    assert 0.45 < point[0] <= 0.5
    assert point[1] == 0.0


def test_a_pool_smaller_than_the_starts_is_refined_whole():
    point = searched(FLOATS, lambda x: -((x - 0.3) ** 2).sum(-1), num_candidates=4, num_starts=8)
    np.testing.assert_allclose(point, 0.3, atol=1e-3)


def test_integers_and_choices_reach_their_best_levels():
    best = np.array([33, 4, 3, 17])

    def score(x):
        level = LEVELS.level_of(x)
        off = jnp.where(LEVELS.is_choice, level != best, jnp.abs(level - best) / 10.0)
        return -off.sum(-1).astype(jnp.float32)

    point = searched(LEVELS, score, num_candidates=256)
    level = np.asarray(LEVELS.level_of(point))
    np.testing.assert_array_equal(level[:3], best[:3])
    assert point.dtype == np.float32


def test_mixed_spaces_reach_the_top_of_both():
    """The place of the top in the floats depends on the choice; integers follow a float."""

    def score(x):
        level = MIXED.level_of(x)
        place = 0.1 + 0.2 * level[:, 3]
        value = -((x[:, 0] - place) ** 2) - (x[:, 1] - 1.5) ** 2 - (x[:, 4] - 0.25) ** 2
        return value - ((x[:, 2] - 0.3) * 2) ** 2 + jnp.where(level[:, 3] == 3, 0.5, 0.0)

    point = searched(MIXED, score)
    np.testing.assert_allclose(point[[0, 4]], [0.7, 0.25], atol=2e-3)
    assert point[1] == 1.0
    assert abs(point[2] - 0.3) < 1 / 40
    assert MIXED.level_of(point)[3] == 3


@pytest.mark.parametrize("dims", [2, 6, 10])
def test_spread_points_are_even(dims):
    """Around the circle no coordinate has a gap of a twentieth, and their discrepancy is far below that of random points (whose
    deviation from their mean is about a tenth)."""
    points = np.asarray(spread_points(jax.random.key(0), 256, dims))
    assert points.dtype == np.float32
    assert ((points >= 0) & (points < 1)).all()
    ordered = np.sort(points, axis=0)
    assert np.diff(np.concatenate([ordered, ordered[:1] + 1]), axis=0).max() < 0.05
    random = np.random.default_rng(0).uniform(size=(256, dims))
    assert qmc.discrepancy(points.astype(np.float64)) < 0.7 * qmc.discrepancy(random)


@pytest.mark.parametrize("spec", [FLOATS, MIXED], ids=["floats", "mixed"])
def test_pools_are_valid_and_neighbours_near(spec):
    """On their levels, inside the box; each neighbour differs from its centre at a few places, and some by little."""
    dims = spec.num_dims
    lower, upper = np.zeros(dims, np.float32), np.ones(dims, np.float32)
    centres = jnp.asarray(spec.snap(jax.random.uniform(jax.random.key(1), (128, dims))))
    pool, near = jax.jit(
        lambda key: (pool_of(key, spec, centres, lower, upper, 256), neighbours(key, spec, centres, lower, upper))
    )(jax.random.key(0))
    assert pool.shape == (256, dims)
    np.testing.assert_array_equal(spec.snap(pool), pool)
    assert ((pool >= 0) & (pool <= 1)).all()
    near = np.asarray(spec.snap(near))
    moved = near != np.asarray(centres)
    assert moved.any(0).all()
    share = moved.any(1).mean()
    assert share > 0.4
    assert moved.sum(1).mean() < 0.7 * dims
    steps = np.abs(near - centres)[:, spec.is_float]
    if steps.size:
        steps = steps[steps > 0]
        assert np.quantile(steps, 0.9) / np.quantile(steps, 0.1) > 20  # of many lengths


def test_single_moves_change_one_dimension_and_reach_every_option():
    spec = CubeSpec((Run(Kind.FLOAT), Run(Kind.INT, 40), Run(Kind.INT, 3), Run(Kind.CHOICE, 5)))
    lower, upper = np.zeros(4, np.float32), np.ones(4, np.float32)
    points = jnp.asarray(spec.snap(jnp.array([[0.37, 0.01, 0.5, 0.3], [0.9, 0.5, 0.99, 0.99]], jnp.float32)))
    moves = jax.jit(lambda points: single_moves(spec, points, lower, upper))(points)
    np.testing.assert_array_equal(spec.snap(moves), moves)
    level, start = np.asarray(spec.level_of(moves)), np.asarray(spec.level_of(points))
    differs = np.asarray(moves != points[:, None, :])
    assert (differs.sum(-1) <= 1).all()
    assert not differs[..., 0].any()
    for row in range(2):
        options = {int(option) for option in level[row][:, 3]}
        assert options == set(range(5))
        steps = {int(step) for step in level[row][:, 1] - start[row, 1]}
        assert steps == {s for s in (-15, -5, -2, -1, 0, 1, 2, 5, 15) if s >= 0 or row == 1}
        assert {int(option) for option in level[row][:, 2]} == {0, 1, 2}
    box = jax.jit(lambda points: single_moves(spec, points, lower, np.array([1, 0.1, 1, 1], np.float32)))(points[:1])
    assert (np.asarray(box)[..., 1] <= 0.1).all()
