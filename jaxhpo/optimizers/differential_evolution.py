"""Differential evolution for mixed spaces: members move by the differences of others, and a better trial replaces its member.

    v = x_i + F (x_pbest - x_i) + F (x_r1 - x_r2)  ->  u = v and x_i crossed with rate CR  ->  the better of u and x_i

Storn & Price, "Differential evolution: a simple and efficient heuristic", J. Global Optimization 11, 1997. The mutation, its
archive and the repair at bounds: Zhang & Sanderson, "JADE: adaptive differential evolution with optional external archive",
IEEE TEC 13(5), 2009. The memory of F and CR: Tanabe & Fukunaga, "Success-history based parameter adaptation for differential
evolution", CEC 2013 (SHADE), with the mean of CR of their "Improving the search performance of SHADE using linear population
size reduction", CEC 2014.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import Array, CubeSpec, Feedback, Query, pytree_dataclass, setting

_SPREAD = 0.1  # of F and CR around their memory
_ROUNDING = 8.0  # spacings of numbers near 1: a population within is one point


@pytree_dataclass
class DEState:
    """State of :class:`DifferentialEvolution`. It may be cast to float64: trials keep its type.

    Attributes:
        cube: ``f32[B, D]``, the trial of each lane; integers anywhere in their level.
        target: ``i32[B]``, the member that it may replace.
        weight: ``f32[B]``, its F.
        rate: ``f32[B]``, its CR.
        stale: ``bool[B]``, of a population that was given up.
        members: ``f32[P, D]``.
        losses: ``f32[P]``, infinite for those not known and those that failed.
        asked: ``i32[]``, trials handed out of this population; the first P are its members.
        archive: ``f32[P, D]``, members that were replaced, the oldest in turn overwritten (SHADE: a random one).
        archived: ``i32[]``, how many there were.
        memory: ``f32[H, 2]``, of F and CR.
        slot: ``i32[]``, the entry of the memory that is next.
        sums: ``f32[5]``, since the last entry: improvements, and these times F, F^2, CR and CR^2.
        told: ``i32[]``, trials since the last entry.
        waited: ``i32[]``, trials since the last success.
        spec: static.
    """

    cube: jax.Array
    target: jax.Array
    weight: jax.Array
    rate: jax.Array
    stale: jax.Array
    members: jax.Array
    losses: jax.Array
    asked: jax.Array
    archive: jax.Array
    archived: jax.Array
    memory: jax.Array
    slot: jax.Array
    sums: jax.Array
    told: jax.Array
    waited: jax.Array
    spec: CubeSpec = setting(static=True)


def current_to_pbest(own: Array, best: Array, first: Array, second: Array, weight: Array) -> jax.Array:
    """The mutant ``[B, D]``: JADE's current-to-pbest/1 (Zhang & Sanderson 2009), half way to a bound that it crossed.

    Args:
        own, best, first, second: ``[B, D]``, x_i, x_pbest, x_r1, x_r2.
        weight: ``[B]``, F.
    """
    f = weight[:, None]
    mutant = own + f * (best - own) + f * (first - second)
    mutant = jnp.where(mutant < 0.0, 0.5 * own, mutant)
    return jnp.where(mutant > 1.0, 0.5 * (own + 1.0), mutant)


def lehmer(sums: Array, otherwise: Array) -> jax.Array:
    """The weighted Lehmer means of F and CR, ``f32[2]`` (Tanabe & Fukunaga 2014); without successes ``otherwise``."""
    first, second = sums[1::2], sums[2::2]
    mean = second / jnp.where(first > 0.0, first, 1.0)
    return jnp.where(sums[0] > 0.0, mean, otherwise)


@pytree_dataclass
class DifferentialEvolution:
    """Differential evolution whose rates adapt by success (SHADE), each lane at one member at a time.

    Members get trials in turn, whichever lane is free: nobody waits for a generation to end, and a lane that answers late
    competes with what its member has become. The rates' memory takes an entry after each P trials. With all
    lanes done in every round and ``population = num_lanes`` that is SHADE.

    Integers move as floats do and are read at the level in which they lie. A choice takes the option of x_pbest or of x_r1,
    now and then any other; in a space without floats no trial repeats its member. A trial that failed never replaces a member
    and is never among the best; as long as all failed, trials are uniform. A population that has come together in one point or
    one loss, or that had no success for ``patience`` trials a member, is drawn anew.

    Rates and archive are the papers'. The population and the mutation were chosen on a sphere, ellipsoids with optima within
    and at bounds, Levy, Zakharov, Rosenbrock, Griewank and a stand-in for tuning a network, in 10 and 30 dimensions with 480
    to 6400 trials: small populations end lower in few dimensions and trials, larger ones in many.

    Attributes:
        num_lanes: B.
        population: P, at least B; by default ``8 + D``, and not above 64 unless B is.
        memory: H.
        best_share: the greatest share of the population of which one is x_pbest; the least is two members.
        first_weight: F before anything is learned.
        first_rate: CR before anything is learned.
        mutation: the expected number of random changes to choices in a trial.
        patience: trials without success, for each member, before a restart.
    """

    num_lanes: int = setting(static=True, low=1)
    population: int | None = setting(None, static=True, low=4)
    memory: int = setting(6, static=True, low=1)
    best_share: float = setting(0.2, low=0.0, high=1.0)
    first_weight: float = setting(0.5, low=0.01, high=1.0)
    first_rate: float = setting(0.5, low=0.0, high=1.0)
    mutation: float = setting(0.15, low=0.0)
    patience: float = setting(50.0, low=1.0)

    starts_afresh = True

    def population_size(self, num_dims: int) -> int:
        """P."""
        return max(self.num_lanes, self.population or min(8 + num_dims, 64), 4)

    def init(self, key: jax.Array, spec: CubeSpec) -> DEState:
        lanes, dims = self.num_lanes, spec.num_dims
        size = self.population_size(dims)
        members, zero = jax.random.uniform(key, (size, dims), jnp.float32), jnp.zeros((), jnp.int32)
        return DEState(
            cube=members[:lanes],
            target=jnp.arange(lanes, dtype=jnp.int32),
            weight=jnp.zeros(lanes, jnp.float32),
            rate=jnp.zeros(lanes, jnp.float32),
            stale=jnp.zeros(lanes, bool),
            members=members,
            losses=jnp.full(size, jnp.inf, jnp.float32),
            asked=jnp.asarray(lanes, jnp.int32),
            archive=jnp.zeros((size, dims), jnp.float32),
            archived=zero,
            memory=self._first_memory(jnp.float32),
            slot=zero,
            sums=jnp.zeros(5, jnp.float32),
            told=zero,
            waited=zero,
            spec=spec,
        )

    def ask(self, key: jax.Array, state: DEState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: DEState, query: Query, feedback: Feedback) -> DEState:
        key_restart, key_trial = jax.random.split(key)
        done = jnp.asarray(feedback.done)
        met = jnp.asarray(state.spec.snap(query.cube), state.cube.dtype)
        state = dataclasses.replace(state, cube=jnp.where(done[:, None], met, state.cube))
        loss = jnp.where(jnp.isfinite(feedback.loss), feedback.loss, jnp.inf).astype(state.losses.dtype)
        state = self._selected(state, loss, done & ~state.stale)
        state = self._remembered(state)
        state = self._restarted(key_restart, state, done)
        return self._trials(key_trial, state, done)

    def _first_memory(self, dtype: jnp.dtype) -> jax.Array:
        first = jnp.stack([jnp.asarray(x, dtype) for x in (self.first_weight, self.first_rate)])
        return jnp.broadcast_to(first, (self.memory, 2))

    def _selected(self, state: DEState, loss: Array, counts: Array) -> DEState:
        """Members after the lanes that ``counts`` have answered."""
        lanes, size = self.num_lanes, state.losses.shape[0]
        target, before = state.target, state.losses[state.target]
        accepted = counts & jnp.isfinite(loss) & (loss <= before)
        losses = state.losses.at[target].min(jnp.where(accepted, loss, jnp.inf))
        # Of lanes at the same member the lowest loss stays, of equal ones the first lane's.
        wins = accepted & (loss == losses[target])
        winner = jnp.full(size, lanes).at[target].min(jnp.where(wins, np.arange(lanes), lanes))
        replaced = winner < lanes
        members = jnp.where(replaced[:, None], state.cube[jnp.minimum(winner, lanes - 1)], state.members)

        better = accepted & (loss < before) & jnp.isfinite(before)
        leaves = replaced & jnp.isfinite(state.losses) & (losses < state.losses)
        row = jnp.where(leaves, (state.archived + jnp.cumsum(leaves) - 1) % size, size)  # beyond the end: dropped
        gain = jnp.where(better, jnp.minimum(before - jnp.where(better, loss, 0.0), 1e30), 0.0)
        f, cr = state.weight, state.rate
        sums = jnp.stack([(gain * x).sum() for x in (jnp.ones_like(f), f, f * f, cr, cr * cr)])
        heard = counts.sum(dtype=jnp.int32)
        return dataclasses.replace(
            state,
            members=members,
            losses=losses,
            archive=state.archive.at[row].set(state.members, mode="drop"),
            archived=state.archived + leaves.sum(dtype=jnp.int32),
            sums=state.sums + sums,
            told=state.told + heard,
            waited=jnp.where((counts & accepted & (loss < before)).any(), 0, state.waited + heard),
        )

    def _remembered(self, state: DEState) -> DEState:
        """An entry of the memory after each P trials (Tanabe & Fukunaga 2013)."""
        due = state.told >= state.losses.shape[0]
        enters = due & (state.sums[0] > 0.0)
        entry = lehmer(state.sums, state.memory[state.slot])
        memory = state.memory.at[state.slot].set(jnp.where(enters, entry, state.memory[state.slot]))
        return dataclasses.replace(
            state,
            memory=memory,
            slot=jnp.where(enters, (state.slot + 1) % self.memory, state.slot),
            sums=jnp.where(due, 0.0, state.sums),
            told=jnp.where(due, 0, state.told),
        )

    def _restarted(self, key: jax.Array, state: DEState, done: Array) -> DEState:
        """A new population where this one goes nowhere."""
        size, dtype = state.losses.shape[0], state.members.dtype
        known = jnp.isfinite(state.losses).all()
        spread = jnp.max(state.members.max(0) - state.members.min(0))
        joined = known & ((spread < _ROUNDING * jnp.finfo(dtype).eps) | (state.losses.max() == state.losses.min()))
        again = done.any() & (joined | (state.waited > self.patience * size))
        anew = jax.random.uniform(key, state.members.shape, dtype)
        choose = lambda a, b: jnp.where(again, a, b).astype(b.dtype)
        return dataclasses.replace(
            state,
            members=choose(anew, state.members),
            losses=choose(jnp.inf, state.losses),
            stale=state.stale | again,
            asked=choose(0, state.asked),
            archived=choose(0, state.archived),
            memory=choose(self._first_memory(dtype), state.memory),
            sums=choose(0.0, state.sums),
            told=choose(0, state.told),
            waited=choose(0, state.waited),
        )

    def _trials(self, key: jax.Array, state: DEState, done: Array) -> DEState:
        """New trials for the lanes that are done, of the members whose turn it is."""
        spec, dtype = state.spec, state.members.dtype
        (lanes, dims), size = state.cube.shape, state.losses.shape[0]
        key_slot, key_rate, key_who, key_cross, key_forced, key_option = jax.random.split(key, 6)
        number = state.asked + jnp.cumsum(done, dtype=jnp.int32) - 1
        target = number % size
        own = state.members[target]

        # F ~ Cauchy above 0, at most 1; CR ~ a normal, clipped (Tanabe & Fukunaga 2013).
        place, normal = jax.random.uniform(key_slot, (2, lanes), dtype), jax.random.normal(key_rate, (lanes,), dtype)
        middle = state.memory[(place[0] * self.memory).astype(jnp.int32)]
        below = jnp.arctan(-middle[:, 0] / _SPREAD) / math.pi + 0.5  # its mass below 0, which is left out
        weight = middle[:, 0] + _SPREAD * jnp.tan(math.pi * (below + (1.0 - below) * place[1] - 0.5))
        weight = jnp.clip(jnp.where(place[1] < 1.0 - 1e-6, weight, 1.0), 1e-3, 1.0)
        rate = jnp.clip(middle[:, 1] + _SPREAD * normal, 0.0, 1.0)

        who = jax.random.uniform(key_who, (4, lanes), dtype)
        sound = jnp.isfinite(state.losses).sum()
        most = jnp.minimum(2.0, sound) + who[0] * (jnp.maximum(self.best_share * size, 2.0) - 2.0)
        chosen = jnp.minimum((who[1] * jnp.minimum(most, sound)).astype(jnp.int32), size - 1)
        best = state.members[jnp.argsort(state.losses)[chosen]]
        first = (target + 1 + (who[2] * (size - 1)).astype(jnp.int32)) % size
        # x_r2: any but these two, of the members and the archive.
        second = (who[3] * (size - 2 + jnp.minimum(state.archived, size))).astype(jnp.int32)
        low, high = jnp.minimum(target, first), jnp.maximum(target, first)
        other = second + (second >= low)
        other += other >= high
        pool = jnp.concatenate([state.members, state.archive])
        other = jnp.where(second < size - 2, other, second + 2)
        mutant = current_to_pbest(own, best, state.members[first], pool[other], weight)

        uniform = jax.random.uniform(key_cross, (lanes, dims), dtype)
        forced = jax.random.randint(key_forced, (lanes, 1), 0, dims) == np.arange(dims)
        crossed = (uniform < rate[:, None]) | forced
        anywhere = jax.random.uniform(key_option, (3, lanes, dims), dtype)
        if spec.is_choice.any():
            donor = jnp.where(anywhere[0] < 0.5, best, state.members[first])
            mutant = jnp.where(spec.is_choice, donor, mutant)
        trial = jnp.where(crossed, mutant, own)
        if not spec.is_float.all():
            levels = np.maximum(spec.levels, 1)
            level, here = spec.level_of(trial), spec.level_of(own)
            other = (here + 1 + jnp.floor(anywhere[1] * (levels - 1)).astype(jnp.int32)) % levels
            changes = spec.is_choice & (anywhere[2] < self.mutation / max(int(spec.is_choice.sum()), 1))
            if not spec.is_float.any():
                changes |= (level == here).all(1, keepdims=True) & forced
            trial = jnp.where(changes, spec.cube_of(other).astype(dtype), trial)
        trial = jnp.where(sound > 0, trial, anywhere[0])
        trial = jnp.where((number < size)[:, None], own, trial)  # the first trials of a population are its members
        return dataclasses.replace(
            state,
            cube=jnp.where(done[:, None], trial, state.cube).astype(state.cube.dtype),
            target=jnp.where(done, target, state.target),
            weight=jnp.where(done, weight, state.weight),
            rate=jnp.where(done, rate, state.rate),
            stale=state.stale & ~done,
            asked=state.asked + done.sum(dtype=jnp.int32),
        )
