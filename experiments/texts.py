"""Topics of news and posts: a bag of embeddings, and a small transformer encoder, in Flax NNX; scored by macro-F1.

Tuned: learning_rate, weight_decay, one_minus_beta1, warmup, dropout, label_smoothing, width (of the embeddings, or of the
encoder's hidden layers), and for the bag pooling (the mean of the embeddings, or their sum over the root of the length).
Any of them may be missing from the space.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.adamw import adamw
from experiments.digits import METRICS, smoothed_loss
from jaxhpo.benchmarks import datasets
from jaxhpo.tasks import Training, from_nnx
from jaxhpo.tasks.dropout import TracedDropout
from jaxhpo.tasks.masked import MaskedLinear

DEFAULTS: dict[str, Any] = {"dropout": 0.1, "width": 32, "pooling": 0}
PADDING, UNKNOWN = 0, 1
Splits = tuple[tuple[np.ndarray, np.ndarray], ...]


@functools.cache
def words(name: str, vocabulary: int, length: int) -> Splits:
    """The first ``length`` words of each document, ``i32[N, length]``; words outside the vocabulary are unknown."""
    data = datasets.load(name)
    cut = {split: data[f"x_{split}"][:, :length] for split in ("train", "valid", "test")}
    return tuple((np.where(x < vocabulary, x, UNKNOWN), data[f"y_{split}"]) for split, x in cut.items())


@functools.cache
def counts(name: str, vocabulary: int, length: int) -> Splits:
    """How often each word of the vocabulary occurs, ``f32[N, vocabulary]``; padding and unknown words count for nothing."""

    def counted(x: np.ndarray) -> np.ndarray:
        table = np.zeros((len(x), vocabulary), np.float32)
        np.add.at(table, (np.arange(len(x))[:, None], x), 1.0)
        table[:, [PADDING, UNKNOWN]] = 0.0
        return table

    return tuple((counted(x), y) for x, y in words(name, vocabulary, length))


class BagOfEmbeddings(nnx.Module):
    """The embeddings of a document's words, pooled, then one linear layer. The product of counts and the table of
    embeddings is the sum of the embeddings of the words; the table is a layer whose ``width`` is traced.
    """

    def __init__(self, vocabulary: int, num_classes: int, max_width: int, hparams: Any, *, rngs: nnx.Rngs) -> None:
        known = {**DEFAULTS, **hparams}
        normal = jax.nn.initializers.normal(1.0)
        self.embedding = MaskedLinear(
            vocabulary, max_width, active_out=known["width"], use_bias=False, kernel_init=normal, mode="none", rngs=rngs
        )
        self.dropout = TracedDropout(known["dropout"], rngs=rngs)
        self.out = MaskedLinear(max_width, num_classes, active_in=known["width"], rngs=rngs)
        self.pooling = nnx.data(jnp.asarray(known["pooling"]))

    def __call__(self, x: jax.Array) -> jax.Array:
        length = jnp.maximum(x.sum(-1, keepdims=True), 1.0)
        pooled = self.embedding(x) / jnp.where(self.pooling == 0, length, jnp.sqrt(length))
        return self.out(self.dropout(pooled))


class Encoder(nnx.Module):
    """A transformer encoder with one position embedding a place; attends to words alone, and pools their mean."""

    def __init__(
        self, vocabulary: int, num_classes: int, length: int, size: int, depth: int, max_width: int, hparams: Any, *, rngs: Any
    ) -> None:
        known = {**DEFAULTS, **hparams}
        self.words = nnx.Embed(vocabulary, size, rngs=rngs)
        self.places = nnx.Embed(length, size, rngs=rngs)
        self.blocks = nnx.List([Block(size, max_width, known["width"], known["dropout"], rngs=rngs) for _ in range(depth)])
        self.norm, self.out = nnx.LayerNorm(size, rngs=rngs), nnx.Linear(size, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        known = x != PADDING
        h = self.words(x) + self.places(jnp.arange(x.shape[1]))
        for block in self.blocks:
            h = block(h, known[:, None, None, :])
        weight = known[..., None] / jnp.maximum(known.sum(-1), 1)[:, None, None]
        return self.out((self.norm(h) * weight).sum(1))


class Block(nnx.Module):
    """Attention of two heads and a hidden layer of ``width`` active units, each behind LayerNorm and beside a shortcut."""

    def __init__(self, size: int, max_width: int, width: Any, rate: Any, *, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, size, decode=False, rngs=rngs)
        self.before, self.between = nnx.LayerNorm(size, rngs=rngs), nnx.LayerNorm(size, rngs=rngs)
        self.hidden = MaskedLinear(size, max_width, active_out=width, activation=nnx.gelu, rngs=rngs)
        self.out = MaskedLinear(max_width, size, active_in=width, rngs=rngs)
        self.dropout = TracedDropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = x + self.dropout(self.attention(self.before(x), mask=mask))
        return x + self.dropout(self.out(self.hidden(self.between(x))))


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def bag_of_embeddings(
    data: str = "r8",
    num_steps: int = 200,
    steps_per_round: int | None = None,
    batch_size: int = 64,
    vocabulary: int = 2000,
    length: int = 128,
    max_width: int = 32,
) -> Training:
    """Topics of texts: the pooled embeddings of their words, and a linear layer."""
    num_classes = datasets.dataset(data).num_classes
    task = from_nnx(
        lambda hparams, rngs: BagOfEmbeddings(vocabulary, num_classes, max_width, hparams, rngs=rngs),
        lambda hparams: adamw(hparams, num_steps),
        *counts(data, vocabulary, length),
        loss=smoothed_loss,
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(task, num_steps, steps_per_round)


@functools.cache
def encoder(
    data: str = "r8",
    num_steps: int = 200,
    steps_per_round: int | None = None,
    batch_size: int = 32,
    vocabulary: int = 2000,
    length: int = 48,
    size: int = 32,
    depth: int = 1,
    max_width: int = 64,
    num_valid: int | None = None,
) -> Training:
    """Topics of texts: a small transformer encoder; the first ``num_valid`` validation texts are scored, None for all."""
    num_classes = datasets.dataset(data).num_classes
    train, valid, test = words(data, vocabulary, length)
    task = from_nnx(
        lambda hparams, rngs: Encoder(vocabulary, num_classes, length, size, depth, max_width, hparams, rngs=rngs),
        lambda hparams: adamw(hparams, num_steps),
        train,
        (valid[0][:num_valid], valid[1][:num_valid]),
        test,
        loss=smoothed_loss,
        metrics=METRICS,
        batch_size=batch_size,
    )
    return Training(task, num_steps, steps_per_round)
