"""Tales character by character: a recurrent network in Flax NNX, scored by bits per character.

Tuned: learning_rate, weight_decay, one_minus_beta1, warmup, dropout, width (active units of the state).
Any of them may be missing from the space.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adamw import adamw
from jaxhpo.benchmarks import datasets
from jaxhpo.tasks import Training, from_nnx, metrics
from jaxhpo.tasks.dropout import TracedDropout
from jaxhpo.tasks.masked import MaskedLinear, width_mask

DEFAULTS: dict[str, Any] = {"dropout": 0.0, "width": 64}
NUM_SYMBOLS = 72


def bits(logits: jax.Array, symbols: jax.Array) -> jax.Array:
    """Mean bits to tell the next symbol: the cross entropy to the base of two."""
    return metrics.cross_entropy(logits, symbols) / math.log(2.0)


METRICS = {"loss": metrics.cross_entropy, "bits": bits, "accuracy": metrics.accuracy}


class Recurrent(nnx.Module):
    """Gated recurrent units (Cho et al. 2014) over embedded characters; ``width`` units of the state are active."""

    def __init__(self, max_width: int, hparams: Any, *, rngs: nnx.Rngs) -> None:
        known = {**DEFAULTS, **hparams}
        width = known["width"]
        self.symbols = nnx.Embed(NUM_SYMBOLS, max_width, rngs=rngs)
        self.gates = MaskedLinear(max_width, 2 * max_width, rngs=rngs)
        self.state_gates = MaskedLinear(max_width, 2 * max_width, active_in=width, use_bias=False, rngs=rngs)
        self.candidate = MaskedLinear(max_width, max_width, active_out=width, rngs=rngs)
        self.state_candidate = MaskedLinear(max_width, max_width, active_in=width, active_out=width, use_bias=False, rngs=rngs)
        self.dropout = TracedDropout(known["dropout"], rngs=rngs)
        self.out = MaskedLinear(max_width, NUM_SYMBOLS, active_in=width, rngs=rngs)
        self.mask = nnx.data(width_mask(width, max_width))

    def __call__(self, x: jax.Array) -> jax.Array:
        embedded = self.symbols(x)
        gates, candidates = self.gates(embedded), self.candidate(embedded)

        def step(state: jax.Array, inputs: Any) -> tuple[jax.Array, jax.Array]:
            gate, candidate = inputs
            update, reset = jnp.split(jax.nn.sigmoid(gate + self.state_gates(state)), 2, axis=-1)
            new = jnp.tanh(candidate + self.state_candidate(reset * state)) * self.mask
            state = update * state + (1 - update) * new
            return state, state

        first = jnp.zeros(gates.shape[:1] + candidates.shape[-1:], gates.dtype)
        states = jax.lax.scan(step, first, (gates.swapaxes(0, 1), candidates.swapaxes(0, 1)))[1].swapaxes(0, 1)
        return self.out(self.dropout(states))


@functools.cache
def windows(num_valid: int | None) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Windows of 64 characters and the character after each; ``num_valid`` of the validation windows, spread evenly."""
    data = datasets.load("grimm")
    picked = np.linspace(0, len(data["x_valid"]) - 1, num_valid or len(data["x_valid"])).astype(int)
    valid = (data["x_valid"][picked], data["y_valid"][picked])
    return (data["x_train"], data["y_train"]), valid, (data["x_test"], data["y_test"])


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def recurrent(
    num_steps: int = 300,
    steps_per_round: int | None = None,
    batch_size: int = 8,
    max_width: int = 64,
    num_valid: int | None = 128,
) -> Training:
    """Grimm's tales: gated recurrent units; ``num_valid`` validation windows are scored, None for all."""
    task = from_nnx(
        lambda hparams, rngs: Recurrent(max_width, hparams, rngs=rngs),
        lambda hparams: adamw(hparams, num_steps),
        *windows(num_valid),
        loss=lambda hparams, logits, symbols: metrics.cross_entropy(logits, symbols),
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(task, num_steps, steps_per_round)
