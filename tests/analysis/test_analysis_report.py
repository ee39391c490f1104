import dataclasses
import html.parser
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from jaxhpo.analysis import write_report
from jaxhpo.analysis.show import format_record
from jaxhpo.errors import JaxhpoError

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(html.parser.HTMLParser):
    """Every tag is closed in order, nothing runs, nothing is fetched, no id comes twice."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.tags, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href")
            assert name != "xlink:href" or value.startswith("#")
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(path):
    page = path.read_text()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert not {"script", "link", "iframe", "img", "b", "i"} & set(checker.tags)
    assert not re.search(r"url\((?!#)|@import", page)
    return checker


CONFIRMED = {
    "confirmation": {
        "number": 2, "seeds": 5, "validation": {"loss": [0.3, 0.34, 0.31, 0.33, None], "accuracy": [0.9, 0.8, 0.9, 0.9, None]},
        "test": {"loss": [0.4, 0.42, 0.41, 0.39, None]},
    },
    "timing": {"compile_seconds": 1.5, "run_seconds": 2.0},
}  # fmt: skip


def test_report_states_what_happened(make_record):
    record = make_record([0.9, None, 0.25, 0.7, 0.3], notes=CONFIRMED, folder=None)
    markdown, page = write_report(record)
    assert (markdown.parent, markdown.name, page.name) == (record.folder, "report.md", "report.html")
    text = markdown.read_text()
    assert "# study: study report" in text
    assert "- trials: 5 of 8" in text
    assert "- diverged: 1 (20 %)" in text
    assert "Trial 2, 100 training steps, known after 2 s." in text
    low, high = stats.t.interval(0.95, 3, 0.32, stats.sem([0.3, 0.34, 0.31, 0.33]))
    assert re.search(rf"\| validation +\| loss +\| +0\.320 \[{low:.3f}, {high:.3f}\] \|", text)
    assert re.search(r"\| test +\| loss +\| +0\.405 \[", text)
    assert "0.25, is optimistic" in text
    assert "1 of 5 fresh seeds diverged" in text
    assert re.search(r"\| compiling +\| +1\.5 s", text)
    assert re.search(r"\| trials a second +\| +1\.67", text)  # 5 trials in 3 s
    assert re.search(r"\| versions\.jax +\| +0\.10", text)
    assert [m[1] for m in re.finditer(r"^\| +(\d) \| +0\.", text, re.M)] == ["2", "4", "3", "0"]  # best first
    seen = checked(page)
    assert seen.tags.count("svg") == 4 + 6
    assert "0.320 [" in "".join(seen.text)


def test_report_without_confirmation_says_so(make_record):
    text = write_report(make_record([0.5, 0.25]))[0].read_text()
    assert "was not yet trained again on fresh seeds" in text


def test_confirmation_of_an_earlier_winner_is_not_passed_off(make_record):
    record = make_record([0.1, 0.9, 0.25, 0.7, 0.3], notes=CONFIRMED)
    assert "These are runs of trial 2, which was the best when they were made." in write_report(record)[0].read_text()


@pytest.mark.parametrize(
    ("losses", "said"),
    [([], "No trial has finished yet."), ([None] * 3, "Every finished trial diverged"), ([0.5], "The best trial")],
)
def test_report_of_little(make_record, losses, said):
    markdown, page = write_report(make_record(losses, status="interrupted"))
    assert said in markdown.read_text()
    assert "jaxhpo resume" in markdown.read_text()
    checked(page)


def test_report_of_an_empty_config_space_and_environment(make_record):
    record = make_record([0.5, 0.4], space=[], config={}, env={})
    markdown, page = write_report(record)
    assert "started from Python" in markdown.read_text()
    checked(page)


def test_hostile_text_everywhere(make_record):
    evil = "</td></svg><script>alert(1)</script><b>&\"'"
    space = [
        {"name": evil, "type": "choice", "shape": [], "options": [evil, "x"], "static": False},
        {"name": "w" * 200, "type": "float", "shape": [12], "low": 0.1, "high": 1.0, "log": True},
    ]
    config = {"study": {"name": evil}, "task": {"factory": evil}, "optimizer": {"name": evil, evil: [evil, None, 1]}}
    notes = {"confirmation": {"number": 0, "seeds": 1, "validation": {evil: [1.0]}, "test": {}}, "timing": {evil: evil}}
    record = make_record(
        [0.5, 0.4, None], space=space, config=config, env={evil: {evil: evil}}, metric=evil, name=evil, notes=notes
    )
    record = dataclasses.replace(record, trials=[dataclasses.replace(t, error=evil) for t in record.trials])
    out = record.folder.parent.parent / "out"
    markdown, page = write_report(record, out)
    assert "script" not in checked(page).tags
    prose = re.sub(r"```.*?```", "", markdown.read_text(), flags=re.S)
    assert not re.search(r"(?<!\\)<script", prose)


def test_forty_hyperparameters_are_limited_in_the_table(make_record):
    space = [{"name": f"x{i}", "type": "float", "shape": [], "low": 0.0, "high": 1.0, "log": False} for i in range(40)]
    text = write_report(make_record(np.linspace(1, 2, 30).tolist(), space=space))[0].read_text()
    assert "12 of 40 hyperparameters are shown" in text
    table = text[text.index("## The best 10 trials") :].split("\n")[2]
    assert table.count("|") == 1 + 4 + 12  # trial, metric, another metric, steps, and twelve


def test_report_without_matplotlib_has_its_tables(make_record, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    markdown, page = write_report(make_record([0.5, 0.4]))
    line = "pip install 'jaxhpo[plot]'"
    assert line in markdown.read_text()
    seen = checked(page)
    assert line in "".join(seen.text)
    assert "svg" not in seen.tags
    assert seen.tags.count("table") >= 4


def test_a_report_that_cannot_be_written_is_one_clear_line(make_record, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxhpoError, match="cannot be written"):
        write_report(make_record([0.5]), tmp_path / "file")


def test_show(make_record):
    record = make_record([0.9, None, 0.25, 0.7, 0.3], notes=CONFIRMED)
    record = dataclasses.replace(
        record,
        trials=[dataclasses.replace(t, error="Traceback\nValueError: no" if t.diverged else None) for t in record.trials],
    )
    lines = format_record(record).splitlines()
    assert lines[0] == "study: finished, 5 of 8 trials"
    assert lines[1] == "  minimize loss with PSO, seed 0"
    assert lines[2].endswith("3 s, 1.67 trials/s")
    assert lines[3] == "  diverged: 1 of 5 (20 %)"
    assert lines[4] == "  first error (trial 1): ValueError: no"
    assert "Best: loss 0.25 (trial 2)" in lines
    confirmed = next(line for line in lines if "fresh seeds" in line)
    means = (
        r"  mean over 5 fresh seeds \(trial 2\): validation 0.32 \(standard error (\S+)\), test 0.405 \(standard error (\S+)\)"
    )
    found = re.fullmatch(means, confirmed)
    assert found is not None
    note = record.notes["confirmation"]
    for split, told in zip(("validation", "test"), found.groups(), strict=True):
        values = [x for x in note[split][record.metric] if x is not None]
        assert float(told) == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)), rel=0.06)
    rows = [line.split()[:2] for line in lines[lines.index("Best 4:") + 2 :]]
    assert rows == [["2", "0.25"], ["4", "0.3"], ["3", "0.7"], ["0", "0.9"]]
    assert max(map(len, lines)) <= 112


def test_show_of_little_and_of_maximize(make_record):
    assert format_record(make_record([])).endswith("No trial has finished with a loss yet.")
    assert format_record(make_record([None, None])).endswith("No trial has a finite loss.")
    text = format_record(make_record([-0.25, -0.75], direction="maximize", metric="accuracy", space=[]))
    assert "Best: accuracy 0.75 (trial 1)" in text


def test_show_imports_nothing_heavy():
    code = (
        "import sys, jaxhpo.analysis.show, jaxhpo.analysis; from jaxhpo.analysis import format_record; "
        "print([m for m in ('jax', 'scipy', 'matplotlib', 'numpy', 'optuna') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_analysis_never_imports_jax():
    code = (
        "import sys; from jaxhpo.analysis import compare, report, export, comparison_plots; "
        "print([m for m in ('jax', 'matplotlib', 'optuna') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
