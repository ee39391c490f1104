"""The figures of a study as inline SVG; each returns None where there is nothing to draw. matplotlib is needed here only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis import canvas, curves
from jaxhpo.analysis.canvas import BLUE, GREY, ORANGE, RED, Plot
from jaxhpo.analysis.columns import Column, by_association, columns
from jaxhpo.analysis.format import clean, number, percent, shorten

if TYPE_CHECKING:
    from jaxhpo.analysis.importance import Importance
    from jaxhpo.study.record import StudyRecord, TrialRow

MOST_POINTS = 1000
MOST_LINES = 300
MOST_AXES = 10
MOST_SLICES = 12
MOST_BARS = 20
SMALL, MIDDLE, WIDE = (240.0, 175.0), (350.0, 235.0), (760.0, 330.0)


def sign_of(record: StudyRecord) -> float:
    """What turns a loss into the metric as the user stated it."""
    return -1.0 if record.direction == "maximize" else 1.0


def metric_label(record: StudyRecord) -> str:
    return f"{shorten(record.metric, 30)} ({'higher' if record.direction == 'maximize' else 'lower'} is better)"


def _thin(losses: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most ``most`` trials: the best third, and the others at even steps."""
    if losses.size <= most:
        return np.arange(losses.size)
    order = np.argsort(losses, kind="stable")
    best, rest = order[: most // 3], np.sort(order[most // 3 :])
    return np.sort(np.concatenate([best, rest[np.linspace(0, rest.size - 1, most - best.size).astype(int)]]))


def _turns(best: np.ndarray) -> np.ndarray:
    """Where the incumbent changes."""
    return np.flatnonzero(best < np.concatenate([[np.inf], best[:-1]]))


def value_axis(axes: Any, best: float, values: np.ndarray, sign: float, factor: float = 100.0) -> float:
    """Set up the y axis for finite ``values`` of the metric, whose best is ``best``; returns the worst value that it shows."""
    scale = canvas.scale_of(values, factor)
    edge = canvas.worst_shown(scale, values, sign)
    canvas.set_scale(axes.yaxis, scale, (min(best, edge), max(best, edge)))
    return edge


def _beyond(count: int) -> str:
    return f" {count} worse {'trial lies' if count == 1 else 'trials lie'} beyond the axis, drawn at its edge." if count else ""


def incumbent_over_trials(record: StudyRecord) -> Plot | None:
    """Best value after every finished trial, over all trials as points."""
    sign, losses = sign_of(record), curves.losses_of(curves.in_order_of_ends(record.trials))
    finite = np.flatnonzero(np.isfinite(losses))
    if not finite.size:
        return None
    best = curves.incumbent_by_trial(record.trials)
    shown = finite[_thin(losses[finite], MOST_POINTS)]
    beyond = [0]

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        edge = value_axis(axes, sign * best[-1], sign * losses[finite], sign)
        y, _ = canvas.clip_to(sign * losses[shown], edge, sign)
        beyond[0] = canvas.clip_to(sign * losses[finite], edge, sign)[1]
        axes.plot(shown + 1, y, ".", color=GREY, alpha=0.6, markersize=5, markeredgewidth=0, zorder=1)
        turns = _turns(best)
        x, line = np.append(turns, losses.size - 1) + 1, np.append(best[turns], best[-1])
        axes.step(x, canvas.clip_to(sign * line, edge, sign)[0], where="post", color=BLUE)
        axes.plot([turns[-1] + 1], [sign * best[-1]], "o", color=ORANGE, markersize=6)
        axes.set_xlabel("trials finished")
        axes.set_ylabel(metric_label(record))
        axes.set_xlim(1 - 0.02 * losses.size, max(losses.size * 1.02, 2))
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (1, max(losses.size, 2)), whole=True)
        canvas.grid(axes)

    svg = canvas.render("trials", title := "Best value over trials", MIDDLE, draw)
    thinned = f" {shown.size} of {finite.size} trials are drawn." if shown.size < finite.size else ""
    return Plot("trials", title, svg, f"Best value so far (line) and every trial (points).{thinned}{_beyond(beyond[0])}")


