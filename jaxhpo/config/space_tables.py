"""The ``[space]`` tables, checked without JAX: leaves, tables and lists of them, constants."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from jaxhpo.config.fields import Key, Problems, check_names, closest, is_number, is_whole, shown

LEAF_FIELDS: dict[str, tuple[str, ...]] = {
    "float": ("low", "high", "log", "shape"),
    "int": ("low", "high", "log", "shape"),
    "choice": ("options", "static", "shape"),
    "bool": ("static", "shape"),
}
"""The types of leaves in a ``[space]`` table, and what may stand beside ``type``."""

_ALIASES = {"integer": "int", "real": "float", "double": "float", "categorical": "choice", "boolean": "bool"}
_FIELDS_OF_LEAVES = {"type", *(name for names in LEAF_FIELDS.values() for name in names)}


def leaves_of(node: Any, key: Key = ("space",)) -> Iterable[tuple[Key, dict[str, Any]]]:
    """Every leaf table of a space with its key, in the order of the file."""
    if is_leaf(node):
        yield key, node
    elif isinstance(node, (dict, list)):
        for name, item in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves_of(item, (*key, name))


def is_leaf(node: Any) -> bool:
    """Whether a table is a leaf: it has a ``type`` that is not itself a table."""
    return isinstance(node, dict) and "type" in node and not isinstance(node["type"], (dict, list))


def check_space(problems: Problems, space: Any, key: Key = ("space",)) -> None:
    """Leaves, tables and lists of them, and constants; at least one leaf in all."""
    if not isinstance(space, dict):
        problems.add(key, f"must be a table, not {shown(space)}")
        return
    _check_node(problems, key, space)
    if not problems.under(key) and not any(True for _ in leaves_of(space, key)):
        problems.add(key, 'nothing may vary; give at least one [space.NAME] a type: "float", "int", "choice" or "bool"')


def _check_node(problems: Problems, key: Key, node: Any) -> None:
    if is_leaf(node):
        _check_leaf(problems, key, node)
    elif isinstance(node, dict):
        if _lacks_type(node) and len(key) > 1:
            _report_lacking_type(problems, key, node)
            return
        if not node and len(key) > 1:
            problems.add(key, 'an empty table; must have a type ("float", "int", "choice" or "bool"), or be left out')
        for name, item in node.items():
            _check_node(problems, (*key, name), item)
    elif isinstance(node, list):
        if not node:
            problems.add(key, "an empty list; must hold leaves or constants, or be left out")
        for place, item in enumerate(node):
            _check_node(problems, (*key, place), item)
    elif not isinstance(node, (bool, int, float, str)):
        problems.add(key, f"must be a table with a type or a constant, not {shown(node)}")


def _lacks_type(node: dict[str, Any]) -> bool:
    """A leaf whose ``type`` was forgotten or misspelt, rather than a table that nests or holds constants."""
    if any(isinstance(value, dict) for value in node.values()):
        return False
    known = [name for name in node if name in _FIELDS_OF_LEAVES]
    if _misspelt_type(node) is not None:
        return bool(known) or len(node) == 1
    return bool(known) and (len(known) == len(node) or {"low", "high"} <= set(known) or "options" in known)


def _misspelt_type(node: dict[str, Any]) -> str | None:
    """The name in a table without ``type`` that was meant to be it."""
    named = [name for name, value in node.items() if isinstance(value, str) and value in LEAF_FIELDS]
    return closest("type", named)


def _report_lacking_type(problems: Problems, key: Key, node: dict[str, Any]) -> None:
    misspelt = _misspelt_type(node)
    if misspelt is not None:
        problems.add((*key, misspelt), "unknown field; did you mean type?")
    else:
        problems.add((*key, "type"), 'missing; must be "float", "int", "choice" or "bool"')


def _check_leaf(problems: Problems, key: Key, leaf: dict[str, Any]) -> None:
    kind = leaf["type"]
    if not isinstance(kind, str) or kind not in LEAF_FIELDS:
        close = closest(kind, [*LEAF_FIELDS, *_ALIASES]) if isinstance(kind, str) else None
        hint = "" if close is None else f'; did you mean "{_ALIASES.get(close, close)}"?'
        problems.add((*key, "type"), f'must be "float", "int", "choice" or "bool", not {shown(kind)}{hint}')
        return
    meant = check_names(problems, key, leaf, ("type", *LEAF_FIELDS[kind]), f"field of {kind} leaves")
    for name in ("log", "static"):
        if name in leaf and not isinstance(leaf[name], bool):
            problems.add((*key, name), f"must be true or false, not {shown(leaf[name])}")
    if "shape" in leaf and not _is_shape(leaf["shape"]):
        due = "a list of whole numbers of at least 1, in all 2**24 values at most"
        problems.add((*key, "shape"), f"must be {due}, not {shown(leaf['shape'])}")
    if kind in ("float", "int"):
        _check_bounds(problems, key, leaf, kind, meant)
    elif kind == "choice" and "options" not in meant:
        _check_options(problems, key, leaf)
    if leaf.get("static") is True and leaf.get("shape", []) not in ([], None):
        problems.add((*key, "shape"), "must be left out where static = true: its label selects a program")


def _is_shape(shape: Any) -> bool:
    sizes = shape if isinstance(shape, list) else [shape]
    return all(is_whole(size) and size >= 1 for size in sizes) and math.prod(sizes) <= 2**24


def _check_bounds(problems: Problems, key: Key, leaf: dict[str, Any], kind: str, meant: set[str]) -> None:
    fits, words = (is_whole, "a whole number") if kind == "int" else (is_number, "a number")
    for name in ("low", "high"):
        if name not in leaf:
            if name not in meant:
                problems.add((*key, name), f"missing; must be {words}, the {name}est value of this {kind}")
        elif not fits(leaf[name]):
            problems.add((*key, name), f"must be {words}, not {shown(leaf[name])}")
    if problems.under((*key, "low")) or problems.under((*key, "high")) or not {"low", "high"} <= set(leaf):
        return
    low, high, at = leaf["low"], leaf["high"], (*key, "low")
    if low >= high:
        hint = "; swap them" if low > high else ""
        problems.add(at, f"must be below high, not {shown(low)} with high = {shown(high)}{hint}", (*key, "high"))
    elif leaf.get("log") is True and low <= 0:
        least = "at least 1" if kind == "int" else "above 0"
        problems.add(at, f"must be {least} where log = true, not {shown(low)}", (*key, "log"))


def _check_options(problems: Problems, key: Key, leaf: dict[str, Any]) -> None:
    at = (*key, "options")
    if "options" not in leaf:
        problems.add(at, "missing; must be a list of labels")
        return
    options = leaf["options"]
    if not isinstance(options, list) or not options:
        problems.add(at, f"must be a list of at least one label, not {shown(options)}")
        return
    for place, option in enumerate(options):
        if not isinstance(option, (bool, int, float, str)):
            problems.add((*at, place), f"must be a string, a number, true or false, not {shown(option)}")
        elif any(type(option) is type(other) and option == other for other in options[:place]):
            problems.add(at, f"must differ from each other, but {shown(option)} stands there twice")
