"""What a study gives back: the best trial and all trials as columns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jaxhpo.errors import JaxhpoError


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial: its number, hyperparameters as plain Python values in the shape of the space, and what it reached.

    ``loss`` is what was minimised; ``value`` is the metric as it was stated (its negative under maximisation);
    ``cube`` is its point, ``f32[D]``.
    """

    number: int
    hparams: Any
    loss: float
    value: float
    metrics: dict[str, float]
    steps: int
    cube: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """A study's outcome.

    Attributes:
        trials: numpy columns, one row a trial by number: ``number parent start round lane loss diverged steps whole seconds``,
            and             ``hparams.NAME`` and ``metrics.NAME`` for every leaf and metric. Loss is NaN where a trial diverged.
        status: ``finished``, ``stopped`` by a limit of time, or ``interrupted``.
        folder: where the record is; None without one.
        compile_seconds, run_seconds: wall-clock of this run.
        winner: the best trial, None if there is none.
        facts: for every trial what :func:`jaxhpo.study.replay` needs.
        lanes: ``num_lanes``; ``steps``, training steps spent on trials that had not ended, over all lanes; ``share``, the
            part of all steps that these are, None where lanes do not train in step (host functions, static choices);
            ``ended_by``, the limit that ended the study, None for time and interruption.
        programs: seconds that each program of a static choice took to compile, by its labels.
        first_error: what the first trial that raised said; None if none did.
    """

    trials: dict[str, np.ndarray]
    status: str
    folder: Path | None
    compile_seconds: float
    run_seconds: float
    winner: Trial | None
    first_error: str | None = None
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)
    lanes: dict[str, Any] = dataclasses.field(default_factory=dict)
    programs: dict[str, float] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        best = "no winner" if self.winner is None else f"best {self.winner.value:.6g} at {self.winner.hparams}"
        return f"Result({len(self.trials['number'])} trials, {self.status}, {best})"

    @property
    def best(self) -> Trial:
        """The trial of the lowest loss.

        Raises:
            JaxhpoError: if no trial has a finite loss.
        """
        if self.winner is None:
            raise JaxhpoError(no_winner(len(self.trials["number"]), self.folder, self.first_error))
        return self.winner


def no_winner(num_trials: int, folder: Path | None, first_error: str | None = None) -> str:
    """One line for a study in which nothing worked."""
    if not num_trials:
        return "no trial was answered before the study ended: raise max_steps or max_seconds"
    kept = f"; what was tried is recorded in {folder}" if folder else ""
    if first_error:
        return f"all {num_trials} trials failed, the first with {first_error.strip().splitlines()[-1]!r}{kept}"
    return f"all {num_trials} trials diverged or failed, so there is no best one: widen or move the space{kept}"


class TrialTable:
    """Rows of answered trials, collected chunk by chunk; a row of more steps replaces an earlier one."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Rows as dictionaries with at least ``number``, ``hparams`` and ``metrics``."""
        for row in rows:
            known = self._rows.get(row["number"])
            if known is None or row["steps"] > known["steps"] or row["diverged"]:
                self._rows[row["number"]] = row

    def first_error(self) -> str | None:
        """The error of the lowest numbered trial that has one."""
        return next((row["error"] for _, row in sorted(self._rows.items()) if row.get("error")), None)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in the order in which their trials were first answered."""
        return list(self._rows.values())

    def best(self) -> dict[str, Any] | None:
        """The row of the lowest loss, the first of equals; one that was trained to the end before all others."""
        sound = [row for row in self._rows.values() if not row["diverged"]]
        return min(sound, key=lambda row: (not row["whole"], row["loss"], row["round"], row["lane"]), default=None)

    def facts(self) -> list[dict[str, Any]]:
        """What a record's :func:`jaxhpo.study.record.trial_facts` gives."""
        names = ("number", "parent", "start", "round", "lane", "steps", "whole", "metrics", "hparams")
        return [
            {name: row[name] for name in names}
            | {"loss": None if row["diverged"] else row["loss"], "cube": np.frombuffer(row["cube"], np.float32)}
            for row in self._rows.values()
        ]

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self._rows[number]

    def columns(self) -> dict[str, np.ndarray]:
        """One numpy array a column, rows by trial number."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        plain = ("number", "parent", "start", "round", "lane", "loss", "diverged", "steps", "whole", "seconds")
        columns = {name: np.array([row[name] for row in rows]) for name in plain}
        for group in ("hparams", "metrics"):
            names = dict.fromkeys(name for row in rows for name in row[group])
            for name in names:
                columns[f"{group}.{name}"] = _column([row[group].get(name, np.nan) for row in rows])
        return columns


def _column(values: list[Any]) -> np.ndarray:
    """Numbers and labels of one sort as such, anything else as objects."""
    if len({type(value) for value in values}) == 1 and isinstance(values[0], (bool, int, float, str, list)):
        array = np.array(values)
        if array.dtype.kind in "biufU":
            return array
    array = np.empty(len(values), object)
    array[:] = values
    return array
