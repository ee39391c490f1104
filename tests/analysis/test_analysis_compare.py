import dataclasses
from typing import Any

import numpy as np
import pytest
from scipy import stats

from jaxhpo.analysis import Comparison, format_comparison, write_comparison
from jaxhpo.analysis.compare import compare, verdict
from jaxhpo.errors import JaxhpoError


def group(make_record, name, best, *, trials=6, confirmed=None, **other):
    """One record a seed, whose search ends at ``best[seed]`` and whose fresh seeds average ``confirmed[seed]``."""
    sign = -1.0 if other.get("direction") == "maximize" else 1.0
    records = []
    for seed, value in enumerate(best):
        losses = [None if value is None else sign * value + 0.5 * k for k in range(trials - 1, -1, -1)]
        notes = {}
        if confirmed is not None:
            validation = [confirmed[seed] - 0.01, confirmed[seed] + 0.01, None]
            metric = other.get("metric", "loss")
            notes = {"confirmation": {"number": 0, "seeds": 3, "validation": {metric: validation}, "test": {}}}
        records.append(make_record(losses, name=name, seed=seed, notes=notes, **other))
    return records


A = [0.10, 0.12, 0.11, 0.13, 0.10, 0.09, 0.12, 0.11]
B = [0.20, 0.19, 0.24, 0.22, 0.21, 0.25, 0.18, 0.23]


def test_groups_bands_and_paired_tests(make_record):
    records = group(make_record, "swarm", A) + group(make_record, "random", B)
    found: Any = compare(records[::2] + records[1::2])  # the order in which they come does not matter
    assert isinstance(found, Comparison)
    assert [entry.name for entry in found.entries] == ["swarm", "random"]
    swarm = found.entries[0]
    assert sorted(swarm.final.tolist()) == sorted(A)
    assert swarm.losses.shape == (8, 6)
    assert swarm.spread["search"].low == pytest.approx(stats.t.interval(0.95, 7, np.mean(A), stats.sem(A))[0])
    assert found.basis == "search"
    assert found.ranks.mean_ranks.tolist() == [1.0, 2.0]
    (pair,) = found.pairs
    assert pair.paired.count == 8
    assert pair.paired.difference.estimate == pytest.approx(np.mean(A) - np.mean(B))
    assert pair.adjusted_p == pytest.approx(stats.wilcoxon(A, B).pvalue)
    assert verdict(pair) == "swarm is better than random (p = 0.008, 8 seeds)."


def test_confirmed_values_are_what_is_tested(make_record):
    """The search of A looks better, its winners on fresh seeds are worse."""
    found: Any = compare(group(make_record, "a", A, confirmed=[x + 0.3 for x in A]) + group(make_record, "b", B, confirmed=B))
    assert found.basis == "validation"
    assert verdict(found.pairs[0]).startswith("b is better than a")
    assert found.entries[0].validation == pytest.approx([x + 0.3 for x in A])
    text = format_comparison(found)
    assert "By the winners' validation values over fresh seeds." in text


def test_maximize_turns_everything_round(make_record):
    kind = {"direction": "maximize", "metric": "accuracy"}
    found: Any = compare(group(make_record, "low", A, **kind) + group(make_record, "high", B, **kind))
    assert found.entries[0].final.tolist() == pytest.approx(A)
    assert verdict(found.pairs[0]).startswith("high is better than low")
    assert found.ranks.mean_ranks.tolist() == [2.0, 1.0]
    row = next(line for line in format_comparison(found).splitlines() if line.startswith("| low vs high"))
    assert "| 0 / 0 / 8" in row
    assert f"{np.mean(A) - np.mean(B):.3f}"[:5] in row


def test_honest_words_where_nothing_is_shown(make_record):
    few = compare(group(make_record, "a", A[:4]) + group(make_record, "b", B[:4])).pairs[0]
    assert "too few to show any difference (the smallest p-value that they can give is 0.13)" in verdict(few).replace(
        "0.12)", "0.13)"
    )
    same = compare(group(make_record, "a", A) + group(make_record, "b", A)).pairs[0]
    assert verdict(same) == "a and b are equal on all 8 seeds."
    mixed = [x + d for x, d in zip(A, [0.01, -0.02, 0.03, -0.01, 0.02, -0.03, 0.015, -0.012], strict=True)]
    near = compare(group(make_record, "a", A) + group(make_record, "b", mixed)).pairs[0]
    assert "no difference is shown" in verdict(near)
    assert "not proof of equality" in verdict(near)
    alone = compare(group(make_record, "a", A[:1]) + group(make_record, "b", B[:1]))
    assert "nothing was tested" in verdict(alone.pairs[0])
    assert any("One seed only: a, b." in note for note in alone.notes)


