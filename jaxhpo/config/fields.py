"""Checks of a config that need no JAX: problems with their dotted keys, and values against types.

Nothing here stops at the first mistake: each function adds what it finds to :class:`Problems` and goes on.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import difflib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxhpo.errors import JaxhpoError

Key = tuple[str | int, ...]
"""Where a value stands: names of tables and fields, and places in lists."""


class ConfigError(JaxhpoError):
    """Everything that is wrong with a config, one line each in ``problems``."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class Problems:
    """Mistakes found so far, at most one for each key.

    Args:
        source: the file, as the user named it.
        overrides: the text of each ``--set``, by the key that it sets; named beside a mistake that it may have made.
    """

    def __init__(self, source: str, overrides: Mapping[Key, str] | None = None):
        self.source, self.overrides = source, dict(overrides or {})
        self.folders: tuple[Path, ...] = ()  # where modules are looked for before installed ones
        self._lines: dict[Key, str] = {}

    def add(self, key: Key, text: str, *others: Key) -> None:
        """States that the value at ``key`` is wrong; ``others`` are keys that had a part in it."""
        if key in self._lines:
            return
        sets = [f"--set {text}" for at, text in self.overrides.items() if any(_related(at, one) for one in (key, *others))]
        where = " with ".join([self.source, *sets])
        self._lines[key] = _one_line(f"{where}: {dotted(key)}: {text}")

    def add_line(self, text: str) -> None:
        """States a mistake that belongs to no key."""
        self._lines.setdefault((text,), _one_line(f"{self.source}: {text}"))

    def under(self, key: Key) -> bool:
        """Whether anything at or below ``key`` is wrong."""
        return any(at[: len(key)] == key for at in self._lines)

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def lines(self) -> list[str]:
        return list(self._lines.values())

    def raise_all(self) -> None:
        if self._lines:
            raise ConfigError(self.lines)


def _one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", text)


def _related(one: Key, other: Key) -> bool:
    """Whether one key lies at or below the other. A place in a list may be a number or its digits."""
    shared = min(len(one), len(other))
    return shared > 0 and dotted(one[:shared]) == dotted(other[:shared])


def dotted(key: Key) -> str:
    """A key as TOML and ``--set`` write it: ``space.layers.0."odd name"``."""
    return ".".join(str(part) if re.fullmatch(r"[\w-]+", str(part), re.ASCII) else json.dumps(part) for part in key)


def shown(value: Any) -> str:
    """A value as TOML writes it, shortened."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (list, tuple)):
        text = f"[{', '.join(shown(item) for item in value[:6])}{', ...' if len(value) > 6 else ''}]"
    elif isinstance(value, (bool, str)):
        text = json.dumps(value, ensure_ascii=False)
    else:
        text = str(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def closest(word: str, names: Iterable[str]) -> str | None:
    """The name most like ``word``, whatever the case; None if none is close."""
    by_lower = {name.lower(): name for name in names}
    found = difflib.get_close_matches(str(word).lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def suggestion(word: str, names: Iterable[str], taken: Iterable[str] = ()) -> str:
    """``did you mean x?`` where a name is close, else the list of names that are not taken."""
    names = list(names)
    close = closest(word, names)
    if close is not None:
        return f"did you mean {close}?"
    free = [name for name in names if name not in taken] or names
    return f"must be one of {', '.join(free)}" if free else "there is none"


def check_names(problems: Problems, key: Key, table: Mapping[str, Any], names: Iterable[str], what: str) -> set[str]:
    """Each name in ``table`` must be among ``names``. Returns those that were probably meant: they are not missing."""
    names, meant = list(names), set()
    for name in table:
        if name not in names:
            problems.add((*key, name), f"unknown {what}; {suggestion(name, names, taken=table)}")
            meant.add(closest(name, names))
    return meant


def check_plain(problems: Problems, key: Key, value: Any) -> None:
    """No dates, no NaN, no infinity, and no whole number beyond the 64 bits of TOML anywhere in ``value``."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_plain(problems, (*key, name), item)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            check_plain(problems, (*key, place), item)
    elif isinstance(value, float) and not math.isfinite(value):
        problems.add(key, f"must be a finite number, not {value}")
    elif is_whole(value) and not -(2**63) <= value < 2**63:
        problems.add(key, f"must fit 64 bits, not {shown(value)}")
    elif isinstance(value, (datetime.date, datetime.time)):
        problems.add(key, f"must be a number, a string, true or false, not the date or time {value}")


# Values against annotations.


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_optimizer(hint: Any) -> bool:
    return isinstance(hint, type) and hasattr(hint, "ask") and hasattr(hint, "update")


