"""Hyperband: brackets of successive halving that begin at different rungs.

Li, Jamieson, DeSalvo, Rostamizadeh & Talwalkar, "Hyperband: a novel bandit-based approach to hyperparameter optimization",
JMLR 18, 2018, Algorithm 1.
"""

from __future__ import annotations

import dataclasses

import jax

from jaxhpo.core import CubeSpec, Feedback, Optimizer, Query, pytree_dataclass, setting
from jaxhpo.fidelity.brackets import Brackets, Plan, answered, asked, bracket_rungs, first_brackets, halved
from jaxhpo.fidelity.inner import check_inner, fitted_inner, inner_holds, with_larger_inner
from jaxhpo.fidelity.rungs import check_budgets, check_training, due_steps

_NAME = "Hyperband"
_SHARE = 3  # one in so many lanes is taken by the largest bracket


def hyperband_sizes(num_rungs: int, reduction: int, num_lanes: int) -> tuple[tuple[int, ...], ...]:
    """The trials of the brackets s = s_max, ..., 0 at each rung, with ``s_max = num_rungs`` (Li et al. 2018, Algorithm 1).

    Bracket s has ``ceil((s_max + 1) / (s + 1) * reduction^s)`` trials, at most ``num_lanes``, and leaves out the lowest
    ``s_max - s`` rungs.
    """
    most = num_rungs
    sizes = []
    for s in range(most, -1, -1):
        n = -(-(most + 1) * reduction**s // (s + 1))
        sizes.append(halved(min(n, num_lanes), reduction, num_rungs, first=most - s))
    return tuple(sizes)


@pytree_dataclass
class Hyperband:
    """Hyperband: brackets of successive halving in turn, from many trials that begin with few steps to few trained whole.

    It hedges between stopping early, which is cheap, and waiting until losses can be trusted. Bracket s of ``s_max, ..., 0``
    has ``ceil((s_max + 1) / (s + 1) * reduction^s)`` trials and begins at the training's ``reduction^-s``-th part; after the
    last the first comes again. How a bracket is decided, how brackets overlap and what waiting lanes do is as in
    :class:`jaxhpo.SuccessiveHalving`. A bracket is cut down to ``num_lanes`` trials; little is waited for where there are three
    lanes or more for each trial of the largest.

    ``Hyperband(TPE(...))`` is the scheme of BOHB (Falkner, Klein & Hutter, "BOHB: robust and efficient hyperparameter
    optimization at scale", ICML 2018), a density model in place of random search. Theirs models the highest rung that has
    enough losses; here the model sees all trials, ordered by how far they got and then by loss.

    Attributes:
        inner: the optimizer that proposes the trials, with the lanes; its queries start afresh.
        reduction: eta.
        num_rungs: ``s_max``, rungs at most. None: up to 3, as long as ``reduction^num_rungs`` is at most a third of the lanes.
        grace: steps of the first rung; each further one is ``reduction`` times the one before. None: the last is a
            ``reduction``-th of the training.
        budgets: total training steps of the rungs, ascending, without the whole training. None: a study sets them.
        wait_until: steps up to which a trial that waits at the last rung trains on; a study sets it to a round before the
            end. None: it holds at the rung.

    Raises:
        JaxhpoError: by ``init`` where ``budgets`` is None, and by ``for_training`` for what does not fit the training.
    """

    inner: Optimizer
    reduction: int = setting(3, static=True, low=2)
    num_rungs: int | None = setting(None, static=True, low=1)
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
        """A kind of bracket for each s, from ``s_max`` down."""
        return Plan(hyperband_sizes(len(self.budgets or ()), self.reduction, self.num_lanes))

    def for_training(self, num_steps: int, round_steps: int) -> Hyperband:
        """The same optimizer with the rungs of a training of ``num_steps`` in rounds of ``round_steps``."""
        inner = fitted_inner(_NAME, self.inner, num_steps, round_steps)
        check_training(_NAME, num_steps, round_steps)
        budgets = bracket_rungs(_NAME, self, _SHARE, num_steps, round_steps)
        return dataclasses.replace(self, inner=inner, budgets=budgets, wait_until=num_steps - round_steps)

    def init(self, key: jax.Array, spec: CubeSpec) -> Brackets:
        check_inner(_NAME, self.inner)
        check_budgets(_NAME, self.budgets)
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
