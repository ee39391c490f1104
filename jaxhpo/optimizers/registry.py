"""The optimizers by name. Importing this module does not import jax, so that listing them is instant."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from jaxhpo.errors import JaxhpoError


class Entry(NamedTuple):
    """Where an optimizer is found, in one line what it is, and, for one that wraps another, a usual inner one."""

    module: str
    description: str
    wraps: str | None = None


ENTRIES: dict[str, Entry] = {
    "RandomSearch": Entry("jaxhpo.optimizers.random", "independent uniform points"),
    "SobolSearch": Entry("jaxhpo.optimizers.sobol", "scrambled Sobol points: random search that fills the space evenly"),
    "GridSearch": Entry("jaxhpo.optimizers.grid", "every combination of a few values for each dimension"),
    "LocalSearch": Entry("jaxhpo.optimizers.local", "greedy moves around the incumbent, step sizes by success, restarts"),
    "PSO": Entry("jaxhpo.optimizers.pso", "particle swarm for mixed spaces"),
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
    """An instance with the default settings; a wrapper around the inner optimizer that its entry names."""
    inner = ENTRIES[name].wraps
    return load(name)(num_lanes=num_lanes) if inner is None else load(name)(example(inner, num_lanes))


def __getattr__(name: str) -> Any:
    if name == "OPTIMIZERS":  # dict[str, type]; made on demand, as the classes need jax
        return {key: load(key) for key in ENTRIES}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
