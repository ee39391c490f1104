"""Estimators as objectives of a study: the gradient by the cube, refusals by name, the winner on fresh seeds."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as jh
from jaxhpo.core import Feedback, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import Evolution, Forward, Truncated, Unrolled

SPACE = jh.Space({"rate": jh.Float(0.01, 0.5, log=True), "pull": jh.Float(-1.0, 1.0, shape=(2,)), "fixed": 2.0})


def training():
    """x moves towards ``pull``; the loss is its distance from (0.3, -0.2), with noise that the trial's key draws."""

    def evaluate(h, x):
        loss = jnp.sum((x["params"] - jnp.asarray([0.3, -0.2])) ** 2) + 0.01 * h["fixed"] * jnp.sum(h["rate"])
        return {"loss": loss, "far": loss > 0.5, "gain": -loss}

    return jh.Task(
        init=lambda key, h: {"params": 0.01 * jax.random.normal(key, (2,))},
        step=lambda key, h, x: {"params": x["params"] - h["rate"] * (x["params"] - h["pull"])},
        evaluate=evaluate,
        test=lambda h, x: {"loss": jnp.sum((x["params"] - 0.3) ** 2)},
    )


@pytree_dataclass
class Recorder:
    """Random points; its state is the last query and the gradient that came with it."""

    num_lanes: int = setting(static=True, low=1)
    starts_afresh = True

    def init(self, key, spec):
        zeros = jnp.zeros((self.num_lanes, spec.num_dims), jnp.float32)
        return {"cube": jax.random.uniform(key, zeros.shape, jnp.float32), "asked": zeros, "grad": zeros}

    def ask(self, key, state):
        return Query.fresh(state["cube"])

    def update(self, key, state, query: Query, feedback: Feedback) -> Any:
        return {**state, "asked": query.cube, "grad": feedback.grad}


def gradients(estimator, maximize=False, num_lanes=5):
    """The points that one round asked for, and the gradients of the loss that the optimizer was told."""
    from jaxhpo.study.limits import Limits
    from jaxhpo.study.loop import first_carry, run_round
    from jaxhpo.study.problem import Plan, make_problem

    problem = make_problem(
        estimator, SPACE, Recorder(num_lanes), key=jax.random.key(0), limits=Limits(100), metric=None, maximize=maximize
    )
    plan = Plan(num_lanes, num_lanes, None)
    carry, _ = jax.jit(lambda problem: run_round(problem, plan, first_carry(problem, plan)))(problem)
    return problem, carry.optimizer["asked"], carry.optimizer["grad"]


def test_the_gradient_is_that_by_the_cube():
    """Against JAX's own derivative of the training as a function of the cube, key by key."""
    from jaxhpo.hypergradients.estimate import start, steps_from
    from jaxhpo.study.lanes import trial_key

    problem, cubes, found = gradients(Unrolled(training(), 20))

    def loss(cube, number):
        hparams, key = SPACE.decode(cube), trial_key(problem.key, number)
        task = training()
        return task.evaluate(hparams, steps_from(task, key, hparams, start(task, key, hparams), 0, 20))["loss"]

    expected = jax.jit(jax.vmap(jax.grad(loss)))(cubes, jnp.arange(5))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradients(Forward(training(), 20))[2], expected, rtol=1e-4, atol=1e-6)
    # What is maximised is the negative: the loss that the optimizer minimises has the same gradient.
    np.testing.assert_allclose(
        gradients(Unrolled(training(), 20, metric="gain"), maximize=True)[2], expected, rtol=1e-4, atol=1e-6
    )


def test_evolution_moves_in_the_cube():
    """The loss is quadratic in ``pull``, so the smoothed gradient is the gradient; bounds are far for small moves.

    With 2000 pairs the relative standard error of each of 3 components is about sqrt(3 / 2000) = 0.04 of the norm, so that a
    deviation of 0.25 of the norm has a probability below 1e-8.
    """
    _, _, exact = gradients(Unrolled(training(), 20))
    _, _, found = gradients(Evolution(training(), 20, num_pairs=2000, sigma=0.01))
    scale = np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(found / scale, exact / scale, atol=0.25)
    with pytest.raises(JaxhpoError, match="log: a study perturbs in the cube"):
        gradients(Evolution(training(), 20, log=("rate",)))


