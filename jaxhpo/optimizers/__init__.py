"""Search algorithms: ``init / ask / update`` over the unit cube. Imported on demand, so that naming them is free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxhpo.optimizers.registry import ENTRIES, Entry, example, load

if TYPE_CHECKING:
    from jaxhpo.optimizers.cma_es import CMAES
    from jaxhpo.optimizers.differential_evolution import DifferentialEvolution
    from jaxhpo.optimizers.gp import BayesOpt
    from jaxhpo.optimizers.gradient_descent import HypergradientDescent
    from jaxhpo.optimizers.grid import GridSearch
    from jaxhpo.optimizers.list_search import ListSearch
    from jaxhpo.optimizers.local import LocalSearch
    from jaxhpo.optimizers.pso import PSO
    from jaxhpo.optimizers.random import RandomSearch
    from jaxhpo.optimizers.sobol import SobolSearch
    from jaxhpo.optimizers.tpe import TPE

    OPTIMIZERS: dict[str, type]

__all__ = [
    "CMAES",
    "ENTRIES",
    "OPTIMIZERS",
    "PSO",
    "TPE",
    "BayesOpt",
    "DifferentialEvolution",
    "Entry",
    "GridSearch",
    "HypergradientDescent",
    "ListSearch",
    "LocalSearch",
    "RandomSearch",
    "SobolSearch",
    "example",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "OPTIMIZERS":
        return {key: load(key) for key in ENTRIES}
    if name in ENTRIES:
        return load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
