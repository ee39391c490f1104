"""Losses and metrics in pure JAX, as means over the examples given; equal to scikit-learn's.

``predictions`` of a classifier are scores ``f32[N, C]`` (logits, the largest wins), labels are ``i32[N]`` in ``0 .. C-1``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, label_smoothing: jax.Array | float = 0.0) -> jax.Array:
    """Mean softmax cross entropy in nats.

    ``label_smoothing`` (may be traced, in ``[0, 1]``) moves that share of the target's weight from the label to all
    ``C`` classes alike (Szegedy et al. 2016, section 7).
    """
    log_probability = jax.nn.log_softmax(logits)
    of_label = jnp.take_along_axis(log_probability, labels[..., None], axis=-1)[..., 0]
    return -jnp.mean((1 - label_smoothing) * of_label + label_smoothing * log_probability.mean(-1))


def accuracy(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the examples whose highest score is that of their label."""
    return jnp.mean(predictions.argmax(-1) == labels, dtype=jnp.float32)


def error(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the examples classified wrongly."""
    return jnp.mean(predictions.argmax(-1) != labels, dtype=jnp.float32)


def _counts(predictions: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per class: examples classified rightly, examples of the class, examples taken for it, ``f32[C]`` each."""
    num_classes = predictions.shape[-1]
    truth = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    taken = jax.nn.one_hot(predictions.argmax(-1), num_classes, dtype=jnp.float32)
    return (truth * taken).sum(0), truth.sum(0), taken.sum(0)


def _mean_where(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)


def macro_f1(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over classes of the harmonic mean of precision and recall.

    As scikit-learn's ``f1_score(average="macro")``: classes that are neither a label nor predicted do not count,
    and a class never classified rightly has F1 of 0.
    """
    right, of_class, taken_for = _counts(predictions, labels)
    either = of_class + taken_for
    return _mean_where(2 * right / jnp.maximum(either, 1), either > 0)


def balanced_accuracy(predictions: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean recall over the classes that occur among the labels, as scikit-learn's ``balanced_accuracy_score``."""
    right, of_class, _ = _counts(predictions, labels)
    return _mean_where(right / jnp.maximum(of_class, 1), of_class > 0)


def _same_shape(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    if predictions.shape != targets.shape:  # broadcasting [N, 1] against [N] would go unnoticed
        raise ValueError(f"predictions of shape {predictions.shape} do not fit targets of shape {targets.shape}")
    return predictions - targets


def mse(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error over all examples and outputs.

    Raises:
        ValueError: if the shapes differ.
    """
    return jnp.mean(_same_shape(predictions, targets) ** 2)


def r2(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Coefficient of determination, averaged over outputs.

    As scikit-learn's ``r2_score``: for a constant target 1 where the prediction is perfect, else 0.

    Raises:
        ValueError: if the shapes differ.
    """
    residual = (_same_shape(predictions, targets) ** 2).sum(0)
    total = ((targets - targets.mean(0)) ** 2).sum(0)
    constant = total == 0
    return jnp.mean(jnp.where(constant, residual == 0, 1 - residual / jnp.where(constant, 1, total)))
