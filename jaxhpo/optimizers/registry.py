"""The optimizers by name. Importing this module does not import jax, so that listing them is instant."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxhpo.errors import JaxhpoError


class Entry(NamedTuple):
    """What is known of an optimizer before it is imported.

    Attributes:
        module: where it is found.
        description: in one line what it is.
        wraps: for one that wraps another, a usual inner one.
        inner: the field that holds the inner one.
        light: settings with which an example is cheap, where the defaults are made for expensive trials.
    """

    module: str
    description: str
    wraps: str | None = None
    inner: str = "inner"
    light: Mapping[str, Any] = MappingProxyType({})


ENTRIES: dict[str, Entry] = {
    "RandomSearch": Entry("jaxhpo.optimizers.random", "independent uniform points"),
    "SobolSearch": Entry("jaxhpo.optimizers.sobol", "scrambled Sobol points: random search that fills the space evenly"),
    "GridSearch": Entry("jaxhpo.optimizers.grid", "every combination of a few values for each dimension"),
    "ListSearch": Entry("jaxhpo.optimizers.list_search", "given points, one after the other, then random ones"),
    "LocalSearch": Entry("jaxhpo.optimizers.local", "greedy moves around the incumbent, step sizes by success, restarts"),
    "PSO": Entry("jaxhpo.optimizers.pso", "particle swarm for mixed spaces"),
    "CMAES": Entry("jaxhpo.optimizers.cma_es", "covariance matrix adaptation evolution strategy: mixed spaces, restarts"),
    "DifferentialEvolution": Entry(
        "jaxhpo.optimizers.differential_evolution",
        "differential evolution that adapts its rates (SHADE): mixed spaces",
    ),
    "TPE": Entry(
        "jaxhpo.optimizers.tpe",
        "multivariate Parzen estimators of good and bad trials: cheap, mixed spaces",
        light={"capacity": 128, "max_capacity": 128},
    ),
    "BayesOpt": Entry(
        "jaxhpo.optimizers.gp",
        "Bayesian optimization with a Gaussian process: few, expensive trials",
        light={
            "num_initial": 5,
            "num_candidates": 32,
            "num_starts": 2,
            "num_steps": 3,
            "fit_steps": 3,
            "capacity": 16,
            "max_capacity": 16,
        },
    ),
    "HypergradientDescent": Entry(
        "jaxhpo.optimizers.gradient_descent",
        "an optax optimizer along the gradient by the hyperparameters, restarts",
        wraps="RandomSearch",
        inner="explorer",
    ),
    "ASHA": Entry(
        "jaxhpo.fidelity.asha",
        "stops trials that are not among the best at a rung; no lane ever waits",
        wraps="RandomSearch",
        light={"budgets": (1, 3)},
    ),
    "MedianStopping": Entry(
        "jaxhpo.fidelity.median_stopping",
        "stops trials that are worse than the median of the others",
        wraps="RandomSearch",
        light={"budgets": (1, 3), "min_trials": 2},
    ),
    "PredictiveStopping": Entry(
        "jaxhpo.fidelity.predictive_stopping",
        "stops trials whose predicted final loss is unlikely to be the lowest",
        wraps="RandomSearch",
        light={"budgets": (1, 3), "min_trials": 4, "memory": 16},
    ),
    "SuccessiveHalving": Entry(
        "jaxhpo.fidelity.successive_halving",
        "brackets of trials of which the best go on from rung to rung",
        wraps="RandomSearch",
        light={"budgets": (1, 3)},
    ),
    "Hyperband": Entry(
        "jaxhpo.fidelity.hyperband",
        "brackets of successive halving that begin at different rungs",
        wraps="RandomSearch",
        light={"budgets": (1, 3)},
    ),
    "PBT": Entry(
        "jaxhpo.fidelity.pbt",
        "population based training: poor members copy good ones and vary their hyperparameters",
        wraps="RandomSearch",
        light={"interval": 10, "max_steps": 100},
    ),
    "PB2": Entry(
        "jaxhpo.fidelity.pb2",
        "population based bandits: as PBT, with a Gaussian process that says where copies go on",
        wraps="RandomSearch",
        light={
            "interval": 10,
            "max_steps": 100,
            "window": 16,
            "num_candidates": 16,
            "num_starts": 2,
            "num_steps": 3,
        },
    ),
}


def load(name: str) -> type:
    """The class of that name.

    Raises:
        JaxhpoError: if there is no such optimizer.
    """
    if name not in ENTRIES:
        raise JaxhpoError(f"optimizer {name!r}: must be one of {', '.join(ENTRIES)}")
    return getattr(importlib.import_module(ENTRIES[name].module), name)


def example(name: str, num_lanes: int) -> Any:
    """An instance with the default or, where there are any, light settings; a wrapper around the inner one of its entry."""
    entry = ENTRIES[name]
    cls: Any = load(name)
    settings = dict(entry.light)
    if entry.wraps is not None:
        settings[entry.inner] = example(entry.wraps, num_lanes)
    if any(field.name == "num_lanes" for field in dataclasses.fields(cls)):  # else it has those of the inner one
        settings["num_lanes"] = num_lanes
    return cls(**settings)


def __getattr__(name: str) -> Any:
    if name == "OPTIMIZERS":  # dict[str, type]; made on demand, as the classes need jax
        return {key: load(key) for key in ENTRIES}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
