import dataclasses
import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from jaxhpo.analysis import canvas, plots

SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg):
    return ["".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


def every_plot(record):
    found = [plots.incumbent_over_trials(record), plots.incumbent_over_time(record), plots.diverged_share(record)]
    return [plot for plot in [*found, plots.parallel_coordinates(record), *plots.slices(record)] if plot is not None]


def wide_losses(rng):
    return (10.0 ** rng.uniform(-30, 10, 40)).tolist()


CASES = {
    "one trial": [0.5],
    "constant": [0.5] * 9,
    "constant zero": [0.0] * 5,
    "one left": [None, None, 0.3],
    "40 decades": wide_losses(np.random.default_rng(0)),
    "wide and negative": [-x for x in wide_losses(np.random.default_rng(1))],
    "wide with zero": [0.0, *wide_losses(np.random.default_rng(2))],
    "both signs, huge": [-1e300, 1e300, 1.0, None, 2.0],
    "negative zero": [-0.0, 0.5, 1.0],
}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
@pytest.mark.parametrize("case", CASES)
def test_every_figure_is_sound_svg(make_record, case, direction):
    record = make_record(CASES[case], direction=direction)
    found = every_plot(record)
    assert [plot.name for plot in found if plot.name != "diverged"] == [
        "trials",
        "time",
        "parallel",
        *[f"slice{i}" for i in range(6)],
    ]
    assert any(plot.name == "diverged" for plot in found) == (None in CASES[case])
    ids = []
    for plot in found:
        root = ET.fromstring(plot.svg)
        assert root.tag == f"{SVG}svg"
        assert not re.search(r"\b(nan|inf)\b", plot.svg)
        own = [node.get("id") for node in root.iter() if node.get("id")]
        used = re.findall(r'(?:url\(#|"#)([^)"]+)', plot.svg)
        assert set(used) <= set(own)
        ids += own
    assert len(ids) == len(set(ids))  # one page can hold them all


@pytest.mark.parametrize("losses", [[], [None, None, None]])
def test_nothing_finished_or_all_diverged(make_record, losses):
    found = every_plot(make_record(losses))
    assert [plot.name for plot in found] == (["diverged"] if losses else [])


def test_figures_follow_the_page_and_not_the_users_style(make_record):
    matplotlib = pytest.importorskip("matplotlib")
    record = make_record([1.0, 0.5, None, 0.25])
    plain: Any = plots.incumbent_over_trials(record)
    assert plain.svg.count("currentColor") > 10
    assert canvas.INK not in plain.svg
    assert "#000000" not in plain.svg
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "axes.grid": False, "svg.fonttype": "path"}):
        assert plots.incumbent_over_trials(record) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_hostile_and_long_names(make_record):
    label = "<script>alert('$x_2$')</script>" + "&" * 300
    space = [
        {"name": "a<b>&$\\frac{1", "type": "float", "shape": [], "low": 1.0, "high": 2.0, "log": False},
        {"name": "学習\x00率", "type": "choice", "shape": [], "options": [label, label + "2", "short"]},
    ]
    record = make_record([1.0, 2.0, 3.0, 2.0], space=space, metric="loss<i>\n%$", name="<b>")
    found = every_plot(record)
    assert len(found) == 5
    assert all("<script" not in plot.svg and ET.fromstring(plot.svg) is not None for plot in found)
    assert "a<b>&$\\frac{1" in texts_of(found[3].svg)
    assert max(len(text) for plot in found for text in texts_of(plot.svg)) < 60


def test_many_hyperparameters_are_limited_and_it_is_said(make_record):
    space = [
        {"name": f"x{i}", "type": "float", "shape": [], "low": 0.0, "high": 1.0, "log": False, "offset": i} for i in range(40)
    ]  # fmt: skip
    record = make_record([1.0] * 120, space=space)
    record = dataclasses.replace(record, trials=[dataclasses.replace(t, loss=t.hparams["x33"] ** 2) for t in record.trials])
    small = plots.slices(record)
    lines: Any = plots.parallel_coordinates(record)
    assert len(small) == plots.MOST_SLICES
    assert small[0].title == "x33 against loss"  # what matters is among those kept
    assert "12 of 40 hyperparameters" in plots.slices_caption(record)
    assert "10 of 40 hyperparameters" in lines.caption
    assert "x33" in texts_of(lines.svg)


