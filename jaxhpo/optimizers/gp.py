"""Bayesian optimization: a Gaussian process of the losses, and trials where the expected improvement is highest.

    observe -> warp and standardise the losses -> fit (MAP, warm start) -> for each free lane: maximise the acquisition,
    take the point as pending, go on with the next lane

Jones, Schonlau & Welch, "Efficient global optimization of expensive black-box functions", J. Global Optim. 13, 1998; the
pieces and their papers are in :mod:`jaxhpo.surrogates`.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.core import CubeSpec, Feedback, Query, pytree_dataclass, setting
from jaxhpo.optimizers.sobol import InitialDesign, given_out, initial_design
from jaxhpo.surrogates.acquisition import (
    ACQUISITIONS,
    incumbent_mean,
    latent_samples,
    log_ei,
    log_feasibility,
    log_noisy_ei,
    upper_confidence,
)
from jaxhpo.surrogates.fit import Model, Priors, fit
from jaxhpo.surrogates.kernels import KERNELS, inputs_of
from jaxhpo.surrogates.outputs import excess
from jaxhpo.surrogates.regression import Posterior, add_pending, condition, fitted, joint_samples, predict
from jaxhpo.surrogates.search import Score, maximise, pool_of
from jaxhpo.surrogates.table import Table, empty_table, enlarged, observe
from jaxhpo.surrogates.trust_region import Region, box_of, first_region, moved_region

_SETTLED = 256  # observations, beyond which a fit goes on from the last one alone
_CENTRES = 8  # the best observed points around which candidates lie
_REPEATED = 1e6  # taken from the log acquisition of a point of levels only that was asked before
_QUIET = math.log(1e-2)  # log variance of the noise, below which asking the same again is of no use


@pytree_dataclass
class BayesState:
    """State of :class:`BayesOpt`.

    Attributes:
        cube: ``f32[B, D]``, the proposals.
        table: the observations.
        design: what is left of the initial design.
        theta: ``f[P]``, parameters of the last fit to the losses.
        label_theta: ``f[P]``, of the last fit to success and failure.
        region: the trust region; idle without one.
        life: ``i32[B]``, the life of the region in which each lane was given its point.
        spec: static.
    """

    cube: jax.Array
    table: Table
    design: InitialDesign
    theta: jax.Array
    label_theta: jax.Array
    region: Region
    life: jax.Array
    spec: CubeSpec = setting(static=True)


def _num_rows(num_observations: int, num_lanes: int) -> int:
    """A power of two that holds the observations, at least two batches of them, and a pending point for every lane."""
    return 1 << (max(num_observations, 8, 2 * num_lanes) + num_lanes - 1).bit_length()


def _among(points: jax.Array, others: jax.Array, used: jax.Array) -> jax.Array:
    """Which points ``[M, D]`` are one of the others ``[N, D]`` that are ``used``, ``bool[M]``."""
    return ((points[:, None, :] == others[None, :, :]).all(-1) & used).any(1)


@pytree_dataclass
class BayesOpt:
    """Bayesian optimization: each lane that is done takes the point of the highest acquisition, given all that is known.

    Lanes under way, and points given to other lanes of the same batch, are pending: the model takes its own mean for their
    loss, so that a batch spreads. Integers are seen at their rounded values, choices through a kernel of their own, and the
    acquisition is searched on their levels. Trials that diverged, with a loss that is NaN or infinite, are left out of the
    model of losses and lower the acquisition around them through a model of success. Losses may be noisy: the incumbent is
    the lowest mean of the model at an observed point.

    The table of observations has a fixed size, so that asking recompiles only where it grows. ``minimize`` and ``pure_study``
    make it as large as they need, twice as large each time. In a loop of your own, give a large enough ``capacity``, or call
    ``state = optimizer.enlarged(state)`` between updates when ``optimizer.holds(state)`` is reached. A table that is full
    gives up the observations that lie closest to better ones, never one of the best quarter: long studies go on with a
    model of the best and of the most distinct observations, at constant cost.

    What the defaults rest on: the power of the warp on Zakharov, a rotated ellipsoid, Rosenbrock-4, Styblinski-Tang,
    Dixon-Price, Ackley-5, Hartmann-3, Goldstein-Price, a cosine mixture and a mixed space, 100 trials each; the prior of
    lengthscales on Styblinski-Tang and Rastrigin in 15 dimensions and four of those; ``caution`` on
    ``jaxhpo.benchmarks.nan_cliff`` and one other region of failures.

    Attributes:
        num_lanes: B.
        num_initial: scrambled Sobol points before the model is asked, more where none of them succeeds.
        acquisition: ``"log_ei"``, the logarithm of the expected improvement; ``"noisy_ei"``, averaged over samples of what
            the losses would be without noise; ``"ucb"``, the confidence bound; ``"thompson"``, the best candidate of a
            sample of the posterior.
        kernel: ``"matern52"`` or ``"rbf"`` for floats and integers, times a Hamming kernel for choices.
        trust_region: search in a box around the incumbent that grows with success, shrinks with failure and restarts
            (TuRBO-1, :mod:`jaxhpo.surrogates.trust_region`); for ten dimensions or more and several hundred trials.
        input_warping: bend each float dimension by a Kumaraswamy map that the fit chooses.
        beta: of ``"ucb"``, the squared number of deviations.
        caution: how much the risk of a trial that diverges counts: so many times the log probability of success is added to
            the acquisition, which multiplies an expected improvement by that probability to this power. With 1, the
            textbook's product, a search that has converged beside a region of failures spends most of its trials there, for
            there the model still sees improvement. Where the lowest losses lie at the very edge of failures, many trials
            fall over it at the default, too; 0 leaves failures out of account.
        capacity: observations that the first table holds at least; its rows are a power of two that has room for the
            lanes too. As large as the number of trials, it never grows, and nothing is compiled twice.
        max_capacity: observations for which it grows; the time of an update grows with the cube of its rows.
        fit_steps: evaluations of the marginal likelihood, each with its gradient, from each of two starts: the last fit and
            a draw from the prior, beyond 256 observations from the last fit alone; thrice as many while there are fewer
            than twice ``num_initial`` observations.
        num_samples: of ``"noisy_ei"``.
        num_candidates: points of the pool in which the search of the acquisition begins, half of them over the cube, half
            around the best observed ones.
        num_starts: candidates that are refined, at most all of the pool.
        num_steps: evaluations of the acquisition and its gradient in each refinement.
        priors: of the model's parameters.
    """

    num_lanes: int = setting(static=True, low=1)
    num_initial: int = setting(10, static=True, low=1)
    acquisition: str = setting("log_ei", static=True, choices=ACQUISITIONS)
    kernel: str = setting("matern52", static=True, choices=KERNELS)
    trust_region: bool = setting(False, static=True, choices=(False, True))
    input_warping: bool = setting(False, static=True, choices=(False, True))
    beta: float = setting(4.0, low=0.0)
    caution: float = setting(8.0, low=0.0)
    capacity: int = setting(100, static=True, low=4)
    max_capacity: int = setting(1000, static=True, low=4)
    fit_steps: int = setting(16, static=True, low=1)
    num_samples: int = setting(16, static=True, low=1)
    num_candidates: int = setting(512, static=True, low=2)
    num_starts: int = setting(8, static=True, low=2)
    num_steps: int = setting(24, static=True, low=0)
    priors: Priors = Priors()

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> BayesState:
        design, points = initial_design(key, spec.num_dims, self.num_lanes, self.num_initial)
        return BayesState(
            cube=jnp.asarray(spec.snap(points)),
            table=empty_table(_num_rows(self.capacity, self.num_lanes), spec.num_dims),
            design=design,
            theta=self._model(spec).start(self.priors),
            label_theta=self._model(spec, labels=True).start(self.priors),
            region=first_region(),
            life=jnp.zeros(self.num_lanes, jnp.int32),
            spec=spec,
        )

    def ask(self, key: jax.Array, state: BayesState) -> Query:
        del key
        return Query.fresh(state.cube)

    def update(self, key: jax.Array, state: BayesState, query: Query, feedback: Feedback) -> BayesState:
        spec, done = state.spec, jnp.asarray(feedback.done)
        loss = jnp.where(jnp.isfinite(feedback.loss), feedback.loss, jnp.inf).astype(state.table.loss.dtype)
        region, design = state.region, state.design
        table = observe(state.table, jnp.asarray(spec.snap(query.cube)), loss, state.life, done, self.num_lanes)
        if self.trust_region:
            designed = (state.table.used & (state.table.epoch == region.life)).sum() < self.num_initial
            region, ends = moved_region(region, loss, done & (state.life == region.life), ~designed, spec.num_dims)
            design = dataclasses.replace(design, left=jnp.where(ends, self.num_initial, design.left))
        # As long as no trial has succeeded there is nothing to model: the design goes on.
        barren = ~(table.sound & (table.epoch == region.life)).any()
        design, points, initial = given_out(design, done, goes_on=barren)
        state = dataclasses.replace(
            state,
            cube=jnp.where(initial[:, None], spec.snap(points), state.cube),
            table=table,
            design=design,
            region=region,
            life=jnp.where(done, region.life, state.life),
        )
        wanted = done & ~initial
        return lax.cond(wanted.any(), lambda: self._proposed(key, state, wanted), lambda: state)

    def holds(self, state: BayesState) -> int:
        """Observations that the table holds; without limit once it is full-grown, for then it makes room."""
        rows = state.table.loss.shape[0]
        return rows - self.num_lanes if rows < self._most_rows() else np.iinfo(np.int32).max

    def enlarged(self, state: BayesState) -> BayesState:
        """The state with a table of twice the size, up to ``max_capacity``; between updates, for shapes change."""
        rows = min(2 * state.table.loss.shape[0], self._most_rows())
        return state if rows <= state.table.loss.shape[0] else dataclasses.replace(state, table=enlarged(state.table, rows))

    def _most_rows(self) -> int:
        return _num_rows(max(self.capacity, self.max_capacity), self.num_lanes)

    def _model(self, spec: CubeSpec, labels: bool = False) -> Model:
        return Model(spec, self.kernel, self.input_warping and not labels, output_warping=not labels)

    def _proposed(self, key: jax.Array, state: BayesState, wanted: jax.Array) -> BayesState:
        """New points for the lanes ``wanted``."""
        spec, table = state.spec, state.table
        key_fit, key_labels, key_lanes = jax.random.split(key, 3)
        x = inputs_of(spec, table.cube.astype(state.theta.dtype))
        sound = table.sound & (table.epoch == state.region.life)
        theta, posterior = self._losses(key_fit, state, x, sound)
        label_theta, labels = self._labels(key_labels, state, x)
        lower, upper = jnp.zeros(spec.num_dims, jnp.float32), jnp.ones(spec.num_dims, jnp.float32)
        order = jnp.argsort(jnp.where(sound, table.loss, jnp.inf))[:_CENTRES]
        centres = table.cube[jnp.where(sound[order], order, order[0])]
        if self.trust_region:
            incumbent = table.cube[jnp.argmin(jnp.where(sound, fitted(posterior), jnp.inf))]
            lower, upper = box_of(state.region, spec, incumbent, posterior.params.kernel.log_lengthscale)

        def add(posterior: Posterior, lane: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Posterior, jax.Array]:
            """A lane under way, or one of the initial design, is pending; one that waits is given a point, then it is."""
            number, cube, wants = lane

            def refilled() -> jax.Array:
                key_pool, key_score = jax.random.split(jax.random.fold_in(key_lanes, number))
                score = self._score(key_score, posterior, labels, table)
                pool = pool_of(key_pool, spec, centres, lower, upper, self.num_candidates)
                if self.acquisition == "thompson":
                    return pool[jnp.argmax(score(pool))].astype(state.cube.dtype)
                found, _ = maximise(score, pool, spec, lower, upper, self.num_starts, self.num_steps)
                return found.astype(state.cube.dtype)

            cube = lax.cond(wants, refilled, lambda: cube)
            return add_pending(posterior, inputs_of(spec, cube.astype(x.dtype))), cube

        lanes = jnp.arange(self.num_lanes)
        first = jnp.argsort(wanted, stable=True)  # those under way first
        _, cube = lax.scan(add, posterior, (lanes[first], state.cube[first], wanted[first]))
        cube = jnp.zeros_like(cube).at[first].set(cube)
        return dataclasses.replace(state, cube=cube, theta=theta, label_theta=label_theta)

    def _losses(self, key: jax.Array, state: BayesState, x: jax.Array, sound: jax.Array) -> tuple[jax.Array, Posterior]:
        """Parameters of the losses and their posterior."""
        model = self._model(state.spec)
        v = excess(jnp.where(sound, state.table.loss, 0.0).astype(x.dtype), sound)
        starts = jnp.stack([state.theta, model.random_start(key, self.priors)])
        young = sound.sum() < 2 * self.num_initial  # no good last fit to start from
        steps = self.fit_steps * jnp.where(young, 3, 1)
        fit_from = lambda starts: fit(model, self.priors, starts, x, v, sound, steps)
        if sound.size > _SETTLED:
            theta = lax.cond(sound.sum() > _SETTLED, lambda: fit_from(starts[:1]), lambda: fit_from(starts))
        else:
            theta = fit_from(starts)
        z, _ = model.targets(theta, v, sound)
        return theta, condition(model.unpack(theta)[0], model.spec, model.kernel, x, z, sound)

    def _labels(self, key: jax.Array, state: BayesState, x: jax.Array) -> tuple[jax.Array, Posterior]:
        """Parameters of success (+1) and failure (-1), and their posterior."""
        model, table = self._model(state.spec, labels=True), state.table
        label = jnp.where(table.used, jnp.where(table.failed, -1.0, 1.0), 0.0).astype(x.dtype)

        def refitted() -> jax.Array:
            starts = jnp.stack([state.label_theta, model.random_start(key, self.priors)])
            return fit(model, self.priors, starts, x, label, table.used, self.fit_steps)

        theta = lax.cond(table.failed.any(), refitted, lambda: state.label_theta)
        return theta, condition(model.unpack(theta)[0], model.spec, model.kernel, x, label, table.used)

    def _score(self, key: jax.Array, posterior: Posterior, labels: Posterior, table: Table) -> Score:
        """The acquisition of points of the cube, ``[M, D] -> [M]``, higher is better."""
        spec = posterior.spec
        best, failed = incumbent_mean(posterior), table.failed.any()
        if self.acquisition == "noisy_ei":
            latent, lowest = latent_samples(key, posterior, self.num_samples)

        def score(points: jax.Array) -> jax.Array:
            inputs = inputs_of(spec, points.astype(posterior.x.dtype))
            if self.acquisition == "thompson":
                value = -joint_samples(key, posterior, inputs, 1)[0]
            elif self.acquisition == "noisy_ei":
                value = log_noisy_ei(latent, lowest, inputs)
            elif self.acquisition == "ucb":
                value = upper_confidence(*predict(posterior, inputs), self.beta)
            else:
                value = log_ei(*predict(posterior, inputs), best)
            value += lax.cond(failed, lambda: self.caution * log_feasibility(labels, inputs), lambda: jnp.zeros_like(value))
            if not spec.is_float.any():
                again = _among(inputs, posterior.x, posterior.mask)  # pending ones, too
                again |= _among(inputs, inputs_of(spec, table.cube.astype(inputs.dtype)), table.used)  # failed ones, too
                value -= jnp.where(again & (posterior.params.log_noise < _QUIET), _REPEATED, 0.0)
            return value

        return score
