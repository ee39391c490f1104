"""Tasks from the functions of a training loop that exists: create a state, train on a batch, evaluate a batch.

A loop is three pure functions over the arrays of its state alone; ``nnx_steps.py`` makes the same of mutable objects.
What holds no arrays (an optimizer's functions, a module) is created anew in every trace, so that hyperparameters in it may
be traced; the arrays drawn on the way are replaced at once, and XLA drops the drawing as dead code.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial, keystr

from jaxhpo.core import pytree_dataclass
from jaxhpo.errors import JaxhpoError
from jaxhpo.tasks.minibatch import Order, first_order, next_batch
from jaxhpo.tasks.supervised import Part
from jaxhpo.tasks.task import Task, positive


class Steps(Protocol):
    """A hashable description of a loop. ``values`` are the arrays that it carries from step to step."""

    def init(self, key: jax.Array, hparams: Any) -> Any:
        """The values at the start."""
        ...

    def train(self, key: jax.Array, hparams: Any, values: Any, batch: Any) -> Any:
        """The values after one batch."""
        ...

    def tally(self, key: jax.Array, hparams: Any, values: Any, batch: Any, before: Any) -> Any:
        """What is known of the metrics after one more batch; ``before`` is None at the first."""
        ...

    def needs_even_batches(self, hparams: Any) -> bool:
        """Whether the batches of an evaluation must be of one size for its metrics to be means over examples."""
        ...

    def metrics(self, hparams: Any, tally: Any, num_examples: int) -> dict[str, jax.Array]:
        """The metrics after the last batch."""
        ...


@pytree_dataclass
class LoopState:
    """The training state of one lane.

    Attributes:
        values: the arrays of the loop's own state, by their names.
        order: where the lane stands in its data; None for full batches.
    """

    values: Any
    order: Order | None


@dataclasses.dataclass(frozen=True)
class Loop:
    """All that is static about a loop as a task; equal loops share compiled programs."""

    steps: Steps
    batch_size: int | None
    eval_batch_size: int | None

    def init(self, key: jax.Array, hparams: Any) -> LoopState:
        values = self.steps.init(jax.random.fold_in(key, 0), hparams)
        return LoopState(values, None if self.batch_size is None else first_order(jax.random.fold_in(key, 1)))

    def step(self, data: Any, key: jax.Array, hparams: Any, state: LoopState) -> LoopState:
        data, order = jax.tree.map(jnp.asarray, data), state.order
        if order is not None and self.batch_size is not None:
            index, order = next_batch(order, num_examples(data), self.batch_size)
            data = jax.tree.map(lambda x: x[index], data)
        return LoopState(self.steps.train(key, hparams, state.values, data), order)

    def evaluate(self, data: Any, hparams: Any, state: LoopState) -> dict[str, jax.Array]:
        data, key = jax.tree.map(jnp.asarray, data), jax.random.key(0)  # the same draws for every trial
        n = num_examples(data)
        size = min(self.eval_batch_size or n, n)
        if n % size and self.steps.needs_even_batches(hparams):
            even = next(each for each in range(size, 0, -1) if n % each == 0)
            raise JaxhpoError(
                f"eval_batch_size = {size}: must divide the {n} examples, for a MultiMetric may count a small batch as much as "
                f"a large one; {even} does"
            )
        full = (n - 1) // size  # batches of that size; what remains, one example to `size`, comes first

        def more(tally: Any, numbered: tuple[jax.Array, Any]) -> tuple[Any, None]:
            number, batch = numbered
            return self.steps.tally(jax.random.fold_in(key, number), hparams, state.values, batch, tally), None

        tail = jax.tree.map(lambda x: x[full * size :], data)
        tally = self.steps.tally(jax.random.fold_in(key, full), hparams, state.values, tail, None)
        if full:
            batches = jax.tree.map(lambda x: x[: full * size].reshape(full, size, *x.shape[1:]), data)
            tally, _ = jax.lax.scan(more, tally, (jnp.arange(full), batches))
        return self.steps.metrics(hparams, tally, n)


def num_examples(data: Any) -> int:
    """The leading size that all arrays of a data set share."""
    return jax.tree.leaves(data)[0].shape[0]


def checked_data(name: str, data: Any) -> Any:
    """A pytree of arrays of the same, positive number of examples. NumPy arrays stay on the host until a study places them."""
    data = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.asarray(x), data)
    arrays = jax.tree_util.tree_leaves_with_path(data)
    size = arrays[0][1].shape[:1] if arrays else ()
    for path, x in arrays:
        if x.shape[:1] != size or size in ((), (0,)):
            due = f"[{size[0]}, ...] as the first" if size not in ((), (0,)) else "[N, ...]"
            raise ValueError(f"{name}{keystr(path)} is an array of shape {list(x.shape)}: one {due} is due")
    if not arrays:
        raise ValueError(f"{name} holds no array: a pytree of arrays [N, ...] is due")
    return data


def loop_task(
    steps: Steps, train_data: Any, valid_data: Any, test_data: Any | None, batch_size: int | None, eval_batch_size: int | None
) -> Task:
    """The task of a loop; arguments as those of ``from_steps``."""
    for name in ("create", "train_step", "eval_step"):
        if not callable(getattr(steps, name)):
            raise TypeError(f"{name} must be a function, not {getattr(steps, name)!r}")
    train_data = checked_data("train_data", train_data)
    if batch_size is not None:
        batch_size, n = positive("batch_size", batch_size), num_examples(train_data)
        if batch_size > n:
            raise ValueError(f"batch_size = {batch_size}: there are only {n} training examples")
        batch_size = None if batch_size == n else batch_size
    loop = Loop(steps, batch_size, None if eval_batch_size is None else positive("eval_batch_size", eval_batch_size))
    return Task(
        init=Partial(Part(loop, "init")),
        step=Partial(Part(loop, "step"), train_data),
        evaluate=Partial(Part(loop, "evaluate"), checked_data("valid_data", valid_data)),
        test=None if test_data is None else Partial(Part(loop, "evaluate"), checked_data("test_data", test_data)),
    )


def unjitted(function: Any) -> Any:
    """The function below ``jax.jit`` or ``nnx.jit``: the study compiles it all, and an inner jit would hash what is traced."""
    while hasattr(function, "lower") and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def call(name: str, function: Callable[..., Any], given: tuple[Any, ...], names: tuple[str, ...], hparams: Any) -> Any:
    """``function(*given)``, with ``hparams=hparams`` if it has such a parameter.

    Raises:
        JaxhpoError: if it does not take that many arguments; ``names`` are those of the arguments given.
    """
    signature = inspect.signature(function)
    keywords = {"hparams": hparams} if "hparams" in signature.parameters else {}
    try:
        signature.bind(*given, **keywords)
    except TypeError as error:
        hint = "; bind it by functools.partial" if "missing" in str(error) else ""
        raise JaxhpoError(f"{name}{signature} is called as {name}({', '.join(names)}): {error}{hint}") from None
    return function(*given, **keywords)


def mean_tally(name: str, metrics: Any, batch: Any, before: Any) -> Any:
    """The metrics of a batch, as means over its examples, added to those before as sums."""
    if not isinstance(metrics, dict) or any(jnp.shape(value) != () for value in metrics.values()):
        found = jax.tree.map(jnp.shape, metrics) if isinstance(metrics, dict) else f"a {type(metrics).__name__}"
        raise JaxhpoError(f"{name} must return a dict of scalars, means over the batch, not {found}")
    sums = {key: jnp.asarray(value, jnp.float32) * num_examples(batch) for key, value in metrics.items()}
    return sums if before is None else jax.tree.map(jnp.add, before, sums)


@dataclasses.dataclass(frozen=True)
class StateSteps:
    """Functions that take a state and return one, as pure functions over the state's arrays."""

    create: Callable[..., Any]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def _arrays(self, state: Any) -> dict[str, jax.Array]:
        arrays = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            try:
                # The dtype is said twice, since a number of Python's would be weakly typed, unlike what follows from it.
                arrays[keystr(path)] = jnp.asarray(leaf, jnp.asarray(leaf).dtype)
            except TypeError:
                raise JaxhpoError(
                    f"create: the state's {keystr(path) or 'only leaf'} is a {type(leaf).__name__}: an array is due; in a "
                    "flax.struct.dataclass, mark it with field(pytree_node=False)"
                ) from None
        return arrays

    def _state(self, key: jax.Array, hparams: Any, values: dict[str, jax.Array]) -> Any:
        made = self.create(hparams, key)
        paths, treedef = jax.tree_util.tree_flatten_with_path(made)
        return jax.tree.unflatten(treedef, [values[keystr(path)] for path, _ in paths])

    def _call(self, name: str, key: jax.Array, hparams: Any, state: Any, batch: Any) -> Any:
        function = unjitted(getattr(self, name))
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "hparams"]
        due = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
        if len(due) == 3:
            return call(name, function, (state, batch, key), ("state", "batch", "key"), hparams)
        return call(name, function, (state, batch), ("state", "batch"), hparams)

    def init(self, key: jax.Array, hparams: Any) -> Any:
        return self._arrays(self.create(hparams, key))

    def train(self, key: jax.Array, hparams: Any, values: Any, batch: Any) -> Any:
        state = self._state(key, hparams, values)
        built, result = jax.tree.structure(state), self._call("train_step", key, hparams, state, batch)
        if jax.tree.structure(result) == built:
            return self._arrays(result)
        if isinstance(result, tuple) and result and jax.tree.structure(result[0]) == built:
            return self._arrays(result[0])
        raise JaxhpoError(
            f"train_step must return the state, or a tuple that begins with it, built as create built it; it returned a "
            f"{type(result).__name__}"
        )

    def tally(self, key: jax.Array, hparams: Any, values: Any, batch: Any, before: Any) -> Any:
        metrics = self._call("eval_step", key, hparams, self._state(key, hparams, values), batch)
        return mean_tally("eval_step", metrics, batch, before)

    def needs_even_batches(self, hparams: Any) -> bool:
        return False

    def metrics(self, hparams: Any, tally: Any, num_examples: int) -> dict[str, jax.Array]:
        return jax.tree.map(lambda total: total / num_examples, tally)


