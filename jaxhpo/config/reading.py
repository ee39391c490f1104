"""A study as a TOML file, or as a mapping in Python: read, checked, and built.

    file --load--> Config (plain typed tables; no JAX) --build--> Study

Each mistake is one line with the file, the dotted key, what is wrong and what would be right. All are told at once:
where ``load`` finds some, it also looks for those that only ``build`` could find, and raises them together.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxhpo.config.building import examine
from jaxhpo.config.fields import (
    ConfigError,
    Key,
    Problems,
    check_named,
    check_names,
    check_plain,
    closest,
    entry,
    read_table,
    shown,
)
from jaxhpo.config.overrides import TABLES, override
from jaxhpo.config.space_tables import check_space
from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations.config_dict import from_python, is_table, plain, python_config


@dataclasses.dataclass(frozen=True)
class StudyTable:
    """``[study]``: how long to search, and for what."""

    name: str
    num_trials: int | None = entry(None, low=1, high=2**30 - 1)
    seed: int = entry(0, low=0, high=2**32 - 1)
    metric: str | None = entry(None)
    direction: str = entry("minimize", choices=("minimize", "maximize"))
    shard_width: int | None = entry(None, low=1)
    devices: int | None = entry(None, low=1)
    max_seconds: float | None = entry(None, above=0)
    max_steps: int | None = entry(None, low=1)
    target: float | None = entry(None)
    seeds: int = entry(1, low=1, high=4096)
    seed_quantile: float | None = entry(None, low=0.0, high=1.0)
    race: float | None = entry(None, above=0, high=0.5)


@dataclasses.dataclass(frozen=True)
class ReportTable:
    """``[report]``: on how many fresh seeds the winner is trained again, so that its score has an interval; 0 for none."""

    seeds: int = entry(16, low=0, high=100_000)


@dataclasses.dataclass(frozen=True)
class Config:
    """A config whose structure is sound.

    Attributes:
        source: the file as the user named it, for messages.
        folders: where factories are looked for after the current directory: the file's folder and the one above it.
        overrides: the text of each ``--set`` by its key, for messages.
        study, task, space, optimizer, report: the tables.
    """

    source: str
    folders: tuple[Path, ...]
    study: StudyTable
    task: dict[str, Any]
    space: dict[str, Any]
    optimizer: dict[str, Any]
    report: ReportTable
    overrides: dict[Key, str] = dataclasses.field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; :meth:`from_dict` reads it back."""
        tables = {
            name: {key: value for key, value in dataclasses.asdict(table).items() if value is not None}
            for name, table in (("study", self.study), ("report", self.report))
        }
        plain = {"task": self.task, "space": self.space, "optimizer": self.optimizer}
        return copy.deepcopy({**tables, **plain})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "the recorded config", folders: Sequence[Path] = ()) -> Config:
        """The inverse of :meth:`to_dict`, but for ``source`` and ``folders``: a record may have been moved.

        Args:
            data: the tables; a mapping of any kind, such as a ConfigDict (:mod:`jaxhpo.integrations.config_dict`).

        Raises:
            ConfigError: if it is not such a dictionary, as for a study that was not started from a file.
        """
        data = plain(data)
        if not all(isinstance(data.get(name), dict) for name in ("study", "task", "space", "optimizer")):
            raise ConfigError([f"{source}: not made by a config file; go on with it from the program that started it"])
        return _checked(Problems(source), copy.deepcopy(data), tuple(folders))


