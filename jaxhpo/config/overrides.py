"""Overrides of single values of a config: ``--set optimizer.inertia=0.7``."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from jaxhpo.config.fields import Key, Problems, dotted, shown, suggestion
from jaxhpo.config.space_tables import is_leaf

TABLES = ("study", "task", "space", "optimizer", "report")


def override(problems: Problems, tables: dict[str, Any], text: str) -> None:
    """Sets one value in ``tables``, or adds what is wrong with the text."""
    name, equals, value_text = text.partition("=")
    key = _parsed_key(name.strip())
    if not equals or key is None:
        problems.add_line(f"--set {text}: must be KEY=VALUE, such as study.num_trials=128")
        return
    problems.overrides[key] = text
    if key[0] not in TABLES:
        problems.add(key, f"unknown table; {suggestion(str(key[0]), TABLES)}")
        return
    try:
        value = _parsed_value(value_text.strip())
    except ValueError as error:
        problems.add(key, str(error))
        return
    _put(problems, tables, key, value)


def _parsed_key(name: str) -> Key | None:
    """A dotted key as TOML reads it; parts that are whole numbers are places in lists."""
    try:
        node = tomllib.loads(f"{name} = 0") if "\n" not in name else {}
    except tomllib.TOMLDecodeError:
        return None
    parts: list[str] = []
    while isinstance(node, dict) and node:
        part, node = next(iter(node.items()))
        parts.append(part)
    return tuple(parts) or None


def _parsed_value(text: str) -> Any:
    """A TOML value, or a plain word as a string."""
    try:
        parsed = tomllib.loads(f"value = {text}")
        if list(parsed) == ["value"]:
            return parsed["value"]
    except tomllib.TOMLDecodeError:
        pass
    if text.lower() in ("true", "false"):
        raise ValueError(f"must be {text.lower()}, not {text}")
    if text.lower() in ("none", "null", "nil", ""):
        raise ValueError("must be a value; leave the option out to have the default")
    if re.fullmatch(r"[A-Za-z_][\w.:/-]*", text):
        return text
    raise ValueError("must be a TOML value: a number, true, false, a string in quotes, a list in brackets")


def _put(problems: Problems, tables: dict[str, Any], key: Key, value: Any) -> None:
    """Replaces or adds the value at ``key``. In ``[space]`` only what the file has, and fields of a leaf."""
    node: Any = tables
    for depth, part in enumerate(key):
        here, last = key[: depth + 1], depth == len(key) - 1
        if isinstance(node, list):
            if not str(part).isdigit() or int(part) >= len(node):
                problems.add(here, f"must be a place in the list, 0 to {len(node) - 1}")
                return
            part = int(part)
        elif not isinstance(node, dict):
            problems.add(here, f"{dotted(key[:depth])} is {shown(node)}, not a table; set {dotted(key[:depth])} itself")
            return
        elif part not in node:
            if key[0] == "space" and depth > 0 and not (last and is_leaf(node)):
                problems.add(here, f"no such hyperparameter in the file; {suggestion(str(part), node)}")
                return
            if not last:
                node[part] = {}
        if last:
            node[part] = value
        else:
            node = node[part]
