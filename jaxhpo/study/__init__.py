"""Studies: the compiled loop, lanes and shards, the driver, the record."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.study.api import PureResult, maximize, minimize, pure_study
    from jaxhpo.study.confirmation import confirm
    from jaxhpo.study.driver import Progress, Study, run_study
    from jaxhpo.study.lineage import replay
    from jaxhpo.study.loop import Trials
    from jaxhpo.study.platform import prepare_jax
    from jaxhpo.study.record import StudyRecord, TrialRow, read_record
    from jaxhpo.study.result import Result, Trial

_HOMES = {
    "Progress": "driver",
    "PureResult": "api",
    "Result": "result",
    "Study": "driver",
    "StudyRecord": "record",
    "Trial": "result",
    "TrialRow": "record",
    "Trials": "loop",
    "confirm": "confirmation",
    "maximize": "api",
    "minimize": "api",
    "prepare_jax": "platform",
    "pure_study": "api",
    "read_record": "record",
    "replay": "lineage",
    "run_study": "driver",
}

__all__ = [
    "Progress",
    "PureResult",
    "Result",
    "Study",
    "StudyRecord",
    "Trial",
    "TrialRow",
    "Trials",
    "confirm",
    "maximize",
    "minimize",
    "prepare_jax",
    "pure_study",
    "read_record",
    "replay",
    "run_study",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxhpo.study.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
