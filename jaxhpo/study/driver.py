"""The one driver: move a study on chunk by chunk, keep its record, and go on where one was left.

engine.advance --rows--> table --one transaction--> record
     ^                                  |
     '------------- carry --snapshot----'
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxhpo.core import Optimizer, problems_of
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import gauge
from jaxhpo.hypergradients.estimate import is_estimator
from jaxhpo.space import Space, as_space
from jaxhpo.study import record as records
from jaxhpo.study.engines import CompiledEngine, Engine, HostEngine, host_trials, is_over_jit
from jaxhpo.study.identity import described, identity_of
from jaxhpo.study.keeper import Keeper
from jaxhpo.study.limits import Limits, Seeding, check_seeding, number_between
from jaxhpo.study.loop import Carry
from jaxhpo.study.platform import environment
from jaxhpo.study.problem import Plan, Problem, make_plan, make_problem, with_gradient
from jaxhpo.study.record import Record
from jaxhpo.study.result import Result, Trial, TrialTable
from jaxhpo.study.room import rounds_that_fit, with_room
from jaxhpo.study.rows import earlier_rows, rows_of
from jaxhpo.study.static_groups import StaticGroups
from jaxhpo.tasks import HostFunction, Training

_CHUNK_SECONDS = 1.0  # how long a chunk should take: the rhythm of progress and of commits


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that defines a study.

    Attributes:
        objective: a pure loss ``(key, hparams) -> scalar or dict``, a Training, or a HostFunction.
        num_trials: trials to end; lanes that would begin one more stay idle. None for no limit, where another is given.
        seed: an integer, or a JAX key.
        metric: which metric is the loss; may be None if there is one, or one is called ``loss``.
        direction: ``minimize`` or ``maximize``.
        shard_width: W, lanes compiled together, on which the bits of a study depend; by default lanes / devices, on
            a CPU at most 8 for trainings.
        devices: how many local devices to use; by default all.
        max_seconds: begin no further chunk after this much wall-clock, compilation and earlier runs included; a study
            has at least one.
        max_steps: begin no further round after this many training steps, over all lanes and seeds; with static choices,
            no further batch.
        target: stop once a whole training, on all its seeds, has a metric this good.
        seeds: keys that every configuration is trained on, the same for all, as lanes side by side; its loss is the mean.
        seed_quantile: the quantile of the seeds that is the loss instead of their mean.
        race: level of a paired test that drops a configuration before all its seeds are trained, such as 0.05.
        config: what the study was made from, JSON-able, for the record.
    """

    objective: Any
    space: Space
    optimizer: Optimizer
    num_trials: int | None = None
    seed: Any = 0
    name: str = "study"
    metric: str | None = None
    direction: str = "minimize"
    shard_width: int | None = None
    devices: int | None = None
    max_seconds: float | None = None
    max_steps: int | None = None
    target: float | None = None
    seeds: int = 1
    seed_quantile: float | None = None
    race: float | None = None
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "space", as_space(self.space))

    @property
    def key(self) -> jax.Array:
        return jax.random.key(self.seed) if isinstance(self.seed, (int, np.integer)) else self.seed

    @property
    def maximize(self) -> bool:
        return self.direction == "maximize"

    @property
    def limits(self) -> Limits:
        return Limits(self.num_trials, self.max_steps, self.target)

    @property
    def seeding(self) -> Seeding:
        return Seeding(self.seeds, self.seed_quantile, self.race)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a study is. ``best`` is the incumbent's metric as stated, None while there is none.

    ``num_trials`` is None where their number is not limited.
    """

    trials: int
    num_trials: int | None
    best: float | None
    diverged: int
    elapsed: float
    trials_per_second: float
    seconds_left: float | None
    phase: str

    def __str__(self) -> str:
        """One line, for ``progress=print``."""
        of = "" if self.num_trials is None else f" of {self.num_trials}"
        parts = [] if self.best is None else [f"best {self.best:.5g}"]
        parts += [f"{self.diverged} diverged"] if self.diverged else []
        parts += [] if self.seconds_left is None or self.phase == "finished" else [f"{self.seconds_left:.0f} s left"]
        return ", ".join([f"{self.phase}: {self.trials}{of} trials", *parts, f"after {self.elapsed:.1f} s"])


def _check(study: Study) -> None:
    if isinstance(study.optimizer, type) or not isinstance(study.optimizer, Optimizer):
        given = study.optimizer.__name__ if isinstance(study.optimizer, type) else repr(study.optimizer)
        raise JaxhpoError(f"optimizer: an instance such as PSO(num_lanes=32) is due, not {given}")
    problems = [f"optimizer.{line}" for line in problems_of(study.optimizer)]
    if study.direction not in ("minimize", "maximize"):
        problems.append(f"direction = {study.direction!r}: must be 'minimize' or 'maximize'")
    if study.max_seconds is not None and not number_between(study.max_seconds, 1e-9, math.inf):
        problems.append(f"max_seconds = {study.max_seconds!r}: must be positive")
    if study.num_trials is None and study.max_seconds is None and study.max_steps is None and study.target is None:
        problems.append("num_trials: say how many trials, or give another limit: max_steps, max_seconds or a target")
    on_host = isinstance(study.objective, HostFunction)
    if on_host and study.max_steps is not None:
        problems.append("max_steps: a HostFunction does not tell its steps of training; limit num_trials or max_seconds")
    if on_host:
        problems += check_seeding(study.seeding, study.optimizer, False)
        if not problems and study.seeds != 1:
            problems.append("seeds: a HostFunction is called once a trial; average over seeds within it")
    if problems:
        raise JaxhpoError("; ".join(problems))


def _host_problem(study: Study) -> Problem:
    """A problem whose trials run outside: only the optimizer and the space count."""
    metric = study.metric or "loss"
    with_gradient(study.objective, study.optimizer, metric)
    problem = make_problem(
        lambda key, hparams: {metric: 0.0},
        study.space,
        study.optimizer,
        key=study.key,
        limits=study.limits,
        metric=metric,
        maximize=study.maximize,
    )
    # One task for all host problems, so that they share the compiled optimizer.
    return dataclasses.replace(problem, task=None)


def problem_of(study: Study) -> Problem:
    """The compiled part of a study."""
    if isinstance(study.objective, HostFunction):
        return _host_problem(study)
    return make_problem(
        study.objective,
        study.space,
        study.optimizer,
        key=study.key,
        limits=study.limits,
        metric=study.metric,
        maximize=study.maximize,
        seeding=study.seeding,
    )


def trains(study: Study) -> bool:
    """Whether a trial is a training of steps, and not one call of a loss."""
    return isinstance(study.objective, Training) or is_estimator(study.objective)


def plan_of(study: Study, folder: Path | None = None) -> Plan:
    """The lanes of a study on this machine's devices; shards as wide as recorded in ``folder``."""
    width = study.shard_width
    if folder is not None and width is None:
        width = records.recorded_facts(folder)["identity"]["shard_width"]
    groups = math.prod(len(slot.options) for slot in study.space.static_slots)
    at_once = study.seeding.at_once
    return make_plan(study.optimizer.num_lanes, study.space.num_dims, width, study.devices, trains(study), at_once, groups)


