import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jaxhpo.analysis import importance as imp
from jaxhpo.analysis.importance import importance, shares

INF = np.inf


def test_closed_forms():
    """One hyperparameter decides alone: share 1. Two decide together: 1/m of each bin by m of them, by hand."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(2, 4000))
    alone, other = shares([x, y], x, [False, False], target=0.25)
    assert alone.estimate == pytest.approx(1.0, abs=1e-6)
    assert (alone.low, alone.high) == pytest.approx((1.0, 1.0), abs=1e-6)
    assert other.estimate < 0.005
    # Two of four options of a and two of four of b make a quarter of all: given a good option of a half are among the best.
    a, b = np.repeat(np.arange(4.0), 400), np.tile(np.arange(4.0), 400)
    loss = 1.0 - ((a < 2) & (b < 2)) + rng.uniform(0, 0.1, 1600)
    # m = 1/4, p = 1/2 on two options, q = 1/4: D_PE = 2 / 4 (2 - 1)^2 + 2 / 4 (0 - 1)^2 = 1, so that the share is m / (1 - m).
    for share in shares([a, b], loss, [True, True], target=0.25):
        assert share.estimate == pytest.approx(1 / 3, abs=0.003)


def test_share_is_the_chi_square_of_the_table():
    """Without its correction the share is Pearson's chi square of best against bins, divided by the trials."""
    rng = np.random.default_rng(1)
    code = rng.integers(0, 5, 300)
    loss = rng.uniform(size=300) + 0.1 * code
    best = imp.best_of(loss, 0.25)
    told = imp._explained(code, best, np.ones((1, 300), np.float32))[0]
    table = np.array([[np.sum((code == k) & (best == flag)) for k in range(5)] for flag in (False, True)])
    raw = stats.chi2_contingency(table, correction=False).statistic / 300
    assert told == pytest.approx(raw - (1 - raw) * 4 / 295, rel=1e-5)


def test_optuna_agrees():
    """Variances of what is a number, and their order. Its kernels for choices spread much weight over all options, so that
    theirs is the variance of other densities: exactly that of the trials' shares spread alike, as ours is without."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng = np.random.default_rng(2)
    count = 2000
    values = {
        "x": rng.uniform(0, 1, count),
        "rate": 10 ** rng.uniform(-4, 0, count),
        "width": rng.integers(1, 65, count).astype(float),
        "noise": rng.uniform(0, 1, count),
        "act": rng.integers(0, 4, count).astype(float),
    }
    loss = 3 * (values["x"] - 0.3) ** 2 + 0.3 * (np.log10(values["rate"]) + 2) ** 2 + 0.002 * values["width"]
    loss += 0.2 * values["act"]
    make = optuna.distributions
    spaces = {
        "x": make.FloatDistribution(0, 1),
        "rate": make.FloatDistribution(1e-4, 1, log=True),
        "width": make.IntDistribution(1, 64),
        "noise": make.FloatDistribution(0, 1),
        "act": make.CategoricalDistribution([0, 1, 2, 3]),
    }
    study = optuna.create_study()
    rows = zip(*values.values(), strict=True)
    study.add_trials(
        optuna.trial.create_trial(
            params={k: int(v) if k in ("width", "act") else float(v) for k, v in zip(values, row, strict=True)},
            distributions=spaces, value=float(told))
        for row, told in zip(rows, loss, strict=True)
    )  # fmt: skip
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.1, region_quantile=1.0)
    theirs = evaluator.evaluate(study)
    kinds = [name == "act" for name in values]
    ours = dict(zip(values, (one.estimate for one in shares(list(values.values()), loss, kinds, target=0.1)), strict=True))
    variances = {name: share * 0.1 * 0.9 for name, share in ours.items()}
    for name in ("x", "rate"):
        assert variances[name] == pytest.approx(theirs[name], rel=0.15)
    assert ours["rate"] > ours["x"] > 0.08 > 0.01 > max(ours["width"], ours["noise"])
    assert theirs["rate"] > theirs["x"] > 10 * max(theirs["width"], theirs["noise"])
    best = imp.best_of(loss, 0.1)
    top, every = (np.bincount(values["act"][rows].astype(int), minlength=4) for rows in (best, slice(None)))
    divergence = lambda p, q: float(((p - q) ** 2 / q).sum())
    assert variances["act"] == pytest.approx(
        0.1**2 * divergence(top / top.sum(), every / every.sum()), rel=0.02
    )  # but for bias
    assert theirs["act"] == pytest.approx(0.1**2 * divergence(spread(top), spread(every)), rel=1e-6)


def spread(counts):
    """The density of a choice as Optuna's kernels have it: one for each option seen, and a prior."""
    prior = 1 / ((counts > 0).sum() + 1)
    kernels = (np.eye(counts.size) + prior) / (1 + counts.size * prior)
    return (counts @ kernels + 1 / counts.size) / (counts.sum() + 1)


