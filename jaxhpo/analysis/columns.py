"""Trials as columns: one numeric column a hyperparameter, and one name for every element of an array."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis.curves import losses_of
from jaxhpo.analysis.format import clean, flatten, number

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow


@dataclass(frozen=True)
class Column:
    """One hyperparameter over ``N`` trials: ``values`` is ``f64[N]``, the index of the option for a choice, NaN where absent.

    ``size`` is the number of elements of an array; its values are means over them (geometric on a log axis).
    """

    name: str
    kind: str
    values: np.ndarray
    low: float
    high: float
    log: bool
    labels: tuple[str, ...] = ()
    size: int = 1

    @property
    def title(self) -> str:
        return self.name if self.size == 1 else f"{self.name} (mean of {self.size})"

    def unit(self, values: np.ndarray) -> np.ndarray:
        """Values on ``[0, 1]`` between the bounds, as the axis shows them."""
        if self.kind == "choice":
            return values / (self.high - self.low) if self.high > self.low else np.full_like(values, 0.5)
        if self.log:
            return (np.log(values) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (values - self.low) / (self.high - self.low)


def option_index(options: Sequence[Any], label: Any) -> int | None:
    """Which option a label is: True is not 1, and a label that the record holds as text is found by its text."""
    for index, option in enumerate(options):
        if type(option) is type(label) and option == label:
            return index
    for index, option in enumerate(options):
        if not isinstance(option, bool) and not isinstance(label, bool) and (option == label or str(option) == str(label)):
            return index
    return None


def columns(record: StudyRecord, trials: Sequence[TrialRow]) -> tuple[list[Column], list[str]]:
    """A column for every hyperparameter that has one, and the names of those left out: choices of array shape."""
    found, left_out = [], []
    for leaf in record.space:
        shape = tuple(leaf.get("shape") or ())
        name, size = clean(leaf["name"]), math.prod(shape)
        raw = [trial.hparams.get(leaf["name"]) for trial in trials]
        if leaf["type"] == "choice":
            if shape and size > 1:
                left_out.append(name)
                continue
            options = leaf["options"]
            places = [option_index(options, flatten(x)[0]) if flatten(x) else None for x in raw]
            values = np.array([math.nan if place is None else place for place in places], np.float64)
            found.append(Column(name, "choice", values, 0.0, len(options) - 1.0, False, tuple(clean(o) for o in options)))
            continue
        low, high, log = float(leaf["low"]), float(leaf["high"]), bool(leaf.get("log"))
        values = np.array([_mean(x, log) for x in raw], np.float64)
        found.append(Column(name, leaf["type"], np.clip(values, low, high), low, high, log, size=size))
    return found, left_out


def element_columns(record: StudyRecord, trials: Sequence[TrialRow]) -> list[tuple[str, list[Column]]]:
    """Every hyperparameter's name with a column for each of its elements, those of an array by their own names."""
    found = []
    for leaf in record.space:
        names = element_names(leaf)
        raw = [flatten(trial.hparams.get(leaf["name"])) for trial in trials]
        rows = [x if len(x) == len(names) else [None] * len(names) for x in raw]
        kind, log, options = leaf["type"], bool(leaf.get("log")), leaf.get("options") or ()
        low, high = (0.0, len(options) - 1.0) if kind == "choice" else (float(leaf["low"]), float(leaf["high"]))
        labels = tuple(clean(option) for option in options)
        members = []
        for i, name in enumerate(names):
            read = [option_index(options, row[i]) if kind == "choice" else row[i] for row in rows]
            values = np.array([math.nan if x is None else x for x in read], np.float64)
            members.append(Column(clean(name), kind, values, low, high, log, labels))
        found.append((clean(leaf["name"]), members))
    return found


def _mean(value: Any, log: bool) -> float:
    if value is None:
        return math.nan
    elements = np.asarray(flatten(value), np.float64)
    return float(np.exp(np.log(elements).mean()) if log else elements.mean()) if elements.size > 1 else float(elements[0])


def by_association(record: StudyRecord, trials: Sequence[TrialRow]) -> list[tuple[Column, float]]:
    """Columns with their association with the loss, strongest first; equal ones in the order of the space."""
    from jaxhpo.analysis.statistics import association

    losses = losses_of(trials)
    found = [(column, association(column.values, losses, column.kind == "choice")) for column in columns(record, trials)[0]]
    return sorted(found, key=lambda pair: -pair[1])


def element_names(leaf: dict[str, Any]) -> list[str]:
    """``rate`` for a scalar; ``rate[0]``, ``rate[1]`` or ``rate[0,1]`` for the elements of an array."""
    shape = tuple(leaf.get("shape") or ())
    if not shape:
        return [leaf["name"]]
    return [f"{leaf['name']}[{','.join(map(str, index))}]" for index in itertools.product(*map(range, shape))]


def elements(record: StudyRecord, trial: TrialRow) -> dict[str, Any]:
    """The hyperparameters of one trial, one entry a scalar element; what the trial lacks is left out."""
    found: dict[str, Any] = {}
    for leaf in record.space:
        if leaf["name"] in trial.hparams:
            value = trial.hparams[leaf["name"]]
            parts = flatten(value) if leaf.get("shape") else [value]
            found |= dict(zip(element_names(leaf), parts, strict=False))
    return found


def range_of(leaf: dict[str, Any]) -> str:
    """What a leaf may be, in words: ``0.0001 to 1, log``, or its options."""
    if leaf["type"] == "choice":
        options = [clean(option) for option in leaf["options"]]
        shown = options if len(options) <= 12 else [*options[:10], f"… ({len(options)} options)"]
        return " · ".join(shown) + (" (static)" if leaf.get("static") else "")
    return f"{number(leaf['low'])} to {number(leaf['high'])}{', log' if leaf.get('log') else ''}"


def type_of(leaf: dict[str, Any]) -> str:
    shape = tuple(leaf.get("shape") or ())
    return leaf["type"] + (f" [{', '.join(map(str, shape))}]" if shape else "")
