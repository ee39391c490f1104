"""Four real trainings as problems: small networks on data that scikit-learn brings along, validated.

    problem = breast_cancer();   problem.loss(key, hparams)   # mean validation cross-entropy over folds, NaN if it diverged

Each takes some tens of milliseconds on one core once compiled. The key fixes initial weights, batches and noise, so that a
search that passes the same key every time searches a deterministic function. All arithmetic is in float32. The lowest loss
is not known: ``optimum`` is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.digits import plain_mlp
from jaxhpo.benchmarks.functions import Problem
from jaxhpo.space import Choice, Float, Int, Space
from jaxhpo.tasks.masked import masked_init, width_mask

NUM_FOLDS = 5
DIVERGED = 10.0
"""A validation loss above so many times that of the best constant prediction counts as diverged."""

ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu}
HE = jax.nn.initializers.he_normal()
Params = dict[str, jax.Array]
ExampleLoss = Callable[[jax.Array, jax.Array], jax.Array]


def or_nan(loss: jax.Array, constant: float) -> jax.Array:
    """The loss, NaN where it is not finite or above ``DIVERGED`` times that of the best constant prediction."""
    return jnp.where(loss <= DIVERGED * constant, loss, jnp.nan)


@functools.cache
def digits(num_steps: int = 80, num_seeds: int = 2) -> Problem:
    """The digits network of ``experiments/digits.py``, validation cross-entropy as a mean over seeds."""
    training = plain_mlp(num_steps=num_steps, batch_size=64, max_width=64, num_seeds=num_seeds)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        task = jax.tree.map(jnp.asarray, training.task)

        def step(state: Any, key: jax.Array) -> Any:
            return task.step(key, hparams, state), None

        keys = jax.random.split(key, num_steps + 1)
        state, _ = jax.lax.scan(step, task.init(keys[0], hparams), keys[1:])
        return or_nan(task.evaluate(hparams, state)["loss"], float(np.log(10.0)))

    space = Space(
        {
            "learning_rate": Float(1e-3, 1.0, log=True),
            "momentum": Float(0.0, 0.99),
            "weight_decay": Float(1e-6, 1e-1, log=True),
            "label_smoothing": Float(0.0, 0.3),
            "width": Int(8, 64, log=True),
        }
    )
    return Problem("digits", space, loss, float("nan"), None)


def folds(x: np.ndarray, y: np.ndarray, seed: int = 2024) -> tuple[np.ndarray, ...]:
    """Training inputs and targets, validation inputs and targets, ``[NUM_FOLDS, N, ...]`` each.

    Inputs are standardised by the training part of their fold. Examples that do not fill the last fold are left out.
    """
    size = len(x) // NUM_FOLDS
    parts = np.random.default_rng(seed).permutation(len(x))[: NUM_FOLDS * size].reshape(NUM_FOLDS, size)
    made = []
    for i in range(NUM_FOLDS):
        train, valid = np.delete(parts, i, axis=0).ravel(), parts[i]
        mean, scale = x[train].mean(0), x[train].std(0)
        made.append(((x[train] - mean) / scale, y[train], (x[valid] - mean) / scale, y[valid]))
    return tuple(np.stack(arrays) for arrays in zip(*made, strict=True))


def of_index(index: jax.Array, functions: Any, *args: jax.Array) -> jax.Array:
    """What the function of that index gives; all are computed, as they would be under ``vmap``."""
    return jnp.stack([function(*args) for function in functions])[index]


def init_mlp(key: jax.Array, sizes: tuple[int, int, int], width: jax.Array) -> Params:
    """One hidden layer, of whose units ``width`` are active."""
    size_in, max_width, size_out = sizes
    first, last = jax.random.split(key)
    return {
        "w1": masked_init(HE, size_in, width)(first, (size_in, max_width)),
        "b1": jnp.zeros(max_width, jnp.float32),
        "w2": masked_init(HE, width, size_out)(last, (max_width, size_out)),
        "b2": jnp.zeros(size_out, jnp.float32),
    }


def apply_mlp(params: Params, hparams: Any, x: jax.Array, keep: jax.Array | float = 1.0) -> jax.Array:
    """Outputs ``[N, out]``; ``keep`` multiplies the hidden units."""
    hidden = of_index(hparams["activation"], ACTIVATIONS.values(), x @ params["w1"] + params["b1"])
    return (hidden * keep * width_mask(hparams["width"], hidden.shape[-1])) @ params["w2"] + params["b2"]


def cross_validated(
    data: tuple[np.ndarray, ...],
    size_out: int,
    training_loss: Callable[[Any, jax.Array, jax.Array], jax.Array],
    validation_loss: ExampleLoss,
    constant: float,
    *,
    max_width: int,
    max_steps: int,
    batch_size: int = 32,
) -> Callable[[jax.Array, Any], jax.Array]:
    """``(key, hparams) -> validation loss`` of a network with one hidden layer, a mean over the folds.

    Used of ``hparams``: ``learning_rate, momentum, weight_decay`` (decoupled), ``dropout, width, activation``, ``adaptive``
    (0 for the plain momentum step, 1 for Adam's, in between both are mixed) and ``num_steps`` (at most ``max_steps``).
    """
    sizes = (data[0].shape[-1], max_width, size_out)

    def one_fold(key: jax.Array, hparams: Any, x: jax.Array, y: jax.Array, x_valid: jax.Array, y_valid: jax.Array) -> jax.Array:
        beta1, beta2 = hparams["momentum"], 0.99

        def batch_loss(params: Params, key: jax.Array) -> jax.Array:
            of_batch, of_dropout = jax.random.split(key)
            index = jax.random.randint(of_batch, (batch_size,), 0, len(x))
            kept = jax.random.bernoulli(of_dropout, 1 - hparams["dropout"], (batch_size, max_width))
            outputs = apply_mlp(params, hparams, x[index], kept / (1 - hparams["dropout"]))
            return training_loss(hparams, outputs, y[index])

        def step(carry: Any, inputs: Any) -> Any:
            params, mean, square = carry
            number, key = inputs
            grads = jax.grad(batch_loss)(params, key)
            mean = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, mean, grads)
            square = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g**2, square, grads)
            active = number < hparams["num_steps"]
            progress = number / hparams["num_steps"]
            rate = jnp.where(active, hparams["learning_rate"] * 0.5 * (1 + jnp.cos(jnp.pi * progress)), 0.0)

            def moved(param: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
                m, v = m / (1 - beta1 ** (number + 1)), v / (1 - beta2 ** (number + 1))
                scale = hparams["adaptive"] / (jnp.sqrt(v) + 1e-8) + (1 - hparams["adaptive"])
                return param - rate * (scale * m + hparams["weight_decay"] * param)

            return (jax.tree.map(moved, params, mean, square), mean, square), None

        params = init_mlp(jax.random.fold_in(key, 0), sizes, hparams["width"])
        zero = jax.tree.map(jnp.zeros_like, params)
        keys = jax.random.split(jax.random.fold_in(key, 1), max_steps)
        (params, *_), _ = jax.lax.scan(step, (params, zero, zero), (jnp.arange(max_steps), keys))
        return validation_loss(apply_mlp(params, hparams, x_valid), y_valid)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        keys = jax.random.split(key, NUM_FOLDS)
        losses = jax.vmap(one_fold, in_axes=(0, None, 0, 0, 0, 0))(keys, hparams, *map(jnp.asarray, data))
        return or_nan(losses.mean(), constant)

    return loss


def tabular_space(max_width: int, max_steps: int, **more: Any) -> Space:
    """What all tabular trainings tune, and more."""
    return Space(
        {
            "learning_rate": Float(1e-3, 1.0, log=True),
            "weight_decay": Float(1e-5, 1.0, log=True),
            "dropout": Float(0.0, 0.7),
            "width": Int(2, max_width, log=True),
            "num_steps": Int(max_steps // 20, max_steps, log=True),
            "activation": Choice(tuple(ACTIVATIONS)),
            **more,
        }
    )


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1))


@functools.cache
def breast_cancer() -> Problem:
    """Tumours by 30 measurements: cross-entropy over five folds; eight hyperparameters, one of them the optimizer."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    data = folds(np.asarray(x, np.float32), np.asarray(y, np.int32))
    run = cross_validated(
        data, 2, lambda hparams, logits, y: mean_cross_entropy(logits, y), mean_cross_entropy, 0.66, max_width=32, max_steps=150
    )

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        return run(key, {**hparams, "adaptive": hparams["optimizer"].astype(jnp.float32)})

    space = tabular_space(32, 150, momentum=Float(0.0, 0.98), optimizer=Choice(("sgd", "adam")))
    return Problem("breast_cancer", space, loss, float("nan"), None)


REGRESSION_LOSSES: dict[str, ExampleLoss] = {
    "squared": lambda output, y: 0.5 * jnp.mean((output - y) ** 2),
    "huber": lambda output, y: jnp.mean(jnp.where(jnp.abs(output - y) < 1, 0.5 * (output - y) ** 2, jnp.abs(output - y) - 0.5)),
    "absolute": lambda output, y: jnp.mean(jnp.abs(output - y)),
}


@functools.cache
def diabetes() -> Problem:
    """The progress of a disease by ten measurements: squared error over five folds, in units of the variance.

    Eight hyperparameters, one of them the loss that training minimises, one a blend of momentum's step and Adam's.
    """
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    y = ((y - y.mean()) / y.std()).astype(np.float32)
    data = folds(np.asarray(x, np.float32), y)

    def training_loss(hparams: Any, outputs: jax.Array, y: jax.Array) -> jax.Array:
        return of_index(hparams["loss"], REGRESSION_LOSSES.values(), outputs[:, 0], y)

    run = cross_validated(
        data, 1, training_loss, lambda outputs, y: jnp.mean((outputs[:, 0] - y) ** 2), 1.0, max_width=32, max_steps=150
    )

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        return run(key, {**hparams, "momentum": 0.9})

    space = tabular_space(32, 150, loss=Choice(tuple(REGRESSION_LOSSES)), adaptive=Float(0.0, 1.0))
    return Problem("diabetes", space, loss, float("nan"), None)


@functools.cache
def wine() -> Problem:
    """Three cultivars by 13 measurements: cross-entropy over five folds; eight hyperparameters, two of them of Adam."""
    from sklearn.datasets import load_wine

    x, y = load_wine(return_X_y=True)
    data = folds(np.asarray(x, np.float32), np.asarray(y, np.int32))

    def training_loss(hparams: Any, logits: jax.Array, y: jax.Array) -> jax.Array:
        smooth = -jnp.mean(jax.nn.log_softmax(logits))
        return (1 - hparams["label_smoothing"]) * mean_cross_entropy(logits, y) + hparams["label_smoothing"] * smooth

    run = cross_validated(data, 3, training_loss, mean_cross_entropy, 1.1, max_width=32, max_steps=100)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        return run(key, {**hparams, "adaptive": 1.0})

    space = tabular_space(32, 100, momentum=Float(0.0, 0.98), label_smoothing=Float(0.0, 0.3))
    return Problem("wine", space, loss, float("nan"), None)


TRAININGS = {"digits": digits, "breast_cancer": breast_cancer, "diabetes": diabetes, "wine": wine}
