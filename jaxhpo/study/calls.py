"""Jobs, one attempt at the function, and what became of it.

An exception, a timeout, a dead worker and a return value that is not a number are the same to the caller: a failed
attempt, with its reason as text. No JAX is imported here, so that a worker starts quickly.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxhpo.tasks.calls import metrics_of

_LONGEST_ERROR = 20_000  # characters of an error that are kept
_OWN = (__name__, metrics_of.__module__)  # modules whose frames tell the user nothing


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


@dataclass(frozen=True)
class Attempt:
    """What became of one call; the attributes are those of :class:`Outcome`."""

    metrics: dict[str, float] | None
    error: str | None
    seconds: float


@dataclass
class PendingJob:
    """A job on its way through its attempts; ``given`` is what the call is made from."""

    number: int
    given: Any
    attempts: int = 0
    seconds: float = 0.0

    def after(self, attempt: Attempt, retries: int) -> Outcome | None:
        """The outcome, or None if the job is to be tried again."""
        self.attempts += 1
        self.seconds += attempt.seconds
        if attempt.error is not None and self.attempts <= retries:
            return None
        return Outcome(self.number, attempt.metrics, attempt.error, self.seconds, self.attempts)


def call_once(call: Callable[[Any, int], Any], arguments: Callable[[], tuple[Any, int]]) -> Attempt:
    """Calls once, with what ``arguments()`` gives. Whatever either raises is a failure, but for the user's Ctrl-C."""
    start = time.perf_counter()
    try:
        value = call(*arguments())
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit in the function too
        seconds = time.perf_counter() - start
        return Attempt(None, _traceback(error), seconds)
    seconds = time.perf_counter() - start
    try:
        return Attempt(metrics_of(value), None, seconds)
    except TypeError as error:
        return Attempt(None, _shortened(str(error)), seconds)


def _traceback(error: BaseException) -> str:
    """The traceback as text, from the first frame that is not our own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in _OWN:
        trace = trace.tb_next
    return _shortened("".join(traceback.format_exception(type(error), error, trace)))


def one_line(error: BaseException) -> str:
    """The type and message of an exception, without its traceback."""
    return _shortened("".join(traceback.format_exception_only(error))).replace("\n", " ")


def _shortened(text: str) -> str:
    half = _LONGEST_ERROR // 2
    return text.strip() if len(text) <= _LONGEST_ERROR else f"{text[:half].strip()}\n[...]\n{text[-half:].strip()}"
