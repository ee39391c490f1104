"""The winner on fresh seeds: what a search's own best value, picked among many, cannot tell."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhpo.errors import JaxhpoError
from jaxhpo.study import record as records
from jaxhpo.study.driver import Study, problem_of, reopen
from jaxhpo.study.engines import programs_of
from jaxhpo.study.problem import CONFIRM_STREAM, make_plan
from jaxhpo.study.result import Result, no_winner
from jaxhpo.tasks import HostFunction


def confirm(study: Study, source: Result | str | Path, num_seeds: int = 16) -> dict[str, Any]:
    """Train the winner again on fresh seeds, as one vmapped batch; the search has seen none of them.

    Args:
        source: the result of the study, or the folder of its record. Where there is a record, the outcome is kept in
            it as the note ``confirmation``.

    Returns:
        ``{"number", "seeds", "validation": {metric: [one value a seed]}, "test": {...}}``; None where a seed diverged.

    Raises:
        JaxhpoError: if there is no winner, or the objective runs on the host.
    """
    if isinstance(study.objective, HostFunction):
        raise JaxhpoError("confirm: a host function is not trained again; call it with the winner's hyperparameters")
    if num_seeds < 1:
        raise JaxhpoError(f"num_seeds = {num_seeds!r}: must be at least 1")
    if isinstance(source, Result):
        folder, number, cube = source.folder, source.best.number, source.best.cube
    else:
        folder = Path(source)
        found = records.best_cube(folder)
        if found is None:
            raise JaxhpoError(no_winner(len(records.read_record(folder).trials), folder))
        number, cube = found
    problem = problem_of(study)
    # Where the search used hypergradients, fresh seeds need none.
    plain = (
        dataclasses.replace(problem, task=problem.task.training.task, has_gradient=False) if problem.has_gradient else problem
    )
    static = tuple(np.asarray(study.space.static_of(cube)).tolist()) or None
    fresh = dataclasses.replace(plain, key=jax.random.fold_in(problem.key, CONFIRM_STREAM), static=static)
    plan = make_plan(num_seeds, study.space.num_dims, None, study.devices)
    values = study.space.decode_arrays(np.broadcast_to(cube, (num_seeds, cube.shape[0])))
    outcome, test = jax.device_get(programs_of(plan).to_end(fresh, values, np.arange(num_seeds, dtype=np.int32)))

    def listed(metrics: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
        values = {name: np.where(outcome.sound, array, np.nan).tolist() for name, array in metrics.items()}
        return {name: [records.number_or_none(x) for x in column] for name, column in values.items()}

    note = {"number": number, "seeds": num_seeds, "validation": listed(outcome.metrics), "test": listed(test)}
    if folder is not None:
        with reopen(study, problem, folder) as record:
            record.commit((), None, {"confirmation": note})
    return note
