"""Wrappers that save training: they stop, pause or continue the trials of an inner optimizer. Imported on demand."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.fidelity.asha import ASHA
    from jaxhpo.fidelity.hyperband import Hyperband
    from jaxhpo.fidelity.median_stopping import MedianStopping
    from jaxhpo.fidelity.pb2 import PB2
    from jaxhpo.fidelity.pbt import PBT
    from jaxhpo.fidelity.predictive_stopping import PredictiveStopping
    from jaxhpo.fidelity.successive_halving import SuccessiveHalving

_HOMES = {
    "ASHA": "asha",
    "Hyperband": "hyperband",
    "MedianStopping": "median_stopping",
    "PB2": "pb2",
    "PBT": "pbt",
    "PredictiveStopping": "predictive_stopping",
    "SuccessiveHalving": "successive_halving",
}

__all__ = [
    "ASHA",
    "PB2",
    "PBT",
    "Hyperband",
    "MedianStopping",
    "PredictiveStopping",
    "SuccessiveHalving",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxhpo.fidelity.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
