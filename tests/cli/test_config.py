"""Configs: good ones build what they say; every mutated one is refused by lines that name the file, the key and the remedy."""

import copy
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import jax
import pytest

from jaxhpo.analysis.config_text import to_toml
from jaxhpo.config import Config, ConfigError, build, load
from jaxhpo.optimizers import PSO
from jaxhpo.space import Bool, Choice, Float, Int, Space

MODULE = '''
from __future__ import annotations
from typing import Literal
import jax, jax.numpy as jnp
from jaxhpo.core import Optimizer, Query, pytree_dataclass, setting

NOT_A_FUNCTION = 3

def bowl(label: str, num_steps: int = 5, scale: float = 1.0, mode: Literal["plain", "noisy"] = "plain", flag: bool = False,
         centre: tuple[float, ...] = (0.5,), plain_default=2.0, gone: float | None = None):
    """A bowl."""
    def loss(key, hparams):
        return scale * (hparams["learning_rate"] - centre[0]) ** 2
    loss.arguments = dict(label=label, num_steps=num_steps, scale=scale, mode=mode, flag=flag, centre=centre,
                          plain_default=plain_default, gone=gone)
    return loss

def picky(label: str):
    raise ValueError("label is not\\n  to my taste")

def number(label: str):
    return 3

def loss(key, hparams):
    return 0.0

@pytree_dataclass
class Halving:
    sampler: Optimizer
    factor: int = setting(3, static=True, low=2)
    keep: float = setting(0.5, low=0.0, high=1.0)
    order: str = setting("best", static=True, choices=("best", "random"))

    @property
    def num_lanes(self):
        return self.sampler.num_lanes

    def init(self, key, spec):
        return self.sampler.init(key, spec)

    def ask(self, key, state):
        return self.sampler.ask(key, state)

    def update(self, key, state, query, feedback):
        return self.sampler.update(key, state, query, feedback)
'''

GOOD: dict[str, Any] = {
    "study": {
        "name": "toy",
        "num_trials": 64,
        "seed": 3,
        "metric": "loss",
        "direction": "minimize",
        "shard_width": 4,
        "devices": 1,
        "max_seconds": 60.0,
    },
    "task": {
        "factory": "config_toys:bowl",
        "label": "words",
        "num_steps": 7,
        "scale": 2.0,
        "mode": "noisy",
        "flag": True,
        "centre": [0.25, 0.5],
        "plain_default": 1.5,
    },
    "space": {
        "learning_rate": {"type": "float", "low": 0.001, "high": 1.0, "log": True},
        "decay": {"type": "float", "low": -1.0, "high": 1.0, "shape": [2, 3]},
        "width": {"type": "int", "low": 4, "high": 64, "log": True},
        "activation": {"type": "choice", "options": ["relu", "gelu"], "static": True},
        "nesterov": {"type": "bool"},
        "block": {"dropout": {"type": "float", "low": 0.0, "high": 0.5}, "constant": 3},
        "layers": [{"units": {"type": "int", "low": 1, "high": 9}}, {"units": {"type": "int", "low": 2, "high": 8}}],
    },
    "optimizer": {
        "name": "config_toys:Halving",
        "factor": 2,
        "keep": 0.25,
        "order": "random",
        "sampler": {"name": "PSO", "num_lanes": 8, "inertia": 0.6, "neighbourhood": "ring"},
    },
    "report": {"seeds": 4},
}

LEAVES = {
    "space.learning_rate": "float",
    "space.decay": "float",
    "space.width": "int",
    "space.activation": "choice",
    "space.nesterov": "bool",
    "space.block.dropout": "float",
    "space.layers.0.units": "int",
    "space.layers.1.units": "int",
}
BOUNDED = [path for path, kind in LEAVES.items() if kind in ("float", "int")]
WHOLE = ["study.num_trials", "study.seed", "study.shard_width", "study.devices", "task.num_steps", "optimizer.factor",
         "optimizer.sampler.num_lanes", "report.seeds"]  # fmt: skip