def incumbent_over_time(record: StudyRecord) -> Plot | None:
    """Best value known over wall-clock seconds."""
    seconds, best = curves.incumbent_by_seconds(record.trials)
    known, sign = np.isfinite(best), sign_of(record)
    if not known.any():
        return None
    seconds, best = seconds[known], best[known]
    turns = _turns(best)
    last = float(seconds[-1])
    unit, name = (3600.0, "hours") if last > 2 * 3600 else (60.0, "minutes") if last > 120 else (1.0, "seconds")

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        edge = value_axis(axes, sign * best[-1], sign * best, sign)
        x, line = np.append(seconds[turns], last) / unit, np.append(best[turns], best[-1])
        axes.step(x, canvas.clip_to(sign * line, edge, sign)[0], where="post", color=BLUE)
        axes.plot([seconds[turns[-1]] / unit], [sign * best[-1]], "o", color=ORANGE, markersize=6)
        axes.set_xlabel(f"{name} since the study began")
        axes.set_ylabel(metric_label(record))
        axes.set_xlim(0, last / unit * 1.02 or 1.0)
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (0.0, last / unit or 1.0))
        canvas.grid(axes)

    svg = canvas.render("time", title := "Best value over time", MIDDLE, draw)
    return Plot("time", title, svg, "Best value known at each moment of the search.")


def diverged_share(record: StudyRecord) -> Plot | None:
    """Share of diverged trials in a running window; None where none diverged."""
    share, window = curves.diverged_share(record.trials)
    if not share.any():
        return None

    first = window - 1 if share.size > window else 0  # full windows only: the first trials alone say little

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        at = np.unique(np.linspace(first, share.size - 1, min(share.size - first, 600)).astype(int))
        axes.fill_between(at + 1, 100 * share[at], color=RED, alpha=0.2, linewidth=0)
        axes.plot(at + 1, 100 * share[at], "-" if at.size > 1 else "o", color=RED, linewidth=1.4)
        top = min(105.0, 115 * max(float(share[first:].max()), 0.02))
        axes.set_ylim(0, top)
        axes.set_xlabel("trials finished")
        axes.set_ylabel("diverged (%)")
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (1, max(share.size, 2)), whole=True)
        canvas.set_scale(axes.yaxis, ("linear", 0.0), (0.0, min(top, 100.0)))
        canvas.grid(axes)

    lost = int(np.isinf(curves.losses_of(record.trials)).sum())
    svg = canvas.render("diverged", title := "Diverged trials", MIDDLE, draw)
    caption = f"Share of diverged trials among the last {window}; {lost} of {share.size} ({percent(lost / share.size)}) in all."
    return Plot("diverged", title, svg, caption)


