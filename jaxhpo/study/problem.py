"""What a compiled study is made of: one pytree that holds all numbers, and the static plan of its lanes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxhpo.core import Array, Kind, Optimizer, UnfitDimensions, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import ValueAndGrad
from jaxhpo.hypergradients.estimate import Assemble, Floats, ZeroDerivative, check_settings, is_estimator
from jaxhpo.space import Space
from jaxhpo.study.limits import MOST_TRIALS, Limits, Seeding, check_limits, check_seeding, race_bounds
from jaxhpo.tasks import HostFunction, Task, Training, check_task
from jaxhpo.tasks.plain_loss import as_training, scalar_metrics
from jaxhpo.tasks.task import callable_pytree

# The streams of random numbers below the study's key.
ROUND_STREAM, TRIAL_STREAM, CONFIRM_STREAM, INIT_STREAM, SEED_STREAM = range(5)


@pytree_dataclass
class Problem:
    """A study as one pytree: changing any number in it recompiles nothing.

    Attributes:
        space, optimizer: as the user gave them.
        task: the user's task, or the estimator of its hypergradient; data sit in its leaves.
        key: the study's key; all others are folded out of it.
        num_trials: ``i32[]``, trials to finish.
        sign: ``f32[]``, 1 to minimise the metric, -1 to maximise it.
        max_rounds: ``i32[]``, rounds that lanes may spend on trials, over all lanes, before the study is over.
        target: ``f32[]``, the loss at which it is.
        race_bounds: ``f32[k + 1]``, t statistics that drop a trial, by seeds answered; see :mod:`jaxhpo.study.seeds`.
        seed_quantile: ``f32[]``, which quantile of its seeds is a trial's loss; None for the mean.
        num_steps: steps of a whole training (static).
        round_steps: steps between two looks of the optimizer, a divisor of ``num_steps`` (static).
        metric: the metric that is the loss (static).
        metric_names: all metrics (static).
        watch_state: whether a NaN in the training state means that the trial diverged (static).
        num_seeds: k, seeds of a trial (static).
        seeds_at_once: S, those of them that train side by side, a divisor (static).
        static: an index for every static choice of the space, None where there are none (static).
        has_gradient: the task is an estimator, whose trials are whole trainings with a gradient (static).
    """

    space: Space
    optimizer: Optimizer
    task: Any
    key: jax.Array
    num_trials: Array
    sign: Array
    max_rounds: Array
    target: Array
    race_bounds: Array
    seed_quantile: Array | None
    num_steps: int = setting(static=True)
    round_steps: int = setting(static=True)
    metric: str = setting(static=True)
    metric_names: tuple[str, ...] = setting(static=True)
    watch_state: bool = setting(static=True)
    num_seeds: int = setting(1, static=True)
    seeds_at_once: int = setting(1, static=True)
    static: tuple[int, ...] | None = setting(None, static=True)
    has_gradient: bool = setting(False, static=True)

    def hparams(self, arrays: Sequence[Any]) -> Any:
        """What the task sees of one decoded point."""
        return self.space.assemble(arrays, self.static)

    def floats(self, arrays: Sequence[Any]) -> tuple[Floats, Assemble]:
        """What the estimator differentiates by at one decoded point, and how the task's hyperparameters are made of it."""
        return floats_of(self.space, arrays, self.static, in_cube(self.task))

    def cube_gradient(self, cube: Array, grad: Floats) -> Array:
        """A gradient of the loss by the cube, ``f32[B, D]``, from one of the metric by the floats, ``[B, *shape]`` each."""
        if in_cube(self.task):
            rows = cube.shape[0]
            columns = [jnp.asarray(grad.get(s.name, jnp.zeros((rows, s.size))), jnp.float32) for s in self.space.slots]
            pulled = jnp.concatenate([x.reshape(x.shape[0], -1) for x in columns], axis=1)
        else:
            names = [slot.name for slot in self.space.slots]
            by_name = lambda cube: {n: x for n, x in zip(names, self.space.decode_arrays(cube), strict=True) if n in grad}
            decoded, pull = jax.vjp(by_name, cube)
            (pulled,) = pull({name: grad[name].astype(x.dtype) for name, x in decoded.items()})
        return pulled * self.sign


def in_cube(estimator: Any) -> bool:
    """Whether an estimator moves the point in the cube by finite steps, instead of differentiating by decoded floats."""
    return getattr(estimator, "moves_in_cube", False)


