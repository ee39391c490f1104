"""Seeds as an axis: means, quantiles, the race, and what is said of a winner."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxhpo as jh
from jaxhpo.study.confirmation import chance_better
from jaxhpo.study.limits import Seeding, race_bounds

SPACE = jh.Space({"x": jh.Float(0.0, 1.0)})


def noisy(scale=1.0):
    """The key draws an offset that all trials share on that seed, and one that depends on the point."""

    def init(key, h):
        common, own = jax.random.normal(key, (2,))
        return {"loss": h["x"] ** 2 + scale * (common + 0.3 * jnp.sin(40.0 * h["x"]) * own), "key": jax.random.key_data(key)}

    return jh.Training(
        jh.Task(init, lambda key, h, s: s, lambda h, s: {"loss": s["loss"], "square": h["x"] ** 2}),
        num_steps=2,
        steps_per_round=1,
    )


def columns(result, k):
    return np.stack([result.trials[f"metrics.loss_seed{j}"] for j in range(k)], axis=1)


def test_the_loss_is_the_mean_over_seeds_that_all_trials_share():
    k = 3
    result = jh.minimize(noisy(), SPACE, jh.RandomSearch(4), key=0, num_trials=12, seeds=k)
    each = columns(result, k)
    np.testing.assert_allclose(result.trials["loss"], each.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(result.trials["metrics.loss_stderr"], each.std(axis=1, ddof=1) / np.sqrt(k), rtol=1e-5)
    np.testing.assert_allclose(result.trials["metrics.square"], result.trials["hparams.x"] ** 2, rtol=1e-5)
    # What the seeds do to all trials cancels: 0.3 of the point's own noise is left.
    common = each - result.trials["hparams.x"][:, None] ** 2
    assert (np.ptp(common, axis=0) < 2.0).all()
    assert np.ptp(each[0]) > 0.1
    again = jh.minimize(noisy(), SPACE, jh.RandomSearch(2), key=0, num_trials=12, seeds=k)
    point = dict(zip(again.trials["hparams.x"].tolist(), columns(again, k), strict=True))
    same = [(row, point[x]) for x, row in zip(result.trials["hparams.x"].tolist(), each, strict=True) if x in point]
    for one, other in same:
        np.testing.assert_allclose(one, other, rtol=1e-5)


@pytest.mark.parametrize(("quantile", "sign"), [(0.5, 1.0), (0.9, 1.0), (0.9, -1.0)])
def test_a_quantile_over_seeds_is_numpys(quantile, sign):
    run = jh.minimize if sign > 0 else jh.maximize
    result = run(noisy(), SPACE, jh.RandomSearch(4), key=0, num_trials=8, seeds=5, seed_quantile=quantile)
    expected = np.quantile(
        sign * columns(result, 5), quantile, axis=1
    )  # of the loss: 0.9 is a bad seed, whatever the direction
    np.testing.assert_allclose(result.trials["loss"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.trials["metrics.loss"], sign * expected, rtol=1e-5, atol=1e-6)


def test_a_trial_that_diverges_on_one_seed_has_diverged():
    task = noisy(0.2).task
    bad = dataclasses.replace(task, evaluate=lambda h, s: {"loss": jnp.where(s["loss"] > 0.5, jnp.nan, s["loss"])})
    result = jh.minimize(jh.Training(bad, 2, 1), SPACE, jh.RandomSearch(4), key=1, num_trials=16, seeds=3)
    np.testing.assert_array_equal(result.trials["diverged"], np.isnan(columns(result, 3)).any(axis=1))
    assert 0 < result.trials["diverged"].sum() < 16


@pytest.mark.parametrize("level", [0.05, 0.2])
def test_the_race_drops_what_a_paired_test_rules_out(level):
    """One lane, so that the incumbent is known: dropped are those that scipy's test rules out, at the first look that does."""
    k = 6
    whole = jh.minimize(noisy(), SPACE, jh.SobolSearch(1), key=2, num_trials=40, seeds=k)
    raced = jh.minimize(noisy(), SPACE, jh.SobolSearch(1), key=2, num_trials=40, seeds=k, race=level)
    np.testing.assert_array_equal(raced.trials["hparams.x"], whole.trials["hparams.x"])
    each, best, counts = columns(whole, k), None, []
    for row in each:
        n = k
        for looked in (2, 4):
            if best is not None:
                found = scipy.stats.ttest_rel(row[:looked], best[:looked], alternative="greater")
                if found.pvalue < level:
                    n = looked
                    break
        counts.append(n)
        if n == k and (best is None or row.mean() < best.mean()):
            best = row
    np.testing.assert_array_equal(raced.trials["metrics.seeds"], counts)
    assert 5 < np.sum(np.array(counts) < k) < 40
    known = ~np.isnan(columns(raced, k))
    np.testing.assert_array_equal(known.sum(axis=1), counts)
    np.testing.assert_allclose(columns(raced, k)[known], each[known], rtol=1e-5)
    assert raced.best.loss == pytest.approx(each.mean(axis=1).min(), rel=1e-5)
    assert raced.lanes["steps"] == 2 * sum(counts)


def test_the_race_with_many_lanes_finds_the_same_winner_for_less():
    whole = jh.minimize(noisy(), SPACE, jh.RandomSearch(8), key=3, num_trials=200, seeds=8)
    raced = jh.minimize(noisy(), SPACE, jh.RandomSearch(8), key=3, num_trials=200, seeds=8, race=0.05)
    assert raced.lanes["steps"] < 0.8 * whole.lanes["steps"]
    assert raced.best.metrics["seeds"] == 8
    assert raced.best.hparams["x"] == pytest.approx(whole.best.hparams["x"], abs=0.1)


