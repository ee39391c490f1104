"""Worker processes: their own life, the parent's handle of them, how they end, and how the function reaches them.

No JAX is imported here, so that a worker starts quickly.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Generator
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from jaxhpo.errors import JaxhpoError
from jaxhpo.study.calls import PendingJob, call_once, one_line
from jaxhpo.tasks.calls import caller

_GRACE = 1.0  # seconds that a process is given to end by itself before it is killed


# The worker's side.


def _work(pipe: connection.Connection) -> None:
    """The life of a worker: greet, receive the function, then attempt after attempt until the pipe is closed."""
    _detach()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # closed by the parent
        pipe.send("started")
        pickled = pipe.recv_bytes()
        try:
            call = caller(pickle.loads(pickled))
        except BaseException as error:  # importing the user's module may raise anything
            pipe.send(one_line(error))
            return
        pipe.send("ready")
        while True:
            given = pipe.recv_bytes()
            pipe.send("begun")
            attempt = call_once(call, functools.partial(pickle.loads, given))
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


class Worker:
    """A worker process: ``starting`` until its function is loaded, then idle, or busy with ``job`` since ``since``.

    ``begun`` is False while the job may not have reached it.
    """

    def __init__(self, index: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        # Not a daemon process: those may not have children, and data loaders do.
        self.process = context.Process(target=_work, args=(theirs,), name=f"jaxhpo-worker-{index}", daemon=False)
        self.starting = True
        self.begun = False
        self.job: PendingJob | None = None
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

    def exit_code_soon(self) -> int | None:
        """The exit code of a worker that is about to end; None if it still runs a moment later."""
        deadline = time.monotonic() + _GRACE
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        return self.exit_code()

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


def end_workers(workers: list[Worker], owner: int) -> None:
    """Ends workers and empties the list: idle ones leave when their pipe is closed, the others are terminated, then killed."""
    if os.getpid() != owner:  # a fork of the parent has a copy of the list, but the workers are not its own
        return
    ending = list(workers)
    try:
        for worker in ending:
            worker.pipe.close()
            if worker.starting or worker.job is not None or worker.exit_code() is not None:
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
            if worker.exit_code_soon() is not None:
                worker.process.close()
        workers.clear()


def death(code: int | None) -> str:
    """How a worker with this exit code has ended, as the predicate of a sentence."""
    if code is None:
        return "closed its pipe"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"was killed by signal {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


# The function on its way to a worker.


def name_of(fn: Any) -> str:
    """The name by which a function is imported; for a partial or an object, that of its function or type."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    named = fn if hasattr(fn, "__qualname__") else type(fn)
    return f"{named.__module__}.{named.__qualname__}"


def pickled_function(fn: Any, name: str) -> bytes:
    """The function as bytes that a worker can load; it is refused here where it can be known that none can."""
    try:
        pickled = bytes(ForkingPickler.dumps(fn))
    except Exception as error:
        raise JaxhpoError(not_importable(name, one_line(error))) from error
    main = sys.modules["__main__"]
    is_file = getattr(main, "__spec__", None) is not None or os.path.isfile(getattr(main, "__file__", None) or "")
    if name.startswith("__main__.") and not is_file:
        raise JaxhpoError(not_importable(name, "the main program of this session is not a file"))
    return pickled


def not_importable(name: str, reason: str) -> str:
    """The one line that refuses a function which no worker can import."""
    return (
        f"{name}: to run in worker processes, the objective must be importable: define it at module level in a file, "
        f"not as a lambda, inside a function or in an interactive session; or use processes=0 ({' '.join(reason.split())})"
    )
