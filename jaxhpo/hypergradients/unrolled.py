"""Exact reverse mode through the whole training.

Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through reversible learning", 2015, algorithm 2;
Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017, algorithm 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.core import Array, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import memory
from jaxhpo.hypergradients.estimate import (
    Assemble,
    Estimate,
    Floats,
    inexact_of,
    log10_norm,
    metric_after,
    readings_of,
    refuse_zeros,
    score,
    start,
    step_at,
    value_and_grad,
    weights_of,
    with_inexact,
)
from jaxhpo.tasks.gradient import mixed_mode
from jaxhpo.tasks.task import Task, Training


@pytree_dataclass
class Unrolled:
    """The exact derivative of a metric after ``num_steps`` steps of training, by reverse mode through all of them.

    Works with any optax chain that the task builds in the trace, for any number of hyperparameters at the cost of one, in
    memory that grows as the square root of the steps. Integers in the training state, random numbers, dropout and batch
    statistics are as in the training itself: every step is recomputed from its own key.

    The derivative is exact, which is not to say useful: where ``gauge/growth`` is above 4 decades the training is
    chaotic, and its derivative is noise of enormous size. Use a smaller learning rate, fewer steps, or ``Evolution``.

    Attributes:
        task: what is trained.
        num_steps: ``T``, steps of the training.
        metric: which metric is differentiated; it must be differentiable, as a loss is and an accuracy is not.
        budget_mib: memory that one lane may take, in MiB; what is recomputed is chosen to fit, before compiling.
        segments: lengths of the recomputed segments, level by level, instead of choosing: ``()`` recomputes none,
            ``(20,)`` recomputes segments of 20 steps.
        mixed_mode: differentiate the gradient within each step forwards, for tasks from Flax and steps that call
            ``jaxhpo.tasks.value_and_grad``; the same numbers, worth trying where memory or time within a step counts.
    """

    task: Task
    num_steps: int = setting(static=True, low=1)
    metric: str = setting("loss", static=True)
    budget_mib: int = setting(1024, static=True, low=1)
    segments: tuple[int, ...] | None = setting(None, static=True)
    mixed_mode: bool = setting(False, static=True)

    @property
    def training(self) -> Training:
        return Training(self.task, self.num_steps)

    def check(self, floats: Floats, assemble: Assemble) -> None:
        """Refuses floats whose derivative is zero by structure, such as the betas of Lion: below a sign.

        Raises:
            JaxhpoError: with their names.
        """

        value = lambda floats: metric_after(self.task, self.metric, self.num_steps, floats, assemble)
        refuse_zeros(self.metric, value, floats)

    def memory_plan(self, floats: Floats, assemble: Assemble) -> memory.MemoryPlan:
        """What will be stored, and the bytes that this takes for one lane; computes nothing.

        Raises:
            JaxhpoError: if nothing fits ``budget_mib``.
        """
        return reverse_plan(self.task, floats, assemble, self.num_steps, self.budget_mib, self.segments)

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        begin = lambda floats: start(self.task, key, assemble(floats))
        with mixed_mode(self.mixed_mode):
            plan = self.memory_plan(floats, assemble)
            return reverse(self.task, self.metric, key, floats, assemble, begin, 0, self.num_steps, plan.segments)

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        """The metric and its gradient in the shape of ``hparams``, None in place of what is no float; to be jitted."""
        return value_and_grad(self, key, hparams)


def reverse_plan(
    task: Task, floats: Floats, assemble: Assemble, num_steps: int, budget_mib: int, segments: tuple[int, ...] | None
) -> memory.MemoryPlan:
    """What :func:`reverse` through so many steps should store."""
    key = jax.random.key(0)
    state = jax.eval_shape(lambda task, floats: start(task, key, assemble(floats)), task, floats)

    def one(task: Task, floats: Floats, inexact: list[Array]) -> list[Array]:
        whole = with_inexact(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state), inexact)
        return inexact_of(_kept_step(task, key, assemble(floats), whole, jnp.zeros((), jnp.int32)))

    residual = memory.residual_bytes(one, task, floats, inexact_of(state))
    return memory.plan_memory(num_steps, memory.bytes_of(state), residual, budget_mib * 2**20, segments)


def reverse(
    task: Task,
    metric: str,
    key: Array,
    floats: Floats,
    assemble: Assemble,
    begin: Callable[[Floats], Any],
    first: int,
    count: int,
    segments: tuple[int, ...],
) -> Estimate:
    """The derivative of a metric through the state that ``begin`` gives and ``count`` steps of the training from there.

    Args:
        first: number of the first of these steps.
        segments: as in :class:`jaxhpo.hypergradients.memory.MemoryPlan`.
    """
    length = min(segments[0], count) if segments else max(math.isqrt(count), 1)
    num_readings = -(-count // length)

    def final(floats: Floats, readings: Array) -> tuple[Array, dict[str, Array]]:
        hparams = assemble(floats)  # once, not in every step

        def segment(state: Any, at: tuple[Array, Array], count: int = length) -> tuple[Any, None]:
            state = read_adjoint(state, at[1])
            return _advance(task, key, hparams, state, at[0], count, segments[1:]), None

        whole, rest = divmod(count, length)
        firsts = first + jnp.arange(num_readings) * length
        recomputed = functools.partial(jax.checkpoint, prevent_cse=False) if segments else lambda body: body
        state, _ = lax.scan(recomputed(segment), begin(floats), (firsts[:whole], readings[:whole]))
        if rest:
            state, _ = recomputed(functools.partial(segment, count=rest))(state, (firsts[-1], readings[-1]))
        return score(task, metric, hparams, state)

    differentiated = jax.value_and_grad(final, argnums=(0, 1), has_aux=True)
    try:
        (_, metrics), (grad, adjoints) = differentiated(floats, jnp.zeros(num_readings, jnp.float32))
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise JaxhpoError(
            "hypergradients: a step or the metric has a while loop, or a loop of traced length; reverse mode cannot "
            "take: use lax.scan, or the estimators Forward or Evolution"
        ) from error
    return Estimate(metrics | readings_of("adjoint", adjoints, first, length), grad)


@jax.custom_vjp
def read_adjoint(state: Any, reading: Array) -> Any:
    """The state itself; backwards, the cotangent of ``reading`` is log10 of the norm of the weights' cotangent."""
    del reading
    return state


