"""Learning-rate schedules all of whose numbers may be traced, so that each lane has its own.

Each returns ``step -> value``, as optax expects: ``optax.sgd(schedules.cosine(hparams["learning_rate"], 500))``.
Where optax accepts the numbers the values are optax's; its own check them by Python's ``if`` and refuse tracers.
Past the last step a schedule keeps its last value. Nothing is checked here: a traced number cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Number = jax.Array | float | int
Schedule = Callable[[Any], jax.Array]


def _as_float(step: Any) -> jax.Array:
    return jnp.asarray(step, jnp.result_type(float))


def constant(value: Number) -> Schedule:
    """The same ``value`` at every step."""
    return lambda step: jnp.asarray(value, jnp.result_type(float))


def cosine(init_value: Number, decay_steps: Number, alpha: Number = 0.0, exponent: Number = 1.0) -> Schedule:
    """Half a cosine from ``init_value`` down to ``alpha * init_value`` within ``decay_steps``.

    Loshchilov and Hutter 2017, eq. 5, without restarts, the cosine raised to ``exponent``.
    """

    def schedule(step: Any) -> jax.Array:
        fraction = jnp.clip(_as_float(step) / decay_steps, 0, 1)
        return init_value * ((1 - alpha) * (0.5 * (1 + jnp.cos(jnp.pi * fraction))) ** exponent + alpha)

    return schedule


def warmup_cosine(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    decay_steps: Number,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> Schedule:
    """A line from ``init_value`` to ``peak_value`` in ``warmup_steps``, then half a cosine to ``end_value``.

    ``decay_steps`` counts the whole, warmup included. ``warmup_steps`` of 0 starts at the peak.
    """

    def schedule(step: Any) -> jax.Array:
        step = _as_float(step)
        rise = init_value + (peak_value - init_value) * step / jnp.maximum(warmup_steps, 1e-6)
        fraction = jnp.clip((step - warmup_steps) / jnp.maximum(decay_steps - warmup_steps, 1e-6), 0, 1)
        fall = end_value + (peak_value - end_value) * (0.5 * (1 + jnp.cos(jnp.pi * fraction))) ** exponent
        return jnp.where(step < warmup_steps, rise, fall)

    return schedule


def exponential(
    init_value: Number, transition_steps: Number, decay_rate: Number, transition_begin: Number = 0, staircase: bool = False
) -> Schedule:
    """``init_value``, multiplied by ``decay_rate`` every ``transition_steps`` from ``transition_begin`` on.

    ``staircase`` (static) keeps the value between the multiples of ``transition_steps``.
    """

    def schedule(step: Any) -> jax.Array:
        passed = jnp.maximum(_as_float(step) - transition_begin, 0) / transition_steps
        return init_value * jnp.power(decay_rate, jnp.floor(passed) if staircase else passed)

    return schedule


def piecewise(init_value: Number, boundaries: Sequence[Number] | jax.Array, scales: Sequence[Number] | jax.Array) -> Schedule:
    """``init_value`` times all ``scales[i]`` whose boundary has come, ``boundaries[i] <= step``; ``[K]`` each, in any order.

    Raises:
        ValueError: if there are not as many scales as boundaries.
    """
    edges, factors = jnp.asarray(boundaries), jnp.asarray(scales)
    if edges.shape != factors.shape or edges.ndim != 1:
        raise ValueError(f"piecewise needs as many scales as boundaries, not {factors.shape} and {edges.shape}")

    def schedule(step: Any) -> jax.Array:
        return init_value * jnp.prod(jnp.where(edges <= step, factors, 1))

    return schedule
