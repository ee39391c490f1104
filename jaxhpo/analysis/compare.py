"""Studies side by side: repeats over seeds, ranks, paired tests, and honest words where nothing is shown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis import curves, statistics, summary
from jaxhpo.analysis.document import Block, Figures, Heading, Paragraph, Table, to_html, to_markdown, write
from jaxhpo.analysis.format import NOTHING, clean, dotted, duration, interval, number, p_value, percent, shorten, value
from jaxhpo.analysis.statistics import Interval, PairedComparison, Ranks
from jaxhpo.errors import JaxhpoError

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord

ALPHA = 0.05
_UNLIKE = ("study.seed", "study.name", "study.devices", "seed", "name")  # what may differ between repeats of one study


@dataclass(frozen=True)
class Entry:
    """The repeats of one study over seeds; values are of the metric as the user stated it.

    Attributes:
        seeds: one a repeat, None where the config states none.
        final: best value of each repeat's search ``f64[S]``; the worse infinity where no trial finished.
        validation, test: mean over the fresh seeds of each confirmed repeat, NaN where it was not confirmed ``f64[S]``.
        spread: interval of each kind over repeats, or over fresh seeds where there is one repeat only; None without values.
        losses: lowest loss after 1, 2, ... trials ``f64[S, T]``, T the trials that every repeat has finished.
    """

    name: str
    seeds: tuple[Any, ...]
    final: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    spread: dict[str, Interval | None]
    losses: np.ndarray
    num_trials: tuple[int, ...]
    diverged: float
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Two entries, ``first`` against ``second``: paired over shared seeds if there are some, else only the win probability."""

    first: str
    second: str
    paired: PairedComparison | None
    adjusted_p: float | None  # Holm's, over all pairs tested
    win: Interval  # probability that a repeat of first beats one of second


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found. ``basis`` says which values were tested: "test", "validation" or "search"."""

    metric: str
    direction: str
    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    ranks: Ranks | None
    seeds: tuple[Any, ...]  # the seeds that every entry has
    basis: str
    notes: tuple[str, ...]


def compare(records: Sequence[StudyRecord]) -> Comparison:
    """Compare studies of one metric; those of one name and one config are repeats over seeds.

    Raises:
        JaxhpoError: for fewer than two groups or records, different metrics or directions, or one seed twice in a group.
    """
    if len(records) < 2:
        raise JaxhpoError(f"compare needs at least two studies, not {len(records)}")
    first = records[0]
    for record in records[1:]:
        if (record.metric, record.direction) != (first.metric, first.direction):
            raise JaxhpoError(
                f"these studies cannot be compared: {first.folder} is to {first.direction} {first.metric!r}, "
                f"{record.folder} is to {record.direction} {record.metric!r}"
            )
    entries = tuple(_entry(name, group) for name, group in _grouped(records).items())
    basis = _basis(entries)
    common = _shared([entry.seeds for entry in entries])
    pairs = _pairs(entries, basis, first.direction)
    ranks = None
    if len(entries) > 1 and len(common) > 1:
        table = [[_loss_at(entry, seed, basis, first.direction) for entry in entries] for seed in common]
        ranks = statistics.friedman(table)
    return Comparison(first.metric, first.direction, entries, pairs, ranks, common, basis, tuple(_notes(entries, records)))


def _grouped(records: Sequence[StudyRecord]) -> dict[str, list[StudyRecord]]:
    """Records by name, and by what differs in their config where one name stands for several."""
    settings = [
        {k: v for k, v in dotted(record.config).items() if k not in _UNLIKE and not k.startswith("report.")}
        for record in records
    ]
    keys = [
        json.dumps([config, record.space], sort_keys=True, default=str)
        for config, record in zip(settings, records, strict=True)
    ]
    groups: dict[str, list[StudyRecord]] = {}
    for name in dict.fromkeys(record.name for record in records):
        own = [i for i, record in enumerate(records) if record.name == name]
        kinds = list(dict.fromkeys(keys[i] for i in own))
        names = sorted({k for i in own for k in settings[i]})
        differing = [k for k in names if len({json.dumps(settings[i].get(k), default=str) for i in own}) > 1]
        for kind in kinds:
            members = [i for i in own if keys[i] == kind]
            told = ", ".join(f"{k.removeprefix('study.')}={value(settings[members[0]].get(k))}" for k in differing[:4])
            label = clean(name) if len(kinds) == 1 else f"{clean(name)} ({told or f'variant {kinds.index(kind) + 1}'})"
            label = label if label not in groups else f"{label} #{kinds.index(kind) + 1}"
            groups[label] = [records[i] for i in members]
            _refuse_doubles(label, groups[label])
    return groups


def _refuse_doubles(name: str, group: Sequence[StudyRecord]) -> None:
    seen: dict[str, StudyRecord] = {}
    for record in group:
        seed = json.dumps(summary.seed_of(record))  # a list where the key was one of JAX
        if seed != "null" and seed in seen:
            raise JaxhpoError(
                f"{seen[seed].folder} and {record.folder} are the same study {name!r} with the same seed {seed}: "
                "they are one result, not two; leave one out"
            )
        seen[seed] = record


def _entry(name: str, group: Sequence[StudyRecord]) -> Entry:
    maximize = group[0].direction == "maximize"
    best = [summary.ranked(record)[:1] for record in group]
    worst = -math.inf if maximize else math.inf
    final = np.array([summary.stated(r, b[0]) if b else worst for r, b in zip(group, best, strict=True)], np.float64)
    fresh = {split: [_fresh(record, split) for record in group] for split in ("validation", "test")}
    means = {split: np.array([np.mean(x) if x else math.nan for x in found], np.float64) for split, found in fresh.items()}
    spread: dict[str, Interval | None] = {"search": statistics.mean_interval(final) if np.isfinite(final).all() else None}
    for split, found in fresh.items():
        known = means[split][~np.isnan(means[split])]
        values = found[0] if len(group) == 1 else known
        spread[split] = statistics.mean_interval(values) if len(values) else None
    lines = [curves.incumbent_by_trial(record.trials) for record in group]
    common = min(map(len, lines))
    trials = sum(len(record.trials) for record in group)
    return Entry(
        name=name,
        seeds=tuple(summary.seed_of(record) for record in group),
        final=final,
        validation=means["validation"],
        test=means["test"],
        spread=spread,
        losses=np.stack([line[:common] for line in lines]),
        num_trials=tuple(len(record.trials) for record in group),
        diverged=sum(map(summary.num_diverged, group)) / trials if trials else 0.0,
        seconds=float(np.mean([summary.seconds_of(record) for record in group])),
    )


def _fresh(record: StudyRecord, split: str) -> list[float]:
    """Finite values of the metric over the winner's fresh seeds."""
    note = record.notes.get("confirmation") or {}
    values = (note.get(split) or {}).get(record.metric) or []
    return [float(x) for x in values if x is not None and math.isfinite(float(x))]