def _read_forward(state: Any, reading: Array) -> tuple[Any, None]:
    del reading
    return state, None


def _read_backward(_: None, adjoint: Any) -> tuple[Any, Array]:
    return adjoint, log10_norm(weights_of(adjoint)).astype(jnp.float32)


read_adjoint.defvjp(_read_forward, _read_backward)


def _advance(task: Task, key: Array, hparams: Any, state: Any, first: Array, count: int, segments: tuple[int, ...]) -> Any:
    """``count`` steps from ``first`` on, in recomputed segments of ``segments[0]`` steps, cut further by the others."""
    if not segments:
        return lax.scan(lambda state, i: (_kept_step(task, key, hparams, state, i), None), state, first + jnp.arange(count))[0]
    length = min(segments[0], count)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def segment(state: Any, first: Array) -> tuple[Any, None]:
        return _advance(task, key, hparams, state, first, length, segments[1:]), None

    whole, rest = divmod(count, length)
    state, _ = lax.scan(segment, state, first + length * jnp.arange(whole))
    return _advance(task, key, hparams, state, first + length * whole, rest, segments[1:]) if rest else state


def _kept_step(task: Task, key: Array, hparams: Any, state: Any, index: Array) -> Any:
    """One step of which only the results of matrix products are kept for the backward pass; the rest is cheap to redo."""
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(lambda state: step_at(task, key, hparams, state, index), prevent_cse=False, policy=policy)(state)
