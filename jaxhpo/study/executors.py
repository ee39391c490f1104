"""Executors: they run objectives that JAX cannot trace, in this process or in worker processes.

    jobs  --submit-->  queue  --to an idle worker-->  fn(hparams, seed)  --validated-->  outcomes  --next-->

An exception, a timeout, a dead worker and a return value that is not a number are the same to the caller: a failed
attempt, with its reason as text. Only the standard library is imported here, so that a worker starts quickly.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import math
import multiprocessing
import numbers
import os
import pickle
import reprlib
import signal
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, Self

from jaxhpo.errors import JaxhpoError

SCALAR_METRIC = "loss"
"""The name under which the value of a function that returns a bare number is reported."""

_GRACE = 1.0  # seconds that a process is given to end by itself before it is killed
_POLL = 0.5  # seconds between two looks for dead workers; see ``_Worker.exit_code``
_SPARE_WORKERS = 3  # the pool gives up after losing this many more workers than it has, in a row, before they began a job
_LONGEST_ERROR = 20_000  # characters of an error that are kept


@dataclass(frozen=True)
class Job:
    """One call of the function: the number of its trial, plain Python hyperparameters, the seed of the trial."""

    number: int
    hparams: Any
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        metrics: the returned numbers by name, NaN and infinities as they are; None if every attempt failed.
        error: why the last attempt failed: a traceback, or a sentence such as ``timed out after 3 s``; else None.
        seconds: time spent in the function by all attempts together, without waiting for a worker.
        attempts: how many times the function was called, at least 1.
    """

    number: int
    metrics: dict[str, float] | None
    error: str | None
    seconds: float
    attempts: int


