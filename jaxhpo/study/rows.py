"""Answered trials: from arrays of a chunk to plain rows, and to rows of the database."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from jaxhpo.space import Space, label_of
from jaxhpo.study.engines import Told
from jaxhpo.study.loop import Trials
from jaxhpo.study.record import Record, number_or_none, read_record


def rows_of(space: Space, trials: Trials, told: Told, clock: tuple[float, float]) -> list[dict[str, Any]]:
    """Answered trials of a chunk ``[R, B]`` as plain rows; ``clock`` is when the chunk began and ended."""
    at = np.nonzero(trials.done)
    if not len(at[0]):
        return []
    cubes = np.asarray(trials.cube[at])
    hparams = space.to_columns([np.asarray(value)[at] for value in trials.values])
    first, last = at[0].min(), int(trials.round[at].max())
    began, ended = clock
    span = max(last - int(trials.round[first].min()) + 1, 1)
    rounds = trials.round[at]
    seconds = began + (ended - began) * (rounds - rounds.min() + 1) / span
    metrics = {name: values[at].tolist() for name, values in trials.metrics.items()}
    names = list(hparams)
    columns = zip(
        trials.number[at].tolist(), trials.parent[at].tolist(), trials.start[at].tolist(), rounds.tolist(), at[1].tolist(),
        trials.loss[at].tolist(), trials.steps[at].tolist(), trials.whole[at].tolist(),
        seconds.tolist(), cubes, trials.loss[at], zip(*hparams.values(), strict=True), strict=True,
    )  # fmt: skip
    rows = []
    for i, (number, parent, start, round, lane, loss, steps, whole, when, cube, bits, values) in enumerate(columns):
        rows.append(
            {
                "number": number,
                "parent": parent,
                "start": start,
                "round": round,
                "lane": lane,
                "loss": loss,
                "diverged": loss != loss,
                "steps": steps,
                "whole": whole,
                "seconds": when,
                "hparams": dict(zip(names, values, strict=True)),
                "metrics": told.metrics.get(number) or {name: column[i] for name, column in metrics.items()},
                "cube": cube.tobytes(),
                "loss_bits": bits.tobytes(),
                "error": told.errors.get(number),
            }
        )
    return rows


def database_row(row: dict[str, Any]) -> tuple[Any, ...]:
    finite = {name: number_or_none(value) for name, value in row["metrics"].items()}
    return (
        row["number"],
        row["parent"],
        row["start"],
        row["round"],
        row["lane"],
        None if row["diverged"] else row["loss"],
        row["steps"],
        row["whole"],
        row["seconds"],
        json.dumps(finite),
        json.dumps(row["hparams"], default=label_of),
        row["cube"],
        row["loss_bits"],
        row["error"],
    )


def answer_row(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["number"], row["steps"], row["round"], None if row["diverged"] else row["loss"])


def earlier_rows(record: Record, space: Space) -> list[dict[str, Any]]:
    """The trials that a record already holds; labels are those of the space, which JSON may not know."""
    rows = [dataclasses.asdict(trial) for trial in read_record(record.folder).trials]
    if not rows:
        return []
    cubes = record.cubes()
    choices = space.choices_at(cubes)
    for i, row in enumerate(rows):
        row["cube"] = cubes[i].tobytes()
        row["hparams"] |= {name: labels[i] for name, labels in choices.items()}
        row["loss"] = np.nan if row["loss"] is None else row["loss"]
        row["metrics"] = {name: np.nan if value is None else value for name, value in row["metrics"].items()}
    return rows