def test_descent_finds_the_minimum_and_the_winner_is_trained_again(tmp_path):
    study = jh.Study(
        Unrolled(training(), 20), SPACE, jh.HypergradientDescent(optax.adam, learning_rate=0.05, num_lanes=4), 160, seed=1
    )
    result = jh.run_study(study, tmp_path / "run")
    assert result.best.loss < 0.01
    assert set(result.trials["steps"].tolist()) == {20}
    assert np.isfinite(result.trials["metrics.gauge/gradient"]).all()
    fresh = jh.confirm(study, result, 4)
    assert max(fresh["validation"]["loss"]) < 0.02
    assert len(fresh["test"]["loss"]) == 4
    resumed = jh.run_study(study, tmp_path / "run", resume=True)
    np.testing.assert_array_equal(resumed.trials["loss"], result.trials["loss"])
    other = dataclasses.replace(study, objective=Truncated(training(), 20, 30))
    with pytest.raises(JaxhpoError, match=r"another study .*estimator"):
        jh.run_study(other, tmp_path / "run", resume=True)


def test_killed_and_resumed_gives_the_same_trials(tmp_path):
    make = lambda n: jh.Study(Unrolled(training(), 20), SPACE, jh.HypergradientDescent(num_lanes=4), 60, seed=2, max_seconds=n)
    whole = jh.run_study(make(None))
    stopped = jh.run_study(make(1e-9), tmp_path / "run")
    assert len(stopped.trials["loss"]) < 60
    resumed = jh.run_study(make(None), tmp_path / "run", resume=True)
    np.testing.assert_array_equal(resumed.trials["loss"], whole.trials["loss"])


def test_a_plain_loss_is_differentiated_where_the_optimizer_needs_it():
    loss = lambda key, h: (jnp.log(h["a"]) + 3) ** 2 + (h["b"] - 0.3) ** 2
    space = {"a": jh.Float(1e-4, 1.0, log=True), "b": jh.Float(0.0, 1.0)}
    result = jh.minimize(loss, space, jh.HypergradientDescent(num_lanes=2), key=0, num_trials=120)
    assert result.best.loss < 1e-3
    result = jh.maximize(
        lambda key, h: {"gain": -loss(key, h)},
        space,
        jh.HypergradientDescent(num_lanes=2),
        key=0,
        num_trials=120,
        metric="gain",
    )
    assert result.best.loss < 1e-3


def test_integers_and_choices_are_explored_around_the_descent():
    def loss(key, h):
        return (h["x"] - 0.2) ** 2 + jnp.where(h["act"] == 1, 0.0, 1.0) + 0.1 * jnp.abs(h["n"] - 3)

    space = {"x": jh.Float(0.0, 1.0), "n": jh.Int(1, 5), "act": jh.Choice(["a", "b"])}
    optimizer = jh.HypergradientDescent(num_lanes=4, patience=3, explorer=jh.RandomSearch(num_lanes=4))
    result = jh.minimize(loss, space, optimizer, key=0, num_trials=600)
    assert result.best.hparams["act"] == "b"
    assert result.best.hparams["n"] == 3
    assert result.best.loss < 1e-2


def test_static_choices_select_programs_and_keep_their_gradients():
    def loss(key, h):
        return (h["x"] - (0.2 if h["kind"] == "low" else 0.9)) ** 2 + (0.5 if h["kind"] == "low" else 0.0)

    space = {"x": jh.Float(0.0, 1.0), "kind": jh.Choice(["low", "high"], static=True)}
    optimizer = jh.HypergradientDescent(num_lanes=4, patience=5, explorer=jh.RandomSearch(num_lanes=4))
    result = jh.minimize(loss, space, optimizer, key=0, num_trials=200)
    assert result.best.hparams["kind"] == "high"
    assert result.best.loss < 1e-3


def refused(objective, space, optimizer, match, **settings):
    with pytest.raises(JaxhpoError, match=match):
        jh.minimize(objective, space, optimizer, key=0, num_trials=8, **settings)


def test_refusals_are_one_clear_line():
    descent = jh.HypergradientDescent(num_lanes=2)
    space = {"rate": jh.Float(0.01, 0.5), "n": jh.Int(1, 5), "act": jh.Choice(["a", "b"])}
    refused(lambda key, h: h["rate"], space, descent, r"^act, n: integers and choices have no gradient: use another optimizer")
    refused(jh.Training(training(), 20), SPACE, descent, r"needs gradients, which a Training does not give: use .*Unrolled")
    refused(jh.HostFunction(lambda h: 1.0), SPACE, descent, "needs gradients, which a HostFunction does not give")
    refused(Unrolled(training(), 20), SPACE, descent, "both must be the same", metric="gain")
    refused(Unrolled(training(), 20, metric="far"), SPACE, descent, "derivative of far by pull, rate is zero")
    refused(Unrolled(training(), 20), {"rate": jh.Float(0.01, 0.5)}, descent, "asks for a hyperparameter 'pull'")
    refused(Unrolled(training(), 20), {"n": jh.Int(1, 5)}, jh.RandomSearch(2), "no Float, and only floats have a derivative")
    unused = jh.Space({"rate": jh.Float(0.01, 0.5), "pull": jh.Float(-1, 1, shape=(2,)), "fixed": 1.0, "idle": jh.Float(0, 1)})
    refused(Unrolled(training(), 20), unused, descent, "derivative of loss by idle is zero")
    refused(Unrolled, SPACE, descent, "the objective is the class Unrolled: an instance of it")
    refused(Unrolled(training(), 0), SPACE, descent, "Unrolled: num_steps = 0: must be at least 1")
    refused(Evolution(training(), 20, sigma=0.0), SPACE, descent, "Evolution: sigma = 0.0: must be at least")
    refused(Unrolled(training(), 20, segments=5), SPACE, descent, r"segments = 5: must be a tuple")
    loop = lambda key, h, x: jax.lax.while_loop(lambda x: x["params"].sum() < 0, lambda x: x, x)
    looped = jh.Task(training().init, loop, training().evaluate)
    refused(Unrolled(looped, 20), SPACE, descent, "while loop.*Forward or Evolution")


