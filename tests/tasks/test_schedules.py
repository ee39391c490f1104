"""Schedules equal optax's where optax takes the numbers, and take tracers where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxhpo.tasks import schedules

STEPS = jnp.arange(0, 130, 3)
CASES = {
    "constant": (schedules.constant, optax.constant_schedule, (0.3,)),
    "cosine": (schedules.cosine, optax.cosine_decay_schedule, (0.3, 100, 0.1, 1.7)),
    "warmup_cosine": (schedules.warmup_cosine, optax.warmup_cosine_decay_schedule, (0.01, 0.3, 20, 100, 0.02, 1.3)),
    "exponential": (schedules.exponential, optax.exponential_decay, (0.3, 10, 0.8, 15)),
    "staircase": (
        lambda *numbers: schedules.exponential(*numbers, staircase=True),
        lambda *numbers: optax.exponential_decay(*numbers, staircase=True),
        (0.3, 10, 0.8, 15),
    ),
    "piecewise": (
        lambda init, b1, b2, s1, s2: schedules.piecewise(init, [b1, b2], [s1, s2]),
        lambda init, b1, b2, s1, s2: optax.piecewise_constant_schedule(init, {b1: s1, b2: s2}),
        (0.3, 60, 30, 0.1, 0.5),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_optax_with_every_number_traced(name):
    ours, theirs, numbers = CASES[name]
    values = jax.jit(lambda *numbers: jax.vmap(ours(*numbers))(STEPS))(*numbers)
    expected = [theirs(*numbers)(int(step)) for step in STEPS]
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-8)
    lanes = jax.vmap(lambda scale: jax.vmap(ours(scale * numbers[0], *numbers[1:]))(STEPS))(jnp.array([1.0, 0.5]))
    np.testing.assert_allclose(lanes[0], values, rtol=1e-6, atol=1e-8)
    assert not np.allclose(lanes[1], values)


def test_warmup_of_no_steps_begins_at_the_peak():
    schedule = jax.jit(lambda warmup, step: schedules.warmup_cosine(0.0, 0.4, warmup, 10)(step))
    np.testing.assert_allclose([schedule(0, 0), schedule(0, 5), schedule(0, 10)], [0.4, 0.2, 0.0], atol=1e-7)


def test_gradients_reach_the_numbers(x64):
    @jax.jit
    def total(numbers):
        return jax.vmap(schedules.warmup_cosine(*numbers))(jnp.arange(0.0, 100.0)).sum()

    numbers = jnp.array([0.01, 0.3, 20.5, 99.5, 0.02, 1.3])
    grad = jax.grad(total)(numbers)
    for i in range(len(numbers)):
        shift = jnp.zeros(len(numbers)).at[i].set(1e-6)
        np.testing.assert_allclose(grad[i], (total(numbers + shift) - total(numbers - shift)) / 2e-6, rtol=1e-6, atol=1e-8)


def test_drives_optax_lane_by_lane():
    def final(rate, steps):
        chain = optax.sgd(schedules.cosine(rate, steps))
        x = jnp.ones(())
        state = chain.init(x)
        for _ in range(3):
            updates, state = chain.update(jnp.ones(()), state)
            x = optax.apply_updates(x, updates)
        return x

    rate, steps = jnp.array([0.1, 0.2]), jnp.array([4.0, 8.0])
    expected = [1 - sum(r * 0.5 * (1 + np.cos(np.pi * i / s)) for i in range(3)) for r, s in zip(rate, steps, strict=True)]
    np.testing.assert_allclose(jax.vmap(final)(rate, steps), expected, rtol=1e-6)


def test_piecewise_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="as many scales as boundaries"):
        schedules.piecewise(1.0, [3, 5], [0.1])
