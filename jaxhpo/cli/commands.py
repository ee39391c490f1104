"""What each command does: from parsed arguments to an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxhpo.errors import JaxhpoError

if TYPE_CHECKING:
    from jaxhpo.config import Config
    from jaxhpo.study import Result, Study, StudyRecord

INTERRUPTED = 130


def run_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.config import load, smoke
    from jaxhpo.study.record import holds_study

    overrides = list(arguments.overrides)
    overrides += [
        f"study.{name}={getattr(arguments, name)}" for name in ("seed", "devices") if getattr(arguments, name) is not None
    ]
    config = load(arguments.config, overrides)
    config = smoke(config) if arguments.smoke else config
    folder = Path(arguments.out or Path("runs", f"{config.study.name}-seed{config.study.seed}"))
    if arguments.smoke and arguments.out is None and holds_study(folder):
        shutil.rmtree(folder)  # an earlier smoke run: its name says so
    if holds_study(folder):
        hint = f"go on with it by: jaxhpo resume {shlex.quote(str(folder))}, or choose another folder by --out"
        raise JaxhpoError(f"{folder} already holds a study; {hint}")
    return _search(config, folder, arguments, resume=False)


def resume_command(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    return _search(_recorded_config(folder), folder, arguments, resume=True)


def _recorded_config(folder: Path) -> Config:
    """The config in a record. Modules are looked for around the record too: it may lie below the project's folder."""
    from jaxhpo.config import Config
    from jaxhpo.study.record import read_record

    around = folder.resolve().parents[:3]
    return Config.from_dict(read_record(folder).config, source=f"{folder} (its recorded config)", folders=around)


def _search(config: Config, folder: Path, arguments: argparse.Namespace, resume: bool) -> int:
    """Runs a study to its end, then trains the winner on fresh seeds and reports."""
    from jaxhpo.cli.progress import progress_shown
    from jaxhpo.config import build
    from jaxhpo.study.platform import prepare_jax

    devices = arguments.devices or config.study.devices
    prepare_jax(devices)
    from jaxhpo.study import run_study
    from jaxhpo.study.result import no_winner

    study = dataclasses.replace(build(config), devices=devices)
    try:
        with progress_shown(arguments.quiet) as progress:
            result = run_study(study, folder, resume=resume, progress=progress)
    except KeyboardInterrupt:
        return _interrupted(folder, "")
    if result.status == "interrupted":
        of = "" if study.num_trials is None else f" of {study.num_trials}"
        return _interrupted(folder, f" after {len(result.trials['number'])}{of} trials")
    confirmed, paths = False, []
    if arguments.report:
        confirmed = result.winner is not None and _confirm(study, folder, config.report.seeds, arguments.quiet)
        paths = _write_report(folder)
    if not arguments.quiet:
        _summarize(study, result, folder, paths, confirmed)
    if result.winner is None:
        raise JaxhpoError(no_winner(len(result.trials["number"]), folder, result.first_error))
    return 0


def _interrupted(folder: Path, when: str) -> int:
    from jaxhpo.study.record import holds_study

    hint = f"; go on with: jaxhpo resume {shlex.quote(str(folder))}" if holds_study(folder) else ""
    print(f"jaxhpo: interrupted{when}{hint}", file=sys.stderr)
    return INTERRUPTED


def _confirm(study: Study, folder: Path, seeds: int, quiet: bool) -> bool:
    """Trains the winner on fresh seeds where that can be done."""
    from jaxhpo.study import confirm
    from jaxhpo.tasks import HostFunction

    if not seeds or isinstance(study.objective, HostFunction):
        return False
    if not quiet:
        print(f"training the winner and the runner-up on {seeds} fresh seeds", file=sys.stderr, flush=True)
    confirm(study, folder, seeds)
    return True


def _write_report(folder: Path) -> list[Path]:
    from jaxhpo.analysis import write_report
    from jaxhpo.study.record import read_record

    return list(write_report(read_record(folder)))


def _summarize(study: Study, result: Result, folder: Path, paths: list[Path], confirmed: bool) -> None:
    from jaxhpo.analysis.format import duration, number, value
    from jaxhpo.analysis.summary import caveat
    from jaxhpo.config.smoke import SUFFIX
    from jaxhpo.study.record import read_record

    record = read_record(folder)
    if result.winner is not None:
        print(f"best {record.metric} {number(result.best.value, 6)} in trial {result.best.number} of {len(record.trials)}")
        known = None if record.best is None else caveat(record, record.best)
        if known:
            print(f"  {known}")
        hparams = record.best.hparams if record.best is not None else {}
        width = max(map(len, hparams), default=0)
        for name, setting in hparams.items():
            print(f"  {name:<{width}}  {value(setting, 6)}")
    for line in _intervals(record) if confirmed else ():
        print(line)
    if study.name.endswith(SUFFIX):
        print("a smoke run: its figures mean nothing")
    print(f"time:   {duration(result.run_seconds)}, and {duration(result.compile_seconds)} to compile")
    print(f"record: {folder}")
    for path in paths:
        print(f"report: {path}")


