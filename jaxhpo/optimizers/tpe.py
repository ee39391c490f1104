"""The multivariate tree-structured Parzen estimator (TPE) for mixed spaces.

    split the observations by their loss -> l, a density of the good ones, and g, of the bad ones
    -> draw candidates from l -> the one with the highest l / g

Bergstra, Bardenet, Bengio & Kegl, "Algorithms for hyper-parameter optimization", NeurIPS 2011: the ratio is monotone in
the expected improvement (section 4). Each component of a density is a product of kernels over the dimensions, centred at
one observation: Falkner, Klein & Hutter, "BOHB: robust and efficient hyperparameter optimization at scale", ICML 2018.
The parts and their names: Watanabe, "Tree-structured Parzen estimator: understanding its algorithm components and their
roles for better empirical performance", arXiv:2304.11127, 2023.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp, ndtri

from jaxhpo.core import Array, CubeSpec, Feedback, Query, pytree_dataclass, setting
from jaxhpo.optimizers.sobol import InitialDesign, given_out, initial_design

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)
_TINY = 1e-37  # above the smallest normal float32: keeps logarithms finite
_THIN = 0.02  # standard deviations; over a narrower interval the density is taken as flat
_MOST_KERNELS = 100.0  # of which the lowest bandwidth takes notice
_LANE_SHARE = 0.3  # of the good observations' mean bandwidth: how wide a lane under way is
_LAST = np.iinfo(np.int32).max
_COUNTED = 1 << 16  # points of a discrete space, up to which those not asked yet are listed


@pytree_dataclass
class Kernels:
    """``K`` products of kernels over the dimensions, made by :func:`kernels_at`.

    Attributes:
        centre: ``f32[K, D]``, integers and choices at the middle of their level.
        bandwidth: ``f32[K, D]``, in units of the cube; for a choice the chance that its label is drawn anew.
        log_scale: ``f32[K]``, log of the factor that makes the density integrate to one.
    """

    centre: jax.Array
    bandwidth: jax.Array
    log_scale: jax.Array


@pytree_dataclass
class Mixture:
    """A density over the cube: weighted kernels and a uniform prior.

    Attributes:
        kernels: the ``K`` components.
        log_weight: ``f32[K]``, ``-inf`` for a component that is not in use.
        log_prior: ``f32[]``, log weight of the prior.
    """

    kernels: Kernels
    log_weight: jax.Array
    log_prior: jax.Array


def _normal_cdf(z: Array) -> jax.Array:
    return 0.5 * lax.erfc(-math.sqrt(0.5) * z)


def _log_normal_mass(low: Array, high: Array) -> jax.Array:
    """Log of the standard normal's mass between ``low`` and ``high``, precise in both tails and for thin intervals."""
    middle, width = 0.5 * (low + high), high - low
    low, high = jnp.where(middle > 0, -high, low), jnp.where(middle > 0, -low, high)  # below 0 the cdf keeps its digits
    wide = jnp.log(jnp.maximum(_normal_cdf(high) - _normal_cdf(low), _TINY))
    thin = jnp.log(jnp.maximum(width, _TINY)) - 0.5 * middle**2 - _LOG_ROOT
    return jnp.where(width < _THIN, thin, wide)


def _level_edges(spec: CubeSpec, cube: Array) -> tuple[jax.Array, jax.Array]:
    """Where the level of each coordinate begins and ends, twice ``[..., D]``."""
    level = spec.level_of(cube).astype(cube.dtype)
    return spec.cube_of(level - 0.5), spec.cube_of(level + 0.5)


def kernels_at(spec: CubeSpec, centre: Array, bandwidth: Array) -> Kernels:
    """Kernels around centres ``f32[K, D]`` with bandwidths ``f32[K, D]``.

    Floats have the density of a Gaussian truncated to [0, 1]; integers the mass of the same Gaussian between the edges of
    their level; choices the kernel of Aitchison & Aitken, Biometrika 63, 1976, with ``1 - b`` for the same of ``k`` labels
    and ``b / (k - 1)`` for any other, where ``b = bandwidth * (k - 1) / k``.
    """
    scale = -_log_normal_mass(-centre / bandwidth, (1.0 - centre) / bandwidth)
    scale -= jnp.where(spec.is_float, jnp.log(bandwidth) + _LOG_ROOT, 0.0)
    return Kernels(jnp.asarray(centre), jnp.asarray(bandwidth), jnp.where(spec.is_choice, 0.0, scale).sum(-1))


