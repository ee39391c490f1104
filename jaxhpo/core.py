"""The protocol that every optimizer, objective and driver shares.

An optimizer sees only the unit cube: it is asked for a :class:`Query` (one row a lane) and told a
:class:`Feedback`. Both are pytrees of arrays; :class:`CubeSpec` is the static description of the cube.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import numbers
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey

from jaxhpo.errors import JaxhpoError

FULL = int(np.iinfo(np.int32).max)
"""A budget that means: the whole training."""

FRESH = -1
"""A parent that means: start afresh."""

T = TypeVar("T")
Array = jax.Array | np.ndarray


def setting(
    default: Any = dataclasses.MISSING,
    *,
    static: bool = False,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A field of an optimizer: traced unless ``static``; its range is checked by :func:`problems_of`."""
    metadata = {"static": static, "low": low, "high": high, "choices": None if choices is None else tuple(choices)}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(frozen_default=True, field_specifiers=(setting, dataclasses.field))
def pytree_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass registered as a pytree; fields made by ``setting(static=True)`` are not traced.

    The class is part of the structure: to JAX two registered dataclasses of equal static fields and as many leaves are equal
    structures, so that a compiled program of the one may be taken for the other's.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    static = tuple(field.name for field in fields if field.metadata.get("static"))
    traced = tuple(field.name for field in fields if not field.metadata.get("static"))

    def flatten(one: Any) -> tuple[list[Any], Any]:
        return [getattr(one, name) for name in traced], (made, *(getattr(one, name) for name in static))

    def flatten_with_keys(one: Any) -> tuple[list[Any], Any]:
        children, structure = flatten(one)
        return [(GetAttrKey(name), child) for name, child in zip(traced, children, strict=True)], structure

    def unflatten(structure: Any, children: Any) -> Any:
        one = object.__new__(made)
        for name, value in (*zip(static, structure[1:], strict=True), *zip(traced, children, strict=True)):
            object.__setattr__(one, name, value)
        return one

    jax.tree_util.register_pytree_with_keys(made, flatten_with_keys, unflatten, flatten)
    return made


def problems_of(optimizer: Any) -> list[str]:
    """What is wrong with the settings of an optimizer, one line a field; empty if nothing is.

    Runs on the host with concrete values. Wrapped optimizers (fields that are dataclasses) are looked into.
    """
    found = []
    for field in dataclasses.fields(optimizer):
        value, name = getattr(optimizer, field.name), field.name
        if dataclasses.is_dataclass(field.default) and not isinstance(value, type(field.default)):
            found.append(f"{name} = {value!r}: must be a {type(field.default).__name__}")
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found += [f"{name}.{line}" for line in problems_of(value)]
            continue
        if isinstance(value, Tracer):
            continue
        if value is None and field.default is None:
            continue
        choices = field.metadata.get("choices")
        if choices is not None:
            if value not in choices:
                found.append(f"{name} = {value!r}: must be one of {', '.join(map(repr, choices))}")
            continue
        low, high = field.metadata.get("low"), field.metadata.get("high")
        if low is None and high is None:
            continue
        limits = f"at least {low}" if high is None else f"at most {high}" if low is None else f"between {low} and {high}"
        try:
            number = float("nan" if isinstance(value, bool) else value)
        except (TypeError, ValueError):
            found.append(f"{name} = {value!r}: must be a number, {limits}")
            continue
        # 4.0 is refused, too: it is equal to 4 as the key of a cache of programs, and no size of an array.
        whole = "" if not field.metadata["static"] or isinstance(value, numbers.Integral) else "whole and "
        if not math.isfinite(number) or whole or (low is not None and number < low) or (high is not None and number > high):
            found.append(f"{name} = {value!r}: must be {whole}{limits}")
    return found


class UnfitDimensions(JaxhpoError):
    """An optimizer's word that it cannot search some dimensions of the cube; the driver knows their names.

    Attributes:
        dims: numbers of the dimensions.
        reason: why not, and what would be right.
    """

    def __init__(self, dims: Sequence[int], reason: str):
        self.dims, self.reason = tuple(map(int, dims)), reason
        super().__init__(f"dimensions {', '.join(map(str, self.dims[:8]))}{', ...' if len(self.dims) > 8 else ''}: {reason}")


class Kind(enum.IntEnum):
    """What a dimension of the cube stands for."""

    FLOAT = 0
    INT = 1  # ordered levels
    CHOICE = 2  # unordered levels


@dataclasses.dataclass(frozen=True)
class Run:
    """Neighbouring dimensions of the same sort.

    ``levels`` is 0 for floats. ``log_low`` is the lowest value of an integer spaced by its logarithm, else 0:
    it places the edges between the levels, which are not equally spaced then.
    """

    kind: Kind
    levels: int = 0
    log_low: int = 0
    count: int = 1


