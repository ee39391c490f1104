"""What a time-varying Gaussian process makes of the changes of losses over intervals of training.

    K[i, j] = s2 (k(x_i, x_j) (1 - e)^(|t_i - t_j| / 2) + g [i = j])

Bogunovic, Scarlett & Cevher, "Time-varying Gaussian process bandit optimization", AISTATS 2016: k is the squared
exponential, here times a Hamming kernel of choices, ``e`` is the forgetting, t is the time in intervals. Notation otherwise in
:mod:`jaxhpo.surrogates.kernels`; the noise is in units of the signal, t2 = g s2.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import CubeSpec, pytree_dataclass, setting
from jaxhpo.surrogates.kernels import KernelParams, covariance
from jaxhpo.surrogates.linalg import Factor, cholesky, rounding, solve_lower, with_row
from jaxhpo.surrogates.outputs import masked_quantile
from jaxhpo.surrogates.regression import masked_covariance

_LARGEST = 1e37  # changes beyond count as this
_FENCE = 2.0  # winsorised there, in distances between the lowest and the highest fifth
_LENGTHSCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the root mean square distance of uniform points
_NOISES = (0.01, 0.1, 1.0)
_FORGETTINGS = (0.01, 0.1, 0.3, 0.6)
_LEAST_SIGNAL, _MOST_SIGNAL = 0.05, 20.0


@pytree_dataclass
class Changes:
    """The last ``N`` intervals that came to an end, a ring: the next one takes the place of the oldest.

    Attributes:
        cube: ``f32[N, D]``, where the interval was trained, integers and choices at the middle of their level.
        time: ``f32[N]``, when it began, in intervals.
        change: ``f32[N]``, of the loss over it, lower is better; infinite where the trial diverged.
        count: ``i32[]``, intervals so far.
    """

    cube: jax.Array
    time: jax.Array
    change: jax.Array
    count: jax.Array

    @property
    def used(self) -> jax.Array:
        """``bool[N]``"""
        return jnp.arange(self.change.shape[0]) < self.count


def no_changes(num_rows: int, num_dims: int) -> Changes:
    """A ring without observations."""
    zeros = jnp.zeros(num_rows, jnp.float32)
    return Changes(jnp.zeros((num_rows, num_dims), jnp.float32), zeros, zeros, jnp.zeros((), jnp.int32))


def recorded(changes: Changes, cube: jax.Array, time: jax.Array, change: jax.Array, which: jax.Array) -> Changes:
    """The ring with the lanes ``which bool[B]``, at most N; a change that is no number, or infinite, is a failure."""
    rows = changes.change.shape[0]
    place = (changes.count + jnp.cumsum(which, dtype=jnp.int32) - 1) % rows
    place = jnp.where(which, place, rows)  # beyond the end: dropped
    change = jnp.where(jnp.isfinite(change), jnp.clip(change, -_LARGEST, _LARGEST), jnp.inf)
    # Counted up to twice the ring's length and back to once, so that a long search does not overflow.
    count = changes.count + which.sum(dtype=jnp.int32)
    return Changes(
        changes.cube.at[place].set(cube.astype(jnp.float32), mode="drop"),
        changes.time.at[place].set(time.astype(jnp.float32), mode="drop"),
        changes.change.at[place].set(change.astype(jnp.float32), mode="drop"),
        jnp.where(count >= 2 * rows, count - rows, count),
    )


def targets(changes: Changes) -> tuple[jax.Array, jax.Array]:
    """Changes made fit for a Gaussian process, ``z [N]``, and which rows count, ``bool[N]``.

    Losses fall fast at first and now and then jump: changes are winsorised at twice the distance between the lowest
    and the highest fifth beyond these, then standardised. Failures count as the worst change that did not fail; without
    any, nothing counts.
    """
    used = changes.used
    sound = used & jnp.isfinite(changes.change)
    some = jnp.any(sound)
    change = jnp.where(sound, changes.change, 0.0)
    low, middle, high = (jnp.where(some, masked_quantile(change, sound, share), 0.0) for share in (0.2, 0.5, 0.8))
    gap = jnp.where(sound, change - middle, 0.0)
    scale = jnp.where(high > low, high - low, jnp.max(jnp.abs(gap)))
    scale = jnp.where(scale > 0, scale, 1.0)
    z = jnp.clip(gap / scale, (low - middle) / scale - _FENCE, (high - middle) / scale + _FENCE)
    z = jnp.where(sound, z, jnp.max(jnp.where(sound, z, -jnp.inf)))
    mask = used & some
    count = jnp.maximum(mask.sum(), 1)
    z = jnp.where(mask, z - jnp.where(mask, z, 0.0).sum() / count, 0.0)
    deviation = jnp.sqrt((z * z).sum() / count)
    return z / jnp.where(deviation > 1e-6, deviation, 1.0), mask


@pytree_dataclass
class Params:
    """Hyperparameters of the Gaussian process.

    Attributes:
        lengthscale: ``f[]``, of floats and integers, in cube units.
        noise: ``f[]``, g.
        forgetting: ``f[]``, e.
        signal: ``f[]``, s2.
    """

    lengthscale: jax.Array
    noise: jax.Array
    forgetting: jax.Array
    signal: jax.Array


def decay(forgetting: jax.Array, time: jax.Array, other: jax.Array) -> jax.Array:
    """``(1 - e)^(|t - t'| / 2)`` for times ``[M]`` and ``[N]``, as ``[M, N]``; 1 if nothing is forgotten."""
    rate = jnp.log1p(-jnp.minimum(jnp.asarray(forgetting, jnp.float32), 1.0 - 1e-6))
    return jnp.exp(0.5 * rate * jnp.abs(time[:, None] - other))


def correlation(
    params: Params, spec: CubeSpec, x: jax.Array, time: jax.Array, other: jax.Array, other_time: jax.Array
) -> jax.Array:
    """``K / s2`` without noise between inputs ``[M, D]`` and ``[N, D]`` of ``inputs_of``, as ``[M, N]``."""
    lengthscale = jnp.where(spec.is_choice, 0.0, jnp.log(params.lengthscale))  # of choices: 1, a factor 1 / e for each
    kernel = KernelParams(lengthscale, jnp.zeros((), jnp.float32))
    return covariance(kernel, spec, "rbf", x, other) * decay(params.forgetting, time, other_time)


def _noise(params: Params, size: int) -> jax.Array:
    return params.noise + rounding(size, jnp.float32)


def fit(
    spec: CubeSpec, x: jax.Array, time: jax.Array, z: jax.Array, mask: jax.Array, forgetting: jax.Array | float | None = None
) -> Params:
    """The most probable parameters of a small grid, given the rows ``mask`` of ``x [N, D]``, ``time [N]`` and ``z [N]``.

    Five lengthscales by three noises by four forgettings, unless that is given; the signal is the best for each (in closed
    form, RW eq. 5.8 maximised by a factor on the covariance). A grid has no poor local maxima, needs no gradients and no
    start, and with noises of at least a hundredth of the signal no matrix is near singular in float32. A normal prior on
    the log lengthscale, of deviation 1 around the root mean square distance of two uniform points, decides while there are
    few observations.
    """
    middle = math.sqrt(max(int((~spec.is_choice).sum()), 1) / 6.0)
    rates = jnp.asarray(_FORGETTINGS if forgetting is None else (forgetting,), jnp.float32)
    grid = itertools.product(range(len(_LENGTHSCALES)), range(len(_NOISES)), range(rates.size))
    by_length, by_noise, by_rate = np.array(list(grid)).T
    count = jnp.maximum(mask.sum(), 1)

    def score(lengthscale: jax.Array, noise: jax.Array, rate: jax.Array) -> tuple[jax.Array, Params]:
        params = Params(lengthscale, noise, rate, jnp.ones((), jnp.float32))
        with jax.default_matmul_precision("highest"):
            matrix = correlation(params, spec, x, time, x, time)
        factor = cholesky(masked_covariance(matrix, _noise(params, mask.size), mask))
        b = solve_lower(factor, jnp.where(mask, z, 0.0))
        signal = jnp.clip(b @ b / count, _LEAST_SIGNAL, _MOST_SIGNAL)
        value = -0.5 * (b @ b) / signal - 0.5 * count * jnp.log(signal) - jnp.log(jnp.diagonal(factor.lower)).sum()
        return value - 0.5 * jnp.log(lengthscale / middle) ** 2, dataclasses.replace(params, signal=signal)

    lengthscales, noises = middle * jnp.asarray(_LENGTHSCALES, jnp.float32), jnp.asarray(_NOISES, jnp.float32)
    values, params = jax.vmap(score)(lengthscales[by_length], noises[by_noise], rates[by_rate])
    best = jnp.argmax(values)
    return jax.tree.map(lambda column: column[best], params)


@pytree_dataclass
class Belief:
    """A time-varying Gaussian process that has seen ``N`` rows; ``P`` more are kept for pending points.

    Attributes:
        params: its hyperparameters.
        x: ``[N + P, D]``, ``time``: ``[N + P]``, ``mask``: ``bool[N + P]``: rows with a change, and pending ones.
        factor: L of ``K / s2``.
        weights: ``[N + P]``, b; 0 for pending rows, whose change is taken to be the mean.
        next: ``i32[]``, the row of the next pending point.
        spec: static.
    """

    params: Params
    x: jax.Array
    time: jax.Array
    mask: jax.Array
    factor: Factor
    weights: jax.Array
    next: jax.Array
    spec: CubeSpec = setting(static=True)


def condition(
    params: Params, spec: CubeSpec, x: jax.Array, time: jax.Array, z: jax.Array, mask: jax.Array, num_pending: int
) -> Belief:
    """The belief given the rows ``mask`` of ``x [N, D]``, ``time [N]`` and ``z [N]`` (RW algorithm 2.1)."""
    rows = x.shape[0]
    more = -(-(rows + num_pending) // 32) * 32 - rows  # blocks of linalg
    x, time, z, mask = (jnp.concatenate([a, jnp.zeros((more, *a.shape[1:]), a.dtype)]) for a in (x, time, z, mask))
    with jax.default_matmul_precision("highest"):
        matrix = correlation(params, spec, x, time, x, time)
    factor = cholesky(masked_covariance(matrix, _noise(params, mask.size), mask))
    weights = solve_lower(factor, jnp.where(mask, z, 0.0))
    return Belief(params, x, time, mask, factor, weights, jnp.asarray(rows, jnp.int32), spec)


def _cross(belief: Belief, points: jax.Array, time: jax.Array) -> jax.Array:
    """``L^-1 k``, ``[N + P, M]``."""
    with jax.default_matmul_precision("highest"):
        k = correlation(belief.params, belief.spec, belief.x, belief.time, points, jnp.broadcast_to(time, points.shape[:1]))
        return solve_lower(belief.factor, jnp.where(belief.mask[:, None], k, 0.0))


def predict(belief: Belief, points: jax.Array, time: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance ``[M]`` of the change at inputs ``[M, D]`` over the interval that begins at ``time f[]``.

    RW eqs. 2.25 and 2.26.
    """
    v = _cross(belief, points, time)
    with jax.default_matmul_precision("highest"):
        mean = belief.weights @ v
    floor = float(jnp.finfo(jnp.float32).eps)
    return mean, belief.params.signal * jnp.maximum(1.0 - (v * v).sum(0), floor)


def with_pending(belief: Belief, point: jax.Array, time: jax.Array) -> Belief:
    """The belief with a point ``[D]`` that is being tried: means stay, the variance around it falls.

    GP-BUCB: Desautels, Krause & Burdick, "Parallelizing exploration-exploitation tradeoffs in Gaussian process bandit
    optimization", JMLR 15, 2014, section 3. A rank-one update of L, O(N^2).
    """
    v = _cross(belief, point[None], time)[:, 0]
    row, size = belief.next, belief.mask.size
    pivot = jnp.sqrt(jnp.maximum(1.0 - (v * v).sum(), 0.0) + _noise(belief.params, size))
    return dataclasses.replace(
        belief,
        x=belief.x.at[row].set(point),
        time=belief.time.at[row].set(time),
        mask=belief.mask.at[row].set(True),
        factor=with_row(belief.factor, row, jnp.where(jnp.arange(size) == row, pivot, v)),
        next=row + 1,
    )
