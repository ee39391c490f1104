import dataclasses
import math

import numpy as np

from jaxhpo.analysis import curves
from jaxhpo.analysis.columns import by_association, columns, element_names, elements

INF = math.inf


def test_incumbent_over_trials_skips_what_diverged(make_record):
    trials = make_record([None, 3.0, 5.0, None, 1.0, 2.0]).trials
    assert curves.incumbent_by_trial(trials[::-1]).tolist() == [INF, 3.0, 3.0, 3.0, 1.0, 1.0]
    odd = dataclasses.replace(trials[1], loss=math.nan)
    assert curves.losses_of([odd]).tolist() == [INF]
    assert curves.incumbent_by_trial([]).size == 0


def test_incumbent_over_seconds_joins_what_was_known_together(make_record):
    trials = make_record([None, 3.0, 5.0, None, 1.0, 2.0]).trials  # the first four after 2 s, the others after 3 s
    seconds, best = curves.incumbent_by_seconds(trials[::-1])
    assert (seconds.tolist(), best.tolist()) == ([2.0, 3.0], [3.0, 1.0])
    assert curves.incumbent_by_seconds([])[0].size == 0


def test_diverged_share_in_a_window(make_record):
    trials = make_record([None, 1.0, None, None, 1.0]).trials
    share, window = curves.diverged_share(trials, 2)
    assert (share.tolist(), window) == ([1.0, 0.5, 0.5, 1.0, 0.5], 2)
    assert curves.diverged_share(trials)[1] == 10


def test_edf_counts_failures_in_its_total():
    values, share = curves.edf([3.0, INF, 1.0, 2.0])
    assert (values.tolist(), share.tolist()) == ([1.0, 2.0, 3.0], [0.25, 0.5, 0.75])


def test_columns_and_elements(make_record):
    space = [
        {"name": "rate", "type": "float", "shape": [2], "low": 1e-4, "high": 1.0, "log": True},
        {"name": "kinds", "type": "choice", "shape": [2], "options": ["a", "b"]},
        {"name": "flag", "type": "choice", "shape": [], "options": [False, True]},
        {"name": "matrix", "type": "int", "shape": [1, 2], "low": 0, "high": 9, "log": False},
    ]
    record = make_record([1.0], space=[])
    hparams = {"rate": [0.01, 0.0001], "kinds": ["a", "b"], "flag": True, "matrix": [[3, 5]]}
    trial = dataclasses.replace(record.trials[0], hparams=hparams)
    without = dataclasses.replace(trial, hparams={})
    record = dataclasses.replace(record, space=space, trials=[trial, without])
    found, left_out = columns(record, record.trials)
    assert left_out == ["kinds"]
    assert [column.title for column in found] == ["rate (mean of 2)", "flag", "matrix (mean of 2)"]
    np.testing.assert_allclose([column.values for column in found], [[1e-3, np.nan], [1, np.nan], [4, np.nan]])
    np.testing.assert_allclose(found[0].unit(found[0].values)[0], 0.25)
    assert element_names(space[3]) == ["matrix[0,0]", "matrix[0,1]"]
    assert elements(record, trial) == {
        "rate[0]": 0.01, "rate[1]": 0.0001, "kinds[0]": "a", "kinds[1]": "b", "flag": True, "matrix[0,0]": 3, "matrix[0,1]": 5,
    }  # fmt: skip
    assert elements(record, without) == {}


def test_the_strongest_hyperparameter_comes_first(make_record):
    record = make_record([1.0] * 200)
    trials = [dataclasses.replace(t, loss=(t.hparams["momentum"] - 0.3) ** 2) for t in record.trials]
    (first, share), *rest = by_association(record, trials)
    assert first.name == "momentum"
    assert share > 0.8 > 0.2 > max(other for _, other in rest)
