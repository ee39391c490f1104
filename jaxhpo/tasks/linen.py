"""Tasks that train a Flax Linen model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen

from jaxhpo.tasks.supervised import Split, checked_split, supervised
from jaxhpo.tasks.task import Task


def _mode(module: linen.Module, train: bool) -> dict[str, Any]:
    """The keyword ``train``, for modules that take it."""
    return {"train": train} if "train" in inspect.signature(module.__call__).parameters else {}


@dataclasses.dataclass(frozen=True)
class LinenNetwork:
    """``model(hparams)`` as pure functions; ``shape`` and ``dtype`` are those of one input."""

    model: Callable[[Any], linen.Module]
    shape: tuple[int, ...]
    dtype: Any
    rngs: tuple[str, ...]

    def _rngs(self, key: jax.Array) -> dict[str, jax.Array]:
        return {name: jax.random.fold_in(key, i + 1) for i, name in enumerate(self.rngs)}

    def init(self, key: jax.Array, hparams: Any) -> tuple[Any, Any]:
        module = self.model(hparams)
        rngs = {"params": jax.random.fold_in(key, 0), **self._rngs(key)}
        variables = dict(module.init(rngs, jnp.zeros((1, *self.shape), self.dtype), **_mode(module, False)))
        params = variables.pop("params", {})
        variables.pop("intermediates", None)
        return params, variables

    def train(self, key: jax.Array, hparams: Any, params: Any, variables: Any, x: jax.Array) -> tuple[Any, Any]:
        module = self.model(hparams)
        state = {"params": params, **variables}
        return module.apply(state, x, rngs=self._rngs(key), mutable=list(variables), **_mode(module, True))

    def predict(self, hparams: Any, params: Any, variables: Any, x: jax.Array) -> Any:
        module = self.model(hparams)
        return module.apply({"params": params, **variables}, x, **_mode(module, False))


def from_linen(
    model: Callable[[Any], linen.Module],
    optimizer: Callable[[Any], optax.GradientTransformation],
    train_data: Split,
    valid_data: Split,
    test_data: Split | None = None,
    *,
    loss: Callable[[Any, Any, jax.Array], jax.Array] | None = None,
    metrics: Mapping[str, Callable[..., Any]] | None = None,
    batch_size: int | Callable[[Any], Any] | None = None,
    max_batch_size: int | None = None,
    rngs: tuple[str, ...] = ("dropout",),
) -> Task:
    """A task that trains a Flax Linen model; all but ``model`` and ``rngs`` as in ``from_nnx``.

    Args:
        model: ``hparams -> linen.Module``, called on inputs ``[N, ...]``, and with ``train=True`` or ``train=False`` if
            its ``__call__`` has such a parameter. All collections beside the parameters are mutable in training.
        rngs: names of the random streams that training needs; each has a fresh key every step.

    Raises:
        TypeError, ValueError: for data that do not pair up, or an impossible ``batch_size``.
    """
    x, _ = checked_split("train_data", train_data)
    network = LinenNetwork(model, tuple(x.shape[1:]), np.dtype(x.dtype), tuple(rngs))
    return supervised(network, optimizer, train_data, valid_data, test_data, loss, metrics, batch_size, max_batch_size)