class Executor(Protocol):
    """Runs jobs; for use by one thread. As a context manager it closes itself."""

    def submit(self, job: Job) -> None:
        """Puts a job in the queue; returns at once."""
        ...

    def next(self) -> Outcome:
        """Waits until some job is finished. Raises RuntimeError if there is none to wait for."""
        ...

    def close(self) -> None:
        """Drops the jobs that are not finished and ends all workers. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc_info: object) -> None: ...


def serial_executor(fn: Callable[..., Any], *, timeout: float | None = None, retries: int = 0) -> Executor:
    """Runs each job in this process, in the order of submission, when its outcome is asked for.

    Raises:
        ValueError: if ``timeout`` is given: a call can only be cut short in a process of its own.
    """
    if timeout is not None:
        raise ValueError(f"timeout = {timeout!r}: a call in this process cannot be cut short; a timeout needs processes >= 1")
    return _Serial(fn, retries)


def process_executor(fn: Callable[..., Any], *, processes: int, timeout: float | None = None, retries: int = 0) -> Executor:
    """Runs jobs in up to ``processes`` worker processes; outcomes come in the order in which they are known.

    Workers are fresh interpreters (``spawn``: a fork of a process with JAX's threads may hang), started with the first
    jobs and kept. ``fn`` is imported there by its name. A function of the script that is run as the program is found
    too, but the script is imported by every worker: start the study under ``if __name__ == "__main__":``.
    Whoever edits the file while the study runs changes what workers started later will run.
    On POSIX each worker leads a session of its own, so that programs it has started end with it.

    Args:
        timeout: seconds an attempt may take, without the start of its worker; a longer one fails and its worker is killed.
        retries: further attempts for a job that failed, for whatever reason, with the same hyperparameters and seed.

    Raises:
        ValueError: if a number is out of its range.
        JaxhpoError: if ``fn`` cannot be imported by another process; at ``next`` if no worker can be started.
    """
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"processes = {processes!r}: must be a whole number, at least 1")
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(f"timeout = {timeout!r}: must be a positive number of seconds, or None for no limit")
    return _Processes(fn, processes, timeout, retries)


# The call and its result.


def _caller(fn: Callable[..., Any]) -> Callable[[Any, int], Any]:
    """``fn`` as a function of (hparams, seed), whether or not it takes a seed."""
    try:
        parameter = inspect.signature(fn).parameters.get("seed")
    except (TypeError, ValueError):  # some functions written in C have no signature
        parameter = None
    bound = isinstance(fn, functools.partial) and "seed" in fn.keywords
    if parameter is None or bound or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return lambda hparams, seed: fn(hparams)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        return fn
    return lambda hparams, seed: fn(hparams, seed=seed)


def _number(value: Any) -> float | None:
    """A real number, a numpy scalar or a 0-d array as a float; None for anything else."""
    if not isinstance(value, numbers.Real):
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        if isinstance(value, (str, bytes)) or getattr(value, "shape", None) != () or kind in tuple("cmMOSU"):
            return None
    try:
        return float(value)
    except Exception:
        return None


def _metrics(value: Any) -> dict[str, float]:
    """A returned value as metrics by name; TypeError says what was returned and what is due."""
    due = "a number, or a dict of numbers by name, is due"
    if isinstance(value, Mapping):
        if not value:
            raise TypeError(f"the objective returned an empty dict; {due}")
        metrics = {}
        for name, entry in value.items():
            number = _number(entry)
            if not isinstance(name, str):
                raise TypeError(f"the objective returned a dict with the key {reprlib.repr(name)}; {due}")
            if number is None:
                raise TypeError(f"the objective returned a dict with {name!r}: {_description(entry)}; {due}")
            metrics[name] = number
        return metrics
    number = _number(value)
    if number is None:
        raise TypeError(f"the objective returned {_description(value)}; {due}")
    return {SCALAR_METRIC: number}


def _description(value: Any) -> str:
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} {reprlib.repr(value)}" if not shape else f"{type(value).__name__} of shape {tuple(shape)}"


@dataclass(frozen=True)
class _Attempt:
    metrics: dict[str, float] | None
    error: str | None
    seconds: float


def _attempt(call: Callable[[Any, int], Any], hparams: Any, seed: int) -> _Attempt:
    """Calls once. Everything that the function may raise is a failure, but for the user's Ctrl-C."""
    start = time.perf_counter()
    try:
        value = call(hparams, seed)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit in the function too
        seconds = time.perf_counter() - start
        return _Attempt(None, _traceback(error), seconds)
    seconds = time.perf_counter() - start
    try:
        return _Attempt(_metrics(value), None, seconds)
    except TypeError as error:
        return _Attempt(None, _shortened(str(error)), seconds)


def _traceback(error: BaseException) -> str:
    """The traceback as text, from the first frame that is not of this file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return _shortened("".join(traceback.format_exception(type(error), error, trace)))


def _shortened(text: str) -> str:
    half = _LONGEST_ERROR // 2
    return text.strip() if len(text) <= _LONGEST_ERROR else f"{text[:half].strip()}\n[...]\n{text[-half:].strip()}"


@dataclass
class _Task:
    """A job on its way through its attempts; ``given`` is what the call is made from."""

    number: int
    given: Any
    attempts: int = 0
    seconds: float = 0.0

    def after(self, attempt: _Attempt, retries: int) -> Outcome | None:
        """The outcome, or None if the job is to be tried again."""
        self.attempts += 1
        self.seconds += attempt.seconds
        if attempt.error is not None and self.attempts <= retries:
            return None
        return Outcome(self.number, attempt.metrics, attempt.error, self.seconds, self.attempts)


class _Base:
    def __init__(self, fn: Callable[..., Any], retries: int) -> None:
        if not callable(fn):
            raise TypeError(f"the objective is {_description(fn)}; a function of the hyperparameters is due")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries = {retries!r}: must be a whole number, at least 0")
        self._retries = retries
        self._queue: deque[_Task] = deque()
        self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the executor is closed")

    def close(self) -> None:
        self._closed = True
        self._queue.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class _Serial(_Base):
    def __init__(self, fn: Callable[..., Any], retries: int) -> None:
        super().__init__(fn, retries)
        self._call = _caller(fn)

    def submit(self, job: Job) -> None:
        self._check_open()
        self._queue.append(_Task(job.number, job))

    def next(self) -> Outcome:
        self._check_open()
        if not self._queue:
            raise RuntimeError("no job is pending")
        task, outcome = self._queue[0], None
        while outcome is None:
            outcome = task.after(_attempt(self._call, _copied(task.given.hparams), task.given.seed), self._retries)
        self._queue.popleft()  # not before: after Ctrl-C the job is still pending
        return outcome


def _copied(tree: Any) -> Any:
    """The same values in containers of its own: what a function does to them reaches no other attempt, as in workers."""
    if type(tree) is dict:
        return {name: _copied(branch) for name, branch in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_copied, tree))
    return tree


# The worker's side.


def _work(pipe: connection.Connection) -> None:
    """The life of a worker: greet, receive the function, then attempt after attempt until the pipe is closed."""
    _detach()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # closed by the parent
        pipe.send("started")
        pickled = pipe.recv_bytes()
        try:
            call = _caller(pickle.loads(pickled))
        except BaseException as error:  # importing the user's module may raise anything
            pipe.send(_line(error))
            return
        pipe.send("ready")
        while True:
            given = pipe.recv_bytes()
            pipe.send("begun")
            attempt = _attempt(lambda bundle, _: call(*pickle.loads(bundle)), given, 0)
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # the function may have replaced or closed it
                    stream.flush()
            pipe.send(attempt)


def _detach() -> None:
    """Leaves Ctrl-C and the terminal to the parent, and leads a group of processes that can be killed as one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setsid"):
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _end_with_parent() -> None:
    """Ends the worker, busy or not, and what it has started, when the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if hasattr(os, "killpg"):
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


# The parent's side.


class _Worker:
    """A worker process: ``starting`` until its function is loaded, then idle, or busy with ``task`` since ``since``.

    ``begun`` is False while the task may not have reached it.
    """

    def __init__(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon process: those may not have children, and data loaders do.
        self.process = context.Process(target=_work, args=(theirs,), name=f"jaxhpo-worker-{index}", daemon=False)
        self.starting = True
        self.begun = False
        self.task: _Task | None = None
        self.since = 0.0
        try:
            with _interrupts_blocked():
                self.process.start()
        finally:
            theirs.close()
        self.sentinel = self.process.sentinel

    def exit_code(self) -> int | None:
        """None while it runs. Asks the system: processes forked by the worker may hold its pipe and sentinel open."""
        return self.process.exitcode

    def signal(self, number: int) -> bool:
        """Signals the worker and all of its group; False if nobody is left. Signal 0 only asks."""
        pid = self.process.pid
        if hasattr(os, "killpg") and pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # no group before the worker has made it
                os.killpg(pid, number)
                return True
        if self.exit_code() is not None:
            return False
        if number:
            (self.process.terminate if number == signal.SIGTERM else self.process.kill)()
        return True


@contextlib.contextmanager
def _interrupts_blocked() -> Generator[None, None, None]:
    """A process started here does not see Ctrl-C before it ignores it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: list[_Worker], owner: int) -> None:
    """Ends workers and empties the list: idle ones leave when their pipe is closed, the others are terminated, then killed."""
    if os.getpid() != owner:  # a fork of the parent has a copy of the list, but the workers are not its own
        return
    ending = list(workers)
    try:
        for worker in ending:
            worker.pipe.close()
            if worker.starting or worker.task is not None or worker.exit_code() is not None:
                worker.signal(signal.SIGTERM)
        deadline = time.monotonic() + _GRACE
        while any(worker.exit_code() is None or worker.signal(0) for worker in ending) and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        kill = getattr(signal, "SIGKILL", signal.SIGTERM)
        for worker in ending:
            worker.signal(kill)
            if worker.exit_code() is None:
                worker.process.kill()
        for worker in ending:
            if _exit_code_soon(worker) is not None:
                worker.process.close()
        workers.clear()