WHOLE += [f"{path}.{end}" for path in BOUNDED if LEAVES[path] == "int" for end in ("low", "high")]
NUMBERS = ["study.max_seconds", "task.scale", "task.plain_default", "optimizer.keep", "optimizer.sampler.inertia"]
NUMBERS += [f"{path}.{end}" for path in BOUNDED if LEAVES[path] == "float" for end in ("low", "high")]
TEXTS = ["study.name", "study.metric", "task.label", "task.factory", "optimizer.name", "optimizer.sampler.name"]
FLAGS = ["task.flag", "space.learning_rate.log", "space.width.log", "space.activation.static"]
ONE_OF = {
    "study.direction": "minimize",
    "task.mode": "plain",
    "optimizer.order": "best",
    "optimizer.sampler.neighbourhood": "global",
}
MISSPELT = [
    "study.num_trials",
    "study.seed",
    "study.metric",
    "study.direction",
    "study.shard_width",
    "study.devices",
    "study.max_seconds",
    "task.factory",
    "task.label",
    "task.num_steps",
    "task.scale",
    "task.flag",
    "task.centre",
    "optimizer.name",
    "optimizer.factor",
    "optimizer.sampler",
    "optimizer.sampler.name",
    "optimizer.sampler.num_lanes",
    "optimizer.sampler.inertia",
    "optimizer.sampler.neighbourhood",
    "report.seeds",
    "study",
    "task",
    "space",
    "optimizer",
    "report",
    "space.learning_rate.log",
    "space.decay.shape",
    "space.activation.static",
    "space.activation.options",
]
MISSPELT += [f"{path}.type" for path in LEAVES] + [f"{path}.{end}" for path in BOUNDED for end in ("low", "high")]


def parts(path):
    return [int(part) if part.isdigit() else part for part in path.split(".")]


def changed(path, value, tables=GOOD):
    """The tables with one value replaced or added."""
    tables = copy.deepcopy(tables)
    node: Any = tables
    *above, last = parts(path)
    for part in above:
        node = node[part]
    node[last] = value
    return tables


def without(path, tables=GOOD):
    tables = copy.deepcopy(tables)
    node: Any = tables
    *above, last = parts(path)
    for part in above:
        node = node[part]
    del node[last]
    return tables


def renamed(path, name):
    tables = copy.deepcopy(GOOD)
    node: Any = tables
    *above, last = parts(path)
    for part in above:
        node = node[part]
    node[name] = node.pop(last)
    return tables, ".".join([*map(str, above), name])


