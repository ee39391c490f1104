"""Sweeps of W&B and big_vision as studies of ours."""

import math
import re
import sys
import tomllib

import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.cli import main
from jaxhpo.config import build, load
from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations import big_vision, wandb
from jaxhpo.integrations.sweep import read_sweep

TASK = """
from jaxhpo.tasks import HostFunction

def task():
    return HostFunction(lambda hparams: {"val_acc": 0.0})

def seen():
    calls = []
    def fn(hparams):
        calls.append(hparams)
        with open("seen.txt", "a") as file:
            print(repr(hparams), file=file)
        return {"loss": 0.5}
    return HostFunction(fn)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "sweep_toys.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("sweep_toys", "sweep_grid", "sweep_list"):
        sys.modules.pop(name, None)


def sweep_of(folder, parameters, more="method: random\nrun_cap: 5"):
    (folder / "sweep.yaml").write_text(f"{more}\nparameters:\n" + "".join(f"  {line}\n" for line in parameters.splitlines()))
    return wandb.read_sweep(folder / "sweep.yaml")


def notes_on(sweep, word):
    return [note for note in sweep.notes if word in note]


def test_a_whole_sweep(folder):
    found = sweep_of(
        folder,
        """lr: {distribution: log_uniform_values, min: 1e-5, max: 0.1}
