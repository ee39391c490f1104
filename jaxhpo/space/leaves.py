"""The leaves of a space: what one hyperparameter may be."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import numpy as np

from jaxhpo.core import Kind, Run

MAX_LEVELS, MAX_LOG_LEVELS = 2**22, 2**17  # up to here the middle of every level lies in that level in float32


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if isinstance(shape, (int, np.integer)):
        shape = (shape,)
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"shape must be a tuple of whole numbers, not {shape!r}") from None
    if any(size < 1 for size in sizes):
        raise ValueError(f"shape must hold sizes of at least 1, not {shape!r}")
    return sizes


def _checked_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return float(value)


def _checked_whole(name: str, value: Any) -> int:
    number = _checked_number(name, value)
    if number != int(number):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return int(number)


def _checked_flag(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be true or false, not {value!r}")


@dataclasses.dataclass(frozen=True)
class Float:
    """A real number in ``[low, high]``, uniform, or uniform in its logarithm with ``log=True``.

    Raises:
        ValueError: if ``low >= high``, or ``log`` with ``low <= 0``, or float32 cannot tell the bounds apart.
    """

    low: float
    high: float
    log: bool = False
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        low, high = _checked_number("low", self.low), _checked_number("high", self.high)
        _checked_flag("log", self.log)
        if low >= high:
            raise ValueError(f"low must be below high, not {self.low!r} and {self.high!r}")
        if self.log and low <= 0:
            raise ValueError(f"log needs low above 0, not {self.low!r}")
        with np.errstate(over="ignore", under="ignore"):
            single = np.float32(low), np.float32(high)
            extent = single[1] - single[0]
        if not 0 < extent < np.inf or (self.log and single[0] < 1e-37):
            raise ValueError(f"float32 cannot represent the range {self.low!r} to {self.high!r}")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "shape", _checked_shape(self.shape))

    @property
    def run(self) -> Run:
        return Run(Kind.FLOAT)


@dataclasses.dataclass(frozen=True)
class Int:
    """A whole number in ``[low, high]``, both included; uniform, or by its logarithm with ``log=True``.

    The edges lie half a step outside, so that the lowest and the highest value own as much of the cube as
    their neighbours.

    Raises:
        ValueError: if ``low >= high``, ``log`` with ``low < 1``, or more levels than float32 can tell apart in the
            cube: 2**22, or 2**17 with ``log``.
    """

    low: int
    high: int
    log: bool = False
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        low, high = _checked_whole("low", self.low), _checked_whole("high", self.high)
        _checked_flag("log", self.log)
        if low >= high:
            raise ValueError(f"low must be below high, not {self.low!r} and {self.high!r}")
        if self.log and low < 1:
            raise ValueError(f"log needs low of at least 1, not {self.low!r}")
        most = MAX_LOG_LEVELS if self.log else MAX_LEVELS
        if high - low >= most or max(abs(low), abs(high)) >= 2**31:
            raise ValueError(f"{self.low!r} to {self.high!r} is more than {most} levels or beyond 32 bits; use Float")
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)
        object.__setattr__(self, "shape", _checked_shape(self.shape))

    @property
    def run(self) -> Run:
        return Run(Kind.INT, self.high - self.low + 1, self.low if self.log else 0)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of ``options``: any labels, no order.

    In a pure task a traced choice arrives as its index (``i32``), a ``static`` one as its label. A static
    choice may change shapes or code; trials are grouped by it, and each group is compiled once.

    Raises:
        ValueError: if there are no options, or two are equal.
    """

    options: tuple[Any, ...]
    static: bool = False
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.options, str) or not hasattr(self.options, "__iter__"):
            raise TypeError(f"options must be a list of labels, not {self.options!r}")
        options = tuple(self.options)
        _checked_flag("static", self.static)
        if not options:
            raise ValueError("options must hold at least one label")
        if any(a is b or (type(a) is type(b) and a == b) for i, a in enumerate(options) for b in options[:i]):
            raise ValueError(f"options must differ from each other, not {list(options)!r}")
        shape = _checked_shape(self.shape)
        if self.static and shape:
            raise ValueError("a static choice must be a scalar: its label selects a program")
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "shape", shape)

    @property
    def run(self) -> Run:
        return Run(Kind.CHOICE, len(self.options))


def Bool(static: bool = False, shape: tuple[int, ...] = ()) -> Choice:
    """False or True; in a pure task a traced one arrives as a ``bool`` array."""
    return Choice((False, True), static=static, shape=shape)


def label_of(option: Any) -> Any:
    """An option as it is written down: plain values as they are, functions and classes by their full name."""
    if option is None or isinstance(option, (bool, int, float, str)):
        return option
    if isinstance(option, (list, tuple)):
        return [label_of(item) for item in option]
    if hasattr(option, "__qualname__"):
        return f"{option.__module__}.{option.__qualname__}"
    text = repr(option)
    return text if " at 0x" not in text else type(option).__qualname__


Leaf = Float | Int | Choice
LEAF_TYPES = (Float, Int, Choice)
