"""Configs as ``ml_collections.ConfigDict`` holds them, or anything alike, as plain tables. Nothing is imported for it.

A config file of Python has a function ``get_config``, with one argument where ``file.py:argument`` gives one:

    def get_config():
        config = ConfigDict()
        config.study = {"num_trials": 100}
        config.task = {"factory": task, "num_steps": 300}         # the function itself, or "module:function"
        config.space = {"lr": jaxhpo.Float(1e-4, 1.0, log=True)}  # leaves, or tables as in TOML
        config.optimizer = jaxhpo.PSO(num_lanes=32)               # likewise
        return config
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations.python_file import called, module_at


def is_table(node: Any) -> bool:
    """Whether it is a mapping, or gives itself as one by ``to_dict`` or ``items``."""
    if isinstance(node, type):
        return False
    return isinstance(node, Mapping) or any(callable(getattr(node, name, None)) for name in ("to_dict", "items"))


def plain(node: Any) -> Any:
    """Tables, lists, numbers, texts, true and false, as TOML has them.

    References to fields are resolved, tuples become lists, numbers of NumPy those of Python, leaves and optimizers their
    tables, functions ``module:name``; None is left out of tables.
    """
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return _settings(node)
    if callable(getattr(node, "get", None)) and callable(getattr(node, "get_type", None)) and not hasattr(node, "items"):
        return plain(node.get())  # a FieldReference
    if is_table(node):
        if not isinstance(node, Mapping):
            node = node.to_dict() if hasattr(node, "to_dict") else dict(node.items())
        return {str(name): plain(value) for name, value in node.items() if value is not None}
    if isinstance(node, (list, tuple)):
        return [plain(item) for item in node]
    if hasattr(node, "tolist"):
        return node.tolist()
    if isinstance(node, Path):
        return str(node)
    if hasattr(node, "__qualname__") and callable(node):
        return f"{node.__module__}:{node.__qualname__}"
    return node


def _settings(node: Any) -> dict[str, Any]:
    """A leaf, an optimizer, or settings within one, with the fields that are not at their default."""
    cls = type(node)
    given = {
        field.name: getattr(node, field.name)
        for field in dataclasses.fields(node)
        if field.init and not _same(getattr(node, field.name), field.default)
    }
    if cls.__module__ == "jaxhpo.space.leaves":
        return {"type": cls.__name__.lower(), **plain(given)}
    if hasattr(node, "ask") and hasattr(node, "update"):
        own = cls.__module__.startswith(("jaxhpo.optimizers.", "jaxhpo.fidelity."))
        return {"name": cls.__name__ if own else f"{cls.__module__}:{cls.__qualname__}", **plain(given)}
    return plain(given)


def _same(one: Any, other: Any) -> bool:
    try:
        return type(one) is type(other) and bool(one == other)
    except (TypeError, ValueError):  # arrays
        return False


def python_config(source: str) -> tuple[Path, str | None] | None:
    """The file and the argument that ``file.py`` or ``file.py:argument`` name; None for another kind of file."""
    found = re.fullmatch(r"(.+\.py)(?::(.*))?", source, re.DOTALL)
    return None if found is None else (Path(found[1]), found[2])


def from_python(path: Path, argument: str | None = None) -> dict[str, Any]:
    """The tables of a config file of Python.

    Raises:
        JaxhpoError: without a function ``get_config``, or where it fails or returns no config.
    """
    function = getattr(module_at(path), "get_config", None)
    if not callable(function):
        raise JaxhpoError(f"{path}: there is no function get_config in it")
    config = called(path, function, *(() if argument is None else (argument,)))
    if not is_table(config):
        raise JaxhpoError(f"{path}: get_config returned {type(config).__name__}; must return a ConfigDict or a dictionary")
    return plain(config)
