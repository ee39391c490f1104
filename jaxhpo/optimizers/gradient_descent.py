"""Hypergradient descent: an optimizer of optax on every lane, along the gradient of the loss by the hyperparameters.

Bengio, "Gradient-based optimization of hyperparameters", Neural Computation 12, 2000; Maclaurin, Duvenaud & Adams,
"Gradient-based hyperparameter optimization through reversible learning", ICML 2015.

    feedback -> best of the life -> has the life ended? -> a new start, from a design or an explorer
                                          |
                                          no -> clipped gradient in search coordinates -> optax -> next point
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxhpo.core import Array, CubeSpec, Feedback, Optimizer, Query, UnfitDimensions, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.optimizers.sobol import scrambled_sobol, sobol_points

COORDINATES = ("cube", "unconstrained")

_ENDS = 1e-4  # how close unconstrained coordinates come to the ends of the cube
_MOST_SOBOL = 1000  # dimensions; beyond, few points fill nothing evenly, and direction numbers take seconds
_LARGEST = 1e37  # the reciprocal of a larger float32 is no normal number
_LEAST_SCALE = 1 / 16  # of a lane's learning rate: in noise lanes would else restart until they stand still
_NEARBY = 0.02  # standard deviation of a restart around the best point, in cube units


@pytree_dataclass
class Design:
    """Where lanes begin without an explorer, and where they begin again.

    Attributes:
        points: ``f32[N, D]``, the first trials.
        grad: ``f32[N, D]``, their gradients in search coordinates.
        loss: ``f32[N]``; infinite for a point that is not known, that failed, or from which a lane has started.
        next: ``i32[]``, the next point to give out.
        row: ``i32[B]``, the point that each lane is at; N once it descends.
        best: ``f32[D]``, the best point so far that had a gradient.
        best_loss: ``f32[]``; infinite before the first.
        scale: ``f32[B]``, factor on the learning rate of each lane.
    """

    points: Array
    grad: Array
    loss: Array
    next: Array
    row: Array
    best: Array
    best_loss: Array
    scale: Array


@pytree_dataclass
class DescentState:
    """State of :class:`HypergradientDescent`; F of the D dimensions are floats.

    Attributes:
        cube: ``f32[B, D]``, the point of each lane.
        position: ``f32[B, F]``, its floats in search coordinates.
        descent: state of the optax optimizer, each leaf with a leading B.
        best: ``f32[B, D]``, the best point of the lane's life, its start as long as no loss was finite.
        best_loss: ``f32[B]``; infinite before the first finite loss of the life.
        stalled: ``i32[B]``, trials of the life since the last improvement.
        design: starts without an explorer, else None.
        explorer: state of the explorer, if there is one.
        spec: static.
    """

    cube: Array
    position: Array
    descent: Any
    best: Array
    best_loss: Array
    stalled: Array
    design: Design | None
    explorer: Any
    spec: CubeSpec = setting(static=True)


def clipped(grad: Array, length: Array | float) -> Array:
    """Gradients ``f32[B, F]`` shortened to a norm of at most ``length``; 0 leaves them as they are.

    The norm is taken so that it does not overflow before the gradient itself does.
    """
    bounded = jnp.clip(grad, -_LARGEST, _LARGEST)
    largest = jnp.max(jnp.abs(bounded), axis=-1, keepdims=True, initial=0.0)
    scaled = bounded / jnp.where(largest > 0, largest, 1.0)
    norm = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    too_long = (length > 0) & (largest * norm > length)
    return jnp.where(too_long, scaled * (length / jnp.where(norm > 0, norm, 1.0)), grad)


def _pick(which: Array, new: Any, old: Any) -> Any:
    """The rows ``which``, ``bool[B]``, of a tree from ``new``, the others from ``old``, in the types of ``old``."""

    def one(new: Array, old: Array) -> Array:
        mask = which.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(mask, new.astype(old.dtype), old)

    return jax.tree.map(one, new, old)


def _has_nan(tree: Any) -> Array:
    """Whether there is a NaN in a row of a tree, ``bool[B]``."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    found = [jnp.isnan(x).reshape(x.shape[0], -1).any(1) for x in leaves]
    return jnp.stack(found).any(0) if found else jnp.asarray(False)