def test_refusals_of_plain_losses_and_explorers():
    descent, space, loss = jh.HypergradientDescent(num_lanes=2), {"x": jh.Float(0, 1)}, lambda key, h: h["x"]
    refused(lambda h: 1.0, space, descent, r"the loss takes \(h\): \(key, hparams\) is due")
    refused(lambda key, h: jnp.ones(2) * h["x"], space, descent, r"'loss' of shape \(2,\): a scalar is due")
    refused(SPACE, SPACE, descent, "the objective is a Space")
    refused(loss, space, jh.HypergradientDescent(num_lanes=2, explorer=jh.TPE), "explorer = .*TPE")
    refused(loss, space, jh.HypergradientDescent(num_lanes=2, explorer=descent), "no gradients is due")
    refused(
        lambda key, h: h["x"], {"x": jh.Float(0, 1)}, jh.HypergradientDescent(optax.adam(0.1), num_lanes=2), "not optax.adam"
    )


def test_a_training_that_diverged_is_not_scored():
    """The highest of NaN logits is class 0: an accuracy of 1 if nobody looked at the weights."""
    task = jh.Task(
        init=lambda key, h: jnp.zeros(3),
        step=lambda key, h, w: jnp.where(h["lr"] > 0.3, jnp.nan, w - h["lr"] * (w - 1.0)),
        evaluate=lambda h, w: {"accuracy": (jnp.argmax(w) == 0) * 1.0, "loss": jnp.sum(w)},
    )
    space = {"lr": jh.Float(0.01, 1.0)}
    evolution = Evolution(task, 5, metric="accuracy", num_pairs=2, sigma=0.001)
    found, plain = (
        jh.maximize(x, space, jh.RandomSearch(num_lanes=4), key=0, num_trials=12, metric="accuracy")
        for x in (evolution, jh.Training(task, 5, steps_per_round=5))
    )
    assert 0 < found.trials["diverged"].sum() < 12
    np.testing.assert_array_equal(found.trials["diverged"], plain.trials["diverged"])


def test_a_float_that_only_some_static_choices_use_is_let_pass():
    def loss(key, h):
        x = h["rate"] if h["kind"] == "plain" else h["rate"] * h["momentum"]
        return (x - 0.2) ** 2

    space = {"rate": jh.Float(0, 1), "momentum": jh.Float(0, 1), "kind": jh.Choice(["plain", "heavy"], static=True)}
    descent = jh.HypergradientDescent(num_lanes=2, explorer=jh.RandomSearch(num_lanes=2))
    jh.minimize(loss, space, descent, key=0, num_trials=8)
    refused(loss, space | {"idle": jh.Float(0, 1)}, descent, "by idle is zero")


def test_other_settings_of_a_partial_are_another_study(tmp_path):
    make = lambda m: jh.Study(
        Unrolled(training(), 20), SPACE, jh.HypergradientDescent(functools.partial(optax.sgd, momentum=m), num_lanes=2), 8
    )
    jh.run_study(make(0.9), tmp_path / "run")
    with pytest.raises(JaxhpoError, match=r"another study .*optimizer.optimizer.momentum: 0.9 recorded, 0.0 now"):
        jh.run_study(make(0.0), tmp_path / "run", resume=True)


def test_other_optimizers_ignore_gradients():
    found, plain = (
        jh.minimize(objective, SPACE, jh.PSO(num_lanes=4), key=0, num_trials=16, devices=1)
        for objective in (Unrolled(training(), 20), jh.Training(training(), 20, steps_per_round=20))
    )
    np.testing.assert_allclose(found.trials["loss"], plain.trials["loss"], rtol=1e-5)
