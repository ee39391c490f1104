"""Event files, read back by the format's own rules: length, checksum, message, checksum."""

import dataclasses
import math
import struct

import pytest

import jaxhpo as jh
from jaxhpo.cli import main
from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations import tensorboard
from jaxhpo.study.record import read_record

pytest.importorskip("tensorboardX")

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData


def events_in(folder):
    """All events of a run, and that there is one file."""
    (path,) = folder.glob("events*")
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def scalars(folder):
    found = {}
    for event in events_in(folder):
        for value in event.summary.value:
            if not value.tag.startswith("_hparams_/"):
                found.setdefault(value.tag, []).append((event.step, pytest.approx(value.simple_value, rel=1e-6)))
    return found


def plugin(folder):
    values = [value for event in events_in(folder) for value in event.summary.value if value.tag.startswith("_hparams_/")]
    assert all(value.metadata.plugin_data.plugin_name == "hparams" for value in values)
    return {value.tag[10:]: HParamsPluginData.FromString(value.metadata.plugin_data.content) for value in values}


@pytest.fixture
def record(tmp_path):
    """Five trials of a maximised accuracy, one of them failed, one stopped early."""
    from jaxhpo.study.record import StudyRecord, TrialRow

    space = [
        {"name": "lr", "type": "float", "offset": 0, "shape": [2], "low": 0.1, "high": 1.0, "log": True},
        {"name": "n", "type": "int", "offset": 2, "shape": [], "low": 1, "high": 4, "log": False},
        {"name": "act", "type": "choice", "offset": 3, "shape": [], "options": ["relu", 3], "static": False},
        {"name": "flag", "type": "choice", "offset": 4, "shape": [], "options": [False, True], "static": False},
        {"name": "width", "type": "choice", "offset": 5, "shape": [], "options": [16, 32], "static": False},
    ]
    trials = [
        TrialRow(
            number=i, round=i, lane=0, loss=loss, value=None if loss is None else -loss, diverged=loss is None,
            steps=20 if i == 3 else 100, whole=i != 3, metrics={} if loss is None else {"accuracy": -loss, "extra": float(i)},
            hparams={"lr": [0.25, 0.5], "n": 3, "act": ["relu", 3][i % 2], "flag": i == 1, "width": 32}, seconds=1.0 + i,
        )
        for i, loss in enumerate([-0.5, None, -0.25, -0.75, -0.625])
    ]  # fmt: skip
    return StudyRecord(
        folder=tmp_path / "study", name="study", config={}, space=space, env={}, metric="accuracy", direction="maximize",
        num_trials=5, status="finished", created=1.7e9, trials=trials, notes={},
    )  # fmt: skip


def test_curves(record):
    folder = tensorboard.export(record)
    assert folder == record.folder / "tensorboard"
    runs = sorted(path.name for path in folder.iterdir())
    assert runs == ["study", *(f"trial_{i:05}" for i in range(5))]
    found = scalars(folder / "study")
    # A trial that was stopped early never stands before one that was trained to the end.
    assert found["incumbent/accuracy"] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.625)]
    assert found["incumbent_over_steps/accuracy"] == [(100, 0.5), (200, 0.5), (300, 0.5), (320, 0.5), (420, 0.625)]
    assert found["failures"] == [(1, 0), (2, 1), (3, 1), (4, 1), (5, 1)]
    assert scalars(folder / "trial_00004") == {"accuracy": [(100, 0.625)], "extra": [(100, 4.0)]}
    assert scalars(folder / "trial_00001") == {}
    assert [event.wall_time for event in events_in(folder / "trial_00004")][-1] == 1.7e9 + 5.0


def test_the_table_of_hyperparameters(record):
    folder = tensorboard.export(record)
    experiment = plugin(folder / "study")["experiment"].experiment
    infos = {info.name: info for info in experiment.hparam_infos}
    assert {name: info.type for name, info in infos.items()} == {
        "lr[0]": 3, "lr[1]": 3, "n": 3, "act": 1, "flag": 2, "width": 3
    }  # fmt: skip
    assert (infos["lr[0]"].domain_interval.min_value, infos["lr[0]"].domain_interval.max_value) == (0.1, 1.0)
    assert list(infos["act"].domain_discrete) == ["relu", "3"]
    assert list(infos["width"].domain_discrete) == [16, 32]
    assert [info.name.tag for info in experiment.metric_infos] == ["accuracy", "extra"]
    messages = plugin(folder / "trial_00001")
    start, end = messages["session_start_info"].session_start_info, messages["session_end_info"].session_end_info
    got = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert got == {"lr[0]": 0.25, "lr[1]": 0.5, "n": 3.0, "act": "3", "flag": True, "width": 32.0}
    assert (start.group_name, end.status, end.end_time_secs) == ("trial 1", 2, 1.7e9 + 2.0)  # 2: failure
    assert plugin(folder / "trial_00000")["session_end_info"].session_end_info.status == 1


def test_a_second_export_replaces_the_first(record, tmp_path):
    for _ in range(2):
        folder = tensorboard.export(record, tmp_path / "tb")
    assert len(scalars(folder / "study")["failures"]) == 5
    with pytest.raises(JaxhpoError, match="no finished trial"):
        tensorboard.export(dataclasses.replace(record, trials=[]))
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxhpoError, match="cannot be written"):
        tensorboard.export(record, tmp_path / "file")


def test_a_study_with_stopped_trials_from_the_command_line_and_live(tmp_path, capsys):
    def init(key, hparams):
        return hparams["x"]

    task = jh.Task(init, lambda key, hparams, state: state * 0.9, lambda hparams, state: {"loss": state})
    live = tensorboard.LiveScalars(tmp_path / "live")
    training = jh.Training(task, num_steps=9, steps_per_round=1)
    search = jh.ASHA(jh.RandomSearch(4), budgets=(1, 3))
    result = jh.minimize(
        training, {"x": jh.Float(0.1, 1.0)}, search, key=0, num_trials=16, record=tmp_path / "study", progress=live
    )
    live.close()
    assert scalars(tmp_path / "live")["incumbent"][-1] == (16, result.best.loss)
    assert main(["export", str(tmp_path / "study"), "--to", "tensorboard", "--out", str(tmp_path / "tb")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "tb")
    record = read_record(tmp_path / "study")
    assert any(not trial.whole for trial in record.trials)
    assert any(trial.whole for trial in record.trials)
    for trial in record.trials:
        due = [steps for steps in (1, 3, 9) if steps <= trial.steps]
        curve = scalars(tmp_path / "tb" / f"trial_{trial.number:05}")["loss"]
        assert curve == [(steps, trial.loss / 0.9 ** (trial.steps - steps)) for steps in due]
        assert not math.isnan(trial.loss)


def test_tensorboard_reads_it(record):
    """TensorBoard's own reader, where it is installed."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reader = accumulator.EventAccumulator(str(tensorboard.export(record) / "trial_00004"))
    reader.Reload()
    assert reader.Tags()["scalars"] == ["accuracy", "extra"]
    assert reader.Scalars("accuracy")[0].step == 100
    assert set(reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name) == set("hparams")
