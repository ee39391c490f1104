"""CMA-ES: a Gaussian whose mean, step size and covariance follow the ranks of its samples, for mixed spaces.

    x = m + sigma y, y ~ N(0, C)  ->  rank  ->  m, sigma and C towards the better samples, away from the worse

Equation numbers are those of Hansen, "The CMA evolution strategy: a tutorial", arXiv:1604.00772, 2016, with negative weights
for the worse half (active CMA). What is added to it:

- separable: only the diagonal of C, for many dimensions; Ros & Hansen, "A simple modification in CMA-ES achieving linear
  time and space complexity", PPSN 2008.
- restarts with twice the population (IPOP): Auger & Hansen, "A restart CMA evolution strategy with increasing population
  size", CEC 2005.
- integers keep a least chance of each neighbouring level: Hamano, Saito, Nomura & Shirakawa, "CMA-ES with margin", GECCO 2022.
- choices have a categorical distribution that follows the same ranks: Hamano, Saito, Nomura, Uchida & Shirakawa, "CatCMA",
  GECCO 2024; its rate adapts as in Akimoto, Shirakawa, Yoshinari, Uchida, Saito & Nishida, "Adaptive stochastic natural
  gradient method for one-shot neural architecture search", ICML 2019.
- the size of both margins, and the steps of integers that are told: Hamano, Nomura, Saito, Uchida & Shirakawa, "CatCMA with
  margin", arXiv:2504.07884, 2025.
- late answers are taken in as external solutions: Hansen, "Injecting external solutions into CMA-ES", arXiv:1110.4181, 2011.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.core import Array, CubeSpec, Feedback, Query, pytree_dataclass, setting
from jaxhpo.optimizers.cma_distributions import (
    Categories,
    Gaussian,
    adapted,
    even_categories,
    rates_of,
    weights_by_rank,
    with_margin,
    with_options,
)
from jaxhpo.optimizers.local import reflected

STALE = -1
"""The age of a sample whose distribution was given up by a restart."""

_DRAWS = 8  # samples of which the one with the fewest floats outside the cube is kept
_TOL_X_UP, _MOST_CONDITION = 1e4, 1e14


@pytree_dataclass
class CMAESState:
    """State of :class:`CMAES`. It may be cast to float64: samples keep its type.

    Attributes:
        cube: ``f32[B, D]``, the sample of each lane.
        step: ``f32[B, N]``, its step from the mean of now in units of the sigma of now, as drawn: neither reflected nor
            rounded.
        age: ``i32[B]``, generations since it was drawn; :data:`STALE` if the run was given up meanwhile.
        steps: ``f32[M, N]``, samples of this generation that have answered, in the first ``count`` rows.
        options: ``i32[M, C]``, their choices.
        losses: ``f32[M]``, infinite for failures.
        late: ``bool[M]``, drawn from an older generation.
        count: ``i32[]``.
        population: ``i32[]``, lambda: answers due for a generation.
        gaussian: of the floats and integers; one dimension that nothing reads where there are none.
        categories: of the choices.
        recent: ``f32[H]``, the best losses of the last generations, infinite where there are none yet.
        best: ``f32[]``, the lowest loss of this run.
        best_at: ``i32[]``, its generation.
        spec: static.
    """

    cube: jax.Array
    step: jax.Array
    age: jax.Array
    steps: jax.Array
    options: jax.Array
    losses: jax.Array
    late: jax.Array
    count: jax.Array
    population: jax.Array
    gaussian: Gaussian
    categories: Categories
    recent: jax.Array
    best: jax.Array
    best_at: jax.Array
    spec: CubeSpec = setting(static=True)


@pytree_dataclass
class CMAES:
    """CMA-ES with active weights, restarts, and integers and choices of their own.

    A generation ends with the round in which its last answer arrives, and all answers since the last one are ranked: with all
    lanes done in every round that is the textbook's algorithm. A lane that is done earlier gets another sample of the same
    distribution, so that nobody waits for a slow one. A late answer counts in the generation in which it arrives, as a step
    from the mean of then, no longer than samples hardly ever are (Hansen 2011): it was drawn near where the search has come
    from, and its loss is as true as any. Only the answers to samples from before a restart are dropped.

    Of eight samples a lane gets the one with the fewest floats outside the cube, and these are reflected for the evaluation
    alone: the search sees an even, periodic function, whose optima at a bound are optima within, and needs no penalty. (Told
    reflected steps, a search with optima at many bounds shrinks too early; without the choice among eight it begins slowly.)
    Integers are read at the level in which the sample lies. A failure is ranked last and never pulls the mean; a generation
    that failed as a whole is a restart elsewhere.

    The run ends, and another one starts at a uniform point with twice the population, when steps no longer change the mean
    (NoEffectAxis, NoEffectCoord), steps or losses are below tolerance (TolX, TolFun, EqualFunValues), C is singular
    (ConditionCov; float32 cannot tell that of a full C), sigma explodes (TolXUp; tutorial, section B.3), or no better loss was
    found for ``120 + 30 N / population + 0.2 t`` of t generations.

    All rates are the papers'. How bounds are met was chosen on a sphere, ellipsoids with optima within and at bounds, Levy,
    Zakharov, Rosenbrock and Griewank in 10 and 30 dimensions with 16 lanes. The margins of CatCMA with margin, and the steps
    that it is told, did better than those of CMA-ES with margin on two mixed problems and an ellipsoid on a grid, and no worse
    on a stand-in for tuning a network and waves over integers.

    Attributes:
        num_lanes: B.
        population: answers due for a generation at first, at least B; by default the least multiple of B that is not below
            ``4 + 3 log D`` (eq. 48).
        sigma: the first step size, in units of the cube.
        active: factor on the negative weights: 1 is active CMA, 0 ignores the worse half.
        tol_x: TolX, relative to ``sigma``.
        tol_fun: TolFun.
        separable: only a diagonal C: time and memory are linear in D, and dependencies between dimensions are not learned.
            The full C costs ``D^3`` operations a generation.
        max_doublings: how many times restarts double the population, for which the table has room.
    """

    num_lanes: int = setting(static=True, low=1)
    population: int | None = setting(None, static=True, low=2)
    sigma: float = setting(0.3, low=1e-6, high=10.0)
    active: float = setting(1.0, low=0.0, high=1.0)
    tol_x: float = setting(1e-12, low=0.0)
    tol_fun: float = setting(1e-12, low=0.0)
    separable: bool = setting(False, static=True, choices=(False, True))
    max_doublings: int = setting(4, static=True, low=0, high=10)

    starts_afresh = True

    def first_population(self, num_dims: int) -> int:
        """Lambda of the first run."""
        least = self.population or 4 + math.floor(3.0 * math.log(num_dims))
        return self.num_lanes * -(-least // self.num_lanes) if self.population is None else max(least, self.num_lanes)

    def init(self, key: jax.Array, spec: CubeSpec) -> CMAESState:
        """The mean in the middle of the cube, all options equally likely."""
        lanes, size = self.num_lanes, max(int((~spec.is_choice).sum()), 1)
        population, counts = self.first_population(spec.num_dims), spec.levels[spec.is_choice]
        rows = (population << self.max_doublings) + lanes
        history = 10 + math.ceil(30 * size / population)
        state = CMAESState(
            cube=jnp.zeros((lanes, spec.num_dims), jnp.float32),
            step=jnp.zeros((lanes, size), jnp.float32),
            age=jnp.zeros(lanes, jnp.int32),
            steps=jnp.zeros((rows, size), jnp.float32),
            options=jnp.zeros((rows, counts.size), jnp.int32),
            losses=jnp.full(rows, jnp.inf, jnp.float32),
            late=jnp.zeros(rows, bool),
            count=jnp.zeros((), jnp.int32),
            population=jnp.asarray(population, jnp.int32),
            gaussian=Gaussian.start(jnp.full(size, 0.5, jnp.float32), self.sigma, self.separable),
            categories=even_categories(counts, jnp.float32),
            recent=jnp.full(history, jnp.inf, jnp.float32),
            best=jnp.asarray(jnp.inf, jnp.float32),
            best_at=jnp.zeros((), jnp.int32),
            spec=spec,
        )
        return self._sampled(key, state, jnp.ones(lanes, bool))

    def ask(self, key: jax.Array, state: CMAESState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: CMAESState, query: Query, feedback: Feedback) -> CMAESState:
        done = jnp.asarray(feedback.done)
        key_sample, key_restart = jax.random.split(key)
        state = self._told(self._met(state, state.spec.snap(query.cube), done), jnp.asarray(feedback.loss), done)
        state = lax.cond(state.count >= state.population, lambda: self._next_generation(key_restart, state), lambda: state)
        return self._sampled(key_sample, state, done)

    def _met(self, state: CMAESState, cube: Array, done: Array) -> CMAESState:
        """The points that were evaluated, ``f32[B, D]``. One that was not asked for is an external solution (Hansen 2011).

        Of the images of such a point under the reflection at the bounds the one nearest the mean counts.
        """
        spec, gaussian = state.spec, state.gaussian
        cube = jnp.asarray(cube, state.cube.dtype)
        foreign = done & (cube != state.cube).any(axis=1)
        step, dims = state.step, np.flatnonzero(~spec.is_choice)
        if dims.size:
            x, mean = cube[:, dims].astype(gaussian.mean.dtype), gaussian.mean
            same, turned = x + 2 * jnp.round((mean - x) / 2), -x + 2 * jnp.round((mean + x) / 2)
            nearest = jnp.where(jnp.abs(same - mean) <= jnp.abs(turned - mean), same, turned)
            place = jnp.where(spec.is_float[dims], nearest, x)
            exact = (place - mean) / (gaussian.sigma * gaussian.margin)
            step = jnp.where(foreign[:, None], exact.astype(step.dtype), step)
        return dataclasses.replace(
            state,
            cube=jnp.where(done[:, None], cube, state.cube),
            step=step,
            age=jnp.where(foreign, jnp.maximum(state.age, 1), state.age),
        )

    def _told(self, state: CMAESState, loss: Array, done: Array) -> CMAESState:
        """The answers of the lanes that are done entered into the table."""
        counts = done & (state.age != STALE)
        row = jnp.where(counts, state.count + jnp.cumsum(counts) - 1, state.losses.size)  # beyond the end: dropped
        loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf).astype(state.losses.dtype)
        options = state.spec.level_of(state.cube)[:, state.spec.is_choice]
        return dataclasses.replace(
            state,
            steps=state.steps.at[row].set(self._centred(state), mode="drop"),
            options=state.options.at[row].set(options, mode="drop"),
            losses=state.losses.at[row].set(loss, mode="drop"),
            late=state.late.at[row].set(state.age > 0, mode="drop"),
            count=state.count + counts.sum(dtype=jnp.int32),
        )

    def _next_generation(self, key: jax.Array, state: CMAESState) -> CMAESState:
        """The distributions after the answers in the table, or a new run; the table empty."""
        spec, old = state.spec, state.gaussian
        rows, size = state.steps.shape
        used = jnp.arange(rows) < state.count
        rates = rates_of(state.count, rows, size, self.separable, self.active, old.mean.dtype)
        weights = weights_by_rank(rates.weights, state.losses, used)
        new = adapted(old, rates, jnp.where(used[:, None], state.steps, 0.0), weights, state.late)
        least = 1.0 - 0.73 ** (1.0 / max(int((~spec.is_float).sum()), 1))  # Hamano et al. 2025: alpha
        ints = np.flatnonzero(spec.is_int & (spec.levels > 1))
        if ints.size:
            new = with_margin(new, *self._edges(spec, new.mean, ints), least)
        categories, counts = state.categories, spec.levels[spec.is_choice]
        if counts.size:
            categories = with_options(categories, counts, state.options, weights, least)

        best, worst = state.losses.min(), jnp.where(used, state.losses, -jnp.inf).max()
        recent = jnp.roll(state.recent, 1).at[0].set(best)
        better = best < state.best
        best_at = jnp.where(better, new.generation, state.best_at)
        failed = jnp.isinf(best)
        ends = failed | self._is_over(spec, new, recent, worst, new.generation - best_at, state.population)
        largest = self.first_population(spec.num_dims) << self.max_doublings
        fresh = Gaussian.start(
            jax.random.uniform(key, old.mean.shape, old.mean.dtype), jnp.asarray(self.sigma, old.mean.dtype), self.separable
        )
        # Lanes under way: the same points as steps from the new mean.
        rebased = (state.step - (new.mean - old.mean) / old.sigma) * (old.sigma / new.sigma)
        choose = lambda a, b: jnp.where(ends, a, b).astype(jnp.asarray(b).dtype)
        return dataclasses.replace(
            state,
            step=choose(0.0, rebased),
            age=jnp.where(ends | (state.age == STALE), STALE, state.age + 1),
            losses=jnp.full_like(state.losses, jnp.inf),
            count=jnp.zeros_like(state.count),
            population=jnp.where(ends & ~failed, jnp.minimum(2 * state.population, largest), state.population),
            gaussian=jax.tree.map(choose, fresh, new),
            categories=jax.tree.map(choose, even_categories(counts, old.mean.dtype), categories),
            recent=choose(jnp.inf, recent),
            best=choose(jnp.inf, jnp.minimum(best, state.best)),
            best_at=choose(0, best_at),
        )

    def _centred(self, state: CMAESState) -> jax.Array:
        """The steps of the lanes ``f32[B, N]``; integers that were not at the mean's level lead to the middle of theirs.

        So a level counts in full however far the margin stretched the step (Hamano et al. 2025).
        """
        spec, gaussian = state.spec, state.gaussian
        ints = np.flatnonzero(spec.is_int & (spec.levels > 1))
        if not ints.size:
            return state.step
        dims = np.flatnonzero(~spec.is_choice)
        mean = jnp.zeros(spec.num_dims, gaussian.mean.dtype).at[dims].set(gaussian.mean)
        moved = (spec.level_of(state.cube) != spec.level_of(mean))[:, ints]
        places = np.searchsorted(dims, ints)
        exact = (state.cube[:, ints] - mean[ints]) / (gaussian.sigma * gaussian.margin[places])
        return state.step.at[:, places].set(jnp.where(moved, exact, state.step[:, places]))

    def _edges(self, spec: CubeSpec, mean: Array, ints: np.ndarray) -> tuple[tuple[Array, Array], np.ndarray]:
        """The edges beside the mean's level for integers, which are dimensions ``ints`` of the cube; their places in it."""
        dims = np.flatnonzero(~spec.is_choice)
        level = spec.level_of(jnp.zeros(spec.num_dims, mean.dtype).at[dims].set(mean))
        last = np.maximum(spec.levels - 2, 0)  # edge j lies between the levels j and j + 1
        low, high = (spec.cube_of(jnp.clip(edge, 0, last) + 0.5)[ints].astype(mean.dtype) for edge in (level - 1, level))
        return (low, high), np.searchsorted(dims, ints)

    def _is_over(
        self, spec: CubeSpec, new: Gaussian, recent: Array, worst: Array, waited: Array, population: Array
    ) -> jax.Array:
        """The criteria for a restart, ``bool[]``."""
        size, dtype = new.mean.shape[0], new.mean.dtype
        spread = jnp.max(recent) - jnp.min(recent)  # infinite or NaN as long as the history is not full
        flat = (spread == 0.0) | ((spread < self.tol_fun) & (worst - jnp.min(recent) < self.tol_fun))
        stuck = waited > 120.0 + 30.0 * size / population + 0.2 * new.generation
        if spec.is_choice.all():
            return flat | stuck
        deviation = new.sigma * jnp.sqrt(new.variances)
        steps = jnp.maximum(deviation, new.sigma * jnp.abs(new.path_c))
        small = jnp.all(steps < self.tol_x * self.sigma)
        wild = new.sigma * jnp.max(new.scales) > _TOL_X_UP * self.sigma
        singular = jnp.max(new.scales) > math.sqrt(_MOST_CONDITION) * jnp.min(new.scales)
        idle = jnp.any(new.mean == new.mean + (0.2 * deviation).astype(dtype))
        if new.cov.ndim == 2:
            axis = new.generation % size
            idle |= jnp.all(new.mean == new.mean + 0.1 * new.sigma * new.scales[axis] * new.basis[:, axis])
        return flat | stuck | small | wild | singular | idle

    def _sampled(self, key: jax.Array, state: CMAESState, wanted: Array) -> CMAESState:
        """New samples for the lanes ``wanted``."""
        spec, gaussian = state.spec, state.gaussian
        lanes, dtype = self.num_lanes, gaussian.mean.dtype
        key_normal, key_option = jax.random.split(key)
        cube = state.cube
        ordered, choices = np.flatnonzero(~spec.is_choice), np.flatnonzero(spec.is_choice)
        is_float = spec.is_float[ordered] if ordered.size else np.zeros(1, bool)
        draws = jax.random.normal(key_normal, (_DRAWS, lanes, gaussian.mean.shape[0]), dtype)
        steps = gaussian.coloured(draws)
        places = gaussian.mean + gaussian.margin * gaussian.sigma * steps  # eq. 40
        outside = (is_float & ((places < 0.0) | (places > 1.0))).sum(-1)
        which = jnp.argmin(outside, axis=0), np.arange(lanes)
        step, x = steps[which], places[which]
        if ordered.size:
            inside = jnp.where(is_float, reflected(x), jnp.clip(x, 0.0, 1.0))
            cube = cube.at[:, ordered].set(inside.astype(cube.dtype))
        if choices.size:
            place = jax.random.uniform(key_option, (lanes, choices.size, 1), dtype)
            option = (jnp.cumsum(state.categories.chance, axis=1) <= place).sum(-1)
            option = jnp.minimum(option, spec.levels[choices] - 1)
            middle = (option + 0.5) / spec.levels[choices]
            cube = cube.at[:, choices].set(middle.astype(cube.dtype))
        return dataclasses.replace(
            state,
            cube=jnp.where(wanted[:, None], spec.snap(cube), state.cube).astype(state.cube.dtype),
            step=jnp.where(wanted[:, None], step, state.step),
            age=jnp.where(wanted, 0, state.age),
        )
