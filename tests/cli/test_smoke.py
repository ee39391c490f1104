"""Configs that come with the project, run in small from the command line to their report.

Data that do not come with scikit-learn are stood in for by random ones of the same form, so that nothing is fetched.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxhpo.benchmarks import datasets
from jaxhpo.cli import main
from jaxhpo.config import load, smoke
from jaxhpo.study.record import read_record

FOLDER = Path(__file__).parents[2] / "configs"
ONE_OF_EACH_KIND = ("digits_pso", "r8_bag", "grimm_recurrent", "letter_asha")
"""Image, text, language model, table: a swarm, a Parzen estimator, a population, early stopping around a Gaussian process."""


def stand_in(name, rng):
    """A few random examples in the form in which ``jaxhpo data fetch`` stores a data set."""
    known = datasets.DATASETS[name]
    sizes = known.sizes if name == "mnist5k" else (64, 24, 24)  # configs/mnist_cleaning.toml wants 3,250 examples
    count = sum(sizes)
    split = np.repeat(np.arange(3, dtype=np.int8), sizes)
    y = np.arange(count, dtype=np.int32) % known.num_classes
    x = rng.integers(0, 16, (count, known.num_features), dtype=np.int32)
    arrays = {"x": x, "y": y, "split": split}
    if name == "grimm":
        arrays["y"] = rng.integers(0, known.num_classes, x.shape, dtype=np.int32)
    if name in ("grimm", "r8", "20newsgroups"):
        arrays["vocabulary"] = np.array([str(i) for i in range(known.num_classes)])
    return arrays


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """A cache of stand-ins, the current directory that of the project; factories remember data, so nothing else is loaded."""
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.chdir(FOLDER.parent)
    rng = np.random.default_rng(0)
    datasets.data_dir().mkdir(parents=True)
    for name, known in list(datasets.DATASETS.items()):
        if known.source is not None:
            arrays = stand_in(name, rng)
            np.savez(datasets.data_dir() / f"{name}.npz", **arrays)
            sizes = tuple(np.bincount(arrays["split"]).tolist())
            patch.setitem(datasets.DATASETS, name, dataclasses.replace(known, sizes=sizes))
    paths = list(sys.path)
    yield
    sys.path[:] = paths
    patch.undo()
    forget()


def forget():
    """Gives up what the experiments' modules remember of the stand-ins."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "experiments"]:
        for member in vars(sys.modules[name]).values():
            if hasattr(member, "cache_clear"):
                member.cache_clear()


def run_in_small(name, folder):
    assert main(["run", f"configs/{name}.toml", "--smoke", "--quiet", "--out", str(folder)]) == 0
    record = read_record(folder)
    assert record.status == "finished"
    assert record.name == f"{name}-smoke"
    assert record.best is not None
    assert np.isfinite(record.best.loss)
    assert record.notes["confirmation"]["seeds"] == 2
    assert (folder / "report.html").exists()
    return record


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_one_config_of_each_kind(name, tmp_path):
    pytest.importorskip("sklearn")
    record = run_in_small(name, tmp_path / "run")
    assert 8 <= len(record.trials) <= 16 * 32


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({path.stem for path in FOLDER.glob("*.toml")} - set(ONE_OF_EACH_KIND)))
def test_every_other_config(name, tmp_path):
    pytest.importorskip("sklearn")
    run_in_small(name, tmp_path / "run")


def test_a_smoke_run_takes_the_place_of_an_earlier_one(tmp_path, monkeypatch, capsys):
    text = (
        (FOLDER / "digits_random.toml")
        .read_text()
        .replace("num_trials = 640", "num_trials = 4")
        .replace("seeds = 16", "seeds = 0")
    )
    (tmp_path / "tiny.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    for _ in range(2):
        assert main(["run", "tiny.toml", "--smoke", "--no-report"]) == 0
        assert "its figures mean nothing" in capsys.readouterr().out
    assert (
        main(["run", "tiny.toml", "--smoke", "--no-report", "--out", "runs/tiny-smoke-seed0"]) == 2
    )  # a folder that was named


def test_what_a_smoke_run_makes_smaller():
    config = load(FOLDER / "letter_asha.toml")
    small = smoke(config)
    assert small.study.name == "letter_asha-smoke"
    assert small.study.num_trials is None
    assert (small.task["num_steps"], small.task["steps_per_round"]) == (30, 1)  # as many rounds as before
    assert small.study.max_steps == 16 * 30
    assert small.study.shard_width == 8
    assert small.optimizer == {"name": "ASHA", "inner": {"name": "BayesOpt", "num_lanes": 8}}
    assert small.report.seeds == 2
    assert (small.space, small.study.metric) == (config.space, config.study.metric)
    small = smoke(load(FOLDER / "digits_pso.toml", ["optimizer.num_lanes=4"]))
    assert (small.study.num_trials, small.study.shard_width, small.optimizer["num_lanes"]) == (16, 4, 4)
    assert (small.task["num_steps"], small.task.get("steps_per_round")) == (20, None)
