"""A small network on scikit-learn's digits, three times the same: in Flax NNX, in Flax Linen, in plain JAX.

Tuned: learning_rate, momentum (Nesterov), weight_decay (decoupled), label_smoothing, width (active hidden units).
Any of them may be missing from the space; then it has the value in ``DEFAULTS``.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax.tree_util import Partial

from jaxhpo.benchmarks import datasets
from jaxhpo.tasks import Task, Training, from_linen, from_nnx, metrics, over_seeds, schedules
from jaxhpo.tasks.masked import MaskedLinear, masked_init, width_mask
from jaxhpo.tasks.minibatch import first_order, next_batch

DEFAULTS = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "label_smoothing": 0.0, "width": 64}
METRICS = {
    "loss": metrics.cross_entropy,
    "accuracy": metrics.accuracy,
    "error": metrics.error,
    "macro_f1": metrics.macro_f1,
}
NUM_PIXELS, NUM_CLASSES = 64, 10
HE = jax.nn.initializers.he_normal()


@functools.cache
def digits() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Train, validation and test split; each pixel less its mean, all divided by one scale, both of the training split."""
    data = datasets.load("digits")
    mean = data["x_train"].mean(0)
    scale = (data["x_train"] - mean).std()
    return tuple(((data[f"x_{split}"] - mean) / scale, data[f"y_{split}"]) for split in ("train", "valid", "test"))


def with_defaults(hparams: Any) -> dict[str, Any]:
    """The hyperparameters of a trial, with the default of each that the space leaves out."""
    return {**DEFAULTS, **hparams}


def sgd(hparams: Any, num_steps: int) -> optax.GradientTransformation:
    """Nesterov's momentum, decoupled weight decay, and a cosine down to zero for both."""
    hparams = with_defaults(hparams)
    return optax.chain(
        optax.trace(hparams["momentum"], nesterov=True),
        optax.add_decayed_weights(hparams["weight_decay"]),
        optax.scale_by_learning_rate(schedules.cosine(hparams["learning_rate"], num_steps)),
    )


def smoothed_loss(hparams: Any, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """What training minimises; the validation loss is without smoothing."""
    return metrics.cross_entropy(logits, labels, with_defaults(hparams)["label_smoothing"])


def fans(width: jax.Array | int, max_width: int) -> dict[str, tuple[int, int, jax.Array | int, jax.Array | int]]:
    """The layers by name: greatest widths in and out, active widths in and out."""
    return {
        "first": (NUM_PIXELS, max_width, NUM_PIXELS, width),
        "second": (max_width, max_width, width, width),
        "last": (max_width, NUM_CLASSES, width, NUM_CLASSES),
    }


class NnxMLP(nnx.Module):
    """Two hidden layers of the same width, of whose ``max_width`` units ``width`` are active."""

    def __init__(self, width: jax.Array | int, max_width: int, *, rngs: nnx.Rngs) -> None:
        hidden = functools.partial(MaskedLinear, active_out=width, activation=nnx.relu, kernel_init=HE, rngs=rngs)
        self.first = hidden(NUM_PIXELS, max_width)
        self.second = hidden(max_width, max_width, active_in=width)
        self.last = MaskedLinear(max_width, NUM_CLASSES, active_in=width, kernel_init=HE, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.second(self.first(x)))


class LinenMLP(linen.Module):
    """The same in Linen."""

    width: Any
    max_width: int

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        mask = width_mask(self.width, self.max_width)
        for name, (_, size_out, active_in, active_out) in fans(self.width, self.max_width).items():
            x = linen.Dense(size_out, kernel_init=masked_init(HE, active_in, active_out), name=name)(x)
            x = x if name == "last" else linen.relu(x) * mask
        return x


def plain_init(key: jax.Array, width: jax.Array | int, max_width: int) -> dict[str, dict[str, jax.Array]]:
    """The same in plain JAX: parameters."""
    params = {}
    for name, (size_in, size_out, active_in, active_out) in fans(width, max_width).items():
        key, layer_key = jax.random.split(key)
        kernel = masked_init(HE, active_in, active_out)(layer_key, (size_in, size_out))
        params[name] = {"kernel": kernel, "bias": jnp.zeros(size_out)}
    return params


def plain_apply(params: dict[str, dict[str, jax.Array]], width: jax.Array | int, x: jax.Array) -> jax.Array:
    """The same in plain JAX: logits."""
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
        x = x * width_mask(width, x.shape[-1])
    return x @ params["last"]["kernel"] + params["last"]["bias"]


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def nnx_mlp(num_steps: int = 300, batch_size: int = 64, max_width: int = 128, num_seeds: int = 1) -> Training:
    """Digits: a network of two hidden layers, in Flax NNX."""
    task = from_nnx(
        lambda hparams, rngs: NnxMLP(with_defaults(hparams)["width"], max_width, rngs=rngs),
        lambda hparams: sgd(hparams, num_steps),
        *digits(),
        loss=smoothed_loss,
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(over_seeds(task, num_seeds), num_steps)


@functools.cache
def linen_mlp(num_steps: int = 300, batch_size: int = 64, max_width: int = 128, num_seeds: int = 1) -> Training:
    """Digits: a network of two hidden layers, in Flax Linen."""
    task = from_linen(
        lambda hparams: LinenMLP(with_defaults(hparams)["width"], max_width),
        lambda hparams: sgd(hparams, num_steps),
        *digits(),
        loss=smoothed_loss,
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(over_seeds(task, num_seeds), num_steps)


@functools.cache
def plain_mlp(num_steps: int = 300, batch_size: int = 64, max_width: int = 128, num_seeds: int = 1) -> Training:
    """Digits: a network of two hidden layers, in plain JAX."""

    def init(key: jax.Array, hparams: Any) -> Any:
        params = plain_init(jax.random.fold_in(key, 0), with_defaults(hparams)["width"], max_width)
        order = first_order(jax.random.fold_in(key, 1))
        return {"params": params, "opt_state": sgd(hparams, num_steps).init(params), "order": order}

    # The data come first: they are leaves of the task, see `Partial` below.
    def step(x: jax.Array, y: jax.Array, key: jax.Array, hparams: Any, state: Any) -> Any:
        index, order = next_batch(state["order"], len(x), batch_size)

        def loss(params: Any) -> jax.Array:
            return smoothed_loss(hparams, plain_apply(params, with_defaults(hparams)["width"], x[index]), y[index])

        grads = jax.grad(loss)(state["params"])
        updates, opt_state = sgd(hparams, num_steps).update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state, "order": order}

    def evaluate(x: jax.Array, y: jax.Array, hparams: Any, state: Any) -> dict[str, jax.Array]:
        logits = plain_apply(state["params"], with_defaults(hparams)["width"], x)
        return {name: metric(logits, y) for name, metric in METRICS.items()}

    train, valid, test = digits()
    task = Task(init, Partial(step, *train), Partial(evaluate, *valid), Partial(evaluate, *test))
    return Training(over_seeds(task, num_seeds), num_steps)
