import pytest

from jaxhpo.analysis import format
from jaxhpo.analysis.columns import option_index
from jaxhpo.analysis.config_text import to_toml
from jaxhpo.analysis.document import Code, Facts, Heading, Paragraph, Table, to_html, to_markdown, write
from jaxhpo.analysis.statistics import Interval
from jaxhpo.errors import JaxhpoError


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.00123456, "0.001235"), (1.23456e-7, "1.235e-7"), (12345.6, "12346"), (1234567.0, "1.235e6"), (1e-30, "1e-30"),
        (400, "400"), (0.5, "0.5"), (-2.0, "-2"), (None, "–"), (float("nan"), "NaN"), (float("-inf"), "-inf"), (0.0, "0"),
        (2**70, "1.181e21"),
    ],
)  # fmt: skip
def test_number(x, text):
    assert format.number(x) == text


def test_an_end_that_rounds_to_zero_has_no_sign():
    assert format.interval(Interval(0.0123, -0.0001, 0.0247, 0.95, 8)) == "0.012 [0.000, 0.025]"


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((0.93217, 0.9251, 0.93924), "0.9322 [0.9251, 0.9392]"),
        ((0.2, 0.1, 0.3), "0.20 [0.10, 0.30]"),
        ((1234.5, 1100.0, 1369.0), "1234 [1100, 1369]"),
        ((1.5e-9, 1.4e-9, 1.6e-9), "1.5e-9 [1.4e-9, 1.6e-9]"),
        ((0.5, 0.5, 0.5), "0.5 [0.5, 0.5]"),
        ((0.5, float("-inf"), float("inf")), "0.5"),
    ],
)
def test_interval_has_the_digits_that_its_width_supports(bounds, text):
    assert format.interval(Interval(*bounds, 0.95, 8)) == text


def test_percent_never_rounds_to_none_or_all():
    assert [format.percent(x) for x in (0.0, 1e-6, 0.125, 0.03, 0.9999999, 1.0)] == [
        "0 %",
        "< 0.1 %",
        "12.5 %",
        "3 %",
        "> 99.9 %",
        "100 %",
    ]


def test_duration():
    assert [format.duration(x) for x in (0.4213, 12.34, 200, 3660, 86400 * 2 + 3600 * 3)] == [
        "0.42 s", "12.3 s", "3 min 20 s", "1 h 01 min", "2 d 3 h",
    ]  # fmt: skip


def test_values_of_hyperparameters():
    assert format.value([0.5, 1, True, "a"]) == "[0.5, 1, True, a]"
    assert format.value([[1, 2], [3, 4]]) == "[1, 2, 3, 4] (2×2)"
    assert format.value(list(range(9))) == "[0, 1, 2, 3, 4, 5, …] (9)"
    assert format.shorten("abcdefghijklmnop", 9) == "abcdef…op"
    assert format.clean("a\n\x00b\ud800") == "a b"


def test_option_index_tells_true_from_one_and_finds_text():
    assert option_index([1, True], True) == 1
    assert option_index([True, 1], 1) == 1
    assert option_index(["(1, 2)", "x"], (1, 2)) == 0
    assert option_index([False, True], 1) is None


def test_toml_reads_back():
    tomllib = pytest.importorskip("tomllib")
    config = {
        "study": {"name": 'a "quoted" ü\n\x7f', "seed": 0, "rate": 1e-05, "big": 1e22, "flag": True},
        "empty": {},
        "space": {"odd key": {"options": ["a", 1, 0.5, [1, 2]], "low": -1}, "deep": {"er": {"x": float("inf")}}},
    }
    assert tomllib.loads(to_toml(config | {"gone": None})) == config


def test_markdown_and_html_hold_hostile_text_harmless():
    evil = "</td><script>alert(1)</script> | `x`"
    blocks = [Heading(evil), Paragraph(evil), Facts([(evil, evil)]), Table([evil, "n"], [[evil, "1"]]), Code("```" + evil)]
    page, text = to_html(evil, blocks), to_markdown(evil, blocks)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 7
    row = next(line for line in text.splitlines() if line.startswith("| ") and line.endswith(" 1 |"))
    assert row.replace("\\|", "").count("|") == 3  # the pipe in the label opens no column
    prose = text[: text.index("````")]
    assert "<script" not in prose.replace("\\<script", "")
    assert text.rstrip().endswith("````")  # a fence longer than any in the text


def test_markdown_table_is_aligned_for_wide_and_combining_characters():
    lines = to_markdown("t", [Table(["name", "n"], [["学習", "1"], ["e\u0301", "22"]])]).splitlines()[2:]
    assert lines == ["| name |   n |", "|------|----:|", "| 学習 |   1 |", "| e\u0301    |  22 |"]


def test_write_is_whole_and_says_what_is_wrong(tmp_path):
    write(tmp_path / "a" / "b.txt", "one")
    write(tmp_path / "a" / "b.txt", "two")
    assert [p.read_text() for p in (tmp_path / "a").iterdir()] == ["two"]
    with pytest.raises(JaxhpoError, match=r"b\.txt.*cannot be written"):
        write(tmp_path / "a" / "b.txt" / "c.md", "x")