def importances(overall: Sequence[Importance], near: Sequence[Importance]) -> Plot | None:
    """Shares with their intervals, a row a hyperparameter, of ``overall`` and below it of ``near`` the best."""
    if not overall:
        return None
    rows, local = overall[:MOST_BARS], {one.name: one for one in near}

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        kinds = [(rows, BLUE, "o", "among all"), ([local.get(one.name) for one in rows], ORANGE, "s", "near the best")]
        kinds = kinds if local else kinds[:1]
        for k, (told, color, marker, label) in enumerate(kinds):
            shift = 0.0 if len(kinds) == 1 else 0.32 * k - 0.16
            for i, one in enumerate(told):
                if one is None:
                    continue
                axes.plot([one.share.low, one.share.high], [i + shift] * 2, color=color, linewidth=2.2, alpha=0.6)
                axes.plot([one.share.estimate], [i + shift], marker, color=color, markersize=6, label=label if i == 0 else None)
        axes.set_yticks(range(len(rows)), [shorten(one.title, 26) for one in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        highest = max(one.share.high for told, *_ in kinds for one in told if one is not None)
        top = min(1.0, max(0.1, 1.05 * highest))
        axes.set_xlim(-0.01 * top, top)
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (0.0, top), 5)
        axes.set_xlabel("share of what decides, with its 95 % interval")
        axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        if len(kinds) > 1:
            figure.legend(loc="outside lower center", ncols=2)

    svg = canvas.render("importance", title := "Importance of the hyperparameters", (MIDDLE[0], 80 + 30 * len(rows)), draw)
    left = f"The {len(rows)} greatest of {len(overall)}." if len(rows) < len(overall) else ""
    return Plot("importance", title, svg, left)


def slices(record: StudyRecord) -> list[Plot]:
    """One small figure a hyperparameter, the value against the metric; at most 12, those most associated with the metric."""
    trials = sorted(record.trials, key=lambda trial: trial.number)
    losses, sign = curves.losses_of(trials), sign_of(record)
    finite = np.isfinite(losses)
    if not finite.any():
        return []
    chosen = _slice_columns(record, trials)
    shown = np.zeros(losses.size, bool)
    most = min(MOST_POINTS, 6000 // len(chosen)) if chosen else 0
    shown[np.flatnonzero(finite)[_thin(losses[finite], most)]] = True
    lost = np.flatnonzero(~finite)[:: max(1, int((~finite).sum()) // 300)]
    return [
        Plot(f"slice{i}", f"{column.title} against {clean(record.metric)}",
             _slice(f"slice{i}", record, column, sign * losses, shown, lost))
        for i, column in enumerate(chosen)
    ]  # fmt: skip


def _slice_columns(record: StudyRecord, trials: Sequence[TrialRow]) -> list[Column]:
    """In the order of the space where all fit, else the most associated ones first."""
    every, _ = columns(record, trials)
    return every if len(every) <= MOST_SLICES else [column for column, _ in by_association(record, trials)[:MOST_SLICES]]


def _slice(name: str, record: StudyRecord, column: Column, metric: np.ndarray, shown: np.ndarray, lost: np.ndarray) -> str:
    sign = sign_of(record)

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        at = np.flatnonzero(shown & ~np.isnan(column.values))
        jitter = 0.5 * ((np.arange(metric.size) * 0.618034) % 1 - 0.5) if column.kind == "choice" else 0.0
        x = column.values + jitter
        best = int(np.flatnonzero(np.isfinite(metric))[np.argmin(sign * metric[np.isfinite(metric)])])
        edge = value_axis(axes, metric[best], metric[np.isfinite(metric)], sign)
        axes.plot(
            x[at], canvas.clip_to(metric[at], edge, sign)[0], ".", color=BLUE, alpha=0.6, markersize=4.5, markeredgewidth=0
        )
        if lost.size:
            axes.plot(x[lost], np.full(lost.size, 0.985), "|", color=RED, alpha=0.8, markersize=6, markeredgewidth=0.9,
                      transform=axes.get_xaxis_transform(), clip_on=False)  # fmt: skip
        axes.plot(x[[best]], metric[[best]], "o", color=ORANGE, markersize=6, zorder=5)
        axes.margins(y=0.12)
        if column.kind == "choice":
            places = _label_places(len(column.labels), 6)
            widest = 18 if len(places) <= 2 else 42 // len(places)
            labels = [shorten(column.labels[k], max(widest, 6)) for k in places]
            axes.set_xticks(places, labels)
            axes.set_xlim(-0.6, len(column.labels) - 0.4)
        else:
            spread = 0.03 * (np.log(column.high / column.low) if column.log else column.high - column.low)
            canvas.set_scale(
                axes.xaxis, ("log" if column.log else "linear", 0.0), (column.low, column.high), 4, column.kind == "int"
            )
            if column.log:
                axes.set_xlim(column.low * np.exp(-spread), column.high * np.exp(spread))
            else:
                axes.set_xlim(column.low - spread, column.high + spread)
        axes.set_title(shorten(column.title, 36))
        axes.set_ylabel(shorten(record.metric, 20))
        canvas.grid(axes)

    return canvas.render(name, f"{column.title} against {clean(record.metric)}", SMALL, draw)


def _label_places(count: int, most: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // most))))


def slices_caption(record: StudyRecord) -> str:
    """What the slices show, and what they leave out."""
    trials = record.trials
    every, left_out = columns(record, trials)
    parts = ["Each point is a trial, the orange one the best."]
    if any(trial.diverged for trial in trials):
        parts.append("Red ticks at the top are diverged trials.")
    if len(every) > MOST_SLICES:
        parts.append(f"Shown are the {MOST_SLICES} of {len(every)} hyperparameters most associated with the metric.")
    return " ".join(parts + _array_notes(every, left_out))


def _array_notes(shown: Sequence[Column], left_out: Sequence[str]) -> list[str]:
    notes = ["Arrays are shown by their mean."] if any(column.size > 1 for column in shown) else []
    return notes + ([f"Left out, as arrays of choices: {shorten(', '.join(left_out), 80)}."] if left_out else [])


def parallel_coordinates(record: StudyRecord) -> Plot | None:
    """Trials as lines across their hyperparameters, coloured by rank from worst (grey) to best (orange)."""
    trials = [trial for trial, loss in zip(record.trials, curves.losses_of(record.trials), strict=True) if np.isfinite(loss)]
    if not trials:
        return None
    losses, sign = curves.losses_of(trials), sign_of(record)
    every, left_out = columns(record, trials)
    axes_of = every
    if len(every) > MOST_AXES:
        names = {column.name for column, _ in by_association(record, trials)[:MOST_AXES]}
        axes_of = [column for column in every if column.name in names]
    axes_of = [column for column in axes_of if not np.isnan(column.values).all()]
    if not axes_of:
        return None
    shown = _thin(losses, MOST_LINES)
    jitter = ((np.arange(losses.size) * 0.618034) % 1 - 0.5) * 0.08
    heights = [c.unit(c.values) + (jitter if c.kind == "choice" else 0.0) for c in axes_of]
    metric_height, metric_ticks = _metric_axis(sign * losses, sign)
    table = np.stack([*heights, metric_height], axis=1)
    rank = np.argsort(np.argsort(losses[shown], kind="stable")) / max(shown.size - 1, 1)  # 0 is best

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for place in np.argsort(-rank):
            color, alpha, width = _line_style(float(rank[place]))
            row = table[shown[place]]
            known = ~np.isnan(row)
            axes.plot(np.flatnonzero(known), row[known], color=color, alpha=alpha, linewidth=width, solid_joinstyle="round")
        best = table[np.argmin(losses)]
        axes.plot(np.flatnonzero(~np.isnan(best)), best[~np.isnan(best)], "-o", color=ORANGE, linewidth=2.4, markersize=5)
        ticks = [_axis_ticks(column) for column in axes_of] + [metric_ticks]
        for x, axis_ticks in enumerate(ticks):
            axes.plot([x, x], [-0.03, 1.03], color=canvas.INK, linewidth=0.7)
            for height, label in axis_ticks:
                axes.plot([x - 0.015, x + 0.015], [height, height], color=canvas.INK, linewidth=0.7)
                axes.text(x - 0.03, height, label, ha="right", va="center", fontsize=8)
        width = max(8, 110 // len(ticks))
        names = [shorten(column.title, width) for column in axes_of] + [shorten(record.metric, width)]
        for x, label in enumerate(names):
            axes.text(x, 1.07, label, ha="center", va="bottom", fontsize=9, fontweight="bold")
        axes.set_axis_off()
        axes.set_ylim(-0.06, 1.16)
        axes.set_xlim(-0.45, len(ticks) - 0.85)

    svg = canvas.render("parallel", title := "Hyperparameters of the trials", WIDE, draw)
    parts = [
        "The thick line is the best trial. By rank, orange are the best twentieth, blue the better half, grey the others.",
        "Diverged trials are not drawn.",
    ]
    if shown.size < losses.size:
        parts.append(f"{shown.size} of {losses.size} trials, the best {MOST_LINES // 3} among them.")
    if len(every) > MOST_AXES:
        parts.append(f"The {MOST_AXES} of {len(every)} hyperparameters most associated with the metric.")
    return Plot("parallel", title, svg, " ".join(parts + _array_notes(axes_of, left_out)), wide=True)


def _line_style(rank: float) -> tuple[str, float, float]:
    if rank < 0.05:
        return ORANGE, 0.6, 1.2
    return (BLUE, 0.5, 1.0) if rank < 0.25 else (BLUE, 0.25, 0.8) if rank < 0.5 else (GREY, 0.25, 0.7)


def _axis_ticks(column: Column) -> list[tuple[float, str]]:
    if column.kind == "choice":
        places = _label_places(len(column.labels), 12)
        heights = column.unit(np.asarray(places, np.float64))
        return [(float(h), shorten(column.labels[k], 14)) for h, k in zip(heights, places, strict=True)]
    ticks = (
        canvas.log_ticks(column.low, column.high)
        if column.log
        else canvas.linear_ticks(column.low, column.high, whole=column.kind == "int")
    )
    heights = column.unit(np.asarray(ticks))
    return [(float(h), label) for h, label in zip(heights, canvas.tick_labels(ticks), strict=True)]


def _metric_axis(values: np.ndarray, sign: float) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Heights of ``values`` of the metric on ``[0, 1]``, and the ticks: its best, middle and worst shown."""
    kind, threshold = canvas.scale_of(values)
    edge = canvas.edge_of(values, sign) if kind == "linear" else sign * float((sign * values).max())
    clipped, beyond = canvas.clip_to(values, edge, sign)
    moved = {
        "linear": lambda x: x,
        "log": lambda x: np.log(np.maximum(x, np.finfo(float).tiny)),
        "symlog": lambda x: np.sign(x) * np.log1p(np.abs(x) / (threshold or 1.0)),
    }[kind](clipped)
    low, high = float(moved.min()), float(moved.max())
    heights = (moved - low) / (high - low) if high > low else np.full(moved.shape, 0.5)
    order = np.argsort(heights, kind="stable")
    ticks = []
    for place in {int(order[0]), int(order[order.size // 2]), int(order[-1])}:
        worst = beyond and clipped[place] == edge
        label = ("≥ " if sign > 0 else "≤ ") if worst else ""
        ticks.append((float(heights[place]), label + number(float(clipped[place]))))
    apart = [tick for i, tick in enumerate(ticks) if all(abs(tick[0] - other[0]) > 0.05 for other in ticks[:i])]
    return heights, apart
