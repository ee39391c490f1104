"""Seeds as an axis: every trial trained on the same few keys, and a race that spares the seeds of trials that lose.

Each of the optimizer's B lanes is S trainings side by side. A trial takes k seeds, S at a time; before each further S
it may be dropped, if a paired test on the seeds so far rules it out against the incumbent. Trials share their
seeds, so their differences are free of what a seed does to all of them.

The race: Birattari, Stuetzle, Paquete & Varrentrapp, "A racing algorithm for configuring metaheuristics", GECCO 2002,
with a paired t test against the incumbent alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import Array, pytree_dataclass
from jaxhpo.study.lanes import Outcome, Row
from jaxhpo.study.problem import Problem


@pytree_dataclass
class Seeds:
    """Where each lane is in the seeds of its trial.

    Attributes:
        count: ``i32[B]``, seeds answered before those under way.
        again: ``bool[B]``, the trial begins anew with its next seeds.
        metrics: every metric on every seed, ``f32[B, k]``; NaN where it is not answered.
        best: ``f32[k]``, the incumbent's loss on every seed; NaN while there is none that has trained them all.
    """

    count: Array
    again: Array
    metrics: dict[str, Array]
    best: Array


@pytree_dataclass
class Verdict:
    """What a round says of lanes whose trials have several seeds.

    Attributes:
        seeds: after the round.
        complete: ``bool[B]``, the trial is answered on all its seeds.
        loss: ``f32[B]``, to be minimised. Of a trial that the race has dropped: the incumbent's and the mean gap on the seeds
            that both have trained, so that easy seeds are not taken for a good trial.
    """

    seeds: Any
    complete: Array | bool
    loss: Array


def first(problem: Problem, lanes: int) -> Any:
    """Nothing answered; ``()`` where a trial has one seed."""
    k = problem.num_seeds
    if k == 1:
        return ()
    unknown: dict[str, Array] = {name: jnp.full((lanes, k), jnp.nan, jnp.float32) for name in problem.metric_names}
    return Seeds(jnp.zeros(lanes, jnp.int32), jnp.zeros(lanes, bool), unknown, jnp.full(k, jnp.nan, jnp.float32))


def begins_again(seeds: Any) -> Array | bool:
    """Lanes that begin anew with further seeds of the same trial, ``bool[B]``."""
    return seeds.again if isinstance(seeds, Seeds) else False


def _answered(seeds: Seeds, fresh: Array) -> Array:
    """Seeds that each lane's trial has answered, ``i32[B]``; ``fresh`` lanes begin a trial or its next seeds."""
    return jnp.where(fresh & ~seeds.again, 0, seeds.count)


def spread(problem: Problem, seeds: Any, row: Row, source: Array) -> tuple[Row, Array]:
    """A row for each training, ``[B * S]``, and whose state it takes over, from those of the lanes."""
    if problem.num_seeds == 1:
        return row, source
    size = problem.seeds_at_once
    rows: Row = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), row)
    place = jnp.tile(jnp.arange(size, dtype=jnp.int32), source.shape[0])
    rows = dataclasses.replace(rows, seed=jnp.repeat(_answered(seeds, row.fresh), size) + place)
    return rows, jnp.repeat(source, size) * size + place