def _exit_code_soon(worker: _Worker) -> int | None:
    deadline = time.monotonic() + _GRACE
    while worker.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return worker.exit_code()


class _Processes(_Base):
    def __init__(self, fn: Callable[..., Any], processes: int, timeout: float | None, retries: int) -> None:
        super().__init__(fn, retries)
        self._name = _name_of(fn)
        self._fn = _pickled_function(fn, self._name)
        self._size = processes
        self._timeout = timeout
        self._workers: list[_Worker] = []
        self._finished: deque[Outcome] = deque()
        self._started = 0
        self._lost = 0  # workers in a row that were lost before they began a job
        self._any_ready = False
        # Neither a forgotten executor nor an exit without close may leave workers, or wait for them: multiprocessing
        # joins its children in an exit handler registered before this one, so it runs after it.
        self._ending = weakref.finalize(self, _end, self._workers, os.getpid())
        self._ending.atexit = False
        atexit.register(self._ending)

    def submit(self, job: Job) -> None:
        self._check_open()
        try:
            given = bytes(ForkingPickler.dumps((job.hparams, job.seed)))
        except Exception as error:
            raise JaxhpoError(
                f"trial {job.number}: its hyperparameters cannot be sent to a worker process ({_line(error)}); "
                "options must be importable at module level, or use processes=0"
            ) from error
        self._queue.append(_Task(job.number, given))
        self._collect(0.0)
        self._dispatch()

    def next(self) -> Outcome:
        self._check_open()
        if not (self._finished or self._queue or any(worker.task for worker in self._workers)):
            raise RuntimeError("no job is pending")
        while not self._finished:
            self._dispatch()
            self._collect(_POLL)
        return self._finished.popleft()

    def close(self) -> None:
        super().close()
        self._finished.clear()
        atexit.unregister(self._ending)
        self._ending()

    def _dispatch(self) -> None:
        """Gives jobs to idle workers, and starts workers while there are more jobs than workers to take them."""
        for worker in list(self._workers):
            if self._queue and not worker.starting and worker.task is None:
                worker.task, worker.begun, worker.since = self._queue.popleft(), False, time.monotonic()
                try:
                    worker.pipe.send_bytes(worker.task.given)
                except OSError:
                    self._bury(worker)
        free = sum(worker.task is None for worker in self._workers)
        while len(self._workers) < self._size and free < len(self._queue):
            self._workers.append(_Worker(self._started))
            self._started += 1
            free += 1

    def _collect(self, patience: float) -> None:
        """Waits up to ``patience`` seconds, or to the next deadline, for a worker; then sees to all of them."""
        now = time.monotonic()
        if self._timeout is not None:
            busy = [worker.since + self._timeout - now for worker in self._workers if worker.task is not None]
            patience = max(0.0, min([patience, *busy]))
        connection.wait([w.pipe for w in self._workers] + [w.sentinel for w in self._workers], timeout=patience)
        for worker in list(self._workers):
            dead = worker.exit_code() is not None  # asked first: what it sent before it died is read below
            try:
                if worker.pipe.poll():
                    self._receive(worker, worker.pipe.recv())
                    continue
            except (EOFError, OSError):
                dead = True
            if dead:
                self._bury(worker)
            elif self._timeout is not None and worker.task is not None and time.monotonic() > worker.since + self._timeout:
                task = self._remove(worker)
                assert task is not None
                self._settle(task, _Attempt(None, self._timed_out(), time.monotonic() - worker.since))

    def _receive(self, worker: _Worker, message: str | _Attempt) -> None:
        if isinstance(message, _Attempt):
            task, worker.task = worker.task, None
            self._lost = 0
            # The deadline may have passed unseen, between two calls of ``next``: the same limit holds for every attempt.
            if task is not None and self._timeout is not None and message.seconds > self._timeout:
                message = _Attempt(None, self._timed_out(), message.seconds)
            if task is not None:
                self._settle(task, message)
        elif message == "started":
            worker.pipe.send_bytes(self._fn)  # only now: a worker that hangs in its start does not block the parent
        elif message == "ready":
            worker.starting = False
            self._any_ready = True
        elif message == "begun":
            worker.begun = True
        else:
            raise JaxhpoError(_not_importable(self._name, message))

    def _settle(self, task: _Task, attempt: _Attempt) -> None:
        outcome = task.after(attempt, self._retries)
        if outcome is None:
            self._queue.appendleft(task)
        else:
            self._finished.append(outcome)

    def _timed_out(self) -> str:
        return f"timed out after {self._timeout:g} s"

    def _remove(self, worker: _Worker) -> _Task | None:
        """Takes a worker out of the pool and ends it; its task is returned."""
        task = worker.task
        self._workers.remove(worker)
        _end([worker], os.getpid())
        return task

    def _bury(self, worker: _Worker) -> None:
        """A worker has died: in its start, while idle (not the fault of the job on its way to it), or by what it was doing."""
        seconds, code = time.monotonic() - worker.since, _exit_code_soon(worker)
        task = self._remove(worker)
        if task is not None and worker.begun:
            self._settle(task, _Attempt(None, f"the worker process {_death(code)} during the trial", seconds))
            return
        if task is not None:
            self._queue.appendleft(task)
        if task is not None or worker.starting:
            self._lost += 1
            if self._lost >= (self._size + _SPARE_WORKERS if self._any_ready else 1):
                raise JaxhpoError(
                    f"{self._name}: a worker process {_death(code)} before it could take a trial; its own message is above. "
                    'If the objective is in the script that was run, start the study under `if __name__ == "__main__":`'
                )


def _death(code: int | None) -> str:
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"was killed by signal {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _line(error: BaseException) -> str:
    return _shortened("".join(traceback.format_exception_only(error))).replace("\n", " ")


def _name_of(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"


def _not_importable(name: str, reason: str) -> str:
    return (
        f"{name}: to run in worker processes, the objective must be importable: define it at module level in a file, "
        f"not as a lambda, inside a function or in an interactive session; or use processes=0 ({' '.join(reason.split())})"
    )


def _pickled_function(fn: Any, name: str) -> bytes:
    """The function as bytes that a worker can load; it is refused here where it can be known that none can."""
    try:
        pickled = bytes(ForkingPickler.dumps(fn))
    except Exception as error:
        raise JaxhpoError(_not_importable(name, _line(error))) from error
    main = sys.modules["__main__"]
    is_file = getattr(main, "__spec__", None) is not None or os.path.isfile(getattr(main, "__file__", None) or "")
    if name.startswith("__main__.") and not is_file:
        raise JaxhpoError(_not_importable(name, "the main program of this session is not a file"))
    return pickled
