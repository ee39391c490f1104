"""Predictive stopping against scipy's regression, a plain simulation, and curves of which the answer is known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playing import Notes, curves_of, pace_of, play
from scipy import stats

import jaxhpo as jh
from jaxhpo.fidelity.predictive_stopping import local_line, student_cdf

ROUND_STEPS = 10


def line_of(x: np.ndarray, y: np.ndarray, at: float) -> tuple[float, float, float]:
    """Location, scale and degrees of freedom of an observation at ``at``, in float64 by scipy."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if np.ptp(x) == 0:
        return y.mean(), np.sqrt(y.var(ddof=2) * (1 + 1 / len(x))), len(x) - 2.0
    fit = stats.linregress(x, y)
    rest = ((y - fit.intercept - fit.slope * x) ** 2).sum() / (len(x) - 2)
    away = (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    return fit.intercept + fit.slope * at, np.sqrt(rest * (1 + 1 / len(x) + away)), len(x) - 2.0


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize(("count", "nearest"), [(12, 12), (40, 20), (64, 10)])
def test_the_line_is_that_of_scipy_through_the_nearest(count, nearest, unit):
    rng = np.random.default_rng(count)
    x = rng.normal(2.0, 1.0, 64).astype(np.float32)
    y = (0.7 * x + rng.normal(0.0, 0.3, 64)).astype(np.float32)
    used = np.arange(64) < count
    for at in (-1.0, 1.9, 3.5):
        near = np.argsort(np.where(used, np.abs(x - np.float32(at)), np.inf))[:nearest]
        found = jax.jit(local_line)(x * unit, y * unit, used, nearest, jnp.float32(at * unit))
        location, scale, freedom = line_of(x[near], y[near], at)
        np.testing.assert_allclose(found, (location * unit, scale * unit, freedom), rtol=1e-4)


def test_students_distribution_is_that_of_scipy():
    t, freedom = np.meshgrid([-1e30, -40.0, -3.0, -0.1, 0.0, 0.5, 2.0, np.inf], [2.0, 8.0, 30.0])
    found = jax.jit(student_cdf)(t.astype(np.float32), freedom.astype(np.float32))
    np.testing.assert_allclose(found, stats.t.cdf(t, freedom), rtol=1e-3, atol=1e-12)


def expected_fates(optimizer, curves: np.ndarray, pace: np.ndarray) -> list:
    """The rule in plain words, lane by lane: fates of the trials and what the inner optimizer is told."""
    checks = [steps // ROUND_STEPS for steps in optimizer.budgets]
    lanes, last = pace.shape[1], curves.shape[1]
    rows = max(optimizer.memory, lanes)
    whole: list[np.ndarray] = []
    on, fates, told, begun = list(range(lanes)), {}, {}, lanes
    trained, began = [0] * lanes, [0] * lanes
    for number in range(len(pace)):
        ends, arrived = {}, []
        for lane in np.flatnonzero(pace[number]):
            trained[lane] += 1
            loss = curves[on[lane], trained[lane] - 1]
            if np.isnan(loss):
                ends[lane], told[on[lane]] = "diverged", np.inf
            elif trained[lane] == last:
                ends[lane], told[on[lane]] = "whole", loss
                whole.append(curves[on[lane]])
            elif trained[lane] in checks:
                arrived.append(lane)
        known = np.array(whole[-rows:])
        for lane in arrived:
            if len(known) < optimizer.min_trials:
                continue
            x, at = known[:, trained[lane] - 1], curves[on[lane], trained[lane] - 1]
            far = np.abs(x - at)
            near = far <= np.sort(far)[max((len(known) + 1) // 2, optimizer.min_trials) - 1]
            location, scale, freedom = line_of(x[near], known[near, -1], at)
            best = min(curve[-1] for curve in whole)
            if stats.t.cdf((best - location) / scale, freedom) < optimizer.least_chance:
                ends[lane], told[on[lane]] = "stopped", max(location, best)
        if number + 1 == len(pace):
            ends = {lane: how for lane, how in ends.items() if how != "stopped"}  # not seen any more by the player
        for lane in sorted(ends):
            fates[on[lane]] = (int(lane), began[lane], trained[lane], ends[lane])
            if number + 1 < len(pace):
                on[lane], trained[lane], began[lane], begun = begun, 0, number + 1, begun + 1
    for lane in range(lanes):
        fates.setdefault(on[lane], (lane, began[lane], trained[lane], ""))
    return [(fates[i], told.get(i, np.nan)) for i in range(begun)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("num_lanes", "num_steps", "settings"),
    [
        (1, 100, {"min_trials": 4, "memory": 8}),
        (4, 100, {}),
        (7, 160, {"interval": 30, "least_chance": 0.1}),
        (24, 80, {"memory": 16}),
    ],
)
def test_it_decides_as_a_plain_simulation(num_lanes, num_steps, settings, seed):
    optimizer = jh.PredictiveStopping(Notes(num_lanes), **settings).for_training(num_steps, ROUND_STEPS)
    curves = curves_of(seed, 4000, num_steps // ROUND_STEPS)
    pace = pace_of(seed, 1800 // (num_lanes + 5), num_lanes)
    played = play(optimizer, curves, pace, ROUND_STEPS)
    expected = expected_fates(optimizer, curves, pace)
    assert [trial.fate for trial in played] == [fate for fate, _ in expected]
    over = [i for i, (fate, _) in enumerate(expected) if fate[-1] and fate[1] + 1 < len(pace) and not np.isnan(played[i].told)]
    assert len(over) > 25
    np.testing.assert_allclose([played[i].told for i in over], [expected[i][1] for i in over], rtol=2e-4, atol=2e-5)
    assert {"whole", "stopped", "diverged"} <= {trial.ended for trial in played}


def trained_whole(curves: np.ndarray, rounds: int) -> tuple[int, int]:
    """Trials that began on 4 lanes and those of them trained whole."""
    optimizer = jh.PredictiveStopping(Notes(4)).for_training(curves.shape[1] * ROUND_STEPS, ROUND_STEPS)
    played = play(optimizer, curves, np.ones((rounds, 4), bool), ROUND_STEPS)
    return len(played), sum(trial.ended == "whole" for trial in played)


def test_where_the_first_losses_tell_all_hardly_any_trial_is_trained_whole():
    """Final losses are a line of the losses before: of n trials the expected number of new lowest ones is the harmonic sum."""
    rng = np.random.default_rng(0)
    curves = rng.random((4000, 1)) + 2.0 * np.exp(-np.arange(10) / 3.0)
    begun, whole = trained_whole(curves.astype(np.float32), 300)
    assert begun > 900
    records = np.minimum.accumulate(curves[:, -1])
    assert 10 <= whole <= 20 + 2 * len(np.unique(records[:begun]))


def test_where_losses_tell_nothing_of_the_end_trials_are_trained_whole():
    """Losses that are independent of the final one. Of 100 trials each checked 9 times a false stop needs a chance below
    0.01 of being the lowest, which a line without slope rarely gives: over 200 seeds never fewer than 60 were whole."""
    rng = np.random.default_rng(1)
    curves = rng.random((4000, 10)).astype(np.float32)
    begun, whole = trained_whole(curves, 300)
    assert whole > 0.5 * begun


def test_a_memory_too_small_is_refused_in_one_line():
    optimizer = jh.PredictiveStopping(jh.RandomSearch(4), min_trials=20, memory=10, budgets=(1,))
    with pytest.raises(jh.JaxhpoError, match=r"^PredictiveStopping: memory = 10: at least min_trials = 20 is due$"):
        optimizer.init(jax.random.key(0), jh.CubeSpec.floats(2))
