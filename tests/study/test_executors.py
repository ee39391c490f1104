"""Executors against direct calls, and against everything that a function may do to the process it runs in."""

import ctypes
import functools
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxhpo.errors import JaxhpoError
from jaxhpo.study.executors import Executor, Job, Outcome, process_executor, serial_executor


def quadratic(hparams, seed):
    return {"loss": (hparams["x"] - 1.0) ** 2, "seed": seed}


def obey(hparams):
    """Does what its hyperparameters say; notes each call in a file if one is named."""
    if "log" in hparams:
        with open(hparams["log"], "a") as log:
            log.write(f"{os.getpid()}\n")
    match hparams["do"]:
        case "return":
            return hparams.get("value", 1.0)
        case "raise":
            raise ValueError("no such luck")
        case "raise once":
            if len(calls(hparams["log"])) == 1:
                raise ValueError("no such luck")
            return 2.0
        case "leave":
            sys.exit("enough")
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            ctypes.string_at(0)
        case "sleep":
            time.sleep(hparams["seconds"])
            return float(os.getpid())
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            child = subprocess.Popen(["sleep", "600"])
            Path(hparams["pids"]).write_text(f"{os.getpid()} {child.pid}")
            time.sleep(600)
        case "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return 1.0
        case "fork":  # the child holds all that the worker had open
            if os.fork() == 0:
                os.setsid()
                time.sleep(8)
                os._exit(0)
            os._exit(4)
        case "modules":
            return float("jax" in sys.modules)
        case "mutate":
            return float(hparams["inner"].pop())


class Fragile:
    """Pickles here, but cannot be loaded."""

    def __call__(self, hparams):
        return 0.0

    def __reduce__(self):
        return (_refuse, ())


def _refuse():
    raise RuntimeError("cannot be loaded here")


def calls(log):
    return Path(log).read_text().split()


