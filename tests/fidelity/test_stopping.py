"""ASHA and median stopping against plain simulations in Python, trial by trial, on recorded curves."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from playing import Notes, Trial, curves_of, grown, lifts_of, pace_of, play

import jaxhpo as jh
from jaxhpo.core import Feedback
from jaxhpo.fidelity.table import empty_table, entered, rank_and_count

ROUND_STEPS = 10
Rungs = list[dict[int, list[float]]]  # for each rung, what each trial had seen when it came there


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    """So that they grow within a test."""
    monkeypatch.setattr("jaxhpo.fidelity.table._FIRST", 64)


def simulated(curves, pace, rungs: tuple[int, ...], goes_on: Callable[[Rungs, int, int], bool]) -> list[Trial]:
    """Asynchronous stopping, lane by lane: all that come to a rung in a round are entered, then each is judged.

    Args:
        rungs: rounds.
        goes_on: from what all trials had seen at each rung, the rung and the trial, whether it goes on.
    """
    lanes, whole = pace.shape[1], curves.shape[1]
    seen: Rungs = [{} for _ in rungs]
    trials = [Trial(lane, lane, 0) for lane in range(lanes)]
    on, at = list(trials), [0] * lanes
    ends, ended_in = [], []
    for number in range(len(pace)):
        over, arrived = [], []
        for lane, trial in enumerate(on):
            if not pace[number, lane]:
                continue
            trial.trained += 1
            history = curves[trial.number, : trial.trained]
            if np.isnan(history[-1]):
                trial.ended = "diverged"
                over.append((lane, at[lane], np.nan))
            elif trial.trained == whole:
                trial.ended = "whole"
                over.append((lane, len(rungs), float(history[-1])))
            elif at[lane] < len(rungs) and trial.trained == rungs[at[lane]]:
                seen[at[lane]][trial.number] = [history[r - 1] for r in rungs[: at[lane] + 1]]
                arrived.append(lane)
        for lane in arrived:
            if goes_on(seen, at[lane], on[lane].number):
                at[lane] += 1
            else:
                on[lane].ended = "stopped"
                over.append((lane, at[lane], float(curves[on[lane].number, on[lane].trained - 1])))
        over.sort()
        ends.append(tuple((rung, loss) for _, rung, loss in over))
        ended_in.append([on[lane] for lane, _, _ in over])
        if number + 1 == len(pace):
            for lane, _, _ in over:
                on[lane].ended = on[lane].ended if on[lane].ended != "stopped" else ""  # not seen any more by the player
            ends.pop(), ended_in.pop()
            break
        for lane, _, _ in over:
            if len(trials) == len(curves):
                return trials
            on[lane], at[lane] = Trial(len(trials), lane, number + 1), 0
            trials.append(on[lane])
    for told, of_round in zip(lifts_of(tuple(ends)), ended_in, strict=True):
        for value, trial in zip(told, of_round, strict=True):
            trial.told = value
    return trials


def check_equal(played: list[Trial], expected: list[Trial]) -> None:
    assert [trial.fate for trial in played] == [trial.fate for trial in expected]
    np.testing.assert_array_equal([trial.told for trial in played], [trial.told for trial in expected])
    ends = [trial.ended for trial in played]
    assert {"whole", "stopped"} <= set(ends)
    assert len(played) < 40 or "diverged" in ends


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("num_lanes", "reduction", "num_steps"), [(1, 2.0, 270), (4, 3.0, 270), (7, 4.0, 160), (16, 3.0, 100)])
def test_asha_decides_as_a_plain_simulation(num_lanes, reduction, num_steps, seed):
    optimizer = jh.ASHA(Notes(num_lanes), reduction=reduction).for_training(num_steps, ROUND_STEPS)
    curves = curves_of(seed, 4000, num_steps // ROUND_STEPS)
    pace = pace_of(seed, 1800 // (num_lanes + 5), num_lanes)

    def goes_on(seen: Rungs, rung: int, number: int) -> bool:
        losses = [values[-1] for values in seen[rung].values()]
        rank = sum(loss < seen[rung][number][-1] for loss in losses)
        return rank * reduction < len(losses)

    rungs = tuple(steps // ROUND_STEPS for steps in optimizer.budgets)
    check_equal(play(optimizer, curves, pace, ROUND_STEPS), simulated(curves, pace, rungs, goes_on))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("num_lanes", "num_steps", "settings"),
    [(1, 200, {"min_trials": 1}), (4, 100, {}), (7, 160, {"interval": 30, "grace": 80}), (16, 100, {"min_trials": 3})],
)
def test_median_stopping_decides_as_a_plain_simulation(num_lanes, num_steps, settings, seed):
    optimizer = jh.MedianStopping(Notes(num_lanes), **settings).for_training(num_steps, ROUND_STEPS)
    curves = curves_of(seed, 4000, num_steps // ROUND_STEPS)
    pace = pace_of(seed, 1800 // (num_lanes + 5), num_lanes)
    grace = settings.get("grace", optimizer.budgets[1])

    def goes_on(seen: Rungs, rung: int, number: int) -> bool:
        others = [np.cumsum(values)[-1] / np.float32(rung + 1) for other, values in seen[rung].items() if other != number]
        if optimizer.budgets[rung] < grace or len(others) < optimizer.min_trials:
            return True
        return min(seen[rung][number]) <= np.median(np.asarray(others, np.float32))

    rungs = tuple(steps // ROUND_STEPS for steps in optimizer.budgets)
    check_equal(play(optimizer, curves, pace, ROUND_STEPS), simulated(curves, pace, rungs, goes_on))


def test_rungs_follow_from_the_length_of_the_training():
    inner = jh.RandomSearch(4)
    rungs = lambda num_steps, round_steps, **settings: jh.ASHA(inner, **settings).for_training(num_steps, round_steps).budgets
    assert rungs(270, 10) == (10, 30, 90)
    assert rungs(270, 10, reduction=2.0, num_rungs=2) == (70, 140)  # 67.5 and 135, rounded up
    assert rungs(270, 10, reduction=2.0, grace=20, num_rungs=5) == (20, 40, 80, 160)
    assert rungs(100, 10, grace=5, num_rungs=2) == (10, 20)  # 5 and 15
    assert rungs(40, 20) == (20,)  # 40 / 27, 40 / 9 and 40 / 3 are the same round
    assert rungs(100, 10, budgets=(5, 7, 33)) == (10, 40)
    for rule in (jh.MedianStopping, jh.PredictiveStopping):
        checks = lambda num_steps, rule=rule, **settings: rule(inner, **settings).for_training(num_steps, 10).budgets
        assert checks(100) == (10, 20, 30, 40, 50, 60, 70, 80, 90)
        assert checks(1000, interval=250) == (250, 500, 750)
        assert checks(20) == (10,)
        assert checks(100, budgets=(5, 33)) == (10, 40)
    assert jh.MedianStopping(inner).for_training(600, 10).budgets == tuple(range(60, 600, 60))
    assert jh.PredictiveStopping(inner).for_training(600, 10).budgets == tuple(range(20, 600, 20))


@pytest.mark.parametrize(
    ("optimizer", "steps", "text"),
    [
        (jh.ASHA(jh.RandomSearch(4)), (10, 10), "one round of 10 steps"),
        (jh.ASHA(jh.RandomSearch(4), grace=100), (100, 10), "grace = 100: must be below the 100 steps"),
        (jh.ASHA(jh.RandomSearch(4), budgets=(30, 95)), (100, 10), "below the 100 steps"),
        (jh.ASHA(jh.RandomSearch(4), budgets=(30, 20)), (100, 10), "ascending"),
        (jh.ASHA(jh.RandomSearch(4), budgets=()), (100, 10), "at least one rung"),
        (jh.ASHA(jh.RandomSearch(4), reduction=1.1), (20, 10), "no whole round"),
        (jh.ASHA(jh.ASHA(jh.RandomSearch(4))), (100, 10), "inner = ASHA"),
        (jh.ASHA(jh.RandomSearch), (100, 10), "an optimizer such as"),
        (jh.MedianStopping(jh.RandomSearch(4), grace=95), (100, 10), "at most 90"),
        (jh.MedianStopping(jh.RandomSearch(4), interval=100), (100, 10), "interval = 100: must be below the 100 steps"),
        (jh.MedianStopping(jh.RandomSearch(4), interval=95), (100, 10), "interval = 95: no whole round"),
        (jh.MedianStopping(jh.RandomSearch(4)), (10, 10), "one round"),
        (jh.PredictiveStopping(jh.RandomSearch(4), interval=100), (100, 10), "interval = 100"),
        (jh.PredictiveStopping(jh.RandomSearch(4)), (10, 10), "one round"),
        (jh.SuccessiveHalving(jh.RandomSearch(4), num_configs=5), (100, 10), "num_configs = 5: at most num_lanes = 4"),
        (jh.SuccessiveHalving(jh.RandomSearch(2)), (100, 10), "num_lanes = 2: at least reduction = 3"),
        (jh.SuccessiveHalving(jh.RandomSearch(9)), (10, 10), "one round"),
        (jh.Hyperband(jh.RandomSearch(9), grace=200), (100, 10), "grace = 200"),
        (jh.Hyperband(jh.RandomSearch(1)), (100, 10), "num_lanes = 1"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_training_is_refused_in_one_line(optimizer, steps, text):
    with pytest.raises(jh.JaxhpoError, match=text) as error:
        optimizer.for_training(*steps)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(type(optimizer).__name__)


@pytest.mark.parametrize("wrapper", [jh.ASHA, jh.MedianStopping, jh.PredictiveStopping, jh.SuccessiveHalving, jh.Hyperband])
def test_without_a_study_rungs_must_be_given(wrapper):
    optimizer = wrapper(jh.RandomSearch(4))
    assert jh.problems_of(optimizer) == []
    with pytest.raises(jh.JaxhpoError, match="budgets are not set"):
        optimizer.init(jax.random.key(0), jh.CubeSpec.floats(2))


def test_the_smaller_of_the_two_tables_grows_first():
    optimizer = jh.ASHA(jh.TPE(4, capacity=16, max_capacity=256), budgets=(1, 2))
    begin = lambda optimizer: jax.eval_shape(lambda key: optimizer.init(key, jh.CubeSpec.floats(2)), jax.random.key(0))
    state = begin(optimizer)
    sizes = []
    for _ in range(6):
        sizes.append((state.inner.loss.shape[0], state.table.shape[1], optimizer.holds(state)))
        state = jax.eval_shape(optimizer.enlarged, state)
    full = 2**31 - 1  # TPE makes room by itself then
    assert sizes == [(16, 64, 16), (32, 64, 32), (64, 64, 60), (64, 128, 64), (128, 128, 124), (128, 256, 128)]
    alone = jh.SuccessiveHalving(jh.RandomSearch(9), budgets=(1,))
    state = begin(alone)
    assert alone.holds(state) == full
    assert alone.enlarged(state) is state


def test_tables_hold_the_lowest_values_in_order():
    """Values that are entered in batches, equal ones among them, against a sort of all of them."""
    rng, rows = np.random.default_rng(0), [[], []]
    table = empty_table(2, 8)
    for _ in range(12):
        rung, value, which = rng.integers(0, 3, 8), rng.integers(-9, 9, 8).astype(np.float32), rng.random(8) < 0.8
        table = entered(table, rung, value, which)
        for at, one in zip(rung[which], value[which], strict=True):
            if at < 2:
                rows[at].append(one)
        for row, values in zip(np.asarray(table), rows, strict=True):
            np.testing.assert_array_equal(row, np.sort([*values, *[np.inf] * 64])[:64])
        below, count = rank_and_count(table, rung, value)
        for at, one, rank, m in zip(rung, value, below, count, strict=True):
            if at < 2:
                assert (rank, m) == (sum(other < one for other in rows[at]), len(rows[at]))
    table = entered(table[:, :16], np.zeros(8, int), np.full(8, -20, np.float32), np.ones(8, bool))
    np.testing.assert_array_equal(table[0], np.sort([-20] * 8 + rows[0])[:16])  # a full one forgets the highest


def test_a_table_enlarged_early_decides_as_one_enlarged_late():
    optimizer = jh.ASHA(jh.RandomSearch(4), budgets=(1, 2))
    late = optimizer.init(jax.random.key(0), jh.CubeSpec.floats(2))
    early = optimizer.enlarged(optimizer.enlarged(late))
    update, rng = jax.jit(optimizer.update), np.random.default_rng(0)
    for number in range(60):
        late = grown(optimizer, late, 4 * number + 8)
        feedback = Feedback.finished(rng.random(4).astype(np.float32))
        query = optimizer.ask(jax.random.key(0), late)
        early, late = (update(jax.random.key(number), state, query, feedback) for state in (early, late))
        np.testing.assert_array_equal(early.rung, late.rung)
    assert early.table.shape == late.table.shape == (2, 256)
    np.testing.assert_array_equal(early.table, late.table)
    assert np.isfinite(early.table[0]).sum() > 128
