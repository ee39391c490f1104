"""Particle swarm optimization for mixed spaces.

    v <- inertia * v + cognitive * r1 * (own best - x) + social * r2 * (leader - x),   x <- x + v

Kennedy & Eberhart, "Particle swarm optimization", ICNN 1995; inertia: Shi & Eberhart, "A modified particle swarm
optimizer", ICEC 1998; constriction: Clerc & Kennedy, "The particle swarm: explosion, stability, and convergence in a
multidimensional complex space", IEEE TEC 6(1), 2002.

Three things are added to it, each because it made searches end lower on most of the development functions (not those
reported: Griewank, Levy, Schwefel, Zakharov, Styblinski-Tang, Dixon-Price, Michalewicz, a rotated ellipsoid in 3, 5, 10
and 30 dimensions with 100 to 12,800 evaluations, and mixed spaces; for small swarms also a cliff of failures). None of
them needs to know how long the search lasts.

- Only some dimensions move, the others are at the own best: crossover, as in Das, Konar & Chakraborty, "Improving
  particle swarm optimization with differentially perturbed velocity", GECCO 2005. Lanes have different rates, from a
  few dimensions at a time (functions that are nearly separable) to all of them (functions that are not).
- A move follows either the swarm's best or the neighbourhood's: a random form of the unification of Parsopoulos &
  Vrahatis, "UPSO: a unified particle swarm optimization scheme", 2004.
- In part of the moves ``r1`` and ``r2`` are the same for all dimensions, which makes those moves rotation invariant.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import Array, CubeSpec, Feedback, Query, pytree_dataclass, setting

_GOLDEN = np.uint32(0x9E3779B9)


@pytree_dataclass
class Swarm:
    """The state of a swarm. It may be cast to float64: moves keep its type.

    Attributes:
        position: ``f32[B, D]``, where each particle is, or will be evaluated next.
        velocity: ``f32[B, D]``, the step that led there.
        best: ``f32[B, D]``, its best point so far, integers and choices at the middle of their level.
        best_loss: ``f32[B]``; infinite as long as every trial of the particle diverged.
        spec: the cube (static).
    """

    position: Array
    velocity: Array
    best: Array
    best_loss: Array
    spec: CubeSpec = setting(static=True)


def _mixed(word: Array, key: Array | int = 0) -> jax.Array:
    """A bijection of 32-bit words in which every input bit flips every output bit about half the time."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B) + jnp.uint32(key)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return jnp.asarray(word ^ (word >> 16))


def random_words(key: jax.Array, counter: Array) -> jax.Array:
    """Random ``u32`` words, one for each value of ``counter``: a hash of it with both words of the key.

    Made like the generator of Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014: a
    sequence of odd step is mixed. A swarm needs many random numbers and little else; ``jax.random`` would take most of
    its time (on a CPU, 8 microseconds for one word for each of 64 particles in 10 dimensions; this takes 0.3).
    """
    data = jax.random.key_data(key).astype(jnp.uint32)
    return _mixed(jnp.asarray(counter, jnp.uint32) * _GOLDEN + data[..., 0], data[..., -1])


