"""How a function on the host is called, and what it may return. Only the standard library is imported here."""

from __future__ import annotations

import functools
import inspect
import numbers
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

SCALAR_METRIC = "loss"
"""The name under which the value of a function that returns a bare number is reported."""


def caller(fn: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """``fn`` as a function of (hparams, seed), whether or not it takes a seed."""
    try:
        parameter = inspect.signature(fn).parameters.get("seed")
    except (TypeError, ValueError):  # some functions written in C have no signature
        parameter = None
    bound = isinstance(fn, functools.partial) and "seed" in fn.keywords
    if parameter is None or bound or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return lambda hparams, seed: fn(hparams)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return fn
    return lambda hparams, seed: fn(hparams, seed=seed)


def metrics_of(value: Any) -> dict[str, float]:
    """A returned value as floats by name; a number alone is the ``loss``.

    Raises:
        TypeError: for anything but numbers; it says what was returned and what is due.
    """
    due = "a number, or a dict of numbers by name, is due"
    if isinstance(value, Mapping):
        if not value:
            raise TypeError(f"the objective returned an empty dict; {due}")
        metrics = {}
        for name, entry in value.items():
            number = _number(entry)
            if not isinstance(name, str):
                raise TypeError(f"the objective returned a dict with the key {reprlib.repr(name)}; {due}")
            if number is None:
                raise TypeError(f"the objective returned a dict with {name!r}: {described(entry)}; {due}")
            metrics[name] = number
        return metrics
    number = _number(value)
    if number is None:
        raise TypeError(f"the objective returned {described(value)}; {due}")
    return {SCALAR_METRIC: number}


def _number(value: Any) -> float | None:
    """A real number, a numpy scalar or a 0-d array as a float; None for anything else."""
    if not isinstance(value, numbers.Real):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        if isinstance(value, (str, bytes)) or getattr(value, "shape", None) != () or kind in tuple("cmMOSU"):
            return None
    try:
        return float(value)
    except Exception:
        return None


def described(value: Any) -> str:
    """A value that was not expected, by its type and, in short, what it holds."""
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} {reprlib.repr(value)}" if not shape else f"{type(value).__name__} of shape {tuple(shape)}"
