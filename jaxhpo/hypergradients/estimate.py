"""What every estimator gives, and what they share: the training, its end, and the names of the hyperparameters.

    hparams --split--> floats {name: array} --estimate--> metrics, grad {name: array} --merge--> grad in the shape of hparams

An estimator differentiates by floats alone: integers and choices have no derivative, labels and constants neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import partial_eval
from jax.tree_util import keystr

from jaxhpo.core import Array, problems_of, pytree_dataclass
from jaxhpo.errors import JaxhpoError
from jaxhpo.tasks.task import Task, Training, has_no_nan, init_and_step_keys

Floats = dict[str, Any]
"""Hyperparameters that are differentiated, by dotted name; each of any shape."""

Assemble = Callable[[Floats], Any]
"""Makes the ``hparams`` that the task sees out of floats."""


_NUM_READINGS = 8  # steps at which the norm of an adjoint or a tangent is reported


@pytree_dataclass
class Estimate:
    """What an estimator found for one training.

    Attributes:
        metrics: all that the task reports at the end, scalars; and the gauges, whose names begin with ``gauge/``:
            ``gauge/growth`` in decades, and ``gauge/adjoint@STEP``, the log10 of the adjoint's norm at some steps.
        grad: derivative of the estimator's metric, shaped as the floats.
    """

    metrics: dict[str, Any]
    grad: Floats


class Estimator(Protocol):
    """A hypergradient of a training: pure, written for one lane, fit for ``jit`` and ``vmap``.

    Attributes:
        metric: which metric of the task is differentiated.
        training: what is trained, without derivatives; for the winner on fresh seeds.
    """

    @property
    def metric(self) -> str: ...

    @property
    def training(self) -> Training: ...

    def check(self, floats: Floats, assemble: Assemble) -> None:
        """Refuses, computing nothing, hyperparameters that the estimator cannot be right for.

        Raises:
            JaxhpoError: with their names.
        """
        ...

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate: ...

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]: ...


def is_estimator(thing: Any) -> bool:
    """Whether something is an estimator, as ``isinstance`` would tell if it did not read properties to do so."""
    cls = type(thing)
    return callable(thing) and callable(getattr(cls, "estimate", None)) and hasattr(cls, "training") and hasattr(cls, "check")


def _named_leaves(hparams: Any) -> tuple[list[str], list[Any], Any]:
    """The dotted names and the leaves of a tree, and how it is built."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(hparams)
    return [keystr(path, simple=True, separator=".") or "value" for path, _ in paths], [leaf for _, leaf in paths], treedef


def split_floats(hparams: Any) -> tuple[Floats, Assemble]:
    """The floats of a tree by dotted name, and how to put others in their place."""
    names, leaves, treedef = _named_leaves(hparams)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise JaxhpoError(f"hypergradients: two hyperparameters are called {twice[0]!r}")
    floats = {name: jnp.asarray(leaf) for name, leaf in zip(names, leaves, strict=True) if _is_float(leaf)}
    assemble = lambda new: jax.tree.unflatten(treedef, [new.get(n, x) for n, x in zip(names, leaves, strict=True)])
    return floats, assemble


def _is_float(leaf: Any) -> bool:
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return isinstance(leaf, float)
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def check_settings(estimator: Any) -> None:
    """Raises a JaxhpoError for settings out of range; those that are traced are let pass."""
    problems = problems_of(estimator)
    if problems:
        raise JaxhpoError("; ".join(f"{type(estimator).__name__}: {line}" for line in problems))


def value_and_grad(estimator: Estimator, key: Array, hparams: Any) -> tuple[Array, Any]:
    """An estimator called with hyperparameters as the task sees them.

    Returns:
        the metric, and its derivative in the shape of ``hparams``: None in place of what is no float.
    """
    key = jax.random.key(key) if isinstance(key, int) else key
    check_settings(estimator)
    floats, assemble = split_floats(hparams)
    if not floats:
        raise JaxhpoError("hypergradients: none of the hyperparameters is a float, and only floats have a derivative")
    estimator.check(floats, assemble)
    estimate = estimator.estimate(key, floats, assemble)
    names, _, treedef = _named_leaves(hparams)
    return estimate.metrics[estimator.metric], jax.tree.unflatten(treedef, [estimate.grad.get(name) for name in names])


def start(task: Task, key: Array, hparams: Any) -> Any:
    """The state of a training before its first step; the driver's trials begin the same way."""
    return task.init(init_and_step_keys(key)[0], hparams)


def step_at(task: Task, key: Array, hparams: Any, state: Any, index: Array) -> Any:
    """Step number ``index`` of the training of ``key``."""
    return task.step(jax.random.fold_in(init_and_step_keys(key)[1], index), hparams, state)


def steps_from(task: Task, key: Array, hparams: Any, state: Any, first: Array | int, count: int) -> Any:
    """``count`` (static) steps from number ``first`` on."""
    if count == 0:
        return state
    one = lambda state, i: (step_at(task, key, hparams, state, first + i), None)
    return lax.scan(one, state, jnp.arange(count))[0]


def trained(task: Task, key: Array, hparams: Any, num_steps: int) -> Any:
    """The state after the first ``num_steps`` (static) steps of the training of ``key``."""
    return steps_from(task, key, hparams, start(task, key, hparams), 0, num_steps)


