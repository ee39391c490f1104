"""Python files that hold a configuration: run once, with each mistake as one line."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxhpo.errors import JaxhpoError


def module_at(path: Path) -> ModuleType:
    """The module that a file makes. It can import its neighbours, as a script can.

    Raises:
        JaxhpoError: if there is no such file, or running it fails.
    """
    if not path.is_file():
        raise JaxhpoError(f"{path}: no such file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    known = sys.modules.get(path.stem)
    own = known is None or getattr(known, "__file__", None) == str(path.resolve())
    name = path.stem if own else f"{path.stem} at {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise JaxhpoError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look for their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise JaxhpoError(f"{path}: {_told(error, path)}") from None
    return module


def called(path: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of the file returns.

    Raises:
        JaxhpoError: if it raises.
    """
    try:
        return function(*arguments)
    except JaxhpoError:
        raise
    except Exception as error:
        name = getattr(function, "__name__", "its function")
        raise JaxhpoError(f"{path}: {name}: {_told(error, path)}") from None


def _told(error: BaseException, path: Path) -> str:
    """The error, and the last line of the file that had a part in it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return text  # it says where
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name]
    return f"line {frames[-1].lineno}: {text}" if frames else text
