"""Successive halving and Hyperband: who goes on is what the papers' tables say, and nobody waits for ever."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from playing import Notes, Trial, curves_of, pace_of, play

import jaxhpo as jh
from jaxhpo.fidelity.brackets import Plan, halved


def levels(seed: int, num_trials: int, num_rounds: int) -> np.ndarray:
    """Curves whose order changes from round to round, and whose values tell the round: all fall by 100 in each."""
    noise = np.random.default_rng(seed).random((num_trials, num_rounds)) * 90
    return (100.0 * np.arange(num_rounds, 0, -1) + noise).astype(np.float32)


def literal(curves: np.ndarray, rungs: tuple[int, ...], sizes: tuple[int, ...]) -> list[int]:
    """Algorithm 1 of Jamieson & Talwalkar 2016 for one bracket: the rung at which each trial ends.

    Args:
        curves: ``[n, rounds]``; a trial that diverged by a rung is the worst there.
        rungs: rounds of all rungs, the whole training last; those before the bracket's first are unused.
        sizes: trials at each rung.
    """
    end, left = [0] * len(curves), list(range(len(curves)))
    for rung, size in enumerate(sizes):
        if size == 0:
            continue
        losses = {i: curves[i, rungs[rung] - 1] for i in left}
        for i in left:
            end[i] = rung
        room = sizes[rung + 1] if rung + 1 < len(sizes) else 0
        left = sorted((i for i in left if np.isfinite(losses[i])), key=lambda i: losses[i])[:room]
    return end


def check_brackets(optimizer, played: list[Trial], curves: np.ndarray, rungs: tuple[int, ...]) -> int:
    """Every bracket that is over, against :func:`literal`; how many there were.

    With the curves of :func:`levels` what the inner optimizer was told is the loss at the rung where the trial ended.
    """
    sizes = optimizer.plan.sizes
    start = checked = 0
    for kind in range(10**6):
        mine = sizes[kind % len(sizes)]
        members = played[start : start + max(mine)]
        if len(members) < max(mine):
            return checked
        start += max(mine)
        if any(np.isnan(trial.told) for trial in members):
            continue  # still under way
        checked += 1
        ends = literal(curves[[trial.number for trial in members]], rungs, mine)
        for trial, end in zip(members, ends, strict=True):
            loss = curves[trial.number, rungs[end] - 1]
            if np.isnan(loss):
                assert trial.ended == "diverged"
            else:
                assert (trial.told, trial.ended) == (loss, "whole" if end == len(rungs) - 1 else "stopped")
    return checked


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "optimizer",
    [
        jh.SuccessiveHalving(Notes(20)),
        jh.SuccessiveHalving(Notes(16), reduction=2),
        jh.SuccessiveHalving(Notes(16), reduction=4, num_configs=13, num_rungs=2),
        jh.Hyperband(Notes(8), reduction=2, num_rungs=3),
        jh.Hyperband(Notes(30)),
    ],
    ids=lambda optimizer: f"{type(optimizer).__name__}-{optimizer.num_lanes}",
)
def test_promotions_are_those_of_the_literal_algorithm(optimizer, seed):
    optimizer, whole = optimizer.for_training(540, 20), 27
    curves = levels(seed, 3000, whole)
    first = np.random.default_rng(seed).random(3000) < 0.2
    curves[first] = np.nan  # these diverge in the first round, before they are at any rung
    rungs = (*(steps // 20 for steps in optimizer.budgets), whole)
    pace = pace_of(seed, 200, optimizer.num_lanes, slow=0.2 * seed)
    checked = check_brackets(optimizer, play(optimizer, curves, pace, 20), curves, rungs)
    assert checked >= 10


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("num_lanes", [1, 2, 5])
@pytest.mark.parametrize("wrapper", [jh.SuccessiveHalving, jh.Hyperband])
def test_it_never_comes_to_rest(wrapper, num_lanes, seed):
    """Trials that diverge at any time, lanes of different speed: in every 60 rounds some trial ends, and all of them do but
    the last ones."""
    optimizer = wrapper(Notes(num_lanes), reduction=2, budgets=(1, 2, 4))
    curves = curves_of(seed, 4000, 8, diverging=0.5)
    played = play(optimizer, curves, pace_of(seed, 400, num_lanes, slow=0.4))
    begins = [trial.began for trial in played]
    assert max(np.diff(begins)) < 60
    assert all(trial.ended for trial in played[: -6 * num_lanes])
    assert sum(trial.ended == "whole" for trial in played) >= 3
    if num_lanes > 2:
        assert sum(trial.ended == "stopped" for trial in played) > 10


@pytest.mark.parametrize("wrapper", [jh.SuccessiveHalving, jh.Hyperband])
def test_when_every_trial_diverges_lanes_are_refilled(wrapper):
    optimizer = wrapper(Notes(9), budgets=(1, 3))
    played = play(optimizer, np.full((400, 9), np.nan, np.float32), np.ones((30, 9), bool))
    assert len(played) == 30 * 9
    assert all(trial.trained == 1 for trial in played)


@pytest.mark.parametrize(
    "optimizer", [jh.SuccessiveHalving(Notes(18)), jh.Hyperband(Notes(27))], ids=lambda one: type(one).__name__
)
def test_lanes_seldom_hold(optimizer):
    """With the default brackets: of all rounds of lanes less than 1 in 20 are held, and less than 1 in 4 train a trial beyond
    the rung at which it is stopped in the end."""
    whole = 27
    optimizer = optimizer.for_training(whole, 1)
    curves = levels(0, 20000, whole)
    played = play(optimizer, curves, np.ones((100, optimizer.num_lanes), bool))
    stopped = [trial for trial in played if trial.ended == "stopped"]
    at = [whole + 1 - int(trial.told) // 100 for trial in stopped]  # the round from which the loss is
    assert set(at) <= set(optimizer.budgets)
    beyond = sum(trial.trained for trial in stopped) - sum(at)
    held, trained = (sum(getattr(trial, name) for trial in played) for name in ("held", "trained"))
    assert held < 0.05 * (held + trained)
    assert beyond < 0.25 * (held + trained)


def test_hyperband_has_the_brackets_of_the_paper():
    """R = 81, eta = 3: n_i and r_i of Li et al. 2018, Table 1, by the formula of Algorithm 1."""
    optimizer = jh.Hyperband(jh.RandomSearch(81), num_rungs=4).for_training(81, 1)
    rungs = (*optimizer.budgets, 81)
    table = [[(n, r) for n, r in zip(sizes, rungs, strict=True) if n] for sizes in optimizer.plan.sizes]
    assert table == [
        [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        [(34, 3), (11, 9), (3, 27), (1, 81)],
        [(15, 9), (5, 27), (1, 81)],
        [(8, 27), (2, 81)],
        [(5, 81)],
    ]


def test_trials_are_dealt_to_brackets_in_turn():
    plan = Plan((halved(4, 2, 2), halved(3, 2, 2, first=1), halved(3, 2, 2, first=2)))
    assert plan.sizes == ((4, 2, 1), (0, 3, 1), (0, 0, 3))
    np.testing.assert_array_equal(plan.first, [0, 1, 2])
    brackets = np.asarray(plan.bracket_of(np.arange(24)))
    np.testing.assert_array_equal(brackets, np.repeat(range(7), [4, 3, 3, 4, 3, 3, 4]))
    np.testing.assert_array_equal(plan.end_of(brackets), np.repeat(np.cumsum([4, 3, 3, 4, 3, 3, 4]), [4, 3, 3, 4, 3, 3, 4]))


def test_defaults_fit_the_lanes():
    plan = lambda lanes, **settings: (
        jh.SuccessiveHalving(jh.RandomSearch(lanes), **settings).for_training(270, 10).plan.sizes[0]
    )
    assert plan(100) == (27, 9, 3, 1)
    assert plan(53) == (9, 3, 1)
    assert plan(3) == plan(17) == (3, 1)
    assert plan(16, reduction=2) == (8, 4, 2, 1)
    assert plan(100, num_configs=100) == (100, 33, 11, 3)
    assert plan(10, num_rungs=3) == (5, 1, 1, 1)
    kinds = lambda lanes, **settings: jh.Hyperband(jh.RandomSearch(lanes), **settings).for_training(270, 10).plan.sizes
    assert kinds(27) == ((9, 3, 1), (0, 5, 1), (0, 0, 3))
    assert kinds(26) == ((3, 1), (0, 2))
    assert kinds(10, num_rungs=3) == ((10, 3, 1, 1), (0, 10, 3, 1), (0, 0, 6, 2), (0, 0, 0, 4))


@jax.jit
def _steps(optimizer, key, state, feedbacks):
    for feedback in feedbacks:
        query = optimizer.ask(key, state)
        state = optimizer.update(key, state, query, feedback)
    return state, optimizer.ask(key, state)


def test_a_waiting_lane_trains_to_the_next_rung_and_no_further():
    """Three lanes, one of them slow: the others go on a round at a time, hold at the next rung, and are then ranked by what
    they had at the rung where they waited."""
    optimizer = jh.SuccessiveHalving(jh.RandomSearch(3), budgets=(1, 4))
    key = jax.random.key(0)
    state = optimizer.init(key, jh.CubeSpec.floats(1))
    feedback = lambda loss, done, steps: jh.Feedback(np.float32(loss), np.asarray(done), np.int32(steps))
    budgets, loss = [], [5.0, 3.0, 0.0]
    for steps in (1, 2, 3, 4, 4):
        state, query = _steps(optimizer, key, state, (feedback(loss, [True, True, False], [steps, steps, 0]),))
        budgets.append(np.asarray(query.budget)[:2].tolist())
        loss = [0.1, 9.0, 0.0]  # in another order from then on
    assert budgets == [[2, 2], [3, 3], [4, 4], [4, 4], [4, 4]]
    # The third comes in worst: lane 1 had the best loss at the rung, and what it has now counts at the next.
    state, query = _steps(optimizer, key, state, (feedback([0.1, 9.0, 7.0], [True] * 3, [4, 4, 1]),))
    np.testing.assert_array_equal(query.parent, [-1, 1, -1])
    np.testing.assert_array_equal(query.budget, [1, jh.FULL, 1])