@pytree_dataclass
class HypergradientDescent:
    """Gradient descent by the hyperparameters: each lane goes its own way, and begins anew where that way has ended.

    A lane moves after each of its trials, by the gradient that came with the loss. Its life ends where it diverged (the loss
    or the gradient is not finite) or where ``patience`` trials brought no improvement.

    Without an explorer the first trials are an even design: the middle of the cube, then scrambled Sobol points (beyond
    1000 dimensions uniform ones in the middle half). Each lane then descends from another one of the best of them; as their
    gradients are known, it begins with a step. A lane whose life has ended begins again near the best point of all, with
    half its learning rate. With ``num_lanes=1, num_initial=1`` it is plain descent from the middle.

    With an explorer, an optimizer of as many lanes, that one proposes where each life begins, integers and choices
    included, which the lane then keeps. When the life ends the explorer is told its best loss, at the point where it was
    found: the explorer searches the landscape of what descent makes of a start.

    Defaults chosen on shifted spheres, ellipsoids, Rosenbrock, Levy, Zakharov and Hartmann-6 in 5 to 10 dimensions, 8 lanes
    and 320 trials, losses of standard deviation one over the cube: a patience of 5 ends lower than 10 on all of them, with
    noise on half; rates of 0.03 and 0.1 are close to 0.05, 0.2 is worse; clips and first trials matter by a factor of 3.

    Attributes:
        optimizer: called with a learning rate, gives a ``GradientTransformation`` of optax, one for each lane.
        learning_rate: in search coordinates.
        num_lanes: B.
        coordinates: ``"cube"``, steps projected onto ``[0, 1]``; ``"unconstrained"``, the logit of the cube coordinate,
            kept ``1e-4`` of the cube away from the ends. In the middle a unit of it is a quarter of the cube.
        clip: longest gradient, the norm over all floats in search coordinates; 0 does not clip. Hypergradients explode
            where training is nearly unstable, and one of them would fill an optimizer's memory for long.
        patience: trials without improvement that end a life.
        num_initial: trials of the first design, at least one for every lane; nothing descends before they are answered.
        explorer: an optimizer that proposes where lives begin.
        start: ``f32[D]``, the first point of the design instead of the middle of the cube; ``space.encode`` gives it.

    Raises:
        JaxhpoError: by ``init`` for integers and choices without an explorer (:class:`jaxhpo.core.UnfitDimensions`), by
            ``update`` for feedback without a gradient.
    """

    optimizer: Callable[..., optax.GradientTransformation] = setting(optax.adam, static=True)
    learning_rate: float = setting(0.05, low=0.0)
    num_lanes: int = setting(8, static=True, low=1)
    coordinates: str = setting("cube", static=True, choices=COORDINATES)
    clip: float = setting(1.0, low=0.0)
    patience: int = setting(5, low=1)
    num_initial: int = setting(16, static=True, low=1)
    explorer: Any = None
    start: Any = None

    starts_afresh = True
    needs_gradient = True

    def init(self, key: jax.Array, spec: CubeSpec) -> DescentState:
        self._check(spec)
        key_init, key_ask = jax.random.split(key)
        if self.explorer is None:
            design, explorer = self._first_design(key_init, spec.num_dims), None
            start = design.points[: self.num_lanes]
        else:
            design, explorer = None, self.explorer.init(key_init, spec)
            start = self.explorer.ask(key_ask, explorer).cube
        position = self._position(start[:, spec.is_float])
        cube = self._cube(spec, start, position)
        return DescentState(
            cube=cube,
            position=position,
            descent=self._fresh(position),
            best=cube,
            best_loss=jnp.full(self.num_lanes, jnp.inf, jnp.float32),
            stalled=jnp.zeros(self.num_lanes, jnp.int32),
            design=design,
            explorer=explorer,
            spec=spec,
        )

    def ask(self, key: jax.Array, state: DescentState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: DescentState, query: Query, feedback: Feedback) -> DescentState:
        del query
        if feedback.grad is None:
            raise JaxhpoError(
                "HypergradientDescent: the objective gives no gradients; use jaxhpo.hypergradients.Unrolled(task, num_steps) "
                "or another estimator of hypergradients"
            )
        done = jnp.asarray(feedback.done)
        loss = jnp.where(done & jnp.isfinite(feedback.loss), feedback.loss, jnp.inf).astype(state.best_loss.dtype)
        grad, sound = self._search_gradient(state, feedback.grad, done & jnp.isfinite(loss))
        better = loss < state.best_loss
        state = dataclasses.replace(
            state,
            best=_pick(better, state.cube, state.best),
            best_loss=jnp.where(better, loss, state.best_loss),
            stalled=jnp.where(done, jnp.where(better, 0, state.stalled + 1), state.stalled),
        )
        ended = done & (~sound | (state.stalled >= self.patience))
        if state.design is None:
            return self._stepped(self._explored(key, state, feedback, ended), loss, grad, done & ~ended)
        return self._stepped(*self._designed(key, state, state.design, loss, grad, sound, done, ended))

    def holds(self, state: DescentState) -> int:
        """Observations that the table of the explorer holds, one for each life; without limit where there is none."""
        return self.explorer.holds(state.explorer) if hasattr(self.explorer, "holds") else np.iinfo(np.int32).max

    def enlarged(self, state: DescentState) -> DescentState:
        """The state with a larger table of the explorer, as far as it grows; between updates, for shapes change."""
        explorer = self.explorer.enlarged(state.explorer) if hasattr(self.explorer, "enlarged") else state.explorer
        return state if explorer is state.explorer else dataclasses.replace(state, explorer=explorer)

    def _check(self, spec: CubeSpec) -> None:
        if self.start is not None and (self.explorer is not None or np.shape(self.start) != (spec.num_dims,)):
            raise JaxhpoError(
                f"HypergradientDescent: start of shape {np.shape(self.start)}: a point of the cube, ({spec.num_dims},), "
                "is due, without an explorer"
            )
        if not callable(self.optimizer) or isinstance(self.optimizer, optax.GradientTransformation):
            raise JaxhpoError(
                "HypergradientDescent: optimizer must be a function of the learning rate: optax.adam, not optax.adam(0.1)"
            )
        if not spec.is_float.any():
            raise UnfitDimensions(
                range(spec.num_dims), "gradients lead through floats only, and there are none: use another optimizer"
            )
        if self.explorer is None and not spec.is_float.all():
            raise UnfitDimensions(
                np.flatnonzero(~spec.is_float).tolist(),
                "integers and choices have no gradient: use another optimizer, or HypergradientDescent(explorer=...), which "
                "holds them fixed on each lane",
            )
        if self.explorer is not None and (isinstance(self.explorer, type) or not isinstance(self.explorer, Optimizer)):
            raise JaxhpoError(
                f"HypergradientDescent: explorer = {self.explorer!r}: an optimizer such as TPE(num_lanes=8) is due"
            )
        if getattr(self.explorer, "needs_gradient", False):
            raise JaxhpoError("HypergradientDescent: explorer: one that needs no gradients is due; it is told losses alone")
        if self.explorer is not None and self.explorer.num_lanes != self.num_lanes:
            raise JaxhpoError(
                f"HypergradientDescent: explorer.num_lanes = {self.explorer.num_lanes}: must be num_lanes = {self.num_lanes}"
            )

    # Coordinates.

    def _position(self, cube: Array) -> Array:
        """Search coordinates of floats of the cube."""
        if self.coordinates == "cube":
            return cube
        inside = jnp.clip(cube, _ENDS, 1.0 - _ENDS)
        return jnp.log(inside) - jnp.log1p(-inside)

    def _projected(self, position: Array) -> Array:
        if self.coordinates == "cube":
            return jnp.clip(position, 0.0, 1.0)
        most = math.log(1.0 / _ENDS - 1.0)
        return jnp.clip(position, -most, most)

    def _cube(self, spec: CubeSpec, cube: Array, position: Array) -> Array:
        """Points of the cube with the floats of ``position``, integers and choices of ``cube``."""
        floats = position if self.coordinates == "cube" else jax.nn.sigmoid(position)
        return floats if spec.is_float.all() else jnp.asarray(cube).at[:, np.flatnonzero(spec.is_float)].set(floats)

    def _search_gradient(self, state: DescentState, grad: Array, usable: Array) -> tuple[Array, Array]:
        """Clipped gradients ``f32[B, F]`` in search coordinates, 0 where there is none, and where there is one."""
        floats = state.spec.is_float
        grad, place = (x if floats.all() else x[:, np.flatnonzero(floats)] for x in (jnp.asarray(grad), state.cube))
        grad = grad.astype(state.position.dtype)
        usable = usable & jnp.isfinite(grad).all(1)
        grad = jnp.where(usable[:, None], grad, 0.0)
        if self.coordinates == "unconstrained":
            grad = grad * place * (1.0 - place)  # d cube / d logit
        return clipped(grad, self.clip), usable

    # Descent.

    def _fresh(self, position: Array) -> Any:
        return jax.vmap(lambda position: self.optimizer(jnp.asarray(self.learning_rate, position.dtype)).init(position))(
            position
        )

    def _stepped(self, state: DescentState, loss: Array, grad: Array, moves: Array) -> DescentState:
        """One step of optax on the lanes ``moves``; one that is not finite is not taken."""
        scale = 1.0 if state.design is None else state.design.scale
        rate = jnp.broadcast_to(jnp.asarray(self.learning_rate * scale, state.position.dtype), moves.shape)

        def one(rate: Array, loss: Array, grad: Array, descent: Any, position: Array) -> tuple[Array, Any]:
            step, descent = optax.with_extra_args_support(self.optimizer(rate)).update(grad, descent, position, value=loss)
            return self._projected(jnp.asarray(optax.apply_updates(position, step))), descent

        position, descent = jax.vmap(one)(rate, loss, grad, state.descent, state.position)
        moves = moves & ~_has_nan((position, descent))
        return dataclasses.replace(
            state,
            cube=_pick(moves, self._cube(state.spec, state.cube, position), state.cube),
            position=_pick(moves, position, state.position),
            descent=_pick(moves, descent, state.descent),
        )

    # Lives.

    def _begun(self, state: DescentState, which: Array, start: Array) -> DescentState:
        """New lives of the lanes ``which`` at ``f32[B, D]``."""
        spec = state.spec
        position = self._position(start if spec.is_float.all() else start[:, np.flatnonzero(spec.is_float)])
        cube = self._cube(spec, start, position)
        return dataclasses.replace(
            state,
            cube=_pick(which, cube, state.cube),
            position=_pick(which, position, state.position),
            descent=_pick(which, self._fresh(position.astype(state.position.dtype)), state.descent),
            best=_pick(which, cube, state.best),
            best_loss=jnp.where(which, jnp.inf, state.best_loss),
            stalled=jnp.where(which, 0, state.stalled),
        )

    def _explored(self, key: jax.Array, state: DescentState, feedback: Feedback, ended: Array) -> DescentState:
        """The explorer is told of the lives that ended and gives those lanes their next start."""
        key_update, key_ask = jax.random.split(key)
        loss = jnp.where(ended & jnp.isfinite(state.best_loss), state.best_loss, jnp.nan)
        told = Feedback(loss, ended, feedback.steps)
        explorer = self.explorer.update(key_update, state.explorer, Query.fresh(state.best), told)
        start = self.explorer.ask(key_ask, explorer).cube
        return self._begun(dataclasses.replace(state, explorer=explorer), ended, start)

    def _first_design(self, key: jax.Array, num_dims: int) -> Design:
        rows = max(self.num_initial, self.num_lanes)
        if rows > 1 and num_dims <= _MOST_SOBOL:
            others = sobol_points(*scrambled_sobol(key, num_dims), jnp.arange(rows - 1, dtype=jnp.int32))
        else:
            others = jax.random.uniform(key, (rows - 1, num_dims), jnp.float32, 0.25, 0.75)
        first = jnp.clip(jnp.asarray(0.5 if self.start is None else self.start, jnp.float32), 0.0, 1.0)
        points = jnp.concatenate([jnp.broadcast_to(first, (1, num_dims)), others])
        return Design(
            points=points,
            grad=jnp.zeros_like(points),
            loss=jnp.full(rows, jnp.inf, jnp.float32),
            next=jnp.asarray(self.num_lanes, jnp.int32),
            row=jnp.arange(self.num_lanes, dtype=jnp.int32),
            best=points[0],
            best_loss=jnp.asarray(jnp.inf, jnp.float32),
            scale=jnp.ones(self.num_lanes, jnp.float32),
        )

    def _designed(
        self,
        key: jax.Array,
        state: DescentState,
        design: Design,
        loss: Array,
        grad: Array,
        sound: Array,
        done: Array,
        ended: Array,
    ) -> tuple[DescentState, Array, Array, Array]:
        """Lanes at a point of the design get the next one, or descend from one of the best; those that ended begin again.

        Returns:
            the state; the loss, the gradient and whether to move, lane by lane.
        """
        rows = design.loss.shape[0]
        at_design = done & (design.row < rows)
        row = jnp.where(at_design, design.row, rows)  # beyond the last: dropped
        losses = jnp.asarray(design.loss).at[row].set(jnp.where(sound, loss, jnp.inf), mode="drop")
        grads = jnp.asarray(design.grad).at[row].set(grad, mode="drop")
        ranked = jnp.where(sound, loss, jnp.inf)
        lane = jnp.argmin(ranked)
        better = ranked[lane] < design.best_loss
        best = jnp.where(better, state.cube[lane], design.best)
        best_loss = jnp.where(better, ranked[lane], design.best_loss)

        following = design.next + jnp.cumsum(at_design, dtype=jnp.int32) - 1
        goes_on = at_design & (following < rows)
        starts = at_design & ~goes_on
        # The best point left for the first of the lanes that start, the second best for the second.
        first = jnp.argsort(losses)[jnp.maximum(jnp.cumsum(starts) - 1, 0)]
        known = losses[first]
        starts_well = starts & jnp.isfinite(known)

        again = (ended & ~at_design) | (starts & ~starts_well)
        key_near, key_far = jax.random.split(key)
        step = _NEARBY * design.scale[:, None] * jax.random.normal(key_near, state.cube.shape, state.cube.dtype)
        near = jnp.clip(best + step, 0.0, 1.0)
        far = jax.random.uniform(key_far, state.cube.shape, state.cube.dtype)
        start = jnp.where(jnp.isfinite(best_loss), near, far)  # anywhere, as long as every trial failed
        start = jnp.where(again[:, None], start, design.points[jnp.where(goes_on, following, first)])

        state = self._begun(state, goes_on | starts_well | again, start)
        design = Design(
            points=design.points,
            grad=grads,
            loss=losses.at[jnp.where(starts_well, first, rows)].set(jnp.inf, mode="drop"),
            next=design.next + goes_on.sum(dtype=jnp.int32),
            row=jnp.where(goes_on, following, jnp.where(at_design, rows, design.row)),
            best=best,
            best_loss=best_loss,
            scale=jnp.where(
                ended & ~at_design & jnp.isfinite(best_loss), jnp.maximum(0.5 * design.scale, _LEAST_SCALE), design.scale
            ),
        )
        best_of_life = jnp.where(starts_well, known, state.best_loss)
        state = dataclasses.replace(state, best_loss=best_of_life, design=design)
        loss, grad = jnp.where(starts_well, known, loss), _pick(starts_well, grads[first], grad)
        return state, loss, grad, starts_well | (done & ~at_design & ~ended)
