"""Parameters of Optuna as points of the cube, and back.

distributions of Optuna  --of-->          ParameterSpace  --params_at-->  {"lr": 0.01, "width": 64, ...}
a space of ours          --from_space-->                  <--cube_at--
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxhpo.analysis.columns import element_names
from jaxhpo.core import CubeSpec, Kind
from jaxhpo.errors import JaxhpoError
from jaxhpo.space import Choice, Float, Int, Space, as_space
from jaxhpo.space.leaves import MAX_LEVELS, MAX_LOG_LEVELS

_decode = jax.jit(lambda space, cube: space.decode_arrays(cube[None]))


@dataclasses.dataclass(frozen=True)
class _Element:
    """One parameter of Optuna: a scalar leaf, or one element of an array.

    ``step`` is 0 where the leaf holds the value itself; else the leaf holds its place on the distribution's grid.
    """

    distribution: Any
    step: float = 0
    is_index: bool = False

    def param(self, value: Any) -> Any:
        """Optuna's value for the leaf's; float32 may round over a bound."""
        one = self.distribution
        if hasattr(one, "choices"):
            return one.choices[value] if self.is_index else value
        if self.step:
            value = one.low + value * self.step
        value = min(max(value, one.low), one.high)
        return value if _is_float(one) else round(value)

    def leaf(self, param: Any) -> float | None:
        """The leaf's number for Optuna's value, the index for a choice; None where it is none of the distribution's."""
        one = self.distribution
        try:
            if hasattr(one, "choices"):
                return float(one.to_internal_repr(param))
            number = float(param)
        except (TypeError, ValueError):
            return None
        if not one.low <= number <= one.high:
            return None
        return round((number - one.low) / self.step) if self.step else number


class ParameterSpace:
    """Named parameters with distributions of Optuna, and the space that an optimizer searches for them.

    Attributes:
        distributions: by name.
        spec: of the cube.
    """

    def __init__(self, space: Space, elements: Mapping[str, _Element]):
        self._space, self._elements = space, dict(elements)
        self._names = [element_names(leaf) for leaf in space.describe()]
        self.distributions = {name: element.distribution for name, element in elements.items()}

    @property
    def spec(self) -> CubeSpec:
        return self._space.spec

    @classmethod
    def of(cls, distributions: Mapping[str, Any]) -> ParameterSpace:
        """For Optuna's distributions. Steps become levels of an integer; integers of too many levels are rounded floats.

        Raises:
            JaxhpoError: naming the parameter that cannot be searched.
        """
        leaves, elements = {}, {}
        for name, one in distributions.items():
            try:
                leaves[name], elements[name] = _leaf_of(one)
            except (ValueError, TypeError) as error:
                raise JaxhpoError(f"Sampler: {name}: {error}") from None
        if not leaves:
            raise JaxhpoError("Sampler: nothing may vary in the space; at least one distribution of several values is due")
        return cls(Space(leaves), elements)

    @classmethod
    def from_space(cls, space: Any) -> ParameterSpace:
        """For a space of ours; an element of an array is a parameter of its own, ``name[0]``.

        Raises:
            JaxhpoError: for what is neither a space nor a tree of leaves.
        """
        import optuna

        make, elements = optuna.distributions, {}
        try:
            space = as_space(space)
        except (ValueError, TypeError) as error:
            raise JaxhpoError(f"Sampler: space: {error}") from None
        for slot, leaf in zip(space.slots, space.describe(), strict=True):
            if slot.run.kind == Kind.CHOICE:
                one: Any = make.CategoricalDistribution(slot.options)
            elif slot.run.kind == Kind.INT:
                one = make.IntDistribution(leaf["low"], leaf["high"], log=leaf["log"])
            else:
                one = make.FloatDistribution(leaf["low"], leaf["high"], log=leaf["log"])
            elements |= dict.fromkeys(element_names(leaf), _Element(one))
        return cls(space, elements)

    def params_at(self, cube: np.ndarray) -> dict[str, Any]:
        """All parameters at a point, ``f32[D]``."""
        params = {}
        columns = self._space.to_columns(_decode(self._space, cube))
        for names, slot in zip(self._names, self._space.slots, strict=True):
            values = _flat(columns[slot.name][0], len(slot.shape))
            params |= {name: self._elements[name].param(value) for name, value in zip(names, values, strict=True)}
        return params

    def cube_at(self, params: Mapping[str, Any]) -> np.ndarray | None:
        """The point of these parameters, ``f32[D]``; None where one is missing or none of its distribution's values."""
        arrays = []
        for names, slot in zip(self._names, self._space.slots, strict=True):
            numbers = [self._elements[name].leaf(params[name]) if name in params else None for name in names]
            if any(number is None or not math.isfinite(number) for number in numbers):
                return None
            dtype = np.float32 if slot.run.kind == Kind.FLOAT else np.int32
            arrays.append(np.asarray(numbers, dtype).reshape(slot.shape))
        return np.asarray(self._space.encode(self._space.assemble(arrays)), np.float32)


def _is_float(distribution: Any) -> bool:
    return type(distribution).__name__ == "FloatDistribution"


def _leaf_of(one: Any) -> tuple[Any, _Element]:
    """The leaf that holds a distribution, and how its values are read."""
    if hasattr(one, "choices"):
        return Choice(tuple(range(len(one.choices)))), _Element(one, is_index=True)
    step = one.step if _is_float(one) or one.step != 1 else None
    if step:
        return Int(0, round((one.high - one.low) / step)), _Element(one, step)
    if _is_float(one) or one.high - one.low >= (MAX_LOG_LEVELS if one.log else MAX_LEVELS):
        return Float(one.low, one.high, log=one.log), _Element(one)
    return Int(one.low, one.high, log=one.log), _Element(one)


def _flat(value: Any, depth: int) -> list[Any]:
    values = [value]
    for _ in range(depth):
        values = list(itertools.chain.from_iterable(values))
    return values
