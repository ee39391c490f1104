"""Studies for TensorBoard: curves of the incumbent and of every trial, and the table of its HPARAMS plugin.

export(record)                                  a finished study, or one that still runs
minimize(..., progress=LiveScalars("runs/tb"))  while it runs
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jaxhpo.analysis.columns import element_names, elements, option_index
from jaxhpo.analysis.curves import in_order_of_ends
from jaxhpo.analysis.format import clean
from jaxhpo.errors import JaxhpoError
from jaxhpo.study.record import holds_study, order, read_answers

if TYPE_CHECKING:
    from jaxhpo.study import Progress
    from jaxhpo.study.record import StudyRecord, TrialRow

_SUFFIX = ".jaxhpo"
_PLUGIN, _PREFIX = "hparams", "_hparams_/"
_INCUMBENT = "study"


def _library() -> SimpleNamespace:
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import api_pb2, event_pb2, plugin_hparams_pb2, summary_pb2
    except ImportError:
        raise JaxhpoError("writing for TensorBoard needs tensorboardX: pip install 'jaxhpo[tb]'") from None
    return SimpleNamespace(Writer=EventsWriter, event=event_pb2, summary=summary_pb2, api=api_pb2, plugin=plugin_hparams_pb2)


class _Events:
    """One event file in a folder of its own: a run of TensorBoard."""

    def __init__(self, tb: SimpleNamespace, folder: Path):
        self._tb = tb
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = tb.Writer(str(folder / "events"), _SUFFIX)
        except OSError as error:
            raise JaxhpoError(f"{folder} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> _Events:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def scalar(self, tag: str, value: float | None, step: int, when: float) -> None:
        if value is not None and math.isfinite(value):
            self._add(self._tb.summary.Summary.Value(tag=tag, simple_value=value), step, when)

    def plugin(self, tag: str, when: float, **content: Any) -> None:
        """A message of the HPARAMS plugin, which travels as the metadata of an empty summary."""
        data = self._tb.plugin.HParamsPluginData(version=0, **content).SerializeToString()
        part = self._tb.summary.SummaryMetadata.PluginData(plugin_name=_PLUGIN, content=data)
        metadata = self._tb.summary.SummaryMetadata(plugin_data=part)
        self._add(self._tb.summary.Summary.Value(tag=_PREFIX + tag, metadata=metadata), 0, when)

    def _add(self, value: Any, step: int, when: float) -> None:
        summary = self._tb.summary.Summary(value=[value])
        self._writer.write_event(self._tb.event.Event(wall_time=when, step=int(step), summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def export(record: StudyRecord, path: Path | str | None = None) -> Path:
    """Write a study as event files: ``tensorboard --logdir`` of the folder that is returned shows it.

    The run ``study`` has the incumbent over the number of trials and over all training steps, and the number of failures. Each
    trial is a run of its own, ``trial_00012``, with its metrics; the metric that was searched for stands at every step at which
    the trial was asked for it, so that stopped trials show their curve. HPARAMS lists the trials with their hyperparameters
    (elements of arrays by name), metrics, and whether they failed.

    Args:
        path: the folder, by default ``tensorboard`` beside the record. Event files of an earlier export are replaced.

    Raises:
        JaxhpoError: without tensorboardX, without a finished trial, or where the folder cannot be written.
    """
    tb, folder = _library(), Path(record.folder / "tensorboard" if path is None else path)
    if not record.trials:
        raise JaxhpoError(f"{record.name}: there is no finished trial to export")
    for old in sorted(folder.glob(f"*/events*{_SUFFIX}")):
        old.unlink()
    answers = read_answers(record.folder) if holds_study(record.folder) else {}
    with _Events(tb, folder / _INCUMBENT) as events:
        _write_incumbent(events, record)
        events.plugin("experiment", record.created, experiment=_experiment(tb, record))
    width = max(5, len(str(max(trial.number for trial in record.trials))))
    for trial in record.trials:
        with _Events(tb, folder / f"trial_{trial.number:0{width}}") as events:
            _write_trial(tb, events, record, trial, answers.get(trial.number, ()))
    return folder


def _write_incumbent(events: _Events, record: StudyRecord) -> None:
    best: TrialRow | None = None
    steps = failures = 0
    for count, trial in enumerate(in_order_of_ends(record.trials), 1):
        when = record.created + trial.seconds
        steps += trial.steps - trial.start
        if trial.diverged:
            failures += 1
        elif best is None or order(trial) < order(best):
            best = trial
        if best is not None:
            events.scalar(f"incumbent/{record.metric}", best.value, count, when)
            events.scalar(f"incumbent_over_steps/{record.metric}", best.value, steps, when)
        events.scalar("failures", failures, count, when)


def _write_trial(tb: SimpleNamespace, events: _Events, record: StudyRecord, trial: TrialRow, answers: Any) -> None:
    begun, ended = record.created, record.created + trial.seconds
    start = tb.plugin.SessionStartInfo(group_name=f"trial {trial.number}", start_time_secs=begun)
    for name, value in _plain_elements(record, trial).items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    events.plugin("session_start_info", begun, session_start_info=start)
    sign = -1.0 if record.direction == "maximize" else 1.0
    for at, loss in answers:
        if at != trial.steps:
            events.scalar(record.metric, None if loss is None else sign * loss, at, ended)
    metrics = dict(trial.metrics) | ({} if trial.value is None else {record.metric: trial.value})
    for name, value in metrics.items():
        events.scalar(name, value, trial.steps, ended)
    status = tb.api.STATUS_FAILURE if trial.diverged else tb.api.STATUS_SUCCESS
    events.plugin("session_end_info", ended, session_end_info=tb.plugin.SessionEndInfo(status=status, end_time_secs=ended))


def _plain_elements(record: StudyRecord, trial: TrialRow) -> dict[str, Any]:
    """Numbers, true and false, and text; labels of one choice are of one type."""
    found = elements(record, trial)
    for leaf in record.space:
        if leaf["type"] != "choice":
            continue
        texts = not _is_bools(leaf["options"]) and not _is_numbers(leaf["options"])
        for name in element_names(leaf):
            if name in found:
                place = option_index(leaf["options"], found[name])
                value = found[name] if place is None else leaf["options"][place]
                found[name] = clean(value) if texts else value
    return found


def _is_bools(options: list[Any]) -> bool:
    return all(isinstance(option, bool) for option in options)


def _is_numbers(options: list[Any]) -> bool:
    return all(isinstance(option, (int, float)) and not isinstance(option, bool) for option in options)


def _experiment(tb: SimpleNamespace, record: StudyRecord) -> Any:
    """What the columns of HPARAMS are."""
    experiment = tb.api.Experiment(name=record.name, time_created_secs=record.created)
    for leaf in record.space:
        for name in element_names(leaf):
            info = experiment.hparam_infos.add(name=name)
            if leaf["type"] != "choice":
                info.type = tb.api.DATA_TYPE_FLOAT64
                info.domain_interval.min_value, info.domain_interval.max_value = leaf["low"], leaf["high"]
                continue
            options = leaf["options"]
            if _is_bools(options):
                info.type = tb.api.DATA_TYPE_BOOL
            elif _is_numbers(options):
                info.type = tb.api.DATA_TYPE_FLOAT64
            else:
                info.type, options = tb.api.DATA_TYPE_STRING, [clean(option) for option in options]
            info.domain_discrete.extend(options)
    names = {record.metric, *(name for trial in record.trials for name in trial.metrics)}
    for name in sorted(names, key=lambda name: (name != record.metric, name)):
        experiment.metric_infos.add(name=tb.api.MetricName(tag=name))
    return experiment


class LiveScalars:
    """Writes how a study goes while it runs, to be given as ``progress=``: the incumbent, failures and trials a second.

    Args:
        folder: of the event file; several studies side by side need folders of their own.

    Raises:
        JaxhpoError: without tensorboardX, or where the folder cannot be written.
    """

    def __init__(self, folder: Path | str):
        self._events = _Events(_library(), Path(folder))

    def __call__(self, progress: Progress) -> None:
        now = time.time()
        self._events.scalar("incumbent", progress.best, progress.trials, now)
        self._events.scalar("failures", progress.diverged, progress.trials, now)
        self._events.scalar("trials_per_second", progress.trials_per_second, progress.trials, now)
        self._events.flush()

    def close(self) -> None:
        self._events.close()
