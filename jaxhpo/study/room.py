"""Optimizers whose state is a table of observations: how it grows between chunks.

Such an optimizer has two functions more than the protocol asks for, both for between updates:

    holds(state) -> int          observations that its table holds; a very large number where it makes room by itself
    enlarged(state) -> state     the state with a table of twice the size; the same object where it grows no further

A table grows before the first round that might not find room in it, wherever chunks end: bits depend on its size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jaxhpo.study.loop import Carry


def with_room(optimizer: Any, state: Any, num_observations: int) -> Any:
    """The state of an optimizer with a table for so many observations in all, as far as it grows."""
    if not hasattr(optimizer, "enlarged"):
        return state
    while optimizer.holds(state) < num_observations:
        more = optimizer.enlarged(state)
        if more is state:
            break
        state = more
    return state


def rounds_that_fit(optimizer: Any, state: Any, num_observations: int) -> int | None:
    """For how many rounds after so many observations a table is large enough; None where there is no table."""
    if not hasattr(optimizer, "holds"):
        return None
    return max((optimizer.holds(state) - num_observations) // optimizer.num_lanes, 1)


def sizes_of(optimizer: Any, carry: Carry) -> Iterator[Carry]:
    """The shapes of a carry with the tables it may come to have, the first one first."""
    yield carry
    while hasattr(optimizer, "enlarged"):
        before = jax.tree.map(lambda x: x.shape, carry.optimizer)
        carry = dataclasses.replace(carry, optimizer=jax.eval_shape(optimizer.enlarged, carry.optimizer))
        if jax.tree.map(lambda x: x.shape, carry.optimizer) == before:
            return
        yield carry