def load(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a config.

    Args:
        config: a TOML file; a Python file with a function ``get_config``, and after a colon its argument; or the tables
            themselves, as a mapping of any kind, such as a ConfigDict (:mod:`jaxhpo.integrations.config_dict`).
        overrides: texts such as ``optimizer.inertia=0.7``; values are TOML, and plain words need no quotes.

    Raises:
        ConfigError: with a line for each mistake.
    """
    source, path, tables = _tables(config)
    problems = Problems(source)
    for text in overrides:
        override(problems, tables, text)
    if isinstance(tables.get("study", {}), dict):
        tables.setdefault("study", {}).setdefault("name", path.stem)
    folder = path.resolve().parent
    return _checked(problems, tables, (folder, folder.parent))


# The file.


def _tables(config: Any) -> tuple[str, Path, dict[str, Any]]:
    """What to call a config, the file that it is or would be, and its tables."""
    if not isinstance(config, (str, Path)):
        if not is_table(config):
            raise ConfigError([f"config: must be a file, a ConfigDict or a dictionary, not {type(config).__name__}"])
        return "config", Path("study.toml"), plain(config)
    source = str(config)
    python = python_config(source)
    if python is None:
        return source, Path(source), _parsed(source, Path(source))
    try:
        return source, python[0], from_python(*python)
    except JaxhpoError as error:
        raise ConfigError(str(error).splitlines()) from None


def _parsed(source: str, path: Path) -> dict[str, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError([f"{source}: no such file{_neighbours(path)}"]) from None
    except IsADirectoryError:
        inside = [str(one) for one in sorted(path.glob("*.toml"))]
        raise ConfigError([f"{source}: a directory; name a TOML file{f', such as {inside[0]}' if inside else ''}"]) from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError([f"{source}: line {line}: not UTF-8 (byte {error.start}); save the file as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"{source}: cannot be read: {error.strerror}"]) from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{source}: {_syntax_error(str(error), text)}"]) from None
    except RecursionError:
        raise ConfigError([f"{source}: nested too deeply; a config needs a few levels at most"]) from None


def _neighbours(path: Path) -> str:
    """A hint: a file of a similar name, or those there are."""
    names = sorted(one.name for one in path.parent.glob("*.toml"))
    close = closest(path.name, names)
    if close is not None:
        return f"; did you mean {path.with_name(close)}?"
    return f"; in {path.parent} there are {', '.join(names[:8])}" if names else "; give the path of a TOML file"


def _syntax_error(message: str, text: str) -> str:
    place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    what = message[: place.start()] if place else message
    lines = text.split("\n")
    number = int(place[1]) if place and place[1] else len(lines)
    if "overwrite" in what or "twice" in what:
        what += "; each key may be given once"
    elif what == "Invalid value":
        what += "; strings take quotes, and numbers, true and false none"
    return f"line {number}: not TOML: {lines[number - 1].strip()[:80]!r}: {what[:1].lower()}{what[1:]}"


# The structure.


def _checked(problems: Problems, tables: dict[str, Any], folders: tuple[Path, ...]) -> Config:
    """Checks all that can be checked without JAX; and the rest too if something is wrong, as it will be told anyway."""
    meant = check_names(problems, (), tables, TABLES, "table")
    for name, what in (("task", "a factory"), ("space", "what may vary"), ("optimizer", "a name and num_lanes")):
        if name not in tables and name not in meant:
            problems.add((name,), f"missing; must be a table with {what}")
    check_plain(problems, (), tables)
    study = None if "study" in meant else read_table(problems, ("study",), tables.get("study"), StudyTable)
    if study is not None and re.search(r"[/\\\0]", study.name):
        problems.add(("study", "name"), f"must be fit for the name of a folder, without / and \\, not {shown(study.name)}")
    if study is not None and not any((study.num_trials, study.max_seconds, study.max_steps, study.target is not None)):
        wanted = "must be a whole number of at least 1, unless max_steps, max_seconds or target is given"
        problems.add(("study", "num_trials"), wanted)
    report = read_table(problems, ("report",), tables.get("report", {}), ReportTable)
    if "space" in tables:
        check_space(problems, tables["space"])
    for name, field in (("task", "factory"), ("optimizer", "name")):
        if name in tables:
            check_named(problems, (name,), tables[name], field)
    if problems or study is None or report is None:
        examine(problems, tables, folders)
        raise ConfigError(problems.lines)
    return Config(
        source=problems.source,
        folders=folders,
        study=study,
        task=tables["task"],
        space=tables["space"],
        optimizer=tables["optimizer"],
        report=report,
        overrides=problems.overrides,
    )