layers: {min: 1, max: 4}
momentum: {min: 0.5, max: 0.99}
epochs: {value: 3}
net:
  parameters:
    act: {values: [relu, gelu]}
    depth: {parameters: {low: {values: [1, 2.5, true]}}}""",
        "program: train.py\nname: a/b\nmethod: bayes\nmetric: {name: val_acc, goal: maximize, target: 0.9}\nrun_cap: 40\n"
        "early_terminate: {type: hyperband, s: 2, eta: 4, max_iter: 27}\nproject: p",
    )
    assert (found.metric, found.direction, found.num_trials, found.program) == ("val_acc", "maximize", 40, "train.py")
    assert (
        found.space.describe()
        == jh.Space(
            {
                "lr": jh.Float(1e-5, 0.1, log=True),
                "layers": jh.Int(1, 4),
                "momentum": jh.Float(0.5, 0.99),
                "epochs": 3,
                "net": {"act": jh.Choice(["relu", "gelu"]), "depth": {"low": jh.Choice([1, 2.5, True])}},
            }
        ).describe()
    )
    assert found.optimizer == jh.ASHA(jh.BayesOpt(8), reduction=4.0, num_rungs=2)
    assert notes_on(found, "project: has no counterpart")
    assert found.tables["study"] == {
        "name": "a-b", "metric": "val_acc", "direction": "maximize", "target": 0.9, "num_trials": 40
    }  # fmt: skip
    assert tomllib.loads(found.to_toml()) == found.tables


def test_a_config_made_of_it_runs_once_its_factory_is_filled_in(folder, capsys):
    sweep_of(folder, "lr: {min: 0.0, max: 1.0}\nact: {values: [a, b]}", "method: grid\nmetric: {name: val_acc, goal: maximize}")
    assert main(["import", "sweep.yaml", "--out", "made.toml"]) == 0
    out, err = capsys.readouterr()
    assert out == "made.toml\n"
    assert "jaxhpo: note: method: W&B's grid has no end over floats; here it takes 5 values of each" in err
    assert main(["run", "made.toml"]) == 2
    assert "task.factory: there is no module fill_in" in capsys.readouterr().err
    study = build(load("made.toml", ["task.factory=sweep_toys:task"]))
    assert (study.optimizer, study.num_trials, study.metric) == (jh.GridSearch(8), 10, "val_acc")
    assert main(["import", "sweep.yaml", "--out", "made.toml"]) == 2
    assert "made.toml is there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parameter", "leaf"),
    [
        ("{distribution: uniform, min: 1, max: 3}", jh.Float(1.0, 3.0)),
        ("{distribution: int_uniform, min: 1, max: 3}", jh.Int(1, 3)),
        ("{distribution: log_uniform, min: -3, max: 1}", jh.Float(math.exp(-3), math.e, log=True)),
        ("{distribution: inv_log_uniform, min: 1, max: 3}", jh.Float(math.exp(-3), math.exp(-1), log=True)),
        ("{distribution: inv_log_uniform_values, min: 0.1, max: 2}", jh.Float(0.1, 2.0, log=True)),
        ("{distribution: q_uniform, min: 2, max: 9}", jh.Int(2, 9)),
        ("{distribution: q_uniform, min: 16, max: 512, q: 16}", jh.Int(16, 512)),
        ("{distribution: q_uniform, min: 0, max: 1, q: 0.25}", jh.Float(0.0, 1.0)),
        ("{distribution: q_log_uniform_values, min: 8, max: 64, q: 1}", jh.Int(8, 64, log=True)),
        (f"{{distribution: q_log_uniform, min: {math.log(8)}, max: {math.log(64)}}}", jh.Int(8, 64, log=True)),
        ("{distribution: normal, mu: 1, sigma: 0.5}", jh.Float(0.0, 2.0)),
        ("{distribution: log_normal, mu: 0, sigma: 0.5}", jh.Float(math.exp(-1), math.e, log=True)),
        ("{distribution: q_normal, mu: 20, sigma: 5}", jh.Int(10, 30)),
        ("{values: [1e-3, 1e-2, 1e-3]}", jh.Choice([1e-3, 1e-2])),
        ("{distribution: categorical, values: [a, b], probabilities: [0.9, 0.1]}", jh.Choice(["a", "b"])),
    ],
)
def test_distributions(folder, parameter, leaf):
    (got,), (expected,) = (space.describe() for space in (sweep_of(folder, f"p: {parameter}").space, jh.Space({"p": leaf})))
    for bound in ("low", "high"):
        assert got.pop(bound, 0) == pytest.approx(expected.pop(bound, 0), rel=1e-6)
    assert got == expected


def test_grids_hold_every_value(folder):
    found = sweep_of(folder, "n: {min: 1, max: 30}\nq: {distribution: q_uniform, min: 0, max: 1, q: 0.25}", "method: grid")
    assert (found.num_trials, found.optimizer) == (150, jh.GridSearch(8, points_per_int=30))
    assert found.tables["space"]["q"]["options"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.optimizer.size(found.space.spec) == 150


@pytest.mark.parametrize(
    ("parameter", "note"),
    [
        ("{distribution: cauchy, min: 0, max: 1}", "p: left out: distribution 'cauchy' has no counterpart"),
        ("{distribution: log_uniform_values, min: 0, max: 1}", "p: left out: 0.0 to 1.0 is no range with a logarithm"),
        ("{distribution: log_uniform, min: 16, max: 1024}", r"p: left out: exp\(1024\) is no number; .* log_uniform_values"),
        ("{values: [null, 1]}", "p: left out: the value None cannot stand in a config"),
        ("{min: 1}", "p: left out: a distribution, values, a value, or min and max are due"),
        ("{min: a, max: 2.0}", "p: left out: min must be a number, not 'a'"),
        ("3", "p: left out: a table with values, min and max, or value is due, not 3"),
    ],
)
def test_what_has_no_counterpart_is_noted_and_left_out(folder, parameter, note):
    found = sweep_of(folder, f"p: {parameter}\nx: {{min: 0.0, max: 1.0}}")
    assert list(found.tables["space"]) == ["x"]
    assert any(re.search(note, one) for one in found.notes)
    with pytest.raises(JaxhpoError, match="nothing may vary"):
        sweep_of(folder, f"p: {parameter}")


def test_files_that_hold_no_sweep(folder, capsys):
    for name, text, message in (
        ("a.yaml", "method: [", "a.yaml: line 1: not YAML"),
        ("b.yaml", "- 1", "b.yaml: a sweep of W&B is due"),
        ("c.yaml", "method: grid", "c.yaml: parameters: missing"),
        ("d.txt", "", "d.txt: must be a sweep of W&B"),
        ("e.py", "x = 1", "e.py: there is no function sweep"),
        ("f.py", "def sweep(add):\n  add(a=1)\n  raise KeyError('k')", "f.py: sweep: line 3: KeyError: 'k'"),
        ("g.py", "import nothing_of_this_name", "g.py: line 1: ModuleNotFoundError"),
        ("h.py", "def sweep(add): pass", "h.py: sweep adds no setting"),
        ("i.py", "def sweep(add): add(a=1); add(a=2, b=3)", "i.py: setting 0 of 2 does not give b, which others do"),
        ("j.py", "def sweep(add): add(a=1)", "j.py: sweep adds one setting only"),
        ("k.py", "def sweep(add): add(a=1, **{'a.b': 2}); add(a=2, **{'a.b': 2})", "k.py: a.b is given, and so is a name"),
        ("no.yaml", None, "no.yaml: no such file"),
    ):
        if text is not None:
            (folder / name).write_text(text)
        assert main(["import", name]) == 2
        err = capsys.readouterr().err
        assert f"jaxhpo: error: {message}" in err
        assert err.count("\n") == 1


def test_all_combinations_are_a_grid(folder):
    (folder / "sweep_grid.py").write_text(
        "def sweep(add):\n"
        "  for lr in (0.1, 0.01):\n"
        "    for wd in (1, 1.0, True):\n"
        "      add(wd=wd, name='vit', **{'opt.lr': lr})\n"
    )
    found = read_sweep("sweep_grid.py")
    assert found.tables["space"] == {
        "wd": {"type": "choice", "options": [1, 1.0, True]},
        "name": "vit",
        "opt": {"lr": {"type": "choice", "options": [0.1, 0.01]}},
    }
    assert (found.optimizer, found.num_trials) == (jh.GridSearch(8), 6)
    assert found.optimizer.size(found.space.spec) == 6


def test_a_list_of_settings_is_run_as_it_stands(folder, capsys):
    (folder / "sweep_list.py").write_text(
        "def sweep(add):\n  for t in (10, 20, 50):\n    add(t=t, **{'model.depth': 1000 // t, 'model.pools': (t, t + 1)})\n"
    )
    assert main(["import", "sweep_list.py", "--out", "list.toml"]) == 0
    assert "model.pools: values that are neither numbers nor text are JSON text here" in capsys.readouterr().err
    assert main(["run", "list.toml", "--set", "task.factory=sweep_toys:seen", "--no-report", "--quiet"]) == 0
    expected = [{"model": {"depth": 1000 // t, "pools": f"[{t}, {t + 1}]"}, "t": t} for t in (10, 20, 50)]
    assert sorted(eval(line)["t"] for line in (folder / "seen.txt").read_text().splitlines()) == [10, 20, 50]
    assert all(repr(one) in (folder / "seen.txt").read_text().splitlines() for one in expected)


def test_a_function_is_a_sweep_too():
    def sweep(add):
        for seed in range(4):
            add({"seed": seed}, lr=np.float32(0.5) if seed else 0.25)

    found = big_vision.read_sweep(sweep)
    assert found.settings == tuple({"seed": seed, "lr": 0.5 if seed else 0.25} for seed in range(4))
    cubes = np.asarray(found.optimizer.points, np.float32)
    decoded = [found.space.to_host(found.space.decode(cube)) for cube in cubes]
    assert decoded == list(found.settings)
