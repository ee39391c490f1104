"""Numbers, intervals, durations and values as people read them; used by every table, figure and summary."""

from __future__ import annotations

import datetime
import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxhpo.analysis.statistics import Interval

NOTHING = "–"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]+")


def number(x: Any, digits: int = 4) -> str:
    """``x`` with ``digits`` significant digits: 0.001235, 12346, 1.235e-7; None is a dash."""
    if x is None:
        return NOTHING
    if isinstance(x, int) and not isinstance(x, bool) and abs(x) < 10**15:
        return str(x)
    x = float(x)
    if not math.isfinite(x):
        return "NaN" if math.isnan(x) else "inf" if x > 0 else "-inf"
    if x == 0:
        return "0"
    if 10 ** min(digits, 6) <= abs(x) < 1e6:
        return str(round(x))
    text = f"{x:.{digits}g}"
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def interval(value: Interval) -> str:
    """Estimate and bounds, ``0.932 [0.925, 0.939]``, with as many digits as the width of the interval supports."""
    if not math.isfinite(value.estimate) or not (math.isfinite(value.low) and math.isfinite(value.high)):
        return number(value.estimate)
    width = max(value.high - value.estimate, value.estimate - value.low)
    size = max(abs(value.estimate), abs(value.low), abs(value.high))
    if width == 0 or size == 0:
        return f"{number(value.estimate)} [{number(value.low)}, {number(value.high)}]"
    places = 1 - math.floor(math.log10(width))  # two digits of the half width
    if 1e-4 <= size < 1e6 and places <= 8:
        shown = (round(x, max(places, 0)) + 0.0 for x in (value.estimate, value.low, value.high))  # never -0.000
        estimate, low, high = (f"{x:.{max(places, 0)}f}" for x in shown)
    else:
        digits = min(max(places + math.floor(math.log10(size)) + 1, 2), 8)
        estimate, low, high = (number(x, digits) for x in (value.estimate, value.low, value.high))
    return f"{estimate} [{low}, {high}]"


def probability(x: float) -> str:
    """A probability with three decimals, and never quite 0 or 1."""
    return "<0.001" if x < 0.001 else ">0.999" if x > 0.999 else f"{x:.3f}"


def percent(share: float) -> str:
    """A share in ``[0, 1]`` as a percentage; never rounded to 0 % or 100 % when it is neither."""
    value = 100.0 * share
    if 0 < value < 0.1:
        return "< 0.1 %"
    if 99.9 < value < 100:
        return "> 99.9 %"
    return f"{value:.1f}".removesuffix(".0") + " %"


def p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def duration(seconds: float | None) -> str:
    """Seconds as ``0.42 s``, ``12 s``, ``3 min 20 s``, ``5 h 07 min``, ``2 d 3 h``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{number(seconds, 2 if seconds < 10 else 3)} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(unix: float | None) -> str:
    """Unix seconds as a date and time in UTC."""
    if unix is None:
        return NOTHING
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def clean(text: Any) -> str:
    """Any text on one line, without control characters."""
    return _CONTROL.sub(" ", str(text)).strip()


def shorten(text: Any, width: int) -> str:
    """``clean`` text, cut in the middle so that two long labels that differ at their end still differ."""
    text = clean(text)
    if len(text) <= width:
        return text
    tail = (width - 1) // 3
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]


def value(x: Any, digits: int = 4, most: int = 6) -> str:
    """A hyperparameter: a number, a label, or the first ``most`` elements of an array and its shape."""
    if isinstance(x, (list, tuple)):
        shape, inner = [], x
        while isinstance(inner, (list, tuple)) and inner:
            shape.append(len(inner))
            inner = inner[0]
        flat = flatten(x)
        shown = ", ".join(value(element, digits) for element in flat[:most])
        if len(flat) <= most and len(shape) == 1:
            return f"[{shown}]"
        return f"[{shown}{', …' if len(flat) > most else ''}] ({'×'.join(map(str, shape))})"
    if isinstance(x, bool) or x is None or isinstance(x, str):
        return clean(x)
    return number(x, digits) if isinstance(x, (int, float)) else clean(x)


def fitting(x: Any, width: int, digits: int = 4, most: int = 6) -> str:
    """A hyperparameter in ``width`` characters: of an array as many elements as fit, never half a number."""
    while isinstance(x, (list, tuple)) and most > 1 and len(value(x, digits, most)) > width:
        most -= 1
    return shorten(value(x, digits, most), width)


def flatten(x: Any) -> list[Any]:
    """The elements of nested lists, in row-major order."""
    return [leaf for element in x for leaf in flatten(element)] if isinstance(x, (list, tuple)) else [x]


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one dictionary with dotted names."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, child in tree.items()
        for name, leaf in dotted(child, f"{prefix}.{key}" if prefix else str(key)).items()
    }
