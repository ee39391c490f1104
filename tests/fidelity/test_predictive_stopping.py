"""Predictive stopping against scipy's regression, a plain simulation, and curves of which the answer is known."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from playing import Notes, curves_of, pace_of, play
from scipy import stats

import jaxhpo as jh
from jaxhpo.fidelity.predictive_stopping import local_line, student_t_cdf

ROUND_STEPS = 10


def line_of(x: np.ndarray, y: np.ndarray, at: float) -> tuple[float, float, float]:
    """Location, scale and degrees of freedom of a new observation at ``at``, in float64 by scipy."""
    x, y, at = x.astype(np.float64), y.astype(np.float64), min(float(at), float(x.max()))
    if np.ptp(x) == 0:
        scale = np.sqrt(y.var(ddof=2) * (1 + 1 / len(x))) if at == x[0] else np.inf
        return y.mean(), scale, len(x) - 2.0
    fit = stats.linregress(x, y)
    rest = ((y - fit.intercept - fit.slope * x) ** 2).sum() / (len(x) - 2)
    away = (at - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    return fit.intercept + fit.slope * at, np.sqrt(rest * (1 + 1 / len(x) + away)), len(x) - 2.0


@pytest.mark.parametrize(("offset", "unit"), [(0.0, 1e-12), (0.0, 1.0), (1e4, 1.0), (-1e4, 1.0), (0.0, 1e15)])
@pytest.mark.parametrize(("count", "nearest"), [(12, 12), (40, 20), (64, 10)])
def test_the_line_is_that_of_scipy_through_the_nearest(count, nearest, offset, unit):
    rng = np.random.default_rng(count)
    x = (unit * (offset + rng.normal(2.0, 1.0, 64))).astype(np.float32)
    y = (unit * (offset + 0.7 * (x / unit - offset) + rng.normal(0.0, 0.3, 64))).astype(np.float32)
    used = np.arange(64) < count
    for at in (-1.0, 1.9, 3.5, 1e3):
        at = np.float32(unit * (offset + at))
        near = np.argsort(np.where(used, np.abs(x - at), np.inf))[:nearest]
        location, scale, dof = jax.jit(local_line)(x, y, used, nearest, at)
        expected = line_of(x[near], y[near], at)
        np.testing.assert_allclose(location, expected[0], rtol=1e-6, atol=1e-3 * expected[1])
        np.testing.assert_allclose((scale, dof), expected[1:], rtol=1e-3)


def test_a_plateau_says_nothing_of_a_trial_that_has_left_it():
    """Dead trainings, all at the same losses: one below them at the check may end anywhere, one at it or above as they did."""
    rng = np.random.default_rng(0)
    for x, y in rng.random((50, 2)).astype(np.float32):
        line = lambda at, x=x, y=y: jax.jit(local_line)(np.full(32, x), np.full(32, y), np.ones(32, bool), 16, np.float32(at))
        location, scale, _ = line(0.9 * x)
        assert location == y
        assert scale == np.inf
        for at in (x, 2.0 * x, 1e38):
            location, scale, _ = line(at)
            assert location == y
            assert 0 < scale < 1e-5


def test_students_distribution_is_that_of_scipy():
    t, dof = np.meshgrid([-1e30, -40.0, -3.0, -0.1, 0.0, 0.5, 2.0, np.inf], [2.0, 8.0, 30.0])
    found = jax.jit(student_t_cdf)(t.astype(np.float32), dof.astype(np.float32))
    np.testing.assert_allclose(found, stats.t.cdf(t, dof), rtol=1e-3, atol=1e-12)


def expected_fates(optimizer, curves: np.ndarray, pace: np.ndarray) -> list:
    """The rule in plain words, lane by lane: fates of the trials and what the inner optimizer is told."""
    checks = [steps // ROUND_STEPS for steps in optimizer.budgets]
    lanes, last = pace.shape[1], curves.shape[1]
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
        known = np.array(whole[-optimizer.memory :])
        for lane in arrived:
            if len(known) < optimizer.min_trials:
                continue
            x, at = known[:, trained[lane] - 1], curves[on[lane], trained[lane] - 1]
            far = np.abs(x - at)
            near = far <= np.sort(far)[max((len(known) + 1) // 2, optimizer.min_trials) - 1]
            best = min(curve[-1] for curve in whole)
            location, scale, dof = line_of(x[near], known[near, -1], at)
            of_any, its_scale, its_dof = line_of(np.zeros(len(known)), known[:, -1], 0.0)
            if stats.t.cdf((best - location) / scale, dof) < optimizer.ratio * stats.t.cdf(
                (best - of_any) / its_scale, its_dof
            ):
                ends[lane], told[on[lane]] = "stopped", location
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
        (1, 100, {"min_trials": 7, "memory": 8}),
        (4, 100, {}),
        (7, 160, {"interval": 30, "ratio": 0.4}),
        (24, 80, {"memory": 16}),
    ],
)
def test_it_decides_as_a_plain_simulation(num_lanes, num_steps, settings, seed):
    optimizer = jh.PredictiveStopping(Notes(num_lanes), spared=0.0, **settings).for_training(num_steps, ROUND_STEPS)
    curves = curves_of(seed, 4000, num_steps // ROUND_STEPS)
    pace = pace_of(seed, 1800 // (num_lanes + 5), num_lanes)
    played = play(optimizer, curves, pace, ROUND_STEPS)
    expected = expected_fates(optimizer, curves, pace)
    assert [trial.fate for trial in played] == [fate for fate, _ in expected]
    over = [i for i, (fate, _) in enumerate(expected) if fate[-1] and fate[1] + 1 < len(pace) and not np.isnan(played[i].told)]
    assert len(over) > 25
    np.testing.assert_allclose([played[i].told for i in over], [expected[i][1] for i in over], rtol=2e-4, atol=2e-5)
    assert {"whole", "stopped", "diverged"} <= {trial.ended for trial in played}


def shares(curves: np.ndarray, rounds: int = 300, **settings) -> tuple[int, int, list[int]]:
    """On 4 lanes: trials that ended, and the numbers of those trained whole."""
    optimizer = jh.PredictiveStopping(Notes(4), **settings).for_training(curves.shape[1] * ROUND_STEPS, ROUND_STEPS)
    played = play(optimizer, curves.astype(np.float32), np.ones((rounds, 4), bool), ROUND_STEPS)
    return sum(trial.ended != "" for trial in played), [trial.number for trial in played if trial.ended == "whole"]


def test_where_the_first_losses_tell_much_few_trials_are_trained_whole():
    """Final losses are those at a check, shifted, but for a noise of 3 %: only trials near the best go on."""
    rng = np.random.default_rng(0)
    curves = rng.random((4000, 1)) + 2.0 * np.exp(-np.arange(10) / 3.0) + 0.03 * rng.normal(size=(4000, 10))
    ended, whole = shares(curves, spared=0.0)
    assert ended > 700
    assert 10 <= len(whole) < 0.1 * ended


def test_spared_trials_are_trained_whole():
    """A share of 0.3, of more than 200 trials: a binomial is within 0.15 of it but for a chance of 1e-5; the first ten and
    those near the best are whole anyway."""
    rng = np.random.default_rng(0)
    curves = rng.random((4000, 1)) + 2.0 * np.exp(-np.arange(10) / 3.0) + 0.01 * rng.normal(size=(4000, 10))
    ended, whole = shares(curves, spared=0.3)
    assert ended > 200
    assert 0.15 < len(whole) / ended < 0.5
    ended, whole = shares(curves, rounds=100, spared=1.0)
    assert ended == len(whole)


DRAWS = {
    "uniform": lambda rng, shape: rng.random(shape),
    "normal": lambda rng, shape: rng.normal(size=shape),
    "long tail of good ones": lambda rng, shape: -rng.lognormal(size=shape),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_where_losses_say_nothing_of_the_end_the_search_goes_on(draw):
    """Losses independent of the final one. Over 30 seeds never fewer than 0.7 of the trials were whole, and where the lowest
    losses are far out, so that lines through few points seem to say much, still two or more in the second half."""
    rng = np.random.default_rng(0)
    ended, whole = shares(DRAWS[draw](rng, (4000, 10)), rounds=400)
    assert sum(number > ended / 2 for number in whole) > 0
    if draw != "long tail of good ones":
        assert len(whole) > 0.6 * ended


def test_no_trial_is_stopped_before_enough_are_whole():
    """Of eight that are whole the losses at a check tell the final ones. All others are far worse at the first check, where
    they would be stopped, and diverge after it."""
    curves = np.full((400, 10), np.nan, np.float32)
    curves[:8] = np.linspace(1.0, 0.1, 10) + np.arange(8)[:, None] + 0.01 * np.random.default_rng(0).random((8, 10))
    curves[8:, 0] = 9.0
    ends = {}
    for min_trials in (8, 9):
        optimizer = jh.PredictiveStopping(Notes(4), min_trials=min_trials, spared=0.0).for_training(100, ROUND_STEPS)
        ends[min_trials] = [trial.ended for trial in play(optimizer, curves, np.ones((60, 4), bool), ROUND_STEPS)]
        assert ends[min_trials].count("whole") == 8
    assert "stopped" in ends[8]
    assert "stopped" not in ends[9]
    assert ends[9].count("diverged") > 20


def test_a_memory_too_small_is_refused_in_one_line():
    optimizer = jh.PredictiveStopping(jh.RandomSearch(4), min_trials=20, memory=10, budgets=(1,))
    with pytest.raises(jh.JaxhpoError, match=r"^PredictiveStopping: memory = 10: at least min_trials = 20 is due$"):
        optimizer.init(jax.random.key(0), jh.CubeSpec.floats(2))
