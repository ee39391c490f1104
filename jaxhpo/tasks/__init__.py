"""What is tuned: tasks from plain functions, Flax NNX, Flax Linen or the host; metrics and schedules."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.tasks import dropout, masked, metrics, minibatch, schedules
    from jaxhpo.tasks.gradient import value_and_grad
    from jaxhpo.tasks.linen import from_linen
    from jaxhpo.tasks.nnx import from_nnx
    from jaxhpo.tasks.nnx_steps import from_nnx_steps
    from jaxhpo.tasks.repeated import over_seeds
    from jaxhpo.tasks.steps import from_steps
    from jaxhpo.tasks.supervised import training_loss
    from jaxhpo.tasks.task import HostFunction, Task, Training, check_task

_HOMES = {
    "HostFunction": "task",
    "Task": "task",
    "Training": "task",
    "check_task": "task",
    "from_linen": "linen",
    "from_nnx": "nnx",
    "from_nnx_steps": "nnx_steps",
    "from_steps": "steps",
    "over_seeds": "repeated",
    "value_and_grad": "gradient",
    "training_loss": "supervised",
}
_MODULES = ("dropout", "masked", "metrics", "minibatch", "schedules")

__all__ = [
    "HostFunction",
    "Task",
    "Training",
    "check_task",
    "dropout",
    "from_linen",
    "from_nnx",
    "from_nnx_steps",
    "from_steps",
    "masked",
    "metrics",
    "minibatch",
    "over_seeds",
    "schedules",
    "training_loss",
    "value_and_grad",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jaxhpo.tasks.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxhpo.tasks.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
