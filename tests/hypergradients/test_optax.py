"""What is known of optax under reverse mode, by optimizer and argument: right, zero, NaN."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trainings import central_differences, jitted, relative_error, task

import jaxhpo as jh
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import Unrolled

STEPS = 20
EXACT = 1e-6


def neuron(factory):
    """Weights below a tanh, trained by ``factory(**hparams)``; an input of ``scale`` 0 leaves its weight no gradient."""
    x = jax.random.normal(jax.random.key(1), (10, 3))
    y = jnp.sign(x[:, 0] - 2 * x[:, 1] * x[:, 2])
    loss = lambda w, scale: jnp.mean((jnp.tanh((x * scale) @ w) - y) ** 2)
    chain = lambda hparams: factory(**{name: value for name, value in hparams.items() if name != "scale"})

    def init(key, hparams):
        w = jnp.asarray([0.3, -0.2, 0.5])
        return w, chain(hparams).init(w)

    def step(key, hparams, state):
        updates, opt_state = chain(hparams).update(jax.grad(loss)(state[0], hparams["scale"]), state[1], state[0])
        return state[0] + updates, opt_state

    return jh.Task(init, step, lambda hparams, state: {"loss": loss(state[0], hparams["scale"])})


def checked(factory):
    """``(hparams, **others) -> grad, differences``, both by ``hparams``; compiled once."""
    value_and_grad = jitted(Unrolled(neuron(factory), STEPS))

    def both(hparams, difference=1e-5, scale=(1.0, 1.0, 1.0), **others):
        others["scale"] = jnp.asarray(scale)
        expected = central_differences(lambda h: value_and_grad(h | others)[0], hparams, difference)
        return value_and_grad(hparams | others)[1], expected

    return both


@pytest.mark.parametrize(
    ("factory", "hparams"),
    [
        (optax.sgd, {"learning_rate": 0.1, "momentum": 0.8}),
        (optax.adam, {"learning_rate": 0.02, "b1": 0.9, "b2": 0.99}),
        (optax.adamw, {"learning_rate": 0.02, "b1": 0.9, "weight_decay": 0.1}),
        (optax.rmsprop, {"learning_rate": 0.01, "decay": 0.9, "eps": 1e-3}),
    ],
    ids=["sgd", "adam", "adamw", "rmsprop"],
)
def test_right(x64, factory, hparams):
    assert relative_error(*checked(factory)(hparams)) < EXACT


def test_lion(x64):
    """Below the sign the betas have no derivative; the learning rate has the right one between the jumps of the loss."""
    hparams = {"learning_rate": 0.01, "weight_decay": 0.1}
    with pytest.raises(JaxhpoError, match="by b1, b2 is zero"):
        Unrolled(neuron(optax.lion), STEPS)(jax.random.key(0), hparams | {"b1": 0.9, "b2": 0.99, "scale": jnp.ones(3)})
    assert relative_error(*checked(optax.lion)(hparams, difference=1e-7)) < EXACT


def test_radam_is_nan(x64):
    """The root of a negative number in the branch not taken in the first steps; no eps_root mends it."""
    grad, expected = checked(optax.radam)({"learning_rate": 0.01, "eps_root": 1e-3})
    assert all(np.isnan(grad[name]) for name in expected)
    assert all(np.isfinite(slope) for slope in expected.values())


def test_adam_where_a_parameter_has_no_gradient(x64):
    """Its second moment is exactly 0, where the root has no derivative: NaN at any learning rate, unless eps_root > 0."""
    both, dead = checked(optax.adam), (0.0, 1.0, 1.0)
    for rate in (1e-3, 0.1):
        hparams = {"learning_rate": rate}
        assert relative_error(*both(hparams, eps_root=0.0)) < EXACT
        grad, expected = both(hparams, scale=dead, eps_root=0.0)
        assert np.isfinite(expected["learning_rate"])
        assert np.isnan(grad["learning_rate"])
        assert relative_error(*both(hparams, scale=dead, eps_root=1e-16)) < EXACT


def test_states_that_hold_python_constants(x64):
    """The states of some transformations hold plain bools: they have no derivative and do not disturb."""
    one = task(lambda h: optax.optimistic_gradient_descent(h["lr"]))
    value_and_grad = jitted(Unrolled(one, 12))
    expected = central_differences(lambda h: value_and_grad(h)[0], {"lr": 0.05})
    assert relative_error(value_and_grad({"lr": 0.05})[1], expected) < 1e-6
