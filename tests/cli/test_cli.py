"""The command line, from its arguments to exit codes, files and lines; most of it in this process, for speed."""

import io
import json
import os
import re
import resource
import subprocess
import sys

import pytest

from jaxhpo.analysis.config_text import to_toml
from jaxhpo.cli import main
from jaxhpo.cli.progress import facts, progress_shown
from jaxhpo.study import Progress, read_record

MODULE = '''
import os, signal
import jax, jax.numpy as jnp
from jaxhpo.tasks import HostFunction

def bowl(noise: float = 0.1):
    """A noisy bowl."""
    def loss(key, hparams):
        return {"loss": (hparams["x"] - 0.25) ** 2 + hparams["n"] + noise * jax.random.uniform(key), "other": 1.0}
    return loss

def cliff():
    return lambda key, hparams: jnp.nan * hparams["x"]

def host(interrupt_at: int = -1):
    """Sends Ctrl-C at one of its calls."""
    calls = []
    def fn(hparams):
        calls.append(hparams)
        if len(calls) == interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        return (hparams["x"] - 0.25) ** 2
    return HostFunction(fn)

def broken():
    raise TypeError("a bug in a factory")
'''


def config(factory="cli_toys:bowl", **tables):
    return {
        "study": {"num_trials": 24, "seed": 5, **tables.get("study", {})},
        "task": {"factory": factory, **tables.get("task", {})},
        "space": {"x": {"type": "float", "low": 0.0, "high": 1.0}, "n": {"type": "int", "low": 0, "high": 3}},
        "optimizer": {"name": "RandomSearch", "num_lanes": 4},
        "report": {"seeds": tables.get("seeds", 3)},
    }


