"""Studies side by side: repeats over seeds, ranks, paired tests, and honest words where nothing is shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxhpo.analysis import curves, statistics, summary
from jaxhpo.analysis.document import Block, Figures, Heading, Paragraph, Table, to_html, to_markdown, write
from jaxhpo.analysis.format import NOTHING, clean, duration, interval, number, p_value, percent, shorten
from jaxhpo.analysis.repeats import grouped
from jaxhpo.analysis.statistics import Interval, PairedComparison, Ranks
from jaxhpo.errors import JaxhpoError

if TYPE_CHECKING:
    from jaxhpo.study.record import StudyRecord

ALPHA = 0.05
STEPS_DRAWN = 400


@dataclass(frozen=True)
class Entry:
    """The repeats of one study over seeds; values are of the metric as the user stated it.

    Attributes:
        seeds: one a repeat, None where the config states none.
        final: best value of each repeat's search ``f64[S]``; the worse infinity where no trial finished.
        validation, test: mean over the fresh seeds of each confirmed repeat, NaN where it was not confirmed ``f64[S]``.
        spread: interval of each kind over repeats, or over fresh seeds where there is one repeat only; None without values.
        fresh: the values over fresh seeds of a study of one repeat, by split; empty where there are several repeats.
        losses: lowest loss after 1, 2, ... trials ``f64[S, T]``, T the trials that every repeat has finished.
        spent: training steps ``f64[P]``, from 0 to those that every repeat has spent; empty where no trial trained.
        losses_spent: lowest loss once they were spent ``f64[S, P]``, infinity before the first.
        every: losses of all trials of all repeats ``f64[N]``, infinity where one diverged.
    """

    name: str
    seeds: tuple[Any, ...]
    final: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    spread: dict[str, Interval | None]
    fresh: dict[str, tuple[float, ...]]
    losses: np.ndarray
    spent: np.ndarray
    losses_spent: np.ndarray
    every: np.ndarray
    num_trials: tuple[int, ...]
    diverged: float
    seconds: float


@dataclass(frozen=True)
class Pair:
    """Two entries, ``first`` against ``second``.

    Attributes:
        paired: over the seeds that both have; None where they are fewer than two.
        adjusted_p: Holm's, over all pairs tested.
        win: probability that first beats second; None where one value of each is all that there is.
        win_of: what is drawn for it: "searches", a repeat of each, or "trainings", one of each winner on a fresh seed.
    """

    first: str
    second: str
    paired: PairedComparison | None
    adjusted_p: float | None
    win: Interval | None
    win_of: str | None


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
    entries = tuple(_entry(name, group) for name, group in grouped(records).items())
    basis = _basis(entries)
    common = _shared([entry.seeds for entry in entries])
    pairs = _pairs(entries, basis, first.direction)
    ranks = None
    if len(entries) > 1 and len(common) > 1:
        table = [[_loss_at(entry, seed, basis, first.direction) for entry in entries] for seed in common]
        ranks = statistics.friedman(table)
    return Comparison(first.metric, first.direction, entries, pairs, ranks, common, basis, tuple(_notes(entries, records)))


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
    by_steps = [curves.incumbent_by_steps(record.trials) for record in group]
    most = min((steps[-1] for steps, _ in by_steps if steps.size), default=0.0) if common else 0.0
    spent = np.linspace(0, most, STEPS_DRAWN + 1) if most > 0 else np.empty(0)
    return Entry(
        name=name,
        seeds=tuple(summary.seed_of(record) for record in group),
        final=final,
        validation=means["validation"],
        test=means["test"],
        spread=spread,
        fresh={split: tuple(found[0]) for split, found in fresh.items() if len(group) == 1},
        losses=np.stack([line[:common] for line in lines]),
        spent=spent,
        losses_spent=np.stack([_at(spent, *curve) for curve in by_steps]),
        every=np.concatenate([curves.losses_of(record.trials) for record in group]),
        num_trials=tuple(len(record.trials) for record in group),
        diverged=sum(map(summary.num_diverged, group)) / trials if trials else 0.0,
        seconds=float(np.mean([summary.seconds_of(record) for record in group])),
    )


def _at(points: np.ndarray, steps: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The losses known once ``points`` were spent, infinity before the first."""
    return np.concatenate([[np.inf], losses])[np.searchsorted(steps, points, side="right")]


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
    found: list[Pair] = []
    for i, a in enumerate(entries):
        for b in entries[i + 1 :]:
            common = _shared([a.seeds, b.seeds])
            paired = None
            if len(common) > 1:
                left = [_loss_at(a, seed, basis, direction) for seed in common]
                paired = statistics.paired_comparison(left, [_loss_at(b, seed, basis, direction) for seed in common])
            win, win_of = _win(a, b, basis, direction)
            found.append(Pair(a.name, b.name, paired, None, win, win_of))
    tested = {k: pair.paired.p_value for k, pair in enumerate(found) if pair.paired is not None}
    adjusted = dict(zip(tested, statistics.holm(list(tested.values())).tolist(), strict=True))
    return tuple(dataclasses.replace(pair, adjusted_p=adjusted.get(k)) for k, pair in enumerate(found))


