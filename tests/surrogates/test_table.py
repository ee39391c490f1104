import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.surrogates.table import Table, empty_table, enlarged, observe, redundancy

observe = jax.jit(observe, static_argnums=5)
redundancy = jax.jit(redundancy)
EPOCH = jnp.int32(0)


def filled(loss, cube=None, epoch=0, rows=16):
    loss = np.asarray(loss, np.float32)
    count = len(loss)
    cube = np.random.default_rng(0).uniform(size=(count, 2)) if cube is None else np.asarray(cube)
    return Table(
        jnp.zeros((rows, 2), jnp.float32).at[:count].set(cube),
        jnp.zeros(rows, jnp.float32).at[:count].set(loss),
        jnp.zeros(rows, jnp.int32).at[:count].set(epoch),
        jnp.int32(count),
    )


def test_lanes_that_are_done_are_added_in_their_order():
    table = empty_table(16, 2)
    assert not table.used.any()
    cube = np.arange(8, dtype=np.float32).reshape(4, 2) / 8
    loss = np.array([4.0, 3.0, np.inf, 1.0], np.float32)
    table = observe(table, cube, loss, EPOCH, np.array([True, False, True, True]), 4)
    table = observe(table, cube, loss, jnp.int32(2), np.array([False, True, False, False]), 4)
    table = observe(table, cube, loss, jnp.int32(3), np.zeros(4, bool), 4)
    assert table.count == 4
    np.testing.assert_array_equal(table.loss[:4], [4.0, np.inf, 1.0, 3.0])
    np.testing.assert_array_equal(table.cube[:4], cube[[0, 2, 3, 1]])
    np.testing.assert_array_equal(table.epoch[:4], [0, 0, 0, 2])
    np.testing.assert_array_equal(table.loss[4:], 0.0)
    np.testing.assert_array_equal(table.failed, np.arange(16) == 1)
    np.testing.assert_array_equal(table.sound, np.isin(np.arange(16), [0, 2, 3]))


def test_redundancy_is_the_nearness_of_something_better():
    """Minus the squared distance to the nearest row with a lower loss, by a double loop; the best quarter stays."""
    rng = np.random.default_rng(1)
    cube, loss = rng.uniform(size=(12, 2)).astype(np.float32), rng.normal(size=12)
    loss[3] = np.inf
    got = redundancy(filled(loss, cube))
    for i in range(12):
        better = [((cube[i] - cube[j]) ** 2).sum() for j in range(12) if loss[j] < loss[i]]
        expected = -np.inf if len(better) < 3 else -min(better)
        np.testing.assert_allclose(got[i], expected, rtol=1e-5)
    np.testing.assert_array_equal(got[12:], -np.inf)


def test_rows_of_earlier_lives_go_first():
    epoch = np.array([0, 1, 0, 1, 1, 1, 1, 1])
    got = np.asarray(redundancy(filled(np.arange(8.0)[::-1], epoch=epoch)))
    assert set(np.argsort(-got)[:2]) == {0, 2}


def test_a_full_table_keeps_the_best_and_closes_up():
    """Many times the capacity: always room for the reserve, rows in use first and in the order of their arrival, the best four
    of all that were ever seen still there."""
    rng = np.random.default_rng(0)
    cube, loss = rng.uniform(size=(20, 4, 2)).astype(np.float32), rng.normal(size=(20, 4)).astype(np.float32)
    table = empty_table(20, 2)
    for i in range(20):
        table = observe(table, cube[i], loss[i], EPOCH, np.ones(4, bool), 4)
        count = int(table.count)
        assert count == min(4 * (i + 1), 16)
        seen = loss[: i + 1].ravel()
        kept = np.asarray(table.loss)
        place = [int(np.flatnonzero(seen == value)[0]) for value in kept[:count]]
        assert place == sorted(place)
        assert place[-4:] == list(range(4 * i, 4 * i + 4))  # the newest
        np.testing.assert_array_equal(table.cube[:count], cube[: i + 1].reshape(-1, 2)[place])
        np.testing.assert_array_equal(kept[count:], 0.0)
        np.testing.assert_array_equal(np.sort(kept[:count])[:4], np.sort(seen)[:4])


def test_the_most_redundant_rows_make_room():
    cube = np.array([[0.1, 0.1], [0.9, 0.9], [0.11, 0.1], [0.1, 0.9], [0.9, 0.1], [0.9, 0.88], [0.5, 0.5], [0.3, 0.6]])
    table = filled([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], cube, rows=8)
    table = observe(table, np.full((2, 2), 0.7, np.float32), np.array([8.0, 9.0], np.float32), EPOCH, np.ones(2, bool), 0)
    np.testing.assert_array_equal(table.loss, [0.0, 1.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0])  # without 2 and 5, beside 0 and 1


def test_enlarged_tables_keep_their_rows():
    table = filled(np.arange(5.0), epoch=3)
    more = enlarged(table, 32)
    assert more.cube.shape == (32, 2)
    assert more.count == 5
    for got, before in zip(jax.tree.leaves(more)[:3], jax.tree.leaves(table)[:3], strict=True):
        assert got.dtype == before.dtype
        np.testing.assert_array_equal(got[:16], before)
        np.testing.assert_array_equal(got[16:], 0)
