"""Images by a small MLP-Mixer (Tolstikhin et al. 2021) in Flax NNX: patches, mixed over places and over channels in turn.

Tuned: learning_rate, weight_decay, one_minus_beta1, warmup, dropout, label_smoothing, width (active hidden units of the mixing
layers). Any of them may be missing from the space.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
from flax import nnx

from experiments.adamw import adamw
from experiments.digits import METRICS, smoothed_loss
from experiments.images import images
from jaxhpo.tasks import Training, from_nnx
from jaxhpo.tasks.dropout import TracedDropout
from jaxhpo.tasks.masked import MaskedLinear

DEFAULTS: dict[str, Any] = {"dropout": 0.1, "width": 32}
NUM_CLASSES = 10


class Mixing(nnx.Module):
    """A hidden layer of ``width`` active units over the last axis."""

    def __init__(self, size: int, max_width: int, width: Any, *, rngs: nnx.Rngs) -> None:
        self.hidden = MaskedLinear(size, max_width, active_out=width, activation=nnx.gelu, rngs=rngs)
        self.out = MaskedLinear(max_width, size, active_in=width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.hidden(x))


class Mixer(nnx.Module):
    """One layer of mixing over places, then over channels, each behind LayerNorm and beside a shortcut."""

    def __init__(self, side: int, patch: int, size: int, max_width: int, hparams: Any, *, rngs: nnx.Rngs) -> None:
        known = {**DEFAULTS, **hparams}
        places = (side // patch) ** 2
        self.side, self.patch = side, patch
        self.stem = nnx.Linear(patch * patch, size, rngs=rngs)
        self.over_places = Mixing(places, max_width, known["width"], rngs=rngs)
        self.over_channels = Mixing(size, max_width, known["width"], rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(size, rngs=rngs) for _ in range(3)])
        self.dropout = TracedDropout(known["dropout"], rngs=rngs)
        self.out = nnx.Linear(size, NUM_CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        n = self.side // self.patch
        patches = x.reshape(-1, n, self.patch, n, self.patch).transpose(0, 1, 3, 2, 4).reshape(len(x), n * n, -1)
        h = self.stem(patches)
        h = h + self.over_places(self.norms[0](h).swapaxes(1, 2)).swapaxes(1, 2)
        h = h + self.over_channels(self.norms[1](h))
        return self.out(self.dropout(self.norms[2](h).mean(1)))


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def mixer(
    data: str = "digits",
    patch: int = 2,
    num_steps: int = 200,
    steps_per_round: int | None = None,
    batch_size: int = 32,
    size: int = 24,
    max_width: int = 48,
) -> Training:
    """Images of ten classes: a small MLP-Mixer. ``patch`` must divide the side of the image.

    Raises:
        ValueError: if it does not.
    """
    splits = images(data)
    side = math.isqrt(splits[0][0].shape[1])
    if side % patch:
        raise ValueError(f"patch = {patch}: must divide the side of the image, {side}")
    task = from_nnx(
        lambda hparams, rngs: Mixer(side, patch, size, max_width, hparams, rngs=rngs),
        lambda hparams: adamw(hparams, num_steps),
        *splits,
        loss=smoothed_loss,
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(task, num_steps, steps_per_round)
