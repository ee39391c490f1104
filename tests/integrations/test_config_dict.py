"""Configs as ml_collections.ConfigDict, as something alike, and as Python files."""

import json
import subprocess
import sys

import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.cli import main
from jaxhpo.config import Config, ConfigError, build, load
from jaxhpo.integrations.config_dict import plain
from jaxhpo.study.record import read_record

TABLES = {
    "study": {"name": "cd", "num_trials": 12, "seed": 2},
    "task": {"factory": "config_toys:bowl", "noise": 0.5},
    "space": {"x": {"type": "float", "low": 0.0, "high": 1.0}, "n": {"type": "int", "low": 1, "high": 4, "log": True}},
    "optimizer": {"name": "PSO", "num_lanes": 4, "inertia": 0.7},
}

FILE = '''
import jaxhpo as jh
from ml_collections import ConfigDict

def bowl(noise: float = 0.5):
    """A bowl."""
    return lambda key, hparams: (hparams["x"] - 0.25) ** 2 + noise * hparams["n"]

def get_config(arg="4"):
    config = ConfigDict()
    config.study = dict(num_trials=12, seed=2)
    config.task = ConfigDict(dict(factory=bowl))
    config.task.noise = 0.5
    config.space = dict(x=jh.Float(0.0, 1.0), n=jh.Int(1, 4, log=True))
    config.optimizer = jh.PSO(int(arg), inertia=0.7)
    return config
'''


class Alike:
    """Something that only gives itself as a dictionary."""

    def __init__(self, **fields):
        self.fields = fields

    def to_dict(self):
        return dict(self.fields)


class Items:
    def __init__(self, **fields):
        self.fields = fields

    def items(self):
        return self.fields.items()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    bowl = FILE[FILE.index("def bowl") : FILE.index("def get_config")]
    (tmp_path / "config_toys.py").write_text(bowl)
    (tmp_path / "config_file.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("config_toys", "config_file"):
        sys.modules.pop(name, None)


def config_dict():
    ml_collections = pytest.importorskip("ml_collections")
    config = ml_collections.ConfigDict(TABLES)
    lanes = ml_collections.FieldReference(2)
    config.optimizer.num_lanes = lanes * 2
    config.optimizer.shared = ml_collections.config_dict.placeholder(float)  # None: left out
    return config


@pytest.mark.parametrize("kind", ["ConfigDict", "frozen", "alike", "items", "dict"])
def test_mappings_of_any_kind(folder, kind):
    given = {
        "ConfigDict": config_dict,
        "frozen": lambda: __import__("ml_collections").FrozenConfigDict(config_dict()),
        "alike": lambda: Alike(**{name: Alike(**table) for name, table in TABLES.items()}),
        "items": lambda: Items(**{name: Items(**table) for name, table in TABLES.items()}),
        "dict": lambda: TABLES,
    }[kind]()
    expected = Config.from_dict(TABLES)
    assert Config.from_dict(given) == expected
    assert load(given).to_dict() == expected.to_dict()
    assert build(load(given, ["optimizer.inertia=0.6"])).optimizer == jh.PSO(4, inertia=0.6)
    json.dumps(load(given).to_dict())


def test_a_space_of_a_config_dict():
    ml_collections = pytest.importorskip("ml_collections")
    leaves = {"x": jh.Float(0.0, 1.0), "net": {"n": jh.Int(1, 4)}, "fixed": 3}
    for given in (
        ml_collections.ConfigDict(leaves),
        {**leaves, "net": ml_collections.ConfigDict(leaves["net"])},
        Alike(**leaves),
    ):
        space = jh.Space(given)
        assert space.describe() == jh.Space(leaves).describe()
        assert space.to_host(space.decode(np.full(2, 0.5, np.float32))) == {"x": 0.5, "net": {"n": 3}, "fixed": 3}


def test_objects_become_tables():
    optimizer = jh.ASHA(jh.BayesOpt(4, trust_region=True), budgets=(1, 3))
    assert plain(optimizer) == {
        "name": "ASHA", "budgets": [1, 3], "inner": {"name": "BayesOpt", "num_lanes": 4, "trust_region": True}
    }  # fmt: skip
    assert plain(jh.Choice(("a", "b"), static=True)) == {"type": "choice", "options": ["a", "b"], "static": True}
    assert plain(jh.Float(0.0, 1.0, shape=(3,))) == {"type": "float", "low": 0.0, "high": 1.0, "shape": [3]}
    assert plain({"a": np.float64(0.5), "b": (np.int32(3), np.arange(2)), "c": None}) == {"a": 0.5, "b": [3, [0, 1]]}


def test_a_python_file_runs_as_its_tables_do(folder, capsys):
    pytest.importorskip("ml_collections")
    assert main(["run", "config_file.py:2", "--set", "optimizer.num_lanes=4", "--no-report", "--quiet"]) == 0
    record = read_record("runs/config_file-seed2")
    assert record.config["task"] == {"factory": "config_file:bowl", "noise": 0.5}
    other = load(TABLES, ["study.name=config_file", "task.factory=config_file:bowl"])
    expected = jh.run_study(build(other))
    assert [trial.loss for trial in record.trials] == list(expected.trials["loss"])
    assert load("config_file.py").optimizer["num_lanes"] == 4
    assert load("config_file.py:9").optimizer["num_lanes"] == 9


def test_mistakes_in_python_files(folder, capsys):
    for name, text, message in (
        ("a.py", "x = 1", "a.py: there is no function get_config in it"),
        ("b.py", "def get_config(): return 3", "b.py: get_config returned int; must return a ConfigDict or a dictionary"),
        ("c.py", "def get_config():\n  raise KeyError('k')", "c.py: get_config: line 2: KeyError: 'k'"),
        ("d.py", "def get_config(:", "d.py: SyntaxError"),
        ("e.py", "def get_config(): return {'study': {'num_trials': 0}}", "e.py: study.num_trials: must be a whole number"),
    ):
        (folder / name).write_text(text)
        assert main(["run", name]) == 2
        assert f"jaxhpo: error: {message}" in capsys.readouterr().err
    assert main(["run", "none.py"]) == 2
    assert "none.py: no such file" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="config: must be a file, a ConfigDict or a dictionary, not int"):
        load(3)


def test_no_tool_is_imported_for_its_own_sake():
    code = (
        "import sys, jaxhpo.config, jaxhpo.integrations.config_dict, jaxhpo.cli.arguments as cli; cli.make_parser();"
        "print([name for name in ('jax', 'ml_collections', 'optuna', 'yaml', 'tensorboardX') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