def floats_of(space: Space, arrays: Sequence[Any], static: tuple[int, ...] | None, moves: bool) -> tuple[Floats, Assemble]:
    """The floats of a decoded point by name, or with ``moves`` their moves in the cube, zeros here; and the way back."""
    slots = {slot.name: x for slot, x in zip(space.slots, arrays, strict=True) if slot.run.kind == Kind.FLOAT}
    floats = jax.tree.map(jnp.zeros_like, slots) if moves else slots

    def assemble(new: Floats) -> Any:
        values = space.moved(slots, new) if moves else new
        return space.assemble([values.get(slot.name, x) for slot, x in zip(space.slots, arrays, strict=True)], static)

    return floats, assemble


@dataclasses.dataclass(frozen=True)
class Plan:
    """How lanes lie on devices; static.

    Attributes:
        num_lanes: ``B``, the lanes that the optimizer sees.
        seeds_at_once: ``S``, trainings to a lane.
        width: ``W``, lanes to a shard: the width that is compiled, on which the bits depend.
        mesh: devices along one axis ``lanes``; None to run where the caller runs.
        max_rounds: rounds that fit the output buffers of one chunk.
        lanes_in_turn: a shard begins and scores its lanes one after the other, only those that begin or are due; else all
            of them where one does.
    """

    num_lanes: int
    width: int
    mesh: jax.sharding.Mesh | None
    max_rounds: int = 1
    seeds_at_once: int = 1
    lanes_in_turn: bool = False

    @property
    def num_trainings(self) -> int:
        """``B * S``"""
        return self.num_lanes * self.seeds_at_once

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def shards_per_device(self) -> int:
        return -(-self.num_trainings // (self.width * self.num_devices))

    @property
    def padded_lanes(self) -> int:
        """``P``, a whole number of shards on every device."""
        return self.width * self.num_devices * self.shards_per_device


_MOST_STATICS = 16  # combinations of static choices for which an estimator is asked

CPU_WIDTH = 8  # trainings to a shard on a CPU: as many small networks as its caches hold


def make_plan(
    num_lanes: int,
    num_dims: int,
    width: int | None,
    devices: int | None,
    training: bool = True,
    seeds_at_once: int = 1,
    num_groups: int = 1,
) -> Plan:
    """Lanes over the first ``devices`` local devices (default all) in shards of ``width``.

    The default width is lanes / devices. On a CPU, where a wide batch of trainings runs at the speed of memory, a
    device's lanes are cut further, evenly, into shards of at most ``CPU_WIDTH`` that run in turn. Lanes of ``num_groups``
    static combinations train group by group, in shards of their share of the lanes. On a CPU a shard of trainings
    begins and scores its lanes one after the other, for one lane keeps a core busy.
    """
    lanes, num_lanes = num_lanes, num_lanes * seeds_at_once
    local = jax.local_devices()
    if devices is not None and not 1 <= devices <= len(local):
        raise JaxhpoError(f"devices = {devices}: this machine shows {len(local)} of kind {local[0].platform}")
    if width is not None and width < 1:
        raise JaxhpoError(f"shard_width = {width}: must be at least 1")
    used = min(devices or len(local), num_lanes)
    lanes_in_turn = training and local[0].platform == "cpu"
    if width is None:
        width = -(-num_lanes // (used * num_groups))
        if lanes_in_turn:
            width = -(-width // -(-width // CPU_WIDTH))
    used = min(used, -(-num_lanes // width))
    mesh = jax.make_mesh((used,), ("lanes",), devices=local[:used], axis_types=(jax.sharding.AxisType.Auto,))
    rounds = 2**22 // (num_lanes * (num_dims + 16))
    return Plan(lanes, width, mesh, max(1, min(rounds, 256)), seeds_at_once, lanes_in_turn)


_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


def with_gradient(objective: Any, optimizer: Optimizer, metric: str | None) -> Any:
    """The objective as one that gives the gradients that the optimizer needs.

    Raises:
        JaxhpoError: if it needs them and the objective has none.
    """
    if not getattr(optimizer, "needs_gradient", False) or is_estimator(objective):
        return objective
    if isinstance(objective, type) or not (callable(objective) or isinstance(objective, (Training, HostFunction))):
        return objective  # refused as with any other optimizer
    name = type(optimizer).__name__
    if isinstance(objective, (Training, HostFunction)):
        use = (
            "use another optimizer"
            if isinstance(objective, HostFunction)
            else ("use jaxhpo.hypergradients.Unrolled(task, num_steps), or another estimator, in place of Training")
        )
        raise JaxhpoError(f"{name} needs gradients, which a {type(objective).__name__} does not give: {use}")
    _check_signature(objective)
    return ValueAndGrad(objective, metric or "loss")


def training_of(objective: Any) -> tuple[Training, bool]:
    """Any compiled objective without gradients as a training, and whether its state tells of divergence.

    A plain loss becomes a training of one empty step whose state is the metrics themselves.

    Raises:
        JaxhpoError: for something that is neither a loss nor a training.
    """
    if is_estimator(objective):
        return objective.training, not isinstance(objective, ValueAndGrad)
    if isinstance(objective, Training):
        return objective, True
    if callable(objective) and not isinstance(objective, type):
        _check_signature(objective)
        return as_training(callable_pytree("objective", objective)), False
    raise JaxhpoError(f"the objective is a {type(objective).__name__}: a function (key, hparams) -> loss or a Training is due")


def _check_signature(loss: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # builtins without a signature
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise JaxhpoError(
            f"the loss takes {signature}: (key, hparams) is due; wrap a function of plain Python values in HostFunction"
        ) from error


def _checked_estimator(estimator: Any, space: Space) -> dict[str, Any]:
    """The metrics of an estimator, after its own word on the hyperparameters.

    A derivative that is zero is refused where it is so for every static choice.
    """

    def at(static: tuple[int, ...] | None, estimator: Any, space: Space, key: Array, cube: Array) -> dict[str, Any]:
        floats, assemble = floats_of(space, space.decode_arrays(cube), static, in_cube(estimator))
        if not floats:
            raise JaxhpoError("hypergradients: the space has no Float, and only floats have a derivative")
        if in_cube(estimator) and getattr(estimator, "log", ()):
            raise JaxhpoError("Evolution: log: a study perturbs in the cube, where log has its place already; leave it out")
        try:
            estimator.check(floats, assemble)
        except ZeroDerivative as error:
            zeros.append(error)
        return scalar_metrics(estimator.estimate(key, floats, assemble).metrics)

    key, cube = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((space.num_dims,), np.float32)
    statics: list[Any] = [None]
    if space.static_slots:
        every = itertools.product(*(range(len(slot.options)) for slot in space.static_slots))
        statics = list(itertools.islice(every, _MOST_STATICS))
    metrics: dict[str, Any] = {}
    zeros: list[ZeroDerivative] = []
    for count, static in enumerate(statics, 1):
        metrics = jax.eval_shape(functools.partial(at, static), estimator, space, key, cube)
        if len(zeros) < count:  # none is zero here
            return metrics
    always = sorted(set.intersection(*(set(error.names) for error in zeros)))
    if always:
        raise ZeroDerivative(zeros[0].metric, always, all(error.all_of_them for error in zeros))
    return metrics


def metric_names(task: Any, space: Space) -> list[str]:
    """The metrics that a task, or an estimator, reports, found without computing anything.

    Raises:
        JaxhpoError: if the task asks for a hyperparameter that the space lacks.
        TypeError: if the functions of the task do not fit together.
    """
    static = (0,) * len(space.static_slots) if space.static_slots else None
    decode = lambda space, cube: space.decode(cube, static)
    # The task and the space travel as arguments, as they do in the compiled study: their data may be numpy arrays.
    at_a_point = Task(
        init=Partial(lambda task, space, key, cube: task.init(key, decode(space, cube)), task, space),
        step=Partial(lambda task, space, key, cube, state: task.step(key, decode(space, cube), state), task, space),
        evaluate=Partial(
            lambda task, space, cube, state: scalar_metrics(task.evaluate(decode(space, cube), state)), task, space
        ),
    )
    try:
        if is_estimator(task):
            return list(_checked_estimator(task, space))
        return list(check_task(at_a_point, jax.ShapeDtypeStruct((space.num_dims,), np.float32)))
    except (*_NEEDS_VALUES, TypeError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, TypeError) and not isinstance(error, _NEEDS_VALUES) and "Tracer" not in text:
            raise
        raise JaxhpoError(
            "the objective asks for the value of a hyperparameter while it is traced: use jnp and lax; for a width "
            "jaxhpo.tasks.masked, for a dropout rate jaxhpo.tasks.dropout.TracedDropout, for a choice lax.switch or "
            f"static=True ({text[:200]})"
        ) from error
    except KeyError as error:
        missing = str(error.args[0]) if error.args else ""
        if missing in space.names:
            raise
        raise JaxhpoError(
            f"the objective asks for a hyperparameter {missing!r} that the space lacks; it has {', '.join(space.names)}"
        ) from error


def choose_metric(names: list[str], metric: str | None) -> str:
    """The metric that is the loss: the one asked for, else ``loss``, else the only one there is."""
    if metric is None:
        metric = "loss" if "loss" in names else names[0] if len(names) == 1 else None
    if metric not in names:
        asked = "say which metric is to be optimized" if metric is None else f"there is no metric {metric!r}"
        raise JaxhpoError(f"metric: {asked}; the task reports {', '.join(names)}")
    return metric


def _strong(optimizer: Optimizer) -> Optimizer:
    """Numbers as float32 or int32 arrays: a Python float and an array of the same value share a program."""
    return jax.tree.map(lambda x: np.asarray(x, np.int32 if np.asarray(x).dtype.kind == "i" else np.float32), optimizer)


def make_problem(
    objective: Any,
    space: Space,
    optimizer: Optimizer,
    *,
    key: jax.Array,
    limits: Limits,
    metric: str | None,
    maximize: bool,
    seeding: Seeding | None = None,
) -> Problem:
    """Check and put together what a compiled study needs.

    Raises:
        JaxhpoError: for an unfit objective, metric, limit or number of seeds.
    """
    seeding = seeding or Seeding()
    wrong = check_limits(limits)
    if wrong:
        raise JaxhpoError("; ".join(wrong))
    if isinstance(objective, type):
        raise JaxhpoError(f"the objective is the class {objective.__name__}: an instance of it, or a function, is due")
    objective = with_gradient(objective, optimizer, metric)
    if isinstance(objective, ValueAndGrad):
        objective = dataclasses.replace(objective, loss=callable_pytree("loss", objective.loss))
    has_gradient = is_estimator(objective)
    if has_gradient:
        check_settings(objective)
    training, watch_state = training_of(objective)
    if has_gradient and metric not in (None, objective.metric):
        raise JaxhpoError(
            f"metric = {metric!r}: the estimator differentiates {objective.metric!r}; both must be the same "
            "(a metric without a derivative, such as an accuracy, needs Evolution)"
        )
    wrong = check_seeding(seeding, optimizer, has_gradient)
    if wrong:
        raise JaxhpoError("; ".join(wrong))
    task = objective if has_gradient else training.task
    names = metric_names(task, space)
    # A hypergradient needs the whole training: one round.
    round_steps = training.num_steps if has_gradient else training.round_steps
    optimizer = fitted(optimizer, training.num_steps, round_steps)
    _check_dimensions(optimizer, space)
    sign = -1.0 if maximize else 1.0
    rounds = MOST_TRIALS if limits.max_steps is None else -(-limits.max_steps // (round_steps * seeding.at_once))
    return Problem(
        space=space,
        optimizer=_strong(optimizer),
        task=task,
        key=key,
        num_trials=np.array(MOST_TRIALS if limits.num_trials is None else limits.num_trials, np.int32),
        sign=np.array(sign, np.float32),
        max_rounds=np.array(min(max(rounds, 1), MOST_TRIALS), np.int32),
        target=np.array(-np.inf if limits.target is None else sign * limits.target, np.float32),
        race_bounds=race_bounds(seeding),
        seed_quantile=None if seeding.quantile is None else np.array(seeding.quantile, np.float32),
        num_steps=training.num_steps,
        round_steps=round_steps,
        metric=choose_metric(names, objective.metric if has_gradient else metric),
        metric_names=tuple(names),
        watch_state=watch_state,
        num_seeds=seeding.count,
        seeds_at_once=seeding.at_once,
        has_gradient=has_gradient,
    )


def fitted(optimizer: Optimizer, num_steps: int, round_steps: int) -> Any:
    """The optimizer with the settings that depend on how long a training is."""
    fit = getattr(optimizer, "for_training", None)
    return optimizer if fit is None else fit(num_steps, round_steps)


def _check_dimensions(optimizer: Optimizer, space: Space) -> None:
    """Refuses hyperparameters that the optimizer cannot search, by their names."""
    try:
        jax.eval_shape(lambda: optimizer.init(jax.random.key(0), space.spec))
    except UnfitDimensions as error:
        unfit = [s.name for s in space.slots if any(s.offset <= dim < s.offset + s.size for dim in error.dims)]
        raise JaxhpoError(f"{', '.join(unfit)}: {error.reason}") from None
