"""Exact forward mode through the whole training: memory that does not grow with the steps.

Franceschi et al., "Forward and reverse gradient-based hyperparameter optimization", 2017, algorithm 2; stretches of steps
that share a hyperparameter: Micaelli and Storkey, "Gradient-based hyperparameter optimization over long horizons", 2021.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.core import Array, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
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
from jaxhpo.tasks.task import Task, Training

_MOST_DIRECTIONS = 256  # beyond these reverse mode is far cheaper
_NUM_STRETCHES = 8  # of the training, at whose ends the norm of the tangents is read


@pytree_dataclass
class Forward:
    """The exact derivative of a metric after ``num_steps`` steps, by one tangent for each hyperparameter.

    For few hyperparameters: time grows with their number, memory with that of the weights, neither with the other's.

    Attributes:
        task: what is trained.
        num_steps: ``T``, steps of the training.
        metric: which metric is differentiated.
        stretch: of array-shaped floats, how many neighbours along the first axis share one tangent: a schedule of ``T``
            learning rates costs ``T / stretch`` tangents. Each of them then has the mean derivative of its stretch.
    """

    task: Task
    num_steps: int = setting(static=True, low=1)
    metric: str = setting("loss", static=True)
    stretch: int = setting(1, static=True, low=1)

    @property
    def training(self) -> Training:
        return Training(self.task, self.num_steps)

    def check(self, floats: Floats, assemble: Assemble) -> None:
        """Refuses floats whose derivative is zero by structure, and more directions than make sense.

        Raises:
            JaxhpoError: with the names.
        """
        count = sum(num_groups(x.shape, self.stretch) for x in floats.values())
        if count > _MOST_DIRECTIONS:
            raise JaxhpoError(
                f"Forward: {', '.join(sorted(floats))} need {count} tangents, at most {_MOST_DIRECTIONS} make sense: use "
                "Unrolled, whose cost does not depend on their number, or a longer stretch"
            )

        value = lambda floats: metric_after(self.task, self.metric, self.num_steps, floats, assemble)
        refuse_zeros(self.metric, value, floats)

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        directions = directions_of(floats, self.stretch)
        # Tangents have a leading axis [K]; vmap leaves what does not depend on them, the training itself, as it is.
        pushed = lambda f, x, dx: jax.vmap(lambda dx: jax.jvp(f, x, dx, has_aux=True), out_axes=(None, 0, None))(dx)

        def begin(floats: Floats) -> tuple[list[Array], Any]:
            state = start(self.task, key, assemble(floats))
            return inexact_of(state), state

        _, tangents, state = pushed(begin, (floats,), (directions,))

        def one(carry: tuple[Any, list[Array]], index: Array) -> tuple[tuple[Any, list[Array]], None]:
            state, tangents = carry

            def step(floats: Floats, inexact: list[Array]) -> tuple[list[Array], Any]:
                new = step_at(self.task, key, assemble(floats), with_inexact(state, inexact), index)
                return inexact_of(new), new

            # Z_t = A_t Z_{t-1} + B_t
            _, tangents, state = pushed(step, (floats, inexact_of(state)), (directions, tangents))
            return (state, tangents), None

        def stretch(carry: tuple[Any, list[Array]], first: Array | int, count: int) -> tuple[tuple[Any, list[Array]], Array]:
            carry, _ = lax.scan(one, carry, first + jnp.arange(count))
            return carry, log10_norm(weights_of(with_inexact(*carry))).astype(jnp.float32)

        length = -(-self.num_steps // _NUM_STRETCHES)
        whole, rest = divmod(self.num_steps, length)
        firsts = length * jnp.arange(whole)
        carry, readings = lax.scan(lambda carry, first: stretch(carry, first, length), (state, tangents), firsts)
        if rest:
            carry, _ = stretch(carry, length * whole, rest)
        state, tangents = carry

        def final(floats: Floats, inexact: list[Array]) -> tuple[Array, dict[str, Array]]:
            return score(self.task, self.metric, assemble(floats), with_inexact(state, inexact))

        _, slopes, metrics = pushed(final, (floats, inexact_of(state)), (directions, tangents))
        gauges = readings_of("tangent", readings, length, length)
        return Estimate(metrics | gauges, spread(slopes, floats, self.stretch))

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        """The metric and its gradient in the shape of ``hparams``, None in place of what is no float; to be jitted."""
        return value_and_grad(self, key, hparams)


def num_groups(shape: tuple[int, ...], stretch: int) -> int:
    """Tangents that an array needs: its entries, or those of one row for each stretch along the first axis."""
    return 1 if not shape else -(-shape[0] // stretch) * int(np.prod(shape[1:], dtype=int))


def _group_of(shape: tuple[int, ...], stretch: int) -> np.ndarray:
    """The tangent, counted from 0, to which each entry of an array belongs."""
    if not shape:
        return np.zeros((), int)
    row = np.arange(np.prod(shape[1:], dtype=int)).reshape(shape[1:])
    return (np.arange(shape[0]) // stretch).reshape(-1, *(1 for _ in shape[1:])) * row.size + row


def directions_of(floats: Floats, stretch: int) -> Floats:
    """Unit tangents ``[K, *shape]`` of each float, one after the other."""
    counts = {name: num_groups(x.shape, stretch) for name, x in floats.items()}
    total, at, made = sum(counts.values()), 0, {}
    for name, x in floats.items():
        mine = np.arange(total).reshape(-1, *(1 for _ in x.shape)) == at + _group_of(x.shape, stretch)
        made[name] = jnp.asarray(mine, x.dtype)
        at += counts[name]
    return made


def spread(slopes: Array, floats: Floats, stretch: int) -> Floats:
    """Slopes ``[K]`` along the tangents as a gradient: each entry has the mean of its stretch."""
    at, grad = 0, {}
    for name, x in floats.items():
        group, count = _group_of(x.shape, stretch), num_groups(x.shape, stretch)
        members = np.bincount(group.ravel(), minlength=count)
        grad[name] = (slopes[at : at + count] / members)[group].astype(x.dtype)
        at += count
    return grad