def test_arrays_are_named_as_means_and_choices_of_array_shape_as_left_out(make_record):
    space = [
        {"name": "rates", "type": "float", "shape": [3], "low": 1e-3, "high": 1.0, "log": True},
        {"name": "kinds", "type": "choice", "shape": [3], "options": ["a", "b"]},
    ]
    record = make_record([1.0, 2.0, 3.0], space=space)
    small = plots.slices(record)
    assert [plot.title for plot in small] == ["rates (mean of 3) against loss"]
    assert "rates (mean of 3)" in texts_of(small[0].svg)
    assert plots.slices_caption(record).endswith("Arrays are shown by their mean. Left out, as arrays of choices: kinds.")


def test_a_large_study_gives_a_small_figure(make_record):
    rng = np.random.default_rng(3)
    losses = [None if x < 0.1 else float(x) for x in rng.uniform(size=12000)]
    record = make_record(losses)
    found: Any = plots.incumbent_over_trials(record)
    assert "1000 of" in found.caption
    assert len(found.svg) < 200_000
    assert len(plots.slices(record)[0].svg) < 200_000
    lines: Any = plots.parallel_coordinates(record)
    assert len(lines.svg) < 400_000


def test_thinning_keeps_the_best():
    losses = np.random.default_rng(4).permutation(5000).astype(float)
    kept = plots._thin(losses, 300)
    assert len(set(kept.tolist())) == 300
    assert set(np.argsort(losses)[:100].tolist()) <= set(kept.tolist())


def test_scales():
    assert canvas.scale_of([1e-30, 1e10]) == ("log", 0.0)
    assert canvas.scale_of([0.5, 2.0, 40.0]) == ("linear", 0.0)
    assert canvas.scale_of([0.0, 1e-3, 10.0]) == ("symlog", 1e-3)
    assert canvas.scale_of([-1.0, 1e5]) == ("linear", 0.0)
    assert canvas.scale_of([0.0, 0.0]) == ("linear", 0.0)


def test_edges_hide_the_wild_only():
    calm = np.linspace(0, 1, 50)
    assert canvas.edge_of(calm, 1.0) == 1.0
    wild = np.append(calm, 1e6)
    edge = canvas.edge_of(wild, 1.0)
    assert 0.9 < edge < 2.0
    assert canvas.edge_of(-wild, -1.0) == -edge
    assert canvas.clip_to(wild, edge, 1.0)[1] == 1


def test_a_few_wild_values_do_not_stretch_a_logarithmic_axis():
    calm = np.geomspace(0.1, 1, 50)
    assert canvas.worst_shown(("log", 0.0), calm, 1.0) == calm.max()
    assert canvas.worst_shown(("log", 0.0), np.append(calm, 1e9), 1.0) < 10
    assert canvas.worst_shown(("linear", 0.0), calm, 1.0) == 1.0
    assert canvas.worst_shown(("symlog", 1e-3), [0.0, 1e-3, 5.0], 1.0) == 5.0


def test_colours_between_blue_and_orange():
    assert (canvas.blend(0.0), canvas.blend(1.0), canvas.blend(float("nan"))) == (canvas.BLUE, canvas.ORANGE, canvas.GREY)
    assert len({canvas.blend(x / 20) for x in range(21)}) == 21


def test_ticks():
    assert canvas.log_ticks(1e-4, 1.0) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert canvas.log_ticks(16, 256) == pytest.approx([20, 50, 100, 200])
    assert canvas.log_ticks(3.1, 3.2) == [3.1, 3.2]
    assert len(canvas.log_ticks(1e-30, 1e10)) <= 5
    assert canvas.linear_ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert canvas.linear_ticks(1, 4, whole=True) == [1, 2, 3, 4]
    assert canvas.tick_labels([0.98121, 0.98122, 0.98123]) == ["0.98121", "0.98122", "0.98123"]
