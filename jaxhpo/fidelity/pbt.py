"""Population based training: members that train side by side, give up for copies of better ones, and vary what they copy.

Jaderberg et al., "Population based training of neural networks", arXiv:1711.09846, 2017.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxhpo.core import FRESH, Array, CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.fidelity import population as members
from jaxhpo.fidelity.explore import EXPLORES, explored
from jaxhpo.fidelity.inner import inner_holds, with_larger_inner
from jaxhpo.fidelity.population import EXPLOITS, Population


@pytree_dataclass
class PBTState:
    """State of :class:`PBT`.

    Attributes:
        population: the members.
        inner: state of the inner optimizer.
        spec: static.
    """

    population: Population
    inner: Any
    spec: CubeSpec = setting(static=True)


@pytree_dataclass
class PBT:
    """Population based training: each lane is a member; poor ones copy the training state of good ones and vary its point.

    The inner optimizer gives the first point of each member. Every ``interval`` steps a lane is done, and decides at once,
    by the last known losses of all, whether it goes on with the same point or copies another lane: that lane's training state
    as it is then, at a point in the cube close to that lane's (*exploit* and *explore*). A copy is a new trial, so that
    hyperparameters are constant as long as a trial lives, and a schedule of them is the path from copy to copy.

    A member that diverged copies a good one by the same rule, or, where there is none, begins afresh. One that has reached
    the whole training has ended; the inner optimizer gives its lane another first point, and with it begins the next
    generation, one lane after another. Members are compared with those of their own generation alone, and only
    with those that have an answer since their trial began: a copied lane always has a loss of its own. Within a generation
    losses are compared whatever the steps they were reached at, as in the paper; they differ where a member of it had to
    begin afresh, which then soon copies one that is further on. What that leaves behind when a generation ends trains on
    by itself to its end, and joins the newest then.

    The inner optimizer is told once for every member, when the lane begins afresh, what came of the point that it gave: its
    loss if it was trained to the end; if it was given up for a copy, its last loss, but none better than any whole training
    so far. It must be one whose queries all start afresh.

    In a study ``interval`` and ``max_steps`` need not be given. In a loop of your own they are due.

    Attributes:
        inner: the optimizer that gives first points, such as ``RandomSearch(num_lanes=16)``; B are its lanes.
        interval: training steps between two decisions of a member; by default a tenth of the training in whole rounds.
        max_steps: of a whole training; by default those of the study's.
        exploit: ``"truncation"``, the worst ``fraction`` copies one of the best; ``"binary_tournament"``, each copies the one
            it meets if that one is better.
        fraction: of the population, rounded down to at least one member each; of ``"truncation"``.
        explore: ``"perturb"`` moves all floats and integers, and draws choices anew with ``resample_probability``;
            ``"resample"`` draws any dimension anew with that probability, and moves it otherwise.
        perturbation: how far a dimension moves, up or down, as a part of its range. The default is a factor of 1.26 or 0.79
            over a range of one decade, 1.58 or 0.63 over two, close to the paper's 1.2 and 0.8. For populations of 8
            over 12 intervals, whose progress peaks at a point of 2 or 4 dimensions, it was at least as good as 0.05; 0.2 was
            better where the peak moved far, worse where it stayed.
        resample_probability: see ``explore``.

    Raises:
        JaxhpoError: by ``for_training`` for a training of one round or an interval that does not fit in it, by ``init``
            without an interval.
    """

    inner: Optimizer
    interval: int | None = setting(None, low=1)
    max_steps: int | None = setting(None, low=2)
    exploit: str = setting("truncation", static=True, choices=EXPLOITS)
    fraction: float = setting(0.2, low=0.0, high=0.5)
    explore: str = setting("perturb", static=True, choices=EXPLORES)
    perturbation: float = setting(0.1, low=0.0, high=1.0)
    resample_probability: float = setting(0.25, low=0.0, high=1.0)

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    @property
    def needs_gradient(self) -> bool:
        return getattr(self.inner, "needs_gradient", False)

    def for_training(self, num_steps: int, round_steps: int) -> PBT:
        return members.filled_in(self, num_steps, round_steps)

    def init(self, key: jax.Array, spec: CubeSpec) -> PBTState:
        members.check(self)
        inner, start = members.first_points(self.inner, key, spec)
        return PBTState(members.begin(start, self.interval, self.max_steps), inner, spec)

    def ask(self, key: jax.Array, state: PBTState) -> Query:
        del key
        return state.population.query

    def update(self, key: jax.Array, state: PBTState, query: Query, feedback: Feedback) -> PBTState:
        key_exploit, key_explore, key_inner = jax.random.split(key, 3)
        done = jnp.asarray(feedback.done)
        population = members.answered(state.population, query, feedback)
        ended = members.finished(population, done, self.max_steps)
        peers = members.peers(population, ended)
        source = self._sources(key_exploit, population.loss, peers)
        parent = members.moves(source, population.loss, done, ended)
        inner, population = members.restarted(self.inner, key_inner, state.inner, population, parent, ended, feedback)
        copied = population.cube[jnp.where(parent == FRESH, 0, parent)]
        cube = explored(key_explore, state.spec, copied, self.explore, self.perturbation, self.resample_probability)
        population = members.moved(population, parent, cube, done, ended, self.interval, self.max_steps)
        return dataclasses.replace(state, population=population, inner=inner)

    def holds(self, state: PBTState) -> int:
        """Observations that the inner optimizer's table holds; without limit where it has none."""
        return inner_holds(self.inner, state.inner)

    def enlarged(self, state: PBTState) -> PBTState:
        """The state with a larger table of the inner optimizer, as far as it grows; between updates, for shapes change."""
        return with_larger_inner(self.inner, state)

    def _sources(self, key: jax.Array, loss: Array, peers: Array) -> jax.Array:
        """Whom each lane would copy, ``i32[B]``."""
        if self.exploit == "truncation":
            return members.truncation(key, loss, peers, self.fraction)
        return members.tournament(key, loss, peers)
