"""Supervised training, whatever the network is written in: minibatches, gradient, optax, metrics.

A network is three pure functions for one lane; `nnx.py` and `linen.py` each make one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.interpreters import partial_eval
from jax.tree_util import Partial

from jaxhpo.core import pytree_dataclass
from jaxhpo.tasks import metrics as m
from jaxhpo.tasks.gradient import value_and_grad
from jaxhpo.tasks.minibatch import Order, first_order, next_batch
from jaxhpo.tasks.task import Task, positive

Split = tuple[Any, Any]
"""Inputs ``[N, ...]`` and targets ``[N, ...]``."""


class Network(Protocol):
    """A hashable description of a model. ``variables`` are what training changes beside the parameters."""

    def init(self, key: jax.Array, hparams: Any) -> tuple[Any, Any]:
        """Parameters and variables of a fresh model."""
        ...

    def train(self, key: jax.Array, hparams: Any, params: Any, variables: Any, x: jax.Array) -> tuple[Any, Any]:
        """Predictions in training mode, and the variables afterwards."""
        ...

    def predict(self, hparams: Any, params: Any, variables: Any, x: jax.Array) -> Any:
        """Predictions in evaluation mode: a function of its arguments alone."""
        ...


@pytree_dataclass
class TrainState:
    """The training state of one lane.

    Attributes:
        params: nested dicts of arrays.
        variables: nested dicts of arrays that no gradient is taken of, such as the statistics of BatchNorm.
        opt_state: optax's.
        order: where the lane stands in its data; None for full batches.
    """

    params: Any
    variables: Any
    opt_state: Any
    order: Order | None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that is static about a supervised task; equal recipes share compiled programs."""

    network: Network
    optimizer: Callable[[Any], optax.GradientTransformation]
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    metrics: tuple[tuple[str, Callable[..., Any]], ...] | None
    batch_size: int | None
    taken: Callable[[Any], Any] | None = None

    def init(self, key: jax.Array, hparams: Any) -> TrainState:
        params, variables = self.network.init(jax.random.fold_in(key, 0), hparams)
        order = None if self.batch_size is None else first_order(jax.random.fold_in(key, 1))
        return TrainState(params, variables, self.optimizer(hparams).init(params), order)

    def step(self, x: jax.Array, y: jax.Array, key: jax.Array, hparams: Any, state: TrainState) -> TrainState:
        x, y, order, taken = jnp.asarray(x), jnp.asarray(y), state.order, None
        if order is not None and self.batch_size is not None:
            if self.taken is not None:
                taken = jnp.clip(self.taken(hparams), 1, self.batch_size)
            index, order = next_batch(order, x.shape[0], self.batch_size, taken)
            x, y = x[index], y[index]

        def objective(
            params: Any, key: jax.Array, hparams: Any, variables: Any, x: jax.Array, y: jax.Array
        ) -> tuple[jax.Array, Any]:
            predictions, variables = self.network.train(key, hparams, params, variables, x)
            return self._batch_loss(hparams, predictions, y, taken), variables

        (loss, variables), grads = value_and_grad(objective, state.params, key, hparams, state.variables, x, y)
        # The chain is built here, so that its hyperparameters may be traced.
        chain = optax.with_extra_args_support(self.optimizer(hparams))
        updates, opt_state = chain.update(grads, state.opt_state, state.params, value=loss)
        return TrainState(optax.apply_updates(state.params, updates), variables, opt_state, order)

    def _batch_loss(self, hparams: Any, predictions: Any, y: jax.Array, taken: Any) -> jax.Array:
        """The loss over a batch; over the first ``taken`` of its examples, if that is given."""
        if taken is None:
            return self.loss(hparams, predictions, y)
        alone = lambda prediction, target: self.loss(hparams, *jax.tree.map(lambda z: z[None], (prediction, target)))
        each = jax.vmap(alone)(predictions, y)
        return jnp.where(jnp.arange(each.shape[0]) < taken, each, 0.0).sum() / taken

    def evaluate(self, x: jax.Array, y: jax.Array, hparams: Any, state: TrainState) -> dict[str, jax.Array]:
        x, y = jnp.asarray(x), jnp.asarray(y)
        predictions = self.network.predict(hparams, state.params, state.variables, x)
        if self.metrics is None:
            return {"loss": self.loss(hparams, predictions, y)}
        return {name: metric(predictions, y) for name, metric in self.metrics}

    def whole_loss(self, x: jax.Array, y: jax.Array, hparams: Any, params: Any, state: TrainState) -> jax.Array:
        x, y = jnp.asarray(x), jnp.asarray(y)
        train = lambda key: self.network.train(key, hparams, params, state.variables, x)[0]
        if _reads_key(train):
            predictions = self.network.predict(hparams, params, state.variables, x)
        else:
            predictions = train(jax.random.key(0))
        return self.loss(hparams, predictions, y)


