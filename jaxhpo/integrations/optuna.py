"""Our optimizers inside an ordinary study of Optuna.

    study = optuna.create_study(sampler=Sampler(jaxhpo.BayesOpt(num_lanes=4), seed=0))
    study.optimize(objective, n_trials=100, n_jobs=4)

A trial under way occupies a lane of the optimizer; the point of a lane is proposed as soon as the trial before it has ended,
given all that is known then:

    trials that ended --losses--> optimizer.update --> optimizer.ask --> the lane that waited longest --> the next trial
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import Feedback, Optimizer, Query, problems_of
from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations.distributions import ParameterSpace
from jaxhpo.study.problem import INIT_STREAM, ROUND_STREAM
from jaxhpo.study.room import with_room

try:
    import optuna
except ImportError:
    raise JaxhpoError("jaxhpo.integrations.optuna needs Optuna: pip install 'jaxhpo[optuna]'") from None

_CUBE = "jaxhpo:cube"  # the attribute of a trial that holds the exact bits of its point


class Sampler(optuna.samplers.BaseSampler):
    """A sampler of Optuna that proposes what a jaxhpo optimizer asks for.

    Losses are told in the order in which trials end: the value (its negative where the study maximises), NaN for a trial
    that failed. A pruned trial is told its last intermediate value, but nothing better than any trial that got further; NaN
    while nothing at all is known of it. Trials that others proposed (enqueued or added ones, other processes on the same
    storage, trials from before the sampler was made) are told as well, as far as they fit the space, each in the place of a
    point that was not given out yet. One after the other, with the same seed, the same trials come up again, also when the
    study goes on in another process: with one lane exactly those of ``jaxhpo.minimize``. Processes that share a storage need
    seeds of their own, or none.

    Args:
        optimizer: any that begins every trial afresh and needs no gradient. Its ``num_lanes`` is the number of trials that
            may be under way at the same time; what goes beyond is sampled at random, with one warning.
        space: a :class:`jaxhpo.Space`, or a dictionary of Optuna's distributions, for all parameters that the optimizer is
            to choose; elements of arrays are called ``name[0]``. None: the parameters that all completed trials share;
            the first trials are then sampled at random, and where that changes the optimizer begins anew with what is known.
        seed: the same seed, the same proposals. None: another one each time.

    Raises:
        JaxhpoError: for an optimizer that cannot be used so or has wrong settings, for a space that cannot be searched, and
            within a study of several objectives.
    """

    def __init__(self, optimizer: Optimizer, space: Any = None, seed: int | None = None):
        _check(optimizer)
        self._optimizer, self._given = optimizer, None if space is None else _as_given(space)
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else int(seed)
        self._random = optuna.samplers.RandomSampler(seed=self._seed)
        self._lock, self._warned = threading.RLock(), False
        self._study: str | None = None
        self._search: _Search | None = None
        self._shared = optuna.search_space.IntersectionSearchSpace()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def reseed_rng(self) -> None:
        """Only what is sampled at random: threads share the optimizer."""
        self._random.reseed_rng()

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        with self._lock:
            if len(study.directions) > 1:
                raise JaxhpoError(f"Sampler: the study has {len(study.directions)} objectives; a study with one is due")
            if self._study != study.study_name:
                self._study, self._search = study.study_name, None
                self._shared = optuna.search_space.IntersectionSearchSpace()
            if self._given is not None:
                return self._given.distributions
            found = self._shared.calculate(study)
            return {name: distribution for name, distribution in found.items() if not distribution.single()}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        if not search_space or set(search_space) <= set(trial.system_attrs.get("fixed_params", {})):
            return {}
        with self._lock:
            if self._search is None or self._search.space.distributions != search_space:
                space = ParameterSpace.of(search_space) if self._given is None else self._given
                self._search = _Search(self._optimizer, space, self._seed)
            search = self._search
            search.catch_up(study)
            cube = search.take(trial.number)
            if cube is None:
                if not self._warned:
                    lanes = self._optimizer.num_lanes
                    warnings.warn(
                        f"Sampler: more than num_lanes = {lanes} trials are under way; those beyond are sampled at random",
                        stacklevel=2,
                    )
                    self._warned = True
                return {}
        study._storage.set_trial_system_attr(trial._trial_id, _CUBE, cube.tobytes().hex())
        return search.space.params_at(cube)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self._random.sample_independent(study, trial, param_name, param_distribution)


def _check(optimizer: Any) -> None:
    name = type(optimizer).__name__
    if isinstance(optimizer, type) or not isinstance(optimizer, Optimizer):
        raise JaxhpoError(f"Sampler: {optimizer!r} is no optimizer; one such as TPE(num_lanes=4) is due")
    if not getattr(optimizer, "starts_afresh", False):
        inner = getattr(optimizer, "inner", None)
        hint = (
            "" if inner is None else f": give the optimizer inside, Sampler({type(inner).__name__}(...)), and an Optuna pruner"
        )
        raise JaxhpoError(f"Sampler: {name} stops or continues trainings itself, which Optuna does by pruners{hint}")
    if getattr(optimizer, "needs_gradient", False):
        raise JaxhpoError(f"Sampler: {name} needs gradients, which an objective of Optuna does not give; another one is due")
    problems = problems_of(optimizer)
    if problems:
        raise JaxhpoError("\n".join(f"{name}: {line}" for line in problems))


def _as_given(space: Any) -> ParameterSpace:
    """Optuna's distributions by name, but for those of a single value, or a space of ours."""
    of_optuna = optuna.distributions.BaseDistribution
    if isinstance(space, Mapping) and space and all(isinstance(one, of_optuna) for one in space.values()):
        return ParameterSpace.of({name: one for name, one in space.items() if not one.single()})
    return ParameterSpace.from_space(space)


