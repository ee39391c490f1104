"""A study in small: whether everything fits together, in seconds. Its figures mean nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxhpo.config.reading import Config

LANES, TRIALS, STEPS, SEEDS = 8, 16, 20, 2


def smoke(config: Config) -> Config:
    """The same study on at most 8 lanes and 16 trials, with short trainings, its winner on 2 fresh seeds.

    A training has as many rounds as before, of one step each, where the config says how long a round is, and at most 20 steps
    where it does not: so that rungs and populations pass through all that they do. The name says that it is a smoke run.
    """
    study, task = config.study, dict(config.task)
    before = task.get("num_steps")
    if isinstance(before, int):
        each = task.get("steps_per_round")
        if isinstance(each, int) and each > 0:
            task |= {"num_steps": max(-(-before // each), 1), "steps_per_round": 1}
        else:
            task["num_steps"] = min(before, STEPS)
    steps = task.get("num_steps", STEPS)
    optimizer = _smaller(config.optimizer)
    lanes = _lanes(optimizer)
    study = dataclasses.replace(
        study,
        name=f"{study.name}-smoke",
        num_trials=None if study.num_trials is None else min(study.num_trials, TRIALS),
        max_steps=None if study.max_steps is None else min(study.max_steps, TRIALS * steps),
        shard_width=None if study.shard_width is None else min(study.shard_width, lanes),
    )
    report = dataclasses.replace(config.report, seeds=min(config.report.seeds, SEEDS))
    return dataclasses.replace(config, study=study, task=task, optimizer=optimizer, report=report)


def _smaller(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The table of an optimizer, and of those within, with at most so many lanes."""
    made = {name: _smaller(value) if isinstance(value, dict) else value for name, value in optimizer.items()}
    if isinstance(made.get("num_lanes"), int):
        made["num_lanes"] = min(made["num_lanes"], LANES)
    return made


def _lanes(optimizer: dict[str, Any]) -> int:
    """The lanes of an optimizer; a wrapper's are those of the one within."""
    if isinstance(optimizer.get("num_lanes"), int):
        return optimizer["num_lanes"]
    return next((_lanes(value) for value in optimizer.values() if isinstance(value, dict) and "name" in value), LANES)
