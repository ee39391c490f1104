"""Handwritten digits by a small convolutional network, in Flax NNX, on the idea of Flax's example ``mnist``."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxhpo.benchmarks import datasets

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.005, 0.9, 1e-4
BATCH_SIZE, NUM_EPOCHS = 64, 10


class CNN(nnx.Module):
    """Two convolutions with batch norm, each halving the image, and a hidden layer with dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 16, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.9, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, kernel_size=(3, 3), rngs=rngs)
        self.dense1 = nnx.Linear(2 * 2 * 32, 64, rngs=rngs)
        self.dropout = nnx.Dropout(0.25)
        self.dense2 = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
        x = nnx.avg_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), strides=(2, 2))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = self.dropout(nnx.relu(self.dense1(x.reshape(len(x), -1))), rngs=rngs)
        return self.dense2(x)


def create(rngs: nnx.Rngs) -> tuple[CNN, nnx.Optimizer, nnx.MultiMetric, nnx.Rngs]:
    """All that a training step changes."""
    model = CNN(rngs)
    adamw = optax.adamw(LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
    return model, nnx.Optimizer(model, adamw, wrt=nnx.Param), metrics, rngs


def loss_fn(model: CNN, rngs: nnx.Rngs, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Cross entropy, and the logits."""
    logits = model(batch["image"], rngs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), logits


@nnx.jit
def train_step(model: CNN, optimizer: nnx.Optimizer, metrics: nnx.MultiMetric, rngs: nnx.Rngs, batch: dict[str, Any]) -> None:
    """One step of gradient descent."""
    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model, rngs, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)


@nnx.jit
def eval_step(model: CNN, metrics: nnx.MultiMetric, rngs: nnx.Rngs, batch: dict[str, Any]) -> None:
    """The metrics of one more batch."""
    loss, logits = loss_fn(model, rngs, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])


def load() -> tuple[dict[str, np.ndarray], ...]:
    """Train, validation and test split: images of 8 x 8 pixels in 0 .. 1 with their labels."""
    data = datasets.load("digits")
    image = lambda split: data[f"x_{split}"].reshape(-1, 8, 8, 1) / 16
    return tuple({"image": image(split), "label": data[f"y_{split}"]} for split in ("train", "valid", "test"))


def main() -> None:
    """Train for some epochs and print how it goes."""
    train, _, test = load()
    model, optimizer, metrics, rngs = create(nnx.Rngs(0))
    shuffle, size = np.random.default_rng(0), len(train["label"])
    for epoch in range(NUM_EPOCHS):
        model.train()
        for index in shuffle.permutation(size)[: size // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            train_step(model, optimizer, metrics, rngs, {name: array[index] for name, array in train.items()})
        print(f"epoch {epoch + 1}: training loss {metrics.compute()['loss']:.4f}", end=", ")
        metrics.reset()
        model.eval()
        eval_step(model, metrics, rngs, test)
        print("test loss {loss:.4f}, accuracy {accuracy:.2%}".format(**metrics.compute()))
        metrics.reset()


if __name__ == "__main__":
    main()
