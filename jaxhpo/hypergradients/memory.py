"""How much memory reverse mode through a training takes, foretold before anything is compiled, and what to recompute.

A training of ``T`` steps is cut into segments, those again, and so on. The state at the start of every segment is stored;
within the innermost segments also what the backward pass of each step reads (its residuals). With ``S`` bytes a state, ``R``
bytes of residuals a step and segments of ``a`` steps this takes ``T / a * S + a * R``: least, and growing as the square root
of ``T``, at ``a = sqrt(T * S / R)``; each further level costs one more forward pass (Griewank and Walther 2000, section 2).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core
import numpy as np

from jaxhpo.errors import JaxhpoError

_MIB = 2**20
_CACHED = 32 * _MIB  # up to here everything is stored: beyond the caches recomputing is as fast as reading back
_WORKING_COPIES = 6  # cotangents and temporary values, in states


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """What is stored of a training.

    Attributes:
        segments: lengths of the segments in steps, level by level; () stores the residuals of all steps.
        state_bytes: ``S``.
        residual_bytes: ``R``.
        predicted_bytes: all that reverse mode needs at once beyond data and program, for one lane.
    """

    segments: tuple[int, ...]
    state_bytes: int
    residual_bytes: int
    predicted_bytes: int


def bytes_of(tree: Any) -> int:
    """Bytes of all arrays of a tree, of keys apart."""
    sized = [
        x for x in jax.tree.leaves(tree) if hasattr(x, "shape") and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    ]
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in sized)


def residual_bytes(step: Callable[..., Any], shared: Any, *args: Any) -> int:
    """Bytes that the backward pass of ``step(shared, *args)`` keeps, without the ``shared`` data; computes nothing."""
    backward = lambda shared, *args: jax.tree.leaves(jax.vjp(functools.partial(step, shared), *args)[1])
    jaxpr = jax.make_jaxpr(backward)(shared, *args).jaxpr
    elsewhere = {*jaxpr.constvars, *jaxpr.invars[: len(jax.tree.leaves(shared))]}
    kept = {var for var in jaxpr.outvars if isinstance(var, jax.extend.core.Var) and var not in elsewhere}
    return bytes_of([var.aval for var in kept])


def _total(segments: tuple[int, ...], num_steps: int, state: int, residual: int) -> int:
    stored, length = 0, num_steps
    for size in segments:
        stored, length = stored + -(-length // size) * state, size
    return stored + length * residual + _WORKING_COPIES * state


def _candidates(num_steps: int, state: int, residual: int) -> Iterator[tuple[int, ...]]:
    """The best lengths of one to five levels of segments."""
    for levels in range(1, 6):
        # The sum of q_1 S + ... + q_L S + a_L R with q_1 ... q_L a_L = T is least where all its terms are equal.
        ratio = max((num_steps * residual / state) ** (1 / (levels + 1)), 1.0) if state else float(num_steps)
        lengths = tuple(min(max(round(num_steps / ratio**level), 1), num_steps) for level in range(1, levels + 1))
        if len(set(lengths)) == levels:
            yield lengths


def plan_memory(num_steps: int, state: int, residual: int, budget: int, segments: tuple[int, ...] | None = None) -> MemoryPlan:
    """What to store: all that is cheap to keep, else the fewest levels of segments that fit ``budget`` bytes.

    Args:
        segments: lengths to take instead of choosing.

    Raises:
        JaxhpoError: if nothing fits; it says what would. For segments that are no positive whole numbers.
    """
    if segments is not None:
        if not isinstance(segments, tuple) or any(
            isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in segments
        ):
            raise JaxhpoError(f"segments = {segments!r}: must be a tuple of whole numbers of at least 1, or ()")
        return MemoryPlan(segments, state, residual, _total(segments, num_steps, state, residual))
    everything = _total((), num_steps, state, residual)
    if everything <= min(budget, _CACHED):
        return MemoryPlan((), state, residual, everything)
    least = everything
    for lengths in _candidates(num_steps, state, residual):
        total = _total(lengths, num_steps, state, residual)
        if total <= budget:
            return MemoryPlan(lengths, state, residual, total)
        least = min(least, total)
    if everything <= budget:
        return MemoryPlan((), state, residual, everything)
    raise JaxhpoError(
        f"budget_mib = {budget // _MIB}: reverse mode through {num_steps} steps needs at least {-(-least // _MIB)} MiB a lane; "
        "raise it, take fewer steps, or use Forward or Evolution, whose memory does not grow with the steps"
    )
