"""The commands and their options, and how a command ends: its exit code and what is said about a failure.

``argparse`` rather than a library on top of it: it answers ``--help`` in a third of the time, and with one line a mistake.

Exit codes: 0 done; 2 a mistake of the user or a failure outside the program, one line each on standard error;
130 interrupted; 141 the reader of the output is gone. Anything else is a bug, and its traceback is shown.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

_EXAMPLES = """examples:
  jaxhpo run configs/digits_pso.toml
  jaxhpo run configs/digits_pso.toml --set optimizer.num_lanes=128 --seed 3 --out runs/wide
  jaxhpo resume runs/wide
  jaxhpo compare runs/digits_pso-seed0 runs/digits_random-seed0
"""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        from importlib import metadata

        print(f"jaxhpo {metadata.version('jaxhpo')}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"jaxhpo: error: {message}; see {self.prog} --help\n")


def _at_least(low: int) -> Any:
    def whole(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = low - 1
        if number < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, not {text!r}")
        return number

    return whole


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(
        prog="jaxhpo",
        description="Hyperparameter optimization as pure JAX: studies from TOML files.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.", allow_abbrev=False)

    run = command("run", "run the study that a TOML file describes")
    run.add_argument("config", metavar="CONFIG", help="the TOML file, or a Python file with get_config: FILE.py[:ARGUMENT]")
    run.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one value, such as study.num_trials=128",
    )
    run.add_argument("--seed", type=_at_least(0), metavar="N", help="the seed of the study; the same as --set study.seed=N")
    run.add_argument("--out", metavar="DIR", help="where to keep the record (default: runs/NAME-seedN)")
    run.add_argument(
        "--smoke", action="store_true", help="the study in small, to see that all fits together; its figures mean nothing"
    )

    resume = command("resume", "go on with a study that was interrupted or killed")
    resume.add_argument("folder", metavar="DIR", help="the folder of the study")
    for parser_ in (run, resume):
        parser_.add_argument(
            "--devices", type=_at_least(1), metavar="N", help="how many devices to use (default: all; on a CPU, its cores)"
        )
        parser_.add_argument(
            "--no-report", action="store_false", dest="report", help="neither train the winner on fresh seeds nor report"
        )
        parser_.add_argument("--quiet", action="store_true", help="no progress, no summary")

    show = command("show", "summarize a study, finished or not")
    show.add_argument("folder", metavar="DIR", help="the folder of the study")

    report = command("report", "write the report of a study")
    report.add_argument("folder", metavar="DIR", help="the folder of the study")
    report.add_argument("--seeds", type=_at_least(1), metavar="K", help="first train the winner again on K fresh seeds")

    replay = command("replay", "train a trial again along its whole schedule, as the search did")
    replay.add_argument("folder", metavar="DIR", help="the folder of the study")
    replay.add_argument("--trial", type=int, metavar="N", help="which trial (default: the best)")

    compare = command("compare", "compare studies of the same task")
    compare.add_argument("folders", metavar="DIR", nargs="+", help="the folders of the studies")
    compare.add_argument("--out", metavar="DIR", help="where to write the comparison (default: only print it)")

    export = command("export", "write the trials of a study in another format")
    export.add_argument("folder", metavar="DIR", help="the folder of the study")
    export.add_argument("--to", choices=("csv", "jsonl", "optuna", "tensorboard"), required=True, help="the format")
    export.add_argument("--out", metavar="PATH", help="the file or folder to write (default: beside the record)")

    importing = command("import", "turn a sweep of W&B (.yaml) or of big_vision's kind (.py, sweep(add)) into a config")
    importing.add_argument("file", metavar="FILE", help="the sweep")
    importing.add_argument("--out", metavar="CONFIG", help="the TOML file to write (default: print it)")

    listing = command("list", "list what there is")
    listing.add_argument("what", choices=("optimizers", "tasks", "data", "leaves"), help="of what")

    data = command("data", "list data sets, or fetch one")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    actions.add_parser("list", help="list the data sets")
    fetch = actions.add_parser("fetch", help="fetch a data set")
    fetch.add_argument("name", metavar="NAME", help="the data set, as jaxhpo data list names it")
    fetch.add_argument("--data-dir", metavar="DIR", help="where the IDX files of mnist and fashion_mnist are")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    try:
        arguments = make_parser().parse_args(argv)
        return _run(arguments)
    except BrokenPipeError:
        # The reader went away, as ``head`` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _one_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning without its place in our code, which tells a user of the command line nothing."""
    return f"jaxhpo: warning: {message}\n"


def _run(arguments: argparse.Namespace) -> int:
    import warnings

    from jaxhpo.cli import commands
    from jaxhpo.errors import JaxhpoError

    warnings.formatwarning = _one_line  # ty: ignore[invalid-assignment]
    try:
        code = getattr(commands, f"{arguments.command}_command")(arguments)
        sys.stdout.flush()
        return code
    except JaxhpoError as error:
        for line in str(error).splitlines():
            print(f"jaxhpo: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxhpo: interrupted", file=sys.stderr)
        return 130
