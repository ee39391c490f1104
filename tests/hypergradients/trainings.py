"""Small trainings that the tests of hypergradients share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxhpo as jh


def data(seed: int = 0, n: int = 150, dtype=np.float64):
    """Three classes in five dimensions, some of them labelled by chance: (train, valid, test)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5)).astype(dtype)
    y = ((x[:, 0] > 0).astype(int) + (x[:, 1] > 0.3)).astype(np.int32)
    y = np.where(rng.uniform(size=n) < 0.1, rng.integers(0, 3, n), y).astype(np.int32)
    third = n // 3
    return tuple((x[i : i + third], y[i : i + third]) for i in (0, third, 2 * third))


class Network(nnx.Module):
    """One hidden layer of tanh; in the precision of its inputs."""

    def __init__(self, rngs, dtype=jnp.float64, batch_norm=False, rate=0.0):
        kind = {"param_dtype": dtype, "dtype": dtype, "rngs": rngs}
        self.first, self.last = nnx.Linear(5, 12, **kind), nnx.Linear(12, 3, **kind)
        # In single precision: Flax keeps the statistics in it whatever the rest is in.
        self.norm = nnx.BatchNorm(12, momentum=0.7, dtype=jnp.float32, rngs=rngs) if batch_norm else None
        self.dropout = nnx.Dropout(rate, rngs=rngs) if rate else None

    def __call__(self, x):
        h = self.first(x)
        h = jnp.tanh(h if self.norm is None else self.norm(h).astype(h.dtype))
        return self.last(h if self.dropout is None else self.dropout(h))


def flax_task(optimizer, dtype=np.float64, batch_size=16, loss=None, **kind):
    """A classification with minibatches by the optimizer that ``optimizer(hparams)`` makes."""
    model = lambda hparams, rngs: Network(rngs, jnp.dtype(dtype), **kind)
    return jh.tasks.from_nnx(model, optimizer, *data(dtype=dtype), batch_size=batch_size, loss=loss)


def task(optimizer, dtype=np.float64):
    """The like in plain functions, which compile faster: a hidden layer of tanh, batches drawn by each step's key."""
    (x, y), (x_valid, y_valid), _ = data(dtype=dtype)

    def loss(params, x, y):
        hidden = jnp.tanh(x @ params["first"] + params["bias"])
        return jh.tasks.metrics.cross_entropy(hidden @ params["last"], y)

    def init(key, hparams):
        first, last = jax.random.normal(key, (2, 5, 8), dtype) * 0.4
        params = {"first": first, "bias": jnp.zeros(8, dtype), "last": last[:3].T}
        return {"params": params, "opt_state": optimizer(hparams).init(params)}

    def step(key, hparams, state):
        index = jax.random.randint(key, (16,), 0, len(x))
        grads = jax.grad(loss)(state["params"], jnp.asarray(x)[index], jnp.asarray(y)[index])
        updates, opt_state = optimizer(hparams).update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def evaluate(hparams, state):
        hidden = jnp.tanh(jnp.asarray(x_valid) @ state["params"]["first"] + state["params"]["bias"])
        logits, labels = hidden @ state["params"]["last"], jnp.asarray(y_valid)
        names = ("cross_entropy", "accuracy", "error")
        return {name.replace("cross_entropy", "loss"): getattr(jh.tasks.metrics, name)(logits, labels) for name in names}

    return jh.Task(init, step, evaluate)


def sgd(hparams):
    return optax.sgd(hparams["lr"], momentum=hparams["momentum"])


def adam(hparams):
    return optax.adamw(hparams["lr"], b1=hparams["b1"], weight_decay=hparams["decay"], eps_root=1e-16)


SGD = {"lr": 0.1, "momentum": 0.8}
ADAM = {"lr": 0.02, "b1": 0.85, "decay": 0.1}


def central_differences(function, hparams, step=1e-5):
    """Derivatives of ``function(hparams)`` by each scalar, by differences of fourth order."""
    slopes = {}
    for name, value in hparams.items():
        at = lambda d, name=name, value=value: float(function({**hparams, name: value + d * step}))
        slopes[name] = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
    return slopes


def relative_error(found, expected):
    """Largest over the hyperparameters of |found - expected| / |expected|, by Euclidean norms."""
    norm = np.linalg.norm
    flat = lambda x: np.asarray(x, np.float64).ravel()
    return max(norm(flat(found[n]) - flat(expected[n])) / max(norm(flat(expected[n])), 1e-300) for n in expected)


def jitted(estimator, key=0):
    """``hparams -> (loss, grad)`` of an estimator at one key, compiled."""
    return jax.jit(lambda hparams: estimator(jax.random.key(key), hparams))