def log_kernels(spec: CubeSpec, kernels: Kernels, x: Array) -> jax.Array:
    """Log of each kernel ``f32[M, K]`` at points ``f32[M, D]``, whose integers and choices lie anywhere in their level."""
    floats, ints, choices = (np.flatnonzero(kind) for kind in (spec.is_float, spec.is_int, spec.is_choice))
    centre, width = kernels.centre, kernels.bandwidth
    total = jnp.broadcast_to(kernels.log_scale, (x.shape[0], centre.shape[0]))
    if floats.size:
        z = (x[:, None, floats] - centre[:, floats]) / width[:, floats]
        total -= 0.5 * (z * z).sum(-1)
    if ints.size:
        low, high = ((edge[:, None, ints] - centre[:, ints]) / width[:, ints] for edge in _level_edges(spec, x))
        total += _log_normal_mass(low, high).sum(-1)
    if choices.size:
        anew = width[:, choices] / spec.levels[choices].astype(np.float32)
        same = spec.level_of(x)[:, None, choices] == spec.level_of(centre)[:, choices]
        total += jnp.log(jnp.where(same, 1.0 - width[:, choices] + anew, anew)).sum(-1)
    return total


def _log_uniform(spec: CubeSpec, x: Array) -> jax.Array:
    """Log of the uniform density at each point, ``f32[M]``; the mass of a level for integers and choices."""
    low, high = _level_edges(spec, x)
    return jnp.log(jnp.where(spec.is_float, 1.0, high - low)).sum(-1)


def log_density(spec: CubeSpec, mixture: Mixture, x: Array) -> jax.Array:
    """Log density ``f32[M]`` at ``f32[M, D]``: per unit of each float, and the mass of the level of the others."""
    return _log_mixed(log_kernels(spec, mixture.kernels, x), mixture.log_weight, mixture.log_prior + _log_uniform(spec, x))


def _log_mixed(log_kernels: Array, log_weight: Array, log_prior: Array) -> jax.Array:
    return jnp.logaddexp(logsumexp(log_kernels + log_weight, axis=1), log_prior)


def draw(key: jax.Array, spec: CubeSpec, mixture: Mixture, num_points: int) -> jax.Array:
    """Independent points ``f32[M, D]`` of a mixture, integers and choices at the middle of their level.

    The random numbers do not depend on the number of components.
    """
    centre, rows = mixture.kernels.centre, mixture.log_weight.size
    dtype = centre.dtype
    key_which, key_place, key_label = jax.random.split(key, 3)
    place = jax.random.uniform(key_place, (num_points, spec.num_dims), dtype)
    below = jnp.cumsum(jnp.exp(mixture.log_weight)) <= jax.random.uniform(key_which, (num_points, 1), dtype)
    which = below.sum(-1)  # beyond the components: the prior
    mean, width = (x[jnp.minimum(which, rows - 1)] for x in (centre, mixture.kernels.bandwidth))
    low, high = _normal_cdf(-mean / width), _normal_cdf((1.0 - mean) / width)
    x = jnp.clip(mean + width * ndtri(low + place * (high - low)), 0.0, 1.0)
    if spec.is_choice.any():
        anew = jax.random.uniform(key_label, place.shape, dtype) < width
        x = jnp.where(spec.is_choice, jnp.where(anew, place, mean), x)
    return jnp.asarray(spec.snap(jnp.where((which == rows)[:, None], place, x)))