def mutations():
    """``(what, tables, key, remedy)``: a config with one mistake, where it is, and what its line says would be right."""
    for path in ["task.factory", "task.label", "optimizer.name", "optimizer.sampler",
                 "optimizer.sampler.name",
                 "optimizer.sampler.num_lanes", "task", "space", "optimizer", "space.activation.options"]:  # fmt: skip
        yield f"drop {path}", without(path), path, "must be"
    for path in BOUNDED:
        for end in ("low", "high"):
            yield f"drop {path}.{end}", without(f"{path}.{end}"), f"{path}.{end}", f"the {end}est value"
    for path in LEAVES:
        if path != "space.nesterov":  # where nothing else is left, the table itself is what is wrong
            yield f"drop {path}.type", without(f"{path}.type"), f"{path}.type", 'must be "float", "int", "choice" or "bool"'
    unlimited = without("study.max_seconds")
    del unlimited["study"]["num_trials"]
    yield "drop all limits", unlimited, "study.num_trials", "must be a whole number.*unless max_steps, max_seconds or target"
    yield "drop study", without("study"), "study.num_trials", "must be a whole number"

    for path in WHOLE:
        for wrong in ("many", 2.5, True, [1, 2], {"a": 1}):
            yield f"{path} = {wrong}", changed(path, wrong), path, "must be a whole number"
    for path in NUMBERS:
        for wrong in ("many", True, [0.5, 1.0], {"a": 1}):
            yield f"{path} = {wrong}", changed(path, wrong), path, "must be a number"
        for wrong in (math.nan, math.inf, -math.inf):
            yield f"{path} = {wrong}", changed(path, wrong), path, "must be a finite number"
    for path in WHOLE:
        yield f"{path} = nan", changed(path, math.nan), path, "must be a finite number"
        yield f"{path} = 2**64", changed(path, 2**64), path, "must fit 64 bits"
    for path in TEXTS:
        words = {"factory": 'must be "module:function"', "name": "must be"}.get(parts(path)[-1], "must be a string")
        for wrong in (3, 2.5, False, ["a"], {"a": 1}):
            yield f"{path} = {wrong}", changed(path, wrong), path, words
    for path in FLAGS:
        for wrong in ("yes", 1, 0.0, []):
            yield f"{path} = {wrong}", changed(path, wrong), path, "must be true or false"
    for path, right in ONE_OF.items():
        for wrong in ("best of all", 3, True, [right]):
            yield f"{path} = {wrong}", changed(path, wrong), path, f'must be one of "{right}"'
    for wrong in (0.5, "a", ["a"], [True], {"a": 1}):
        yield f"task.centre = {wrong}", changed("task.centre", wrong), "task.centre", "must be a list of numbers"

    limits = {"study.num_trials": (0, -64), "study.seed": (-1, 2**32), "study.shard_width": (0, -1), "study.devices": (0, -1),
              "study.max_seconds": (0, -1.0), "report.seeds": (-1,), "optimizer.factor": (1, -3), "optimizer.keep": (-0.1, 1.1),
              "optimizer.sampler.num_lanes": (0, -8), "optimizer.sampler.inertia": (-0.1, 1.5)}  # fmt: skip
    for path, wrongs in limits.items():
        for wrong in wrongs:
            yield (
                f"{path} = {wrong}",
                changed(path, wrong),
                path,
                rf"(of at least|between|above) [\d.]+.*, not {re.escape(str(wrong))}",
            )

    for path in BOUNDED:
        low, high = bounds(path)
        yield (
            f"{path} reversed",
            changed(f"{path}.low", high, changed(f"{path}.high", low)),
            f"{path}.low",
            "must be below high.*; swap them",
        )
        yield f"{path} equal", changed(f"{path}.low", high), f"{path}.low", "must be below high"
    for path, low in (("space.learning_rate", 0.0), ("space.learning_rate", -1.0), ("space.width", 0), ("space.width", -5)):
        yield (
            f"{path} log of {low}",
            changed(f"{path}.low", low),
            f"{path}.low",
            "must be (at least 1|above 0) where log = true",
        )
    yield "tiny log", changed("space.learning_rate.low", 1e-60), "space.learning_rate", "float32"
    yield "huge float", changed("space.decay.high", 1e300), "space.decay", "float32"
    yield "huge int", changed("space.layers.0.units.high", 2**40), "space.layers.0.units", "use Float"

    for path in MISSPELT:
        name = str(parts(path)[-1])
        for typo in dict.fromkeys((name + name[-1], name[:1] + name[2] + name[1] + name[3:])):
            if typo != name and not (len(name) == 3 and typo != name + name[-1]):
                tables, key = renamed(path, typo)
                yield f"{path} as {typo}", tables, key, f"did you mean {name}\\?"
    for table in (
        "study",
        "task",
        "optimizer",
        "report",
        "optimizer.sampler",
        "space.width",
        "space.activation",
        "space.nesterov",
    ):
        yield f"{table}.zzz", changed(f"{table}.zzz", 1), f"{table}.zzz", "unknown .*; must be one of"
    yield "unknown table", changed("zzz", {}), "zzz", "must be one of study, task, space, optimizer, report"
    for table in ("study", "task", "space", "optimizer", "report", "optimizer.sampler"):
        for wrong in (3, "text", [1]):
            words = "must be a table"
            yield f"{table} = {wrong}", changed(table, wrong), table, words

    for path in LEAVES:
        for wrong, right in (("flaot", "float"), ("integer", "int"), ("choices", "choice"), ("boolean", "bool")):
            yield f"{path}.type = {wrong}", changed(f"{path}.type", wrong), f"{path}.type", f'did you mean "{right}"'
        for wrong in (3, True, ""):
            yield (
                f"{path}.type = {wrong}",
                changed(f"{path}.type", wrong),
                f"{path}.type",
                'must be "float", "int", "choice" or "bool"',
            )
    options = "space.activation.options"
    yield "no options", changed(options, []), options, "at least one label"
    yield "options a word", changed(options, "relu"), options, "must be a list"
    yield "options a table", changed(options, {"a": 1}), options, "must be a list"
    yield "options twice", changed(options, ["relu", "gelu", "relu"]), options, '"relu" stands there twice'
    yield "nested option", changed(options, ["relu", ["gelu"]]), f"{options}.1", "must be a string, a number, true or false"
    yield "nan option", changed(options, [0.5, math.nan]), f"{options}.1", "must be a finite number"
    yield "static with shape", changed("space.activation.shape", [2]), "space.activation.shape", "must be left out"
    for wrong in ([0], [2, -1], [2**13, 2**12], [2.5], "2", True, {"a": 1}):
        yield f"shape {wrong}", changed("space.decay.shape", wrong), "space.decay.shape", "whole numbers of at least 1"
    yield "empty space", changed("space", {}), "space", "give at least one"
    yield "only constants", changed("space", {"a": 1, "b": {"c": "d"}}), "space", "give at least one"
    yield "empty leaf", changed("space.width", {}), "space.width", "must have a type"
    yield "bool without type", without("space.nesterov.type"), "space.nesterov", "must have a type"
    yield "empty list", changed("space.layers", []), "space.layers", "must hold leaves or constants"
    yield "nan constant", changed("space.block.constant", math.nan), "space.block.constant", "must be a finite number"

    factory = "task.factory"
    for wrong, right in {
        "bowl": 'must be "module:function"',
        "config_toys.bowl": 'must be "module:function"',
        "config toys:bowl": 'must be "module:function"',
        "config_toy:bowl": "did you mean config_toys",
        "zzz.yyy:bowl": "it is looked for in",
        "config_toys:bowll": "did you mean bowl",
        "config_toys:zzz": "must be one of bowl, picky",
        "config_toys:NOT_A_FUNCTION": "must be a function",
        "config_toys:loss": "must be a function that returns the objective",
        "config_raises:f": r"RuntimeError: not today \(config_raises.py, line 2\)",
        "config_syntax:f": "SyntaxError",
        "config_needs:f": "No module named 'not_installed_at_all'; install it",
    }.items():
        yield f"factory {wrong}", changed(factory, wrong), factory, right
    name = "optimizer.sampler.name"
    for wrong, right in {"PS0": "did you mean PSO", "pso": "did you mean PSO", "Random": "did you mean RandomSearch",
                         "zzz": "must be one of RandomSearch", "config_toys:loss": "must be a dataclass with init",
                         "config_toys:Halvin": "did you mean Halving"}.items():  # fmt: skip
        yield f"optimizer {wrong}", changed(name, wrong), name, right
    yield "a name with a slash", changed("study.name", "a/b"), "study.name", "without /"
    yield "a blank name", changed("study.name", " "), "study.name", "must be a string"


