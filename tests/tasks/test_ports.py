"""Flax's examples as ports: under 20 lines changed, the training unchanged, and the study finds a better one."""

import difflib
import functools
import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jaxhpo as jh
from jaxhpo.config import build, load
from jaxhpo.tasks.minibatch import next_batch

pytest.importorskip("sklearn")
NAMES = ("mnist", "vae")
ROOT = Path(__file__).parents[2]
HPARAMS = {
    "mnist": {"lr": 0.005, "momentum": 0.9, "decay": 1e-4},  # the constants of the script before
    "vae": {"lr": 1e-3, "b1": 0.9},
}
STATIC = {"mnist": {}, "vae": {"latents": 16}}


def modules(name):
    return tuple(importlib.import_module(f"experiments.ports.{name}{suffix}") for suffix in ("_before", ""))


def changed_lines(name):
    """Lines removed and lines added, blank ones too."""
    before, after = (Path(module.__file__).read_text().splitlines() for module in modules(name))
    diff = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    return sum(line[0] in "+-" for line in diff)


@pytest.mark.parametrize("name", NAMES)
def test_a_port_takes_under_twenty_changed_lines(name):
    assert 5 < changed_lines(name) < 20
    said = (ROOT / "configs" / f"port_{name}.toml").read_text()
    assert f"{changed_lines(name)} changed lines" in said


@pytest.mark.parametrize("name", NAMES)
def test_the_config_searches_the_same_space(name):
    _, port = modules(name)
    study = build(load(ROOT / "configs" / f"port_{name}.toml"))
    ours = jh.Space(port.SPACE)
    assert jax.tree.structure(study.space) == jax.tree.structure(ours)
    jax.tree.map(np.testing.assert_array_equal, study.space, ours)
    assert study.objective.num_steps == port.task().num_steps


@functools.cache
def compiled(name):
    """Training by a number of steps and what it reaches; the step's number is its key."""

    @jax.jit
    def train(task, hparams, num_steps):
        hparams = {**hparams, **STATIC[name]}
        state = task.init(jax.random.key(5), hparams)
        state = jax.lax.fori_loop(0, num_steps, lambda i, s: task.step(jax.random.key(i), hparams, s), state)
        return state, task.evaluate(hparams, state)

    return functools.partial(train, modules(name)[1].task().task, HPARAMS[name])


def data_of_a_step(name):
    """The first batch and the validation split."""
    task, (state, _) = modules(name)[1].task().task, compiled(name)(0)
    train, valid = task.step.args[0], task.evaluate.args[0]
    index = np.asarray(next_batch(state.order, len(jax.tree.leaves(train)[0]), 64)[0])
    return jax.tree.map(lambda x: x[index], train), valid


def test_a_step_of_the_convolutional_network_is_that_of_the_script():
    before, _ = modules("mnist")
    batch, valid = data_of_a_step("mnist")
    create = nnx.jit(lambda key: before.create(nnx.Rngs(key)))
    model, optimizer, metrics, _ = create(jax.random.fold_in(jax.random.key(5), 0))
    rngs = create(jax.random.key(0))[3]  # as a step has it: drawn from by the making of the model
    model.train()
    before.train_step(model, optimizer, metrics, rngs, batch)
    metrics.reset()
    model.eval()
    before.eval_step(model, metrics, rngs, valid)
    after, found = compiled("mnist")(1)
    assert optimizer.step[...] == after.values[1]["step"] == 1
    weights, known = after.values[0], nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat)))
    # BatchNorm cancels the first bias: its gradient is rounding, which Adam enlarges.
    weights["conv1"].pop("bias"), known["conv1"].pop("bias")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), weights, known)
    np.testing.assert_allclose(found["loss"], metrics.compute()["loss"], rtol=2e-3)


def test_a_step_of_the_autoencoder_is_that_of_the_script():
    before, _ = modules("vae")
    batch, valid = data_of_a_step("vae")
    state = jax.jit(before.create)(jax.random.fold_in(jax.random.key(5), 0))
    known = before.train_step(state, batch, jax.random.key(0))
    expected = before.eval_step(known, valid, jax.random.fold_in(jax.random.key(0), 0))
    after, found = compiled("vae")(1)
    assert known.step == after.values[".step"] == 1
    for path, value in jax.tree_util.tree_leaves_with_path(known.params):
        np.testing.assert_allclose(after.values[".params" + jax.tree_util.keystr(path)], value, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_the_ports_learn(name):
    start, end = (compiled(name)(num_steps)[1]["loss"] for num_steps in (0, 80))
    # Guessing costs log 10 for a label; 64 log 2 for a binary image, to which a network at random adds its divergence.
    guess, learned = {"mnist": (np.log(10), 0.7), "vae": (64 * np.log(2), 32.0)}[name]
    assert start > 0.9 * guess
    assert end < learned


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_small_study_of_a_port_beats_a_slow_learner(name):
    _, port = modules(name)
    training = port.task(num_steps=40)
    width = 1 if name == "mnist" else 4
    result = jh.minimize(training, port.SPACE, jh.RandomSearch(num_lanes=4), key=0, num_trials=12, shard_width=width)
    rates, losses = result.trials["hparams.lr"], result.trials["loss"]
    assert len(losses) == 12
    assert result.best.loss == np.nanmin(losses) < losses[rates.argmin()]
