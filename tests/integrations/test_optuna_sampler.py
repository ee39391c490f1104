"""Optimizers as a sampler of Optuna: the same trials as our own loop, and what Optuna allows beyond it."""

import math
import pickle
import threading
import warnings

import jax
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.core import CubeSpec, Feedback, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError

pytest.importorskip("optuna")

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from jaxhpo.integrations.distributions import ParameterSpace
from jaxhpo.integrations.optuna import Sampler
from jaxhpo.optimizers import registry

optuna.logging.set_verbosity(optuna.logging.WARNING)

SPACE = {
    "x": jh.Float(-1.0, 1.0),
    "lr": jh.Float(1e-4, 1.0, log=True),
    "n": jh.Int(1, 9),
    "act": jh.Choice(["relu", "tanh"]),
}


def loss(h):
    return (h["x"] - 0.3) ** 2 + math.log10(h["lr"] / 1e-2) ** 2 + 0.1 * abs(h["n"] - 4) + (h["act"] == "relu")


def suggested(trial):
    return {
        "x": trial.suggest_float("x", -1.0, 1.0),
        "lr": trial.suggest_float("lr", 1e-4, 1.0, log=True),
        "n": trial.suggest_int("n", 1, 9),
        "act": trial.suggest_categorical("act", ["relu", "tanh"]),
    }


def objective(trial):
    return loss(suggested(trial))


def study_of(optimizer, space=SPACE, seed=3, **more):
    return optuna.create_study(sampler=Sampler(optimizer, space, seed=seed), **more)


def params_of(study):
    return [trial.params for trial in study.trials]


@pytree_dataclass
class Told:
    """What was told last, for :class:`Probe`."""

    cube: jax.Array
    loss: jax.Array
    done: jax.Array


@pytree_dataclass
class Probe:
    """Proposes one half everywhere, and keeps what it was told in its state."""

    num_lanes: int = setting(static=True, low=1)
    starts_afresh = True

    def init(self, key, spec: CubeSpec):
        lanes = np.zeros(self.num_lanes, np.float32)
        return Told(
            jax.numpy.full((self.num_lanes, spec.num_dims), 0.5), jax.numpy.asarray(lanes), jax.numpy.asarray(lanes > 0)
        )

    def ask(self, key, state):
        return Query.fresh(jax.numpy.full_like(state.cube, 0.5))

    def update(self, key, state, query: Query, feedback: Feedback):
        return Told(query.cube, feedback.loss, feedback.done)


def told(study):
    """The losses that were told in the last update, by lane, None for lanes that were not done."""
    state = study.sampler._search._state
    return [float(x) if done else None for x, done in zip(state.loss, state.done, strict=True)]


