"""From a drawing function to an inline SVG that suits light and dark pages; scales and ticks. The one user of matplotlib.

Text and axes are drawn in one marked colour, which becomes ``currentColor`` in the SVG: they take the colour of
the page. Data are drawn in colours of middle lightness, readable on both.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxhpo.analysis.format import clean, number

INK = "#010203"
BLUE, ORANGE, RED, GREY = "#2f7ed8", "#e8590c", "#d6336c", "#8b95a1"
SERIES = (BLUE, ORANGE, "#2b9348", "#9b5de5", "#d6336c", "#0b9fb0", "#b08900", "#7a869a")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))
_LARGEST = 1e150  # beyond it the differences of a linear axis overflow


@dataclass(frozen=True)
class Plot:
    """A figure: an SVG element as text, a title for those who cannot see it, and a caption."""

    name: str
    title: str
    svg: str
    caption: str = ""
    wide: bool = False


def blend(share: float) -> str:
    """A colour from blue (0) over a light violet-grey to orange (1): readable on light and dark, and by the colour-blind."""
    ends = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in (BLUE, "#b3a7ad", ORANGE)]
    if not math.isfinite(share):
        return GREY
    place = 2 * min(max(share, 0.0), 1.0)
    first, part = min(int(place), 1), place - min(int(place), 1)
    return "#" + "".join(f"{round(a + part * (b - a)):02x}" for a, b in zip(ends[first], ends[first + 1], strict=True))


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def render(name: str, title: str, size: tuple[float, float], draw: Callable[[Any], None]) -> str:
    """Call ``draw(figure)`` on an empty figure of ``size`` (points) and return its SVG; the user's style does not count.

    ``name`` must be unique among the figures of one page: it begins every id.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 10, "axes.labelsize": 10,
        "axes.titlesize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.spines.top": False,
        "axes.spines.right": False, "lines.linewidth": 1.8, "path.simplify": True,
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that only the measuring font lacks
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(buffer.getvalue(), name, title)


def _inline(text: str, name: str, title: str) -> str:
    """Cut the XML prologue and the page-wide style, make ids unique, let text and axes follow the page."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(id="|"#|url\(#)', lambda match: f"{match[1]}{name}-", text)
    text = re.sub(r"font-family: [^;\"]*sans-serif", "font-family: system-ui, sans-serif", text)
    text = text.replace(INK, "currentColor").replace(' transform="rotate(-0 ', ' transform="rotate(0 ')
    parts = r"(?:figure|axes|patch|line2d|text|[xy]tick|matplotlib\.axis|\w+Collection|legend)"
    text = re.sub(rf' id="[^"]*-{parts}_?\d*"', "", text)  # names of parts that nothing refers to
    text = re.sub(r"\n\s*", "\n", text)
    head = f'<svg role="img" aria-label="{html.escape(clean(title))}" style="stroke-linejoin: round; stroke-linecap: butt" '
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    assert size is not None
    text = text.replace(size[0], "", 1)
    return head + text[len("<svg ") :].strip()


def scale_of(values: Any, factor: float = 100.0) -> tuple[str, float]:
    """How an axis should show finite ``values``: ``("log", 0)``, ``("linear", 0)`` or ``("symlog", threshold)``.

    Logarithmic where positive values span more than ``factor``; symmetric-logarithmic where only zero or a
    negative sign throughout stands in the way.
    """
    values = np.asarray(values, np.float64)
    size = np.abs(values[values != 0])
    if not size.size or size.max() / size.min() <= factor or ((values > 0).any() and (values < 0).any()):
        return "linear", 0.0
    return ("log", 0.0) if (values > 0).all() else ("symlog", float(max(size.min(), size.max() * 1e-12)))


def edge_of(values: Any, sign: float) -> float:
    """The worst value that a linear axis should show, so that a few wild ones do not flatten the rest.

    ``sign`` is 1 where high is bad, -1 where low is bad. It is the worst of all where nothing is wild.
    """
    bad = np.sort(sign * np.asarray(values, np.float64))
    most = bad[math.ceil(0.9 * (bad.size - 1))]
    span = min(most, _LARGEST) - max(bad[0], -_LARGEST)
    limit = most + 0.5 * span if span > 0 and bad[-1] > most + 2 * span else bad[-1]
    return sign * float(np.clip(limit, -_LARGEST, _LARGEST))


def worst_shown(scale: tuple[str, float], values: Any, sign: float) -> float:
    """``edge_of`` on an axis of that scale: a logarithmic one is cut, too, where a few values lie far beyond all others."""
    worst = sign * float((sign * np.asarray(values)).max())
    if scale[0] == "log":
        edge = math.exp(edge_of(np.log(values), sign))
        return worst if math.isclose(edge, worst, rel_tol=1e-9) else edge
    return edge_of(values, sign) if scale[0] == "linear" else worst


def clip_to(values: Any, edge: float, sign: float) -> tuple[np.ndarray, int]:
    """Values no worse than ``edge``, and how many were."""
    values = np.asarray(values, np.float64)
    beyond = sign * values > sign * edge
    return np.clip(np.where(beyond, edge, values), -_LARGEST, _LARGEST), int(beyond.sum())


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round ticks between two positive bounds: decades, or 1-2-5 where there are few, or the bounds themselves."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = [10.0**k for k in range(first, last + 1)]
    if len(decades) >= 3:
        return decades[:: math.ceil((len(decades) - 1) / (most - 1))] if len(decades) > most else decades
    fine = [
        m * 10.0**k
        for k in range(first - 1, last + 1)
        for m in (1, 2, 5)
        if low * (1 - 1e-9) <= m * 10.0**k <= high * (1 + 1e-9)
    ]
    if len(fine) > most:
        fine = fine[:: math.ceil(len(fine) / most)]
    return fine if len(fine) >= 2 else [low, high] if high > low else [low]


def linear_ticks(low: float, high: float, most: int = 5, whole: bool = False) -> list[float]:
    """Round ticks between two bounds, about ``most``; ``whole`` numbers only where asked for."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    step = float(max(1, math.ceil(step))) if whole else step
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [k * step for k in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Labels with as few digits as tell the ticks apart."""
    for digits in range(3, 12):
        labels = [number(float(f"{x:.12g}"), digits) for x in values]
        if len(set(labels)) == len(set(map(float, values))):
            return labels
    return [number(x, 12) for x in values]


def set_scale(axis: Any, scale: tuple[str, float], bounds: tuple[float, float], most: int = 6, whole: bool = False) -> None:
    """Scale, ticks and labels for a matplotlib axis whose data lie within ``bounds``."""
    from matplotlib import ticker

    kind, threshold = scale
    low, high = bounds
    set_kind = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    if kind == "log":
        set_kind("log")
        ticks = log_ticks(low, high, most)
    elif kind == "symlog":
        set_kind("symlog", linthresh=threshold)
        size = log_ticks(threshold, max(abs(low), abs(high)), most - 1)
        ticks = sorted([0.0, *(math.copysign(x, low + high) for x in size)])
    else:
        ticks = linear_ticks(low, high, most, whole)
    axis.set_major_locator(ticker.FixedLocator(ticks))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FixedFormatter(tick_labels(ticks)))


def grid(axes: Any) -> None:
    axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
