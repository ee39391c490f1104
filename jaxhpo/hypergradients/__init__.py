"""Hypergradients: estimators of the derivative of a validation metric by the hyperparameters, through training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.hypergradients import gauge
    from jaxhpo.hypergradients.direct import ValueAndGrad
    from jaxhpo.hypergradients.estimate import Estimate, Estimator, Floats
    from jaxhpo.hypergradients.evolution import Evolution
    from jaxhpo.hypergradients.forward import Forward
    from jaxhpo.hypergradients.implicit import Implicit
    from jaxhpo.hypergradients.online import OnlineState, hypergradient_descent
    from jaxhpo.hypergradients.truncated import Truncated
    from jaxhpo.hypergradients.unrolled import Unrolled

_HOMES = {
    "Estimate": "estimate",
    "Estimator": "estimate",
    "Evolution": "evolution",
    "Floats": "estimate",
    "Forward": "forward",
    "Implicit": "implicit",
    "OnlineState": "online",
    "Truncated": "truncated",
    "Unrolled": "unrolled",
    "ValueAndGrad": "direct",
    "hypergradient_descent": "online",
}

__all__ = [
    "Estimate",
    "Estimator",
    "Evolution",
    "Floats",
    "Forward",
    "Implicit",
    "OnlineState",
    "Truncated",
    "Unrolled",
    "ValueAndGrad",
    "gauge",
    "hypergradient_descent",
]


def __getattr__(name: str) -> Any:
    if name == "gauge":
        return importlib.import_module("jaxhpo.hypergradients.gauge")
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxhpo.hypergradients.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
