"""What is tuned: a task trained inside the compiled study, or a function called on the host."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, Partial, keystr

from jaxhpo.core import Array
from jaxhpo.tasks.calls import caller, metrics_of


def callable_pytree(name: str, function: Any) -> Any:
    """A function as a pytree; arrays bound by ``functools.partial`` become its leaves."""
    if not callable(function):
        raise TypeError(f"{name} must be a function, not {function!r}")
    if type(function) is functools.partial:
        bound = jax.tree.leaves((function.args, function.keywords))
        if bound and all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in bound):
            return Partial(function.func, *function.args, **function.keywords)
    if jax.tree_util.treedef_is_leaf(jax.tree.structure(function)):
        return Partial(function)
    return function


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False)
class Task:
    """What training is, as pure functions written for one lane; the driver vmaps them.

    Plain functions are enough. Data belong into ``jax.tree_util.Partial(function, *arrays)``, whose arrays come
    first in the call: they are leaves of the task, hence arguments of the compiled program, stored once and
    shared by all lanes. Arrays a function merely closes over would be compiled into the program as constants.
    Two tasks of the same functions and of data of the same shapes share one compiled program.

    Attributes:
        init: ``(key, hparams) -> train_state``, a pytree of arrays.
        step: ``(key, hparams, train_state) -> train_state`` of the same shapes and dtypes; a fresh key each step.
        evaluate: ``(hparams, train_state) -> metrics``, a dict of scalars, on the validation data.
        test: the same on the test data, which no search ever sees; None where there are none.

    Raises:
        TypeError: if a field is not callable.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]
    evaluate: Callable[..., Any]
    test: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            function = getattr(self, field.name)
            if field.name != "test" or function is not None:
                object.__setattr__(self, field.name, callable_pytree(field.name, function))

    def __repr__(self) -> str:
        held = [leaf for leaf in jax.tree.leaves(self) if hasattr(leaf, "shape")]
        return f"Task({'with' if self.test is not None else 'without'} a test split, {len(held)} arrays)"

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], None]:
        return tuple((GetAttrKey(f.name), getattr(self, f.name)) for f in dataclasses.fields(self)), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[Any, ...]) -> Task:
        # Past the constructor: while JAX works on a tree, its children may be anything.
        task = object.__new__(cls)
        for field, child in zip(dataclasses.fields(cls), children, strict=True):
            object.__setattr__(task, field.name, child)
        return task


def positive(name: str, value: Any) -> int:
    """A size that a user gave, as an ``int`` of at least 1; else a ValueError that names it."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}: must be a whole number of at least 1") from None
    if isinstance(value, (bool, np.bool_)) or number < 1:
        raise ValueError(f"{name} = {value!r}: must be a whole number of at least 1")
    return number


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Training:
    """A task trained for ``num_steps`` steps.

    Attributes:
        task: what is trained; the only part that is traced.
        num_steps: steps of a whole training.
        steps_per_round: steps between two looks at the lanes, after which diverged or stopped ones are refilled;
            a divisor of ``num_steps``. None lets :attr:`round_steps` choose.

    Raises:
        ValueError: if a number of steps is not a positive whole number, or ``steps_per_round`` does not divide
            ``num_steps``.
    """

    task: Task
    num_steps: int
    steps_per_round: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.task, Task):
            raise TypeError(f"task must be a Task, not a {type(self.task).__name__}")
        object.__setattr__(self, "num_steps", positive("num_steps", self.num_steps))
        if self.steps_per_round is None:
            return
        object.__setattr__(self, "steps_per_round", positive("steps_per_round", self.steps_per_round))
        if self.num_steps % self.steps_per_round:
            raise ValueError(f"steps_per_round = {self.steps_per_round}: must divide num_steps = {self.num_steps}")

    @property
    def round_steps(self) -> int:
        """Steps in a round: as stated, else the divisor of ``num_steps`` nearest to a tenth of it.

        Ten rounds to a training refill diverged lanes early at little cost. Where no divisor makes between 5 and
        20 rounds, the whole training is one round.
        """
        if self.steps_per_round is not None:
            return self.steps_per_round
        n = self.num_steps
        divisors = [d for d in range(-(-n // 20), n // 5 + 1) if n % d == 0]
        return min(divisors, key=lambda d: (abs(10 * d - n), -d), default=n)

    def tree_flatten_with_keys(self) -> tuple[tuple[Any, ...], tuple[int, int | None]]:
        return ((GetAttrKey("task"), self.task),), (self.num_steps, self.steps_per_round)

    @classmethod
    def tree_unflatten(cls, aux: tuple[int, int | None], children: tuple[Any, ...]) -> Training:
        training = object.__new__(cls)
        for name, value in zip(("task", "num_steps", "steps_per_round"), (*children, *aux), strict=True):
            object.__setattr__(training, name, value)
        return training


def init_and_step_keys(key: Array) -> tuple[Array, Array]:
    """The key of a training as the key of ``init`` and the key below which every step has its own, by ``fold_in``."""
    return jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)


def has_no_nan(tree: Any) -> jax.Array:
    """Whether every number of a tree is one, ``bool[]``."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact)]
    return jnp.stack([~jnp.isnan(leaf).any() for leaf in leaves]).all() if leaves else jnp.array(True)


