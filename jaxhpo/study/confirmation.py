"""The winner on fresh seeds: what a search's own best value, picked among many, cannot tell."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from jaxhpo.errors import JaxhpoError
from jaxhpo.study import record as records
from jaxhpo.study.driver import Study, problem_of, reopen, trains
from jaxhpo.study.engines import programs_of
from jaxhpo.study.lineage import facts_of, lineage, schedule_of, with_static, without_gradient
from jaxhpo.study.problem import CONFIRM_STREAM, Problem, make_plan
from jaxhpo.study.result import Result, no_winner
from jaxhpo.tasks import HostFunction


def confirm(study: Study, source: Result | str | Path, num_seeds: int = 16) -> dict[str, Any]:
    """Train the winner and the runner-up again on the same fresh seeds, which the search has not seen.

    A winner that took over others' training states is trained along its whole schedule.

    Args:
        source: the result of the study, or the folder of its record. Where there is a record, the outcome is kept in
            it as the note ``confirmation``.

    Returns:
        ``{"number", "seeds", "validation": {metric: [one value a seed]}, "test": {...}}``, None where a seed diverged;
        ``"runner_up": {"number", "validation", "test"}``, None if no other trial was trained as far; and ``"better"``,
        the probability that the winner's mean loss is truly lower than the runner-up's, see :func:`chance_better`.

    Raises:
        JaxhpoError: if there is no winner, or the objective runs on the host.
    """
    if isinstance(study.objective, HostFunction):
        raise JaxhpoError("confirm: a host function is not trained again; call it with the winner's hyperparameters")
    if num_seeds < 1:
        raise JaxhpoError(f"num_seeds = {num_seeds!r}: must be at least 1")
    folder = source.folder if isinstance(source, Result) else Path(source)
    facts = facts_of(source)
    sound = [row for row in facts if row["loss"] is not None]
    if not sound:
        raise JaxhpoError(no_winner(len(facts), folder))
    problem, first = problem_of(study), sound[0]
    winner = _on_fresh_seeds(study, problem, facts, first, num_seeds)
    alike = lambda row: row["whole"] == first["whole"] and not np.array_equal(row["cube"], first["cube"])
    other = next((row for row in sound if alike(row)), None)
    second = None if other is None else _on_fresh_seeds(study, problem, facts, other, num_seeds)
    better = None
    if second is not None:
        losses = [_losses(one["validation"][problem.metric], float(problem.sign)) for one in (winner, second)]
        better = chance_better(*losses)
    note = winner | {"seeds": num_seeds, "runner_up": second, "better": better}
    if folder is not None:
        with reopen(study, problem, folder) as record:
            record.commit((), None, {"confirmation": note})
    return note


def _on_fresh_seeds(
    study: Study, problem: Problem, facts: list[dict[str, Any]], row: dict[str, Any], num_seeds: int
) -> dict[str, Any]:
    """A trial's number and its metrics on each fresh seed."""
    fresh = with_static(without_gradient(problem), row["cube"])
    fresh = dataclasses.replace(fresh, key=jax.random.fold_in(problem.key, CONFIRM_STREAM), num_seeds=1, seeds_at_once=1)
    seeds = jnp.arange(num_seeds, dtype=jnp.int32)
    schedule = schedule_of(fresh, lineage(facts, row["number"]), seeds, num_seeds, seeds)
    plan = make_plan(num_seeds, study.space.num_dims, None, study.devices, trains(study))
    outcome, test = jax.device_get(programs_of(plan).schedule(fresh, schedule))

    def listed(metrics: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
        values = {name: np.where(outcome.sound, array, np.nan).tolist() for name, array in metrics.items()}
        return {name: [records.number_or_none(x) for x in column] for name, column in values.items()}

    return {"number": row["number"], "validation": listed(outcome.metrics), "test": listed(test)}


def _losses(values: list[float | None], sign: float) -> np.ndarray:
    return np.array([math.nan if value is None else sign * value for value in values])


def chance_better(losses: np.ndarray, others: np.ndarray) -> float | None:
    """The probability that the mean of ``losses`` is truly below that of ``others``, ``f64[S]`` each, paired by seed.

    The posterior of the mean of normal differences under the prior 1 / variance: Student's t with ``n - 1`` degrees of
    freedom (Gelman et al., "Bayesian Data Analysis", 3rd ed., section 3.2). A seed on which one of the two diverged is left
    out; None for fewer than two seeds, one half where all differences are zero.
    """
    gaps = (others - losses)[np.isfinite(others - losses)]
    if gaps.size < 2:
        return None
    mean, error = float(gaps.mean()), float(gaps.std(ddof=1) / math.sqrt(gaps.size))
    if error == 0.0:
        return 0.5 if mean == 0.0 else float(mean > 0.0)
    return float(scipy.stats.t.cdf(mean / error, gaps.size - 1))