@pytest.fixture(scope="module", autouse=True)
def project(tmp_path_factory):
    """A folder with configs and a module, the current directory while these tests run, with one finished study in it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "cli_toys.py").write_text(MODULE)
    (folder / "good.toml").write_text(to_toml(config()))
    (folder / "other.toml").write_text(to_toml(config(task={"noise": 0.2})))
    before, paths = os.getcwd(), list(sys.path)
    os.chdir(folder)
    assert main(["run", "good.toml", "--quiet", "--out", "runs/done"]) == 0
    yield folder
    os.chdir(before)
    sys.path[:] = paths


def jaxhpo(*arguments, options=(), **more):
    command = [sys.executable, *options, "-m", "jaxhpo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **more)


def test_run_prints_the_winner_its_interval_and_where_all_is(capsys):
    assert main(["run", "good.toml"]) == 0
    out, err = capsys.readouterr()
    record = read_record("runs/good-seed5")
    best = record.best
    assert best is not None
    assert f"in trial {best.number} of 24" in out
    assert float(re.findall(r"^best loss (\S+)", out, re.M)[0]) == pytest.approx(best.value, rel=1e-5)
    values = record.notes["confirmation"]["validation"]["loss"]
    mean, low, high = map(float, re.findall(r"on 3 fresh seeds .*\n  validation loss (\S+) \[(\S+), (\S+)\]\n", out)[0])
    assert low < mean < high
    assert mean == pytest.approx(sum(values) / 3, rel=0.02)
    assert "record: runs/good-seed5\n" in out
    for name in ("report.md", "report.html"):
        assert f"report: runs/good-seed5/{name}\n" in out
        assert os.path.getsize(f"runs/good-seed5/{name}") > 500
    assert re.search(r"^24/24 trials: best ", err, re.M)


def test_the_same_config_gives_the_same_trials_and_seed_and_set_change_them():
    def trials(*options):
        out = f"runs/same{len(os.listdir('runs'))}"
        assert main(["run", "good.toml", "--quiet", "--no-report", "--out", out, *options]) == 0
        record = read_record(out)
        return record.config, [(trial.hparams["x"], trial.loss) for trial in record.trials]

    first, again, seeded, less_noise = trials(), trials(), trials("--seed", "6"), trials("--set", "task.noise=0")
    assert first == again
    assert first[1] == [(trial.hparams["x"], trial.loss) for trial in read_record("runs/done").trials]
    assert seeded[0]["study"]["seed"] == 6
    assert seeded[1] != first[1]
    assert [x for x, _ in less_noise[1]] == [x for x, _ in first[1]]
    assert all(less < more for (_, less), (_, more) in zip(less_noise[1], first[1], strict=True))


def test_quiet_says_nothing_and_no_report_writes_none(capsys):
    assert main(["run", "good.toml", "--quiet", "--no-report", "--out", "runs/quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert not os.path.exists("runs/quiet/report.md")
    assert "confirmation" not in read_record("runs/quiet").notes


def test_a_folder_with_a_study_is_refused_with_both_ways_on(capsys):
    before = read_record("runs/done")
    assert main(["run", "good.toml", "--out", "runs/done"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "runs/done already holds a study" in err
    assert "jaxhpo resume runs/done" in err
    assert "--out" in err
    assert read_record("runs/done") == before


def test_ctrl_c_ends_after_the_chunk_and_resume_goes_on_to_the_same_trials(project, capsys):
    (project / "host.toml").write_text(to_toml(config("cli_toys:host", task={"interrupt_at": 14})))
    assert main(["run", "host.toml", "--out", "runs/broken off"]) == 130
    assert "trials; go on with: jaxhpo resume 'runs/broken off'\n" in capsys.readouterr().err
    part = read_record("runs/broken off")
    assert part.status == "interrupted"
    assert 14 <= len(part.trials) < 24
    assert main(["resume", "runs/broken off", "--quiet"]) == 0  # ten calls at most: no further interrupt
    whole = read_record("runs/broken off")
    assert whole.status == "finished"
    assert main(["run", "host.toml", "--quiet", "--out", "runs/straight", "--set", "task.interrupt_at=-1"]) == 0
    straight = read_record("runs/straight")
    assert [(t.number, t.hparams, t.loss) for t in whole.trials] == [(t.number, t.hparams, t.loss) for t in straight.trials]


def test_resume_of_a_finished_study_changes_no_trial(project):
    before = read_record("runs/done").trials
    os.chdir("/")  # the module is found beside the record
    try:
        assert main(["resume", str(project / "runs/done"), "--quiet"]) == 0
    finally:
        os.chdir(project)
    assert read_record("runs/done").trials == before


def test_all_trials_diverged(project, capsys):
    (project / "cliff.toml").write_text(to_toml(config("cli_toys:cliff")))
    assert main(["run", "cliff.toml", "--out", "runs/cliff"]) == 2
    out, err = capsys.readouterr()
    assert "jaxhpo: error: all 24 trials diverged" in err
    assert "report: runs/cliff/report.md" in out


def test_a_bug_in_a_factory_keeps_its_traceback(project):
    (project / "bug.toml").write_text(to_toml(config("cli_toys:broken")))
    with pytest.raises(TypeError, match="a bug in a factory"):
        main(["run", "bug.toml"])


def test_show_report_and_export(capsys):
    record = read_record("runs/done")
    assert record.best is not None
    assert main(["show", "runs/done"]) == 0
    assert f"(trial {record.best.number})" in capsys.readouterr().out
    assert main(["report", "runs/done", "--seeds", "5"]) == 0
    assert "on 5 fresh seeds" in capsys.readouterr().out
    assert read_record("runs/done").notes["confirmation"]["seeds"] == 5
    assert main(["export", "runs/done", "--to", "jsonl", "--out", "trials.jsonl"]) == 0
    assert capsys.readouterr().out == "trials.jsonl\n"
    with open("trials.jsonl") as file:
        rows = [json.loads(line) for line in file]
    assert [row["loss"] for row in rows] == [trial.loss for trial in record.trials]


def test_compare(capsys):
    assert main(["run", "other.toml", "--quiet", "--no-report", "--out", "runs/noisy"]) == 0
    assert main(["compare", "runs/done", "runs/noisy", "--out", "compared"]) == 0
    out = capsys.readouterr().out
    assert "good" in out
    assert "other" in out
    assert os.path.exists("compared/comparison.html")


def test_lists(project, capsys):
    (project / "experiments").mkdir()
    (project / "experiments" / "images.py").write_text(
        "from jaxhpo.tasks import Training, HostFunction\nimport jaxhpo\nimport not_there\n"
        'def plain(a, num_steps: int = 5) -> Training:\n    """Plain things.\n\n    More."""\n'
        "def qualified() -> jaxhpo.tasks.HostFunction: ...\ndef quoted() -> 'Training': ...\n"
        "def _private() -> Training: ...\ndef helper() -> int: ...\nclass Training: ...\n"
    )
    (project / "experiments" / "wrong.py").write_text("def f(:\n")
    assert main(["list", "tasks"]) == 0
    lines = [re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["experiments.images:plain", "Plain things. (a, num_steps=5)"]
    assert [name for name, *_ in lines[1:3]] == ["experiments.images:qualified", "experiments.images:quoted"]
    assert lines[3][0] == "experiments.wrong"
    assert "cannot be read" in lines[3][1]
    assert len(lines) == 4
    assert main(["list", "optimizers"]) == 0
    assert re.search(r"^PSO +\S", capsys.readouterr().out, re.M)
    assert main(["list", "leaves"]) == 0
    assert re.search(r"^int .* low, high, log = false", capsys.readouterr().out, re.M)
    for command in (["list", "data"], ["data", "list"]):
        assert main(command) == 0
        assert re.search(r"^digits +\S", capsys.readouterr().out, re.M)
    assert main(["data", "fetch", "digitz"]) == 2
    assert "digits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["rum", "x.toml"], "'rum'"),
        (["run"], "CONFIG"),
        (["run", "good.toml", "--seed", "x"], "--seed: must be a whole number of at least 0, not 'x'"),
        (["run", "good.toml", "--devices", "0"], "--devices: must be a whole number of at least 1"),
        (["run", "good.toml", "--sead", "1"], "--sead"),
        (["export", "runs/done"], "--to"),
        (["export", "runs/done", "--to", "xml"], "'xml'"),
        (["show", "nowhere"], "nowhere: there is no study here"),
        (["resume", "nowhere"], "nowhere: there is no study here"),
        (["report", "nowhere"], "nowhere"),
        (["compare", "runs/done", "nowhere"], "nowhere"),
        (["compare", "runs/done"], "at least two"),
        (["run", "god.toml"], "did you mean good.toml"),
        (["run", "good.toml", "--set", "optimizer.num_lanes=0", "--set", "study.sed=1"], "optimizer.num_lanes: must be"),
    ],
)
def test_a_wrong_command_is_lines_on_standard_error_and_exit_code_2(arguments, words, capsys):
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err
    assert all(line.startswith("jaxhpo: error: ") for line in err.splitlines())


def test_mistakes_as_a_shell_sees_them(project):
    """Through a real process: exit code 2, a line each, no traceback."""
    wrong = config()
    wrong["space"]["x"] = {"type": "float", "low": 2.0, "high": 1.0}
    wrong["optimizer"]["inertia"] = 0.5
    wrong["task"]["nose"] = 0.1
    (project / "wrong.toml").write_text(to_toml(wrong))
    found = jaxhpo("run", "wrong.toml")
    assert found.returncode == 2
    assert found.stdout == ""
    assert sorted(found.stderr.splitlines()) == [
        "jaxhpo: error: wrong.toml: optimizer.inertia: unknown field of RandomSearch; must be one of num_lanes",
        "jaxhpo: error: wrong.toml: space.x.low: must be below high, not 2.0 with high = 1.0; swap them",
        "jaxhpo: error: wrong.toml: task.nose: unknown argument of cli_toys:bowl; did you mean noise?",
    ]


@pytest.mark.parametrize("text", [b"[study", b"\xff", b"", b"[study]\nnum_trials = inf\n"])
def test_garbage_as_a_shell_sees_it(project, text):
    (project / "garbage.toml").write_bytes(text)
    found = jaxhpo("run", "garbage.toml")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert all(line.startswith("jaxhpo: error: garbage.toml: ") for line in found.stderr.splitlines())
    assert found.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["list", "optimizers"], ["show", "runs/done"]]
)
def test_what_should_be_instant_does_not_import_jax(arguments):
    found = jaxhpo(*arguments, options=("-X", "importtime"))
    assert found.returncode == 0
    modules = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in found.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "argparse" in modules
    assert not modules & {"jax", "jaxlib", "flax", "scipy", "rich", "matplotlib"}
    if arguments[0] != "show":
        assert "numpy" not in modules


def test_help_takes_little_time():
    """Processor time, the least of five: what it needs, whatever else the machine does."""

    def cpu_seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert "resume" in jaxhpo("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(5)) < 0.2


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m jaxhpo show runs/done | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert found.stderr == ""
    assert found.stdout.strip() in ("0", "141")  # 0 where all was written before the reader went


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def told(terminal, quiet=False):
    stream = Stream(terminal)
    with progress_shown(quiet, stream) as tell:
        tell(Progress(0, 100, None, 0, 0.0, 0.0, None, "compiling"))
        for trials in range(0, 100, 10):
            tell(Progress(trials, 100, 0.03125, 2, 1.0, 12.5, 4.0, "running"))
        tell(Progress(100, 100, 0.03125, 2, 8.0, 12.5, 0.0, "finished"))
    return stream.getvalue()


def test_progress_without_a_terminal_is_a_few_plain_lines():
    assert told(terminal=False).splitlines() == [
        "0/100 trials: compiling",
        "0/100 trials: best 0.03125, 12.5 trials/s, 2 diverged, 4 s left",
        "100/100 trials: best 0.03125, 12.5 trials/s, 2 diverged, after 8 s",
    ]


def test_progress_on_a_terminal_is_a_bar_and_quiet_is_nothing():
    text = told(terminal=True)
    assert "100/100" in text
    assert "best 0.03125" in text
    assert told(terminal=True, quiet=True) == told(terminal=False, quiet=True) == ""


def test_facts_leave_out_what_is_not_known():
    assert facts(Progress(3, 9, None, 0, 1.0, 0.0, None, "running")) == ""
