"""What a finished study says: intervals, importance, curves, figures, reports, comparisons, exports. Nothing here imports jax.

``compare``, ``export`` and ``importance`` are the names of modules here; the functions are ``jaxhpo.analysis.compare.compare``,
``jaxhpo.analysis.export.export`` and ``jaxhpo.analysis.importance.importance``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.analysis.compare import Comparison, format_comparison, write_comparison
    from jaxhpo.analysis.importance import Importance
    from jaxhpo.analysis.report import write_report
    from jaxhpo.analysis.show import format_record
    from jaxhpo.analysis.statistics import (
        friedman,
        mean_interval,
        median_interval,
        paired_comparison,
        quantile_bands,
        win_probability,
    )

_HOME = {
    "Comparison": "compare",
    "Importance": "importance",
    "format_comparison": "compare",
    "write_comparison": "compare",
    "write_report": "report",
    "format_record": "show",
    "friedman": "statistics",
    "mean_interval": "statistics",
    "median_interval": "statistics",
    "paired_comparison": "statistics",
    "quantile_bands": "statistics",
    "win_probability": "statistics",
}

__all__ = [
    "Comparison",
    "Importance",
    "format_comparison",
    "format_record",
    "friedman",
    "mean_interval",
    "median_interval",
    "paired_comparison",
    "quantile_bands",
    "win_probability",
    "write_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"jaxhpo.analysis.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
