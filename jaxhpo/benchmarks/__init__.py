"""Synthetic problems with known optima, imported on demand."""

from __future__ import annotations

import importlib
from typing import Any

_FUNCTIONS = (
    "Problem",
    "ackley",
    "alpine",
    "branin",
    "categorical",
    "chosen_sums",
    "cosine_mixture",
    "dixon_price",
    "ellipsoid",
    "goldstein_price",
    "griewank",
    "hartmann3",
    "hartmann4",
    "hartmann6",
    "integer_waves",
    "levy",
    "michalewicz",
    "mixed_integer",
    "nan_cliff",
    "network_like",
    "noisy",
    "on_integers",
    "powell",
    "rastrigin",
    "rosenbrock",
    "schwefel",
    "shekel",
    "six_hump_camel",
    "sphere",
    "styblinski_tang",
    "trid",
    "zakharov",
)

__all__ = [*_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module("jaxhpo.benchmarks.functions"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
