"""Synthetic problems with known optima, imported on demand."""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = (
    "Problem",
    "ackley",
    "branin",
    "dixon_price",
    "ellipsoid",
    "griewank",
    "hartmann6",
    "levy",
    "michalewicz",
    "mixed_integer",
    "nan_cliff",
    "network_like",
    "rastrigin",
    "rosenbrock",
    "schwefel",
    "sphere",
    "styblinski_tang",
    "zakharov",
)

__all__ = [*_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("jaxhpo.benchmarks.functions"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
