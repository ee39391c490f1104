"""Figures of what happened within trainings: learning curves, who copied whom, the winner's schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis import canvas, summary
from jaxhpo.analysis.canvas import BLUE, GREY, INK, ORANGE, RED, Plot
from jaxhpo.analysis.columns import Column, columns
from jaxhpo.analysis.curves import Curve, learning_curves
from jaxhpo.analysis.format import shorten
from jaxhpo.analysis.plots import SMALL, WIDE, metric_label, sign_of, value_axis

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord, TrialRow

MOST_CURVES = 200
MOST_LANES, MOST_BARS = 64, 2000
MOST_SCHEDULES = 12
_LINK = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "alpha": 0.6}
_OWN_LINK = {"arrowstyle": "->,head_width=0.16,head_length=0.3", "color": INK, "linewidth": 1.6}


def losses_over_steps(record: StudyRecord) -> Plot | None:
    """The metric over training steps, a line a trial; None where no trial was looked at before its end."""
    every = learning_curves(record)
    best = summary.ranked(record)
    if not best or not any(len(curve.steps) > 1 or not curve.trial.whole for curve in every):
        return None
    sign, line = sign_of(record), summary.lineage_of(record, best[0])
    ancestry = {trial.number for trial in line}
    shown = _thin(every, ancestry)
    values = sign * np.concatenate([curve.losses for curve in shown])
    steps = np.concatenate([curve.steps for curve in shown])
    first, last = float(steps[steps > 0].min(initial=np.inf)), float(steps.max())
    if not last > 0:
        return None
    axis = ("log", 0.0) if last > 8 * first and not record.has_lineage else ("linear", 0.0)
    beyond = [0]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        edge = value_axis(axes, sign * float(np.min(sign * values)), values, sign, 10.0)
        beyond[0] = canvas.clip_to(values, edge, sign)[1]
        for curve in sorted(shown, key=lambda curve: (curve.trial.whole, -curve.losses[-1])):
            _line(axes, curve, canvas.clip_to(sign * curve.losses, edge, sign)[0])
        for curve in (curve for curve in shown if curve.trial.number in ancestry):
            y = canvas.clip_to(sign * curve.losses, edge, sign)[0]
            cut = curve.steps <= _end_of(line, curve.trial)
            axes.plot(curve.steps[cut], y[cut], color=ORANGE, linewidth=2.4, zorder=5, solid_capstyle="round")
            if curve.trial.number == best[0].number:
                axes.plot(curve.steps[-1:], y[-1:], "o", color=ORANGE, markersize=6, zorder=6)
        axes.set_xlabel("training steps" + (" (log scale)" if axis[0] == "log" else ""))
        axes.set_ylabel(metric_label(record))
        canvas.set_scale(axes.xaxis, axis, (first if axis[0] == "log" else 0.0, last), 6, whole=True)
        if axis[0] == "linear":
            axes.set_xlim(0, 1.02 * last)
        canvas.grid(axes)

    svg = canvas.render("curves", title := "Learning curves", WIDE, draw)
    says = ["Blue trials were trained to the end, grey ones were stopped where their line ends in a tick."]
    if any(curve.trial.diverged for curve in shown):
        says.append("A red cross: diverged after this point.")
    says.append("Orange is the winner" + (", with the trials whose training state it took over." if len(line) > 1 else "."))
    if len(shown) < len(every):
        says.append(f"{len(shown)} of {len(every)} trials with a loss are drawn, the best {MOST_CURVES // 3} among them.")
    if beyond[0]:
        says.append(f"{beyond[0]} worse {'value lies' if beyond[0] == 1 else 'values lie'} beyond the axis, drawn at its edge.")
    return Plot("curves", title, svg, " ".join(says), wide=True)


def _line(axes: Any, curve: Curve, y: np.ndarray) -> None:
    """One trial: blue if it was trained to the end, else grey up to a tick, or to a red cross where it diverged."""
    lost = curve.trial.diverged
    if curve.trial.whole and not lost:
        axes.plot(curve.steps, y, color=BLUE, alpha=0.55, linewidth=1.1, zorder=3)
        return
    axes.plot(curve.steps, y, color=GREY, alpha=0.45, linewidth=0.9, zorder=2)
    mark, color = ("x", RED) if lost else ("|", GREY)
    axes.plot(
        curve.steps[-1:], y[-1:], mark, color=color, markersize=5, markeredgewidth=1.2, alpha=0.9, zorder=4 if lost else 2
    )


def _end_of(line: Sequence[TrialRow], trial: TrialRow) -> int:
    """The step up to which a trial's training belongs to the lineage."""
    place = [one.number for one in line].index(trial.number)
    return line[place + 1].start if place + 1 < len(line) else trial.steps