def slowly(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", ["PSO", *slowly("TPE", "LocalSearch", "SobolSearch", "RandomSearch", "CMAES")])
def test_one_lane_gives_the_trials_of_minimize(name):
    optimizer = registry.example(name, 1)
    study = study_of(optimizer)
    study.optimize(objective, 25)
    result = jh.minimize(jh.HostFunction(loss), SPACE, optimizer, key=3, num_trials=25)
    for leaf in SPACE:
        assert [trial.params[leaf] for trial in study.trials] == list(result.trials[f"hparams.{leaf}"])


@pytest.mark.slow
def test_bayesian_optimization_with_a_table_that_grows():
    optimizer = jh.BayesOpt(1, num_initial=3, num_candidates=16, num_starts=2, num_steps=2, fit_steps=2, capacity=4)
    study = study_of(optimizer)
    study.optimize(objective, 24)  # its first table has room for 15
    result = jh.minimize(jh.HostFunction(loss), SPACE, optimizer, key=3, num_trials=24)
    assert [trial.params["x"] for trial in study.trials] == list(result.trials["hparams.x"])
    assert int(study.sampler._search._state.table.used.sum()) == 23  # the last one is told when another is asked for


@pytest.mark.parametrize("name", ["PSO", *slowly("TPE")])
def test_better_than_random_search(name):
    """Medians of the best of 60 over 9 seeds, which are fixed: nothing here is left to chance."""

    def median(make):
        studies = [optuna.create_study(sampler=make(seed)) for seed in range(9)]
        for study in studies:
            study.optimize(objective, 60)
        return np.median([study.best_value for study in studies])

    ours = median(lambda seed: Sampler(registry.example(name, 3), seed=seed))
    assert ours < 0.6 * median(lambda seed: optuna.samplers.RandomSampler(seed=seed))


@pytest.mark.parametrize("lanes", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_a_new_sampler_goes_on_as_if_nothing_had_happened(lanes, tmp_path):
    storage = f"sqlite:///{tmp_path}/optuna.db"
    whole = study_of(jh.PSO(lanes))
    whole.optimize(objective, 16)
    study_of(jh.PSO(lanes), storage=storage, study_name="cut").optimize(objective, 9)
    again = optuna.load_study(study_name="cut", storage=storage, sampler=Sampler(jh.PSO(lanes), SPACE, seed=3))
    again.optimize(objective, 7)
    assert params_of(again) == params_of(whole)


def test_a_pickled_sampler_goes_on_too():
    whole, cut = study_of(jh.PSO(3)), study_of(jh.PSO(3))
    whole.optimize(objective, 12)
    cut.optimize(objective, 7)
    cut.sampler = pickle.loads(pickle.dumps(cut.sampler))
    cut.optimize(objective, 5)
    assert params_of(cut) == params_of(whole)


def test_trials_in_flight_have_lanes_of_their_own_and_the_rest_is_random():
    study = study_of(jh.SobolSearch(3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trials = [study.ask() for _ in range(5)]
        points = [tuple(suggested(trial).values()) for trial in trials]
        assert len(set(points)) == 5
    assert [str(w.message) for w in caught if "num_lanes = 3" in str(w.message)] == [
        "Sampler: more than num_lanes = 3 trials are under way; those beyond are sampled at random"
    ]
    assert ["jaxhpo:cube" in trial.storage.get_trial_system_attrs(trial._trial_id) for trial in trials] == [True] * 3 + [
        False
    ] * 2
    for number in (4, 1, 0, 2, 3):  # out of order
        study.tell(trials[number], float(number))
    suggested(study.ask())
    search = study.sampler._search
    assert (search._told, len(search._free), list(search._lane_of)) == (5, 2, [5])


def test_threads_share_the_optimizer():
    study, lock, seen = study_of(jh.SobolSearch(3)), threading.Lock(), []

    def slow(trial):
        value = objective(trial)
        with lock:
            seen.append(value)
        return value

    study.optimize(slow, 40, n_jobs=3)
    study.ask().suggest_float("x", -1.0, 1.0)
    assert len(seen) == 40
    assert study.sampler._search._told == 40
    assert len({trial.params["x"] for trial in study.trials}) == 41


def test_spaces_that_are_defined_while_they_run():
    """The first trial is random; then what all trials share is searched, anew whenever that changes."""
    study = optuna.create_study(sampler=Sampler(Probe(2), seed=0))

    def conditional(trial):
        a = trial.suggest_float("a", 0.0, 1.0)
        if trial.number > 5:
            return a
        return a + (trial.suggest_float("b", 2.0, 4.0) if trial.number != 3 else 0.0) + trial.suggest_int("one", 7, 7)

    study.optimize(conditional, 3)
    assert study.trials[0].params["a"] != 0.5
    assert study.trials[1].params == {"a": 0.5, "b": 3.0, "one": 7}
    study.optimize(conditional, 2)  # trial 3 does without b
    assert list(study.sampler._search.space.distributions) == ["a"]
    assert study.sampler._search._told == 4
    assert (study.trials[4].params["a"], study.trials[4].params["b"] == 3.0) == (0.5, False)


def test_failures_pruned_trials_and_the_direction():
    study = study_of(Probe(1), {"x": jh.Float(0.0, 1.0)}, direction="maximize")

    def run(end):
        trial = study.ask()
        trial.suggest_float("x", 0.0, 1.0)
        end(trial)
        study.sampler._search.catch_up(study)
        return told(study)[0]

    def prune(*values):
        def end(trial):
            for step, value in enumerate(values):
                trial.report(value, step)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)

        return end

    assert math.isnan(run(prune()))  # nothing is known of it
    assert run(lambda trial: study.tell(trial, 0.75)) == -0.75
    assert math.isnan(run(lambda trial: study.tell(trial, state=optuna.trial.TrialState.FAIL)))
    assert run(prune(0.5)) == -0.5
    assert run(prune(0.9, 0.95)) == -0.75  # better than the one that was trained to the end: told no better than that
    assert run(prune()) == -0.5  # no better than any of those that got further
    assert math.isnan(run(lambda trial: study.tell(trial, float("inf"))))


def test_enqueued_trials_are_told_and_take_no_point():
    study = study_of(jh.GridSearch(2, points_per_float=3), {"x": jh.Float(0.0, 1.0)})
    study.enqueue_trial({"x": 0.7})
    study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), 1)
    assert study.trials[0].params == {"x": 0.7}
    assert study.sampler._search is None
    probe = study_of(Probe(2), {"x": jh.Float(0.0, 1.0)})
    probe.enqueue_trial({"x": 0.75})
    probe.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), 2)
    assert told(probe) == [0.75, None]
    np.testing.assert_array_equal(probe.sampler._search._state.cube, [[0.75], [0.5]])


