import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.core import CubeSpec, Feedback
from jaxhpo.errors import JaxhpoError
from jaxhpo.optimizers.list_search import ListSearch

POINTS = tuple((i / 10, 1 - i / 10) for i in range(9))


def test_every_point_once_in_order_then_random_ones():
    """Lanes end at random, as always; what is given out is in the order of the list nonetheless."""
    search, spec, rng = ListSearch(4, POINTS), CubeSpec.floats(2), np.random.default_rng(1)
    state = search.init(jax.random.key(0), spec)
    seen = list(np.asarray(state.cube))
    for number in range(12):
        query = search.ask(jax.random.key(1), state)
        done = jnp.asarray(rng.random(4) < 0.5)
        told = Feedback(jnp.full(4, jnp.nan), done, jnp.ones(4, jnp.int32))
        state = search.update(jax.random.key(number), state, query, told)
        seen += list(np.asarray(state.cube)[np.asarray(done)])
    np.testing.assert_allclose(seen[:9], POINTS, rtol=1e-6)
    beyond = np.array(seen[9:])
    assert len(beyond) > 8
    assert len(np.unique(beyond)) == beyond.size
    assert int(state.next) == 9


def test_fewer_points_than_lanes():
    search = ListSearch(5, POINTS[:2])
    cube = np.asarray(search.init(jax.random.key(0), CubeSpec.floats(2)).cube)
    np.testing.assert_allclose(cube[:2], POINTS[:2], rtol=1e-6)
    assert len(np.unique(cube[2:])) == 6


def test_settings_are_run_as_they_are_given():
    space = {"lr": jh.Float(1e-4, 1.0, log=True), "n": jh.Int(1, 4), "act": jh.Choice(["a", "b"]), "fixed": 2.5}
    settings = [{"lr": 0.01, "n": 3, "act": "b", "fixed": 2.5}, {"lr": 1.0, "n": 1, "act": "a", "fixed": 2.5}]
    result = jh.minimize(
        lambda key, hparams: hparams["lr"] * hparams["fixed"], space, ListSearch.of(space, settings, 2), key=0, num_trials=2
    )
    assert (list(result.trials["hparams.n"]), list(result.trials["hparams.act"])) == ([3, 1], ["b", "a"])
    np.testing.assert_allclose(result.trials["hparams.lr"], [0.01, 1.0], rtol=1e-5)
    with pytest.raises(JaxhpoError, match=r"settings\[1\]: n: 9 must lie between 1 and 4"):
        ListSearch.of(space, [settings[0], settings[1] | {"n": 9}], 2)


def test_points_that_do_not_fit():
    init = lambda points: ListSearch(2, points).init(jax.random.key(0), CubeSpec.floats(2))
    with pytest.raises(JaxhpoError, match=r"points\[1\] has 3 coordinates where the space has 2"):
        init(((0.1, 0.2), (0.1, 0.2, 0.3)))
    with pytest.raises(JaxhpoError, match=r"points\[0\] = \[0.1, 1.5\]: coordinates must lie between 0 and 1"):
        init(((0.1, 1.5),))