def _thin(every: Sequence[Curve], kept: set[int]) -> list[Curve]:
    """At most 200 and the kept ones: the best third by rank, the others at even steps."""
    if len(every) <= MOST_CURVES:
        return list(every)
    order = sorted(range(len(every)), key=lambda i: (not every[i].trial.whole, -every[i].trial.steps, every[i].losses[-1]))
    best, rest = order[: MOST_CURVES // 3], sorted(order[MOST_CURVES // 3 :])
    even = [rest[i] for i in np.linspace(0, len(rest) - 1, MOST_CURVES - len(best)).astype(int)]
    chosen = {*best, *even, *(i for i, curve in enumerate(every) if curve.trial.number in kept)}
    return [every[i] for i in sorted(chosen)]


# Who copied whom


@dataclass(frozen=True)
class _Bars:
    """Trials as bars: ``(begin, end)`` of each by number, in steps that its lane has trained, and the row of each lane."""

    trials: list[TrialRow]
    span: dict[int, tuple[float, float]]
    row: dict[int, int]


def _bars(trials: Sequence[TrialRow], ancestry: set[int]) -> _Bars:
    """The bars of the lanes that there is room for, those of the ancestry always among them."""
    lanes = sorted({trial.lane for trial in trials})
    needed = {trial.lane for trial in trials if trial.number in ancestry}
    room = min(MOST_LANES, max(1, MOST_BARS * len(lanes) // len(trials)))
    even = np.linspace(0, len(lanes) - 1, min(room, len(lanes))).astype(int)
    row = {lane: i for i, lane in enumerate(sorted(needed | {lanes[k] for k in even}))}
    # A lane's first trial trains in every round from 0 to the one in which it ends; no trial trains faster.
    pace = max((trial.steps - trial.start) / (trial.round + 1) for trial in trials)
    shown = [trial for trial in trials if trial.lane in row]
    ends = {trial.number: (trial.round + 1) * pace for trial in shown}
    return _Bars(shown, {t.number: (ends[t.number] - (t.steps - t.start), ends[t.number]) for t in shown}, row)


def lineage(record: StudyRecord, important: str | None = None) -> Plot | None:
    """Lanes over the steps that they have trained, coloured by a hyperparameter, with a link where a state was copied.

    None where no trial took over another's training state. ``important`` is the hyperparameter, by default the first.
    """
    if not record.has_lineage:
        return None
    best, found = summary.ranked(record), columns(record, record.trials)[0]
    matches = [column for column in found if column.name == important]
    column = (matches or found or [None])[0]
    line = summary.lineage_of(record, best[0]) if best else []
    bars = _bars(record.trials, {trial.number for trial in line})
    until = {trial.number: bars.span[trial.number][0] + _end_of(line, trial) - trial.start for trial in line}
    shade = np.full(len(record.trials), 0.5) if column is None else column.unit(column.values)
    colors = {trial.number: canvas.blend(float(x)) for trial, x in zip(record.trials, shade, strict=True)}
    size = (WIDE[0], min(max(230.0, 60.0 + 9.0 * len(bars.row)), 560.0))

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        thick = min(6.0, max(1.2, 0.56 * size[1] / len(bars.row)))
        for trial in bars.trials:
            _bar(axes, bars, trial, colors[trial.number], thick, until.get(trial.number))
        if best:
            axes.plot(bars.span[best[0].number][1:], [bars.row[best[0].lane]], "o", color=INK, markersize=7, zorder=7)
        last = max(end for _, end in bars.span.values())
        axes.set_xlim(0, last * 1.015)
        axes.set_ylim(len(bars.row) - 0.3, -0.7)
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (0.0, last), 7, whole=True)
        lanes = list(bars.row)[:: max(1, -(-len(bars.row) // 7))]
        axes.set_yticks([bars.row[lane] for lane in lanes], [str(lane) for lane in lanes])
        axes.set_xlabel("training steps that a lane has made")
        axes.set_ylabel("lane")
        if column is not None:
            _key(axes, column)

    svg = canvas.render("lineage", title := "Who copied whom", size, draw)
    says = ["Each bar is a trial; a line joins the lane whose training state was copied to the one that goes on with it."]
    if column is not None:
        says.append(f"Colour: {column.title}" + (", the hyperparameter that matters most." if matches else "."))
    if best:
        says.append("The bars with a border and the arrows are the winner's ancestry, which ends at the dot.")
    lanes = len({trial.lane for trial in record.trials})
    if len(bars.row) < lanes:
        says.append(f"{len(bars.row)} of {lanes} lanes are drawn.")
    return Plot("lineage", title, svg, " ".join(says), wide=True)


def _bar(axes: Any, bars: _Bars, trial: TrialRow, color: str, thick: float, until: float | None) -> None:
    """One trial and the link to its parent; with a border up to ``until`` where it belongs to the winner's ancestry."""
    y, span, own = bars.row[trial.lane], bars.span[trial.number], until is not None
    if own:
        axes.plot([span[0], until], [y, y], color=INK, linewidth=thick + 3, solid_capstyle="butt", zorder=3)
    axes.plot(span, [y, y], color=color, linewidth=thick, solid_capstyle="butt", zorder=4 if own else 2)
    if trial.diverged:
        axes.plot(span[1:], [y], "x", color=RED, markersize=5, markeredgewidth=1.4, zorder=5)
    from_ = next((bars.row[one.lane] for one in bars.trials if one.number == trial.parent), y)
    if from_ != y:
        head, look = ("->,head_width=0.16,head_length=0.3", {"color": INK, "linewidth": 1.6}) if own else ("-", _LINK)
        arrow: dict[str, Any] = {"arrowstyle": head, "shrinkA": 0, "shrinkB": 0, **look}
        axes.annotate("", (span[0], y), (span[0], from_), arrowprops=arrow, zorder=6 if own else 2.5)


def _key(axes: Any, column: Column) -> None:
    """What the colours stand for, as a strip with ticks on the right."""
    strip = axes.inset_axes((1.025, 0.08, 0.02, 0.84))
    count = len(column.labels) if column.kind == "choice" else 24
    for i in range(count):
        low, high = i / count, (i + 1) / count
        strip.fill_between([0, 1], low, high, color=canvas.blend(i / max(count - 1, 1)), linewidth=0)
    strip.set_xlim(0, 1)
    strip.set_ylim(0, 1)
    strip.set_xticks([])
    if column.kind == "choice":
        strip.set_yticks([(i + 0.5) / count for i in range(count)], [shorten(label, 12) for label in column.labels])
    else:
        ticks = canvas.log_ticks(column.low, column.high) if column.log else canvas.linear_ticks(column.low, column.high)
        strip.set_yticks(column.unit(np.asarray(ticks)), canvas.tick_labels(ticks))
    strip.yaxis.tick_right()
    strip.tick_params(length=2, pad=2)
    strip.set_title(shorten(column.title, 16), fontsize=9, loc="left", pad=8)
    for side in strip.spines.values():
        side.set_visible(False)


# The winner's schedule


def schedules(record: StudyRecord) -> list[Plot]:
    """One small figure for every hyperparameter that changes along the winner's ancestry, over its training steps."""
    best = summary.ranked(record)
    line = summary.lineage_of(record, best[0]) if best else []
    if len(line) < 2:
        return []
    ends = [*(trial.start for trial in line[1:]), line[-1].steps]
    parts = [(trial, end) for trial, end in zip(line, ends, strict=True) if end > trial.start]
    found = columns(record, [trial for trial, _ in parts])[0]
    moving = [column for column in found if np.unique(column.values[~np.isnan(column.values)]).size > 1]
    edges = np.array([parts[0][0].start, *(end for _, end in parts)], np.float64)
    return [
        Plot(f"schedule{i}", f"{column.title} along the winner's training", _schedule(f"schedule{i}", column, edges))
        for i, column in enumerate(moving[:MOST_SCHEDULES])
    ]


def _schedule(name: str, column: Column, edges: np.ndarray) -> str:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.step(edges, np.append(column.values, column.values[-1]), where="post", color=BLUE, linewidth=2)
        axes.set_title(shorten(column.title, 36))
        axes.set_xlabel("training steps")
        axes.set_xlim(0, edges[-1] * 1.02)
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (0.0, edges[-1]), 4, whole=True)
        if column.kind == "choice":
            axes.set_yticks(range(len(column.labels)), [shorten(label, 12) for label in column.labels])
            axes.set_ylim(-0.4, len(column.labels) - 0.6)
        else:
            canvas.set_scale(
                axes.yaxis, ("log" if column.log else "linear", 0.0), (column.low, column.high), 4, column.kind == "int"
            )
            low, high = (np.log(column.low), np.log(column.high)) if column.log else (column.low, column.high)
            ends = np.array([low - 0.04 * (high - low), high + 0.04 * (high - low)])
            axes.set_ylim(*(np.exp(ends) if column.log else ends))
        canvas.grid(axes)

    return canvas.render(name, f"{column.title} along the winner's training", SMALL, draw)
