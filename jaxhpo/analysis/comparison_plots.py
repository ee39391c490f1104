"""The figures of a comparison: incumbents with bands over seeds, where the searches ended, how good all their trials were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis import canvas, curves
from jaxhpo.analysis.canvas import DASHES, SERIES, Plot
from jaxhpo.analysis.format import shorten
from jaxhpo.analysis.statistics import quantile_bands

if TYPE_CHECKING:
    from jaxhpo.analysis.compare import Comparison

MOST_ENTRIES = 8
MOST_POINTS = 400
_WIDTH, _HEIGHT, _LINE = 350.0, 245.0, 15.0


def figures(comparison: Comparison) -> list[Plot]:
    """The figures that there are data for."""
    drawn = (incumbents(comparison), incumbents_by_steps(comparison), final_edf(comparison), trials_edf(comparison))
    return [plot for plot in drawn if plot is not None]


def _sign(comparison: Comparison) -> float:
    return -1.0 if comparison.direction == "maximize" else 1.0


def _label(comparison: Comparison) -> str:
    return f"{shorten(comparison.metric, 30)} ({'higher' if comparison.direction == 'maximize' else 'lower'} is better)"


def _style(k: int) -> dict[str, Any]:
    return {"color": SERIES[k % len(SERIES)], "linestyle": DASHES[k % len(DASHES)]}


def _limited(comparison: Comparison) -> str:
    count = len(comparison.entries)
    return f" The first {MOST_ENTRIES} of {count} studies are drawn." if count > MOST_ENTRIES else ""


def _figure(name: str, title: str, names: Sequence[str], draw: Callable[[Any], None]) -> str:
    """A figure with its legend below, a line for each name or for two short ones."""

    def whole(figure: Any) -> None:
        axes = figure.add_subplot()
        draw(axes)
        canvas.grid(axes)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, handlelength=2.8)

    columns = 1 if max(map(len, names)) > 24 else 2
    return canvas.render(name, title, (_WIDTH, _HEIGHT + _LINE * -(-len(names) // columns)), whole)


def incumbents(comparison: Comparison) -> Plot | None:
    """Median best value over trials with the band between the quartiles of the seeds."""
    entries = comparison.entries[:MOST_ENTRIES]
    lines = [(e.name, np.arange(1, e.losses.shape[1] + 1), quantile_bands(e.losses)) for e in entries if e.losses.shape[1]]
    return _bands(comparison, "incumbents", "Best value over trials", "trials finished", lines)


def incumbents_by_steps(comparison: Comparison) -> Plot | None:
    """The same over the training steps spent; None where no study counts steps."""
    lines = [(e.name, e.spent, quantile_bands(e.losses_spent)) for e in comparison.entries[:MOST_ENTRIES] if e.spent.size]
    title = "Best value over training steps"
    return _bands(comparison, "incumbents-by-steps", title, "training steps of all trials finished", lines)


def _bands(comparison: Comparison, name: str, title: str, what: str, lines: Sequence[tuple[str, Any, Any]]) -> Plot | None:
    sign = _sign(comparison)
    everything = np.concatenate([band.ravel() for *_, band in lines]) if lines else np.empty(0)
    finite = sign * everything[np.isfinite(everything)]
    if not finite.size:
        return None

    def draw(axes: Any) -> None:
        scale = canvas.scale_of(finite, 10.0)
        edge = canvas.worst_shown(scale, finite, sign)
        best = sign * float((sign * finite).min())
        canvas.set_scale(axes.yaxis, scale, (min(best, edge), max(best, edge)))
        longest = max(float(x[-1]) for _, x, _ in lines)
        for k, (label, x, band) in enumerate(lines):
            at = np.unique(np.linspace(0, x.size - 1, min(x.size, MOST_POINTS)).astype(int))
            at = at[np.isfinite(band[1, at])]  # from where on half of the seeds have a value
            low, middle, high = (
                canvas.clip_to(np.where(np.isfinite(row[at]), sign * row[at], edge), edge, sign)[0] for row in band
            )
            axes.fill_between(x[at], low, high, step="post", color=SERIES[k % len(SERIES)], alpha=0.18, linewidth=0)
            axes.step(x[at], middle, where="post", label=shorten(label, 60), **_style(k))
        axes.set_xlabel(what)
        axes.set_ylabel(_label(comparison))
        axes.set_xlim(-0.02 * longest, max(1.02 * longest, 2))
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (0.0, max(longest, 2)), 5, whole=True)

    svg = _figure(name, title, [label for label, *_ in lines], draw)
    several = any(entry.final.size > 1 for entry in comparison.entries)
    caption = "Median over seeds, bands between the quartiles." if several else "One seed each, so there are no bands."
    return Plot(name, title, svg, caption + _limited(comparison))


def final_edf(comparison: Comparison) -> Plot | None:
    """Share of repeats that ended at least as good as each value; None where no entry has three repeats."""
    if max(entry.final.size for entry in comparison.entries) < 3:
        return None
    sign = _sign(comparison)
    lines = [(e.name, *curves.edf(sign * e.final)) for e in comparison.entries[:MOST_ENTRIES]]
    what = f"best {shorten(comparison.metric, 30)} of a search"
    title, said = "Where the searches ended", "Share of seeds whose search reached a value."
    return _distributions(comparison, "edf", title, (what, "share of seeds at least as good"), lines, said)


def trials_edf(comparison: Comparison) -> Plot | None:
    """Share of all trials of each study that are at least as good as each value."""
    lines = [(e.name, *curves.edf(e.every)) for e in comparison.entries[:MOST_ENTRIES]]
    said = "All trials of all seeds, each at its last value; a curve ends below 1 by its share of diverged trials."
    axes = (f"{shorten(comparison.metric, 30)} of a trial", "share of trials at least as good")
    return _distributions(comparison, "trials-edf", "How good the trials were", axes, lines, said)


def _distributions(
    comparison: Comparison, name: str, title: str, labels: tuple[str, str], lines: Sequence[tuple[str, Any, Any]], said: str
) -> Plot | None:
    lines, sign = [line for line in lines if line[1].size], _sign(comparison)
    if not lines:
        return None
    together = np.concatenate([line[1] for line in lines]) * sign
    scale = canvas.scale_of(together, 10.0)
    edge = canvas.worst_shown(scale, together, sign)
    best = sign * float((sign * together).min())

    def draw(axes: Any) -> None:
        canvas.set_scale(axes.xaxis, scale, (min(best, edge), max(best, edge)), 4)
        for k, (label, losses, share) in enumerate(lines):
            at = np.unique(np.linspace(0, losses.size - 1, min(losses.size, MOST_POINTS)).astype(int))
            at = at[losses[at] <= sign * edge]
            x, y = sign * losses[at], share[at]
            x, y = ([x[0], *x, edge], [0.0, *y, y[-1]]) if at.size else ([edge], [0.0])
            axes.step(x, y, where="post", label=shorten(label, 60), **_style(k))
        if sign < 0:
            axes.invert_xaxis()
        axes.set_ylim(0, 1.03)
        canvas.set_scale(axes.yaxis, ("linear", 0.0), (0.0, 1.0))
        axes.set_xlabel(f"{labels[0]}, better to the left")
        axes.set_ylabel(labels[1])

    svg = _figure(name, title, [label for label, *_ in lines], draw)
    cut = " Few far worse ones lie beyond the axis." if edge != sign * float((sign * together).max()) else ""
    return Plot(name, title, svg, said + cut + _limited(comparison))
