"""Losses belong to the points that they are told with, also where these are not the points that were asked for.

A sampler inside another tool tells trials that somebody else chose; so may a loop of one's own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh

LANES, ROUNDS = 8, 25
CENTRE = jnp.array([0.9, 0.1])


@pytest.mark.parametrize("name", ["CMAES", "DifferentialEvolution", "LocalSearch", "PSO"])
def test_a_search_goes_where_the_points_told_were_good(name):
    """All that is told lies near one corner: after that the search asks there, though it never asked there before."""
    optimizer = getattr(jh, name)(num_lanes=LANES)
    spec = jh.Space({"x": jh.Float(0.0, 1.0), "y": jh.Float(0.0, 1.0)}).spec

    @jax.jit
    def asked(key):
        def one_round(state, key):
            of_ask, of_points, of_update = jax.random.split(key, 3)
            query = optimizer.ask(of_ask, state)
            cube = CENTRE + 0.03 * jax.random.normal(of_points, query.cube.shape)
            told = jh.Query.fresh(cube)
            state = optimizer.update(of_update, state, told, jh.Feedback.finished(((cube - CENTRE) ** 2).sum(-1)))
            return state, query.cube

        state = optimizer.init(jax.random.fold_in(key, 0), spec)
        return jax.lax.scan(one_round, state, jax.random.split(jax.random.fold_in(key, 1), ROUNDS))[1]

    cubes = np.asarray(jax.vmap(asked)(jax.random.split(jax.random.key(0), 5)))
    far = np.median(np.abs(cubes - np.asarray(CENTRE)).max(-1), axis=-1)  # of the lanes, in every round of every study
    assert (far[:, 0] > 0.25).all()
    assert (np.median(far[:, -5:], axis=1) < 0.15).all()