def test_bounds_of_the_race_are_students():
    bounds = race_bounds(Seeding(6, None, 0.05))
    np.testing.assert_array_equal(bounds[[0, 1, 6]], np.inf)
    np.testing.assert_allclose(bounds[2:6], scipy.stats.t.ppf(0.95, [1, 2, 3, 4]), rtol=1e-6)


def test_seeds_with_static_choices_and_wrappers():
    space = jh.Space({"x": jh.Float(0.0, 1.0), "kind": jh.Choice(["a", "b"], static=True)})
    study = jh.Study(noisy(), space, jh.ASHA(jh.RandomSearch(6), budgets=(1,)), 24, seeds=2)
    result = jh.run_study(study)
    whole = result.trials["steps"] == 2
    np.testing.assert_allclose(result.trials["loss"], columns(result, 2).mean(axis=1), rtol=1e-6)
    assert 0 < whole.sum() < 24
    again = jh.replay(study, result)
    assert again["replayed"] == pytest.approx(again["recorded"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"seeds": 0}, "seeds = 0: must be a whole number"),
        ({"seeds": 2.0}, "seeds = 2.0: must be a whole number"),
        ({"seed_quantile": 0.5}, "needs seeds of at least 2"),
        ({"seeds": 4, "seed_quantile": 0.5, "race": 0.05}, "its test compares means"),
        ({"seeds": 4, "seed_quantile": 1.5}, "seed_quantile = 1.5: must be between 0 and 1"),
        ({"seeds": 4, "race": 0.9}, "race = 0.9: must be the level of a test"),
        ({"seeds": 2, "race": 0.05}, "a race needs seeds of at least 3, not 2"),
        ({"race": 0.05}, "a race needs seeds of at least 3, not 1"),
    ],
)
def test_seeds_that_make_no_sense_are_refused_in_one_line(settings, text):
    with pytest.raises(jh.JaxhpoError, match=text):
        jh.minimize(noisy(), SPACE, jh.RandomSearch(2), key=0, num_trials=4, **settings)


def test_a_race_with_what_stops_trials_by_itself_is_refused():
    with pytest.raises(jh.JaxhpoError, match="ASHA stops trials by itself"):
        jh.minimize(noisy(), SPACE, jh.ASHA(jh.RandomSearch(2)), key=0, num_trials=4, seeds=4, race=0.05)
    with pytest.raises(jh.JaxhpoError, match="HostFunction is called once a trial"):
        jh.minimize(jh.HostFunction(lambda h: 0.0), SPACE, jh.RandomSearch(2), key=0, num_trials=4, seeds=4)


def test_the_chance_to_be_better_is_students_posterior():
    a, b = np.array([1.0, 2.0, 3.0, np.nan]), np.array([1.5, 2.1, 3.9, 0.0])
    gaps = np.array([0.5, 0.1, 0.9])
    t = gaps.mean() / (gaps.std(ddof=1) / np.sqrt(3))
    assert chance_better(a, b) == pytest.approx(scipy.stats.t.cdf(t, 2))
    assert chance_better(b, a) == pytest.approx(1.0 - scipy.stats.t.cdf(t, 2))
    assert chance_better(a, a) == 0.5
    assert chance_better(a, a + 1.0) == 1.0
    assert chance_better(a[:1], b[:1]) is None


def test_a_winner_is_confirmed_beside_the_runner_up_on_the_same_seeds(tmp_path):
    study = jh.Study(noisy(), SPACE, jh.RandomSearch(4), 12)
    result = jh.run_study(study, tmp_path / "s")
    note = jh.confirm(study, result, 8)
    order = np.argsort(result.trials["loss"])
    assert (note["number"], note["runner_up"]["number"]) == (order[0], order[1])
    losses = [np.array(one["validation"]["loss"]) for one in (note, note["runner_up"])]
    assert note["better"] == chance_better(*losses)
    x = result.trials["hparams.x"][order[:2]]
    # The offset that a seed gives to all cancels in pairs.
    assert np.std(losses[1] - losses[0] - (x[1] ** 2 - x[0] ** 2)) < 0.7 * np.std(losses[0])


def test_a_dropped_trial_is_told_no_better_than_the_incumbent():
    raced = jh.minimize(noisy(), SPACE, jh.SobolSearch(8), key=3, num_trials=100, seeds=8, race=0.05)
    dropped = raced.trials["metrics.seeds"] < 8
    assert 20 < dropped.sum() < 100
    assert (raced.trials["loss"][dropped] > raced.best.loss).all()
    assert (raced.trials["metrics.loss"][dropped] < raced.best.loss).any()  # on their few seeds some look better
    assert not raced.trials["whole"][dropped].any()


def test_raced_trials_are_replayed_on_the_seeds_that_they_had():
    study = jh.Study(noisy(), SPACE, jh.SobolSearch(1), 20, 2, seeds=6, race=0.2)
    result = jh.run_study(study)
    for number in range(20):
        again = jh.replay(study, result, number)
        assert again["replayed"] == pytest.approx(again["recorded"], rel=1e-6)
    assert len(set(result.trials["metrics.seeds"].tolist())) > 1


def test_a_nan_on_one_seed_is_not_hidden_by_a_quantile():
    loss = lambda key, h: jnp.where(jax.random.uniform(key) < 0.5, jnp.nan, h["x"])
    result = jh.minimize(loss, SPACE, jh.RandomSearch(4), key=0, num_trials=8, seeds=6, seed_quantile=0.2)
    assert np.isnan(columns(result, 6)).any(axis=1).all()
    assert result.trials["diverged"].all()