def alive(pid):
    """Runs, and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def reason(outcome: Outcome) -> str:
    """Why a job failed."""
    assert outcome.metrics is None
    assert outcome.error is not None
    return outcome.error


def loss(outcome: Outcome) -> float:
    """What a job that did not fail returned."""
    assert outcome.error is None
    assert outcome.metrics is not None
    return outcome.metrics["loss"]


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")


def run(executor: Executor, tasks) -> dict[int, Outcome]:
    for number, hparams in enumerate(tasks):
        executor.submit(Job(number, hparams, seed=number))
    outcomes = [executor.next() for _ in tasks]
    assert sorted(outcome.number for outcome in outcomes) == list(range(len(outcomes)))
    return {outcome.number: outcome for outcome in outcomes}


@pytest.fixture(scope="module")
def pool():
    """Two workers for all tests that leave no trace in the executor."""
    with process_executor(obey, processes=2) as executor:
        yield executor


# What both do.


@pytest.mark.parametrize("make", [serial_executor, functools.partial(process_executor, processes=2)])
def test_many_jobs_give_what_direct_calls_give(make):
    settings = [{"x": 0.1 * index} for index in range(40)]
    with make(quadratic) as executor:
        outcomes = run(executor, settings)
    for number, hparams in enumerate(settings):
        outcome = outcomes[number]
        assert outcome.metrics == quadratic(hparams, number)
        assert (outcome.error, outcome.attempts) == (None, 1)
        assert 0 <= outcome.seconds < 1
    with pytest.raises(RuntimeError, match="closed"):
        executor.next()
    executor.close()


def test_serial_runs_in_order_and_only_when_asked(tmp_path):
    log = str(tmp_path / "log")
    with serial_executor(obey) as executor:
        for number in (5, 3, 4):
            executor.submit(Job(number, {"do": "return", "log": log}, 0))
        assert not Path(log).exists()
        assert [executor.next().number for _ in range(3)] == [5, 3, 4]
        assert len(calls(log)) == 3


def test_next_without_a_job_is_refused(pool):
    for executor in (serial_executor(obey), pool):
        with pytest.raises(RuntimeError, match="no job is pending"):
            executor.next()


def test_a_function_sees_its_hyperparameters_untouched_by_other_attempts():
    hparams = {"do": "mutate", "inner": [1, 2]}
    with serial_executor(obey) as executor:
        assert [executor.submit(Job(0, hparams, 0)) or executor.next().metrics for _ in range(2)] == [{"loss": 2.0}] * 2
    assert hparams["inner"] == [1, 2]


@pytest.mark.parametrize(
    ("fn", "seen"),
    [
        (lambda hparams, seed: seed, 7.0),
        (lambda hparams, seed=0: seed, 7.0),
        (lambda hparams, seed, /: seed, 7.0),
        (lambda hparams, *, seed: seed, 7.0),
        (lambda hparams: -1, -1.0),
        (lambda hparams, **seed: len(seed), 0.0),
        (functools.partial(quadratic, seed=3), 3.0),
    ],
)
def test_the_seed_goes_to_functions_that_take_one(fn, seen):
    with serial_executor(fn) as executor:
        metrics = run_one(executor, {"x": 0.0}, seed=7).metrics
    assert metrics is not None
    assert metrics.get("seed", metrics["loss"]) == seen


def run_one(executor, hparams, seed=0):
    executor.submit(Job(0, hparams, seed))
    return executor.next()


@pytest.mark.parametrize(
    ("value", "metrics"),
    [
        (2, {"loss": 2.0}),
        (np.float32(0.5), {"loss": 0.5}),
        (np.array(3), {"loss": 3.0}),
        (math.inf, {"loss": math.inf}),
        ({"a": np.int64(1), "b": -math.inf}, {"a": 1.0, "b": -math.inf}),
        (np.bool_(True), {"loss": 1.0}),
    ],
)
def test_numbers_become_floats(value, metrics):
    with serial_executor(lambda hparams: value) as executor:
        found = run_one(executor, {}).metrics
    assert found == metrics
    assert all(type(number) is float for number in found.values())


def test_nan_stays_nan_and_is_no_failure(pool):
    for executor in (serial_executor(obey), pool):
        outcome = run_one(executor, {"do": "return", "value": {"a": math.nan}})
        assert outcome.error is None
        assert math.isnan(outcome.metrics["a"])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "returned None"),
        ("0.3", "returned str '0.3'"),
        (np.str_("0.3"), "str"),
        (1j, "returned complex 1j"),
        (np.complex64(1.0), "complex64"),
        (np.timedelta64(3, "s"), "timedelta64"),
        (np.zeros(3), "returned ndarray of shape (3,)"),
        ((0.1, 0.2), "returned tuple (0.1, 0.2)"),
        ({}, "empty dict"),
        ({"a": 1.0, "b": [2.0]}, "with 'b': list [2.0]"),
        ({1: 1.0}, "with the key 1"),
        (10**400, "returned int 1000"),
    ],
)
def test_anything_else_is_a_failure_that_says_what_came_and_what_is_due(value, said):
    with serial_executor(lambda hparams: value) as executor:
        error = reason(run_one(executor, {}))
    assert said in error
    assert "is due" in error
    assert "\n" not in error
    assert len(error) < 300


def test_an_exception_is_told_with_its_traceback_from_the_function_on(pool):
    errors = [reason(run_one(executor, {"do": "raise"})) for executor in (serial_executor(obey), pool)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("Traceback")
    assert errors[0].endswith("ValueError: no such luck")
    assert errors[0].count("File ") == 1
    assert "in obey" in errors[0]


@pytest.mark.parametrize("fails", ["raise", "leave"])
def test_one_failure_does_not_touch_the_others(pool, fails):
    for executor in (serial_executor(obey), pool):
        tasks = [{"do": "return", "value": float(n)} if n % 3 else {"do": fails} for n in range(9)]
        outcomes = run(executor, tasks)
        assert [number for number in outcomes if outcomes[number].metrics is None] == [0, 3, 6]
        assert all(outcomes[n].metrics == {"loss": float(n)} for n in range(9) if n % 3)


def test_retries_are_counted(tmp_path):
    logs = [str(tmp_path / name) for name in ("always", "once", "never")]
    tasks = [{"do": do, "log": log} for do, log in zip(["raise", "raise once", "return"], logs, strict=True)]
    for make in (serial_executor, functools.partial(process_executor, processes=1)):
        with make(obey, retries=2) as executor:
            outcomes = run(executor, tasks)
        assert [outcomes[n].attempts for n in range(3)] == [3, 2, 1]
        assert [len(calls(log)) for log in logs] == [3, 2, 1]
        assert reason(outcomes[0]).endswith("no such luck")
        assert (outcomes[1].metrics, outcomes[1].error) == ({"loss": 2.0}, None)
        for log in logs:
            Path(log).unlink()


def test_a_very_long_error_is_shortened():
    def shout(hparams):
        raise ValueError("a" * 10**6 + "the end")

    with serial_executor(shout) as executor:
        error = reason(run_one(executor, {}))
    assert len(error) < 21_000
    assert error.endswith("the end")


# What only processes do.


def test_outcomes_come_in_the_order_in_which_they_are_known(pool):
    run(pool, [{"do": "sleep", "seconds": 0.2}] * 2)  # both workers are up
    for number, seconds in enumerate((0.6, 0.0)):
        pool.submit(Job(number, {"do": "sleep", "seconds": seconds}, 0))
    first, second = pool.next(), pool.next()
    assert (first.number, second.number) == (1, 0)
    assert first.metrics != second.metrics  # two processes
    assert 0.6 <= second.seconds < 5.0


def test_a_worker_imports_no_jax_and_is_not_this_process(pool):
    assert run_one(pool, {"do": "modules"}).metrics == {"loss": 0.0}
    assert run_one(pool, {"do": "sleep", "seconds": 0}).metrics != {"loss": float(os.getpid())}
    assert run_one(pool, {"do": "interrupt"}).metrics == {"loss": 1.0}  # Ctrl-C is the parent's to handle


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_worker_that_dies_is_a_failed_trial_and_is_replaced(tmp_path):
    deaths = {"exit": "exit code 3", "kill": "SIGKILL", "segfault": "SIGSEGV", "fork": "exit code 4"}
    tasks = [{"do": do, "log": str(tmp_path / do)} for do in deaths] + [{"do": "return", "value": n} for n in range(4, 9)]
    before = set(multiprocessing.active_children())
    with process_executor(obey, processes=2, retries=1) as executor:
        outcomes = run(executor, tasks)
    assert set(multiprocessing.active_children()) <= before
    for number, (do, said) in enumerate(deaths.items()):
        assert said in reason(outcomes[number])
        assert outcomes[number].attempts == len(calls(tmp_path / do)) == 2
    assert outcomes[3].seconds < 8  # not first when the child of the worker lets go of its pipe
    assert all(outcomes[n].metrics == {"loss": n} for n in range(4, 9))


@needs_proc
def test_a_timeout_ends_the_worker_with_all_it_has_started_and_the_pool_goes_on(tmp_path):
    tasks = [{"do": "hang", "pids": str(tmp_path / "pids")}] + [{"do": "return", "value": n} for n in range(1, 5)]
    with process_executor(obey, processes=1, timeout=0.5) as executor:
        outcomes = run(executor, tasks)
        assert reason(outcomes[0]) == "timed out after 0.5 s"
        assert 0.5 <= outcomes[0].seconds < 5.0
        assert all(outcomes[n].metrics == {"loss": n} for n in range(1, 5))
        assert not any(alive(pid) for pid in calls(tmp_path / "pids"))

        # Looked at too late, an attempt that took too long has failed all the same.
        executor.submit(Job(0, {"do": "sleep", "seconds": 0.7}, 0))
        time.sleep(1.2)
        assert reason(executor.next()) == "timed out after 0.5 s"
        assert run_one(executor, {"do": "sleep", "seconds": 0.2}).error is None


@needs_proc
def test_an_idle_worker_that_dies_is_replaced_and_no_trial_fails(pool):
    pids = {int(loss(run_one(pool, {"do": "sleep", "seconds": 0}))) for _ in range(3)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    outcomes = run(pool, [{"do": "sleep", "seconds": 0.05}] * 4)
    assert not pids & {int(loss(outcome)) for outcome in outcomes.values()}


@needs_proc
def test_close_ends_busy_and_stubborn_workers_at_once(tmp_path):
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError), process_executor(obey, processes=2) as executor:
        executor.submit(Job(0, {"do": "hang", "pids": str(tmp_path / "pids")}, 0))
        executor.submit(Job(1, {"do": "return"}, 0))
        executor.next()
        assert wait_for((tmp_path / "pids").exists)
        started = set(multiprocessing.active_children()) - before
        assert len(started) == 2
        begin = time.monotonic()
        raise ZeroDivisionError
    assert time.monotonic() - begin < 5.0
    assert set(multiprocessing.active_children()) <= before
    # Killed; on a busy machine the system takes a moment to clear away what the workers had started.
    assert wait_for(lambda: not any(alive(pid) for pid in calls(tmp_path / "pids")))
    with pytest.raises(RuntimeError, match="closed"):
        executor.submit(Job(2, {"do": "return"}, 0))


def test_no_worker_is_started_before_the_first_job():
    before = multiprocessing.active_children()
    with process_executor(obey, processes=4) as executor:
        assert multiprocessing.active_children() == before
        executor.submit(Job(0, {"do": "return"}, 0))
        assert len(multiprocessing.active_children()) == len(before) + 1  # one job needs one worker


# What is refused.


def test_functions_that_no_worker_could_import_are_refused_before_any_starts():
    def local(hparams):
        return 0.0

    for fn in (local, lambda hparams: 0.0, functools.partial(local)):
        with pytest.raises(JaxhpoError, match=r"local|lambda.*importable: define it at module level"):
            process_executor(fn, processes=1)


def test_a_function_that_a_worker_cannot_load_ends_the_study_with_one_line():
    with process_executor(Fragile(), processes=1) as executor:
        executor.submit(Job(0, {}, 0))
        with pytest.raises(JaxhpoError, match=r"importable: define it at module level.*cannot be loaded here") as caught:
            executor.next()
    assert "\n" not in str(caught.value)


def test_hyperparameters_that_cannot_travel_are_refused(pool):
    with pytest.raises(JaxhpoError, match="trial 4: its hyperparameters cannot be sent"):
        pool.submit(Job(4, {"act": lambda x: x}, 0))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"processes": 0}, "processes = 0: must be"),
        ({"processes": 1.5}, "processes = 1.5: must be"),
        ({"processes": 1, "timeout": 0}, "timeout = 0: must be"),
        ({"processes": 1, "timeout": math.nan}, "timeout = nan: must be"),
        ({"processes": 1, "retries": -1}, "retries = -1: must be"),
        ({"processes": 1, "retries": 0.5}, "retries = 0.5: must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        process_executor(obey, **settings)


def test_serial_refuses_a_timeout_and_both_what_is_no_function():
    with pytest.raises(ValueError, match="processes >= 1"):
        serial_executor(obey, timeout=3.0)
    not_callable: Any = 3
    for make in (serial_executor, functools.partial(process_executor, processes=1)):
        with pytest.raises(TypeError, match="int 3"):
            make(not_callable)


# Programs that are run as scripts.

SCRIPT = """
    import os, sys, time
    from jaxhpo.study.executors import Job, process_executor

    def objective(hparams):
        print("pid", os.getpid(), flush=hparams["seconds"] > 0)
        time.sleep(hparams["seconds"])
        return 0.25

    def main():
        executor = process_executor(objective, processes=2)
        executor.submit(Job(0, {"seconds": 0}, 0))
        print(executor.next().metrics, flush=True)
        if "forget" in sys.argv:
            executor.submit(Job(1, {"seconds": 600}, 0))
            return
        executor.submit(Job(1, {"seconds": 600}, 0))
        executor.submit(Job(2, {"seconds": 600}, 0))
        executor.next()