def neighbour_gaps(points: Array, used: Array) -> jax.Array:
    """The distance to the farther of the two neighbours in each dimension, ``f32[K, D]``; 0 where not ``used``.

    The outermost points have one neighbour each; for a point alone it is the farther bound. Points within
    ``2 K / 2^30`` of each other may be taken in either order, so that each may get the gap of the other.
    """
    count = used.sum(dtype=jnp.int32)
    place = jnp.where(used[:, None], points, 1.0)
    # One integer holds the place and, below, the index: XLA sorts those twenty times faster on a CPU than pairs with a float.
    index_bits = max(points.shape[0] - 1, 1).bit_length()
    scaled = (place * (1 << (30 - index_bits))).astype(jnp.int32) + ~used[:, None]  # those not in use come last
    index = lax.broadcasted_iota(jnp.int32, points.shape, 0)
    keys = (scaled << index_bits) + index
    order = lax.sort(keys, dimension=0, is_stable=False) & ((1 << index_bits) - 1)
    place = jnp.take_along_axis(place, order, axis=0)
    steps = jnp.where(index[1:] < count, jnp.abs(place[1:] - place[:-1]), 0.0)
    steps = jnp.pad(steps, ((1, 1), (0, 0)))
    gaps = jnp.where(count > 1, jnp.maximum(steps[:-1], steps[1:]), jnp.maximum(place, 1.0 - place))
    gaps = jnp.zeros_like(points).at[order, jnp.arange(points.shape[1])].set(gaps)
    return jnp.where(used[:, None], gaps, 0.0)


def bandwidths(spec: CubeSpec, points: Array, used: Array, clip: Array | float, scott_factor: Array | float = 0.0) -> jax.Array:
    """The bandwidths ``f32[K, D]`` of a mixture of the points ``f32[K, D]`` that are ``used``, ``bool[K]``.

    Floats and integers: :func:`neighbour_gaps` (Bergstra et al. 2011, section 4.2) within ``clip / min(n + 2, 100)`` and 1
    for ``n`` points, which is Watanabe's magic clipping (2023, section 3.3) with a factor, and at least
    ``scott_factor`` times Scott's rule, ``deviation * n^(-1 / (D + 4))`` ("Multivariate density estimation", Wiley, 1992,
    section 6.3), with the deviation of the points in the cube, unweighted, and D of all dimensions; an integer also reaches
    half its level. Choices: ``k / (k + n)`` for ``k`` labels, so that a few observations leave every label likely and many do
    not.
    """
    count = used.sum().astype(points.dtype)
    some = jnp.maximum(count, 1.0)
    mean = jnp.where(used[:, None], points, 0.0).sum(0) / some
    deviation = jnp.sqrt(jnp.where(used[:, None], (points - mean) ** 2, 0.0).sum(0) / some)
    scott = deviation * some ** (-1.0 / (spec.num_dims + 4))
    lowest = jnp.maximum(clip / jnp.minimum(count + 2.0, _MOST_KERNELS), scott_factor * scott)
    width = jnp.clip(neighbour_gaps(points, used), lowest, 1.0)
    if spec.is_float.all():
        return width
    low, high = _level_edges(spec, points)
    width = jnp.where(spec.is_int, jnp.maximum(width, 0.5 * (high - low)), width)
    labels = np.maximum(spec.levels, 1).astype(np.float32)
    return jnp.where(spec.is_choice, labels / (labels + count), width)


def repeated(spec: CubeSpec, x: Array, others: Array, used: Array) -> jax.Array:
    """Whether all levels of a point ``[M, D]`` are those of one of the others ``[K, D]`` that are ``used``, ``bool[M]``."""
    same = spec.level_of(x)[:, None, :] == spec.level_of(others)
    return (same.all(-1) & used).any(-1)


