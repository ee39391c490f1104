"""A study in small: whether everything fits together, in seconds. Its figures mean nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxhpo.config.reading import Config

SUFFIX = "-smoke"
LANES, TRIALS, STEPS, SEEDS = 8, 16, 20, 2


def smoke(config: Config) -> Config:
    """The same study on at most 8 lanes and 16 trials, with short trainings, its winner on 2 fresh seeds.

    A training has as many rounds as before, of one step each, where the config says how long a round is, and at most 20 steps
    where it does not: so that rungs and populations pass through all that they do. Where the config does not say how long a
    training is, trainings stay as long as they are. The name says that it is a smoke run.
    """
    study, task = config.study, dict(config.task)
    before, each = task.get("num_steps"), task.get("steps_per_round")
    if isinstance(before, int):
        by_rounds = isinstance(each, int) and each > 0
        task["num_steps"] = max(-(-before // each), 1) if by_rounds else min(before, STEPS)
        task |= {"steps_per_round": 1} if by_rounds else {}
    steps = task.get("num_steps", STEPS)
    shrunk = steps / before if isinstance(before, int) and before > 0 else 1.0
    optimizer = _smaller(config.optimizer, shrunk)
    lanes = _lanes(optimizer)
    study = dataclasses.replace(
        study,
        name=f"{study.name}{SUFFIX}",
        num_trials=None if study.num_trials is None else min(study.num_trials, TRIALS),
        max_steps=_fewer_steps(study.max_steps, before, steps),
        shard_width=None if study.shard_width is None else min(study.shard_width, lanes),
    )
    report = dataclasses.replace(config.report, seeds=min(config.report.seeds, SEEDS))
    return dataclasses.replace(config, study=study, task=task, optimizer=optimizer, report=report)


def _fewer_steps(max_steps: int | None, before: Any, steps: int) -> int | None:
    """The steps of at most 16 trainings. How long one is only the factory knows where the config does not say so."""
    if max_steps is None or not isinstance(before, int):
        return max_steps
    return min(max_steps, TRIALS * steps)


IN_STEPS = ("grace", "interval", "budgets", "max_steps")
"""Fields of wrappers that count training steps."""


def _smaller(optimizer: dict[str, Any], shrunk: float) -> dict[str, Any]:
    """The table of an optimizer, and of those within, with at most so many lanes, and steps in the same proportion."""
    made: dict[str, Any] = {
        name: _smaller(value, shrunk) if isinstance(value, dict) else value for name, value in optimizer.items()
    }
    made |= {name: _in_proportion(made[name], shrunk) for name in IN_STEPS if name in made}
    if isinstance(made.get("num_lanes"), int):
        made["num_lanes"] = min(made["num_lanes"], LANES)
    return made


def _in_proportion(steps: Any, shrunk: float) -> Any:
    if isinstance(steps, list):
        return [_in_proportion(each, shrunk) for each in steps]
    return max(round(steps * shrunk), 1) if isinstance(steps, int) and not isinstance(steps, bool) else steps


def _lanes(optimizer: dict[str, Any]) -> int:
    """The lanes of an optimizer; a wrapper's are those of the one within."""
    if isinstance(optimizer.get("num_lanes"), int):
        return optimizer["num_lanes"]
    return next((_lanes(value) for value in optimizer.values() if isinstance(value, dict) and "name" in value), LANES)
