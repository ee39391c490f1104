"""Rungs: the numbers of training steps, below the whole training, at which trials are compared.

Trials are at a rung from 0 to K; rung K is the whole training. Where a wrapper is given no rungs, it derives them from the
length of the training, in whole rounds, for only then do losses come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxhpo.core import FRESH, FULL, Array, Optimizer, Query
from jaxhpo.errors import JaxhpoError


def check_budgets(name: str, budgets: Sequence[Any] | None) -> None:
    """Refuses rungs that are missing or, where their values are known, not in ascending order.

    Raises:
        JaxhpoError: in one line.
    """
    if budgets is None:
        raise JaxhpoError(
            f"{name}: budgets are not set: a study sets them; in a loop of your own call for_training(num_steps, round_steps) "
            "or give the steps of the rungs, as in budgets=(10, 30)"
        )
    if not len(budgets):
        raise JaxhpoError(f"{name}: budgets = (): the steps of at least one rung are due")
    if any(isinstance(steps, (Tracer, jax.Array)) for steps in budgets):
        return
    if budgets[0] < 1 or any(a >= b for a, b in itertools.pairwise(budgets)):
        raise JaxhpoError(f"{name}: budgets = {tuple(budgets)}: ascending numbers of steps from 1 on are due")


def ask_for_rungs(inner: Optimizer, key: jax.Array, state: Any, rung: Array, budgets: Sequence[Any]) -> Query:
    """The query of a rule that stops single trials: those of the inner optimizer, each until the next rung is reached.

    Args:
        state: the inner optimizer's.
        rung: ``i32[B]``, the rung that each lane's trial trains for; 0 for one that begins.
    """
    lane = jnp.arange(inner.num_lanes, dtype=jnp.int32)
    return Query(inner.ask(key, state).cube, jnp.where(jnp.asarray(rung) > 0, lane, FRESH), due_steps(budgets)[rung])


def due_steps(budgets: Sequence[Any]) -> jax.Array:
    """The budget of each rung, the whole training last, ``i32[K + 1]``."""
    return jnp.stack([jnp.asarray(steps, jnp.int32) for steps in (*budgets, FULL)])


def check_training(name: str, num_steps: int, round_steps: int) -> None:
    """Refuses a training of one round.

    Raises:
        JaxhpoError: for fewer than two rounds.
    """
    if num_steps <= round_steps:
        raise JaxhpoError(
            f"{name}: the training is one round of {num_steps} steps, in which nothing can be stopped early: use the inner "
            "optimizer alone, or a Training with steps_per_round"
        )


def in_whole_rounds(steps: float, round_steps: int) -> int:
    """Rounded up to whole rounds, at least one."""
    return max(math.ceil(steps / round_steps * (1.0 - 1e-9)), 1) * round_steps


def rungs_below(name: str, what: str, steps: Iterable[float], num_steps: int, round_steps: int) -> tuple[int, ...]:
    """The rungs at so many steps: in whole rounds, no rung twice, the whole training not among them.

    Args:
        what: what they come from, for the message.

    Raises:
        JaxhpoError: if none is left.
    """
    rounded = sorted({in_whole_rounds(one, round_steps) for one in steps})
    below = tuple(one for one in rounded if one < num_steps)
    if not below:
        raise JaxhpoError(
            f"{name}: {what}: no whole round of {round_steps} steps lies there below the training of {num_steps} steps"
        )
    return below


def given_rungs(name: str, budgets: Sequence[int], num_steps: int, round_steps: int) -> tuple[int, ...]:
    """Rungs that the user gave, in whole rounds.

    Raises:
        JaxhpoError: if they are not in order or not below ``num_steps``.
    """
    check_budgets(name, budgets)
    if in_whole_rounds(float(budgets[-1]), round_steps) >= num_steps:
        raise JaxhpoError(
            f"{name}: budgets = {tuple(budgets)}: whole rounds of {round_steps} steps below the {num_steps} steps of the "
            "training are due"
        )
    return rungs_below(name, f"budgets = {tuple(budgets)}", budgets, num_steps, round_steps)


def even_rungs(
    name: str, interval: int | None, budgets: Sequence[int] | None, parts: int, num_steps: int, round_steps: int
) -> tuple[int, ...]:
    """The rungs given, or every multiple of ``interval``; without either, ends of ``parts`` equal parts of the training.

    Raises:
        JaxhpoError: if no rung lies below the whole training, or those given are not in order.
    """
    if budgets is not None:
        return given_rungs(name, budgets, num_steps, round_steps)
    if interval is None:
        interval = in_whole_rounds(num_steps / parts, round_steps)
    elif interval >= num_steps:
        raise JaxhpoError(f"{name}: interval = {interval}: must be below the {num_steps} steps of the training")
    return rungs_below(name, f"interval = {interval}", range(interval, num_steps, interval), num_steps, round_steps)


def geometric_rungs(
    name: str, num_steps: int, round_steps: int, reduction: float, grace: int | None, most: int
) -> tuple[int, ...]:
    """Rungs of which each is ``reduction`` times the one before.

    With ``grace`` they begin there; without, the last is a ``reduction``-th of the training and there are ``most`` of them.

    Raises:
        JaxhpoError: if no rung lies below the whole training.
    """
    if grace is None:
        steps = [num_steps / reduction**j for j in range(1, most + 1)]
        return rungs_below(name, f"reduction = {reduction}", steps, num_steps, round_steps)
    if grace >= num_steps:
        raise JaxhpoError(f"{name}: grace = {grace}: must be below the {num_steps} steps of the training")
    steps, one = [], float(grace)
    while one < num_steps:
        steps.append(one)
        one *= reduction
    return rungs_below(name, f"grace = {grace}", steps, num_steps, round_steps)[:most]