def is_settings(hint: Any) -> bool:
    """Whether it is a dataclass of settings, a table in a config."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and not _is_optimizer(hint)


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(hint), typing.get_args(hint)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_list(hint: Any) -> bool:
    kind = typing.get_origin(hint) or hint
    return isinstance(kind, type) and kind is not str and issubclass(kind, collections.abc.Sequence)


def _is_callable(hint: Any) -> bool:
    return hint is collections.abc.Callable or typing.get_origin(hint) is collections.abc.Callable or hint is Callable


def expected(hint: Any) -> str:
    """What a value of this annotation is, in words."""
    origin, args = _parts(hint)
    if _is_union(hint):
        words = dict.fromkeys(expected(arg) for arg in args if arg is not type(None))
        return " or ".join(words)
    if origin is typing.Literal:
        return f"one of {', '.join(shown(arg) for arg in args)}"
    if origin is typing.Annotated:
        return expected(args[0])
    if hint is bool:
        return "true or false"
    if hint is int:
        return "a whole number"
    if hint is str or hint is Path:
        return "a string"
    if _is_list(hint):
        return f"a list of {_plural(args[0])}" if args else "a list"
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return "a table"
    if _is_callable(hint):
        return 'a function as "module:function"'
    if _is_optimizer(hint):
        return "a table with the name of an optimizer"
    if is_settings(hint):
        return f"a table of {', '.join(field.name for field in dataclasses.fields(hint))}"
    return "a number"


def _plural(hint: Any) -> str:
    return {bool: "true and false", int: "whole numbers", float: "numbers", str: "strings"}.get(hint, f"{expected(hint)} each")


def conforms(value: Any, hint: Any) -> bool:
    """Whether a TOML value may stand where ``hint`` is annotated. What the annotation leaves open passes."""
    origin, args = _parts(hint)
    if hint is Any or hint is inspect.Parameter.empty or hint is object or isinstance(hint, (typing.TypeVar, str)):
        return True
    if _is_union(hint):
        return any(conforms(value, arg) for arg in args)
    if origin is typing.Literal:
        return any(type(value) is type(arg) and value == arg for arg in args)
    if origin is typing.Annotated:
        return conforms(value, args[0])
    if hint is type(None):
        return False
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return is_whole(value)
    if hint is float:
        return is_number(value)
    if hint is str or hint is Path:
        return isinstance(value, str)
    if _is_list(hint):
        if not isinstance(value, list):
            return False
        if origin is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(conforms, value, args))
        return not args or all(conforms(item, args[0]) for item in value)
    if origin in (dict, collections.abc.Mapping) or hint is dict:
        return isinstance(value, dict)
    if _is_callable(hint):
        return isinstance(value, str) and ":" in value
    if _is_optimizer(hint) or is_settings(hint):
        return isinstance(value, dict)
    return is_number(value) or (isinstance(value, list) and all(conforms(item, hint) for item in value))  # an array


def converted(value: Any, hint: Any) -> Any:
    """A value that conforms, as the annotation wants it: whole numbers become floats, lists become tuples."""
    origin, args = _parts(hint)
    if _is_union(hint):
        exact = [arg for arg in args if conforms(value, arg)]
        return value if not exact or (is_whole(value) and int in exact) else converted(value, exact[0])
    if hint is float and is_whole(value):
        return float(value)
    if hint is Path:
        return Path(value)
    if isinstance(value, list) and (hint is tuple or origin in (tuple, collections.abc.Sequence)):
        inner = args[0] if args else Any
        return tuple(converted(item, inner) for item in value)
    return value


# Tables whose fields are those of a dataclass.


def entry(
    default: Any = dataclasses.MISSING,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A field of a table: its default, its limits, or its choices."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "above": above, "choices": choices})


def check_named(problems: Problems, key: Key, table: Any, field: str) -> None:
    """A table that says by ``field`` what it is: a task by its factory, an optimizer by its name."""
    due = {"factory": '"module:function"', "name": "the name of an optimizer"}[field]
    if not isinstance(table, dict):
        problems.add(key, f"must be a table, not {shown(table)}")
    elif field not in table:
        misspelt = closest(field, table)
        if misspelt is not None:
            problems.add((*key, misspelt), f"unknown field; did you mean {field}? It must be {due}")
        else:
            problems.add((*key, field), f"missing; must be {due}")
    elif not isinstance(table[field], str):
        problems.add((*key, field), f"must be {due}, not {shown(table[field])}")


def read_table(problems: Problems, key: Key, table: Any, cls: Any) -> Any:
    """The table as the dataclass ``cls``, or None where something in it is wrong."""
    if not isinstance(table, dict):
        problems.add(key, f"must be a table, not {shown(table)}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    meant = check_names(problems, key, table, fields, "field")
    for name, field in fields.items():
        if name not in table:
            if field.default is dataclasses.MISSING and name not in meant:
                problems.add((*key, name), f"missing; must be {limited(hints[name], field.metadata)}")
            continue
        if not conforms(table[name], hints[name]) or not within(table[name], field.metadata):
            problems.add((*key, name), f"must be {limited(hints[name], field.metadata)}, not {shown(table[name])}")
    if problems.under(key):
        return None
    return cls(**{name: converted(value, hints[name]) for name, value in table.items()})


def limited(hint: Any, limits: Mapping[str, Any]) -> str:
    """What a field with these limits may be, in words."""
    if limits.get("choices"):
        return f"one of {', '.join(shown(choice) for choice in limits['choices'])}"
    words, (low, high, above) = expected(hint), (limits.get(name) for name in ("low", "high", "above"))
    if above is not None:
        return f"{words} above {above}"
    if low is not None and high is not None:
        return f"{words} between {low} and {high}"
    return f"{words} of at least {low}" if low is not None else f"{words} of at most {high}" if high is not None else words


def within(value: Any, limits: Mapping[str, Any]) -> bool:
    """Whether a value keeps to its limits; text must not be blank."""
    if limits.get("choices"):
        return value in limits["choices"]
    if isinstance(value, str):
        return bool(value.strip())
    if not is_number(value):
        return True
    low, high, above = limits.get("low"), limits.get("high"), limits.get("above")
    return (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