def gathered(problem: Problem, seeds: Any, fresh: Array, outcome: Outcome) -> tuple[Outcome, Verdict]:
    """Outcomes of trainings, ``[B * S]``, as those of lanes, ``[B]``: over where the trial is answered.

    The metric is its mean over the seeds so far, or their quantile; every other metric is its mean. A trial that diverged
    on one seed has diverged. Beside the metrics stand the standard error of the loss, the number of seeds and the loss on each.
    """
    if problem.num_seeds == 1:
        return outcome, Verdict((), True, problem.sign * outcome.metrics[problem.metric])
    k, size = problem.num_seeds, problem.seeds_at_once
    by_lane: Outcome = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), outcome)
    all_over, sound = jnp.asarray(by_lane.over).all(axis=1), jnp.asarray(by_lane.sound).all(axis=1)
    ends = all_over | (jnp.asarray(by_lane.over).any(axis=1) & ~sound)
    before = _answered(seeds, fresh)
    count = before + size
    place = jnp.arange(k)
    now = (place >= before[:, None]) & (place < count[:, None]) & ends[:, None]
    known = place < count[:, None]
    column = jnp.clip(place - before[:, None], 0, size - 1)
    metrics, means = {}, {}
    for name, values in by_lane.metrics.items():
        earlier = jnp.where((place < before[:, None]), seeds.metrics[name], jnp.nan)
        metrics[name] = jnp.where(now, jnp.take_along_axis(values, column, axis=1), earlier).astype(jnp.float32)
        means[name] = pooled(metrics[name], known, count)
    each = metrics[problem.metric]
    deviation = jnp.where(known, each - means[problem.metric][:, None], 0.0)
    error = jnp.sqrt((deviation**2).sum(axis=1) / jnp.maximum(count - 1, 1) / count)
    told = means | {f"{problem.metric}_stderr": error, "seeds": count.astype(jnp.float32)}
    told |= {f"{problem.metric}_seed{j}": each[:, j] for j in range(k)}
    loss, complete = problem.sign * each, count >= k
    value = pooled(loss, known, count, problem.seed_quantile)
    told[problem.metric] = problem.sign * value
    drops, gap = _loses(loss, seeds.best, known, count, problem.race_bounds)
    answered = ends & (complete | ~sound | drops)
    value = jnp.where(drops & ~complete, seeds.best.mean() + gap, value)
    trained = by_lane.rounds.max(axis=1) > 0
    again = jnp.where(trained, ends & ~answered, seeds.again)
    after = Seeds(jnp.where(answered, 0, jnp.where(ends, count, before)), again, metrics, seeds.best)
    grad = None if by_lane.grad is None else jax.tree.map(lambda x: x.mean(axis=1), by_lane.grad)
    rounds = by_lane.rounds.max(axis=1)
    return Outcome(told, answered, sound, jnp.asarray(by_lane.steps).min(axis=1), rounds, grad), Verdict(after, complete, value)


def pooled(values: Array, known: Array, count: Array, level: Array | None = None) -> jax.Array:
    """The mean of the first ``count`` values of each row, ``f32[B, k] -> f32[B]``, or their quantile; NaN if one of them is."""
    mean = jnp.where(known, values, 0.0).sum(axis=1) / count
    if level is None:
        return mean
    return jnp.where(jnp.isfinite(mean), _quantile(values, known, count, level), jnp.nan)


def _quantile(loss: Array, known: Array, count: Array, level: Array) -> Array:
    """Linear between order statistics."""
    ordered = jnp.sort(jnp.where(known, loss, jnp.inf), axis=1)
    place = level * (count - 1)
    low = jnp.floor(place).astype(jnp.int32)
    at = lambda i: jnp.take_along_axis(ordered, jnp.minimum(i, count - 1)[:, None], axis=1)[:, 0]
    return at(low) + (place - low) * (at(low + 1) - at(low))


def _loses(loss: Array, best: Array, known: Array, count: Array, bounds: Array) -> tuple[Array, Array]:
    """Whether each row's paired t statistic against the incumbent is above its bound, ``bool[B]``, and its mean gap."""
    gap = jnp.where(known, loss - best, 0.0)
    mean = gap.sum(axis=1) / count
    spread = jnp.sqrt((jnp.where(known, gap - mean[:, None], 0.0) ** 2).sum(axis=1) / jnp.maximum(count - 1, 1) / count)
    return mean > jnp.asarray(bounds)[count] * jnp.maximum(spread, jnp.finfo(jnp.float32).tiny), mean


def with_incumbent(problem: Problem, verdict: Verdict, better: Array, lane: Array) -> Any:
    """The seeds with ``lane`` as the incumbent, where it is ``better`` and has answered all its seeds."""
    if problem.num_seeds == 1:
        return ()
    seeds = verdict.seeds
    new = problem.sign * seeds.metrics[problem.metric][lane]
    return dataclasses.replace(seeds, best=jnp.where(better & jnp.asarray(verdict.complete)[lane], new, seeds.best))
