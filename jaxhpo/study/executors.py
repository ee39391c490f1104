"""Executors: they run objectives that JAX cannot trace, in this process or in worker processes.

    jobs  --submit-->  queue  --to an idle worker-->  fn(hparams, seed)  --validated-->  outcomes  --next-->

No JAX is imported here, nor in the modules of calls and workers.
"""

from __future__ import annotations

import atexit
import math
import os
import time
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, Self

from jaxhpo.errors import JaxhpoError
from jaxhpo.study.calls import Attempt, Job, Outcome, PendingJob, call_once, one_line
from jaxhpo.study.workers import Worker, death, end_workers, name_of, not_importable, pickled_function
from jaxhpo.tasks.calls import caller, described

_POLL = 0.5  # seconds between two looks for dead workers; see ``Worker.exit_code``
_SPARE_WORKERS = 3  # the pool gives up after losing this many more workers than it has, in a row, before they began a job


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


class _Base:
    def __init__(self, fn: Callable[..., Any], retries: int) -> None:
        if not callable(fn):
            raise TypeError(f"the objective is {described(fn)}; a function of the hyperparameters is due")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries = {retries!r}: must be a whole number, at least 0")
        self._retries = retries
        self._queue: deque[PendingJob] = deque()
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
        self._call = caller(fn)

    def submit(self, job: Job) -> None:
        self._check_open()
        self._queue.append(PendingJob(job.number, job))

    def next(self) -> Outcome:
        self._check_open()
        if not self._queue:
            raise RuntimeError("no job is pending")
        job, outcome = self._queue[0], None
        while outcome is None:
            arguments = _copied(job.given.hparams), job.given.seed
            outcome = job.after(call_once(self._call, lambda given=arguments: given), self._retries)
        self._queue.popleft()  # not before: after Ctrl-C the job is still pending
        return outcome


def _copied(tree: Any) -> Any:
    """The same values in containers of its own: what a function does to them reaches no other attempt, as in workers."""
    if type(tree) is dict:
        return {name: _copied(branch) for name, branch in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map(_copied, tree))
    return tree


class _Processes(_Base):
    def __init__(self, fn: Callable[..., Any], processes: int, timeout: float | None, retries: int) -> None:
        super().__init__(fn, retries)
        self._name = name_of(fn)
        self._fn = pickled_function(fn, self._name)
        self._size = processes
        self._timeout = timeout
        self._workers: list[Worker] = []
        self._finished: deque[Outcome] = deque()
        self._started = 0
        self._lost = 0  # workers in a row that were lost before they began a job
        self._any_ready = False
        # Neither a forgotten executor nor an exit without close may leave workers, or wait for them: multiprocessing
        # joins its children in an exit handler registered before this one, so it runs after it.
        self._ending = weakref.finalize(self, end_workers, self._workers, os.getpid())
        self._ending.atexit = False
        atexit.register(self._ending)

    def submit(self, job: Job) -> None:
        self._check_open()
        try:
            given = bytes(ForkingPickler.dumps((job.hparams, job.seed)))
        except Exception as error:
            raise JaxhpoError(
                f"trial {job.number}: its hyperparameters cannot be sent to a worker process ({one_line(error)}); "
                "options must be importable at module level, or use processes=0"
            ) from error
        self._queue.append(PendingJob(job.number, given))
        self._collect(0.0)
        self._dispatch()

    def next(self) -> Outcome:
        self._check_open()
        if not (self._finished or self._queue or any(worker.job for worker in self._workers)):
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
            if self._queue and not worker.starting and worker.job is None:
                worker.job, worker.begun, worker.since = self._queue.popleft(), False, time.monotonic()
                try:
                    worker.pipe.send_bytes(worker.job.given)
                except OSError:
                    self._bury(worker)
        free = sum(worker.job is None for worker in self._workers)
        while len(self._workers) < self._size and free < len(self._queue):
            self._workers.append(Worker(self._started))
            self._started += 1
            free += 1

    def _collect(self, patience: float) -> None:
        """Waits up to ``patience`` seconds, or to the next deadline, for a worker; then sees to all of them."""
        now = time.monotonic()
        if self._timeout is not None:
            busy = [worker.since + self._timeout - now for worker in self._workers if worker.job is not None]
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
            elif self._timeout is not None and worker.job is not None and time.monotonic() > worker.since + self._timeout:
                job = self._remove(worker)
                assert job is not None
                self._settle(job, Attempt(None, self._timed_out(), time.monotonic() - worker.since))

    def _receive(self, worker: Worker, message: str | Attempt) -> None:
        if isinstance(message, Attempt):
            job, worker.job = worker.job, None
            self._lost = 0
            # The deadline may have passed unseen, between two calls of ``next``: the same limit holds for every attempt.
            if job is not None and self._timeout is not None and message.seconds > self._timeout:
                message = Attempt(None, self._timed_out(), message.seconds)
            if job is not None:
                self._settle(job, message)
        elif message == "started":
            worker.pipe.send_bytes(self._fn)  # only now: a worker that hangs in its start does not block the parent
        elif message == "ready":
            worker.starting = False
            self._any_ready = True
        elif message == "begun":
            worker.begun = True
        else:
            raise JaxhpoError(not_importable(self._name, message))

    def _settle(self, job: PendingJob, attempt: Attempt) -> None:
        outcome = job.after(attempt, self._retries)
        if outcome is None:
            self._queue.appendleft(job)
        else:
            self._finished.append(outcome)

    def _timed_out(self) -> str:
        return f"timed out after {self._timeout:g} s"

    def _remove(self, worker: Worker) -> PendingJob | None:
        """Takes a worker out of the pool and ends it; its job is returned."""
        job = worker.job
        self._workers.remove(worker)
        end_workers([worker], os.getpid())
        return job

    def _bury(self, worker: Worker) -> None:
        """A worker has died: in its start, while idle (not the fault of the job on its way to it), or by what it was doing."""
        seconds, code = time.monotonic() - worker.since, worker.exit_code_soon()
        job = self._remove(worker)
        if job is not None and worker.begun:
            self._settle(job, Attempt(None, f"the worker process {death(code)} during the trial", seconds))
            return
        if job is not None:
            self._queue.appendleft(job)
        if job is not None or worker.starting:
            self._lost += 1
            if self._lost >= (self._size + _SPARE_WORKERS if self._any_ready else 1):
                raise JaxhpoError(
                    f"{self._name}: a worker process {death(code)} before it could take a trial; its own message is above. "
                    'If the objective is in the script that was run, start the study under `if __name__ == "__main__":`'
                )