def _basis(entries: Sequence[Entry]) -> str:
    """The best evidence that every repeat has: the test split, else fresh seeds on validation, else the search itself."""
    for split in ("test", "validation"):
        if not any(np.isnan(getattr(entry, split)).any() for entry in entries):
            return split
    return "search"


def _losses(entry: Entry, basis: str, direction: str) -> np.ndarray:
    values = entry.final if basis == "search" else getattr(entry, basis)
    return -values if direction == "maximize" else values


def _loss_at(entry: Entry, seed: Any, basis: str, direction: str) -> float:
    return float(_losses(entry, basis, direction)[entry.seeds.index(seed)])


def _shared(seeds: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(seed for seed in seeds[0] if seed is not None and all(seed in other for other in seeds[1:]))


def _pairs(entries: Sequence[Entry], basis: str, direction: str) -> tuple[Pair, ...]:
    found = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            common = _shared([a.seeds, b.seeds])
            paired = None
            if len(common) > 1:
                left = [_loss_at(a, seed, basis, direction) for seed in common]
                paired = statistics.paired_comparison(left, [_loss_at(b, seed, basis, direction) for seed in common])
            win = statistics.win_probability(_losses(a, basis, direction), _losses(b, basis, direction))
            found.append((a.name, b.name, paired, win))
    tested = {k: paired.p_value for k, (_, _, paired, _) in enumerate(found) if paired is not None}
    adjusted = dict(zip(tested, statistics.holm(list(tested.values())).tolist(), strict=True))
    return tuple(Pair(a, b, paired, adjusted.get(k), win) for k, (a, b, paired, win) in enumerate(found))


def _notes(entries: Sequence[Entry], records: Sequence[StudyRecord]) -> list[str]:
    notes = []
    if len({count for entry in entries for count in entry.num_trials}) > 1:
        notes.append("The studies have different numbers of finished trials; more trials alone give a better best value.")
    unfinished = [clean(record.folder) for record in records if record.status != "finished"]
    if unfinished:
        notes.append(f"Not finished: {shorten(', '.join(unfinished), 200)}.")
    single = [entry.name for entry in entries if len(entry.final) == 1]
    if single:
        notes.append(
            f"One seed only: {shorten(', '.join(single), 200)}. Intervals there are over fresh seeds of the training, not over "
            "repeats of the search."
        )
    for entry in entries:
        lost = int(np.isinf(entry.final).sum())
        if lost:
            notes.append(f"{entry.name}: no trial finished in {lost} of {len(entry.final)} repeats; they count as the worst.")
    return notes


# Words


_BASIS = {
    "test": "the winners' test values over fresh seeds",
    "validation": "the winners' validation values over fresh seeds",
    "search": "the best values of the searches (not every winner was trained again on fresh seeds, so they are optimistic)",
}


def verdict(pair: Pair) -> str:
    """One sentence that claims no more than the test shows."""
    paired, p = pair.paired, pair.adjusted_p
    if paired is None or p is None:
        return f"{pair.first} and {pair.second} share fewer than two known seeds: no pairs, so nothing was tested."
    if paired.ties == paired.count:
        return f"{pair.first} and {pair.second} are equal on all {paired.count} seeds."
    if p < ALPHA:
        ahead, behind = (pair.first, pair.second) if paired.effect < 0 else (pair.second, pair.first)
        return f"{ahead} is better than {behind} ({p_value(p)}, {paired.count} seeds)."
    if paired.smallest_p >= ALPHA:
        return (
            f"{pair.first} and {pair.second}: {paired.count} seeds, {paired.ties} of them tied, are too few to show any "
            f"difference (the smallest p-value that they can give is {number(paired.smallest_p, 2)})."
        )
    shown = f"no difference is shown ({p_value(p)}, {paired.count} seeds)"
    return f"{pair.first} and {pair.second}: {shown}; that is not proof of equality."


def _head(comparison: Comparison) -> list[Block]:
    better = "lower is better" if comparison.direction == "minimize" else "higher is better"
    text = f"{len(comparison.entries)} studies by {clean(comparison.metric)}, {better}."
    return [Paragraph(text), *(Paragraph(note) for note in comparison.notes)]


def _results(comparison: Comparison) -> list[Block]:
    ranks = comparison.ranks.mean_ranks if comparison.ranks else None
    header = ["study", "seeds", "trials", "best in search", "fresh seeds, validation", "fresh seeds, test"]
    header += (["mean rank"] if ranks is not None else []) + ["diverged", "time"]
    rows = []
    for k, entry in enumerate(comparison.entries):
        low, high = min(entry.num_trials), max(entry.num_trials)
        cells = [
            interval(spread) if spread else NOTHING for spread in (entry.spread[s] for s in ("search", "validation", "test"))
        ]
        row = [entry.name, str(len(entry.final)), str(low) if low == high else f"{low} to {high}", *cells]
        row += [number(float(ranks[k]), 3)] if ranks is not None else []
        rows.append([*row, percent(entry.diverged), duration(entry.seconds)])
    about = (
        "Means with 95 % intervals (Student's t) over seeds, in brackets where there is more than one value. "
        "The best in search is optimistic: the luckiest of many trials."
    )
    parts: list[Block] = [Heading("Results"), Table(header, rows), Paragraph(about, small=True)]
    if comparison.ranks is not None:
        found = comparison.ranks
        text = f"Ranks are over the {found.count} seeds that all share, by {_BASIS[comparison.basis]}; 1 is best."
        if len(comparison.entries) > 2:
            text += f" Friedman's test that all are alike: {p_value(found.p_value)} (approximate)."
        parts.append(Paragraph(text, small=True))
    return parts


def _tests(comparison: Comparison) -> list[Block]:
    if not comparison.pairs:
        return [Paragraph("All records are repeats of one study: there is nothing to test.")]
    sign = -1.0 if comparison.direction == "maximize" else 1.0
    rows = []
    for pair in comparison.pairs:
        paired = pair.paired
        name = f"{pair.first} vs {pair.second}"
        win = f"{number(pair.win.estimate, 2)} [{number(pair.win.low, 2)}, {number(pair.win.high, 2)}]"
        if paired is None:
            rows.append([name, NOTHING, NOTHING, NOTHING, win, NOTHING])
            continue
        gap = paired.difference
        low, high = sorted((sign * gap.low, sign * gap.high))
        shown = interval(Interval(sign * gap.estimate, low, high, gap.level, gap.count))
        count = f"{paired.wins} / {paired.ties} / {paired.losses}"
        rows.append(
            [
                name,
                count,
                shown,
                number(round(-paired.effect, 2) + 0.0),
                win,
                p_value(pair.adjusted_p or 0.0).removeprefix("p ").removeprefix("= "),
            ]
        )
    header = ["pair", "wins / ties / losses", "mean difference", "effect", "win probability", "p-value"]
    about = (
        "Seeds that two studies share are paired: Wilcoxon's signed-rank test, two-sided, p-values adjusted by Holm. "
        "The difference is first minus second with its 95 % interval; the effect is the rank-biserial correlation, "
        "1 where the first is better on every seed; the win probability is that of one seed against another."
    )
    words = [Paragraph(verdict(pair)) for pair in comparison.pairs]
    return [
        Heading("Differences"),
        Paragraph(f"By {_BASIS[comparison.basis]}."),
        *words,
        Table(header, rows),
        Paragraph(about, small=True),
    ]


def format_comparison(comparison: Comparison) -> str:
    """The comparison as Markdown that reads in a terminal."""
    return to_markdown(_title(comparison), [*_head(comparison), *_results(comparison), *_tests(comparison)])


def _title(comparison: Comparison) -> str:
    return shorten("Comparison: " + ", ".join(entry.name for entry in comparison.entries), 120)


def write_comparison(records: Sequence[StudyRecord], out_dir: Path | str) -> tuple[Path, Path]:
    """Compare, and write comparison.md and comparison.html into ``out_dir``; returns both paths.

    Raises:
        JaxhpoError: as ``compare``, or where the folder cannot be written.
    """
    from jaxhpo.analysis import canvas, comparison_plots

    comparison, folder = compare(records), Path(out_dir)
    pages: list[Block] = [*_head(comparison), *_results(comparison)]
    if canvas.has_matplotlib():
        found = comparison_plots.figures(comparison)
        pages += [Heading("Progress"), Figures(found)] if found else []
    else:
        pages.append(Paragraph("The figures need matplotlib: `pip install 'jaxhpo[plot]'`, then compare again."))
    markdown = write(folder / "comparison.md", format_comparison(comparison))
    return markdown, write(folder / "comparison.html", to_html(_title(comparison), [*pages, *_tests(comparison)]))
