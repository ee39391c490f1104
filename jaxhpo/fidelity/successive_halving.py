"""Successive halving with synchronous brackets.

Jamieson & Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", AISTATS 2016, Algorithm 1.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo.core import CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.errors import JaxhpoError
from jaxhpo.fidelity.brackets import Brackets, Plan, answered, asked, bracket_rungs, first_brackets, halved
from jaxhpo.fidelity.inner import check_inner, fitted_inner, inner_holds, with_larger_inner
from jaxhpo.fidelity.rungs import check_budgets, check_training, due_steps

_NAME = "SuccessiveHalving"
_SHARE = 2  # one in so many lanes is taken by the newest bracket; with one in one, lanes hold half of the time


@pytree_dataclass
class SuccessiveHalving:
    """Successive halving: of each bracket of ``n`` trials the best ``floor(n / reduction^i)`` train on from the i-th rung.

    A bracket is decided when all of its trials have answered the rung; equal losses are ordered by lane. Brackets overlap:
    a lane that becomes free begins the next one. A lane that waits for others trains on meanwhile, up to the next rung or,
    at the last one, to a round before the end; its loss at the rung is what counts. A trial that diverges frees its lane at
    once and counts as the worst.

    Every trial stays on its lane, so a bracket has at most ``num_lanes`` of them. The default is the smallest bracket that
    leaves one trial for the whole training, on half of the lanes at most: the smaller a bracket is beside the number of
    lanes, the less is waited for. With a bracket on all lanes most of them wait while the last trial trains whole.

    The inner optimizer is told one loss for each trial, one of a stopped trial lifted so that it is no better than any of a
    trial that got further.

    Attributes:
        inner: the optimizer that proposes the trials, with the lanes; its queries start afresh.
        reduction: eta.
        num_rungs: rungs at most. None: up to 3, as long as ``reduction^num_rungs`` is at most half of the lanes.
        num_configs: ``n``. None: ``reduction^num_rungs``, at most half of the lanes, but ``reduction`` where there are as many
            lanes. At least one goes on from each rung.
        grace: steps of the first rung; each further one is ``reduction`` times the one before. None: the last is a
            ``reduction``-th of the training.
        budgets: total training steps of the rungs, ascending, without the whole training. None: a study sets them.
        wait_until: steps up to which a trial that waits at the last rung trains on; a study sets it to a round before the
            end. None: it holds at the rung.

    Raises:
        JaxhpoError: by ``init`` where ``budgets`` is None or ``num_configs`` has not enough lanes, and by ``for_training``
            for what does not fit the training.
    """

    inner: Optimizer
    reduction: int = setting(3, static=True, low=2)
    num_rungs: int | None = setting(None, static=True, low=1)
    num_configs: int | None = setting(None, static=True, low=1)
    grace: int | None = setting(None, low=1)
    budgets: tuple[int, ...] | None = None
    wait_until: int | None = setting(None, low=1)

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    @property
    def needs_gradient(self) -> bool:
        return getattr(self.inner, "needs_gradient", False)

    @property
    def plan(self) -> Plan:
        """One kind of bracket."""
        num_rungs = len(self.budgets or ())
        most = max(self.num_lanes // _SHARE, min(self.reduction, self.num_lanes))
        n = min(self.reduction**num_rungs, most) if self.num_configs is None else self.num_configs
        return Plan((halved(n, self.reduction, num_rungs),))

    def for_training(self, num_steps: int, round_steps: int) -> SuccessiveHalving:
        """The same optimizer with the rungs of a training of ``num_steps`` in rounds of ``round_steps``."""
        inner = fitted_inner(_NAME, self.inner, num_steps, round_steps)
        check_training(_NAME, num_steps, round_steps)
        self._check_lanes()
        return dataclasses.replace(
            self,
            inner=inner,
            budgets=bracket_rungs(_NAME, self, _SHARE, num_steps, round_steps),
            wait_until=num_steps - round_steps,
        )

    def init(self, key: jax.Array, spec: CubeSpec) -> Brackets:
        check_inner(_NAME, self.inner)
        check_budgets(_NAME, self.budgets)
        self._check_lanes()
        return first_brackets(self.plan, due_steps(self.budgets or ()), self.inner.init(key, spec), self.num_lanes)

    def ask(self, key: jax.Array, state: Brackets) -> Query:
        return asked(state, self.inner.ask(key, state.inner).cube)

    def update(self, key: jax.Array, state: Brackets, query: Query, feedback: Feedback) -> Brackets:
        due = due_steps(self.budgets or ())
        return answered(self.plan, due, self.wait_until, self.inner, key, state, query, feedback)

    def holds(self, state: Brackets) -> int:
        """Trials ended for which the inner optimizer's table has room."""
        return inner_holds(self.inner, state.inner)

    def enlarged(self, state: Brackets) -> Brackets:
        """The state with a larger table of the inner optimizer; between updates, for shapes change."""
        return with_larger_inner(self.inner, state)

    def _check_lanes(self) -> None:
        if self.num_configs is not None and self.num_configs > self.num_lanes:
            raise JaxhpoError(
                f"{_NAME}: num_configs = {self.num_configs}: at most num_lanes = {self.num_lanes} are due, for every trial of "
                "a bracket stays on its lane"
            )
