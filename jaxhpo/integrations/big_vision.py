"""Sweeps in the style of big_vision: a Python file with a function that adds one setting after another.

def sweep(add):
    for lr in (1e-3, 1e-2):
        add(lr=lr, **{"model.depth": 12})
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations.python_file import called, module_at
from jaxhpo.integrations.sweep import FACTORY, NUM_LANES, PLAIN, Sweep, fit_name, put


def read_sweep(source: str | Path | Callable[[Callable[..., None]], Any]) -> Sweep:
    """The settings that ``sweep(add)`` adds, as a study that runs exactly those.

    The values of a name become a choice, a name of one value a constant. Where the settings are all combinations of the
    values, each once, the study is a grid search, else a :class:`jaxhpo.optimizers.list_search.ListSearch` of the settings in
    their order. Dotted names nest. What is neither a number nor text becomes its JSON text.

    Args:
        source: a Python file, or the function itself.

    Raises:
        JaxhpoError: where there is no such function, it fails, or its settings cannot be searched.
    """
    path = Path(getattr(source, "__name__", "sweep")) if callable(source) else Path(source)
    function = source if callable(source) else getattr(module_at(path), "sweep", None)
    if not callable(function):
        raise JaxhpoError(f"{path}: there is no function sweep(add) in it")
    notes: list[str] = []
    rows = _rows(path, function, notes)
    values = {name: _distinct(row[name] for row in rows) for name in rows[0]}
    if all(len(found) == 1 for found in values.values()):
        raise JaxhpoError(f"{path}: sweep adds one setting only: there is nothing to search")
    leaf = lambda found: {"type": "choice", "options": found} if len(found) > 1 else found[0]
    space = _nested(path, {name: leaf(found) for name, found in values.items()})
    settings = tuple(_nested(path, row) for row in rows)
    notes.append("the metric is not known: the loss is minimised; set study.metric and study.direction")
    tables: dict[str, Any] = {
        "study": {"name": fit_name(path), "direction": "minimize", "num_trials": len(rows)},
        "task": {"factory": FACTORY},
        "space": space,
        "optimizer": {"name": "GridSearch", "num_lanes": NUM_LANES},
    }
    made = Sweep(str(path), tables, tuple(notes), settings=settings)
    if len(rows) != math.prod(map(len, values.values())) or len(_distinct(rows)) < len(rows):
        from jaxhpo.optimizers.list_search import ListSearch

        points = ListSearch.of(made.space, settings, NUM_LANES).points
        tables["optimizer"] = {"name": "ListSearch", "num_lanes": NUM_LANES, "points": [list(point) for point in points]}
    return made


def _rows(path: Path, function: Callable[..., Any], notes: list[str]) -> list[dict[str, Any]]:
    """The settings as they are added, by dotted name; each gives the same names."""
    rows: list[dict[str, Any]] = []

    def add(*given: Mapping[str, Any], **named: Any) -> None:
        row: dict[str, Any] = {}
        for one in (*given, named):
            row |= {str(name): _plain(str(name), value, notes) for name, value in one.items()}
        rows.append(row)

    called(path, function, add)
    if not rows or not rows[0]:
        raise JaxhpoError(f"{path}: sweep adds no setting")
    for place, row in enumerate(rows):
        missing = [name for name in _distinct(name for one in rows for name in one) if name not in row]
        if missing:
            raise JaxhpoError(
                f"{path}: setting {place} of {len(rows)} does not give {', '.join(missing)}, which others do: "
                "its default is not known here, so give it in every call of add"
            )
    return rows


def _plain(name: str, value: Any, notes: list[str]) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, PLAIN) and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    note = f"{name}: values that are neither numbers nor text are JSON text here: json.loads them in the task"
    if note not in notes:
        notes.append(note)
    return json.dumps(value, default=str)


def _distinct(values: Any) -> list[Any]:
    """In the order in which they come first; 1, 1.0 and True differ."""
    found: dict[str, Any] = {}
    for value in values:
        found.setdefault(repr(value), value)
    return list(found.values())


def _nested(path: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in row.items():
        if not put(tree, name.split("."), value):
            raise JaxhpoError(f"{path}: {name} is given, and so is a name within it or above it; one of them is due")
    return tree
