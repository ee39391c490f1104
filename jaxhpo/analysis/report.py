"""The report of one study: report.md for the terminal, report.html with figures, both from the same blocks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxhpo.analysis import canvas, plots, statistics, summary, training_plots
from jaxhpo.analysis.columns import by_association, range_of, type_of
from jaxhpo.analysis.config_text import to_toml
from jaxhpo.analysis.document import Block, Code, Facts, Figures, Heading, Paragraph, Table, to_html, to_markdown, write
from jaxhpo.analysis.format import (
    NOTHING,
    clean,
    dotted,
    duration,
    fitting,
    interval,
    moment,
    number,
    percent,
    probability,
    shorten,
    value,
)
from jaxhpo.analysis.importance import Importance
from jaxhpo.analysis.importance_words import mattered, overall_shares
from jaxhpo.hypergradients import gauge

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow

MOST_COLUMNS = 12
MOST_SETTINGS = 60
NO_MATPLOTLIB = "The figures need matplotlib: `pip install 'jaxhpo[plot]'`, then write the report again."


def write_report(record: StudyRecord, out_dir: Path | str | None = None) -> tuple[Path, Path]:
    """Write report.md and report.html into ``out_dir`` (by default the study's folder); returns both paths.

    Without matplotlib the report has its tables and says how to get the figures.

    Raises:
        JaxhpoError: where the folder cannot be written.
    """
    folder = Path(record.folder if out_dir is None else out_dir)
    title, figures = f"{clean(record.name)}: study report", canvas.has_matplotlib()
    seen = Paragraph("The figures are in report.html." if figures else NO_MATPLOTLIB)
    markdown = write(folder / "report.md", to_markdown(title, [*blocks_of(record, figures=False), seen]))
    pages = blocks_of(record, figures) + ([] if figures else [seen])
    return markdown, write(folder / "report.html", to_html(title, pages))


def blocks_of(record: StudyRecord, figures: bool) -> list[Block]:
    """The report as blocks, in the order in which it is read."""
    best = summary.ranked(record)
    parts = _head(record, best)
    if best:
        parts += _winner(record, best[0]) + _confirmation(record, best[0])
    overall = overall_shares(record) if best else []
    if figures:
        parts += _progress(record) + _trainings(record, overall)
    parts += mattered(record, overall, figures) + _searched(record, best)
    if best:
        parts += _top(record, best[:10])
    if figures:
        parts += _relations(record)
    return parts + _gauges(record) + _failures(record) + _speed(record) + _environment(record) + _rerun(record)


def _head(record: StudyRecord, best: Sequence[TrialRow]) -> list[Block]:
    finished, lost = len(record.trials), summary.num_diverged(record)
    aim = "lower is better" if record.direction == "minimize" else "higher is better"
    facts = [("status", record.status + summary.ended_by(record)), ("trials", summary.trials_of(record))]
    if best:
        facts.insert(0, (f"best {shorten(record.metric, 24)} in the search", number(summary.stated(record, best[0]), 5)))
    facts.append(("diverged", f"{lost} ({percent(lost / finished)})" if finished else NOTHING))
    stopped, share = summary.num_stopped(record), (record.notes.get("lanes") or {}).get("share")
    if stopped:
        facts.append(("stopped early", f"{stopped} ({percent(stopped / finished)})"))
    if share is not None:
        facts.append(("lanes at work", percent(share)))
    facts.append(("time", duration(summary.seconds_of(record)) if finished else NOTHING))
    speed = summary.throughput(record)
    if speed is not None:
        facts.append(("trials a second", number(speed, 3)))
    said = {
        "running": "The study is running; this report shows what was known when it was written.",
        "interrupted": f"The study was interrupted; `jaxhpo resume {_path(record)}` goes on where it stopped.",
        "failed": "The study failed; this report shows the trials finished until then.",
    }.get(record.status)
    optimizer = summary.optimizer_of(record)
    by = f" by {clean(optimizer)}" if optimizer else ""
    space = f"{len(record.space)} hyperparameter{'s' if len(record.space) != 1 else ''}"
    numbers = sum(math.prod(leaf.get("shape") or ()) for leaf in record.space)
    if numbers > len(record.space):
        space += f" ({numbers} numbers)"
    line = f"{space} searched{by} for {clean(record.metric)} ({aim}), begun {moment(record.created)}."
    parts: list[Block] = [Paragraph(line), Facts(facts)]
    if said:
        parts.append(Paragraph(said))
    if not finished:
        parts.append(Paragraph("No trial has finished yet."))
    elif not best:
        parts.append(Paragraph("Every finished trial diverged, so there is no winner: widen the space towards smaller steps."))
    return parts


def _winner(record: StudyRecord, best: TrialRow) -> list[Block]:
    rows = [[clean(leaf["name"]), value(best.hparams.get(leaf["name"]), 6, 16), range_of(leaf)] for leaf in record.space]
    known = {leaf["name"] for leaf in record.space}
    rows += [[clean(name), value(x, 6, 16), "constant"] for name, x in best.hparams.items() if name not in known]
    steps = f", {best.steps} training steps" if best.steps else ""
    line = f"Trial {best.number}{steps}, known after {duration(best.seconds)}."
    if not best.whole:
        line += f" {summary.caveat(record, best)}"
    parts: list[Block] = [Heading("The winner"), Paragraph(line), Table(["hyperparameter", "value", "searched"], rows)]
    return parts + _schedule(record, best)


def _schedule(record: StudyRecord, best: TrialRow) -> list[Block]:
    """The winner's schedule, where it took over others' training states."""
    lineage = summary.lineage_of(record, best)
    if len(lineage) == 1:
        return []
    ends = [*(trial.start for trial in lineage[1:]), best.steps]
    names = list(best.hparams)
    rows = [
        [str(trial.number), f"{trial.start} to {end}", *(value(trial.hparams.get(name), 5, 16) for name in names)]
        for trial, end in zip(lineage, ends, strict=True)
        if end > trial.start
    ]
    said = (
        "The values above are those at its end. It took over the training states of earlier trials, so that its training is "
        f"this schedule, which `jaxhpo replay {_path(record)}` trains again."
    )
    return [Paragraph(said), Table(["trial", "steps", *map(clean, names)], rows)]


def _confirmation(record: StudyRecord, best: TrialRow) -> list[Block]:
    """The winner over fresh seeds; or, without them, why its value in the search is not enough."""
    note, own = record.notes.get("confirmation"), summary.stated(record, best)
    optimistic = f"The value in the search, {number(own, 5)}, is that of a single training."
    if len(record.trials) > 1:
        optimistic = (
            f"The search's own best value, {number(own, 5)}, is optimistic: it is the luckiest of {len(record.trials)} trials, "
            "chosen by the same numbers that it is judged by."
        )
    if not note:
        return [Paragraph(optimistic + " The winner was not yet trained again on fresh seeds.")]
    rows, lost = [], 0
    for split in ("validation", "test"):
        for metric, values in sorted((note.get(split) or {}).items(), key=lambda pair: (pair[0] != record.metric, pair[0])):
            finite = [float(x) for x in values if x is not None and math.isfinite(float(x))]
            if metric == record.metric and split == "validation":
                lost = len(values) - len(finite)
            found = statistics.mean_interval(finite) if finite else None
            rows.append([
                split, clean(metric), interval(found) if found else NOTHING, number(_deviation(finite)),
                number(min(finite)) if finite else NOTHING, number(max(finite)) if finite else NOTHING, str(len(finite)),
            ])  # fmt: skip
    parts: list[Block] = [Heading("The winner on fresh seeds"), Paragraph(optimistic)]
    if note.get("number") != best.number:
        parts.append(Paragraph(f"These are runs of trial {note.get('number')}, which was the best when they were made."))
    parts.append(Table(["split", "metric", "mean [95 % interval]", "std", "lowest", "highest", "seeds"], rows))
    found = summary.certainty(record)
    if found is not None:
        chance, other = found
        verdict = (
            ": the two are not told apart" if 0.05 < chance < 0.95 else "" if chance > 0.5 else ": it is not the better one"
        )
        parts.append(
            Paragraph(
                f"The runner-up, trial {other}, was trained on the same seeds. The winner's mean {clean(record.metric)} is "
                f"truly better with probability {probability(chance)}{verdict}."
            )
        )
    if lost:
        parts.append(Paragraph(f"{lost} of {note.get('seeds')} fresh seeds diverged; the rows above are over the others."))
    said = (
        "Student's t interval over fresh seeds, which are for initial weights and the order of the data; the split is the same."
    )
    if not any((note.get("test") or {}).values()):
        said += " There is no test split here: the validation split also chose the winner."
    return [*parts, Paragraph(said, small=True)]


def _deviation(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1))


def _progress(record: StudyRecord) -> list[Block]:
    drawn = [plots.incumbent_over_trials(record), plots.incumbent_over_time(record), plots.diverged_share(record)]
    found = [plot for plot in drawn if plot is not None]
    return [Heading("Progress"), Figures(found)] if found else []


def _trainings(record: StudyRecord, overall: Sequence[Importance]) -> list[Block]:
    """Learning curves, copies and schedules, where trials were looked at before their end."""
    drawn = [training_plots.losses_over_steps(record), training_plots.lineage(record, overall[0].name if overall else None)]
    found, small = [plot for plot in drawn if plot is not None], training_plots.schedules(record)
    parts: list[Block] = [Heading("Within the trainings")] if found else []
    parts += [Figures([plot]) for plot in found]
    if small:
        said = "The winner's schedule: what changed along its ancestry, over the range that was searched."
        parts += [Figures(small, small=True), Paragraph(said, small=True)]
    return parts


def _relations(record: StudyRecord) -> list[Block]:
    lines, small = plots.parallel_coordinates(record), plots.slices(record)
    parts: list[Block] = [Heading("Hyperparameters and the metric")] if lines or small else []
    if lines:
        parts.append(Figures([lines]))
    if small:
        parts += [Figures(small, small=True), Paragraph(plots.slices_caption(record), small=True)]
    return parts


def _searched(record: StudyRecord, best: Sequence[TrialRow]) -> list[Block]:
    settings = [[clean(name), shorten(value(x, 6), 120)] for name, x in summary.settings_of(record).items()]
    related = {column.name: share for column, share in by_association(record, record.trials)} if best else {}
    header = ["hyperparameter", "type", "range"] + (["association"] if related else [])
    rows = []
    for leaf in record.space:
        share = related.get(clean(leaf["name"]))
        row = [clean(leaf["name"]), type_of(leaf), range_of(leaf)]
        rows.append(row + ([NOTHING if share is None else number(round(share, 2))] if related else []))
    parts: list[Block] = [Heading("What was searched"), Table(header, rows)]
    if related:
        text = (
            "Association: the share of the variance of the trials' ranks that one hyperparameter explains by itself (0 to 1), "
            "among the trials made; a search that gathers near its best shows less of it. Diverged trials count as the worst."
        )
        parts.append(Paragraph(text, small=True))
    if settings:
        parts.append(Table(["setting", "value"], settings[:MOST_SETTINGS]))
        if len(settings) > MOST_SETTINGS:
            parts.append(Paragraph(f"{len(settings) - MOST_SETTINGS} further settings are in the config below.", small=True))
    return parts


def _top(record: StudyRecord, trials: Sequence[TrialRow]) -> list[Block]:
    names = [leaf["name"] for leaf in record.space]
    if len(names) > MOST_COLUMNS:
        chosen = {column.name for column, _ in by_association(record, record.trials)[:MOST_COLUMNS]}
        names = [name for name in names if clean(name) in chosen]
    names_of = {name for trial in trials for name in trial.metrics if not gauge.is_gauge(name)}
    others = sorted(names_of - {record.metric})[:4]
    header = ["trial", clean(record.metric), *map(clean, others), "steps", *map(clean, names)]
    rows = [
        [
            str(trial.number),
            number(summary.stated(record, trial), 5),
            *(number(trial.metrics.get(name)) for name in others),
            str(trial.steps),
            *(fitting(trial.hparams.get(name), 40, most=4) for name in names),
        ]
        for trial in trials
    ]
    parts: list[Block] = [
        Heading(f"The best {len(trials)} trials" if len(trials) > 1 else "The best trial"),
        Table(header, rows),
    ]
    if len(names) < len(record.space):
        text = (
            f"{len(names)} of {len(record.space)} hyperparameters are shown; `jaxhpo export {_path(record)} --to csv` has all."
        )
        parts.append(Paragraph(text, small=True))
    return parts


def _gauges(record: StudyRecord) -> list[Block]:
    """The gradients of the study, where it had any: how large, how they grow on their way, what to doubt."""
    gauged = [trial for trial in record.trials if gauge.GRADIENT in trial.metrics]
    if not gauged:
        return []
    rows = []
    for name in sorted({name for trial in gauged for name in trial.metrics if gauge.is_gauge(name) and "@" not in name}):
        values = sorted(x for x in (trial.metrics.get(name) for trial in gauged) if x is not None and math.isfinite(x))
        if values:
            rows.append([name.removeprefix(gauge.PREFIX), *_median_and_range(values), f"{len(values)} of {len(gauged)}"])
    parts: list[Block] = [Heading("Hypergradients"), Table(["gauge", "median", "lowest", "highest", "finite"], rows)]
    kind, by_step = gauge.profile(trial.metrics for trial in gauged)
    if by_step:
        text = f"log10 of the norm of the weights' {kind} at some steps of the training, over all trials:"
        lines = [[str(step), *_median_and_range(sorted(values))] for step, values in by_step]
        parts += [Paragraph(text), Table(["step", "median", "lowest", "highest"], lines)]
    explained = (
        "gradient: norm of the gradient by the unit cube. growth: decades by which the derivative grows on its way through the "
        f"training; above {gauge.CHAOTIC:g} training is chaotic and its hypergradient noise."
    )
    parts.append(Paragraph(explained, small=True))
    return parts + [Paragraph(line) for line in gauge.findings((trial.loss, trial.metrics) for trial in gauged)]


def _median_and_range(ordered: Sequence[float]) -> list[str]:
    return [number(x, 3) for x in (ordered[len(ordered) // 2], ordered[0], ordered[-1])]


def _failures(record: StudyRecord) -> list[Block]:
    lost = summary.num_diverged(record)
    if not lost:
        return []
    text = f"{lost} of {len(record.trials)} trials ({percent(lost / len(record.trials))}) diverged or failed."
    failed = [trial for trial in record.trials if trial.error]
    parts: list[Block] = [Heading("Diverged trials"), Paragraph(text)]
    if failed:
        rows = []
        for trial in failed[:5]:
            said = [line for line in str(trial.error).splitlines() if line.strip()]
            rows.append([str(trial.number), shorten(said[-1] if said else "", 160)])
        parts += [Paragraph(f"{len(failed)} raised an error; the first of them:"), Table(["trial", "error"], rows)]
    return parts


def _speed(record: StudyRecord) -> list[Block]:
    timing = record.notes.get("timing") or {}
    rows = [["trials finished", str(len(record.trials))], ["time to the last result", duration(summary.seconds_of(record))]]
    speed, ran = summary.throughput(record), timing.get("run_seconds")
    if timing.get("compile_seconds") is not None:
        rows.append(["compiling", duration(timing["compile_seconds"])])
    if ran is not None:
        rows.append(["running", duration(ran)])
    if speed is not None:
        rows.append(["trials a second", number(speed, 3)])
    if ran:
        rows.append(["trials a second while running", number(len(record.trials) / ran, 3)])
    steps = (record.notes.get("lanes") or {}).get("steps") or sum(trial.steps - trial.start for trial in record.trials)
    if steps and ran:
        rows.append(["training steps a second while running", number(steps / ran, 3)])
    lanes, programs = record.notes.get("lanes") or {}, record.notes.get("programs") or {}
    if lanes.get("share") is not None:
        rows.append(["lanes at work, share of their steps", percent(lanes["share"])])
    rows += [[clean(name), value(x)] for name, x in timing.items() if name not in ("compile_seconds", "run_seconds")]
    parts: list[Block] = [Heading("Speed"), Table(["what", "value"], rows)] if record.trials else []
    if programs:
        said = f"{len(programs)} programs, one for each combination of static choices, compiled beside the training for:"
        parts += [Paragraph(said), Table(["program", "seconds"], [[clean(n), number(x, 3)] for n, x in programs.items()])]
    return parts


def _environment(record: StudyRecord) -> list[Block]:
    rows = [[clean(name), shorten(value(x, most=16), 200)] for name, x in dotted(record.env).items()] if record.env else []
    return [Heading("Environment"), Table(["what", "value"], rows)] if rows else []


def _path(record: StudyRecord) -> str:
    return shlex.quote(clean(record.folder))


def _rerun(record: StudyRecord) -> list[Block]:
    config: dict[str, Any] = record.config
    parts: list[Block] = [Heading("Run it again")]
    if isinstance(config.get("task"), dict) and "factory" in config["task"]:
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in record.name) or "study"
        parts += [
            Paragraph(f"Save this as {name}.toml, next to the code that it names, and run it. The same seed gives the same "
                      "trials on the same kind of device and versions; `--seed` draws others."),
            Code(f"jaxhpo run {shlex.quote(name + '.toml')}"),
            Code(to_toml(config)),
        ]  # fmt: skip
    else:
        parts.append(
            Paragraph("This study was started from Python: call the same function again with the same key and settings.")
        )
        if config:
            parts.append(Code(to_toml(config)))
    return parts