@dataclasses.dataclass(frozen=True)
class CubeSpec:
    """The unit cube ``[0, 1]^D``, dimension by dimension. Static and hashable.

    Levels are numbered from 0. Each level of an integer or a choice owns an interval of the cube, and the
    intervals tile ``[0, 1]``: equally for linear integers and choices, by ``log`` for log integers.
    """

    runs: tuple[Run, ...]

    @classmethod
    def floats(cls, num_dims: int) -> CubeSpec:
        """A cube of ``num_dims`` continuous dimensions."""
        return cls((Run(Kind.FLOAT, count=num_dims),))

    @property
    def num_dims(self) -> int:
        return sum(run.count for run in self.runs)

    def _spread(self, values: Sequence[Any], dtype: Any) -> np.ndarray:
        return np.repeat(np.asarray(values, dtype), [run.count for run in self.runs])

    @property
    def kinds(self) -> np.ndarray:
        """``i32[D]`` of :class:`Kind`."""
        return self._spread([run.kind for run in self.runs], np.int32)

    @property
    def levels(self) -> np.ndarray:
        """``i32[D]``, the number of levels; 0 for floats."""
        return self._spread([run.levels for run in self.runs], np.int32)

    @property
    def is_float(self) -> np.ndarray:
        """``bool[D]``"""
        return self.kinds == Kind.FLOAT

    @property
    def is_int(self) -> np.ndarray:
        """``bool[D]``"""
        return self.kinds == Kind.INT

    @property
    def is_choice(self) -> np.ndarray:
        """``bool[D]``"""
        return self.kinds == Kind.CHOICE

    def _edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        levels = np.maximum(self.levels, 1).astype(np.float32)
        log_low = self._spread([run.log_low for run in self.runs], np.float64)
        is_log = log_low > 0
        first = np.where(is_log, log_low - 0.5, 1.0)  # the lower edge of the lowest level
        span = np.where(is_log, np.log1p(levels / first), 1.0)
        return levels, is_log, first.astype(np.float32), span.astype(np.float32)

    def level_of(self, cube: Array) -> jax.Array:
        """The level in which each coordinate lies, ``f32[..., D] -> i32[..., D]``; 0 for floats."""
        levels, is_log, first, span = self._edges()
        place = cube * levels
        if is_log.any():
            place = jnp.where(is_log, first * jnp.expm1(cube * span), place)
        return jnp.clip(jnp.floor(place), 0, levels - 1).astype(jnp.int32)

    def cube_of(self, level: Array) -> jax.Array:
        """The middle of each level, ``i32[..., D] -> f32[..., D]``; one half for floats."""
        levels, is_log, first, span = self._edges()
        place = level.astype(jnp.float32) + 0.5
        middle = place / levels
        if is_log.any():
            middle = jnp.where(is_log, jnp.log1p(place / first) / span, middle)
        return middle

    def snap(self, cube: Array) -> Array:
        """Integers and choices moved to the middle of their level, floats as they are, ``f32[..., D]``."""
        if self.is_float.all():
            return cube
        return jnp.where(self.is_float, cube, self.cube_of(self.level_of(cube)))


@pytree_dataclass
class Query:
    """What an optimizer asks for, lane by lane.

    Attributes:
        cube: ``f32[B, D]``, the point to evaluate.
        parent: ``i32[B]``, whose training state it continues: the lane's own index to go on, another's to
            copy that one, -1 to start afresh.
        budget: ``i32[B]``, total training steps at which its loss is due; ``FULL`` for the whole training. A trial that
            goes on with a budget that it has reached already waits: its state is kept, and its loss answered again.
    """

    cube: Array
    parent: Array
    budget: Array

    @classmethod
    def fresh(cls, cube: Array) -> Query:
        """New trials at ``f32[B, D]``, each trained to the end."""
        lanes = cube.shape[0]
        return cls(cube, jnp.full(lanes, FRESH, jnp.int32), jnp.full(lanes, FULL, jnp.int32))


@pytree_dataclass
class Feedback:
    """What an optimizer is told, lane by lane.

    Attributes:
        loss: ``f32[B]``, minimised; NaN for a trial that diverged or failed.
        done: ``bool[B]``; where False the lane is still training and ``loss`` means nothing.
        steps: ``i32[B]``, training steps survived.
        grad: ``f32[B, D]``, d loss / d cube, or None where the evaluator does not compute it.
    """

    loss: Array
    done: Array
    steps: Array
    grad: Array | None = None

    @classmethod
    def finished(cls, loss: Array) -> Feedback:
        """Every lane done with ``f32[B]`` losses."""
        return cls(loss, jnp.ones(loss.shape, bool), jnp.ones(loss.shape, jnp.int32))


@runtime_checkable
class Optimizer(Protocol):
    """A search algorithm: pure functions over a pytree of arrays, fit for jit, vmap, scan and pmap.

    ``ask`` only reads: the same key and state give the same query, and a lane that was not done gets its row
    again. ``update`` leaves all that depends on a lane that is not done as it was. A NaN loss never enters the
    state as a NaN and never becomes a best.

    An optimizer that cannot do without ``feedback.grad`` says so by a class attribute ``needs_gradient = True``.

    An optimizer whose queries all start afresh may say so by a class attribute ``starts_afresh = True``: the states of
    finished trainings are then not kept on disk. One whose state is a table of observations may let it grow by two more
    functions, ``holds`` and ``enlarged``: see :mod:`jaxhpo.study.room`. One whose settings depend on how long a training
    is may have a function ``for_training(num_steps, round_steps)`` that gives the optimizer with what its user left open;
    a study calls it once, before anything is compiled.
    """

    @property
    def num_lanes(self) -> int: ...

    def init(self, key: jax.Array, spec: CubeSpec) -> Any: ...

    def ask(self, key: jax.Array, state: Any) -> Query: ...

    def update(self, key: jax.Array, state: Any, query: Query, feedback: Feedback) -> Any: ...
