"""A study in a few lines of text, for ``jaxhpo show``: imports neither jax, numpy, scipy nor matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jaxhpo.analysis import summary
from jaxhpo.analysis.format import clean, duration, fitting, moment, number, percent, probability, shorten

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow

_WIDTH = 110
_MOST_HPARAMS = 24


def format_record(record: StudyRecord) -> str:
    """Status, best trial, the five best, diverged trials and speed, as text of at most 110 columns where names allow."""
    finished, best = len(record.trials), summary.ranked(record)
    lost, speed = summary.num_diverged(record), summary.throughput(record)
    seed, optimizer = summary.seed_of(record), summary.optimizer_of(record)
    aim = f"{record.direction} {clean(record.metric)}"
    lines = [
        f"{clean(record.name)}: {record.status}{summary.ended_by(record)}, {summary.trials_of(record)} trials",
        f"  {aim}" + (f" with {clean(optimizer)}" if optimizer else "") + (f", seed {seed}" if seed is not None else ""),
        f"  begun {moment(record.created)}, {duration(summary.seconds_of(record))}"
        + (f", {number(speed, 3)} trials/s" if speed else ""),
    ]
    stopped, share = summary.num_stopped(record), (record.notes.get("lanes") or {}).get("share")
    if stopped:
        lines.append(f"  stopped early: {stopped} of {finished} ({percent(stopped / finished)})")
    if share is not None and share < 0.995:
        lines.append(f"  lanes at work: {percent(share)} of their steps")
    if lost:
        lines.append(f"  diverged: {lost} of {finished} ({percent(lost / finished)})")
        failure = next((trial for trial in record.trials if trial.error), None)
        if failure is not None:
            said = [line for line in str(failure.error).splitlines() if line.strip()]
            lines.append(f"  first error (trial {failure.number}): {shorten(said[-1] if said else '', 80)}")
    if not best:
        return "\n".join(
            [*lines, "", "No trial has finished with a loss yet." if not finished else "No trial has a finite loss."]
        )
    lines += ["", f"Best: {shorten(record.metric, 40)} {number(summary.stated(record, best[0]), 6)} (trial {best[0].number})"]
    caveat = summary.caveat(record, best[0])
    if caveat:
        lines.append(f"  {caveat}")
    hparams = list(best[0].hparams.items())
    width = min(max(len(clean(name)) for name, _ in hparams), 40) if hparams else 0
    lines += [f"  {shorten(name, 40):<{width}}  {fitting(x, 60, 6)}" for name, x in hparams[:_MOST_HPARAMS]]
    if len(hparams) > _MOST_HPARAMS:
        lines.append(f"  and {len(hparams) - _MOST_HPARAMS} more")
    lines += _confirmed(record)
    return "\n".join([*lines, "", *_top(record, best[:5])])


def _confirmed(record: StudyRecord) -> list[str]:
    """The winner over fresh seeds, where it was confirmed."""
    note = record.notes.get("confirmation")
    if not note:
        return []
    parts = []
    for split in ("validation", "test"):
        values = (note.get(split) or {}).get(record.metric) or []
        finite = [float(x) for x in values if x is not None and float("-inf") < float(x) < float("inf")]
        if finite:
            mean = sum(finite) / len(finite)
            text = f"{split} {number(mean, 5)}"
            if len(finite) > 1:
                variance = sum((x - mean) ** 2 for x in finite) / (len(finite) - 1)
                text += f" (standard error {number(math.sqrt(variance / len(finite)), 2)})"
            parts.append(text)
    if not parts:
        return []
    lines = [f"  mean over {note.get('seeds')} fresh seeds (trial {note.get('number')}): {', '.join(parts)}"]
    found = summary.certainty(record)
    if found is not None:
        lines.append(f"  truly better than the runner-up (trial {found[1]}) with probability {probability(found[0])}")
    return lines


def _top(record: StudyRecord, trials: list[TrialRow]) -> list[str]:
    """A table of trials; columns that do not fit are left out."""
    table = [["trial", *(str(trial.number) for trial in trials)]]
    table.append([shorten(record.metric, 20), *(number(summary.stated(record, trial), 5) for trial in trials)])
    for name in trials[0].hparams:
        table.append([shorten(name, 20), *(fitting(trial.hparams.get(name), 20, most=3) for trial in trials)])
    widths = [max(map(len, column)) for column in table]
    shown = 0
    while shown < len(table) and sum(widths[: shown + 1]) + 2 * (shown + 1) <= _WIDTH:
        shown += 1
    rows = zip(*(table[:shown]), strict=True)
    lines = ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)) for row in rows]
    return [f"Best {len(trials)}:" if len(trials) > 1 else "The only one:", *lines]