@dataclasses.dataclass(frozen=True)
class Part:
    """One function of a recipe, of a ``Recipe`` or another; unlike a bound method it is equal to that of an equal recipe."""

    recipe: Any
    name: str

    def __call__(self, *args: Any) -> Any:
        return getattr(self.recipe, self.name)(*args)


def _reads_key(function: Callable[[jax.Array], Any]) -> bool:
    """Whether the values of a function depend on its key; found by tracing alone."""
    traced = jax.make_jaxpr(function)(jax.eval_shape(lambda: jax.random.key(0))).jaxpr
    return partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))[1][0]


def training_loss(task: Task) -> Callable[[Any, Any, TrainState], jax.Array] | None:
    """What the training of a supervised task minimises, on all its training data at once.

    A network that draws no random numbers is evaluated in training mode, as it is trained: BatchNorm takes the statistics
    of the whole training set. One with dropout is evaluated as in validation: nothing is dropped, and BatchNorm takes the
    running statistics, which are held constant. So the loss is a function of its arguments alone, but with dropout it
    is not quite the one whose minimum the training seeks, and the rate of dropout does not enter it.

    Returns:
        ``(hparams, params, train_state) -> scalar``, a pytree whose leaves are the arrays of the task themselves; None
        for a task that ``from_nnx`` or ``from_linen`` did not make.
    """
    step = task.step
    if not (isinstance(step, Partial) and isinstance(step.func, Part) and step.func.name == "step"):
        return None
    recipe = step.func.recipe
    return Partial(Part(recipe, "whole_loss"), *step.args) if isinstance(recipe, Recipe) else None


def classification_loss(hparams: Any, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy; no hyperparameter touches it."""
    return m.cross_entropy(logits, labels)


def regression_loss(hparams: Any, predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error; no hyperparameter touches it."""
    return m.mse(predictions, targets)


CLASSIFICATION = (("loss", m.cross_entropy), ("accuracy", m.accuracy), ("error", m.error))


def checked_split(name: str, split: Any) -> tuple[Any, Any]:
    """A pair of arrays of the same, positive number of examples. NumPy arrays stay on the host until a study places them."""
    if not isinstance(split, (tuple, list)) or len(split) != 2:
        raise TypeError(f"{name} must be a pair (inputs, targets) of arrays")
    x, y = (part if isinstance(part, jax.Array) else np.asarray(part) for part in split)
    if x.ndim < 1 or y.ndim < 1 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise ValueError(
            f"{name}: inputs of shape {x.shape} and targets of shape {y.shape} must hold the same number of examples"
        )
    return x, y


def supervised(
    network: Network,
    optimizer: Callable[[Any], optax.GradientTransformation],
    train_data: Split,
    valid_data: Split,
    test_data: Split | None,
    loss: Callable[[Any, Any, jax.Array], jax.Array] | None,
    metrics: Mapping[str, Callable[..., Any]] | None,
    batch_size: int | Callable[[Any], Any] | None,
    max_batch_size: int | None,
) -> Task:
    """The task of a network; arguments as those of ``from_nnx``."""
    x, y = checked_split("train_data", train_data)
    classifies = np.issubdtype(y.dtype, np.integer)
    taken = batch_size if callable(batch_size) else None
    if (taken is None) != (max_batch_size is None):
        raise ValueError(
            "max_batch_size: the greatest batch is due where batch_size is a function of the hyperparameters, and only there"
        )
    if taken is not None:
        batch_size = min(positive("max_batch_size", max_batch_size), x.shape[0])
    elif batch_size is not None:
        batch_size = positive("batch_size", batch_size)
        if batch_size > x.shape[0]:
            raise ValueError(f"batch_size = {batch_size}: there are only {x.shape[0]} training examples")
        batch_size = None if batch_size == x.shape[0] else batch_size
    recipe = Recipe(
        network=network,
        optimizer=optimizer,
        loss=loss or (classification_loss if classifies else regression_loss),
        metrics=tuple(metrics.items()) if metrics else CLASSIFICATION if classifies else None,
        batch_size=batch_size,
        taken=taken,
    )
    return Task(
        init=Partial(Part(recipe, "init")),
        step=Partial(Part(recipe, "step"), x, y),
        evaluate=Partial(Part(recipe, "evaluate"), *checked_split("valid_data", valid_data)),
        test=None if test_data is None else Partial(Part(recipe, "evaluate"), *checked_split("test_data", test_data)),
    )
