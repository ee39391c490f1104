"""A document as a list of blocks, written as Markdown that reads in a terminal or as one self-contained HTML file."""

from __future__ import annotations

import html
import os
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxhpo.analysis.format import NOTHING, clean, shorten
from jaxhpo.errors import JaxhpoError

if TYPE_CHECKING:
    from jaxhpo.analysis.plots import Plot

_NUMERIC = re.compile(r"^(#|[-+<>] ?)?[\d.,]+(e[-+]?\d+)?( ?%| s| min.*| h.*| d.*)?( ?\[.*\])?( ±.*)?$|^-?inf$|^NaN$|^–$")


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    """Prose; text between backticks is code."""

    text: str
    small: bool = False


@dataclass(frozen=True)
class Facts:
    """Few short facts, shown large: name and value."""

    pairs: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room; small ones in a dense grid."""

    plots: Sequence[Plot]
    small: bool = False


Block = Heading | Paragraph | Facts | Table | Code | Figures


def write(path: Path, text: str) -> Path:
    """Write a text file whole or not at all.

    Raises:
        JaxhpoError: where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        raise JaxhpoError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def _numeric_columns(table: Table) -> list[bool]:
    return [bool(table.rows) and all(_NUMERIC.match(row[i]) for row in table.rows) for i in range(len(table.header))]


# Markdown


def _width(text: str) -> int:
    """Columns that a terminal needs."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cell(text: str) -> str:
    return re.sub(r"([|<\\`])", r"\\\1", shorten(text, 44))


def _plain(text: str) -> str:
    """Prose whose ``<`` cannot begin raw HTML where a viewer renders the file."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", clean(text))


def _markdown_table(table: Table) -> str:
    numeric = _numeric_columns(table)
    rows = [[_cell(cell) for cell in row] for row in [table.header, *table.rows]]
    widths = [max(3, *(_width(row[i]) for row in rows)) for i in range(len(table.header))]

    def line(row: Sequence[str]) -> str:
        padded = []
        for text, width, right in zip(row, widths, numeric, strict=True):
            space = " " * (width - _width(text))
            padded.append(space + text if right else text + space)
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|" + "|".join("-" * (w + 1) + ":" if right else "-" * (w + 2) for w, right in zip(widths, numeric, strict=True)) + "|"
    )
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    parts = ["# " + _plain(title)]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append("## " + _plain(text))
            case Paragraph(text):
                parts.append(textwrap.fill(_plain(text), 100, break_long_words=False, break_on_hyphens=False))
            case Facts(pairs):
                parts.append("\n".join(f"- {_plain(name)}: {_plain(fact)}" for name, fact in pairs))
            case Table():
                parts.append(_markdown_table(block))
            case Code(text):
                longest = max((len(run) for run in re.findall("`+", text)), default=0)
                fence = "`" * max(3, longest + 1)
                parts.append(f"{fence}\n{text.rstrip()}\n{fence}")
            case Figures():
                pass  # the HTML file has them
    return "\n\n".join(parts) + "\n"


# HTML

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1b2026; --muted: #59636e; --line: #d8dee4; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --ink: #e3e8ed; --muted: #98a4b0; --line: #333c46; --soft: #1d2329; }
}
@media print {
  :root { color-scheme: light; --page: #ffffff; --ink: #000000; --muted: #444444; --line: #bbbbbb; --soft: #ffffff; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 4rem; max-width: 76rem;
  background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
p.small, figcaption { color: var(--muted); font-size: .85rem; line-height: 1.4; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .6rem; margin: 1rem 0; }
dl > div { background: var(--soft); border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem; }
dt { color: var(--muted); font-size: .8rem; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; max-width: 100%; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .32rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); max-width: 24rem; }
th { color: var(--muted); font-weight: 600; white-space: nowrap; border-bottom-width: 2px; }
td { white-space: nowrap; }
td.w { white-space: normal; overflow-wrap: break-word; min-width: min(15rem, 60vw); }
td.n, th.n { text-align: right; }
pre { overflow-x: auto; background: var(--soft); border: 1px solid var(--line); border-radius: .5rem; padding: .75rem 1rem; }
pre, code { font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow-wrap: normal; }
p code { background: var(--soft); padding: .1em .3em; border-radius: .25em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem; margin: 1rem 0; }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: .8rem; }
figure { margin: 0; min-width: 0; max-width: 30rem; }
figure.wide { grid-column: 1 / -1; max-width: none; }
figure.wide svg { min-width: 48rem; }
figure.wide text { paint-order: stroke; stroke: var(--page); stroke-width: 2.5px; }
figure .scroll { margin: 0; }
svg { display: block; width: 100%; height: auto; }
@media (max-width: 34rem) {
  table { font-size: .8rem; }
  th, td { padding: .3rem .4rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .scroll, pre { overflow: visible; white-space: pre-wrap; }
  .scroll { white-space: normal; }
  .figures { grid-template-columns: 1fr 1fr; }
  .figures.small { grid-template-columns: 1fr 1fr 1fr; }
  figure.wide svg { min-width: 0; }
  th, td { padding: .2rem .4rem; }
  td, th { white-space: normal; }
  figure, tr, dl > div { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""


def _escape(text: str) -> str:
    return html.escape(clean(text))


def _together(text: str) -> str:
    """Escaped text in which a number and its unit stay on one line."""
    return re.sub(r"(?<=\d) (?=%|s\b|min\b|h\b)", "\u00a0", _escape(text))


def _prose(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", _together(text))


def _mark(cell: str, mark: str) -> str:
    """Numbers keep their line; long text gets room to wrap in."""
    return mark or (' class="w"' if len(cell) > 24 else "")


def _html_table(table: Table) -> str:
    marks = [' class="n"' if right else "" for right in _numeric_columns(table)]
    head = "".join(f'<th scope="col"{mark}>{_escape(cell)}</th>' for cell, mark in zip(table.header, marks, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{_mark(cell, mark)}>{_escape(cell)}</td>" for cell, mark in zip(row, marks, strict=True))
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table: {_escape(table.header[0])}">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_figure(plot: Plot) -> str:
    caption = f"<figcaption>{_escape(plot.caption)}</figcaption>" if plot.caption else ""
    if plot.wide:
        region = f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(plot.title)}">{plot.svg}</div>'
        return f'<figure class="wide">{region}{caption}</figure>'
    return f"<figure>{plot.svg}{caption}</figure>"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    parts = [f"<h1>{_escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{_escape(text)}</h2>")
            case Paragraph(text, small):
                mark = ' class="small"' if small else ""
                parts.append(f"<p{mark}>{_prose(text)}</p>")
            case Facts(pairs):
                inside = "".join(
                    f"<div><dt>{_escape(name)}</dt><dd>{_together(fact) or NOTHING}</dd></div>" for name, fact in pairs
                )
                parts.append(f"<dl>{inside}</dl>")
            case Table():
                parts.append(_html_table(block))
            case Code(text):
                parts.append(f'<pre tabindex="0">{html.escape(text.rstrip())}</pre>')
            case Figures(plots, small):
                inside = "\n".join(_html_figure(plot) for plot in plots)
                kind = "figures small" if small else "figures"
                parts.append(f'<div class="{kind}">\n{inside}\n</div>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )
