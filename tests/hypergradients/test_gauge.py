"""The gauges in words: warnings at the end of a study, and the report's section."""

from __future__ import annotations

import math
import warnings

import jax.numpy as jnp
import pytest

import jaxhpo as jh
from jaxhpo.analysis import write_report
from jaxhpo.hypergradients import Unrolled, gauge
from jaxhpo.study import read_record


def logistic_map(low, high):
    """x -> r x (1 - x): orderly below r = 3, chaotic near 4, while the loss is between 0 and 1 for both."""
    task = jh.Task(lambda key, h: jnp.asarray(0.4), lambda key, h, x: h["r"] * x * (1 - x), lambda h, x: {"loss": x})
    return Unrolled(task, 200), {"r": jh.Float(low, high)}


def test_a_chaotic_study_is_warned_of_and_reported(tmp_path):
    with pytest.warns(UserWarning, match=r"8 of 8 trials with a finite loss are chaotic .*Evolution"):
        jh.minimize(*logistic_map(3.9, 3.99), jh.RandomSearch(4), key=0, num_trials=8, record=tmp_path / "run")
    text = write_report(read_record(tmp_path / "run"))[0].read_text()
    assert "## Hypergradients" in text
    assert "8 of 8 trials with a finite loss are chaotic" in text
    assert "adjoint" in text
    assert "gauge/" not in text


def test_an_orderly_study_is_not(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jh.minimize(*logistic_map(2.0, 2.9), jh.RandomSearch(4), key=0, num_trials=8, record=tmp_path / "run")
    text = write_report(read_record(tmp_path / "run"))[0].read_text()
    assert "## Hypergradients" in text
    assert "of 8 trials with a finite loss" not in text


def row(loss=1.0, **gauges):
    return loss, {"loss": loss} | {f"gauge/{name}": value for name, value in gauges.items()}


def test_findings():
    assert gauge.findings([(1.0, {"loss": 1.0})]) == []
    assert gauge.findings([row(math.nan, gradient=math.nan)]) == []
    good = [row(gradient=1.0, growth=0.5)] * 20
    assert gauge.findings(good) == []
    assert gauge.findings([*good, row(gradient=math.nan, growth=0.5)]) == []  # one in twenty is let pass
    (nan,) = gauge.findings([*good, *[row(gradient=None, growth=0.5)] * 2])
    assert "2 of 22" in nan
    assert "eps_root=1e-16" in nan
    (chaos,) = gauge.findings([*good, *[row(gradient=1e30, growth=9.0)] * 2])
    assert "2 of 22" in chaos
    overflow = {"adjoint@0": None, "adjoint@50": 9.0, "adjoint@90": 1.0}
    (chaos,) = gauge.findings([*good, *[row(gradient=None, growth=None, **overflow)] * 2])
    assert "chaotic" in chaos
    broken = {"adjoint@0": None, "adjoint@50": None, "adjoint@90": math.nan}
    (nan,) = gauge.findings([*good, *[row(gradient=None, growth=None, **broken)] * 2])
    assert "eps_root" in nan
    assert "eps_root" in gauge.findings([*good, *[row(gradient=None, growth=None, **{"tangent@10": None})] * 2])[0]
    assert "raise damping" in gauge.findings([row(gradient=1.0, residual=0.5)])[0]
    assert "num_pairs" in gauge.findings([row(gradient=1.0, standard_error=3.0)])[0]


def test_profile():
    kind, steps = gauge.profile([{"gauge/tangent@20": 1.0, "gauge/tangent@3": 2.0, "loss": 3.0}, {"gauge/tangent@3": None}])
    assert (kind, steps) == ("tangent", [(3, [2.0]), (20, [1.0])])
