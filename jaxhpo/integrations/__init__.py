"""Bridges to other tools: studies of Optuna, sweeps of W&B and big_vision, TensorBoard, ml_collections.

Each is a module of its own and imports its tool where it is used, so that none of them is a dependency.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.integrations import big_vision, config_dict, optuna, tensorboard, wandb

__all__ = ["big_vision", "config_dict", "optuna", "tensorboard", "wandb"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"jaxhpo.integrations.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
