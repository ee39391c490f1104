"""Tasks from the functions of a Flax NNX training loop, which change the model and its optimizer in place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxhpo.errors import JaxhpoError
from jaxhpo.tasks.batch_norm import with_derivatives
from jaxhpo.tasks.nnx import VARIABLES
from jaxhpo.tasks.steps import call, loop_task, mean_tally, unjitted
from jaxhpo.tasks.task import Task

# Parameters, statistics and the optimizer's state are carried from step to step. Random streams are made anew from each
# step's key, and metrics from nothing: the training's own are read by nobody.
CARRIED = nnx.All(nnx.Any(nnx.Param, VARIABLES), nnx.Not(nnx.metrics.MetricState))


def _values(objects: Any, kind: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(objects, kind))


def _assign(objects: Any, kind: Any, values: Any) -> None:
    state = nnx.state(objects, kind)
    nnx.replace_by_pure_dict(state, values)
    nnx.update(objects, state)


@dataclasses.dataclass(frozen=True)
class NnxSteps:
    """Functions that change NNX objects in place, as pure functions over the arrays of these."""

    create: Callable[..., Any]
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def _objects(self, key: jax.Array, hparams: Any) -> tuple[Any, ...]:
        objects = self.create(hparams, nnx.Rngs(key))
        if not isinstance(objects, tuple) or not any(isinstance(each, nnx.Module) for each in objects):
            kinds = [type(each).__name__ for each in objects] if isinstance(objects, tuple) else type(objects).__name__
            raise JaxhpoError(
                "create must return a tuple of the modules and whatever else train_step takes before the batch, such as "
                f"(model, optimizer), not {kinds}"
            )
        return objects

    def _call(self, name: str, objects: tuple[Any, ...], hparams: Any, batch: Any) -> Any:
        names = (*(type(each).__name__ for each in objects), "batch")
        return call(name, unjitted(getattr(self, name)), (*objects, batch), names, hparams)

    def init(self, key: jax.Array, hparams: Any) -> Any:
        return _values(self._objects(key, hparams), CARRIED)

    def train(self, key: jax.Array, hparams: Any, values: Any, batch: Any) -> Any:
        objects = self._objects(key, hparams)
        _assign(objects, CARRIED, values)
        for module in objects:
            if isinstance(module, nnx.Module):
                with_derivatives(module).train()
        self._call("train_step", objects, hparams, batch)
        return _values(objects, CARRIED)

    def tally(self, key: jax.Array, hparams: Any, values: Any, batch: Any, before: Any) -> Any:
        objects = self._objects(key, hparams)
        _assign(objects, CARRIED, values)
        if before is not None and _metric(objects) is not None:
            _assign(_metric(objects), nnx.metrics.MetricState, before)
        for module in objects:
            if isinstance(module, nnx.Module):
                module.eval()
        kept = tuple(each for each in objects if not isinstance(each, nnx.Optimizer))
        result = self._call("eval_step", kept, hparams, batch)
        metric = _metric(objects)
        return mean_tally("eval_step", result, batch, before) if metric is None else _values(metric, nnx.metrics.MetricState)

    def needs_even_batches(self, hparams: Any) -> bool:
        return _metric(self._objects(jax.random.key(0), hparams)) is not None

    def metrics(self, hparams: Any, tally: Any, num_examples: int) -> dict[str, jax.Array]:
        metric = _metric(self._objects(jax.random.key(0), hparams))
        if metric is None:
            return jax.tree.map(lambda total: total / num_examples, tally)
        _assign(metric, nnx.metrics.MetricState, tally)
        return metric.compute()


def _metric(objects: tuple[Any, ...]) -> nnx.MultiMetric | None:
    return next((each for each in objects if isinstance(each, nnx.MultiMetric)), None)


def from_nnx_steps(
    create: Callable[[Any, nnx.Rngs], tuple[Any, ...]],
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    train_data: Any,
    valid_data: Any,
    test_data: Any | None = None,
    *,
    batch_size: int | None = None,
    eval_batch_size: int | None = None,
) -> Task:
    """A task from the functions of a loop that changes NNX objects in place; data and batches as in ``from_steps``.

    The steps may be jitted already; that is undone, for the study compiles them. Each may have a parameter ``hparams``,
    which is given the trial's. Modules are switched by ``train()`` and ``eval()`` before each step; random streams begin
    anew from the trial's key and the step.

    Args:
        create: ``(hparams, rngs) -> (model, optimizer, ...)``: a tuple of all that ``train_step`` takes before the batch, in
            its order; often also an ``nnx.MultiMetric``, and ``rngs`` itself. Hyperparameters may be traced.
        train_step: ``(model, optimizer, ..., batch)``; what it returns is ignored.
        eval_step: ``(model, ..., batch)``, the same objects without the optimizers. It updates the ``nnx.MultiMetric``, if
            there is one, which counts validation alone; else it returns a dict of scalars that are means over the batch.
        train_data, valid_data, test_data: pytrees (a dict, a tuple, an array) of arrays ``[N, ...]``.
        batch_size: examples a step; None for all of them.
        eval_batch_size: examples to a call of ``eval_step``; None for all of them at once. It must divide the number of
            examples where there is an ``nnx.MultiMetric``, which may count the mean of a small batch as that of a large one.

    Raises:
        ValueError: for data of different sizes, or an impossible batch size.
        JaxhpoError: while a study traces the functions, if one takes or returns something else.
    """
    steps = NnxSteps(create, train_step, eval_step)
    return loop_task(steps, train_data, valid_data, test_data, batch_size, eval_batch_size)