# The same programs for all samplers: optimizers and states are pytrees.
_init = jax.jit(lambda optimizer, key, spec: optimizer.init(key, spec), static_argnums=2)
_ask = jax.jit(lambda optimizer, key, state: optimizer.ask(key, state))
_update = jax.jit(lambda optimizer, key, state, query, feedback: optimizer.update(key, state, query, feedback))


@dataclasses.dataclass
class _End:
    """A trial that ended: its point ``f32[D]``, its loss, and its lane, if it has one."""

    cube: np.ndarray
    loss: float
    lane: int | None


class _Search:
    """The optimizer's state in one space: which lane has which trial, and who was told.

    The streams of keys are those of :mod:`jaxhpo.study.loop`, with one update as a round.
    """

    def __init__(self, optimizer: Any, space: ParameterSpace, seed: int):
        self.space, self._optimizer, self._key = space, optimizer, jax.random.key(seed)
        self._free = collections.deque(range(optimizer.num_lanes))  # the one that waited longest first
        self._lane_of: dict[int, int] = {}  # of trials under way
        self._seen: set[int] = set()
        self._others: list[_End] = []  # trials from elsewhere that are still to be told
        self._reached: list[tuple[float, float]] = []  # how far a trial got, and its loss
        self._round = self._told = 0
        self._state = _init(optimizer, jax.random.fold_in(self._key, INIT_STREAM), space.spec)
        self._query = self._asked()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_key": np.asarray(jax.random.key_data(self._key))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._key = jax.random.wrap_key_data(jnp.asarray(state["_key"]))

    def take(self, number: int) -> np.ndarray | None:
        """The point for a new trial, ``f32[D]``; None if every lane has one under way."""
        if not self._free:
            return None
        lane = self._free.popleft()
        self._lane_of[number] = lane
        return np.asarray(self._query.cube)[lane]

    def catch_up(self, study: Any) -> None:
        """Tells the optimizer of all trials that ended since, in the order in which they did."""
        trials = [one for one in study.get_trials(deepcopy=False) if one.state.is_finished() and one.number not in self._seen]
        maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
        for trial in sorted(trials, key=_when):
            self._seen.add(trial.number)
            end = self._end_of(trial, maximize)
            if end is None:
                continue
            if end.lane is None:
                self._others.append(end)
            if end.lane is not None or _CUBE in trial.system_attrs:  # one by one, as when they were proposed
                self._tell_others()
                if end.lane is not None:
                    self._tell([end.lane], [end])
        self._tell_others()

    def _tell_others(self) -> None:
        """Trials from elsewhere, many at once, on lanes without a trial under way; where there is none, they wait."""
        while self._others and self._free:
            at_once, self._others = self._others[: len(self._free)], self._others[len(self._free) :]
            self._tell([self._free.popleft() for _ in at_once], at_once)

    def _end_of(self, trial: Any, maximize: bool) -> _End | None:
        """What there is to tell; None for a trial that does not fit the space."""
        lane = self._lane_of.pop(trial.number, None)
        cube = self._cube_of(trial)
        if cube is None:
            if lane is not None:
                self._free.appendleft(lane)  # its point was not tried
                warnings.warn(
                    "Sampler: a trial has values outside the space and teaches nothing; give the space of the objective",
                    stacklevel=2,
                )
            return None
        return _End(cube, self._loss_of(trial, maximize), lane)

    def _cube_of(self, trial: Any) -> np.ndarray | None:
        known: dict[str, Any] = {}
        proposed = np.frombuffer(bytes.fromhex(trial.system_attrs.get(_CUBE, "")), np.float32)
        if proposed.shape == (self.space.spec.num_dims,):
            known = self.space.params_at(proposed)
            if all(name not in trial.params or trial.params[name] == value for name, value in known.items()):
                return proposed
        return self.space.cube_at(known | dict(trial.params))

    def _loss_of(self, trial: Any, maximize: bool) -> float:
        states, sign = optuna.trial.TrialState, -1.0 if maximize else 1.0
        if trial.state == states.COMPLETE:
            reach, loss = math.inf, sign * trial.value
        elif trial.state == states.PRUNED:
            last = trial.last_step
            reach = -math.inf if last is None else float(last)
            loss = math.nan if last is None else sign * trial.intermediate_values[last]
            further = [other for got, other in self._reached if got > reach]
            loss = max([loss, *further]) if math.isfinite(loss) else max(further, default=math.nan)
        else:
            return math.nan
        if not math.isfinite(loss):
            return math.nan
        self._reached.append((reach, loss))
        return loss

    def _tell(self, on: Sequence[int], ends: Sequence[_End]) -> None:
        """One update with some trials that ended, each on a lane of its own, which is free then."""
        lanes, places = self._optimizer.num_lanes, np.asarray(on)
        cube, loss, done = np.array(self._query.cube), np.full(lanes, np.nan, np.float32), np.zeros(lanes, bool)
        cube[places], loss[places], done[places] = np.stack([end.cube for end in ends]), [end.loss for end in ends], True
        self._free.extend(on)
        self._state = with_room(self._optimizer, self._state, self._told + lanes)
        feedback = Feedback(jnp.asarray(loss), jnp.asarray(done), jnp.ones(lanes, jnp.int32))
        query = dataclasses.replace(self._query, cube=jnp.asarray(cube))
        self._state = _update(self._optimizer, self._round_key(1), self._state, query, feedback)
        self._round, self._told = self._round + 1, self._told + len(ends)
        self._query = self._asked()

    def _round_key(self, use: int) -> jax.Array:
        return _folded(self._key, self._round, use)

    def _asked(self) -> Query:
        return _ask(self._optimizer, self._round_key(0), self._state)


@functools.partial(jax.jit, static_argnums=2)
def _folded(key: jax.Array, round: int, use: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, ROUND_STREAM), round), use)


def _when(trial: Any) -> tuple[float, int]:
    ended = trial.datetime_complete
    return (0.0 if ended is None else ended.timestamp(), trial.number)
