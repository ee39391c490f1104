"""Bayesian optimization as an optimizer: every acquisition, failures, tables that are full, trust regions, discrete spaces."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.core import CubeSpec, Feedback, Kind, Query, Run, problems_of
from jaxhpo.optimizers import BayesOpt, SobolSearch, registry
from jaxhpo.surrogates.acquisition import ACQUISITIONS
from jaxhpo.surrogates.fit import Priors
from jaxhpo.surrogates.table import observe
from jaxhpo.surrogates.trust_region import FIRST, LEAST

LIGHT = dict(registry.ENTRIES["BayesOpt"].light)
PLANE = CubeSpec.floats(2)
MIXED = CubeSpec((Run(Kind.FLOAT), Run(Kind.INT, 7), Run(Kind.CHOICE, 3)))
DISCRETE = CubeSpec((Run(Kind.INT, 4), Run(Kind.CHOICE, 3)))


def optimizer(num_lanes, **settings):
    return BayesOpt(num_lanes=num_lanes, **(LIGHT | settings))


def teller(bayes):
    """``(state, cube, loss, done, number) -> state``, compiled once."""

    @jax.jit
    def tell(state, cube, loss, done, number):
        loss = jnp.asarray(loss, jnp.float32)
        feedback = dataclasses.replace(Feedback.finished(loss), done=jnp.asarray(done))
        return bayes.update(jax.random.fold_in(jax.random.key(1), number), state, Query.fresh(jnp.asarray(cube)), feedback)

    return lambda state, cube, loss, done=None, number=0: tell(
        state, cube, loss, np.ones(np.shape(loss), bool) if done is None else np.asarray(done), number
    )


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
@pytest.mark.parametrize("trust_region", [False, True], ids=["whole", "region"])
def test_it_keeps_the_type_of_its_state(x64, acquisition, trust_region):
    bayes, key = optimizer(2, acquisition=acquisition, trust_region=trust_region, input_warping=True), jax.random.key(0)
    state = jax.eval_shape(lambda: bayes.init(key, MIXED))
    as_double = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)
    for before in (state, jax.tree.map(as_double, state)):
        feedback = Feedback.finished(jnp.arange(2, dtype=jnp.float64))
        after = jax.eval_shape(lambda s, f: bayes.update(key, s, bayes.ask(key, s), f), before, feedback)
        for name in ("cube", "table", "theta", "label_theta", "life", "design"):
            same = jax.tree.map(lambda x, y: x.dtype == y.dtype, getattr(before, name), getattr(after, name))
            assert all(jax.tree.leaves(same)), name


@pytest.mark.parametrize(
    "settings",
    [
        {"acquisition": "noisy_ei"},
        {"acquisition": "thompson"},
        {"trust_region": True, "input_warping": True, "kernel": "rbf"},
    ],
    ids=["noisy_ei", "thompson", "region, warping, rbf"],
)
def test_every_way_finds_a_bowl(settings):
    """24 trials, 8 keys, the worst of them. Random search would end so near with probability 0.18, for all keys with 1e-6."""
    space = {"x": jh.Float(0.0, 1.0), "y": jh.Float(0.0, 1.0)}
    bowl = lambda key, hparams: (hparams["x"] - 0.3) ** 2 + (hparams["y"] - 0.8) ** 2
    bayes = optimizer(2, num_initial=6, capacity=24, **settings)
    losses = jax.jit(jax.vmap(jh.pure_study(bowl, space, bayes, 24)))(jax.random.split(jax.random.key(0), 8)).loss
    assert float(losses.max()) < 0.0025


def test_without_any_success_the_design_goes_on():
    """Every point is a new one of the sequence, and the first one after a success is the model's."""
    bayes, sobol = optimizer(2, num_initial=2), SobolSearch(2)
    tell, state = teller(bayes), bayes.init(jax.random.key(0), PLANE)
    plain = sobol.init(jax.random.key(0), PLANE)
    for number in range(6):
        query = sobol.ask(None, plain)
        np.testing.assert_array_equal(state.cube, query.cube)
        state = tell(state, state.cube, [np.inf, np.nan], number=number)
        plain = sobol.update(None, plain, query, Feedback.finished(jnp.zeros(2)))
    assert state.table.failed.sum() == 12
    state = tell(state, state.cube, [1.0, np.nan], number=6)
    assert not (state.cube == sobol.ask(None, plain).cube).any()


@pytest.mark.parametrize("lanes", [4, 16, 40, 300])
def test_a_full_table_of_many_lanes_keeps_the_best(lanes):
    """With a table of the least size: the best observation stays, and nothing is lost unseen."""
    table, rng = optimizer(lanes, capacity=4, max_capacity=4).init(jax.random.key(0), PLANE).table, np.random.default_rng(0)
    rows, best, tell = table.loss.shape[0], np.inf, jax.jit(observe, static_argnums=5)
    for number in range(5):
        cube, loss = rng.random((lanes, 2), np.float32), rng.normal(size=lanes).astype(np.float32)
        best = min(best, loss.min())
        table = tell(table, cube, loss, np.zeros(lanes, np.int32), np.ones(lanes, bool), lanes)
        assert int(table.count) == min((number + 1) * lanes, rows - lanes)
        assert float(jnp.min(jnp.where(table.sound, table.loss, jnp.inf))) == best


def test_a_region_judges_what_the_model_proposed_and_a_new_life_knows_nothing_of_the_old():
    bayes = optimizer(2, num_initial=6, trust_region=True)
    tell, state = teller(bayes), bayes.init(jax.random.key(0), PLANE)
    for number, loss in enumerate([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]):  # the design
        state = tell(state, state.cube, loss, number=number)
        assert (int(state.region.failures), int(state.region.successes), float(state.region.length)) == (
            0,
            0,
            np.float32(FIRST),
        )
    state = tell(state, state.cube, [7.0, 8.0], number=3)
    assert int(state.region.failures) == 2
    ending = dataclasses.replace(state.region, length=jnp.float32(LEAST), failures=jnp.int32(3))
    state = dataclasses.replace(state, region=ending)
    state = tell(state, state.cube, [9.0, 0.0], done=[True, False], number=4)
    assert int(state.region.life) == 1
    assert state.life.tolist() == [1, 0]
    state = tell(state, state.cube, [0.5, -100.0], number=5)  # the second lane was given its point in the old life
    assert float(state.region.best) == 0.5
    assert state.life.tolist() == [1, 1]
    last = np.asarray(state.table.epoch)[: int(state.table.count)][-2:]
    assert last.tolist() == [1, 0]


def test_a_discrete_space_is_asked_once_through_though_trials_fail():
    """Twelve points, of which the lowest third fails; nothing but having failed speaks against them (``caution=0``)."""
    bayes = optimizer(1, num_initial=3, acquisition="ucb", beta=0.0, caution=0.0)
    tell, state = teller(bayes), bayes.init(jax.random.key(0), DISCRETE)
    asked = []
    for number in range(12):
        level = tuple(np.asarray(DISCRETE.level_of(state.cube))[0].tolist())
        asked.append(level)
        state = tell(state, state.cube, [np.nan if sum(level) < 2 else float(sum(level))], number=number)
    assert len(set(asked[3:])) == 9  # the model's; points of the design may be equal
    assert len(set(asked)) == len(set(asked[:3])) + 9


def test_priors_are_checked():
    assert problems_of(BayesOpt(2, priors=(1, 2))) == ["priors = (1, 2): must be a Priors"]
    assert problems_of(BayesOpt(2, priors=Priors(noise_floor=-1.0))) == ["priors.noise_floor = -1.0: must be at least 1e-12"]
