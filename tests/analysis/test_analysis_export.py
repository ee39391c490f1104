import csv
import dataclasses
import json
from typing import Any

import pytest

from jaxhpo.analysis.export import export
from jaxhpo.errors import JaxhpoError
from jaxhpo.study.record import read_record


@pytest.fixture
def record(make_record):
    made = make_record([0.9, None, 0.25, 0.7, 0.3])
    failed = dataclasses.replace(made.trials[1], error="ValueError: no")
    return dataclasses.replace(made, trials=[made.trials[0], failed, *made.trials[2:]])


def test_csv(record, tmp_path):
    assert export(record, "csv") == record.folder / "trials.csv"
    rows = list(csv.DictReader((record.folder / "trials.csv").open(newline="")))
    assert [row["loss"] for row in rows] == ["0.9", "", "0.25", "0.7", "0.3"]
    assert [row["diverged"] for row in rows] == ["false", "true", "false", "false", "false"]
    assert rows[1]["error"] == "ValueError: no"
    for row, trial in zip(rows, record.trials, strict=True):
        assert float(row["hparams.optimizer.rate"]) == trial.hparams["optimizer.rate"]  # to the last bit
        assert [float(row[f"hparams.decay[{i}]"]) for i in (0, 1)] == trial.hparams["decay"]
        assert row["hparams.activation"] == trial.hparams["activation"]
        assert row["metrics.extra"] == ("" if trial.diverged else "0.5")
    other: Any = export(record, "csv", tmp_path / "deep" / "x.csv")
    assert other.read_text() == (record.folder / "trials.csv").read_text()


def test_jsonl(record):
    odd = dataclasses.replace(record.trials[0], metrics={"loss": 0.9, "f1": float("nan")})
    path: Any = export(dataclasses.replace(record, trials=[odd, *record.trials[1:]]), "jsonl")
    rows = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [row["value"] for row in rows] == [0.9, None, 0.25, 0.7, 0.3]
    assert rows[0]["metrics.f1"] is None
    assert rows[2]["hparams.decay"] == record.trials[2].hparams["decay"]
    assert list(rows[0]) == list(rows[1])


def test_formats_are_named(record):
    with pytest.raises(JaxhpoError, match="'xml': the formats are csv, jsonl, optuna"):
        export(record, "xml")


def test_optuna_round_trip(make_record):
    optuna = pytest.importorskip("optuna")
    made = make_record([-0.9, None, -0.25, -0.7, -0.3], direction="maximize", metric="accuracy")
    url = export(made, "optuna")
    study = optuna.load_study(study_name="study", storage=url)
    assert url == f"sqlite:///{made.folder.resolve()}/optuna.db"
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert (study.best_trial.number, study.best_value) == (0, 0.9)
    trials = study.trials
    states = optuna.trial.TrialState
    assert [trial.state for trial in trials] == [states.COMPLETE, states.FAIL, *[states.COMPLETE] * 3]
    for ours, theirs in zip(made.trials, trials, strict=True):
        assert theirs.params["optimizer.rate"] == ours.hparams["optimizer.rate"]
        assert [theirs.params[f"decay[{i}]"] for i in (0, 1)] == ours.hparams["decay"]
        assert theirs.params["nesterov"] is ours.hparams["nesterov"]
        assert theirs.datetime_complete.timestamp() == pytest.approx(made.created + ours.seconds, rel=0, abs=1e-3)
        assert theirs.user_attrs["lane"] == ours.lane
    make = optuna.distributions
    assert trials[0].distributions["optimizer.rate"] == make.FloatDistribution(1e-4, 1.0, log=True)
    assert trials[0].distributions["width"] == make.IntDistribution(16, 256, log=True)
    assert trials[0].distributions["activation"] == make.CategoricalDistribution(["relu", "gelu"])
    assert trials[4].datetime_start.timestamp() == pytest.approx(
        made.created + 2.0, rel=0, abs=1e-3
    )  # when its lane became free
    assert study.metric_names == ["accuracy"]
    assert study.user_attrs["jaxhpo"]["seed"] == 0
    with pytest.raises(JaxhpoError, match="already holds a study named 'study'"):
        export(made, "optuna")
    assert len(optuna.load_study(study_name="study", storage=url).trials) == 5
    second = dataclasses.replace(made, name="another")
    export(second, "optuna", made.folder / "optuna.db")  # beside it, under its own name
    assert len(optuna.get_all_study_names(storage=url)) == 2


def test_optuna_tells_equal_labels_and_odd_bounds_apart(make_record):
    optuna = pytest.importorskip("optuna")
    space = [
        {"name": "kind", "type": "choice", "shape": [], "options": [1, True, "x", None], "static": False},
        {"name": "rate", "type": "float", "shape": [], "low": 0.1, "high": 0.3, "log": False},
    ]
    made = make_record([1.0, 2.0, 3.0, 4.0], space=space)
    hparams = [{"kind": kind, "rate": 0.30000001} for kind in (1, True, "x", None)]
    made = dataclasses.replace(
        made, trials=[dataclasses.replace(t, hparams=h) for t, h in zip(made.trials, hparams, strict=True)]
    )
    trials = optuna.load_study(study_name="study", storage=export(made, "optuna")).trials
    assert [trial.params["kind"] for trial in trials] == ["0: 1", "1: True", "2: x", "3: None"]
    assert trials[0].params["rate"] == 0.3


def test_optuna_refusals(make_record, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    with pytest.raises(JaxhpoError, match="no finished trial"):
        export(make_record([]), "optuna")
    (tmp_path / "text.db").write_text("this is no database, and it is long enough to be seen as none")
    with pytest.raises(JaxhpoError, match="cannot be opened as a storage"):
        export(make_record([1.0]), "optuna", tmp_path / "text.db")

    def fails(*_):
        raise RuntimeError("halfway")

    monkeypatch.setattr(optuna.study.Study, "add_trials", fails)
    with pytest.raises(RuntimeError, match="halfway"):
        export(make_record([1.0]), "optuna", tmp_path / "half.db")
    assert optuna.get_all_study_names(storage=f"sqlite:///{tmp_path / 'half.db'}") == []


def test_trials_that_were_stopped_early_are_pruned_ones_with_their_losses_on_the_way(tmp_path):
    optuna = pytest.importorskip("optuna")
    import jax.numpy as jnp

    import jaxhpo as jh

    task = jh.Task(
        lambda key, h: jnp.zeros(()), lambda key, h, s: s + 1.0, lambda h, s: {"score": h["x"] - 1.0 / s}
    )  # higher with every step
    optimizer = jh.ASHA(jh.RandomSearch(4), budgets=(1, 3))
    result = jh.maximize(jh.Training(task, 9, 1), {"x": jh.Float(0, 1)}, optimizer, key=0, num_trials=20, record=tmp_path / "s")
    url = f"sqlite:///{tmp_path / 'out.db'}"
    export(read_record(tmp_path / "s"), "optuna", url)
    (name,) = optuna.get_all_study_names(url)
    trials = optuna.load_study(study_name=name, storage=url).trials
    for trial, x, steps, whole in zip(trials, *(result.trials[k] for k in ("hparams.x", "steps", "whole")), strict=True):
        assert trial.state.name == ("COMPLETE" if whole else "PRUNED")
        looked = [s for s in (1, 3, 9) if s <= steps]
        assert list(trial.intermediate_values) == looked
        assert trial.intermediate_values[looked[-1]] == pytest.approx(x - 1.0 / steps, abs=1e-6)
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
