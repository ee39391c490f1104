"""What there is, as rows of a name and a line on it; found without importing JAX or anyone's code."""

from __future__ import annotations

import ast
from pathlib import Path

from jaxhpo.errors import JaxhpoError

_OBJECTIVES = {
    "Training",
    "HostFunction",
    "Objective",
    "Estimator",
    "Unrolled",
    "Forward",
    "Truncated",
    "Implicit",
    "Evolution",
}


def optimizers() -> list[tuple[str, str]]:
    from jaxhpo.optimizers.registry import ENTRIES

    return [(name, entry.description) for name, entry in ENTRIES.items()]


def data() -> list[tuple[str, str]]:
    from jaxhpo.benchmarks.datasets import DATASETS, is_ready

    return [(name, known.summary + ("" if is_ready(name) else "; not fetched yet")) for name, known in DATASETS.items()]


def leaves() -> list[tuple[str, str]]:
    from jaxhpo.config.space_tables import LEAF_FIELDS

    what = {
        "float": "a real number in [low, high]",
        "int": "a whole number, low and high included",
        "choice": "one of the options, without an order",
        "bool": "true or false",
    }
    optional = {"log": "log = false", "shape": "shape = []", "static": "static = false"}
    return [
        (name, f"{what[name]}: {', '.join(optional.get(field, field) for field in LEAF_FIELDS[name])}") for name in LEAF_FIELDS
    ]


def tasks(folder: Path | None = None) -> list[tuple[str, str]]:
    """Factories in ``experiments/*.py`` below the current directory: public functions annotated to return an objective.

    Raises:
        JaxhpoError: if there is no such folder.
    """
    folder = folder or Path("experiments")
    if not folder.is_dir():
        raise JaxhpoError(
            f"there is no folder {folder} here; tasks are the functions in {folder}/*.py that return an objective; your own "
            'need no list: factory = "mine:task" in a config takes the function task of mine.py'
        )
    found = []
    for path in sorted(folder.glob("[!_]*.py")):
        try:
            module = ast.parse(path.read_bytes(), str(path))
        except (SyntaxError, ValueError) as error:
            found.append((f"{folder.name}.{path.stem}", f"cannot be read: {error}"))
            continue
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and _returns_objective(node):
                line = (ast.get_docstring(node) or "").split("\n")[0]
                found.append((f"{folder.name}.{path.stem}:{node.name}", f"{line} {_options(node)}".strip()))
    return found


def _returns_objective(node: ast.FunctionDef) -> bool:
    """Whether an objective's name occurs in the annotation, bare, qualified or quoted."""
    if node.returns is None:
        return False
    names = {part.id for part in ast.walk(node.returns) if isinstance(part, ast.Name)}
    names |= {part.attr for part in ast.walk(node.returns) if isinstance(part, ast.Attribute)}
    texts = [part.value for part in ast.walk(node.returns) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return bool(_OBJECTIVES & (names | {text.rpartition(".")[2] for text in texts}))


def _options(node: ast.FunctionDef) -> str:
    """The parameters with their defaults, as a config may set them."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    shown = [one.arg if default is None else f"{one.arg}={ast.unparse(default)}" for one, default in pairs]
    return f"({', '.join(shown)})" if shown else ""
