"""A plain loss ``(key, hparams) -> scalar or dict of scalars`` as a training of one empty step, its metrics the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.tasks.task import Task, Training


def scalar_metrics(result: Any, name: str = "loss") -> dict[str, Any]:
    """What an objective returned, as ``f32[]`` by name; a scalar alone is called ``name``.

    Raises:
        JaxhpoError: for anything but scalars.
    """
    metrics = dict(result) if isinstance(result, dict) else {name: result}
    for name, value in metrics.items():
        if value is None or isinstance(value, str) or (not hasattr(value, "__array__") and not isinstance(value, (int, float))):
            raise JaxhpoError(f"the objective returned {name!r} as a {type(value).__name__}: a scalar is due")
        if jnp.shape(value) != ():
            raise JaxhpoError(f"the objective returned {name!r} of shape {jnp.shape(value)}: a scalar is due")
    return {str(name): jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


@pytree_dataclass
class _CallAtInit:
    """A loss as the ``init`` of a task; its arrays stay arguments, and equal losses share a program."""

    loss: Callable[..., Any]
    name: str = setting(static=True)

    def __call__(self, key: jax.Array, hparams: Any) -> dict[str, jax.Array]:
        return scalar_metrics(self.loss(key, hparams), self.name)


def _stay(key: jax.Array, hparams: Any, metrics: Any) -> Any:
    return metrics


def _report(hparams: Any, metrics: Any) -> Any:
    return metrics


def as_training(loss: Callable[..., Any], name: str = "loss") -> Training:
    """The training whose trials are calls of ``loss``, a pytree that can be called; a scalar is reported as ``name``."""
    return Training(Task(_CallAtInit(loss, name), _stay, _report), 1)
