"""Minimisation of smooth functions in a box, many starts side by side, a fixed number of evaluations.

BFGS with the projection of Bertsekas, "Projected Newton methods for optimization problems with simple constraints",
SIAM J. Control Optim. 20(2), 1982: coordinates held at a bound by their gradient take no part in a step, and steps end at
the bounds exactly. One evaluation an iteration; a step that does not pay is tried again shorter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_ARMIJO = 1e-4
_SHRINK = 0.25


class _State(NamedTuple):
    x: jax.Array  # [S, P]
    value: jax.Array  # [S]
    grad: jax.Array  # [S, P]
    inverse: jax.Array  # [S, P, P], approximate inverse Hessian
    step: jax.Array  # [S], of the next trial point
    moved: jax.Array  # bool[S], whether the inverse has been scaled


def _free(x: jax.Array, grad: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    return ~(((x <= lower) & (grad > 0)) | ((x >= upper) & (grad < 0)))


def minimise_in_box(
    value_and_grad: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    num_steps: jax.Array | int,
    first_step: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Local minima from every start.

    Args:
        value_and_grad: ``[S, P] -> ([S], [S, P])``, row by row.
        start: ``[S, P]``, inside the box.
        lower, upper: bounds that broadcast to ``[S, P]``.
        num_steps: evaluations after the first.
        first_step: the longest change of a coordinate in the first step.

    Returns:
        points ``[S, P]`` and values ``[S]``, never above those of the starts; a start whose value is not finite stays.
    """
    num_starts, size = start.shape
    eye = jnp.broadcast_to(jnp.eye(size, dtype=start.dtype), (num_starts, size, size))
    tiny = float(jnp.finfo(start.dtype).tiny)

    def one(number: jax.Array, state: _State) -> _State:
        free = _free(state.x, state.grad, lower, upper)
        grad = jnp.where(free, state.grad, 0.0)
        newton = -jnp.where(free, jnp.einsum("sij,sj->si", state.inverse, grad), 0.0)
        length = jnp.max(jnp.abs(grad), axis=1, keepdims=True)
        steepest = -grad * (first_step / jnp.maximum(length, tiny))
        direction = jnp.where(state.moved[:, None], newton, steepest)
        trial = jnp.clip(state.x + state.step[:, None] * direction, lower, upper)
        value, new_grad = value_and_grad(trial)
        move = trial - state.x
        sound = jnp.isfinite(value) & jnp.isfinite(new_grad).all(1)
        lower_enough = (value <= state.value + _ARMIJO * jnp.minimum((grad * move).sum(1), 0.0)) & (move != 0).any(1)
        accept = sound & (lower_enough | (number == 0))
        # Of the coordinates that moved alone: the inverse is that of the function with the others held.
        change = jnp.where(accept[:, None] & (move != 0), new_grad - state.grad, 0.0)
        inverse, updated = _bfgs(state.inverse, jnp.where(accept[:, None], move, 0.0), change, state.moved)
        # Steps that shrank to nothing begin again from the steepest descent.
        stuck = ~accept & (state.step < 1e-6)
        return _State(
            x=jnp.where(accept[:, None], trial, state.x),
            value=jnp.where(accept, value, state.value),
            grad=jnp.where(accept[:, None], new_grad, state.grad),
            inverse=jnp.where((accept & updated)[:, None, None], inverse, jnp.where(stuck[:, None, None], eye, state.inverse)),
            step=jnp.where(accept | stuck, 1.0, _SHRINK * state.step),
            moved=jnp.where(stuck, False, state.moved | (accept & updated)),
        )

    # Without a gradient the first step stays where it is, so that the start is evaluated by the same code as all others.
    worst, ones = jnp.full(num_starts, jnp.inf, start.dtype), jnp.ones(num_starts, start.dtype)
    state = _State(start, worst, jnp.zeros_like(start), eye, ones, jnp.zeros(num_starts, bool))
    state = lax.fori_loop(0, num_steps + 1, one, state)
    return state.x, state.value


def _bfgs(inverse: jax.Array, move: jax.Array, change: jax.Array, moved: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inverse Hessian after a step (Nocedal & Wright 2006, eq. 6.17), first scaled by eq. 6.20; and where it holds."""
    curvature = (move * change).sum(1)
    eps = float(jnp.finfo(move.dtype).eps)
    holds = curvature > eps * jnp.sqrt((move**2).sum(1) * (change**2).sum(1))
    safe = jnp.where(holds, curvature, 1.0)
    scale = safe / jnp.where(holds, (change**2).sum(1), 1.0)
    eye = jnp.eye(move.shape[1], dtype=move.dtype)
    inverse = jnp.where(moved[:, None, None], inverse, scale[:, None, None] * eye)
    through = jnp.einsum("sij,sj->si", inverse, change)
    factor = (1.0 + (change * through).sum(1) / safe) / safe
    outer = move[:, :, None] * through[:, None, :]
    update = factor[:, None, None] * move[:, :, None] * move[:, None, :] - (outer + outer.swapaxes(1, 2)) / safe[:, None, None]
    return inverse + update, holds
