"""Learning curves, copies and schedules."""

import dataclasses
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from jaxhpo.analysis import curves, training_plots, write_report
from jaxhpo.study.record import create_record

INF = np.inf
SPACE = [
    {"name": "rate", "type": "float", "shape": [], "low": 1e-4, "high": 1.0, "log": True},
    {"name": "act", "type": "choice", "shape": [], "options": ["relu", "gelu"]},
    {"name": "width", "type": "int", "shape": [], "low": 8, "high": 64, "log": False},
]


def keep_answers(record, answers):
    """A record on disk that holds nothing but losses on the way, ``(number, steps, loss)``."""
    facts = {"name": record.name, "identity": {}}
    with create_record(record.folder, facts) as kept:
        kept.commit((), None, answers=[(number, steps, 0, loss) for number, steps, loss in answers])


@pytest.fixture
def population(make_record):
    """Two lanes: trial 2 takes over the state of trial 1 after 20 steps, in the lane of trial 0, and wins; trial 3 diverges."""
    made = make_record([0.9, 0.4, 0.3, None], space=SPACE)
    #        number: lane, round, start, steps, parent, whole
    places = {0: (0, 1, 0, 20, -1, False), 1: (1, 3, 0, 40, -1, True), 2: (0, 3, 20, 40, 1, True), 3: (1, 5, 0, 17, -1, False)}
    names = ("lane", "round", "start", "steps", "parent", "whole")
    hparams = [
        {"rate": 0.01, "act": "relu", "width": 8}, {"rate": 0.1, "act": "gelu", "width": 16},
        {"rate": 0.2, "act": "relu", "width": 16}, {"rate": 1.0, "act": "relu", "width": 64},
    ]  # fmt: skip
    trials = [
        dataclasses.replace(t, hparams=hparams[t.number], **dict(zip(names, places[t.number], strict=True)))
        for t in made.trials
    ]
    record = dataclasses.replace(made, trials=trials)
    told = [(0, 10, 1.0), (0, 20, 0.9), (1, 10, 0.8), (1, 20, 0.6), (1, 30, 0.5), (1, 40, 0.4), (2, 30, 0.45), (2, 40, 0.3)]
    keep_answers(record, [*told, (3, 10, 2.0), (3, 20, None)])
    return record


def points(record):
    return {c.trial.number: list(zip(c.steps.tolist(), c.losses.tolist(), strict=True)) for c in curves.learning_curves(record)}


def test_a_copy_begins_with_the_loss_of_the_state_that_it_took_over(population):
    assert points(population) == {
        0: [(10, 1.0), (20, 0.9)],
        1: [(10, 0.8), (20, 0.6), (30, 0.5), (40, 0.4)],
        2: [(20, 0.6), (30, 0.45), (40, 0.3)],
        3: [(10, 2.0)],
    }


def test_without_answers_a_trial_is_its_end(make_record):
    assert points(make_record([0.5, None, 0.2])) == {0: [(100, 0.5)], 2: [(100, 0.2)]}


def test_only_new_steps_count_and_what_was_stopped_is_no_incumbent(population):
    spent, best = curves.incumbent_by_steps(population.trials)
    assert spent.tolist() == [20, 40, 80, 97]  # in the order of their ends: 0, 2, 1, 3
    assert best.tolist() == [INF, 0.3, 0.3, 0.3]


def test_bars_lie_where_their_lanes_trained(population):
    bars = training_plots._bars(population.trials, {1, 2})
    assert bars.span == {0: (0, 20), 1: (0, 40), 2: (20, 40), 3: (43, 60)}
    assert bars.row == {0: 0, 1: 1}


def test_bars_of_many_lanes_are_limited_to_what_there_is_room_for(make_record):
    made = make_record([0.5] * 400, space=SPACE)
    trials = [dataclasses.replace(t, lane=t.number, round=9, steps=10) for t in made.trials]
    bars = training_plots._bars(trials, {7, 11})
    assert {7, 11} <= set(bars.row)
    assert len(bars.row) <= training_plots.MOST_LANES + 2
    assert {trial.lane for trial in bars.trials} == set(bars.row)


def drawn(record):
    pytest.importorskip("matplotlib")
    found = [
        training_plots.losses_over_steps(record),
        training_plots.lineage(record, "rate"),
        *training_plots.schedules(record),
    ]
    return [plot for plot in found if plot is not None]


def test_figures_say_what_they_show(population):
    found = drawn(population)
    assert [plot.name for plot in found] == ["curves", "lineage", "schedule0", "schedule1"]
    assert [plot.title for plot in found[2:]] == ["rate along the winner's training", "act along the winner's training"]
    for plot in found:
        ET.fromstring(plot.svg)
        assert not re.search(r"\b(nan|inf)\b", plot.svg)
    assert "whose training state it took over" in found[0].caption
    assert "A red cross" in found[0].caption
    assert "Colour: rate, the hyperparameter that matters most." in found[1].caption
    flipped = dataclasses.replace(population, direction="maximize")
    assert len(drawn(flipped)) == 4


def test_nothing_to_draw(make_record):
    assert drawn(make_record([0.5, 0.4])) == []  # whole trainings, never looked at before
    assert drawn(make_record([])) == []
    assert drawn(make_record([None, None])) == []


def test_stopped_trials_alone_have_curves(make_record):
    made = make_record([0.5, 0.4, 0.3], space=SPACE)
    short = [dataclasses.replace(t, whole=t.number == 2) for t in made.trials]
    (plot,) = drawn(dataclasses.replace(made, trials=short))
    assert plot.name == "curves"
    assert "Orange is the winner." in plot.caption


def test_many_curves_are_thinned_and_the_winners_ancestry_kept(make_record):
    made = make_record(np.linspace(1, 2, 500).tolist(), space=SPACE)
    every = curves.learning_curves(made)
    shown = training_plots._thin(every, {321, 497})
    numbers = {curve.trial.number for curve in shown}
    assert numbers >= {321, 497, *range(training_plots.MOST_CURVES // 3)}
    assert len(shown) <= training_plots.MOST_CURVES + 2
    assert [curve.trial.number for curve in shown] == sorted(numbers)


def test_report_holds_them(population, tmp_path):
    pytest.importorskip("matplotlib")
    text = write_report(population, tmp_path)[1].read_text()
    assert "<h2>Within the trainings</h2>" in text
    assert "What mattered" not in text  # four trials tell nothing


def test_report_of_importance(make_record, tmp_path):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(8)
    made: Any = make_record([1.0] * 80, space=SPACE)
    trials = [dataclasses.replace(t, loss=abs(np.log(t.hparams["rate"])) + 0.1 * rng.uniform()) for t in made.trials]
    markdown, page = write_report(dataclasses.replace(made, trials=trials), tmp_path)
    text = markdown.read_text()
    rows = re.findall(r"^\| (rate|act|width) +\| +(\S+) \[(\S+), (\S+)\] \|", text[text.index("## What mattered") :], re.M)
    assert rows[0][0] == "rate"
    assert float(rows[0][1]) > 0.7
    assert [float(low) for _, _, low, _ in rows[1:]] == [0.0, 0.0]
    assert "Only random or Sobol points speak of the whole space." in " ".join(text.split())
    assert 'aria-label="Importance of the hyperparameters"' in page.read_text()