def make_engine(study: Study, problem: Problem, plan: Plan) -> Engine:
    """The engine that fits the objective and the space."""
    if isinstance(study.objective, HostFunction):
        return HostEngine(problem, plan, host_trials(study.objective, study.space, problem.metric))
    if study.space.static_slots:
        return HostEngine(problem, plan, StaticGroups(problem, plan))
    return CompiledEngine(problem, plan)


def reopen(study: Study, problem: Problem, folder: Path) -> Record:
    """The record of this very study, locked for writing."""
    facts = records.recorded_facts(folder)
    width = facts["identity"]["shard_width"] if study.shard_width is None else study.shard_width
    record = records.reopen_record(folder, identity_of(study, problem, width))
    now = environment()
    changes = [f"{name} {facts['env'].get(name)} then, {now[name]} now" for name in now if facts["env"].get(name) != now[name]]
    if changes:
        warnings.warn(f"{folder}: trials may differ in their last bits: {'; '.join(changes)}", stacklevel=2)
    return record


def _create(study: Study, problem: Problem, plan: Plan, folder: Path) -> Record:
    told = identity_of(study, problem, plan.width)
    facts = {
        "name": study.name,
        "config": study.config or described(study),
        "space": study.space.describe(),
        "env": {**environment(), "devices": plan.num_devices, "shard_width": plan.width},
        "metric": problem.metric,
        "direction": study.direction,
        "num_trials": study.num_trials,
        "identity": json.loads(records.canonical(told)),
    }
    made = records.create_record(folder, facts)
    try:
        made.write_beside("config.json", facts["config"])
        made.write_beside("environment.json", facts["env"])
    except BaseException:
        made.__exit__()
        raise
    return made


