"""The face of a study for Python: minimize, maximize, and a whole study as one pure function."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax import lax

from jaxhpo.core import Array, Optimizer, pytree_dataclass
from jaxhpo.errors import JaxhpoError
from jaxhpo.space import as_space
from jaxhpo.study.driver import Progress, Study, run_study
from jaxhpo.study.limits import Limits
from jaxhpo.study.loop import Trials, first_carry, run_round
from jaxhpo.study.problem import Plan, make_problem
from jaxhpo.study.record import holds_study
from jaxhpo.study.result import Result
from jaxhpo.study.room import with_room
from jaxhpo.tasks import HostFunction


def minimize(
    objective: Any,
    space: Any,
    optimizer: Optimizer,
    *,
    key: Any,
    num_trials: int | None = None,
    metric: str | None = None,
    record: str | Path | None = None,
    resume: bool = False,
    name: str = "study",
    shard_width: int | None = None,
    devices: int | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    target_loss: float | None = None,
    seeds: int = 1,
    seed_quantile: float | None = None,
    race: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Find the hyperparameters of the lowest loss.

    Args:
        objective: a pure loss ``(key, hparams) -> scalar or dict of scalars``, a :class:`jaxhpo.Training`, or a
            :class:`jaxhpo.HostFunction`.
        space: a :class:`jaxhpo.Space`, or a tree of leaves.
        optimizer: how to search.
        key: a JAX key, or an integer seed. The same key gives the same trials.
        num_trials: how many trials to end; may be left out where another limit is given.
        metric: which metric to minimise; may be left out if there is one, or one is called ``loss``.
        record: a folder to keep the study in, so that it survives being killed.
        resume: go on with the study in ``record``, if there is one; begin it otherwise.
        shard_width: lanes compiled together; a study's bits depend on it. By default lanes / devices.
        devices: local devices to use, by default all. On a CPU call :func:`jaxhpo.prepare_jax` first to have one a core.
        max_seconds: begin nothing new after this much wall-clock, compilation included.
        max_steps: begin nothing new after this many training steps, over all lanes and seeds.
        target_loss: stop once a whole training, on all its seeds, has a metric this low.
        seeds: keys that every configuration is trained on, the same for all, as lanes side by side; its loss is the mean.
        seed_quantile: the quantile of the seeds that is the loss instead of their mean.
        race: level of a paired test that drops a configuration before all its seeds are trained, such as 0.05.
        progress: called now and then with a :class:`jaxhpo.study.Progress`.

    Raises:
        JaxhpoError: for settings that make no sense, or a record that cannot be used.
    """
    study = Study(
        objective,
        as_space(space),
        optimizer,
        num_trials,
        key,
        name,
        metric,
        "minimize",
        shard_width,
        devices,
        max_seconds,
        max_steps,
        target_loss,
        seeds,
        seed_quantile,
        race,
    )
    return _run(study, record, resume, progress)


def _run(study: Study, record: str | Path | None, resume: bool, progress: Callable[[Progress], None] | None) -> Result:
    result = run_study(study, record, resume=resume and record is not None and holds_study(record), progress=progress)
    if result.status == "interrupted":
        hint = f"go on with record={str(record)!r}, resume=True" if record else "nothing was recorded"
        of = "" if study.num_trials is None else f" of {study.num_trials}"
        warnings.warn(f"interrupted after {len(result.trials['number'])}{of} trials: {hint}", stacklevel=3)
    return result


def maximize(
    objective: Any,
    space: Any,
    optimizer: Optimizer,
    *,
    key: Any,
    num_trials: int | None = None,
    metric: str | None = None,
    record: str | Path | None = None,
    resume: bool = False,
    name: str = "study",
    shard_width: int | None = None,
    devices: int | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    target_value: float | None = None,
    seeds: int = 1,
    seed_quantile: float | None = None,
    race: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Find the hyperparameters of the highest metric; as :func:`minimize` otherwise. ``target_value`` is a metric this high.

    ``result.best.value`` is the metric, ``result.best.loss`` its negative.
    """
    study = Study(
        objective,
        as_space(space),
        optimizer,
        num_trials,
        key,
        name,
        metric,
        "maximize",
        shard_width,
        devices,
        max_seconds,
        max_steps,
        target_value,
        seeds,
        seed_quantile,
        race,
    )
    return _run(study, record, resume, progress)


@pytree_dataclass
class PureResult:
    """What a pure study gives: arrays only.

    Attributes:
        loss: ``f32[]``, the lowest; inf if every trial diverged.
        cube: ``f32[D]``, where.
        hparams: the decoded hyperparameters there.
        trials: :class:`jaxhpo.study.Trials` with leading size ``[rounds, B]``; a row counts where ``done``.
    """

    loss: Array
    cube: Array
    hparams: Any
    trials: Trials


def pure_study(
    objective: Any, space: Any, optimizer: Optimizer, num_trials: int, *, metric: str | None = None, maximize: bool = False
) -> Callable[[jax.Array], PureResult]:
    """A whole study as one pure function ``key -> PureResult``, for ``jit``, ``vmap`` and ``scan``.

    ``jax.vmap(study)(keys)`` runs independent studies in one program. The trials equal those of :func:`minimize` with
    the same key up to rounding, except with optimizers whose table grows there (``BayesOpt``, ``TPE``), which here is as large
    as needed from the start; nothing is recorded.

    Raises:
        JaxhpoError: for a host function or a space with static choices, which no single program can hold.
    """
    space = as_space(space)
    if isinstance(objective, HostFunction):
        raise JaxhpoError("pure_study: a host function cannot be compiled; use minimize")
    if space.static_slots:
        names = ", ".join(slot.name for slot in space.static_slots)
        raise JaxhpoError(f"pure_study: {names} is static, and each of its options is another program; use minimize")
    draft = make_problem(
        objective, space, optimizer, key=jax.random.key(0), limits=Limits(num_trials), metric=metric, maximize=maximize
    )
    plan = Plan(optimizer.num_lanes, optimizer.num_lanes, None)
    # A lane finishes a trial in this many rounds at the latest, and the lanes share the trials.
    rounds = -(-num_trials // optimizer.num_lanes) * (draft.num_steps // draft.round_steps)
    if not getattr(optimizer, "starts_afresh", False):
        rounds *= 2  # a lane may wait for others; it never waits for longer than it trains

    def study(key: jax.Array) -> PureResult:
        problem = dataclasses.replace(draft, key=key)
        step = lambda carry, _: run_round(problem, plan, carry)
        carry = first_carry(problem, plan)
        carry = dataclasses.replace(carry, optimizer=with_room(optimizer, carry.optimizer, num_trials + optimizer.num_lanes))
        carry, trials = lax.scan(step, carry, length=rounds)
        hparams = space.decode(carry.best_cube)
        return PureResult(carry.best_loss, carry.best_cube, hparams, trials)

    return study
