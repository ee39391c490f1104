"""Every optimizer inside every wrapper keeps the protocol: a product over the registry, no exceptions by name."""

from __future__ import annotations

import dataclasses

import chex
import jax
import numpy as np
import protocol_checks as checks
import pytest
from protocol_checks import CASES, plan, random_done, run_jit

from jaxhpo.core import problems_of
from jaxhpo.optimizers import registry

WRAPPERS = [name for name, entry in registry.ENTRIES.items() if entry.wraps is not None and entry.inner == "inner"]
INNERS = [name for name in registry.ENTRIES if name not in WRAPPERS]
ROUNDS = 20


def pairs():
    """All pairs. By default every inner optimizer runs in one wrapper and every wrapper around one, the rest is slow."""
    for i, inner in enumerate(INNERS):
        for j, wrapper in enumerate(WRAPPERS):
            light = i % len(WRAPPERS) == j % len(INNERS)
            yield pytest.param(wrapper, inner, marks=() if light else pytest.mark.slow, id=f"{wrapper}({inner})")


@pytest.mark.parametrize(("wrapper", "inner"), pairs())
def test_every_optimizer_keeps_the_protocol_inside_every_wrapper(wrapper, inner):
    spec, num_lanes = CASES["mixed"]
    optimizer = dataclasses.replace(registry.example(wrapper, num_lanes), inner=registry.example(inner, num_lanes))
    assert problems_of(optimizer) == []
    assert optimizer.num_lanes == num_lanes
    assert getattr(optimizer, "needs_gradient", False) == getattr(registry.load(inner), "needs_gradient", False)
    key = jax.random.key(0)

    def go(**changes):
        state, trace = run_jit(optimizer, spec, key, plan(num_lanes, ROUNDS, **changes))
        assert trace.clean.all()
        checks.check_query(trace.query, spec, num_lanes)
        return state, trace

    whole = go()
    chex.assert_trees_all_equal(whole, go())
    asked = np.asarray(whole[1].query.parent)
    assert (asked[0] == -1).all()
    assert (asked == np.arange(num_lanes)).any(), "no trial ever went on"
    assert (asked[1:] == -1).any(), "no lane ever began another trial"

    pending = [go(done=random_done(num_lanes, ROUNDS), junk=junk) for junk in (0.0, np.nan, -1e30)]
    for state, trace in pending:
        assert trace.kept.all(), f"rows of pending lanes changed in rounds {np.flatnonzero(~np.asarray(trace.kept))}"
        chex.assert_trees_all_equal((state, trace.query), (pending[0][0], pending[0][1].query))

    failed = [go(fails=True, bad=bad)[0] for bad in (np.nan, np.inf, -np.inf)]
    chex.assert_trees_all_equal(*failed)