def from_steps(
    create: Callable[..., Any],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    train_data: Any,
    valid_data: Any,
    test_data: Any | None = None,
    *,
    batch_size: int | None = None,
    eval_batch_size: int | None = None,
) -> Task:
    """A task from the functions of a loop that passes a state on, such as Flax's ``TrainState``.

    Batches are drawn without replacement, a fresh permutation each epoch; a step is one batch. The steps may be jitted
    already; that is undone, for the study compiles them. Each may have a parameter ``hparams``, which is given the trial's.

    Args:
        create: ``(hparams, key) -> state``, a pytree of arrays. Parts that are no arrays, such as a ``TrainState``'s
            optimizer, may depend on the hyperparameters, and these may be traced.
        train_step: ``(state, batch) -> state``, or ``-> (state, ...)``, of which the rest is ignored. With a third
            parameter, ``(state, batch, key)``, it is given a fresh key each step.
        eval_step: ``(state, batch) -> metrics``, a dict of scalars that are means over the batch; ``(state, batch, key)``
            is given a key, the same for all trials.
        train_data, valid_data, test_data: pytrees (a dict, a tuple, an array) of arrays ``[N, ...]``; a batch is the same
            with fewer examples. They are leaves of the task: stored once, shared by all lanes.
        batch_size: examples a step; None for all of them.
        eval_batch_size: examples to a call of ``eval_step``; None for all of them at once.

    Raises:
        ValueError: for data of different sizes, or an impossible batch size.
        JaxhpoError: while a study traces the functions, if one takes or returns something else.
    """
    steps = StateSteps(create, train_step, eval_step)
    return loop_task(steps, train_data, valid_data, test_data, batch_size, eval_batch_size)
