"""jaxhpo: hyperparameter optimization as pure JAX. Everything is imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo import (
        analysis,
        benchmarks,
        fidelity,
        hypergradients,
        integrations,
        optimizers,
        space,
        study,
        surrogates,
        tasks,
    )
    from jaxhpo.core import FULL, CubeSpec, Feedback, Kind, Optimizer, Query, problems_of, pytree_dataclass, setting
    from jaxhpo.errors import JaxhpoError
    from jaxhpo.fidelity import ASHA, PB2, PBT, Hyperband, MedianStopping, PredictiveStopping, SuccessiveHalving
    from jaxhpo.optimizers import (
        CMAES,
        PSO,
        TPE,
        BayesOpt,
        DifferentialEvolution,
        GridSearch,
        HypergradientDescent,
        ListSearch,
        LocalSearch,
        RandomSearch,
        SobolSearch,
    )
    from jaxhpo.space import Bool, Choice, Float, Int, Space
    from jaxhpo.study import Progress, Result, Study, confirm, maximize, minimize, prepare_jax, pure_study, replay, run_study
    from jaxhpo.tasks import HostFunction, Task, Training

__version__ = "0.1.0"

_ROOMS = (
    "analysis",
    "benchmarks",
    "fidelity",
    "hypergradients",
    "integrations",
    "optimizers",
    "space",
    "study",
    "surrogates",
    "tasks",
)
_HOMES = {
    **dict.fromkeys(
        ("FULL", "CubeSpec", "Feedback", "Kind", "Optimizer", "Query", "problems_of", "pytree_dataclass", "setting"), "core"
    ),
    "JaxhpoError": "errors",
    **dict.fromkeys(
        ("ASHA", "PB2", "PBT", "Hyperband", "MedianStopping", "PredictiveStopping", "SuccessiveHalving"), "fidelity"
    ),
    **dict.fromkeys(
        (
            "BayesOpt",
            "CMAES",
            "DifferentialEvolution",
            "GridSearch",
            "HypergradientDescent",
            "ListSearch",
            "LocalSearch",
            "PSO",
            "RandomSearch",
            "SobolSearch",
            "TPE",
        ),
        "optimizers",
    ),
    **dict.fromkeys(("Bool", "Choice", "Float", "Int", "Space"), "space"),
    **dict.fromkeys(
        ("Progress", "Result", "Study", "confirm", "maximize", "minimize", "prepare_jax", "pure_study", "replay", "run_study"),
        "study",
    ),
    **dict.fromkeys(("HostFunction", "Task", "Training"), "tasks"),
}

__all__ = [
    "ASHA",
    "CMAES",
    "FULL",
    "PB2",
    "PBT",
    "PSO",
    "TPE",
    "BayesOpt",
    "Bool",
    "Choice",
    "CubeSpec",
    "DifferentialEvolution",
    "Feedback",
    "Float",
    "GridSearch",
    "HostFunction",
    "Hyperband",
    "HypergradientDescent",
    "Int",
    "JaxhpoError",
    "Kind",
    "ListSearch",
    "LocalSearch",
    "MedianStopping",
    "Optimizer",
    "PredictiveStopping",
    "Progress",
    "Query",
    "RandomSearch",
    "Result",
    "SobolSearch",
    "Space",
    "Study",
    "SuccessiveHalving",
    "Task",
    "Training",
    "analysis",
    "benchmarks",
    "confirm",
    "fidelity",
    "hypergradients",
    "integrations",
    "maximize",
    "minimize",
    "optimizers",
    "prepare_jax",
    "problems_of",
    "pure_study",
    "pytree_dataclass",
    "replay",
    "run_study",
    "setting",
    "space",
    "study",
    "surrogates",
    "tasks",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"jaxhpo.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"jaxhpo.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
