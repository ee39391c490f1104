"""The derivative of a plain loss: what JAX computes by itself, in the clothes of an estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxhpo.core import Array, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients.estimate import Assemble, Estimate, Floats, refuse_zeros, scalars, value_and_grad
from jaxhpo.tasks.plain_loss import as_training
from jaxhpo.tasks.task import Training, init_and_step_keys


@pytree_dataclass
class ValueAndGrad:
    """Reverse mode through a plain loss ``(key, hparams) -> scalar or dict of scalars``.

    Attributes:
        loss: a pure function, or a pytree that can be called.
        metric: which scalar of a dict is differentiated.
    """

    loss: Callable[..., Any]
    metric: str = setting("loss", static=True)

    @property
    def training(self) -> Training:
        return as_training(self.loss, self.metric)

    def check(self, floats: Floats, assemble: Assemble) -> None:
        value = lambda floats: self._value(jax.random.key(0), floats, assemble)[0]
        refuse_zeros(self.metric, value, floats)

    def _value(self, key: Array, floats: Floats, assemble: Assemble) -> tuple[Array, dict[str, Any]]:
        found = self.loss(init_and_step_keys(key)[0], assemble(floats))  # the key that it has without derivatives, too
        if found is None or isinstance(found, str):
            raise JaxhpoError(f"the loss returned {found!r}: a scalar, or a dict of scalars, is due")
        metrics = scalars(self.metric, found if isinstance(found, dict) else {self.metric: found}, "loss")
        return metrics[self.metric], metrics

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        (_, metrics), grad = jax.value_and_grad(lambda floats: self._value(key, floats, assemble), has_aux=True)(floats)
        return Estimate(metrics, grad)

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        """The metric and its gradient in the shape of ``hparams``, None in place of what is no float; to be jitted."""
        return value_and_grad(self, key, hparams)
