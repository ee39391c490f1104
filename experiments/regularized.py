"""A small network with eight global hyperparameters on any data set of ``jaxhpo data``, in Flax NNX.

The learning rate and the momentum (both by logarithm), a weight decay for each layer, label smoothing, the length of the
warmup and noise on the inputs: all floats by which the validation loss has a derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxhpo as jh
from experiments.digits import HE
from experiments.images import images
from experiments.tables import standardised
from jaxhpo.benchmarks import datasets
from jaxhpo.hypergradients import Unrolled
from jaxhpo.tasks import Task, from_nnx, metrics, schedules

WIDTH, NUM_STEPS, BATCH = 64, 150, 64
LAYERS = ("first", "second", "last")
SPACE = jh.Space(
    {
        "learning_rate": jh.Float(1e-4, 1.0, log=True),
        "one_minus_momentum": jh.Float(0.01, 1.0, log=True),
        "weight_decay": jh.Float(1e-6, 1e-1, log=True, shape=(len(LAYERS),)),
        "label_smoothing": jh.Float(0.0, 0.3),
        "warmup": jh.Float(0.0, 0.5),  # as a fraction of the training
        "noise": jh.Float(0.0, 1.0),  # on standardised inputs
    }
)


class InputNoise(nnx.Module):
    """Normal noise in training, nothing in evaluation."""

    def __init__(self, size: Any, *, rngs: nnx.Rngs) -> None:
        self.size = nnx.data(jnp.asarray(size))
        self.deterministic = False
        self.rngs = rngs["noise"].fork()

    def __call__(self, x: jax.Array) -> jax.Array:
        return x if self.deterministic else x + self.size * jax.random.normal(self.rngs(), x.shape, x.dtype)


class Network(nnx.Module):
    """Two hidden layers behind noise."""

    def __init__(self, size_in: int, size_out: int, noise: Any, *, rngs: nnx.Rngs) -> None:
        self.noise = InputNoise(noise, rngs=rngs)
        self.first = nnx.Linear(size_in, WIDTH, kernel_init=HE, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, kernel_init=HE, rngs=rngs)
        self.last = nnx.Linear(WIDTH, size_out, kernel_init=HE, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.second(nnx.relu(self.first(self.noise(x))))))


def decay_by_layer(weight_decay: Any) -> optax.GradientTransformation:
    """L2 penalties, one coefficient for each layer."""

    def update(updates: Any, params: Any) -> Any:
        penalties = {name: weight_decay[i] for i, name in enumerate(LAYERS)}
        return {name: jax.tree.map(lambda u, p, c=penalties[name]: u + c * p, updates[name], params[name]) for name in LAYERS}

    return optax.stateless(update)


def momentum_sgd(hparams: Any) -> optax.GradientTransformation:
    """Nesterov's momentum with a warmup and a cosine down to zero."""
    rate = hparams["learning_rate"]
    return optax.chain(
        decay_by_layer(hparams["weight_decay"]),
        optax.trace(1 - hparams["one_minus_momentum"], nesterov=True),
        optax.scale_by_learning_rate(schedules.warmup_cosine(0.0, rate, hparams["warmup"] * NUM_STEPS, NUM_STEPS)),
    )


def splits(name: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Train, validation and test split, standardised by the training split; pixels share one scale: some never change."""
    return standardised(name) if name == "breast_cancer" else images(name)


@functools.cache  # the same data give the same functions, hence the same compiled program
def network_task(name: str, optimizer: Callable[[Any], optax.GradientTransformation] = momentum_sgd) -> Task:
    """A data set of ``jaxhpo data`` and how to train on it; what the space leaves out is off."""
    size_in, size_out = datasets.dataset(name).num_features, datasets.dataset(name).num_classes
    return from_nnx(
        lambda hparams, rngs: Network(size_in, size_out, hparams.get("noise", 0.0), rngs=rngs),
        optimizer,
        *splits(name),
        loss=lambda hparams, logits, y: metrics.cross_entropy(logits, y, hparams.get("label_smoothing", 0.0)),
        metrics={"loss": metrics.cross_entropy, "error": metrics.error},
        batch_size=BATCH,
    )


def unrolled(data: str = "digits") -> Unrolled:
    """For configs: the hypergradient by all eight."""
    return Unrolled(network_task(data), NUM_STEPS)