def score(task: Task, metric: str, hparams: Any, state: Any) -> tuple[Array, dict[str, Any]]:
    """The metric that is differentiated, and all metrics. It is NaN where the state has a NaN: such a training diverged.

    Raises:
        JaxhpoError: if the task does not report that metric, or anything but a dict of scalars.
    """
    found = task.evaluate(hparams, state)
    if not isinstance(found, dict):
        raise JaxhpoError(f"evaluate must return a dict of scalars, not a {type(found).__name__}")
    metrics = scalars(metric, found, "task")
    value = jnp.where(has_no_nan(state), metrics[metric], jnp.nan)
    return value, {**metrics, metric: value}


def scalars(metric: str, found: dict[str, Any], who: str) -> dict[str, Any]:
    """The metrics as arrays, after a look at their shapes and at whether the one wanted is there."""
    metrics = {str(name): jnp.asarray(value) for name, value in found.items()}
    if metric not in metrics:
        raise JaxhpoError(f"metric = {metric!r}: the {who} reports {', '.join(metrics)}")
    for name, value in metrics.items():
        if value.shape != ():
            raise JaxhpoError(f"the {who} reports {name!r} of shape {value.shape}: a scalar is due")
    return metrics


def without_derivative(function: Callable[[Floats], Array], floats: Floats) -> list[str]:
    """Names of the floats whose derivative is zero by structure, whatever their values; found by tracing alone.

    ``sign``, ``round``, ``argmax`` and comparisons let no derivative through, nor does a value that is never read.
    """
    tangent = jax.make_jaxpr(lambda x, dx: jax.jvp(function, (x,), (dx,))[1])(floats, floats)
    _, used = partial_eval.dce_jaxpr(tangent.jaxpr, [True] * len(tangent.jaxpr.outvars))
    names = sorted(floats)  # the order in which a dict is flattened
    return [name for name, is_used in zip(names, used[len(names) :], strict=True) if not is_used]


class ZeroDerivative(JaxhpoError):
    """The metric has no derivative by some hyperparameters, whatever their values; ``names`` says by which."""

    def __init__(self, metric: str, names: list[str], all_of_them: bool = False):
        self.metric, self.names, self.all_of_them = metric, tuple(names), all_of_them
        if all_of_them and metric != "loss":
            super().__init__(
                f"hypergradients: the derivative of {metric} by {', '.join(names)} is zero: accuracies have none. "
                f"Differentiate a loss, or use jaxhpo.hypergradients.Evolution(..., metric={metric!r})"
            )
            return
        super().__init__(
            f"hypergradients: the derivative of {metric} by {', '.join(names)} is zero whatever the values are (they are not "
            "used, or act only through a sign, a rounding or a comparison): leave them out, or search them by another optimizer"
        )


def metric_after(task: Task, metric: str, num_steps: int, floats: Floats, assemble: Assemble) -> Array:
    """The metric after a training of some key, to be traced for its structure."""
    hparams = assemble(floats)
    return score(task, metric, hparams, trained(task, jax.random.key(0), hparams, num_steps))[0]


def refuse_zeros(metric: str, function: Callable[[Floats], Array], floats: Floats) -> None:
    """Raises a :class:`ZeroDerivative` that names the floats by which the function has no derivative, if there are any."""
    names = without_derivative(function, floats)
    if names:
        raise ZeroDerivative(metric, names, len(names) == len(floats))


def readings_of(kind: str, log_norms: Array, first: int, length: int) -> dict[str, Array]:
    """Gauges from log10 of norms, ``f32[N]``, read every ``length`` steps from step ``first``: some of them, and their growth.

    The norm of an adjoint (of a tangent) of a training that forgets its past falls backwards (levels off forwards); of one
    that amplifies every small change it grows exponentially. The growth is from the reading nearest to where the adjoint
    (tangent) begins to the largest one.
    """
    count = log_norms.shape[0]
    shown = sorted({round(i * (count - 1) / (_NUM_READINGS - 1)) for i in range(_NUM_READINGS)})
    # Readings of zero norm, -inf, are of a stretch that the metric, or the hyperparameter, does not reach.
    known, onwards = jnp.isfinite(log_norms), log_norms[::-1] if kind == "adjoint" else log_norms
    begin = onwards[jnp.argmax(jnp.isfinite(onwards))]
    growth = jnp.where(known.any(), jnp.max(jnp.where(known, log_norms, -jnp.inf)) - begin, 0.0)
    growth = jnp.where(jnp.isnan(log_norms).any() | jnp.isposinf(log_norms).any(), jnp.nan, growth)
    return {"gauge/growth": growth, **{f"gauge/{kind}@{first + i * length}": log_norms[i] for i in shown}}


def inexact_of(state: Any) -> list[Any]:
    """The floats of a training state: all of it that has derivatives."""
    return [x for x in jax.tree.leaves(state) if _is_float(x)]


def with_inexact(state: Any, inexact: list[Any]) -> Any:
    """The state with other floats."""
    leaves, treedef = jax.tree.flatten(state)
    new = iter(inexact)
    return jax.tree.unflatten(treedef, [next(new) if _is_float(x) else x for x in leaves])


def weights_of(state: Any) -> Any:
    """The parameters within a training state, ``state.params`` or ``state["params"]``; else the whole state."""
    if isinstance(state, dict):
        return state.get("params", state)
    return getattr(state, "params", state)


def log10_norm(tree: Any) -> Array:
    """log10 of the Euclidean norm over all floats of a tree; finite also where the square would overflow."""
    leaves = inexact_of(tree)
    largest = jnp.stack([jnp.max(jnp.abs(x), initial=0.0) for x in leaves]).max()
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return jnp.log10(scale) + 0.5 * jnp.log10(sum(jnp.sum((x / scale) ** 2) for x in leaves))
