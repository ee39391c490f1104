"""What wrappers share about the optimizer that they wrap: whether it fits, what it is told, how its table grows.

The inner optimizer sees one evaluation for each trial: a lane is not done until its trial has ended, and then its next
point is the next trial. Only one loss of the trial is told, and a loss of a part of the training never passes for one of the
whole: see :func:`lifted`; :class:`jaxhpo.PredictiveStopping` tells a predicted one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.core import Array, Feedback, Optimizer, Query
from jaxhpo.errors import JaxhpoError

LIMITLESS = int(np.iinfo(np.int32).max)
"""How many observations an optimizer holds that has no table, or one that makes room by itself."""


def check_inner(name: str, inner: Any) -> None:
    """Refuses what is no optimizer, and optimizers that save training themselves.

    Args:
        name: the wrapper's, for the message.

    Raises:
        JaxhpoError: if ``inner`` cannot be wrapped.
    """
    if isinstance(inner, type) or not isinstance(inner, Optimizer):
        raise JaxhpoError(f"{name}: inner = {inner!r}: an optimizer such as TPE(num_lanes=8) is due")
    if hasattr(inner, "for_training") and not getattr(inner, "starts_afresh", False):
        raise JaxhpoError(
            f"{name}: inner = {type(inner).__name__}(...): it stops or copies trials itself; one that trains them whole is due"
        )


def fitted_inner(name: str, inner: Any, num_steps: int, round_steps: int) -> Any:
    """The inner optimizer for a training of so many steps, after :func:`check_inner`."""
    check_inner(name, inner)
    return inner.for_training(num_steps, round_steps) if hasattr(inner, "for_training") else inner


def tell(inner: Any, key: jax.Array, state: Any, query: Query, feedback: Feedback, loss: Array, ended: Array) -> Any:
    """The inner optimizer's state after the trials on the lanes ``ended``, ``bool[B]``, with ``loss``, ``f32[B]``."""
    told = Feedback(jnp.where(ended, loss, jnp.nan), ended, feedback.steps, feedback.grad)
    return inner.update(key, state, Query.fresh(jnp.asarray(query.cube)), told)


def lifted(worst: Array, rung: Array, loss: Array, ended: Array) -> tuple[jax.Array, jax.Array]:
    """What the inner optimizer is told of the trials that ended: how far a trial got counts before its loss.

    A trial that ended at rung k is told no better than any that ended at a higher rung so far, in the same round too. Those
    trained to the end, at rung K, are told as they are.

    Args:
        worst: ``f32[K + 1]``, the highest loss that ended at each rung; -inf where there is none.
        rung: ``i32[B]``, the rung at which the loss was due.
        loss: ``f32[B]``, NaN for a trial that diverged.
        ended: ``bool[B]``.

    Returns:
        the losses to tell ``f32[B]``, and ``worst`` with those that ended.
    """
    sound = ended & jnp.isfinite(loss)
    here = (rung == jnp.arange(worst.shape[0])[:, None]) & sound
    worst = jnp.maximum(worst, jnp.where(here, loss, -jnp.inf).max(axis=1))
    higher = jnp.append(lax.cummax(worst, reverse=True)[1:], -jnp.inf)
    return jnp.where(sound, jnp.maximum(loss, higher[rung]), jnp.nan), worst


def inner_holds(inner: Any, state: Any) -> int:
    """Observations that the table of the inner optimizer holds."""
    return inner.holds(state) if hasattr(inner, "holds") else LIMITLESS


def inner_enlarged(inner: Any, state: Any) -> Any:
    """The inner optimizer's state with a larger table; the same object where it grows no further."""
    return inner.enlarged(state) if hasattr(inner, "enlarged") else state


def with_larger_inner(inner: Any, state: Any) -> Any:
    """The state of a wrapper with a larger table of the inner optimizer; the same object where it grows no further."""
    more = inner_enlarged(inner, state.inner)
    return state if more is state.inner else dataclasses.replace(state, inner=more)