def check_task(task: Task, hparams: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Check, computing nothing, that the functions of a task fit together; returns its metrics' shapes.

    ``hparams`` may be arrays or ``jax.ShapeDtypeStruct``. Run it under the precision of the study: some layers
    keep statistics in float32 even where float64 is enabled.

    Raises:
        TypeError: if ``step`` changes the structure, shape or dtype of the training state (the leaf is named), or
            ``evaluate`` or ``test`` do not return a dict of scalars.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    before = jax.eval_shape(lambda task, *args: task.init(*args), task, key, hparams)
    after = jax.eval_shape(lambda task, *args: task.step(*args), task, key, hparams, before)
    if jax.tree.structure(before) != jax.tree.structure(after):
        built = jax.tree.structure(before), jax.tree.structure(after)
        raise TypeError(f"step must return a state built as that of init: {built[0]}, not {built[1]}")
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise TypeError(
                f"step changes the leaf {keystr(path) or 'state'} of the training state from "
                f"{old.dtype}{list(old.shape)}, as made by init, to {new.dtype}{list(new.shape)}"
            )
    metrics = {}
    for name in ("evaluate", "test"):
        function = getattr(task, name)
        if function is None:
            continue
        result = jax.eval_shape(lambda function, *args: function(*args), function, hparams, before)
        if not isinstance(result, dict) or any(getattr(value, "shape", None) != () for value in result.values()):
            raise TypeError(f"{name} must return a dict of scalars, not {result}")
        metrics = metrics or result
    return metrics


@dataclasses.dataclass(frozen=True)
class HostFunction:
    """A loss that JAX cannot trace, called on the host with plain Python hyperparameters.

    A call that raises, runs out of time or returns NaN is a failed trial. A function with a parameter ``seed`` is
    given a whole number below ``2**31`` that depends on the trial alone.

    Attributes:
        fn: ``(hparams) -> float | dict[str, float]``, or ``(hparams, seed) -> ...``.
        timeout: seconds that one call may take; None for no limit.
        retries: how often a call that raised is repeated.
        processes: worker processes; 0 calls ``fn`` within this process.
        asynchronous: refill a lane as soon as its call ends. By default all lanes of a round are waited for, so that
            the trials of a study do not depend on how long each call takes.

    Raises:
        TypeError, ValueError: for a field of the wrong kind.
    """

    fn: Callable[..., Any]
    _: dataclasses.KW_ONLY
    timeout: float | None = None
    retries: int = 0
    processes: int = 0
    asynchronous: bool = False

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(f"fn must be a function, not {self.fn!r}")
        if self.timeout is not None and not (isinstance(self.timeout, (int, float)) and 0 < self.timeout < math.inf):
            raise ValueError(f"timeout = {self.timeout!r}: must be a positive number of seconds, or None")
        for name in ("retries", "processes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
                raise ValueError(f"{name} = {value!r}: must be a whole number of at least 0")
            object.__setattr__(self, name, int(value))

    def __call__(self, hparams: Any, seed: int) -> dict[str, float]:
        """Call ``fn`` here and now, with the seed if it takes one, as a trial does; its result as floats by name.

        Raises:
            TypeError: if ``fn`` returns anything but numbers; and whatever ``fn`` raises.
        """
        return metrics_of(caller(self.fn)(hparams, seed))
