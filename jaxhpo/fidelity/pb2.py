"""Population based bandits: population based training in which a model of progress says where to go.

Parker-Holder, Nguyen & Roberts, "Provably efficient online hyperparameter optimization with population-based bandits",
NeurIPS 2020.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxhpo.core import FRESH, CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.fidelity import bandit
from jaxhpo.fidelity import population as members
from jaxhpo.fidelity.bandit import Belief, Changes
from jaxhpo.fidelity.explore import perturbed, redrawn
from jaxhpo.fidelity.inner import inner_holds, with_larger_inner
from jaxhpo.fidelity.population import Population
from jaxhpo.surrogates.acquisition import upper_confidence
from jaxhpo.surrogates.kernels import inputs_of
from jaxhpo.surrogates.search import maximise, pool_of

_FEWEST = 4  # observations from which the model is asked


@pytree_dataclass
class PB2State:
    """State of :class:`PB2`.

    Attributes:
        population: the members.
        changes: what intervals of training have brought.
        base_loss: ``f32[B]``, the loss at which the interval under way began; infinite at the start of a training.
        base_steps: ``i32[B]``, training steps there.
        inner: state of the inner optimizer.
        spec: static.
    """

    population: Population
    changes: Changes
    base_loss: jax.Array
    base_steps: jax.Array
    inner: Any
    spec: CubeSpec = setting(static=True)


def confidence(beta: jax.Array | float, count: jax.Array) -> jax.Array:
    """The squared number of deviations of the bound after ``count`` observations, growing with its logarithm.

    The growth is that of the regret bounds of Bogunovic et al. 2016, the constants those of the authors' own implementation.
    """
    return beta * (0.2 + jnp.maximum(jnp.log(0.4 * jnp.maximum(count, 1)), 0.0))


@pytree_dataclass
class PB2:
    """Population based bandits: as :class:`PBT` by truncation, but copies train where the model sees most progress.

    Every interval of training that has come to an end is an observation: the point, the time (the training steps at its
    beginning, in intervals) and the change of the loss over the interval. A Gaussian process whose kernel forgets over time
    models them (:mod:`jaxhpo.fidelity.bandit`). A copy takes the point of the highest upper confidence bound of the progress
    in the interval that it begins. The copies of one round choose in turn; the points chosen before and those of all
    other members count as pending, which lowers the variance around them, so that a batch spreads.

    Where PB2 of the paper is silent or other: time is the time of training, so that what a population has learnt serves the
    next one; an interval cut short by the end of training counts by its rate; the first interval of a training has no loss to
    begin from and is no observation; trials that diverged count as the worst change. Integers are modelled and searched on
    their levels. Choices are left to chance, as in PBT: a copy keeps those of its parent but for a redraw with
    ``resample_probability``, and the model, which has a Hamming kernel for them, is asked at these. As long as there are
    fewer than four observations copies explore as in PBT.

    In a study ``interval`` and ``max_steps`` need not be given. In a loop of your own they are due.

    Attributes:
        inner, interval, max_steps, fraction: as of :class:`PBT`.
        window: N, the last observations that the model keeps, at least one for each lane; the time of a round in which
            somebody copies grows with its cube.
        beta: factor on the squared width of the confidence bound, see :func:`confidence`. From a twentieth to 1 it
            made little difference for populations of 8 over 12 intervals in 2 and 4 dimensions.
        forgetting: e, the part that is forgotten in an interval: correlations fall by ``(1 - e)^(1/2)``; None lets the
            likelihood choose between 0.01, 0.1, 0.3 and 0.6.
        perturbation: of floats and integers while the model is not asked.
        resample_probability: of choices.
        num_candidates, num_starts, num_steps: of the search for the highest bound, as of ``BayesOpt``.

    Raises:
        JaxhpoError: as :class:`PBT`.
    """

    inner: Optimizer
    interval: int | None = setting(None, low=1)
    max_steps: int | None = setting(None, low=2)
    fraction: float = setting(0.2, low=0.0, high=0.5)
    window: int = setting(128, static=True, low=4)
    beta: float = setting(1.0, low=0.0)
    forgetting: float | None = setting(None, low=0.0, high=1.0)
    perturbation: float = setting(0.1, low=0.0, high=1.0)
    resample_probability: float = setting(0.25, low=0.0, high=1.0)
    num_candidates: int = setting(128, static=True, low=2)
    num_starts: int = setting(4, static=True, low=2)
    num_steps: int = setting(12, static=True, low=0)

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    @property
    def needs_gradient(self) -> bool:
        return getattr(self.inner, "needs_gradient", False)

    def for_training(self, num_steps: int, round_steps: int) -> PB2:
        return members.filled_in(self, num_steps, round_steps)

    def init(self, key: jax.Array, spec: CubeSpec) -> PB2State:
        members.check(self)
        inner, start = members.first_points(self.inner, key, spec)
        population = members.begin(start, self.interval, self.max_steps)
        changes = bandit.no_changes(max(self.window, self.num_lanes), spec.num_dims)
        base_loss, base_steps = jnp.asarray(population.loss), jnp.asarray(population.steps)
        return PB2State(population, changes, base_loss, base_steps, inner, spec)

    def ask(self, key: jax.Array, state: PB2State) -> Query:
        del key
        return state.population.query

    def update(self, key: jax.Array, state: PB2State, query: Query, feedback: Feedback) -> PB2State:
        key_exploit, key_explore, key_inner = jax.random.split(key, 3)
        done = jnp.asarray(feedback.done)
        population = members.answered(state.population, query, feedback)
        changes = self._observed(state, population, done)
        ended = members.finished(population, done, self.max_steps)
        peers = members.peers(population, ended)
        source = members.truncation(key_exploit, population.loss, peers, self.fraction)
        parent = members.moves(source, population.loss, done, ended)
        inner, population = members.restarted(self.inner, key_inner, state.inner, population, parent, ended, feedback)
        fresh, own = parent == FRESH, jnp.arange(self.num_lanes)
        source = jnp.where(fresh, own, parent)
        base_loss = jnp.where(fresh, jnp.inf, population.loss[source])
        base_steps = jnp.where(fresh, 0, population.steps[source])
        state = PB2State(
            population=members.moved(population, parent, population.cube[source], done, ended, self.interval, self.max_steps),
            changes=changes,
            base_loss=jnp.where(done, base_loss, state.base_loss),
            base_steps=jnp.where(done, base_steps, state.base_steps),
            inner=inner,
            spec=state.spec,
        )
        copies = ~fresh & (parent != own)
        cube = lax.cond(copies.any(), lambda: self._explored(key_explore, state, copies), lambda: state.population.cube)
        return dataclasses.replace(state, population=dataclasses.replace(state.population, cube=cube))

    def holds(self, state: PB2State) -> int:
        """Observations that the inner optimizer's table holds; without limit where it has none."""
        return inner_holds(self.inner, state.inner)

    def enlarged(self, state: PB2State) -> PB2State:
        """The state with a larger table of the inner optimizer, as far as it grows; between updates, for shapes change."""
        return with_larger_inner(self.inner, state)

    def _observed(self, state: PB2State, population: Population, done: jax.Array) -> Changes:
        """The intervals that ended in this round entered: changes of the loss per interval, failures from anywhere."""
        interval = jnp.asarray(self.interval, jnp.float32)
        length = jnp.maximum(population.steps - state.base_steps, 1) / interval
        failed = ~jnp.isfinite(population.loss)
        change = jnp.where(failed, jnp.inf, (population.loss - state.base_loss) / length)
        which = done & (failed | jnp.isfinite(state.base_loss))
        cube = jnp.asarray(state.spec.snap(population.cube))
        return bandit.recorded(state.changes, cube, state.base_steps / interval, change, which)

    def _explored(self, key: jax.Array, state: PB2State, copies: jax.Array) -> jax.Array:
        """New points ``f32[B, D]`` of the lanes ``copies``, which are at those of their parents; the others as they are."""
        spec, cube = state.spec, state.population.cube
        key_choice, key_move, key_lanes = jax.random.split(key, 3)
        kept = redrawn(key_choice, spec, cube, spec.is_choice, self.resample_probability)
        kept = jnp.where(copies[:, None], kept, cube).astype(cube.dtype)
        if spec.is_choice.all():
            return kept
        moved = jnp.where(copies[:, None], perturbed(key_move, spec, kept, self.perturbation), cube)
        few = (state.changes.used & jnp.isfinite(state.changes.change)).sum() < _FEWEST
        return lax.cond(few, lambda: moved, lambda: self._proposed(key_lanes, state, kept, copies))

    def _proposed(self, key: jax.Array, state: PB2State, cube: jax.Array, copies: jax.Array) -> jax.Array:
        """The points of the highest bound, lane after lane; choices are those of ``cube``."""
        spec = state.spec
        belief, beta = self._belief(state)
        time = state.base_steps / jnp.asarray(self.interval, jnp.float32)

        def add(belief: Belief, lane: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> tuple[Belief, jax.Array]:
            number, start, begins, copy = lane

            def found() -> jax.Array:
                lower, upper = (jnp.where(spec.is_choice, start, end) for end in (0.0, 1.0))

                def score(points: jax.Array) -> jax.Array:
                    return upper_confidence(*bandit.predict(belief, inputs_of(spec, points), begins), beta)

                pool = pool_of(jax.random.fold_in(key, number), spec, start[None], lower, upper, self.num_candidates)
                return maximise(score, pool, spec, lower, upper, self.num_starts, self.num_steps)[0].astype(cube.dtype)

            point = lax.cond(copy, found, lambda: start)
            return bandit.with_pending(belief, inputs_of(spec, jnp.asarray(spec.snap(point))), begins), point

        first = jnp.argsort(copies, stable=True)  # those that keep their point first: they are pending
        _, points = lax.scan(add, belief, (first, cube[first], time[first], copies[first]))
        return jnp.zeros_like(cube).at[first].set(points)

    def _belief(self, state: PB2State) -> tuple[Belief, jax.Array]:
        """The model of the changes so far, and the squared width of its bound."""
        changes, spec = state.changes, state.spec
        z, mask = bandit.targets(changes)
        x = inputs_of(spec, changes.cube)
        params = bandit.fit(spec, x, changes.time, z, mask, self.forgetting)
        belief = bandit.condition(params, spec, x, changes.time, z, mask, self.num_lanes)
        return belief, confidence(self.beta, mask.sum())