def untried(key: jax.Array, spec: CubeSpec, others: Array, used: Array, otherwise: Array) -> jax.Array:
    """A random point ``f32[D]`` of a discrete space that is none of the others ``[K, D]``; ``otherwise`` if there is none.

    Beyond ``2^16`` points in the space it is one at random.
    """
    levels = spec.levels
    size = math.prod(levels.tolist())
    if size > _COUNTED:
        return jnp.asarray(spec.snap(jax.random.uniform(key, (spec.num_dims,), others.dtype)))
    stride = np.cumprod([1, *levels[:-1]]).astype(np.int32)
    number = jnp.where(used, (spec.level_of(others) * stride).sum(-1), size)
    taken = jnp.zeros(size, bool).at[number].set(True, mode="drop")
    chosen = jnp.argmax(jnp.where(taken, -1.0, jax.random.uniform(key, (size,), jnp.float32)))
    return jnp.where(taken.all(), otherwise, spec.cube_of((chosen // stride) % levels).astype(others.dtype))


@pytree_dataclass
class TPEState:
    """State of :class:`TPE`. Its table of ``N`` observations may be enlarged by :meth:`TPE.enlarged`.

    Attributes:
        cube: ``f32[B, D]``, the proposals.
        points: ``f32[N, D]``, observed points, integers and choices at the middle of their level.
        loss: ``f32[N]``, infinite for a trial that diverged and in rows that are free.
        number: ``i32[N]``, the how many-th observation it was; -1 in rows that are free.
        told: ``i32[]``, observations so far, also those that the table has lost.
        design: what is left of the initial design.
        spec: static.
    """

    cube: jax.Array
    points: jax.Array
    loss: jax.Array
    number: jax.Array
    told: jax.Array
    design: InitialDesign
    spec: CubeSpec = setting(static=True)


@pytree_dataclass
class TPE:
    """Multivariate tree-structured Parzen estimator.

    After ``num_initial`` scrambled Sobol points a lane that is done gets the best of ``num_candidates`` draws from the
    density ``l`` of good observations, by the ratio of ``l`` to the density ``g`` of the others. Good are the best
    ``quantile`` of all observations, weighted by rank as in the CMA-ES (Hansen & Ostermeier, Evol. Comput. 9, 2001), so
    that only the order of losses counts. A trial that diverged is never good. Lanes under way, and those refilled before
    in the same update, count as bad, with 0.3 of the mean bandwidth of the good. In spaces without floats no point is asked
    for again after the initial design while there are others.

    The defaults are for losses that change smoothly over the space. Losses of single trainings are noisy: there narrow
    densities creep from one lucky point to the next, and after some hundred trials many points are asked for only because
    they are far from all others. For many single trainings, as within ``ASHA``, take
    ``equal_prior=True, scott_factor=1.0, clip_good=1.0``; where a thousand and more are begun, also ``max_good=100``, lest
    the good ones be none but the luckiest.

    A table of fixed size holds the observations. ``minimize`` and ``pure_study`` make it as large as they need, twice as
    large each time, up to ``max_capacity``; in a loop of your own call ``state = optimizer.enlarged(state)`` between updates
    when ``optimizer.holds(state)`` is reached. Where it is full, new observations take the place of the oldest bad ones.

    Attributes:
        num_lanes: B.
        num_initial: scrambled Sobol points before the densities are used.
        num_candidates: draws from ``l`` for each lane.
        max_good: good observations at most.
        capacity: observations that the first table holds, rounded up to a power of two; each larger table compiles anew.
        max_capacity: observations for which it grows, rounded up alike.
        quantile: share of good observations.
        prior_weight: weight of the uniform prior in ``l`` and ``g``, in observations.
        equal_prior: once there are good and bad observations, give the prior the same share of ``g`` as of ``l``, so that
            their ratio is 1 where nothing was observed, and let a lane under way weigh as much in ``g`` as a good observation
            in ``l``. Without, the prior's share of ``g`` falls with the bad observations: the more there are, the more often
            a point is asked for because it is far from all of them.
        clip_good, clip_bad: factor on the lowest bandwidth of floats and integers, see :func:`bandwidths`.
        scott_factor: their lowest bandwidth in units of Scott's rule, in ``l`` and ``g``; 0 for none.
    """

    num_lanes: int = setting(static=True, low=1)
    num_initial: int = setting(10, static=True, low=1)
    num_candidates: int = setting(64, static=True, low=1)
    max_good: int = setting(25, static=True, low=1)
    capacity: int = setting(1024, static=True, low=4)
    max_capacity: int = setting(1024, static=True, low=4)
    quantile: float = setting(0.1, low=0.0, high=0.5)
    prior_weight: float = setting(1.0, low=0.01)
    equal_prior: bool = setting(False, static=True, choices=(False, True))
    clip_good: float = setting(0.3, low=0.001)
    clip_bad: float = setting(1.0, low=0.001)
    scott_factor: float = setting(0.0, low=0.0)

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> TPEState:
        design, points = initial_design(key, spec.num_dims, self.num_lanes, self.num_initial)
        rows = _power_of_two(max(min(self.capacity, self.max_capacity), 2 * self.num_lanes))
        return TPEState(
            cube=jnp.asarray(spec.snap(points)),
            points=jnp.zeros((rows, spec.num_dims), jnp.float32),
            loss=jnp.full(rows, jnp.inf, jnp.float32),
            number=jnp.full(rows, -1, jnp.int32),
            told=jnp.zeros((), jnp.int32),
            design=design,
            spec=spec,
        )

    def ask(self, key: jax.Array, state: TPEState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: TPEState, query: Query, feedback: Feedback) -> TPEState:
        spec, done = state.spec, jnp.asarray(feedback.done)
        rank = jnp.cumsum(done, dtype=jnp.int32) - 1  # lanes that are done, counted from the left
        state = self._observed(state, jnp.asarray(spec.snap(query.cube)), feedback.loss, done, rank)
        design, points, initial = given_out(state.design, done)
        if not spec.is_float.any():
            initial &= ~repeated(spec, spec.snap(points), *self._known(state, state.cube, ~done))
        cube = jnp.where(initial[:, None], spec.snap(points), state.cube)
        state = dataclasses.replace(state, design=design, cube=cube)
        wanted = done & ~initial
        return lax.cond(wanted.any(), lambda: self._proposed(key, state, wanted), lambda: state)

    def holds(self, state: TPEState) -> int:
        """Observations that the table holds; without limit once it is full-grown, for then it makes room."""
        rows = state.loss.shape[0]
        return rows if rows < self.max_capacity else np.iinfo(np.int32).max

    def enlarged(self, state: TPEState) -> TPEState:
        """The state with a table of twice the size, up to ``max_capacity``; between updates, for shapes change."""
        more = state.loss.shape[0]
        if more >= self.max_capacity:
            return state
        return dataclasses.replace(
            state,
            points=jnp.pad(state.points, ((0, more), (0, 0))),
            loss=jnp.pad(state.loss, (0, more), constant_values=jnp.inf),
            number=jnp.pad(state.number, (0, more), constant_values=-1),
        )

    def best_rows(self, state: TPEState) -> jax.Array:
        """The rows of the lowest losses, best first: as many as can ever be good."""
        return lax.top_k(-state.loss, min(self.max_good, state.loss.size // 2))[1]

    def densities(self, state: TPEState) -> tuple[Mixture, Mixture]:
        """The mixtures ``l`` of the good observations and ``g`` of the bad ones."""
        spec, prior, top = state.spec, self.prior_weight, self.best_rows(state)
        num_good = jnp.clip(jnp.ceil(self.quantile * state.told), 1, top.size).astype(jnp.int32)
        num_good = jnp.minimum(num_good, jnp.isfinite(state.loss).sum(dtype=jnp.int32))
        rank = jnp.arange(top.size)
        good = rank < num_good
        weight = jnp.where(good, jnp.log(num_good + 0.5) - jnp.log(rank + 1.0), 0.0).astype(state.loss.dtype)
        weight *= num_good / jnp.maximum(weight.sum(), _TINY)
        bad = (state.number >= 0) & ~jnp.zeros(state.number.shape, bool).at[top].set(good)
        num_bad = bad.sum(dtype=jnp.int32)
        prior_bad = prior * jnp.where(
            (num_good > 0) & self.equal_prior, jnp.maximum(num_bad, 1) / jnp.maximum(num_good, 1), 1.0
        )
        best = state.points[top]
        return (
            Mixture(
                kernels_at(spec, best, bandwidths(spec, best, good, self.clip_good, self.scott_factor)),
                jnp.where(good, jnp.log(jnp.maximum(weight, _TINY)), -jnp.inf) - jnp.log(num_good + prior),
                jnp.log(prior / (num_good + prior)),
            ),
            Mixture(
                kernels_at(spec, state.points, bandwidths(spec, state.points, bad, self.clip_bad, self.scott_factor)),
                jnp.where(bad, 0.0, -jnp.inf) - jnp.log(num_bad + prior_bad),
                jnp.log(prior_bad / (num_bad + prior_bad)),
            ),
        )

    def _observed(self, state: TPEState, points: Array, loss: Array, done: Array, rank: Array) -> TPEState:
        """The lanes that are done entered into the table: in free rows, then in place of the oldest that are not the best."""
        top = self.best_rows(state)
        number = state.number.at[top].set(jnp.where(state.number[top] < 0, -1, _LAST))
        oldest = lax.top_k(-number, self.num_lanes)[1]
        row = jnp.where(done, oldest[rank], state.loss.size)  # beyond the end: dropped
        loss = jnp.where(jnp.isfinite(loss), loss, jnp.inf).astype(state.loss.dtype)
        return dataclasses.replace(
            state,
            points=state.points.at[row].set(points.astype(state.points.dtype), mode="drop"),
            loss=state.loss.at[row].set(loss, mode="drop"),
            number=state.number.at[row].set(state.told + rank, mode="drop"),
            told=state.told + done.sum(dtype=jnp.int32),
        )

    def _known(self, state: TPEState, cube: Array, occupied: Array) -> tuple[jax.Array, jax.Array]:
        """All observed points and lanes, ``[N + B, D]``, and which of them count."""
        return jnp.concatenate([state.points, cube]), jnp.concatenate([state.number >= 0, occupied])

    def _proposed(self, key: jax.Array, state: TPEState, wanted: Array) -> TPEState:
        """New points for the lanes ``wanted``, one lane after the other."""
        spec = state.spec
        good, bad = self.densities(state)
        share = jnp.exp(good.log_weight)
        width = (share[:, None] * good.kernels.bandwidth).sum(0) / jnp.maximum(share.sum(), _TINY)
        width = _LANE_SHARE * jnp.broadcast_to(jnp.where(share.sum() > 0, width, 1.0), state.cube.shape)
        one = jnp.broadcast_to(bad.log_prior - jnp.log(self.prior_weight), self.num_lanes)  # see ``equal_prior``

        def refill(carry: tuple[Kernels, Array], number: Array) -> tuple[tuple[Kernels, Array], None]:
            lanes, occupied = carry

            def found() -> jax.Array:
                key_draw, key_other = jax.random.split(jax.random.fold_in(key, number))
                x = draw(key_draw, spec, good, self.num_candidates)
                every = jax.tree.map(lambda *parts: jnp.concatenate(parts), good.kernels, bad.kernels, lanes)
                kernels, uniform, split = log_kernels(spec, every, x), _log_uniform(spec, x), good.log_weight.size
                crowd = jnp.concatenate([bad.log_weight, jnp.where(occupied, one, -jnp.inf)])
                # Bergstra et al. 2011, section 4.1: the ratio orders points as the expected improvement does.
                score = _log_mixed(kernels[:, :split], good.log_weight, good.log_prior + uniform)
                score -= _log_mixed(kernels[:, split:], crowd, bad.log_prior + uniform)
                if spec.is_float.any():
                    return x[jnp.argmax(score)]
                known = self._known(state, lanes.centre, occupied)
                again = repeated(spec, x, *known)
                best = x[jnp.argmax(jnp.where(again & ~again.all(), -jnp.inf, score))]
                return lax.cond(again.all(), lambda: untried(key_other, spec, *known, otherwise=best), lambda: best)

            point = lax.cond(wanted[number], found, lambda: lanes.centre[number])
            moved = kernels_at(spec, point[None], width[:1])
            lanes = jax.tree.map(lambda rows, row: rows.at[number].set(row[0]), lanes, moved)
            return (lanes, jnp.asarray(occupied).at[number].set(True)), None

        start = kernels_at(spec, state.cube, width), ~wanted
        (lanes, _), _ = lax.scan(refill, start, jnp.arange(self.num_lanes))
        return dataclasses.replace(state, cube=lanes.centre)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << max(number - 1, 0).bit_length()
