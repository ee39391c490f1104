"""The particle swarm: its moves against NumPy, mixed dimensions, failures, and what it reaches."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxhpo.benchmarks import functions
from jaxhpo.core import CubeSpec, Feedback, Kind, Query, Run, problems_of
from jaxhpo.optimizers import pso
from jaxhpo.optimizers.pso import PSO, Swarm

FLOATS = CubeSpec.floats(4)


init = jax.jit(lambda swarm, key, spec: swarm.init(key, spec), static_argnums=2)
update = jax.jit(lambda swarm, key, state, query, feedback: swarm.update(key, state, query, feedback))


def swarm_losses(loss, spec, swarm, key, rounds):
    """All losses of a search, ``f32[R, B]``, all points ``f32[R, B, D]``, and the last state."""

    def one_round(state, key):
        query = swarm.ask(key, state)
        losses = loss(query.cube)
        return swarm.update(key, state, query, Feedback.finished(losses)), (losses, query.cube)

    state = swarm.init(jax.random.fold_in(key, 0), spec)
    state, (losses, cubes) = jax.lax.scan(one_round, state, jax.random.split(jax.random.fold_in(key, 1), rounds))
    return losses, cubes, state


def searches(loss, spec, swarm, seeds, rounds):
    keys = jax.random.split(jax.random.key(7), seeds)
    return jax.jit(jax.vmap(lambda key, swarm: swarm_losses(loss, spec, swarm, key, rounds), (0, None)))(keys, swarm)


def cube_loss(problem):
    return jax.vmap(lambda z: problem.loss(None, problem.space.decode(z)) - problem.optimum)


@pytest.mark.parametrize("rule", ["inertia", "constriction"])
def test_velocity_is_that_of_a_plain_reference(rule):
    rng = np.random.default_rng(0)
    x, v, own, lead, r1, r2 = rng.random((6, 5, 3)).astype(np.float32)
    if rule == "inertia":
        weights = (0.6, 1.7, 1.3)
        expected = 0.6 * v + 1.7 * r1 * (own - x) + 1.3 * r2 * (lead - x)
    else:
        weights = pso.constricted(jnp.float32(2.05), jnp.float32(2.25))
        phi = 2.05 + 2.25
        chi = 2.0 / abs(2.0 - phi - np.sqrt(phi**2 - 4.0 * phi))
        expected = chi * (v + 2.05 * r1 * (own - x) + 2.25 * r2 * (lead - x))
    np.testing.assert_allclose(pso.accelerate(x, v, own, lead, (r1, r2), weights), expected, rtol=2e-5, atol=1e-6)


def test_a_whole_textbook_move_follows_the_rule():
    """With all dimensions moving, two moves differ only by inertia * velocity, whatever the random numbers are."""
    swarm = PSO(6, 0.7, 1.5, 1.5, neighbourhood="global", crossover_low=1.0, shared=0.0)
    rng = np.random.default_rng(1)
    place = (0.4 + 0.2 * rng.random((2, 6, 4))).astype(np.float32)
    velocity = (0.02 * rng.standard_normal((6, 4))).astype(np.float32)
    loss = np.arange(6, dtype=np.float32)[::-1].copy()
    state = Swarm(place[0], velocity, place[1], np.full(6, -1.0, np.float32), FLOATS)  # nothing is better than the bests
    move = lambda state: update(swarm, jax.random.key(3), state, Query.fresh(state.position), Feedback.finished(loss))
    with_inertia, without = move(state), move(dataclasses.replace(state, velocity=0.0 * velocity))
    np.testing.assert_allclose(with_inertia.position - without.position, 0.7 * velocity, atol=1e-6)
    np.testing.assert_allclose(with_inertia.velocity, with_inertia.position - place[0], atol=1e-7)
    at_best = dataclasses.replace(state, position=place[1], velocity=0.0 * velocity)
    np.testing.assert_allclose(move(at_best).position[0], place[1][0], atol=1e-7)  # the leader itself feels no pull
    between = (move(at_best).position - place[1]) / (place[1][0] - place[1])
    assert ((between[1:] > 0) & (between[1:] < 1.5)).all()  # a random part of 1.5 times the way to the leader


def test_constriction_at_the_usual_sum_and_below_four():
    chi, cognitive, social = pso.constricted(jnp.float32(2.05), jnp.float32(2.05))
    np.testing.assert_allclose([chi, cognitive, social], [0.72984, 1.49618, 1.49618], rtol=1e-5)
    scaled = pso.constricted(jnp.float32(1.0), jnp.float32(1.0))
    np.testing.assert_allclose(scaled, [chi, cognitive, social], rtol=1e-6)


@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_ring_leaders_are_those_of_brute_force(lanes):
    words = jnp.zeros(lanes, jnp.uint32)
    for seed in range(5):
        loss = np.random.default_rng(seed).random(lanes).astype(np.float32)
        expected = [min((i, (i - 1) % lanes, (i + 1) % lanes), key=lambda j: loss[j]) for i in range(lanes)]
        np.testing.assert_array_equal(pso.leaders(jnp.asarray(loss), "ring", words, 0), expected)


def test_random_leaders_are_no_worse_and_global_is_the_best():
    loss = jnp.asarray(np.random.default_rng(0).random(50), jnp.float32)
    words = pso.random_words(jax.random.key(0), np.arange(50))
    lead = pso.leaders(loss, "random", words, 3)
    assert (loss[lead] <= loss).all()
    # Four draws of 50: the mean rank of the lowest is 50 / 5 = 10, with a standard error of about 1.2.
    assert 5 < float((loss[:, None] < loss[lead]).sum(0).mean()) < 15
    assert (pso.leaders(loss, "global", words, 3) == jnp.argmin(loss)).all()
    np.testing.assert_array_equal(pso.leaders(jnp.full(4, jnp.inf), "global", words[:4], 3), np.arange(4))


def test_random_numbers_are_uniform_and_independent():
    """Chi-square over 256 cells and correlations of 2^18 numbers; each fails by chance less than once in 10^5."""
    keys = jax.random.split(jax.random.key(0), 256)
    words = jax.vmap(lambda key: pso.random_words(key, np.arange(1024)))(keys)
    for u in pso.halves(words):
        u = np.asarray(u, np.float64)
        counts = np.bincount((u.ravel() * 256).astype(int), minlength=256)
        assert 170 < ((counts - 1024.0) ** 2 / 1024.0).sum() < 360
    high, low = (np.asarray(u, np.float64) - 0.5 for u in pso.halves(words))
    for a, b in [(high, low), (high[:, 1:], high[:, :-1]), (high[1:], high[:-1]), (high[:, 10:], low[:, :-10])]:
        assert abs((a * b).mean() * 12.0 * np.sqrt(a.size)) < 4.5  # a standard normal


@pytest.mark.parametrize("bounds", ["reflect", "damp"])
def test_steps_end_inside_and_off_the_bounds(bounds):
    rng = np.random.default_rng(0)
    x, v, u = (rng.random((500, 3)), 1.5 * rng.standard_normal((500, 3)), rng.random((500, 3)))
    x, v, u = (jnp.asarray(a, jnp.float32) for a in (x, v, 0.01 + 0.98 * u))
    moved = pso.keep_inside(x, v, bounds, u)
    inside = (x + v >= 0) & (x + v <= 1)
    np.testing.assert_array_equal(moved[inside], (x + v)[inside])
    assert ((moved > 0) & (moved < 1)).all()
    once = np.asarray((x + v > 1) & (x + v < 2))
    expected = 2 - (x + v) if bounds == "reflect" else x + u * (1 - x)
    np.testing.assert_allclose(np.asarray(moved)[once], np.asarray(expected)[once], atol=1e-6)


@pytest.mark.parametrize("bounds", ["reflect", "damp"])
@pytest.mark.parametrize("place", [0.0, 0.003])
def test_an_optimum_at_or_near_a_bound_is_approached_without_collapse(bounds, place):
    loss = lambda cube: ((cube - place) ** 2).sum(-1)
    losses, cubes, state = searches(loss, FLOATS, PSO(16, bounds=bounds), 5, 80)
    assert float(losses.min((1, 2)).max()) < 1e-6
    assert float((cubes == 0).mean()) < 0.01
    assert not bool((state.best == 0).all((1, 2)).any())


def test_converges_on_a_sphere():
    problem = functions.sphere(10, shift=np.linspace(-2.0, 5.0, 10))
    losses, _, _ = searches(cube_loss(problem), problem.space.spec, PSO(64), 5, 200)
    assert float(losses.min((1, 2)).max()) < 1e-10  # float32 ends at about 1e-12


def test_narrow_steps_still_change_levels():
    """A swarm that sits on one level, one below the best in each dimension: rounding alone would stay for ever."""
    spec = CubeSpec((Run(Kind.INT, 10, count=3), Run(Kind.CHOICE, 4, count=2)))
    best = jnp.array([7, 2, 5, 3, 1])
    state = init(PSO(8), jax.random.key(0), spec)
    stuck = jnp.broadcast_to(spec.cube_of(best - 1), (8, 5))
    state = dataclasses.replace(state, position=stuck, best=stuck, velocity=jnp.zeros((8, 5)))

    def one_round(state, key):
        losses = (spec.level_of(state.position) != best).sum(-1).astype(jnp.float32)
        return PSO(8).update(key, state, Query.fresh(state.position), Feedback.finished(losses)), losses

    _, losses = jax.jit(lambda state: jax.lax.scan(one_round, state, jax.random.split(jax.random.key(1), 150)))(state)
    assert float(losses[0].min()) == 5.0
    # From 5 wrong of 5: a move mends one with probability 5 / 50 or more at first; 1200 moves fail about never.
    assert float(losses.min()) == 0.0


def test_discrete_points_are_on_levels_and_the_own_best_is_not_asked_again():
    spec = CubeSpec((Run(Kind.INT, 9, log_low=2), Run(Kind.CHOICE, 3, count=2)))
    _, cubes, state = searches(lambda cube: ((cube - 0.7) ** 2).sum(-1), spec, PSO(6), 4, 30)
    np.testing.assert_allclose(cubes, spec.snap(cubes), atol=1e-6)
    assert not bool(jnp.all(jnp.abs(state.position - state.best) < 1e-6, axis=-1).any())


def test_a_single_particle_does_not_come_to_rest():
    losses, _, _ = searches(lambda cube: ((cube - 0.3) ** 2).sum(-1), CubeSpec.floats(1), PSO(1), 9, 60)
    assert float(jnp.median(losses.min((1, 2)))) < 1e-4


def test_solves_the_mixed_problem():
    problem = functions.mixed_integer(10, shift=2.0, seed=5)
    losses, _, _ = searches(cube_loss(problem), problem.space.spec, PSO(64), 8, 200)
    assert float(jnp.median(losses.min((1, 2)))) < 1e-6


def test_lanes_that_are_not_done_stay_bit_for_bit():
    swarm, key = PSO(8), jax.random.key(0)
    state = init(swarm, key, FLOATS)
    state = update(swarm, key, state, swarm.ask(key, state), Feedback.finished(jnp.arange(8.0)))
    done = jnp.array([True, False] * 4)
    feedback = Feedback(jnp.where(done, 0.5, -100.0), done, jnp.ones(8, jnp.int32))
    after = update(swarm, jax.random.key(1), state, swarm.ask(key, state), feedback)
    for before, now in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(before[1::2], now[1::2])
    assert (np.asarray(after.position[::2]) != np.asarray(state.position[::2])).any(axis=1).all()
    np.testing.assert_array_equal(swarm.ask(jax.random.key(5), after).cube[1::2], state.position[1::2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_failures_never_become_a_best(bad):
    swarm, key = PSO(6), jax.random.key(0)
    state = init(swarm, key, FLOATS)
    nothing = update(swarm, key, state, swarm.ask(key, state), Feedback.finished(jnp.full(6, bad)))
    assert np.isinf(nothing.best_loss).all()
    assert np.isfinite(nothing.position).all()
    assert np.isfinite(nothing.velocity).all()
    assert (np.abs(nothing.position - state.position).max(axis=1) > 0).all()  # all start again elsewhere
    one = update(swarm, key, nothing, swarm.ask(key, nothing), Feedback.finished(jnp.where(jnp.arange(6) == 2, 1.0, bad)))
    np.testing.assert_array_equal(np.isfinite(one.best_loss), np.arange(6) == 2)
    again = update(swarm, key, one, swarm.ask(key, one), Feedback.finished(jnp.full(6, bad)))
    np.testing.assert_array_equal(again.best_loss, one.best_loss)
    np.testing.assert_array_equal(again.best[2], nothing.position[2])


def test_a_diverged_particle_turns_round_at_its_best():
    """The leader alone, so that only inertia moves it: from its best, half the step that failed, backwards."""
    swarm = PSO(2, 0.5, crossover_low=1.0)
    best, step = jnp.full((2, 4), 0.5), jnp.full((2, 4), 0.1)
    state = Swarm(best + step, step, best, jnp.arange(2.0), FLOATS)
    after = update(
        swarm, jax.random.key(0), state, swarm.ask(jax.random.key(0), state), Feedback.finished(jnp.full(1, jnp.nan))
    )
    np.testing.assert_allclose(after.position, best - 0.5 * step, atol=1e-6)


def test_finds_an_optimum_beside_a_cliff_of_failures():
    """60 trials a search. The median of 100 searches is 0.0005 with a standard error of about 0.0001."""
    problem = functions.nan_cliff()
    losses, _, _ = searches(cube_loss(problem), problem.space.spec, PSO(6), 100, 10)
    assert float(jnp.median(jnp.nanmin(losses, axis=(1, 2)))) < 1e-3


def test_a_vmap_over_settings_gives_what_separate_runs_give_and_nothing_recompiles():
    problem = functions.rastrigin(3, shift=1.0)
    traces = []

    def lowest(swarm):
        traces.append(1)
        return swarm_losses(cube_loss(problem), problem.space.spec, swarm, jax.random.key(0), 20)[0].min()

    single = jax.jit(lowest)
    inertias = jnp.array([0.3, 0.5, 0.7])
    apart = [single(PSO(10, inertia=inertia, local=local)) for inertia, local in zip(inertias, [0.1, 0.5, 0.9], strict=True)]
    assert len(traces) == 1
    axes = dataclasses.replace(jax.tree.map(lambda _: None, PSO(10)), inertia=0, local=0)
    many: dict[str, Any] = {"inertia": inertias, "local": jnp.array([0.1, 0.5, 0.9])}
    together = jax.vmap(lowest, (axes,))(PSO(10, **many))
    np.testing.assert_allclose(together, apart, rtol=1e-4)
    assert len(set(np.asarray(together).tolist())) == 3


@pytest.mark.parametrize("neighbourhood", ["global", "ring", "random"])
@pytest.mark.parametrize("rule", ["inertia", "constriction"])
def test_every_rule_and_neighbourhood_searches(neighbourhood, rule):
    swarm = PSO(12, rule=rule, neighbourhood=neighbourhood)
    losses, _, _ = searches(lambda cube: ((cube - 0.3) ** 2).sum(-1), FLOATS, swarm, 4, 60)
    assert float(losses.min((1, 2)).max()) < 1e-2 * float(losses[:, 0].min(1).max())


def test_keeps_the_type_of_its_state(x64):
    swarm, key = PSO(4), jax.random.key(0)
    for dtype in (jnp.float32, jnp.float64):
        state = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), init(swarm, key, FLOATS))
        after = update(swarm, key, state, swarm.ask(key, state), Feedback.finished(jnp.arange(4.0)))
        assert {x.dtype for x in jax.tree.leaves(after)} == {jnp.dtype(dtype)}


def test_wrong_settings_are_named():
    assert problems_of(PSO(8)) == []
    lines = problems_of(PSO(0, inertia=-1.0, bounds="clip"))
    assert [line.split(" ")[0] for line in lines] == ["num_lanes", "inertia", "bounds"]