def _win(a: Entry, b: Entry, basis: str, direction: str) -> tuple[Interval | None, str | None]:
    """The win probability over repeats where both have several; over the winners' fresh seeds where both were run once."""
    if min(a.final.size, b.final.size) > 1:
        return statistics.win_probability(_losses(a, basis, direction), _losses(b, basis, direction)), "searches"
    left, right = a.fresh.get(basis, ()), b.fresh.get(basis, ())
    if min(len(left), len(right)) > 1:
        sign = -1.0 if direction == "maximize" else 1.0
        return statistics.win_probability(sign * np.array(left), sign * np.array(right)), "trainings"
    return None, None


def _notes(entries: Sequence[Entry], records: Sequence[StudyRecord]) -> list[str]:
    notes = []
    if len({count for entry in entries for count in entry.num_trials}) > 1:
        steps = [entry.spent[-1] if entry.spent.size else 0.0 for entry in entries]
        alike = min(steps) > 0.9 * max(steps)
        notes.append(
            "The studies have different numbers of finished trials; more trials alone give a better best value."
            + (" They have spent about the same number of training steps." if alike else "")
        )
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
        said = f"{pair.first} and {pair.second} share fewer than two known seeds: no pairs, so nothing was tested."
        if pair.win_of != "trainings" or pair.win is None:
            return said
        return said + " What is known is of the two winners alone: " + _winners(pair, pair.win)
    tied = f", {paired.ties} of them tied" if paired.ties else ""
    if paired.ties == paired.count:
        return f"{pair.first} and {pair.second} are equal on all {paired.count} seeds."
    if p < ALPHA:
        ahead, behind = (pair.first, pair.second) if paired.effect < 0 else (pair.second, pair.first)
        return f"{ahead} is better than {behind} ({p_value(p)}, {paired.count} seeds{tied})."
    if paired.smallest_p >= ALPHA:
        return (
            f"{pair.first} and {pair.second}: {paired.count} seeds{tied or ', none of them tied'}, are too few to show any "
            f"difference (the smallest p-value that they can give is {number(paired.smallest_p, 2)})."
        )
    shown = f"no difference is shown ({p_value(p)}, {paired.count} seeds{tied})"
    return f"{pair.first} and {pair.second}: {shown}; that is not proof of equality."


def _winners(pair: Pair, win: Interval) -> str:
    """What fresh seeds say of two winners, each the end of one search."""
    chance = f"a training by {pair.first}'s is better than one by {pair.second}'s with probability {_probability(win)}"
    return chance + (": they are not told apart." if win.low <= 0.5 <= win.high else ".")


def _probability(win: Interval | None) -> str:
    return NOTHING if win is None else f"{number(win.estimate, 2)} [{number(win.low, 2)}, {number(win.high, 2)}]"


def _head(comparison: Comparison) -> list[Block]:
    better = "lower is better" if comparison.direction == "minimize" else "higher is better"
    text = f"{len(comparison.entries)} studies by {clean(comparison.metric)}, {better}."
    return [Paragraph(text), *(Paragraph(note) for note in comparison.notes)]


def _results(comparison: Comparison) -> list[Block]:
    ranks: list[float] | None = comparison.ranks.mean_ranks.tolist() if comparison.ranks else None
    header = ["study", "seeds", "trials", "best in search", "fresh seeds, validation", "fresh seeds, test"]
    header += (["mean rank"] if ranks is not None else []) + ["diverged", "time"]
    rows = []
    for k, entry in enumerate(comparison.entries):
        low, high = min(entry.num_trials), max(entry.num_trials)
        cells = [
            interval(spread) if spread else NOTHING for spread in (entry.spread[s] for s in ("search", "validation", "test"))
        ]
        row = [entry.name, str(len(entry.final)), str(low) if low == high else f"{low} to {high}", *cells]
        row += [number(ranks[k], 3)] if ranks is not None else []
        rows.append([*row, percent(entry.diverged), duration(entry.seconds)])
    about = (
        "Means with 95 % intervals (Student's t) over seeds, in brackets where there is more than one value. "
        "The best in search is optimistic: the luckiest of many trials."
    )
    parts: list[Block] = [Heading("Results"), Table(header, rows), Paragraph(about, small=True)]
    if comparison.ranks is not None and ranks is not None:
        found = comparison.ranks
        text = f"Ranks are over the {found.count} seeds that all share, by {_BASIS[comparison.basis]}; 1 is best."
        tied = [entry.name for entry, rank in zip(comparison.entries, ranks, strict=True) if rank == min(ranks)]
        if len(tied) > 1:
            text += f" {shorten(', '.join(tied), 200)} are tied."
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
        win = _probability(pair.win)
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
        "1 where the first is better on every seed. The win probability is that of one search against another where there are "
        "several seeds of each, or of one training against another where two winners were trained on fresh seeds; one value of "
        "each gives none."
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
