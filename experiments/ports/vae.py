"""Binary images of digits by a variational autoencoder, in Flax Linen, on the idea of Flax's example ``vae``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import jaxhpo as jh
from jaxhpo.benchmarks import datasets

SPACE = {"lr": jh.Float(1e-4, 0.1, log=True), "b1": jh.Float(0.0, 0.99), "latents": jh.Choice((4, 8, 16), static=True)}
HIDDEN, BATCH_SIZE, NUM_EPOCHS = 128, 64, 20


class VAE(nn.Module):
    """A Gaussian posterior for each image, and the logits of the pixels of an image drawn back from it."""

    latents: int

    def setup(self) -> None:
        self.encoder = nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(2 * self.latents)])
        self.decoder = nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(64)])

    def __call__(self, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, log_variance = jnp.split(self.encoder(x), 2, axis=-1)
        z = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return self.decoder(z), mean, log_variance


def create(hparams: Any, key: jax.Array) -> TrainState:
    """The state at the start of training."""
    model = VAE(hparams["latents"])
    params = model.init(key, jnp.zeros((1, 64)), key)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(hparams["lr"], hparams["b1"]))


def bounds(state: TrainState, params: Any, batch: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """The negative evidence lower bound in nats an image, and its two parts."""
    logits, mean, log_variance = state.apply_fn({"params": params}, batch, key)
    reconstruction = optax.sigmoid_binary_cross_entropy(logits, batch).sum(-1).mean()
    divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1).mean()
    return {"loss": reconstruction + divergence, "reconstruction": reconstruction, "divergence": divergence}


@jax.jit
def train_step(state: TrainState, batch: jax.Array, key: jax.Array) -> TrainState:
    """One step of gradient descent."""
    grads = jax.grad(lambda params: bounds(state, params, batch, key)["loss"])(state.params)
    return state.apply_gradients(grads=grads)


@jax.jit
def eval_step(state: TrainState, batch: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
    """The metrics of a batch."""
    return bounds(state, state.params, batch, key)


def load() -> tuple[np.ndarray, ...]:
    """Train, validation and test split: images of 8 x 8 pixels, each 0 or 1."""
    data = datasets.load("digits")
    return tuple((data[f"x_{split}"] > 7).astype(np.float32) for split in ("train", "valid", "test"))


def task(num_steps: int = 320) -> jh.Training:
    """What is tuned, by the study below or by that of a config."""
    return jh.Training(jh.tasks.from_steps(create, train_step, eval_step, *load(), batch_size=BATCH_SIZE), num_steps)


def main() -> None:
    """Train for some epochs and print how it goes."""
    jh.prepare_jax()
    train, _, test = load()
    key, eval_key = jax.random.split(jax.random.key(0))
    best = jh.minimize(task(), SPACE, jh.PSO(num_lanes=16), key=0, num_trials=128).best
    print(best)
    state = create(best.hparams, key)
    shuffle = np.random.default_rng(0)
    for epoch in range(NUM_EPOCHS):
        for index in shuffle.permutation(len(train))[: len(train) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            state = train_step(state, train[index], jax.random.fold_in(key, state.step))
        metrics = eval_step(state, test, eval_key)
        print(f"epoch {epoch + 1}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))


if __name__ == "__main__":
    main()