def test_one_search_of_each_gives_no_win_probability(make_record):
    found: Any = compare(group(make_record, "a", A[:1]) + group(make_record, "b", B[:1]))
    assert (found.pairs[0].win, found.pairs[0].win_of) == (None, None)
    text = format_comparison(found)
    row = next(line for line in text.splitlines() if line.startswith("| a vs b"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["–"] * 5
    several: Any = compare(group(make_record, "a", A) + group(make_record, "b", B[:1]))
    assert several.pairs[0].win is None  # one of b is one value still
    both: Any = compare(group(make_record, "a", A) + group(make_record, "b", B))
    assert both.pairs[0].win_of == "searches"
    assert both.pairs[0].win.estimate == 1.0


def test_two_winners_on_fresh_seeds_are_told_apart_as_winners_only(make_record):
    notes = [{"confirmation": {"number": 0, "seeds": 8, "validation": {"loss": x}, "test": {}}} for x in (A, B)]
    one, other = (make_record([0.1], name=name, notes=note) for name, note in zip("ab", notes, strict=True))
    pair = compare([one, other]).pairs[0]
    assert pair.win_of == "trainings"
    assert pair.win is not None
    assert pair.win.estimate == 1.0
    assert "nothing was tested" in verdict(pair)
    assert "a training by a's is better than one by b's with probability 1 [" in verdict(pair)
    same = compare([one, dataclasses.replace(other, notes=notes[0])]).pairs[0]
    assert verdict(same).endswith("they are not told apart.")


def test_ties_are_called_ties(make_record):
    mixed = [*A[:4], *(x + 0.05 for x in A[4:])]
    pair = compare(group(make_record, "a", A) + group(make_record, "b", mixed)).pairs[0]
    assert "8 seeds, 4 of them tied" in verdict(pair)
    text = format_comparison(compare(group(make_record, "a", A) + group(make_record, "b", A)))
    assert "a, b are tied." in text


def test_steps_that_were_spent(make_record):
    """Every trial of these takes 100 steps; the second study ends after fewer."""
    found: Any = compare(group(make_record, "a", A[:2]) + group(make_record, "b", B[:2], trials=3))
    first, second = found.entries
    assert (first.spent[0], first.spent[-1], second.spent[-1]) == (0, 600, 300)
    assert np.isinf(first.losses_spent[:, first.spent < 100]).all()
    assert first.losses_spent[:, -1].tolist() == A[:2]
    at = np.searchsorted(first.spent, 250)
    assert first.losses_spent[:, at] == pytest.approx(first.losses[:, 1])  # two trials have ended by then
    assert first.every.size == 12


def test_three_studies_are_ranked_and_adjusted(make_record):
    c = [x + 0.02 for x in B]
    found: Any = compare(group(make_record, "a", A) + group(make_record, "b", B) + group(make_record, "c", c))
    assert found.ranks.p_value == pytest.approx(stats.friedmanchisquare(A, B, c).pvalue)
    assert [pair.adjusted_p for pair in found.pairs] == pytest.approx([3 * 2 / 2**8] * 3)


def test_searches_where_nothing_finished_count_as_the_worst(make_record):
    found: Any = compare(group(make_record, "a", A) + group(make_record, "b", [None, *B[1:]]))
    assert found.entries[1].final[0] == np.inf
    assert found.entries[1].spread["search"] is None
    assert found.ranks.mean_ranks.tolist() == [1.0, 2.0]
    assert any("no trial finished in 1 of 8 repeats" in note for note in found.notes)


def test_one_name_for_two_configs_is_told_apart(make_record):
    wide = [
        dataclasses.replace(r, config=r.config | {"optimizer": {"name": "PSO", "num_lanes": 128}})
        for r in group(make_record, "s", B)
    ]
    found: Any = compare(group(make_record, "s", A) + wide)
    assert [entry.name for entry in found.entries] == ["s (optimizer.num_lanes=4)", "s (optimizer.num_lanes=128)"]


def test_what_cannot_be_compared_is_refused(make_record):
    one = make_record([0.5])
    with pytest.raises(JaxhpoError, match="at least two"):
        compare([one])
    with pytest.raises(JaxhpoError, match=r"maximize 'loss'"):
        compare([one, make_record([0.5], direction="maximize", seed=1)])
    with pytest.raises(JaxhpoError, match=r"minimize 'error'"):
        compare([one, make_record([0.5], metric="error", seed=1)])
    with pytest.raises(JaxhpoError, match=r"same seed \[0, 5\]"):  # a key of JAX
        compare([make_record([0.5], seed=[0, 5]), make_record([0.4], seed=[0, 5])])
    with pytest.raises(JaxhpoError, match="same seed 0"):
        compare([one, make_record([0.6], folder="elsewhere")])


def test_comparison_files(make_record, tmp_path):
    pytest.importorskip("matplotlib")
    records = group(make_record, "<b>swarm</b>", A) + group(make_record, "random", [None, *B[1:]], trials=9)
    markdown, page = write_comparison(records, tmp_path / "out")
    text = page.read_text()
    assert text.count("<svg") == 4
    assert "<b>" not in text
    assert "different numbers of finished trials" in markdown.read_text()
    repeats = compare(group(make_record, "a", A))
    assert "there is nothing to test" in format_comparison(repeats)