def halves(word: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uniform numbers in (0, 1) from each word, of 16 bits each."""
    high, low = (word >> 16).astype(jnp.int32), (word & 0xFFFF).astype(jnp.int32)  # signed: much faster to convert
    return (high.astype(jnp.float32) + 0.5) * np.float32(2.0**-16), (low.astype(jnp.float32) + 0.5) * np.float32(2.0**-16)


def accelerate(
    position: Array,
    velocity: Array,
    best: Array,
    leader: Array,
    random: tuple[Array, Array],
    weights: tuple[Array | float, Array | float, Array | float],
) -> Array:
    """The new velocity ``[B, D]``: inertia, a pull to the own best and one to the leader (Shi & Eberhart 1998, eq. 1).

    Args:
        position, velocity, best, leader: ``[B, D]``.
        random: the uniform numbers of the two pulls, ``[B, D]``.
        weights: inertia, cognitive and social weight.
    """
    inertia, cognitive, social = weights
    r1, r2 = random
    return inertia * velocity + cognitive * r1 * (best - position) + social * r2 * (leader - position)


def constricted(cognitive: Array | float, social: Array | float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Inertia, cognitive and social weight of the constriction rule ``v <- chi * (v + pulls)``.

    Clerc & Kennedy 2002, type 1'' with kappa = 1: ``chi = 2 / (phi - 2 + sqrt(phi^2 - 4 phi))`` with
    ``phi = cognitive + social > 4``. Smaller sums, for which there is no chi, are scaled up to ``phi = 4.1``.
    """
    total = cognitive + social
    phi = jnp.where(total > 4.0, total, 4.1)
    chi = 2.0 / (phi - 2.0 + jnp.sqrt(phi * phi - 4.0 * phi))
    scale = chi * jnp.where(total > 0.0, phi / jnp.where(total > 0.0, total, 1.0), 1.0)
    return chi, scale * cognitive, scale * social


def keep_inside(position: Array, velocity: Array, bounds: str, random: Array) -> jax.Array:
    """Where a step of ``velocity`` leads from ``position`` within the cube, ``[B, D]``; never to rest on a bound.

    ``reflect`` mirrors the overshoot at the bound, ``damp`` stops at a random place between the start and the bound.
    The next velocity is the step that was really taken.
    """
    moved = position + velocity
    if bounds == "reflect":
        return jnp.abs(moved - 2.0 * jnp.round(0.5 * moved))  # a triangle wave of period 2
    stopped = position + random * (jnp.clip(moved, 0.0, 1.0) - position)
    return jnp.where((moved < 0.0) | (moved > 1.0), stopped, moved)


def leaders(best_loss: Array, neighbourhood: str, words: Array, num_informants: int) -> jax.Array:
    """The particle with the lowest best loss in each neighbourhood, ``f32[B] -> i32[B]``; itself if all are infinite.

    ``ring``: the particle and one neighbour on each side. ``random``: the particle and ``num_informants`` drawn anew
    for this move from ``words``, ``u32[B]``. ``global``: the whole swarm.
    """
    lanes = best_loss.shape[0]
    own = jnp.arange(lanes, dtype=jnp.int32)
    if neighbourhood == "global":
        return jnp.where(jnp.isfinite(best_loss.min()), jnp.argmin(best_loss).astype(jnp.int32), own)
    lead, lowest = own, best_loss
    for i in range(2 if neighbourhood == "ring" else num_informants):
        if neighbourhood == "ring":
            other, loss = jnp.roll(own, 1 - 2 * i), jnp.roll(best_loss, 1 - 2 * i)
        else:
            other = (((_mixed(words + np.uint32(i)) >> 16) * np.uint32(lanes)) >> 16).astype(jnp.int32)
            loss = best_loss[other]
        lead, lowest = jnp.where(loss < lowest, other, lead), jnp.minimum(loss, lowest)
    return lead


@pytree_dataclass
class PSO:
    """Particle swarm: each lane is a particle, drawn to its own best point and to a leader's.

    A lane that is done moves at once, whatever its neighbours do. A diverged or infinite trial never becomes a best:
    the particle goes back to its own best and turns round; without one it takes its leader's, and where nobody has
    one, it starts again at a random place.

    Integers are rounded at random in proportion to the distance, so that steps shorter than a level still count;
    choices are drawn from the current option, the own best's and the leader's, by the weights of the velocity
    rule. Both change at random now and then, and an all-discrete particle never asks for its own best again.

    The textbook swarm is ``PSO(num_lanes, 0.7298, 1.49618, 1.49618, neighbourhood="global", crossover_low=1, shared=0)``;
    with ``local=100`` in its place any swarm follows its ring or random neighbourhoods only.

    Attributes:
        num_lanes: B.
        inertia: the part of the velocity that is kept under ``rule="inertia"``.
        cognitive: the pull to the particle's own best.
        social: the pull to its leader.
        local: the chance that a move of a large swarm follows its neighbourhood's best, and not the swarm's; times
            ``1 - 10 / B``, so that up to ten particles are one neighbourhood.
        crossover_low: the chance of each dimension to move, in the first lane; not below ``1 / D`` and ``6 / B``, and one
            moves always.
        crossover_high: the same in the last lane, rising evenly between them; 1 and above is all dimensions.
        shared: the chance that all dimensions of a move share their random numbers.
        mutation: the expected number of random changes to integers and choices in a move.
        rule: ``"inertia"``, or ``"constriction"``, which derives the inertia and a factor on both pulls from their sum.
        neighbourhood: ``"global"``, ``"ring"`` or ``"random"``, see :func:`leaders`.
        num_informants: K of the random neighbourhood.
        bounds: ``"reflect"`` or ``"damp"``, see :func:`keep_inside`.
    """

    num_lanes: int = setting(static=True, low=1)
    inertia: float = setting(0.5, low=0.0, high=1.0)
    cognitive: float = setting(1.5, low=0.0)
    social: float = setting(1.5, low=0.0)
    local: float = setting(0.5, low=0.0)
    crossover_low: float = setting(0.1, low=0.0)
    crossover_high: float = setting(1.0, low=0.0)
    shared: float = setting(0.2, low=0.0, high=1.0)
    mutation: float = setting(0.15, low=0.0)
    rule: str = setting("inertia", static=True, choices=("inertia", "constriction"))
    neighbourhood: str = setting("random", static=True, choices=("global", "ring", "random"))
    num_informants: int = setting(3, static=True, low=1)
    bounds: str = setting("reflect", static=True, choices=("reflect", "damp"))

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> Swarm:
        """Uniform positions; velocities half the way to another uniform point (SPSO 2007)."""
        start, other = jax.random.uniform(key, (2, self.num_lanes, spec.num_dims), jnp.float32)
        position = spec.snap(start)
        return Swarm(position, 0.5 * (other - start), position, jnp.full(self.num_lanes, jnp.inf, jnp.float32), spec)

    def ask(self, key: jax.Array, state: Swarm) -> Query:
        del key
        return Query.fresh(state.position)

    def update(self, key: jax.Array, state: Swarm, query: Query, feedback: Feedback) -> Swarm:
        spec, dtype = state.spec, state.position.dtype
        loss = jnp.where(jnp.isfinite(feedback.loss), feedback.loss, jnp.inf).astype(dtype)  # never better than a best
        better = feedback.done & (loss < state.best_loss)
        best_loss = jnp.where(better, loss, state.best_loss)
        best = jnp.where(better[:, None], spec.snap(query.cube), state.best)
        back = (jnp.isinf(loss) & jnp.isfinite(best_loss))[:, None]
        start, velocity = jnp.where(back, best, state.position), jnp.where(back, -state.velocity, state.velocity)
        position = self._move(key, spec, start, velocity, best, best_loss)
        done = feedback.done[:, None]
        return Swarm(
            jnp.where(done, position.astype(dtype), state.position),
            jnp.where(done, position.astype(dtype) - start, state.velocity),
            best.astype(dtype),
            best_loss,
            spec,
        )

    def _move(self, key: jax.Array, spec: CubeSpec, start: Array, velocity: Array, best: Array, best_loss: Array) -> jax.Array:
        """The next position of every particle, ``[B, D]``."""
        lanes, dims = start.shape
        lane = np.arange(lanes, dtype=np.uint32)
        words = random_words(key, lane)
        follows_local, is_shared = halves(words)
        second = _mixed(words + np.uint32(1))
        first, _ = halves(second)

        lead = leaders(best_loss, "global", words, 0)
        if self.neighbourhood != "global":
            near = leaders(best_loss, self.neighbourhood, second, self.num_informants)
            # A swarm of few particles is one neighbourhood; split up, it would not converge in the time it has.
            lead = jnp.where(follows_local < self.local * max(0.0, 1.0 - 10.0 / lanes), near, lead)
        leader = best[lead]
        own = jnp.isfinite(best_loss)
        led = (own | jnp.isfinite(best_loss[lead]))[:, None]
        target = jnp.where(own[:, None], best, leader)

        # Moves that share their random numbers use those of dimension 0 everywhere.
        counter = (lane[:, None] + 1) * np.uint32(dims) + np.uint32(lanes)
        dim = np.arange(dims, dtype=np.uint32)
        random = random_words(key, counter + jnp.where((is_shared < self.shared)[:, None], np.uint32(0), dim))
        chance, anywhere = halves(_mixed(words[:, None] + dim * _GOLDEN))
        weights = (self.inertia, self.cognitive, self.social) if self.rule == "inertia" else self._constricted()
        step = accelerate(start, velocity, target, leader, halves(random), weights)
        if lanes == 1:  # nothing pulls a leader, and alone it would only come to rest: steps of every length instead
            sign, length = halves(_mixed(random))
            step += jnp.where(sign < 0.5, -1.0, 1.0) * jnp.exp(-9.0 * length)
        moved = keep_inside(start, step, self.bounds, anywhere)

        # Crossover (Das et al. 2005): the dimensions that do not take part are at the own best.
        low = jnp.maximum(self.crossover_low, max(1.0 / dims, min(1.0, 6.0 / lanes)))
        rate = low + (self.crossover_high - low) * np.linspace(0.0, 1.0, lanes, dtype=np.float32)
        forced = dim == jnp.floor(first * dims)[:, None]
        crossed = (chance < rate[:, None]) | forced
        position = jnp.where(led, jnp.where(crossed, moved, target), anywhere)
        if spec.is_float.all():
            return position
        return self._on_levels(key, spec, position, start, target, leader, led, crossed)

    def _constricted(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        return constricted(jnp.asarray(self.cognitive), jnp.asarray(self.social))

    def _on_levels(
        self,
        key: jax.Array,
        spec: CubeSpec,
        moved: Array,
        old: Array,
        target: Array,
        leader: Array,
        led: Array,
        crossed: Array,
    ) -> jax.Array:
        """The moved particles with integers and choices on a level, ``[B, D]``; floats as they are."""
        levels = np.maximum(spec.levels, 1)
        discrete = np.flatnonzero(~spec.is_float)
        counter = np.arange(moved.size, dtype=np.uint32).reshape(moved.shape) + np.uint32(moved.size + sum(moved.shape))
        round_up, mutates = halves(random_words(key, counter))
        pick, size = halves(random_words(key, counter + np.uint32(moved.size)))
        mutated = mutates < self.mutation / discrete.size

        # Integers: to the next level with a chance that grows with the distance from the middle of the own one.
        level = spec.level_of(moved)
        middle = spec.cube_of(level)
        side = jnp.where(moved > middle, 1, -1)
        gap = jnp.abs(spec.cube_of(jnp.clip(level + side, 0, levels - 1)) - middle)
        level = jnp.where(round_up * gap < jnp.abs(moved - middle), level + side, level)
        level = jnp.clip(level, 0, levels - 1)

        # Choices: the current option, the own best's or the leader's.
        weights = [jnp.asarray(x, moved.dtype) for x in (self.inertia, self.cognitive, self.social)]
        total = jnp.maximum(weights[0] + weights[1] + weights[2], 1e-9)
        own_level = spec.level_of(target)
        option = jnp.where(pick * total < weights[0], spec.level_of(old), own_level)
        option = jnp.where(pick * total > weights[0] + weights[1], spec.level_of(leader), option)
        option = jnp.where(crossed, option, own_level)
        level = jnp.where(spec.is_choice & led, option, level)

        if discrete.size == spec.num_dims:  # a point that is known already would teach nothing
            known = jnp.all(jnp.where(mutated, -1, level) == own_level, axis=1, keepdims=True)
            mutated |= known & led & (np.arange(spec.num_dims) == jnp.floor(size[:, :1] * spec.num_dims))
        # A mutation: integers jump by a log-uniform number of levels, turning back at the ends; choices to another option.
        jump = jnp.floor(jnp.exp(size * np.log(np.maximum(levels / 2, 1.0)).astype(np.float32))).astype(jnp.int32)
        jump = jnp.where(round_up < 0.5, -jump, jump)
        jumped = jnp.where((level + jump < 0) | (level + jump >= levels), level - jump, level + jump)
        other = (level + 1 + jnp.floor(size * (levels - 1)).astype(jnp.int32)) % levels
        mutant = jnp.where(spec.is_choice, other, jnp.clip(jumped, 0, levels - 1))
        return jnp.where(spec.is_float, moved, spec.cube_of(jnp.where(mutated, mutant, level)))
