"""A training repeated over seeds within one trial, so that a search is guided by a mean instead of by luck."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import pytree_dataclass, setting
from jaxhpo.tasks.task import Task


def over_seeds(task: Task, num_seeds: int) -> Task:
    """The same task, trained on ``num_seeds`` keys side by side in every lane; metrics are means over them.

    A trial diverges if one of its seeds does: a setting that works only sometimes does not work.

    Raises:
        ValueError: if ``num_seeds`` is not at least 1.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds = {num_seeds!r}: must be at least 1")
    if num_seeds == 1:
        return task
    return Task(
        init=_Init(task, num_seeds),
        step=_Step(task, num_seeds),
        evaluate=_Mean(task.evaluate),
        test=None if task.test is None else _Mean(task.test),
    )


@pytree_dataclass
class _Init:
    task: Task
    num_seeds: int = setting(static=True)

    def __call__(self, key: jax.Array, hparams: Any) -> Any:
        return jax.vmap(lambda key: self.task.init(key, hparams))(jax.random.split(key, self.num_seeds))


@pytree_dataclass
class _Step:
    task: Task
    num_seeds: int = setting(static=True)

    def __call__(self, key: jax.Array, hparams: Any, states: Any) -> Any:
        keys = jax.random.split(key, self.num_seeds)
        return jax.vmap(lambda key, state: self.task.step(key, hparams, state))(keys, states)


@pytree_dataclass
class _Mean:
    evaluate: Any

    def __call__(self, hparams: Any, states: Any) -> dict[str, jax.Array]:
        return jax.tree.map(jnp.mean, jax.vmap(lambda state: self.evaluate(hparams, state))(states))