def test_samplers_that_share_a_storage_learn_of_each_other(tmp_path):
    storage, space = f"sqlite:///{tmp_path}/optuna.db", {"x": jh.Float(0.0, 1.0)}
    one = study_of(jh.PSO(3), space, 1, storage=storage, study_name="shared")
    two = optuna.load_study(study_name="shared", storage=storage, sampler=Sampler(jh.PSO(3), space, seed=2))
    for _ in range(5):
        for study in (one, two):
            study.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0), 1)
    assert [study.sampler._search._told for study in (one, two)] == [8, 9]  # all that had ended before each one's last trial
    assert len({trial.params["x"] for trial in one.trials}) == 10
    best = min(trial.value for trial in one.trials[:8])
    for study in (one, two):
        assert float(study.sampler._search._state.best_loss.min()) == pytest.approx(best)


def test_an_objective_that_suggests_another_space():
    study = study_of(Probe(2), {"x": jh.Float(0.0, 1.0)})
    study.optimize(lambda trial: trial.suggest_float("x", 2.0, 3.0), 1)
    with pytest.warns(UserWarning, match="values outside the space and teaches nothing"):
        study.optimize(lambda trial: trial.suggest_float("x", 0.0, 0.25), 1)  # within the space, but not its own point
    trial = study.ask()
    trial.suggest_float("x", 0.0, 1.0)
    assert told(study) == [pytest.approx(study.trials[1].value), None]


def test_distributions_and_back():
    space = ParameterSpace.of(
        {
            "step": FloatDistribution(0.1, 0.9, step=0.2),
            "log": FloatDistribution(1e-5, 1e-1, log=True),
            "even": IntDistribution(2, 10, step=2),
            "wide": IntDistribution(1, 10**9, log=True),
            "tiny": IntDistribution(1, 8, log=True),
            "label": CategoricalDistribution([None, "a", 1, True]),
        }
    )
    assert space.spec.num_dims == 6
    rng = np.random.default_rng(0)
    for _ in range(50):
        params = space.params_at(rng.random(6, np.float32))
        for name, value in params.items():
            assert space.distributions[name]._contains(space.distributions[name].to_internal_repr(value)), name
        again = space.params_at(space.cube_at(params))
        assert again.pop("log") == pytest.approx(params.pop("log"), rel=1e-5)
        assert again.pop("wide") == pytest.approx(params.pop("wide"), rel=1e-5, abs=1)
        assert again == params
    ends = [space.params_at(np.full(6, end, np.float32)) for end in (0.0, 1.0)]
    assert ends[0].pop("log") == pytest.approx(1e-5)
    assert ends[0] == {"step": 0.1, "even": 2, "wide": 1, "tiny": 1, "label": None}
    assert ends[1] == pytest.approx({"step": 0.9, "log": 1e-1, "even": 10, "wide": 10**9, "tiny": 8, "label": True})
    good = ends[0] | {"log": 1e-3}
    assert space.cube_at(good) is not None
    for name, value in {"step": 2.0, "even": 12, "label": "b", "log": "x"}.items():
        assert space.cube_at(good | {name: value}) is None
    assert space.cube_at({"step": 0.1}) is None


def test_arrays_and_nested_names_of_a_space():
    nested = {"net": {"rates": jh.Float(0.0, 1.0, shape=(11,)), "act": jh.Choice(["a", "b"], static=True)}, "fixed": 3}
    space = ParameterSpace.from_space(jh.Space(nested))
    assert list(space.distributions) == ["net.act", *(f"net.rates[{i}]" for i in range(11))]
    cube = np.linspace(0.0, 1.0, 12, dtype=np.float32)
    params = space.params_at(cube)
    assert params["net.act"] == "a"
    np.testing.assert_allclose([params[f"net.rates[{i}]"] for i in range(11)], cube[1:], rtol=1e-6)
    np.testing.assert_allclose(space.cube_at(params), [0.25, *cube[1:]], rtol=1e-6)


def test_what_cannot_be_is_told_in_one_line():
    def refused(match, *arguments, **more):
        with pytest.raises(JaxhpoError, match=match) as caught:
            Sampler(*arguments, **more)
        assert "\n" not in str(caught.value)

    refused("ASHA stops or continues trainings itself, .* Sampler\\(TPE\\(...\\)", jh.ASHA(jh.TPE(2)))
    refused("HypergradientDescent needs gradients", registry.example("HypergradientDescent", 2))
    refused("is no optimizer", jh.PSO)
    refused("PSO: inertia = 7.0: must be between", jh.PSO(2, inertia=7.0))
    refused("space: x: str is neither|nothing|space", jh.PSO(2), {"x": object()})
    refused("log: float32 cannot", jh.PSO(2), {"log": FloatDistribution(1e-300, 1.0, log=True)})
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=Sampler(jh.PSO(2)))
    with pytest.raises(JaxhpoError, match="2 objectives; a study with one is due"):
        study.ask().suggest_float("x", 0.0, 1.0)
