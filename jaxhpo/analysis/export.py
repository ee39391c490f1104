"""Trials for other tools: CSV, JSON lines, and a storage of Optuna that its dashboard opens."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhpo.analysis import summary
from jaxhpo.analysis.columns import element_names, elements, option_index
from jaxhpo.analysis.document import write
from jaxhpo.errors import JaxhpoError
from jaxhpo.study.record import holds_study, read_answers

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow

FORMATS = ("csv", "jsonl", "optuna")
_FIELDS = ("number", "parent", "start", "round", "lane", "loss", "value", "diverged", "steps", "whole", "seconds", "error")


def export(record: StudyRecord, to: str, path: Path | str | None = None) -> Path | str:
    """Write the finished trials as ``to``: "csv", "jsonl" or "optuna"; returns where they are.

    Args:
        path: the file; for "optuna" also a storage URL. By default trials.csv, trials.jsonl or optuna.db in
            the study's folder. Files are replaced; a study that an Optuna storage already holds never is.

    Raises:
        JaxhpoError: for an unknown format, a missing extra, a storage that holds a study of this name, or a
            path that cannot be written.
    """
    if to not in FORMATS:
        raise JaxhpoError(f"cannot export to {to!r}: the formats are {', '.join(FORMATS)}")
    if to == "optuna":
        return _to_optuna(record, record.folder / "optuna.db" if path is None else path)
    target = Path(record.folder / f"trials.{to}" if path is None else path)
    return write(target, _csv(record) if to == "csv" else _jsonl(record))


def _metric_names(record: StudyRecord) -> list[str]:
    return sorted({name for trial in record.trials for name in trial.metrics})


def _finite(x: float | None) -> float | None:
    return x if x is not None and math.isfinite(x) else None


def _row(record: StudyRecord, trial: TrialRow) -> dict[str, Any]:
    """The fields of a trial that every format has; a loss that is not finite is empty."""
    lost = trial.diverged or _finite(trial.loss) is None
    row = {name: getattr(trial, name) for name in _FIELDS}
    return row | {
        "diverged": lost,
        "loss": None if lost else trial.loss,
        "value": None if lost else summary.stated(record, trial),
    }


def _csv(record: StudyRecord) -> str:
    """One line a trial: fields, ``metrics.*``, ``hparams.*`` (one column an element); true, false, and nothing for none."""
    metrics = _metric_names(record)
    hparams = [name for leaf in record.space for name in element_names(leaf)]
    header = [*_FIELDS, *(f"metrics.{name}" for name in metrics), *(f"hparams.{name}" for name in hparams)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    for trial in record.trials:
        found, row = elements(record, trial), _row(record, trial)
        cells = [*row.values(), *(trial.metrics.get(name) for name in metrics), *(found.get(name) for name in hparams)]
        writer.writerow([str(cell).lower() if isinstance(cell, bool) else cell for cell in cells])
    return buffer.getvalue()


def _jsonl(record: StudyRecord) -> str:
    """One JSON object a trial; hyperparameters and metrics under dotted names, arrays as lists, NaN as null."""
    lines = []
    for trial in record.trials:
        row = _row(record, trial) | {f"metrics.{name}": trial.metrics.get(name) for name in _metric_names(record)}
        row |= {f"hparams.{name}": value for name, value in trial.hparams.items()}
        lines.append(json.dumps(_plain(row), ensure_ascii=False, allow_nan=False))
    return "".join(line + "\n" for line in lines)


def _plain(x: Any) -> Any:
    if isinstance(x, dict):
        return {str(name): _plain(child) for name, child in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(child) for child in x]
    if isinstance(x, float):
        return _finite(x)
    return x if isinstance(x, (str, int, bool)) or x is None else str(x)


# Optuna


def _options(leaf: dict[str, Any]) -> list[Any]:
    """Categories that Optuna can tell apart: texts where labels are neither plain nor unequal (1, 1.0 and True are equal)."""
    options = leaf["options"]
    plain = all(isinstance(option, (str, int, float, bool)) or option is None for option in options)
    unequal = all(a != b for i, a in enumerate(options) for b in options[:i])
    return list(options) if plain and unequal else [f"{k}: {option}" for k, option in enumerate(options)]


def _parameters(record: StudyRecord, trial: TrialRow, kinds: dict[str, tuple[dict[str, Any], Any, Any]]) -> tuple[dict, dict]:
    """Parameters and distributions of one trial, one of each an element."""
    params, distributions = {}, {}
    for name, value in elements(record, trial).items():
        leaf, distribution, options = kinds[name]
        if leaf["type"] == "choice":
            place = option_index(leaf["options"], value)
            if place is None:
                raise JaxhpoError(f"trial {trial.number}: {name} = {value!r} is none of its options {leaf['options']!r}")
            params[name] = options[place]
        else:
            params[name] = min(max(value, leaf["low"]), leaf["high"])
        distributions[name] = distribution
    return params, distributions


def _to_optuna(record: StudyRecord, target: Path | str) -> str:
    try:
        import optuna
    except ImportError:
        raise JaxhpoError("exporting to Optuna needs it: pip install 'jaxhpo[optuna]'") from None
    url = str(target)
    if "://" not in url:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{path.resolve()}"
    if not record.trials:
        raise JaxhpoError(f"{record.name}: there is no finished trial to export")
    make, known = optuna.distributions, {}
    for leaf in record.space:
        options = _options(leaf) if leaf["type"] == "choice" else None
        if options is not None:
            distribution: Any = make.CategoricalDistribution(options)
        elif leaf["type"] == "int":
            distribution = make.IntDistribution(leaf["low"], leaf["high"], log=bool(leaf.get("log")))
        else:
            distribution = make.FloatDistribution(leaf["low"], leaf["high"], log=bool(leaf.get("log")))
        known |= dict.fromkeys(element_names(leaf), (leaf, distribution, options))
    answers = read_answers(record.folder) if holds_study(record.folder) else {}
    trials = [
        _frozen(optuna, record, trial, begun, known, answers.get(trial.number, ()))
        for trial, begun in zip(record.trials, _begun(record), strict=True)
    ]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = _fast_storage(optuna, url)
        direction = optuna.study.StudyDirection[record.direction.upper()]
        study = optuna.create_study(storage=storage, study_name=record.name, direction=direction)
    except optuna.exceptions.DuplicatedStudyError:
        raise JaxhpoError(
            f"{target} already holds a study named {record.name!r}: give another file, or delete that study first "
            f"(optuna.delete_study(study_name={record.name!r}, storage={url!r}))"
        ) from None
    except Exception as error:
        raise JaxhpoError(f"{target} cannot be opened as a storage of Optuna: {str(error).splitlines()[0]}") from None
    finally:
        optuna.logging.set_verbosity(verbosity)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([record.metric])
        study.set_user_attr(
            "jaxhpo", {"status": record.status, "num_trials": record.num_trials, "seed": summary.seed_of(record)}
        )
        study.add_trials(trials)
    except BaseException:
        optuna.delete_study(study_name=record.name, storage=storage)  # all or nothing
        raise
    return url


def _fast_storage(optuna: Any, url: str) -> Any:
    """The storage; SQLite files are not forced to disk at every trial, which halves the time (about 20 ms a trial)."""
    if not url.startswith("sqlite"):
        return url
    from sqlalchemy import event

    storage = optuna.storages.RDBStorage(url)
    storage.engine.dispose()  # connections made from now on see the setting
    event.listen(storage.engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF"))
    return storage


def _begun(record: StudyRecord) -> list[float]:
    """Seconds at which each trial began: when its lane became free, as results are known chunk by chunk."""
    free: dict[int, float] = {}
    begun = dict.fromkeys((trial.number for trial in record.trials), 0.0)
    for trial in sorted(record.trials, key=lambda trial: (trial.seconds, trial.number)):
        begun[trial.number] = free.get(trial.lane, 0.0)
        free[trial.lane] = trial.seconds
    return [begun[trial.number] for trial in record.trials]


def _frozen(optuna: Any, record: StudyRecord, trial: TrialRow, begun: float, known: dict[str, Any], answers: Any) -> Any:
    """A finished trial of Optuna; a diverged one is FAIL, one that was stopped early PRUNED, with its losses on the way."""
    lost = trial.diverged or _finite(trial.loss) is None
    params, distributions = _parameters(record, trial, known)
    states, sign = optuna.trial.TrialState, -1.0 if record.direction == "maximize" else 1.0
    attributes = (
        {"lane": trial.lane, "steps": trial.steps}
        | ({"parent": trial.parent} if trial.parent >= 0 else {})
        | {f"metrics.{name}": value for name, value in _plain(trial.metrics).items() if name != record.metric}
    )
    if lost:
        attributes |= {"diverged": True} | ({"error": trial.error} if trial.error else {})
    return optuna.trial.FrozenTrial(
        number=trial.number,
        trial_id=trial.number,
        state=states.FAIL if lost else states.COMPLETE if trial.whole else states.PRUNED,
        value=None if lost else float(summary.stated(record, trial)),
        datetime_start=datetime.datetime.fromtimestamp(record.created + begun),
        datetime_complete=datetime.datetime.fromtimestamp(record.created + trial.seconds),
        params=params,
        distributions=distributions,
        user_attrs=attributes,
        system_attrs={},
        intermediate_values={steps: sign * loss for steps, loss in answers if _finite(loss) is not None},
    )
