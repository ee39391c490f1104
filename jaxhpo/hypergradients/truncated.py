"""Reverse mode through the last steps of the training alone.

Shaban et al., "Truncated back-propagation for bilevel optimization", 2019; the bias: Wu et al., "Understanding short-horizon
bias in stochastic meta-optimization", 2018.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax

from jaxhpo.core import Array, pytree_dataclass, setting
from jaxhpo.hypergradients import memory
from jaxhpo.hypergradients.estimate import (
    Assemble,
    Estimate,
    Floats,
    refuse_zeros,
    score,
    start,
    steps_from,
    trained,
    value_and_grad,
    weights_of,
    without_derivative,
)
from jaxhpo.hypergradients.unrolled import reverse, reverse_plan
from jaxhpo.tasks.supervised import training_loss
from jaxhpo.tasks.task import Task, Training


@pytree_dataclass
class Truncated:
    """The derivative of a metric after ``num_steps`` steps through the last ``last_steps`` of them, the others held fixed.

    Cheaper than :class:`Unrolled`, and biased. Where training forgets its past, as it does near a minimum, the bias falls
    exponentially with ``last_steps`` for hyperparameters of the training loss. For those of the optimizer (learning rates,
    momentum) it does not: the last steps alone prefer ever smaller steps, so that the derivative by a learning rate
    often has the wrong sign. A warning names them.

    Attributes:
        task: what is trained.
        num_steps: ``T``, steps of the training.
        last_steps: ``K``; ``K >= T`` is the exact derivative.
        metric, budget_mib, segments: as of :class:`Unrolled`.
    """

    task: Task
    num_steps: int = setting(static=True, low=1)
    last_steps: int = setting(static=True, low=1)
    metric: str = setting("loss", static=True)
    budget_mib: int = setting(1024, static=True, low=1)
    segments: tuple[int, ...] | None = setting(None, static=True)

    @property
    def training(self) -> Training:
        return Training(self.task, self.num_steps)

    def check(self, floats: Floats, assemble: Assemble) -> None:
        """Refuses floats without a derivative; warns of those whose derivative truncation spoils."""

        count = min(self.last_steps, self.num_steps)

        def value(floats: Floats) -> Array:
            hparams, key = assemble(floats), jax.random.key(0)
            state = start(self.task, key, hparams)
            state = state if count == self.num_steps else jax.lax.stop_gradient(state)
            return score(self.task, self.metric, hparams, steps_from(self.task, key, hparams, state, 0, count))[0]

        refuse_zeros(self.metric, value, floats)
        if self.last_steps >= self.num_steps:
            return
        loss = training_loss(self.task)
        if loss is None:
            warnings.warn(
                f"Truncated: if any of {', '.join(sorted(floats))} acts through the optimizer, as learning rates do, its "
                f"derivative through the last {self.last_steps} of {self.num_steps} steps is wrong; use Unrolled or Forward",
                stacklevel=2,
            )
            return
        spoilt = without_training_loss(loss, self.task, floats, assemble)
        if spoilt:
            warnings.warn(
                f"Truncated: {', '.join(spoilt)} act(s) through the optimizer, so the derivative through the last "
                f"{self.last_steps} of {self.num_steps} steps is wrong, often in its sign; use Unrolled or Forward",
                stacklevel=2,
            )

    def memory_plan(self, floats: Floats, assemble: Assemble) -> memory.MemoryPlan:
        """As of :class:`Unrolled`."""
        count = min(self.last_steps, self.num_steps)
        return reverse_plan(self.task, floats, assemble, count, self.budget_mib, self.segments)

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        count = min(self.last_steps, self.num_steps)
        before = self.num_steps - count

        def begin(floats: Floats) -> Any:
            hparams = assemble(floats if before == 0 else jax.lax.stop_gradient(floats))
            return trained(self.task, key, hparams, before)

        segments = self.memory_plan(floats, assemble).segments
        return reverse(self.task, self.metric, key, floats, assemble, begin, before, count, segments)

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        """The metric and its gradient in the shape of ``hparams``, None in place of what is no float; to be jitted."""
        return value_and_grad(self, key, hparams)


def without_training_loss(loss: Callable[..., Array], task: Task, floats: Floats, assemble: Assemble) -> list[str]:
    """Names of the floats on which the training loss does not depend: they act through the optimizer."""
    hparams = assemble(floats)
    state = start(task, jax.random.key(0), hparams)
    return without_derivative(lambda floats: loss(assemble(floats), weights_of(state), state), floats)
