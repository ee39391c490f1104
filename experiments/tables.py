"""Tables of measurements: a network of two hidden layers in Flax NNX.

Tuned: learning_rate, momentum (Nesterov), weight_decay (decoupled), label_smoothing, width (active hidden units), activation.
Any of them may be missing from the space.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments.digits import HE, METRICS, sgd, smoothed_loss, with_defaults
from jaxhpo.benchmarks import datasets
from jaxhpo.tasks import Training, from_nnx
from jaxhpo.tasks.masked import MaskedLinear

ACTIVATIONS = (nnx.relu, nnx.tanh, nnx.gelu)
"""In the order of the options of ``activation``."""


class TableMLP(nnx.Module):
    """Two hidden layers, of whose ``max_width`` units ``width`` are active; the activation is a traced choice."""

    def __init__(self, num_features: int, num_classes: int, max_width: int, hparams: Any, *, rngs: nnx.Rngs) -> None:
        width, chosen = with_defaults(hparams)["width"], hparams.get("activation", 0)

        def activation(x: jax.Array) -> jax.Array:
            return jax.lax.select_n(jax.numpy.broadcast_to(chosen, x.shape), *(function(x) for function in ACTIVATIONS))

        hidden = functools.partial(MaskedLinear, active_out=width, activation=activation, kernel_init=HE, rngs=rngs)
        self.first = hidden(num_features, max_width)
        self.second = hidden(max_width, max_width, active_in=width)
        self.last = MaskedLinear(max_width, num_classes, active_in=width, kernel_init=HE, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.second(self.first(x)))


@functools.cache
def standardised(name: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Train, validation and test split; each column less its mean, by its deviation, both of the training split."""
    data = datasets.load(name)
    mean, scale = data["x_train"].mean(0), data["x_train"].std(0)
    scale = np.where(scale > 0, scale, 1.0)  # a column may be constant
    return tuple(((data[f"x_{split}"] - mean) / scale, data[f"y_{split}"]) for split in ("train", "valid", "test"))


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def table_mlp(
    data: str = "letter",
    num_steps: int = 600,
    steps_per_round: int | None = None,
    batch_size: int = 64,
    max_width: int = 64,
    num_valid: int | None = None,
) -> Training:
    """A table with classes: two hidden layers; the first ``num_valid`` validation rows are scored, None for all."""
    known = datasets.dataset(data)
    train, valid, test = standardised(data)
    task = from_nnx(
        lambda hparams, rngs: TableMLP(known.num_features, known.num_classes, max_width, hparams, rngs=rngs),
        lambda hparams: sgd(hparams, num_steps),
        train,
        (valid[0][:num_valid], valid[1][:num_valid]),
        test,
        loss=smoothed_loss,
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(task, num_steps, steps_per_round)
