"""From the tables of a config to a study: this needs JAX, the optimizers and the user's own code."""

from __future__ import annotations

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhpo.config.fields import (
    Key,
    Problems,
    check_named,
    check_names,
    conforms,
    converted,
    expected,
    is_settings,
    limited,
    shown,
    suggestion,
    within,
)
from jaxhpo.config.importing import imported, search_in
from jaxhpo.config.space_tables import is_leaf, leaves_of
from jaxhpo.errors import JaxhpoError

if TYPE_CHECKING:
    from jaxhpo.config.reading import Config
    from jaxhpo.study import Study


def build(config: Config) -> Study:
    """The study: imports its factory, calls it, and makes its space and its optimizer.

    The study's ``config`` holds the defaults too, so that it does not change when they do.

    Raises:
        ConfigError: with a line for each mistake.
    """
    from jaxhpo.study import Study

    problems = Problems(config.source, config.overrides)
    tables = {"task": config.task, "space": config.space, "optimizer": config.optimizer}
    found = examine(problems, tables, config.folders)
    problems.raise_all()
    config = dataclasses.replace(
        config, task={**_defaults_of(found.factory), **config.task}, optimizer=_resolved(config.optimizer, found.optimizer)
    )
    objective = _objective(problems, found.factory, found.arguments, config.task["factory"])
    problems.raise_all()
    return Study(
        objective=objective,
        space=found.space,
        optimizer=found.optimizer,
        config=config.to_dict(),
        **dataclasses.asdict(config.study),
    )


@dataclasses.dataclass
class _Found:
    """What a config names, as far as it could be made."""

    space: Any = None
    optimizer: Any = None
    factory: Any = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


def examine(problems: Problems, tables: Mapping[str, Any], folders: Sequence[Path]) -> _Found:
    """Makes the space and the optimizer and finds the factory; adds what is wrong."""
    problems.folders = tuple(dict.fromkeys((Path.cwd(), *folders)))
    search_in(problems.folders)
    found = _Found()
    if isinstance(tables.get("space"), dict):
        found.space = _space(problems, tables["space"])
    if isinstance(tables.get("optimizer"), dict):
        found.optimizer = _optimizer(problems, ("optimizer",), tables["optimizer"])
    if isinstance(tables.get("task"), dict):
        found.factory, found.arguments = _factory(problems, tables["task"])
    return found


def _space(problems: Problems, table: dict[str, Any]) -> Any:
    from jaxhpo.space import Space

    for key, leaf in leaves_of(table):
        if not problems.under(key):
            try:
                _leaf(leaf)
            except (ValueError, TypeError) as error:
                problems.add(key, str(error))
    if problems.under(("space",)):
        return None
    try:
        return Space(_tree(table))
    except (ValueError, TypeError) as error:
        problems.add(("space",), str(error))
    return None


def _tree(node: Any) -> Any:
    if is_leaf(node):
        return _leaf(node)
    if isinstance(node, dict):
        return {name: _tree(item) for name, item in node.items()}
    return [_tree(item) for item in node] if isinstance(node, list) else node


def _leaf(table: dict[str, Any]) -> Any:
    from jaxhpo.space import Bool, Choice, Float, Int

    fields = {name: value for name, value in table.items() if name != "type"}
    return {"float": Float, "int": Int, "choice": Choice, "bool": Bool}[table["type"]](**fields)


def _optimizer(problems: Problems, key: Key, table: dict[str, Any]) -> Any:
    """The optimizer that a table names; a field that is a table with a name is an optimizer itself."""
    name = table.get("name")
    cls = _optimizer_class(problems, (*key, "name"), name) if isinstance(name, str) else None
    if cls is None:
        return None
    made = _made(problems, key, cls, {field: value for field, value in table.items() if field != "name"})
    return None if made is None else _without_problems(problems, key, made)


