"""Trials trained again outside the search: with their own keys, to the same bits, or on fresh seeds.

A trial that took over another's training state is the last part of a schedule, whose earlier parts are its ancestors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import Array
from jaxhpo.errors import JaxhpoError
from jaxhpo.study import record as records
from jaxhpo.study.driver import Study, plan_of, problem_of
from jaxhpo.study.engines import programs_of
from jaxhpo.study.lanes import Outcome, Schedule, init_state, one_row, whole_training
from jaxhpo.study.problem import Plan, Problem
from jaxhpo.study.result import Result
from jaxhpo.study.seeds import pooled
from jaxhpo.study.static_groups import batch_plan
from jaxhpo.tasks import HostFunction
from jaxhpo.tasks.plain_loss import scalar_metrics


@dataclasses.dataclass(frozen=True)
class Part:
    """What one trial made of a training: from ``start`` to ``steps``, at ``cube`` ``f32[D]``, which is ``hparams``."""

    number: int
    start: int
    steps: int
    hparams: dict[str, Any]
    cube: np.ndarray


def facts_of(source: Result | str | Path) -> list[dict[str, Any]]:
    """The trials of a result or a record, best first: those trained to the end before all others."""
    facts = source.facts if isinstance(source, Result) else records.trial_facts(source)
    sound = [row for row in facts if row["loss"] is not None]
    failed = [row for row in facts if row["loss"] is None]
    return sorted(sound, key=lambda row: (not row["whole"], row["loss"], row["round"], row["lane"])) + failed


def lineage(facts: Sequence[dict[str, Any]], number: int) -> list[Part]:
    """The trials whose training states led to a trial's, the first one first; each ends where the next begins.

    Raises:
        JaxhpoError: if there is no such trial.
    """
    rows = {row["number"]: row for row in facts}
    if number not in rows:
        raise JaxhpoError(f"trial {number}: there is no such trial; the study has {len(rows)}, numbered from 0")
    wanted = number
    parts: list[Part] = []
    end = rows[number]["steps"]
    while number >= 0:
        if number not in rows:
            raise JaxhpoError(
                f"trial {wanted}: its ancestor {number} was never answered, so that its hyperparameters are not known"
            )
        row = rows[number]
        if end > row["start"] or not parts:  # nothing of a trial whose state was taken before it trained
            parts.append(Part(number, row["start"], end, row["hparams"], row["cube"]))
        number, end = row["parent"], row["start"]
    return parts[::-1]


def schedule_of(problem: Problem, parts: Sequence[Part], number: Array | None, num_rows: int, seed: Array) -> Schedule:
    """A lineage as trainings ``[B]`` alike but for their keys: those of its trials, or of ``number`` ``i32[B]``."""
    count = 1 << (len(parts) - 1).bit_length()  # few shapes, few programs
    filled = [*parts, *[parts[-1]] * (count - len(parts))]
    cubes = jnp.asarray(np.stack([part.cube for part in filled]))
    values = [jnp.broadcast_to(x, (num_rows, *x.shape)) for x in problem.space.decode_arrays(cubes)]
    own = np.broadcast_to(np.array([part.number for part in filled], np.int32), (num_rows, count))
    numbers = own if number is None else np.broadcast_to(np.asarray(number)[:, None], (num_rows, count))
    starts = np.arange(problem.num_steps // problem.round_steps) * problem.round_steps
    part = np.clip(np.searchsorted([part.steps for part in parts], starts, side="right"), 0, len(parts) - 1)
    rounds = parts[-1].steps // problem.round_steps
    return Schedule(values, jnp.asarray(numbers), seed, jnp.asarray(part, jnp.int32), jnp.int32(rounds))


def without_gradient(problem: Problem) -> Problem:
    """The same trainings, where the search used hypergradients."""
    if not problem.has_gradient:
        return problem
    training = problem.task.training
    return dataclasses.replace(problem, task=training.task, has_gradient=False)


def with_static(problem: Problem, cube: np.ndarray) -> Problem:
    return dataclasses.replace(problem, static=tuple(np.asarray(problem.space.static_of(cube)).tolist()) or None)


def replay(study: Study, source: Result | str | Path, number: int | None = None) -> dict[str, Any]:
    """Train a trial again as the search did, from its start: every part of its lineage with its own key and hyperparameters.

    Args:
        source: the result of the study, or the folder of its record.
        number: which trial; the best one by default.

    Returns:
        ``number``; ``schedule``, one ``{"number", "start", "steps", "hparams"}`` a part; ``recorded`` and ``replayed``, the
        metric as a loss, equal bit for bit at equal shard width on the same kind of device (over several seeds, to the rounding
        of their mean); ``validation`` and ``test``, metrics.

    Raises:
        JaxhpoError: if there is no such trial, or the objective runs on the host.
    """
    if isinstance(study.objective, HostFunction):
        raise JaxhpoError("replay: a host function is not trained again; call it with the trial's hyperparameters")
    facts = facts_of(source)
    if not facts:
        raise JaxhpoError("replay: no trial has been answered yet")
    row = facts[0] if number is None else next((row for row in facts if row["number"] == number), None)
    parts = lineage(facts, facts[0]["number"] if number is None else number)
    assert row is not None
    problem = with_static(without_gradient(problem_of(study)), row["cube"])
    if row["loss"] is None:  # up to the round in which it diverged
        parts[-1] = dataclasses.replace(parts[-1], steps=min(parts[-1].steps + problem.round_steps, problem.num_steps))
    plan = plan_of(study, source.folder if isinstance(source, Result) else Path(source))
    if problem.static is not None:
        plan = batch_plan(study.space, plan)
    # A trial that a race has dropped has trained the first of its seeds.
    count = 1 if problem.num_seeds == 1 else int(row["metrics"].get("seeds") or problem.num_seeds)
    outcome, test = _in_rounds(problem, plan, parts, count)
    recorded = row["metrics"].get(problem.metric)
    validation, replayed = _means(outcome, outcome.metrics), _loss(problem, outcome)
    validation[problem.metric] = None if replayed is None else float(problem.sign) * replayed
    return {
        "number": row["number"],
        "schedule": [{name: x for name, x in vars(part).items() if name != "cube"} for part in parts],
        "recorded": None if row["loss"] is None or recorded is None else float(problem.sign) * recorded,
        "replayed": replayed,
        "validation": validation,
        "test": _means(outcome, test),
    }


def _in_rounds(problem: Problem, plan: Plan, parts: Sequence[Part], count: int) -> tuple[Outcome, dict[str, np.ndarray]]:
    """A lineage trained round by round as the search trains, on its first ``count`` seeds; the rows are those of the seeds.

    A program of one round in the shards of the search, so that the bits are the same.
    """
    lanes, programs = plan.padded_lanes, programs_of(plan)
    shapes = jax.eval_shape(init_state, problem, one_row(problem))
    found = []
    for first in range(0, count, lanes):
        seed = jnp.minimum(first + jnp.arange(lanes, dtype=jnp.int32), count - 1)
        state = jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), shapes)
        outcome = row = None
        for part in parts:
            cube = jnp.broadcast_to(part.cube, (lanes, len(part.cube)))
            values = problem.space.decode_arrays(cube)
            for steps in range(part.start, part.steps, problem.round_steps):
                row = whole_training(values, jnp.full(lanes, part.number, jnp.int32), parts[-1].steps)
                row = dataclasses.replace(row, seed=seed, fresh=row.fresh & (steps == 0), steps=row.steps + steps)
                state, outcome = programs.round(problem, cube, row, state)
        assert outcome is not None
        assert row is not None
        test: dict[str, Any] = {}
        if problem.task.test is not None:
            score = lambda problem, row, state: scalar_metrics(problem.task.test(problem.hparams(row.values), state))
            test = jax.jit(jax.vmap(score, (None, 0, 0)))(problem, row, state)
        found.append(jax.device_get((outcome, test)))
    return jax.tree.map(lambda *x: np.concatenate(x)[:count], *found)


def _loss(problem: Problem, outcome: Outcome) -> float | None:
    values = problem.sign * outcome.metrics[problem.metric]
    if not (outcome.sound.all() and np.isfinite(values).all()):
        return None
    if problem.num_seeds == 1:
        return float(values[0])
    whole = np.pad(values.astype(np.float32), (0, problem.num_seeds - len(values)), constant_values=np.nan)[None]
    known = np.arange(problem.num_seeds) < len(values)
    pool = jax.jit(pooled)
    return float(pool(whole, known[None], np.array([len(values)], np.int32), problem.seed_quantile)[0])


def _means(outcome: Outcome, metrics: dict[str, Any]) -> dict[str, float | None]:
    return {name: float(x.mean()) if outcome.sound.all() else None for name, x in metrics.items()}
