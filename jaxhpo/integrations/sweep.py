"""A sweep that was written for another tool, as a study of ours: tables of a config, and what they leave out."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxhpo.analysis.config_text import to_toml
from jaxhpo.errors import JaxhpoError
from jaxhpo.optimizers import registry

FACTORY = "fill_in:task"
"""Stands for the factory of the task, which a sweep does not know."""

NUM_LANES = 8
PLAIN = (bool, int, float, str)
"""What a config holds as it is."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What another tool's sweep says, in our terms.

    Attributes:
        source: the file.
        tables: ``study``, ``task``, ``space`` and ``optimizer`` as a config has them.
        notes: one line for each thing that could not be carried over, or only changed.
        program: what the sweep ran.
        settings: where the sweep is a list of settings, those, as trees in the shape of the space.
    """

    source: str
    tables: dict[str, Any]
    notes: tuple[str, ...] = ()
    program: str | None = None
    settings: tuple[dict[str, Any], ...] = ()

    @property
    def space(self) -> Any:
        """The :class:`jaxhpo.Space`."""
        from jaxhpo.space import Space

        return Space(_tree(self.tables["space"]))

    @property
    def optimizer(self) -> Any:
        """The optimizer, one of the registry's."""
        return _optimizer(self.tables["optimizer"])

    @property
    def num_trials(self) -> int:
        return self.tables["study"]["num_trials"]

    @property
    def metric(self) -> str | None:
        return self.tables["study"].get("metric")

    @property
    def direction(self) -> str:
        return self.tables["study"]["direction"]

    def to_toml(self) -> str:
        """A config for ``jaxhpo run``; comments say what to fill in and what was left out."""
        head = [f"Made from {self.source}.", *([f"It ran: {self.program}"] if self.program else [])]
        head += [f"Note: {note}" for note in self.notes]
        lines = []
        for line in to_toml(self.tables).splitlines():
            if line.startswith("factory = "):
                lines.append(
                    "# FILL IN: a function in a module beside this file; it returns a loss, a Training or a HostFunction."
                )
                lines.append("# The hyperparameters reach it under the names in [space].")
                if any(leaf["type"] == "choice" for leaf in leaves_of(self.tables["space"])):
                    lines.append("# In JAX a choice arrives as the index of its option; a HostFunction gets the option itself.")
            lines += self._points() if line.startswith("points = ") else [line]
        return "\n".join([*(f"# {' '.join(line.split())}" for line in head), "", *lines]) + "\n"

    def _points(self) -> list[str]:
        """The points of a list search, each with its setting beside it."""
        points = self.tables["optimizer"]["points"]
        flat = [", ".join(f"{name} = {value}" for name, value in _flattened(one)) for one in self.settings]
        return ["points = [", *(f"  {point},  # {text}" for point, text in zip(points, flat, strict=True)), "]"]


def is_leaf(node: Any) -> bool:
    """Whether a table of a space is a leaf, rather than one that nests."""
    return isinstance(node, Mapping) and isinstance(node.get("type"), str)


def leaves_of(node: Any) -> Iterable[dict[str, Any]]:
    """The leaf tables of a space."""
    if is_leaf(node):
        yield node
    elif isinstance(node, Mapping):
        yield from itertools.chain.from_iterable(leaves_of(child) for child in node.values())


def _flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def put(tree: dict[str, Any], path: list[str], value: Any) -> bool:
    """Sets a value in nested dictionaries; False where something else is in the way."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict) or is_leaf(tree):
            return False
    if path[-1] in tree:
        return False
    tree[path[-1]] = value
    return True


def fit_name(source: str | Path, name: Any = None) -> str:
    """A name for the study that may be one of a folder, too."""
    return str(name or Path(source).stem).replace("/", "-").replace("\\", "-").replace("\0", "").strip() or "sweep"


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise JaxhpoError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JaxhpoError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def read_sweep(path: str | Path) -> Sweep:
    """The sweep in a file: one of W&B if it is YAML, one of big_vision's kind if it is Python.

    Raises:
        JaxhpoError: for another kind of file, or one that holds no sweep.
    """
    readers = {".yaml": "wandb", ".yml": "wandb", ".json": "wandb", ".py": "big_vision"}
    suffix = Path(path).suffix.lower()
    if suffix not in readers:
        raise JaxhpoError(f"{path}: must be a sweep of W&B (.yaml) or a Python file with a function sweep(add) (.py)")
    return importlib.import_module(f"jaxhpo.integrations.{readers[suffix]}").read_sweep(path)


def _tree(node: Any) -> Any:
    from jaxhpo.space import Choice, Float, Int

    if is_leaf(node):
        fields = {name: value for name, value in node.items() if name != "type"}
        return {"float": Float, "int": Int, "choice": Choice}[node["type"]](**fields)
    return {name: _tree(child) for name, child in node.items()} if isinstance(node, Mapping) else node


def _optimizer(table: Mapping[str, Any]) -> Any:
    fields = {name: _field(value) for name, value in table.items() if name != "name"}
    return registry.load(table["name"])(**fields)


def _field(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _optimizer(value)
    return tuple(map(_field, value)) if isinstance(value, list) else value