def _made(problems: Problems, key: Key, cls: Any, given: dict[str, Any]) -> Any:
    """The dataclass with its fields as a table gives them; None after adding what is wrong."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = _hints(cls)
    meant = check_names(problems, key, given, fields, f"field of {cls.__name__}")
    values = {}
    for field_name, field in fields.items():
        at, hint = (*key, field_name), hints.get(field_name, Any)
        if field_name not in given:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field_name not in meant:
                problems.add(at, f"missing; must be {limited(hint, field.metadata)}")
        elif isinstance(given[field_name], dict) and is_settings(hint):
            values[field_name] = _made(problems, at, hint, given[field_name])
        elif isinstance(given[field_name], dict) and (_is_named(given[field_name]) or conforms({}, hint)):
            check_named(problems, at, given[field_name], "name")
            values[field_name] = _optimizer(problems, at, given[field_name])
        elif not conforms(given[field_name], hint) or not within(given[field_name], field.metadata):
            problems.add(at, f"must be {limited(hint, field.metadata)}, not {shown(given[field_name])}")
        elif isinstance(given[field_name], str) and not conforms("word", hint):
            values[field_name] = imported(problems, at, given[field_name])
        else:
            values[field_name] = converted(given[field_name], hint)
    if problems.under(key):
        return None
    try:
        return cls(**values)
    except (ValueError, TypeError, JaxhpoError) as error:
        problems.add(key, str(error))
    return None


def _is_named(table: dict[str, Any]) -> bool:
    return isinstance(table.get("name"), str)


def _without_problems(problems: Problems, key: Key, optimizer: Any) -> Any:
    """The optimizer, after its own word on its settings."""
    from jaxhpo.core import problems_of

    for line in problems_of(optimizer):
        path, _, text = line.partition(" = ")
        problems.add((*key, *path.split(".")), text.partition(": ")[2] + f", not {text.partition(': ')[0]}")
    return optimizer


def _optimizer_class(problems: Problems, key: Key, name: str) -> Any:
    from jaxhpo.optimizers import registry

    if ":" in name:
        cls = imported(problems, key, name)
        if cls is not None and not (dataclasses.is_dataclass(cls) and hasattr(cls, "ask") and hasattr(cls, "update")):
            problems.add(key, f"{name} is not an optimizer; must be a dataclass with init, ask and update")
            return None
        return cls
    if name not in registry.ENTRIES:
        problems.add(key, f'no optimizer is called "{name}"; {suggestion(name, registry.ENTRIES)}')
        return None
    return registry.load(name)


def _hints(thing: Any) -> dict[str, Any]:
    """Annotations; what cannot be resolved is left open."""
    if isinstance(thing, type) and not dataclasses.is_dataclass(thing):
        thing = thing.__init__
    try:
        return typing.get_type_hints(thing)
    except (NameError, TypeError, AttributeError):
        return {name: hint for name, hint in getattr(thing, "__annotations__", {}).items() if not isinstance(hint, str)}


# The factory.


def _factory(problems: Problems, table: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The function that makes the objective, and its arguments, checked against its signature."""
    text, key = table.get("factory"), ("task", "factory")
    if not isinstance(text, str):
        return None, {}
    factory = imported(problems, key, text)
    if factory is None:
        return None, {}
    if not callable(factory):
        problems.add(key, f"{text} is {type(factory).__name__} {shown(factory)}; must be a function that returns an objective")
        return None, {}
    try:
        parameters, hints = inspect.signature(factory).parameters, _hints(factory)
    except ValueError:  # some functions written in C
        problems.add(key, f"{text} has no signature; must be a Python function that returns an objective")
        return None, {}
    named = {name: one for name, one in parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    required = [name for name, one in named.items() if one.default is one.empty]
    if required == ["key", "hparams"]:
        problems.add(key, f"{text} takes (key, hparams), as an objective does; must be a function that returns the objective")
        return None, {}
    given = {name: value for name, value in table.items() if name != "factory"}
    meant = set()
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        meant = check_names(problems, ("task",), given, named, f"argument of {text}")
    arguments = {}
    for name, value in given.items():
        hint = _hint_of(named.get(name), hints)
        if not conforms(value, hint):
            problems.add(("task", name), f"must be {expected(hint)}, not {shown(value)}")
        arguments[name] = converted(value, hint)
    for name in required:
        if name not in given and name not in meant:
            hint = _hint_of(named[name], hints)
            what = "" if hint is Any else f"; must be {expected(hint)}"
            problems.add(("task", name), f"missing: {text} needs it{what}")
    return factory, arguments


def _hint_of(parameter: inspect.Parameter | None, hints: Mapping[str, Any]) -> Any:
    """The annotation of a parameter, or the type of its default."""
    if parameter is None:
        return Any
    if parameter.name in hints:
        return hints[parameter.name]
    default = parameter.default
    if isinstance(default, (bool, str, tuple)):
        return type(default)
    # A whole number as a default says nothing of fractions: an `int` stays one, and a `float` is let through.
    return float if isinstance(default, float) else int | float if isinstance(default, int) else Any


def _objective(problems: Problems, factory: Callable[..., Any], arguments: dict[str, Any], text: str) -> Any:
    """Calls the factory; what it refuses is a mistake in ``[task]``, any other error is one in its code."""
    try:
        objective = factory(**arguments)
    except (ValueError, JaxhpoError) as error:
        problems.add(("task",), f"{text} refused: {' '.join(str(error).split())}")
        return None
    kind = type(objective).__name__
    if kind == "Task":
        problems.add(("task", "factory"), f"{text} returned a Task; must return Training(task, num_steps)")
    elif not callable(objective) and kind not in ("Training", "HostFunction"):
        problems.add(
            ("task", "factory"),
            f"{text} returned {kind}; must return a loss function, a Training, an estimator or a HostFunction",
        )
    return objective


# Defaults, written out.


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _defaults_of(factory: Callable[..., Any]) -> dict[str, Any]:
    named = [one for one in inspect.signature(factory).parameters.values() if one.kind is not one.POSITIONAL_ONLY]
    return {one.name: _plain(one.default) for one in named if one.default is not one.empty and _is_plain(one.default)}


def _resolved(table: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's table with the values of all its fields that a table can hold."""
    resolved = dict(table)
    for field in dataclasses.fields(optimizer):
        value = getattr(optimizer, field.name)
        if isinstance(table.get(field.name), dict) and dataclasses.is_dataclass(value):
            resolved[field.name] = _resolved(table[field.name], value)
        elif field.name not in table and field.init and _is_plain(value):
            resolved[field.name] = _plain(value)
    return resolved
