"""Functions and classes that a config names as ``module:name``."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxhpo.config.fields import Key, Problems, shown, suggestion


def search_in(folders: Sequence[Path]) -> None:
    """Makes modules in these folders importable, as those beside a script are."""
    for folder in reversed(folders):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))


def imported(problems: Problems, key: Key, text: str) -> Any:
    """What ``module:name`` names, or None where it cannot be had."""
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", text):
        problems.add(key, f'must be "module:function", not {shown(text)}')
        return None
    module_name, _, name = text.partition(":")
    try:
        importlib.invalidate_caches()
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            problems.add(key, f"there is no module {error.name}{_modules_like(module_name, problems.folders)}")
        else:
            problems.add(key, f"importing {module_name} failed: {error}; install it")
        return None
    except (Exception, SystemExit) as error:
        problems.add(key, f"importing {module_name} failed: {type(error).__name__}: {error}{_raised_at(error)}")
        return None
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            problems.add(key, f"{module_name} has no {name}; {suggestion(name, _functions_in(module))}")
            return None
        found = getattr(found, part)
    return found


def _functions_in(module: Any) -> list[str]:
    """Names of what a module itself defines that may be called; of a package, what it defines somewhere."""
    home = module.__name__
    homes = lambda one: str(getattr(one, "__module__", None) or "")
    own = {name: one for name, one in vars(module).items() if homes(one) == home or homes(one).startswith(f"{home}.")}
    return [name for name, one in own.items() if callable(one) and not name.startswith("_")]


def _modules_like(name: str, folders: Sequence[Path]) -> str:
    """A hint: a module of a similar name in the folders that are searched first."""
    parent, _, last = name.rpartition(".")
    inside = [folder.joinpath(*parent.split(".")) if parent else folder for folder in folders]
    names = {one.stem for folder in inside for one in folder.glob("*.py")}
    packages = {one.parent.name for folder in inside for one in folder.glob("*/*.py")}
    hint = suggestion(last, sorted((names | packages) - {"__init__"})) if names | packages else ""
    if hint.startswith("did you mean"):
        return f"; did you mean {parent + '.' if parent else ''}{hint.removeprefix('did you mean ')}"
    return f"; it is looked for in {', '.join(map(str, folders))} and among installed packages"


def _raised_at(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return ""  # its text says where
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
