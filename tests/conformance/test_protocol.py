"""Every optimizer of the registry keeps the protocol of :mod:`jaxhpo.core`: one suite, no exceptions by name."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import protocol_checks as checks
import pytest
from protocol_checks import CASES, MIXED, ROUNDS, example_run, plan, random_done, run, run_jit

from jaxhpo.core import Feedback, Optimizer, problems_of
from jaxhpo.errors import JaxhpoError
from jaxhpo.optimizers import registry

every_optimizer = pytest.mark.parametrize("name", registry.ENTRIES)
every_case = pytest.mark.parametrize("case", checks.cases())


def example(name: str, case: str = "mixed") -> Optimizer:
    return registry.example(name, CASES[case].num_lanes)


@every_case
@every_optimizer
def test_queries_are_valid_and_the_same_key_gives_the_same_run(name, case):
    state, trace = example_run(name, case)
    checks.check_query(trace.query, *CASES[case])
    assert trace.clean.all()
    again = run_jit(example(name, case), CASES[case].spec, jax.random.key(0), plan(CASES[case].num_lanes))
    chex.assert_trees_all_equal((state, trace), again)


@every_case
@every_optimizer
def test_lanes_not_done_keep_their_row_and_their_loss_is_never_read(name, case):
    spec, num_lanes = CASES[case]
    done = random_done(num_lanes)
    key = jax.random.key(1)
    runs = []
    for junk in (0.0, np.nan, np.inf, -np.inf, -1e30, np.random.default_rng(0).normal(size=done.shape)):
        state, trace = run_jit(example(name, case), spec, key, plan(num_lanes, done=done, junk=junk))
        assert trace.kept.all(), f"rows of pending lanes changed in rounds {np.flatnonzero(~np.asarray(trace.kept))}"
        assert trace.clean.all()
        runs.append((state, trace.query))
    for other in runs[1:]:
        chex.assert_trees_all_equal(runs[0], other)


@pytest.mark.parametrize("case", checks.cases(least_lanes=2))
@every_optimizer
def test_pending_rows_do_not_depend_on_the_order_in_which_other_lanes_end(name, case):
    """Each lane waits for all others, which end in two different orders and with different losses."""
    spec, num_lanes = CASES[case]
    first = np.asarray(example_run(name, case)[1].query.cube[0])
    for last in range(num_lanes):
        for turn, bad in ((1, np.nan), (-1, 3.0)):
            others = np.roll([lane for lane in range(num_lanes) if lane != last][::turn], last)
            done = others[np.arange(ROUNDS) % len(others)][:, None] == np.arange(num_lanes)
            _, trace = run_jit(
                example(name, case), spec, jax.random.key(0), plan(num_lanes, done=done, bad=bad, cliff=0.5, salt=turn)
            )
            assert trace.kept.all()
            np.testing.assert_array_equal(trace.query.cube[:, last], np.broadcast_to(first[last], (ROUNDS, spec.num_dims)))


@every_case
@every_optimizer
def test_nothing_done_changes_nothing(name, case):
    optimizer, (state, trace) = example(name, case), example_run(name, case)
    num_lanes = optimizer.num_lanes
    query = jax.tree.map(lambda x: x[-1], trace.query)
    junk = jnp.full(num_lanes, -1e9)
    grad = jnp.full_like(query.cube, -1e9)
    feedback = Feedback(junk, jnp.zeros(num_lanes, bool), jnp.full(num_lanes, 99, jnp.int32), grad)
    for seed in range(3):
        chex.assert_trees_all_equal(_update_jit(optimizer, jax.random.key(seed), state, query, feedback), state)


@every_case
@every_optimizer
def test_failures_leave_no_trace_in_the_state(name, case):
    """All trials fail from the start; NaN and both infinities are the same to the search."""
    spec, num_lanes = CASES[case]
    states = []
    for bad in (np.nan, np.inf, -np.inf):
        state, trace = example_run(name, case, fails=True, bad=bad)
        assert trace.clean.all()
        checks.check_query(trace.query, spec, num_lanes)
        states.append(state)
    chex.assert_trees_all_equal(*states)


@every_case
@every_optimizer
def test_a_half_of_the_cube_that_fails_is_never_the_best(name, case):
    """The bowl is lowest where trials fail if ``bad`` were a loss: no failed trial may pass for a good one.

    A failure that counted as any number would make the runs differ between NaN and the infinities, and the
    search still has to find better points: of 8 runs at least 5. For independent uniform points a run fails to
    improve if the best of its n finite points is in the first batch, in less than 1 of 20 runs, so 4 of 8 do in less than
    1 of 2000; a first batch that fails altogether counts as improved by any finite loss.
    """
    improved = 0
    for seed in range(8):
        state, trace = example_run(name, case, seed, cliff=0.4)
        other, _ = example_run(name, case, seed, cliff=0.4, bad=-np.inf)
        chex.assert_trees_all_equal(state, other)
        assert trace.clean.all()
        loss = np.where(np.isnan(trace.loss), np.inf, trace.loss)
        improved += loss[1:].min() < loss[0].min()
    assert improved >= 5


@every_case
@every_optimizer
def test_it_improves_over_its_first_batch(name, case):
    """Independent uniform points fail to improve on the first of 40 batches in 1 of 40 runs, so 4 of 8 runs do in
    less than 1 of 30000."""
    losses = [np.asarray(example_run(name, case, seed)[1].loss) for seed in range(8)]
    assert sum(loss[1:].min() < loss[0].min() for loss in losses) >= 5


@every_case
@every_optimizer
def test_the_state_is_arrays_of_constant_shape_without_keys(name, case):
    spec, _ = CASES[case]
    optimizer, key = example(name, case), jax.random.key(0)
    state = jax.eval_shape(lambda: optimizer.init(key, spec))
    query = jax.eval_shape(lambda s: optimizer.ask(key, s), state)
    feedback = jax.eval_shape(lambda q: checks.told(spec, q.cube), query)
    after = jax.eval_shape(lambda s, q, f: optimizer.update(key, s, q, f), state, query, feedback)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    for leaf, later in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.weak_type) == (later.shape, later.dtype, later.weak_type)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key), "keys are arguments, never state"
        assert leaf.dtype != jnp.float64
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(example_run(name, case)[0]))


def _update(optimizer, key, state, query, feedback):
    return optimizer.update(key, state, query, feedback)


_update_jit = jax.jit(_update)


@every_optimizer
def test_jit_equals_eager(name):
    optimizer, spec, few = example(name), MIXED, 2
    _, trace = example_run(name, "mixed", 3)
    key_init, key_ask, key_update = jax.random.split(jax.random.key(3), 3)
    state = optimizer.init(key_init, spec)
    for number in range(few):
        query = optimizer.ask(jax.random.fold_in(jax.random.fold_in(key_ask, number), 0), state)
        chex.assert_trees_all_close(query, jax.tree.map(lambda x, n=number: x[n], trace.query), rtol=1e-4, atol=1e-5)
        feedback = checks.told(spec, query.cube)
        feedback = dataclasses.replace(feedback, steps=jnp.full_like(feedback.steps, 10 * (number + 1)))
        state = optimizer.update(jax.random.fold_in(key_update, number), state, query, feedback)


@every_optimizer
def test_one_program_for_many_keys_and_settings(name):
    """A vmap over keys and traced settings inside a pmap over devices gives what separate runs give."""
    few = 4  # rounding errors grow with the rounds, most where a search refines what a model proposes
    optimizer, spec, num_lanes = example(name), MIXED, CASES["mixed"].num_lanes
    keys = jax.random.split(jax.random.key(5), 4)
    changed = checks.changed_settings(optimizer)
    settings = [optimizer, changed, optimizer, changed]
    long = plan(num_lanes, done=random_done(num_lanes))
    apart = [run_jit(one, spec, key, long)[1] for one, key in zip(settings, keys, strict=True)]

    short = plan(num_lanes, few, done=random_done(num_lanes)[:few])
    devices = 2 if jax.local_device_count() >= 2 else 1
    split = functools.partial(jax.tree.map, lambda x: x.reshape(devices, -1, *x.shape[1:]))
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(leaves), *settings)
    together = jax.pmap(jax.vmap(lambda one, key: run(one, spec, key, short)[1]))(split(stacked), split(keys))
    for i, expected in enumerate(apart):
        got = jax.tree.map(lambda x, i=i: x.reshape(4, *x.shape[2:])[i], together)
        chex.assert_trees_all_close(got, jax.tree.map(lambda x: x[:few], expected), rtol=0.0, atol=1e-3)


@every_optimizer
def test_rounds_and_settings_never_retrace(name):
    spec = MIXED
    chex.clear_trace_counter()  # it counts by the name and source of the function, so across optimizers

    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def one_round(optimizer, key, state):
        query = optimizer.ask(key, state)
        return optimizer.update(key, state, query, checks.told(spec, query.cube))

    optimizer = example(name)
    state = jax.jit(lambda key: optimizer.init(key, spec))(jax.random.key(0))
    for number, one in enumerate((optimizer, optimizer, checks.changed_settings(optimizer), registry.example(name, 5))):
        state = one_round(one, jax.random.key(number), state)


def test_no_optimizer_passes_for_another():
    """Compiled programs are kept by the structure of what they were given; some optimizers have static settings alone."""
    structures = [jax.tree.structure(registry.example(name, 5)) for name in registry.ENTRIES]
    for i, one in enumerate(structures):
        assert all(one != other for other in structures[:i])


@every_optimizer
def test_settings(name):
    optimizer = example(name)
    assert isinstance(optimizer, Optimizer)
    structure = jax.tree.structure(optimizer)
    assert hash(structure) == hash(jax.tree.structure(example(name)))
    assert structure == jax.tree.structure(checks.changed_settings(optimizer))
    assert structure != jax.tree.structure(registry.example(name, 3))
    assert registry.example(name, 3).num_lanes == 3
    assert problems_of(optimizer) == []
    assert any("num_lanes = 0" in line for line in problems_of(registry.example(name, 0)))
    for setting, wrong in checks.wrong_settings(optimizer).items():
        assert [line for line in problems_of(wrong) if line.startswith(f"{setting} = ")], setting
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.num_lanes = 7  # ty: ignore[invalid-assignment]


def test_registry_lists_without_jax_and_loads_by_name():
    code = (
        "import sys; from jaxhpo.optimizers import registry; print(sorted(registry.ENTRIES)); assert 'jax' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == str(sorted(registry.ENTRIES))
    assert set(registry.OPTIMIZERS) == set(registry.ENTRIES)
    for name, found in registry.OPTIMIZERS.items():
        assert found is registry.load(name)
        assert found.__name__ == name
    with pytest.raises(JaxhpoError, match="'Nelder': must be one of RandomSearch, "):
        registry.load("Nelder")
