"""The network of ``experiments/digits.py`` on any image set, looked at as often as early stopping asks for."""

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


class ImageMLP(nnx.Module):
    """Hidden layers of the same width, of whose ``max_width`` units ``width`` are active; ``depth`` of them, static."""

    def __init__(
        self, num_pixels: int, width: jax.Array | int, max_width: int, depth: int, activation: Any, *, rngs: nnx.Rngs
    ) -> None:
        hidden = functools.partial(MaskedLinear, active_out=width, activation=activation, kernel_init=HE, rngs=rngs)
        first = hidden(num_pixels, max_width)
        more = [hidden(max_width, max_width, active_in=width) for _ in range(depth - 1)]
        self.layers = nnx.List([first, *more])
        self.last = MaskedLinear(max_width, 10, active_in=width, kernel_init=HE, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


@functools.cache
def images(name: str) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Train, validation and test split; each pixel less its mean, all divided by one scale, both of the training split."""
    data = datasets.load(name)
    flat = {split: data[f"x_{split}"].reshape(len(data[f"x_{split}"]), -1) for split in ("train", "valid", "test")}
    mean = flat["train"].mean(0)
    scale = (flat["train"] - mean).std()
    return tuple((((x - mean) / scale).astype(np.float32), data[f"y_{split}"]) for split, x in flat.items())


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def image_mlp(
    data: str = "digits",
    num_steps: int = 270,
    steps_per_round: int | None = 10,
    batch_size: int = 64,
    max_width: int = 128,
    depth: int = 2,
) -> Training:
    """Images of ten classes: a network of hidden layers of one width, in Flax NNX.

    The space may have ``depth`` and ``activation`` (``relu``, ``tanh``, ``gelu``) as static choices.
    """
    splits = images(data)
    num_pixels = splits[0][0].shape[1]

    def network(hparams: Any, rngs: nnx.Rngs) -> ImageMLP:
        activation = getattr(jax.nn, hparams.get("activation", "relu"))
        return ImageMLP(
            num_pixels, with_defaults(hparams)["width"], max_width, hparams.get("depth", depth), activation, rngs=rngs
        )

    task = from_nnx(
        network, lambda hparams: sgd(hparams, num_steps), *splits, loss=smoothed_loss, metrics=METRICS, batch_size=batch_size
    )
    return Training(task, num_steps, steps_per_round)