def test_what_does_not_matter_shows_nothing_and_what_does_is_held():
    """200 studies of 100 trials. If 2.5 % of the lower ends lie above 0, more than 13 do with probability 6e-4; if 95 % of the
    intervals hold the truth, fewer than 178 do with probability 2e-4."""
    rng = np.random.default_rng(3)
    x, noise = rng.uniform(size=(2, 200_000))
    true = shares([x], (x - 0.3) ** 2 + 0.5 * noise**2, [False], target=0.25, resamples=2)[0].estimate
    above, held = 0, 0
    for seed in range(200):
        x, hidden, noise = rng.uniform(size=(3, 100))
        loss = (x - 0.3) ** 2 + 0.5 * hidden**2
        real, none = shares([x, noise], loss, [False, False], resamples=200, seed=seed)
        above += none.low > 0
        held += real.low <= true <= real.high
    assert above <= 13
    assert held >= 178


def test_local_looks_only_at_the_good_ones():
    """What alone decides about the good half matters no more within it, where the other hyperparameter does."""
    rng = np.random.default_rng(4)
    first, second = rng.uniform(size=(2, 3000))
    loss = np.where(first < 0.5, 0.0, 10.0) + second
    whole = shares([first, second], loss, [False, False], target=0.5)
    near = shares([first, second], loss, [False, False], target=0.1, region=0.5)
    assert whole[0].estimate > 0.9  # not 1: the half that is best ends within a bin
    assert whole[1].estimate < 0.01
    assert near[0].estimate < 0.01
    assert near[1].estimate > 0.9


def test_failures_count_as_the_worst_and_are_never_best():
    rng = np.random.default_rng(5)
    x, y = rng.uniform(size=(2, 400))
    loss = np.where(x > 0.5, INF, y)
    fails, other = shares([x, y], loss, [False, False], target=0.25)
    assert fails.estimate > 0.2  # nothing beyond 0.5 is ever among the best
    assert other.estimate > 0.2
    mostly = np.where(x > 0.1, INF, y)
    assert imp.best_of(mostly, 0.25).sum() == np.isfinite(mostly).sum()  # fewer finished than asked for
    assert shares([x], np.full(400, INF), [False]) == []


def test_ties_and_little_data():
    loss = np.repeat([0.0, 1.0, 2.0], 20)
    assert imp.best_of(loss, 0.25).sum() == 20  # all that equal the last of them
    assert imp.best_of(np.zeros(60), 0.25).sum() == 0  # nothing is better than anything
    assert shares([np.arange(60.0)], np.zeros(60), [False]) == []
    assert shares([np.arange(19.0)], np.arange(19.0), [False]) == []
    assert shares([np.ones(60)], loss, [False])[0].estimate == 0.0  # never changed
    with pytest.raises(ValueError, match="target < region"):
        shares([loss], loss, [False], target=0.5, region=0.5)
    with pytest.raises(ValueError, match="NaN"):
        shares([loss], np.full(60, np.nan), [False])


def test_absent_values_are_a_group_of_their_own():
    loss = np.arange(200.0)
    x = np.where(loss < 100, np.nan, 0.5)
    assert shares([x], loss, [False], target=0.5)[0].estimate == pytest.approx(1.0)


def test_the_same_seed_gives_the_same_intervals():
    x, y = np.random.default_rng(6).uniform(size=(2, 80))
    assert shares([x], x + y, [False]) == shares([x], x + y, [False])
    assert shares([x], x + y, [False]) != shares([x], x + y, [False], seed=1)


def by_steps(make_record, space, loss, count=120, **other):
    record = make_record([1.0] * count, space=space, **other)
    return dataclasses.replace(record, trials=[dataclasses.replace(t, loss=loss(t.hparams)) for t in record.trials])


def test_arrays_by_element_or_summed(make_record):
    few: Any = [{"name": "r", "type": "float", "shape": [3], "low": 0.0, "high": 1.0, "log": False},
                {"name": "kind", "type": "choice", "shape": [2], "options": ["a", "b"]}]  # fmt: skip
    record = by_steps(make_record, few, lambda h: h["r"][1] + 0.3 * (h["kind"][0] == "b"))
    told = importance(record)
    assert [one.title for one in told][:2] == ["r[1]", "kind[0]"]
    assert {one.name for one in told} == {"r[0]", "r[1]", "r[2]", "kind[0]", "kind[1]"}
    many: Any = [{"name": "w", "type": "float", "shape": [40], "low": 0.0, "high": 1.0, "log": False},
                 {"name": "x", "type": "int", "shape": [], "low": 1, "high": 100, "log": True}]  # fmt: skip
    record = by_steps(make_record, many, lambda h: 0.001 * h["x"] + h["w"][0] + h["w"][1], count=400)
    told = importance(record)
    assert [one.title for one in told] == ["w (sum of 40)", "x"]
    single = [np.array([t.hparams["w"][k] for t in record.trials]) for k in (0, 1)]
    alone = shares(single, imp.scores(record.trials), [False, False])
    # The 38 others add noise around 0 of about sqrt(2 * 32) / 400 each, together 0.12.
    assert told[0].share.estimate == pytest.approx(sum(one.estimate for one in alone), abs=0.3)


def test_stopped_trials_come_after_those_that_ended(make_record):
    made = make_record([0.5, 0.1, 0.2, None])
    short = [dataclasses.replace(t, whole=t.number == 0, steps=(100, 10, 50, 3)[t.number]) for t in made.trials]
    assert imp.scores(short).tolist() == [0.0, 2.0, 1.0, INF]