def bounds(path):
    node: Any = GOOD
    for part in parts(path):
        node = node[part]
    return node["low"], node["high"]


MUTATIONS = list(mutations())


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """A folder with the modules that configs name; the current directory while these tests run."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "config_toys.py").write_text(MODULE)
    (folder / "config_raises.py").write_text("\nraise RuntimeError('not today')\n")
    (folder / "config_syntax.py").write_text("def f(:\n")
    (folder / "config_needs.py").write_text("import not_installed_at_all\n")
    before, paths = os.getcwd(), list(sys.path)
    os.chdir(folder)
    yield folder
    os.chdir(before)
    sys.path[:] = paths


def write(tables, name="study.toml"):
    with open(name, "w") as file:
        file.write(tables if isinstance(tables, str) else to_toml(tables))
    return name


def problems_of(tables, *overrides):
    with pytest.raises(ConfigError) as caught:
        build(load(write(tables), overrides))
    return caught.value.problems


def test_there_are_enough_mutations():
    assert len(MUTATIONS) >= 300
    assert len({what for what, *_ in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.parametrize(("tables", "key", "remedy"), [case[1:] for case in MUTATIONS], ids=[case[0] for case in MUTATIONS])
def test_a_mistake_is_one_line_with_file_key_and_remedy(tables, key, remedy):
    (line,) = problems_of(tables)
    assert line.startswith(f"study.toml: {key}: ")
    assert re.search(remedy, line.removeprefix(f"study.toml: {key}: ")), line
    assert "\n" not in line


def test_all_mistakes_are_told_at_once():
    tables = copy.deepcopy(GOOD)
    expected = {}
    for path, wrong, right in (
        ("study.num_trials", -1, "of at least 1|between 1"),
        ("study.direktion", "minimize", "did you mean direction"),
        ("task.num_steps", "many", "a whole number"),
        ("task.scael", 1.0, "did you mean scale"),
        ("space.learning_rate.low", 2.0, "must be below high"),
        ("space.width.type", "itn", 'did you mean "int"'),
        ("optimizer.keep", 3.0, "between 0.0 and 1.0"),
        ("optimizer.sampler.name", "PZO", "did you mean PSO"),
        ("report.seeds", 1.5, "a whole number"),
        ("raport", {}, "did you mean report"),
    ):
        tables = changed(path, wrong, tables)
        expected[path] = right
    lines = problems_of(tables)
    assert len(lines) == len(expected)
    for key, right in expected.items():
        assert any(line.startswith(f"study.toml: {key}: ") and re.search(right, line) for line in lines), key


ELSEWHERE = [case for case in MUTATIONS if not case[2].startswith(("study", "sutdy"))]


@pytest.mark.parametrize(("tables", "key"), [case[1:3] for case in ELSEWHERE[::7]], ids=[case[0] for case in ELSEWHERE[::7]])
def test_a_mistake_in_the_study_hides_none_elsewhere(tables, key):
    lines = problems_of(changed("study.seed", "nought", tables))
    assert {line.split(": ")[1] for line in lines} == {key, "study.seed"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[study]\nnum_trials = \n", r"line 2: not TOML: 'num_trials =': invalid value; strings take quotes"),
        ("[study\nnum_trials = 3\n", "line 1: not TOML: '\\[study': expected"),
        ("[study]\nseed = 1\nseed = 2\n", "line 3: not TOML: 'seed = 2': cannot overwrite a value; each key may be given once"),
        ("[study]\ndirection = minimize\n", "line 2: not TOML: 'direction = minimize'.*strings take quotes"),
        ("[study]\nname = 'toy", "line 2: not TOML"),
        ("a = " + "[" * 5000, "nested too deeply"),
    ],
)
def test_what_is_not_toml_is_told_with_its_line(text, words):
    (line,) = problems_of(text)
    assert re.match(f"study.toml: {words}", line), line


def test_files_that_cannot_be_read(project):
    write(GOOD, "digits.toml")
    (project / "folder").mkdir()
    write(GOOD, "folder/inside.toml")
    (project / "latin.toml").write_bytes("[study]\nname = 'Köln'\n".encode("latin-1"))
    for path, words in {
        "digit.toml": "no such file; did you mean digits.toml?",
        "folder": "a directory; name a TOML file, such as folder/inside.toml",
        "folder/zzz.toml": "no such file; in folder there are inside.toml",
        "nowhere/zzz.toml": "no such file; give the path of a TOML file",
        "latin.toml": "line 2: not UTF-8 (byte 17); save the file as UTF-8",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert caught.value.problems == (f"{path}: {words}",)
    (project / "marked.toml").write_bytes(b"\xef\xbb\xbf" + to_toml(GOOD).replace("\n", "\r\n").encode())
    assert load("marked.toml").to_dict() == load("digits.toml").to_dict()


def test_dates_are_refused():
    (line,) = problems_of(to_toml(GOOD).replace("scale = 2.0", "scale = 2024-01-01"))
    assert line.startswith("study.toml: task.scale: must be a number")


def test_a_good_config_builds_what_it_says():
    study = build(load(write(GOOD)))
    assert (study.name, study.num_trials, study.seed, study.metric, study.direction) == ("toy", 64, 3, "loss", "minimize")
    assert (study.shard_width, study.devices, study.max_seconds) == (4, 1, 60.0)
    assert study.objective.arguments == {
        "label": "words",
        "num_steps": 7,
        "scale": 2.0,
        "mode": "noisy",
        "flag": True,
        "centre": (0.25, 0.5),
        "plain_default": 1.5,
        "gone": None,
    }
    expected = Space(
        {
            "learning_rate": Float(0.001, 1.0, log=True),
            "decay": Float(-1.0, 1.0, shape=(2, 3)),
            "width": Int(4, 64, log=True),
            "activation": Choice(("relu", "gelu"), static=True),
            "nesterov": Bool(),
            "block": {"dropout": Float(0.0, 0.5), "constant": 3},
            "layers": [{"units": Int(1, 9)}, {"units": Int(2, 8)}],
        }
    )
    assert study.space.describe() == expected.describe()
    assert study.space.spec == expected.spec
    optimizer: Any = study.optimizer
    assert (optimizer.factor, optimizer.keep, optimizer.order) == (2, 0.25, "random")
    assert optimizer.sampler == PSO(num_lanes=8, inertia=0.6, neighbourhood="ring")


def test_defaults_are_the_files_name_and_what_the_dataclasses_say():
    tables = {"study": {"num_trials": 4}, "task": {"factory": "config_toys:bowl", "label": "x"}, "space": GOOD["space"],
              "optimizer": {"name": "RandomSearch", "num_lanes": 2}}  # fmt: skip
    config = load(write(tables, "the_stem.toml"))
    assert (config.study.name, config.study.seed, config.study.direction, config.report.seeds) == (
        "the_stem",
        0,
        "minimize",
        16,
    )
    assert (config.study.metric, config.study.shard_width, config.study.devices, config.study.max_seconds) == (None,) * 4


def test_whole_numbers_stand_for_floats_and_stay_traced_as_such():
    study = build(load(write(GOOD), ["optimizer.sampler.inertia=1", "task.scale=3"]))
    optimizer: Any = study.optimizer
    assert type(optimizer.sampler.inertia) is float
    assert type(study.objective.arguments["scale"]) is float


def test_the_resolved_config_is_json_and_builds_the_same_study():
    study = build(load(write(GOOD)))
    again = build(Config.from_dict(json.loads(json.dumps(study.config))))
    assert again.config == study.config
    assert again.space.describe() == study.space.describe()
    assert again.optimizer == study.optimizer
    assert again.objective.arguments == study.objective.arguments
    # It holds the defaults of the optimizer and of the factory, so that it outlives a change of theirs.
    assert study.config["optimizer"]["sampler"]["cognitive"] == PSO(num_lanes=8).cognitive
    assert build(load(write(without("task.num_steps")))).config["task"]["num_steps"] == 5
    # A report prints it as TOML, to be run again.
    assert build(load(write(study.config, "again.toml"))).config == study.config


def test_a_record_that_no_file_made_is_refused():
    with pytest.raises(ConfigError, match=r"runs/x: not made by a config file; go on with it from the program"):
        Config.from_dict({}, source="runs/x")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("study.num_trials=128", "study.num_trials", 128),
        ("study.num_trials = 128", "study.num_trials", 128),
        ("study.direction=maximize", "study.direction", "maximize"),
        ('study.metric="two words"', "study.metric", "two words"),
        ("task.factory=config_toys:bowl", "task.factory", "config_toys:bowl"),
        ("task.centre=[0.1, 0.2]", "task.centre", [0.1, 0.2]),
        ("task.flag=false", "task.flag", False),
        ("space.learning_rate.high=0.5", "space.learning_rate.high", 0.5),
        ("space.learning_rate=0.1", "space.learning_rate", 0.1),
        ("space.layers.1.units.high=7", "space.layers.1.units.high", 7),
        ("space.nesterov.static=true", "space.nesterov.static", True),
        ("optimizer.sampler.inertia=0.5", "optimizer.sampler.inertia", 0.5),
        (
            'optimizer.sampler={name = "RandomSearch", num_lanes = 4}',
            "optimizer.sampler",
            {"name": "RandomSearch", "num_lanes": 4},
        ),
        ("report.seeds=0", "report.seeds", 0),
    ],
)
def test_an_override_is_as_if_the_file_said_so(text, path, value):
    assert load(write(GOOD), [text]).to_dict() == load(write(changed(path, value), "changed.toml")).to_dict()


def test_overrides_may_add_a_table_and_later_ones_win():
    config = load(write(without("report")), ["report.seeds=3", "report.seeds=5"])
    assert config.report.seeds == 5


def test_overriding_a_leaf_by_a_constant_pins_it():
    study = build(load(write(GOOD), ["space.learning_rate=0.125"]))
    assert "learning_rate" not in study.space.names
    half = jax.numpy.full(study.space.num_dims, 0.5)
    assert study.space.decode(half, (0,))["learning_rate"] == 0.125


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("study.num_trails=3", "study.num_trails", "did you mean num_trials"),
        ("studi.num_trials=3", "studi.num_trials", "unknown table; did you mean study"),
        ("optimizer.sampler.inertai=0.5", "optimizer.sampler.inertai", "did you mean inertia"),
        ("optimizer.samplr.inertia=0.5", "optimizer.samplr", "did you mean sampler"),
        ("task.num_stesp=3", "task.num_stesp", "did you mean num_steps"),
        ("space.learning_rat.high=0.5", "space.learning_rat", "did you mean learning_rate"),
        ("space.learning_rat=0.5", "space.learning_rat", "did you mean learning_rate"),
        ("space.learning_rate.hihg=0.5", "space.learning_rate.hihg", "did you mean high"),
        ("space.layers.2.units.low=1", "space.layers.2", "a place in the list, 0 to 1"),
        ("space.learning_rate.high.x=1", "space.learning_rate.high.x", "set space.learning_rate.high itself"),
        ("study.seed=None", "study.seed", "leave the option out"),
        ("task.flag=True", "task.flag", "must be true, not True"),
        ("study.num_trials=1,5", "study.num_trials", "must be a TOML value"),
        ("study.num_trials=many", "study.num_trials", 'must be a whole number.*not "many"'),
        ("study.max_seconds=inf", "study.max_seconds", "must be a finite number"),
        ("space.learning_rate.high=0.0001", "space.learning_rate.low", "must be below high"),
        ("space.layers.1.units.high=1", "space.layers.1.units.low", "must be below high"),
        ("study=3", "study", "must be a table"),
    ],
)
def test_a_wrong_override_is_named_beside_the_file(text, key, remedy):
    lines = [line for line in problems_of(GOOD, text) if line.startswith(f"study.toml with --set {text}: {key}: ")]
    assert len(lines) == 1
    assert re.search(remedy, lines[0].partition(f"{key}: ")[2]), lines[0]


@pytest.mark.parametrize("text", ["study.num_trials", "=3", "a b=3", "study..seed=3", "x\ny=3"])
def test_an_override_that_is_none(text):
    (line,) = problems_of(GOOD, text)
    assert line == f"study.toml: --set {' '.join(text.split())}: must be KEY=VALUE, such as study.num_trials=128"


def test_an_override_blames_only_what_it_touches():
    first, second = problems_of(changed("report.seeds", -1), "study.num_trials=0")
    assert {first.partition(": ")[0], second.partition(": ")[0]} == {"study.toml", "study.toml with --set study.num_trials=0"}


def test_a_factory_that_refuses_or_returns_something_else():
    (line,) = problems_of({**GOOD, "task": {"factory": "config_toys:picky", "label": "x"}})
    assert line == "study.toml: task: config_toys:picky refused: label is not to my taste"
    (line,) = problems_of({**GOOD, "task": {"factory": "config_toys:number", "label": "x"}})
    line = line.removeprefix("study.toml: task.factory: ")
    assert line == "config_toys:number returned int; must return a loss function, a Training, an estimator or a HostFunction"


def test_factories_are_found_beside_and_above_the_file(project):
    for folder, module in (("one/configs", "one/configs/config_beside.py"), ("two/configs", "two/config_above.py")):
        (project / folder).mkdir(parents=True)
        (project / module).write_text("def make():\n    return lambda key, hparams: 0.0\n")
        name = module.rpartition("/")[2].removesuffix(".py")
        tables = {**GOOD, "task": {"factory": f"{name}:make"}}
        assert callable(build(load(write(tables, f"{folder}/a.toml"))).objective)


def test_structure_is_checked_without_jax(project):
    write(GOOD)
    script = """
    import sys
    from jaxhpo.config import load
    config = load("study.toml", ["study.seed=5"])
    assert config.study.seed == 5
    print(sorted(name for name in sys.modules if name.split(".")[0] in ("jax", "numpy")))
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=project, check=True
    )
    assert found.stdout == "[]\n"


def test_settings_of_settings_are_a_table():
    tables = changed("optimizer", {"name": "BayesOpt", "num_lanes": 2, "priors": {"noise_floor": 1e-3}})
    study = build(load(write(tables), ["optimizer.priors.power=[0, 0.1]"]))
    assert (study.optimizer.priors.noise_floor, study.optimizer.priors.power) == (1e-3, (0.0, 0.1))
    for override, told in [
        ("optimizer.priors=3", "optimizer.priors: must be a table of log_lengthscale, .*, not 3"),
        ("optimizer.priors.noise_floor=0", "optimizer.priors.noise_floor: must be .*at least 1e-12, not 0"),
        ("optimizer.priors.nose=0", "optimizer.priors.nose: "),
    ]:
        (line,) = problems_of(tables, override)
        assert re.search(told, line), line
