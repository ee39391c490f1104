"""The facts of a study that both the short text and the report state. Nothing heavy is imported here."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from jaxhpo.analysis.format import dotted

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow


def ranked(record: StudyRecord) -> list[TrialRow]:
    """Trials with a finite loss, best first: those trained to the end before all others, of equal ones the earlier first."""
    found = [t for t in record.trials if not t.diverged and t.loss is not None and math.isfinite(t.loss)]
    return sorted(found, key=lambda t: (not t.whole, t.loss, t.round, t.lane))


def stated(record: StudyRecord, trial: TrialRow) -> float:
    """The metric of a trial as the user stated it."""
    loss = trial.loss if trial.loss is not None else math.nan
    return trial.value if trial.value is not None else -loss if record.direction == "maximize" else loss


def trials_of(record: StudyRecord) -> str:
    """How many trials there are, and of how many."""
    return f"{len(record.trials)}" + ("" if record.num_trials is None else f" of {record.num_trials}")


def num_stopped(record: StudyRecord) -> int:
    """Trials that were not trained to the end, and did not diverge."""
    return sum(not trial.whole and not trial.diverged for trial in record.trials)


def lineage_of(record: StudyRecord, trial: TrialRow) -> list[TrialRow]:
    """The trials whose training states led to a trial's, itself last."""
    rows, found = {row.number: row for row in record.trials}, [trial]
    while found[-1].parent in rows:
        found.append(rows[found[-1].parent])
    return found[::-1]


def ended_by(record: StudyRecord) -> str:
    """What ended the study, in words to be put behind its status; nothing where that is plain."""
    limit = (record.notes.get("lanes") or {}).get("ended_by") if record.status == "finished" else None
    return {"target": ", target reached", "max_steps": ", max_steps reached"}.get(limit or "", "")


def caveat(record: StudyRecord, best: TrialRow) -> str | None:
    """What must be known of a winner before its hyperparameters are used; None where there is nothing."""
    if not best.whole:
        return f"No trial was trained to the end: this one was for {best.steps} steps."
    if best.parent >= 0:
        return "Its hyperparameters are those at its end; jaxhpo replay tells and trains the whole schedule."
    return None


def certainty(record: StudyRecord) -> tuple[float, int] | None:
    """The probability that the winner is truly better than the runner-up, and the runner-up; None where it is not known."""
    note = record.notes.get("confirmation") or {}
    if note.get("better") is None or not note.get("runner_up"):
        return None
    return float(note["better"]), int(note["runner_up"]["number"])


def num_diverged(record: StudyRecord) -> int:
    return len(record.trials) - len(ranked(record))


def seconds_of(record: StudyRecord) -> float:
    """Wall-clock seconds until the last known result."""
    return max((trial.seconds for trial in record.trials), default=0.0)


def throughput(record: StudyRecord) -> float | None:
    """Trials a second until the last known result; None before there are any."""
    seconds = seconds_of(record)
    return len(record.trials) / seconds if seconds > 0 else None


def seed_of(record: StudyRecord) -> Any:
    """The study's seed, or None where the config does not state one."""
    return record.config.get("study", record.config).get("seed") if isinstance(record.config.get("study", {}), dict) else None


def optimizer_of(record: StudyRecord) -> str:
    """The optimizer's name, or nothing where the config does not state one."""
    table = record.config.get("optimizer")
    return str(table.get("name", "")) if isinstance(table, dict) else str(table or "")


def settings_of(record: StudyRecord) -> dict[str, Any]:
    """The config with dotted names, without the space."""
    return dotted({name: table for name, table in record.config.items() if name != "space" and table not in ({}, None)})
