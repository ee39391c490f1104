"""The learning rate that moves by its own hypergradient: the published recursion by hand, and derivatives through it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxhpo as jh
from jaxhpo.hypergradients import Unrolled, hypergradient_descent

CURVATURE = np.asarray([1.0, 0.3, 2.0])
START = {"a": np.asarray([1.0, -2.0]), "b": np.asarray([0.5])}
RATE, HYPER, STEPS = 0.05, 0.004, 12


def loss(params):
    x = jnp.concatenate([params["a"], params["b"]])
    return 0.5 * jnp.sum(CURVATURE * x**2)


@partial(jax.jit, static_argnums=(0, 3))
def run(factory, rate, hyper, multiplicative=False):
    """Rates ``[T]`` and parameters ``[T, 3]`` after each step; the numbers of the transformation are traced."""
    chain = hypergradient_descent(factory, rate, hyper, multiplicative)
    params = jax.tree.map(jnp.asarray, START)

    def step(carry, _):
        params, state = carry
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (state.learning_rate, jnp.concatenate([params["a"], params["b"]]))

    return jax.lax.scan(step, (params, chain.init(params)), length=STEPS)[1]


def sgd(grads):
    return -grads[-1]


def heavy_ball(grads):
    return -sum(0.9**i * g for i, g in enumerate(grads[::-1]))


def adam(grads):
    count = len(grads)
    mean = sum(0.1 * 0.9**i * g for i, g in enumerate(grads[::-1])) / (1 - 0.9**count)
    square = sum(0.001 * 0.999**i * g**2 for i, g in enumerate(grads[::-1])) / (1 - 0.999**count)
    return -mean / (np.sqrt(square) + 1e-8)


@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize(
    ("factory", "direction"), [(optax.sgd, sgd), (partial(optax.sgd, momentum=0.9), heavy_ball), (optax.adam, adam)]
)
def test_the_published_recursion(x64, factory, direction, multiplicative):
    x, rate, last, grads = np.concatenate([START["a"], START["b"]]), RATE, np.zeros(3), []
    rates, places = [], []
    for _ in range(STEPS):
        grad = CURVATURE * x
        grads.append(grad)
        if not multiplicative:
            rate = rate - HYPER * grad @ last
        elif last.any():
            rate = rate * (1 - HYPER * grad @ last / (np.linalg.norm(grad) * np.linalg.norm(last)))
        last = direction(grads)
        x = x + rate * last
        rates.append(rate)
        places.append(x)
    found = run(factory, RATE, HYPER, multiplicative)
    np.testing.assert_allclose(found[0], rates, rtol=1e-9)
    np.testing.assert_allclose(found[1], places, rtol=1e-8)
    assert rates[0] == RATE
    assert rates[-1] > 1.02 * RATE  # the quadratic asks for longer steps


def test_a_rate_of_zero_is_the_inner_optimizer(x64):
    rates, places = run(optax.adam, RATE, 0.0)
    np.testing.assert_array_equal(rates, RATE)
    chain, params = optax.adam(RATE), jax.tree.map(jnp.asarray, START)
    state = chain.init(params)
    for place in places:
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(place, jnp.concatenate([params["a"], params["b"]]), rtol=1e-9)


def test_gradients_of_zero_leave_the_rate_and_the_derivatives_finite():
    chain = hypergradient_descent(optax.sgd, 0.1, 0.5, multiplicative=True)
    still = {"w": jnp.zeros(3)}

    def rate_after(scale):
        grads = jax.tree.map(lambda x: x * scale, still)
        state = chain.init(still)
        for _ in range(2):
            _, state = chain.update(grads, state, still)
        return state.learning_rate

    assert float(rate_after(1.0)) == pytest.approx(0.1)
    assert float(jax.grad(rate_after)(1.0)) == 0.0


@pytest.mark.parametrize("multiplicative", [False, True])
def test_its_own_hyperparameters_have_hypergradients(x64, multiplicative):
    """Through the whole training, against central differences."""
    chain = lambda h: hypergradient_descent(partial(optax.sgd, momentum=0.5), h["lr"], h["hyper"], multiplicative)

    def init(key, h):
        params = jax.tree.map(jnp.asarray, START)
        return params, chain(h).init(params)

    def step(key, h, state):
        params, memory = state
        updates, memory = chain(h).update(jax.grad(loss)(params), memory, params)
        return optax.apply_updates(params, updates), memory

    estimator = Unrolled(jh.Task(init, step, lambda h, state: {"loss": loss(state[0])}), STEPS)
    value = jax.jit(lambda h: estimator(jax.random.key(0), h))
    at = {"lr": jnp.asarray(RATE), "hyper": jnp.asarray(HYPER)}
    _, grad = value(at)
    for name in at:
        shift = 1e-4 * at[name]
        up, down = (value(at | {name: at[name] + sign * shift})[0] for sign in (1, -1))
        np.testing.assert_allclose(grad[name], (up - down) / (2 * shift), rtol=1e-6)
        assert abs(grad[name]) > 1e-3