@contextlib.contextmanager
def _gentle_interrupt() -> Generator[Callable[[], bool]]:
    """The first Ctrl-C asks to stop after the chunk under way; a second one stops at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def run_study(
    study: Study,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """Run a study to its last trial, or go on with one.

    Args:
        folder: where to keep the record; None keeps none.
        resume: go on with the record in ``folder``.
        progress: called after every chunk.

    Raises:
        JaxhpoError: for settings that make no sense, a record that cannot be written or belongs to another study.
    """
    _check(study)
    folder = None if folder is None else Path(folder)
    if resume and folder is None:
        raise JaxhpoError("resume: a folder with a record is due")
    problem, plan = problem_of(study), plan_of(study, folder if resume else None)
    with contextlib.ExitStack() as stack:
        # Mistakes that show only now must not leave a record behind that is in the way of the next try.
        engine = make_engine(study, problem, plan)
        stack.callback(engine.close)
        jax.eval_shape(engine.first)
        record = keeper = None
        if folder is not None:
            opened = reopen(study, problem, folder) if resume else _create(study, problem, plan, folder)
            record = stack.enter_context(opened)
            keeper = Keeper(record, study.optimizer)
            stack.callback(keeper.close)
        stopping = stack.enter_context(_gentle_interrupt())
        try:
            return _drive(study, problem, engine, keeper, record, progress or (lambda progress: None), stopping)
        except BaseException as error:
            if record is not None:
                with contextlib.suppress(JaxhpoError):
                    if isinstance(error, JaxhpoError) and not resume and not record.elapsed() and not record.snapshots():
                        record.discard()  # nothing was computed: leave nothing in the way of the next try
                    else:
                        record.set_status("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise


def _with_room(optimizer: Optimizer, engine: Engine, carry: Carry) -> Carry:
    """The carry with room for what one more round may bring; itself where there is."""
    larger = with_room(optimizer, carry.optimizer, int(carry.finished) + optimizer.num_lanes)
    return carry if larger is carry.optimizer else engine.place(dataclasses.replace(carry, optimizer=larger))


def _drive(
    study: Study,
    problem: Problem,
    engine: Engine,
    keeper: Keeper | None,
    record: Record | None,
    progress: Callable[[Progress], None],
    stopping: Callable[[], bool],
) -> Result:
    table, began = TrialTable(), time.perf_counter()
    before = spent = 0.0
    if record is not None:
        before = record.elapsed()
        spent = max(before, sum(record.notes().get("timing", {}).values()))  # with compilation, where that is known
        table.add(earlier_rows(record, study.space))
        record.set_status("running")
    sign = -1.0 if study.maximize else 1.0

    def tell(carry: Carry | None, phase: str) -> None:
        finished = 0 if carry is None else int(carry.finished)
        best = None if carry is None or int(carry.best_number) < 0 else sign * float(carry.best_loss)
        running = time.perf_counter() - started
        rate = (finished - at_start) / running if running > 0 else 0.0
        # Before every lane has ended a trial, the few that have are those that diverged early: no base for a forecast.
        left = None
        if study.num_trials is not None and finished - at_start >= study.optimizer.num_lanes:
            left = (study.num_trials - finished) / rate
        # The first rounds of a run tell little of the others.
        if study.max_steps is not None and carry is not None and int(carry.round) >= round_at_start + 8:
            to_go = (int(problem.max_rounds) - int(carry.busy)) / (int(carry.busy) - busy_at_start) * running
            left = to_go if left is None else min(left, to_go)
        if study.max_seconds is not None:
            to_go = max(study.max_seconds - (spent + time.perf_counter() - began), 0.0)
            left = to_go if left is None else min(left, to_go)
        diverged = 0 if carry is None else int(carry.diverged)
        progress(Progress(finished, study.num_trials, best, diverged, before + running, rate, left, phase))

    busy_at_start = round_at_start = 0
    started, at_start = began, 0
    tell(None, "compiling")
    carry = engine.place(engine.first()) if keeper is None else keeper.restore(engine)
    carry = _with_room(study.optimizer, engine, carry)
    if isinstance(engine, CompiledEngine):
        carry, _, _ = engine.advance(carry, 0)  # compiles, runs nothing
    jax.block_until_ready(carry)
    compiled = time.perf_counter()
    started, at_start, busy_at_start = compiled, int(carry.finished), int(carry.busy)
    round_at_start = int(carry.round)
    rounds, status = 1, "finished"
    while not is_over_jit(problem, carry):
        chunk_began = time.perf_counter()
        if stopping():
            status = "interrupted"
            break
        begun = int(carry.round) > 0
        if study.max_seconds is not None and begun and spent + chunk_began - began >= study.max_seconds:
            status = "stopped"
            break
        carry = _with_room(study.optimizer, engine, carry)
        fit = rounds_that_fit(study.optimizer, carry.optimizer, int(carry.finished))
        rounds = rounds if fit is None else min(rounds, fit)
        carry, trials, told = engine.advance(carry, rounds)
        chunk_ended = time.perf_counter()
        rows = rows_of(study.space, trials, told, (before + chunk_began - compiled, before + chunk_ended - compiled))
        table.add(rows)
        if keeper is not None:
            keeper.keep(carry, rows, last=bool(carry.stuck) or int(carry.finished) >= int(problem.num_trials))
        tell(carry, "running")
        fitting = rounds * _CHUNK_SECONDS / max(chunk_ended - chunk_began, 1e-9)
        rounds = int(np.clip(min(fitting, 8 * rounds), 1, engine.max_rounds))
    run_seconds = time.perf_counter() - compiled
    programs = dict(engine.compile_seconds)
    lanes = _lanes(study, problem, carry)
    if record is not None:
        timing = record.notes().get("timing", {})
        total = {
            "compile_seconds": timing.get("compile_seconds", 0.0) + compiled - began,
            "run_seconds": timing.get("run_seconds", 0.0) + run_seconds,
        }
        earlier = record.notes().get("programs", {})
        record.commit((), None, {"timing": total, "lanes": lanes, "programs": {**earlier, **programs}})
        record.set_status(status)
    tell(carry, "finished")
    for line in gauge.findings((row["loss"], row["metrics"]) for row in table.rows()):
        warnings.warn(line, stacklevel=2)
    return Result(
        trials=table.columns(),
        status=status,
        folder=None if record is None else record.folder,
        compile_seconds=compiled - began,
        run_seconds=run_seconds,
        facts=table.facts(),
        lanes=lanes,
        programs=programs,
        winner=_winner(study, table),
        first_error=table.first_error(),
    )


def _lanes(study: Study, problem: Problem, carry: Carry) -> dict[str, Any]:
    """What the lanes did: how many there are, the steps they trained on trials that had not ended, and the share of those."""
    each = problem.round_steps * problem.seeds_at_once
    trained, rounds = int(carry.busy), int(carry.round) * study.optimizer.num_lanes
    in_step = not study.space.static_slots and not isinstance(study.objective, HostFunction)
    share = trained / rounds if rounds and in_step else None
    ended = (
        "num_trials" if int(carry.finished) >= int(problem.num_trials) or bool(carry.stuck)
        else "target" if bool(carry.best_whole) and float(carry.best_loss) <= float(problem.target)
        else "max_steps" if trained >= int(problem.max_rounds)
        else None
    )  # fmt: skip
    return {"num_lanes": study.optimizer.num_lanes, "steps": trained * each, "share": share, "ended_by": ended}


def _winner(study: Study, table: TrialTable) -> Trial | None:
    row = table.best()
    if row is None:
        return None
    hparams = study.space.assemble([row["hparams"][name] for name in study.space.names])
    loss = float(row["loss"])
    value = -loss if study.maximize else loss
    cube = np.frombuffer(row["cube"], np.float32)
    return Trial(row["number"], hparams, loss, value, row["metrics"], row["steps"], cube)
