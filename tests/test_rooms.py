"""The order of rooms: each imports only from those above it. And what must not import JAX, does not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxhpo"
ROOMS = [
    "errors", "core", "space", "tasks", "surrogates", "optimizers", "fidelity", "hypergradients", "study", "analysis",
    "benchmarks", "integrations", "config", "cli",
]  # fmt: skip
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ROOMS)


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxhpo":
            parts = node.module.split(".")
            yield from ([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names if alias.name in ROOMS])
        elif isinstance(node, ast.Import):
            yield from (name.split(".")[1] for name in (a.name for a in node.names) if name.startswith("jaxhpo."))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_above_it(path):
    room = room_of(path)
    assert room in ROOMS
    for other in imported_rooms(path):
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports {other}"


@pytest.mark.parametrize(
    "module",
    ["jaxhpo", "jaxhpo.study", "jaxhpo.study.record", "jaxhpo.study.executors", "jaxhpo.optimizers.registry", "jaxhpo.cli",
     "jaxhpo.analysis.show", "jaxhpo.benchmarks.datasets"],
)  # fmt: skip
def test_light_modules_do_not_import_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    import jaxhpo

    for name in jaxhpo.__all__:
        assert getattr(jaxhpo, name) is not None
    for room in ("fidelity", "optimizers", "space", "study", "surrogates", "tasks"):
        module = getattr(jaxhpo, room)
        assert module.__all__
        for name in module.__all__:
            assert getattr(module, name) is not None
