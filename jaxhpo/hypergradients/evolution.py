"""Gradients of a smoothed metric by random perturbations of the hyperparameters: no derivative of the training is taken.

Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation graphs with persistent evolution
strategies", 2021 (PES); Vicol, Kolter and Swersky, "Low-variance gradient estimation in unrolled computation graphs with
ES-Single", 2023.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxhpo.core import Array, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients.estimate import Assemble, Estimate, Floats, score, start, steps_from, trained, value_and_grad
from jaxhpo.tasks.task import Task, Training

_PERTURBATIONS = 2  # stream below the key of a training; 0 and 1 are those of its init and of its steps
_WINDOWS = 10  # windows of a training where the user chooses no truncation


@pytree_dataclass
class Evolution:
    """The gradient of a metric smoothed over perturbed hyperparameters, from finite differences in random directions.

    For trainings that are chaotic (``gauge/growth`` of ``Unrolled`` above 4) and metrics without a derivative, such as an
    accuracy. Takes ``2 num_pairs + 1`` trainings, in memory that does not grow with the steps. The noise of the estimate
    grows with the number of hyperparameters: the squared relative error is about their number by ``num_pairs``.

    A perturbation ``e`` of independent standard normal numbers moves each float ``x``, with ``s`` its scale, to

        x + sigma s e             or, for the names in ``log``,             x exp(sigma s e)

    The target ``f`` is the metric after the last step (``"final"``), or the mean of the metrics after each window of
    ``truncation`` steps (``"mean"``). The estimate is unbiased for the derivative by ``x`` of ``F(x) = E f``, where ``s`` is
    held at its value and the expectation is over ``e``:

    - ``"es"``: one ``e`` for the whole training, so ``F`` is ``f`` smoothed by a Gaussian (log-normal for ``log``).
    - ``"pes"``: a fresh ``e`` in each window, with which the finite difference of each metric is multiplied summed over all
      windows so far (algorithm 2 of Vicol, Metz and Sohl-Dickstein): ``F`` is the mean over trainings whose
      hyperparameters jump from window to window around ``x``. ``init`` has those of the first window, ``evaluate`` those of
      the window that it ends.
    - ``"es_single"``: one ``e`` for the training, one finite difference a window. It was made for hyperparameters that are
      updated after each window; here they are held for a whole training, and it is the same estimate as ``"es"``.

    In a study the floats are moves in the cube instead, zero at the point asked for, so ``sigma`` is in units of the cube
    and neither ``log`` nor ``scale`` is needed; what would leave the bounds stays on them. At a bound half of
    each pair does, so that this component of the gradient comes out at half its size, of the right sign.

    If ``f`` is quadratic in what is perturbed, ``F`` has the gradient of ``f``. Let ``f`` be linear, with derivatives ``c_k``
    by the perturbations of the windows ``k`` of ``K``. The variance of one pair of ``"es"`` is then about the number of
    floats times ``|sum of c_k|^2``; ``"pes"`` with ``"final"`` has ``K sum of |c_k|^2`` in the place of the square: as much
    if all windows contribute alike, ``K`` times as much if one does all. There only the last finite difference counts, and
    the perturbations of windows that the metric has forgotten are noise in it: prefer ``"es"``, or ``"pes"`` with
    ``"mean"``.

    Both trainings of a pair, moved by ``e`` and by ``-e``, have the key of the unperturbed one, whose metrics are returned:
    those after the last step, whatever the target. A pair of which a metric of the target is not finite is left out of
    the mean, which is then unbiased only for the perturbations that train; without any pair the gradient is NaN.
    Beside the task's metrics are ``gauge/lost_pairs``, how many were left out, and ``gauge/standard_error``, the norm of
    the standard error of the mean over pairs, divided by the norm of the gradient, both in units of ``s`` (by ``log x`` for
    ``log``): above 1 the estimate is mostly noise; infinite if fewer than two pairs are left.

    Attributes:
        task: what is trained.
        num_steps: ``T``, steps of the training.
        metric: which metric is differentiated; any that the task reports.
        method: ``"es"``, ``"pes"`` or ``"es_single"``.
        target: ``"final"`` or ``"mean"``.
        num_pairs: ``N``, antithetic pairs of trainings.
        pairs_at_once: pairs trained side by side; None for all. Fewer take less memory.
        truncation: steps in a window; the last one may be shorter. None for a tenth of the training, rounded up.
        sigma: standard deviation of the perturbation, in scales. The rounding errors of the metric are divided by it.
        log: dotted names of the floats whose logarithm is perturbed, as it should be for learning rates and all that must
            keep its sign; they must not be zero.
        scale: what a perturbation of 1 is, by dotted name: a number, or an array that broadcasts to the float. For the
            names in ``log`` a factor's logarithm, else in units of the float. By default 1 for ``log``, and else the root
            mean square of the float, or 1 if it is zero. Nothing keeps a float inside its domain but its scale: give
            one where an edge is nearer than that, such as ``{"momentum": 0.1}`` at 0.9.

    Raises:
        JaxhpoError: if ``log`` or ``scale`` names what is no float, there is no float, or the task lacks the metric.
    """

    task: Task
    num_steps: int = setting(static=True, low=1)
    metric: str = setting("loss", static=True)
    method: str = setting("es", static=True, choices=("es", "pes", "es_single"))
    target: str = setting("final", static=True, choices=("final", "mean"))
    num_pairs: int = setting(16, static=True, low=1)
    pairs_at_once: int | None = setting(None, static=True)
    truncation: int | None = setting(None, static=True)
    sigma: Array | float = setting(0.1, low=1e-6)
    log: tuple[str, ...] = setting((), static=True)
    scale: Any = dataclasses.field(default=None, hash=False)  # a dict, and yet the whole can be given to jit as a function

    moves_in_cube = True  # a study perturbs the point in the cube, where every hyperparameter has the same scale and bounds

    @property
    def training(self) -> Training:
        return Training(self.task, self.num_steps)

    def check(self, floats: Floats, assemble: Assemble) -> None:
        """Refuses names in ``log`` and ``scale`` that are no floats, settings out of range and metrics that are not reported.

        Raises:
            JaxhpoError: with their names.
        """
        if not floats:
            raise JaxhpoError("Evolution: none of the hyperparameters is a float, and only floats are perturbed")
        for field, names in (("log", self.log), ("scale", self.scale or {})):
            for name in names:
                if name not in floats:
                    raise JaxhpoError(f"{field}: there is no float {name!r} among the hyperparameters: {', '.join(floats)}")
        for field in ("pairs_at_once", "truncation"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise JaxhpoError(f"{field} = {value!r}: must be a whole number of at least 1, or None")

        def reported(task: Task, floats: Floats) -> Array:
            hparams = assemble(floats)
            return score(task, self.metric, hparams, start(task, jax.random.key(0), hparams))[0]

        jax.eval_shape(reported, self.task, floats)

    @property
    def _window(self) -> int:
        if self.target == "final" and self.method != "pes":
            return self.num_steps  # nothing happens between
        return min(self.truncation or -(-self.num_steps // _WINDOWS), self.num_steps)

    def _scales(self, floats: Floats) -> Floats:
        given = self.scale or {}
        found = {}
        for name, x in floats.items():
            if name in given:
                found[name] = jnp.broadcast_to(jnp.asarray(given[name], x.dtype), x.shape)
            elif name in self.log:
                found[name] = jnp.ones_like(x)
            else:
                size = jnp.sqrt(jnp.mean(x**2))
                found[name] = jnp.full_like(x, jnp.where(size > 0, size, 1))
        return found

    def _moved(self, floats: Floats, by: Floats) -> Floats:
        """Floats moved by a perturbation in their own scales."""
        moved = {name: x * jnp.exp(by[name]) if name in self.log else x + by[name] for name, x in floats.items()}
        return {name: moved[name].astype(x.dtype) for name, x in floats.items()}

    def _slope(self, key: Array, floats: Floats, assemble: Assemble, pair: Array) -> Floats:
        """The estimate of one antithetic pair, by the perturbation in units of ``scale``; not finite if the pair is lost."""
        persistent = self.method == "pes"
        pair_key = jax.random.fold_in(jax.random.fold_in(key, _PERTURBATIONS), pair)
        scales = self._scales(floats)
        length = self._window
        whole, rest = divmod(self.num_steps, length)
        windows = whole + (rest > 0)

        centre, unravel = ravel_pytree(floats)

        def perturbation(window: Array | int) -> Floats:
            return unravel(jax.random.normal(jax.random.fold_in(pair_key, window), centre.shape, centre.dtype))

        first = perturbation(0)
        current = lambda window: perturbation(window) if persistent else first

        def hparams(sign: Array, e: Floats) -> Any:
            return assemble(self._moved(floats, {name: sign * self.sigma * scales[name] * e[name] for name in floats}))

        signs = jnp.asarray([1.0, -1.0])

        def difference(states: Any, e: Floats) -> Array:
            plus, minus = jax.vmap(lambda sign, state: score(self.task, self.metric, hparams(sign, e), state)[0])(signs, states)
            return (plus - minus) / (2 * self.sigma)

        def advance(carry: Any, window: Array | int, count: int = length) -> tuple[Any, None]:
            states, total, slope = carry
            e = current(window)
            total = jax.tree.map(operator.add, total, e) if persistent else e
            steps = lambda sign, state: steps_from(self.task, key, hparams(sign, e), state, window * length, count)
            states = jax.vmap(steps)(signs, states)
            if self.target == "mean":
                rise = difference(states, e) / windows
                slope = {name: slope[name] + (rise * total[name]).astype(slope[name].dtype) for name in floats}
            return (states, total, slope), None

        zero = {name: jnp.zeros(x.shape, x.dtype) for name, x in floats.items()}
        states = jax.vmap(lambda sign: start(self.task, key, hparams(sign, first)))(signs)
        carry, _ = lax.scan(advance, (states, zero, zero), jnp.arange(whole))
        if rest:
            carry, _ = advance(carry, whole, rest)
        states, total, slope = carry
        if self.target == "mean":
            return dict(slope)
        rise = difference(states, current(windows - 1))
        return {name: (rise * total[name]).astype(x.dtype) for name, x in floats.items()}

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        hparams = assemble(floats)
        state = trained(self.task, key, hparams, self.num_steps)
        _, metrics = score(self.task, self.metric, hparams, state)

        one = lambda pair: self._slope(key, floats, assemble, pair)
        at_once = min(self.pairs_at_once or self.num_pairs, self.num_pairs)
        pairs = jnp.arange(self.num_pairs)
        slopes = jax.vmap(one)(pairs) if at_once == self.num_pairs else lax.map(one, pairs, batch_size=at_once)
        slope, gauges = mean_of_pairs(slopes)

        # Chain rule: what a perturbation of 1 moves the float by, at the centre.
        scales = self._scales(floats)
        moves = {name: scales[name] * x if name in self.log else scales[name] for name, x in floats.items()}
        return Estimate(metrics | gauges, {name: slope[name] / moves[name] for name in floats})

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        """The metric and its gradient in the shape of ``hparams``, None in place of what is no float; to be jitted."""
        return value_and_grad(self, key, hparams)


def mean_of_pairs(slopes: Floats) -> tuple[Floats, dict[str, Array]]:
    """The mean over the pairs ``[N, ...]`` that are finite, and the gauges of what it is worth.

    NaN if no pair is finite.
    """
    finite = [jnp.isfinite(x.reshape(x.shape[0], -1)).all(1) for x in slopes.values()]
    kept = jnp.stack(finite).all(0)  # [N]
    count = kept.sum()

    def mean(x: Array) -> Array:
        total = jnp.where(kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0).sum(0)
        return total / jnp.where(count > 0, count, jnp.nan).astype(x.dtype)

    means = {name: mean(x) for name, x in slopes.items()}
    # Divided by the largest, so that no square overflows.
    sizes = [jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), 0), initial=0.0) for x in slopes.values()]
    largest = jnp.stack(sizes).max()
    unit = jnp.where(largest > 0, largest, 1)
    squares = {name: mean(((x - means[name]) / unit) ** 2) for name, x in slopes.items()}  # variances, by N and not N - 1
    variance = sum(x.sum() for x in squares.values()) / jnp.maximum(count - 1, 1)
    norm = jnp.sqrt(sum(jnp.sum((x / unit) ** 2) for x in means.values()))
    error = jnp.sqrt(variance)
    relative = jnp.where(count < 2, jnp.inf, jnp.where(error == 0, 0.0, error / norm))
    return means, {
        "gauge/lost_pairs": (kept.shape[0] - count).astype(jnp.float32),
        "gauge/standard_error": relative.astype(jnp.float32),
    }
