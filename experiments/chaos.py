"""Where the hypergradient of a training stops to mean anything: loss, derivative and gauge beside the learning rate.

    python -m experiments.chaos [--steps 500] [--seeds 8] [--quick]

A tanh network (64-64-10) on scikit-learn's digits, minibatches of 64. For every learning rate, over seeds: the validation
loss, the size of its derivative by the rate's logarithm, the share of seeds that agree with the majority on its sign, and the
growth of the adjoint in decades, as every study reports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxhpo as jh
from experiments.digits import digits
from jaxhpo.hypergradients import Unrolled
from jaxhpo.hypergradients.gauge import CHAOTIC, GROWTH

OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], list[float]]] = {
    "SGD, momentum 0.9": (lambda h: optax.sgd(h["lr"], momentum=0.9), [0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0]),
    "Adam": (lambda h: optax.adam(h["lr"], eps_root=1e-16), [0.001, 0.003, 0.01, 0.03, 0.1, 0.3]),
}


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden, self.out = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(self.hidden(x)))


def readings(optimizer: Callable[[Any], Any], num_steps: int, rates: list[float], num_seeds: int) -> list[np.ndarray]:
    """Loss, derivative by the log of the rate and growth, ``[seeds, rates]`` each."""
    train, valid, _ = digits()
    task = jh.tasks.from_nnx(lambda hparams, rngs: Network(rngs), optimizer, train, valid, batch_size=64)
    estimator = Unrolled(task, num_steps)

    def one(key: jax.Array, log_rate: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = estimator.estimate(key, {"log": log_rate}, lambda floats: {"lr": jnp.exp(floats["log"])})
        return found.metrics["loss"], found.grad["log"], found.metrics[GROWTH]

    keys = jax.random.split(jax.random.key(0), num_seeds)
    run = jax.jit(lambda rate: jax.lax.map(lambda key: one(key, rate), keys))
    return [np.stack(column, 1) for column in zip(*(run(jnp.log(jnp.float32(rate))) for rate in rates), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="few steps and seeds: does it run?")
    given = parser.parse_args()
    steps, seeds = (30, 2) if given.quick else (given.steps, given.seeds)
    print(f"{steps} steps, {seeds} seeds; chaotic: growth above {CHAOTIC:g} decades\n")
    print("| optimizer | learning rate | loss | derivative by log rate | same sign | growth | chaotic |")
    print("|---|---|---|---|---|---|---|")
    for name, (optimizer, rates) in OPTIMIZERS.items():
        for rate, loss, grad, growth in zip(rates, *(x.T for x in readings(optimizer, steps, rates, seeds)), strict=True):
            sign = np.sign(grad[np.isfinite(grad)])
            agree = max((sign > 0).mean(), (sign < 0).mean()) if sign.size else 0.0
            size = np.where(np.isfinite(grad), np.abs(grad), np.inf)
            chaotic = np.mean(~(growth <= CHAOTIC))
            found = [
                f"{np.median(loss):.3f}",
                f"{np.median(size):.2g} [{size.min():.1g} to {size.max():.1g}]",
                f"{100 * agree:.0f} %",
                f"{np.median(growth):.1f} [{growth.min():.1f} to {growth.max():.1f}]",
                f"{100 * chaotic:.0f} %",
            ]
            print(f"| {name} | {rate:g} | {' | '.join(found)} |")


if __name__ == "__main__":
    main()