def _intervals(record: StudyRecord) -> list[str]:
    """The winner's metrics over fresh seeds with their 95 % intervals, the one that was searched for first."""
    from jaxhpo.analysis.format import interval, probability
    from jaxhpo.analysis.statistics import mean_interval
    from jaxhpo.analysis.summary import certainty

    note = record.notes["confirmation"]
    lines = [f"on {note['seeds']} fresh seeds (mean and its 95 % interval):"]
    for split in ("validation", "test"):
        for metric in sorted(note[split], key=lambda name: (name != record.metric, name)):
            sound = [value for value in note[split][metric] if value is not None]
            lost = len(note[split][metric]) - len(sound)
            text = interval(mean_interval(sound)) if sound else "no value"
            lines.append(f"  {split} {metric} {text}{f', {lost} diverged' if lost else ''}")
    found = certainty(record)
    if found is not None:
        lines.append(f"  truly better than the runner-up, trial {found[1]}, with probability {probability(found[0])}")
        if found[0] < 0.5:
            lines.append(
                f"  so trial {found[1]} looks the better one on fresh seeds: jaxhpo show and the report tell its settings"
            )
    return lines


def show_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.analysis import format_record
    from jaxhpo.study.record import read_record

    print(format_record(read_record(arguments.folder)))
    return 0


def report_command(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    if arguments.seeds is not None:
        _train_winner_again(folder, arguments.seeds)
    for path in _write_report(folder):
        print(path)
    return 0


def _train_winner_again(folder: Path, seeds: int) -> None:
    from jaxhpo.config import build
    from jaxhpo.study.platform import prepare_jax

    config = _recorded_config(folder)
    prepare_jax(config.study.devices)
    from jaxhpo.study import confirm
    from jaxhpo.study.record import read_record

    confirm(build(config), folder, seeds)
    for line in _intervals(read_record(folder)):
        print(line)


def replay_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.analysis.format import number, value
    from jaxhpo.config import build
    from jaxhpo.study.platform import prepare_jax

    folder = Path(arguments.folder)
    config = _recorded_config(folder)
    prepare_jax(config.study.devices)
    from jaxhpo.study import replay

    study = build(config)
    found = replay(study, folder, arguments.trial)
    for part in found["schedule"]:
        settings = ", ".join(f"{name}={value(x, 6)}" for name, x in part["hparams"].items())
        print(f"steps {part['start']:>7} to {part['steps']:>7}  trial {part['number']:>5}  {settings}")
    sign = -1.0 if study.maximize else 1.0
    told = {name: None if found[name] is None else sign * found[name] for name in ("recorded", "replayed")}
    recorded, replayed = ("diverged" if x is None else number(x, 9) for x in told.values())
    same = "the same bits" if found["recorded"] == found["replayed"] else "not the same bits"
    print(f"trial {found['number']}: recorded {recorded}, replayed {replayed}: {same}")
    for split in ("validation", "test"):
        for name, x in found[split].items():
            print(f"  {split} {name} {'diverged' if x is None else number(x, 6)}")
    return 0


def compare_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.analysis.compare import compare, format_comparison, write_comparison
    from jaxhpo.study.record import read_record

    records = [read_record(folder) for folder in arguments.folders]
    print(format_comparison(compare(records)))
    for path in write_comparison(records, arguments.out) if arguments.out is not None else ():
        print(path)
    return 0


def export_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.analysis.export import export
    from jaxhpo.integrations import tensorboard
    from jaxhpo.study.record import read_record

    record = read_record(arguments.folder)
    if arguments.to == "tensorboard":
        print(tensorboard.export(record, arguments.out))
    else:
        print(export(record, arguments.to, arguments.out))
    return 0


def import_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.analysis.document import write
    from jaxhpo.integrations.sweep import read_sweep

    target = None if arguments.out is None else Path(arguments.out)
    if target is not None and target.exists():
        raise JaxhpoError(f"{target} is there already: choose another file by --out, or remove it first")
    found = read_sweep(arguments.file)
    for note in found.notes:
        print(f"jaxhpo: note: {note}", file=sys.stderr)
    print(found.to_toml() if target is None else write(target, found.to_toml()), end="" if target is None else "\n")
    return 0


def list_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.cli import listing

    rows: list[tuple[str, str]] = getattr(listing, arguments.what)()
    if not rows:
        print(f"there are no {arguments.what} here", file=sys.stderr)
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}".rstrip())
    return 0


def data_command(arguments: argparse.Namespace) -> int:
    from jaxhpo.benchmarks import datasets

    if arguments.action == "list":
        return list_command(argparse.Namespace(what="data"))
    datasets.fetch(arguments.name, lambda line: print(line, flush=True), arguments.data_dir)
    return 0
