"""How far a study is: a live bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TextIO

from jaxhpo.analysis.format import duration, number

if TYPE_CHECKING:
    from jaxhpo.study import Progress

SECONDS_BETWEEN_LINES = 5.0


@contextlib.contextmanager
def progress_shown(quiet: bool, stream: TextIO | None = None) -> Generator[Callable[[Progress], None]]:
    """A function to be told of progress; it writes to ``stream`` (default: standard error), or nothing if ``quiet``."""
    stream = stream or sys.stderr
    if quiet:
        yield lambda progress: None
    elif stream.isatty():
        with _bar(stream) as tell:
            yield tell
    else:
        yield _lines(stream)


def facts(progress: Progress) -> str:
    """What is known beside the number of trials, as ``best 0.0312, 45 trials/s, 3 diverged, 11 s left``."""
    if progress.phase == "compiling":
        return "compiling"
    parts = [] if progress.best is None else [f"best {number(progress.best)}"]
    if progress.trials_per_second:
        parts.append(f"{number(progress.trials_per_second, 3)} trials/s")
    if progress.diverged:
        parts.append(f"{progress.diverged} diverged")
    if progress.phase == "finished":
        parts.append(f"after {duration(progress.elapsed)}")
    elif progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts)


def _lines(stream: TextIO) -> Callable[[Progress], None]:
    last_time, last_phase = 0.0, ""

    def tell(progress: Progress) -> None:
        nonlocal last_time, last_phase
        if progress.phase != last_phase or time.monotonic() - last_time >= SECONDS_BETWEEN_LINES:
            known = facts(progress)
            of = "" if progress.num_trials is None else f"/{progress.num_trials}"
            print(f"{progress.trials}{of} trials{known and ': '}{known}", file=stream, flush=True)
            last_time, last_phase = time.monotonic(), progress.phase

    return tell


@contextlib.contextmanager
def _bar(stream: TextIO) -> Generator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bar

    columns: tuple[Any, ...] = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Bar(*columns, console=Console(file=stream), refresh_per_second=8) as bar:
        task = bar.add_task("starting", total=None)

        def tell(progress: Progress) -> None:
            bar.update(task, completed=progress.trials, total=progress.num_trials, description=facts(progress))

        yield tell
