"""The figures of a comparison: incumbents with bands over seeds, and where the repeats ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis import canvas, curves
from jaxhpo.analysis.canvas import DASHES, SERIES, Plot
from jaxhpo.analysis.format import shorten
from jaxhpo.analysis.statistics import quantile_bands

if TYPE_CHECKING:
    from jaxhpo.analysis.compare import Comparison, Entry

MOST_ENTRIES = 8


def figures(comparison: Comparison) -> list[Plot]:
    """The figures that there are data for."""
    return [plot for plot in (incumbents(comparison), final_edf(comparison)) if plot is not None]


def _label(comparison: Comparison) -> str:
    return f"{shorten(comparison.metric, 30)} ({'higher' if comparison.direction == 'maximize' else 'lower'} is better)"


def _style(k: int) -> dict[str, Any]:
    return {"color": SERIES[k % len(SERIES)], "linestyle": DASHES[k % len(DASHES)]}


def _limited(entries: tuple[Entry, ...]) -> str:
    return f" The first {MOST_ENTRIES} of {len(entries)} studies are drawn." if len(entries) > MOST_ENTRIES else ""


def incumbents(comparison: Comparison) -> Plot | None:
    """Median best value over trials with the band between the quartiles of the seeds."""
    sign = -1.0 if comparison.direction == "maximize" else 1.0
    bands = [(e.name, quantile_bands(e.losses)) for e in comparison.entries[:MOST_ENTRIES] if e.losses.shape[1]]
    everything = np.concatenate([band.ravel() for _, band in bands]) if bands else np.empty(0)
    finite = sign * everything[np.isfinite(everything)]
    if not finite.size:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        scale = canvas.scale_of(finite)
        edge = canvas.edge_of(finite, sign) if scale[0] == "linear" else sign * float((sign * finite).max())
        best = sign * float((sign * finite).min())
        canvas.set_scale(axes.yaxis, scale, (min(best, edge), max(best, edge)))
        longest = max(band.shape[1] for _, band in bands)
        for k, (name, band) in enumerate(bands):
            at = np.unique(np.concatenate([np.linspace(0, band.shape[1] - 1, min(band.shape[1], 400)).astype(int), [0]]))
            low, middle, high = (
                canvas.clip_to(np.where(np.isfinite(row[at]), sign * row[at], edge), edge, sign)[0] for row in band
            )
            axes.fill_between(at + 1, low, high, step="post", color=SERIES[k % len(SERIES)], alpha=0.18, linewidth=0)
            axes.step(at + 1, middle, where="post", label=shorten(name, 34), **_style(k))
        axes.set_xlabel("trials finished")
        axes.set_ylabel(_label(comparison))
        axes.set_xlim(1 - 0.02 * longest, max(1.02 * longest, 2))
        canvas.set_scale(axes.xaxis, ("linear", 0.0), (1, max(longest, 2)), whole=True)
        canvas.grid(axes)
        figure.legend(loc="outside lower center", ncols=1 if max(len(n) for n, _ in bands) > 20 else 2)

    svg = canvas.render("incumbents", title := "Best value over trials", (440, 280 + 12 * len(bands)), draw)
    return Plot("incumbents", title, svg, f"Median over seeds; bands between the quartiles.{_limited(comparison.entries)}")


def final_edf(comparison: Comparison) -> Plot | None:
    """Share of repeats that ended at least as good as each value; None where no entry has three repeats."""
    sign = -1.0 if comparison.direction == "maximize" else 1.0
    lines = [(e.name, *curves.edf(sign * e.final)) for e in comparison.entries[:MOST_ENTRIES]]
    lines = [line for line in lines if line[1].size]
    if not lines or max(entry.final.size for entry in comparison.entries) < 3:
        return None
    together = np.concatenate([line[1] for line in lines]) * sign

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        canvas.set_scale(axes.xaxis, canvas.scale_of(together), (float(together.min()), float(together.max())), 4)
        for k, (name, losses, share) in enumerate(lines):
            x, y = np.append(losses, (sign * together).max()), np.append(share, share[-1])
            axes.step(sign * np.append(x[:1], x), np.append([0.0], y), where="post", label=shorten(name, 34), **_style(k))
        if sign < 0:
            axes.invert_xaxis()
        axes.set_ylim(0, 1.03)
        canvas.set_scale(axes.yaxis, ("linear", 0.0), (0.0, 1.0))
        axes.set_xlabel(f"best {shorten(comparison.metric, 30)} of a search, better to the left")
        axes.set_ylabel("share of seeds at least as good")
        canvas.grid(axes)
        figure.legend(loc="outside lower center", ncols=1 if max(len(line[0]) for line in lines) > 20 else 2)

    svg = canvas.render("edf", title := "Where the searches ended", (440, 280 + 12 * len(lines)), draw)
    return Plot("edf", title, svg, f"Share of seeds whose search reached a value.{_limited(comparison.entries)}")
