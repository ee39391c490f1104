"""Tasks that train a Flax NNX model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx

from jaxhpo.tasks.batch_norm import with_derivatives
from jaxhpo.tasks.supervised import Split, supervised
from jaxhpo.tasks.task import Task

# Statistics, caches and the like: kept from step to step. Random streams are made anew from each step's key.
VARIABLES = nnx.All(nnx.Variable, nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Intermediate)))


def _values(module: nnx.Module, kind: Any) -> Any:
    """The arrays of a module's variables of one kind, as nested dicts."""
    return nnx.to_pure_dict(nnx.state(module, kind))


def _assign(module: nnx.Module, kind: Any, values: Any) -> None:
    state = nnx.state(module, kind)
    nnx.replace_by_pure_dict(state, values)
    nnx.update(module, state)


@dataclasses.dataclass(frozen=True)
class NnxNetwork:
    """``model(hparams, rngs)`` as pure functions.

    The module is built anew in every trace, so that its hyperparameters may be traced and its attributes may be
    anything; only arrays are carried from step to step. The weights drawn on the way are replaced at once: XLA
    drops the drawing as dead code.
    """

    model: Callable[[Any, nnx.Rngs], nnx.Module]

    def _with(self, key: jax.Array | int, hparams: Any, params: Any, variables: Any) -> Any:
        module = self.model(hparams, nnx.Rngs(key))
        _assign(module, nnx.Param, params)
        _assign(module, VARIABLES, variables)
        return module

    def init(self, key: jax.Array, hparams: Any) -> tuple[Any, Any]:
        module = self.model(hparams, nnx.Rngs(key))
        return _values(module, nnx.Param), _values(module, VARIABLES)

    def train(self, key: jax.Array, hparams: Any, params: Any, variables: Any, x: jax.Array) -> tuple[Any, Any]:
        module = with_derivatives(self._with(key, hparams, params, variables))
        module.train()
        predictions = module(x)
        return predictions, _values(module, VARIABLES)

    def predict(self, hparams: Any, params: Any, variables: Any, x: jax.Array) -> Any:
        module = self._with(0, hparams, params, variables)
        module.eval()
        return module(x)


def from_nnx(
    model: Callable[[Any, nnx.Rngs], nnx.Module],
    optimizer: Callable[[Any], optax.GradientTransformation],
    train_data: Split,
    valid_data: Split,
    test_data: Split | None = None,
    *,
    loss: Callable[[Any, Any, jax.Array], jax.Array] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    batch_size: int | Callable[[Any], Any] | None = None,
    max_batch_size: int | None = None,
) -> Task:
    """A task that trains a Flax NNX model by minibatches without replacement, a fresh permutation each epoch.

    Args:
        model: ``(hparams, rngs) -> nnx.Module``, called on inputs ``[N, ...]``. BatchNorm and Dropout are switched by
            ``model.train()`` and ``model.eval()``.
        optimizer: ``hparams -> optax.GradientTransformation``; hyperparameters may be traced.
        train_data, valid_data, test_data: ``(inputs [N, ...], targets [N, ...])``. They are leaves of the task:
            stored once, shared by all lanes.
        loss: ``(hparams, predictions, targets) -> scalar``, minimised by training; by default cross entropy for
            whole-numbered labels, else mean squared error.
        metrics: names and functions ``(predictions, targets) -> scalar``, computed on the whole validation set at
            once; by default loss (cross entropy), accuracy and error for whole-numbered labels, else the loss.
        batch_size: examples a step; None for all of them. A function of the hyperparameters makes it a traced one, such as
            ``lambda hparams: hparams["batch"]``: every step computes ``max_batch_size`` examples, the first of which count. The
            loss must be a mean over examples, and the network must not mix them, as BatchNorm does.
        max_batch_size: the greatest batch, where ``batch_size`` is a function; what it gives above counts as this.

    Raises:
        TypeError, ValueError: for data that do not pair up, or an impossible ``batch_size``.
    """
    return supervised(
        NnxNetwork(model), optimizer, train_data, valid_data, test_data, loss, metrics, batch_size, max_batch_size
    )