"""
GUARDED = SCRIPT + '\n    if __name__ == "__main__":\n        main()\n'
UNGUARDED = SCRIPT + "\n    main()\n"


def script(tmp_path, text, *arguments):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, path, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered)


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, how):
    program = script(tmp_path, GUARDED)
    lines = [program.stdout.readline() for _ in range(4)]
    pids = {int(line.split()[1]) for line in lines if line.startswith("pid")}
    assert "{'loss': 0.25}\n" in lines
    assert len(pids) == 2
    program.send_signal(how)
    assert wait_for(lambda: program.poll() is not None)
    assert wait_for(lambda: not any(map(alive, pids)))
    errors = program.communicate()[1]
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1  # the parent's own
        assert "KeyboardInterrupt" in errors


def test_a_program_that_forgets_to_close_ends_all_the_same(tmp_path):
    program = script(tmp_path, GUARDED, "forget")
    output, errors = program.communicate(timeout=10)
    assert (program.returncode, errors) == (0, "")
    said, result = output.splitlines()[:2]  # what a trial prints is seen by the time its outcome is known
    assert said.startswith("pid")
    assert result == "{'loss': 0.25}"


def test_an_unguarded_script_is_told_what_to_do(tmp_path):
    program = script(tmp_path, UNGUARDED)
    errors = program.communicate(timeout=10)[1]
    assert program.returncode == 1
    assert 'start the study under `if __name__ == "__main__":`' in errors


def test_a_function_of_an_interactive_session_is_refused():
    text = """
    from jaxhpo.study.executors import process_executor

    def f(hparams):
        return 0.0

    process_executor(f, processes=1)
    """
    text = textwrap.dedent(text).strip() + "\n"
    for command in ([sys.executable, "-c", text], [sys.executable, "-"], [sys.executable, "-i"]):
        program = subprocess.run(command, input=text.replace("0.0\n", "0.0\n\n"), capture_output=True, text=True, timeout=10)
        assert "__main__.f: to run in worker processes, the objective must be importable" in program.stderr
