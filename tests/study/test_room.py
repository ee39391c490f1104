"""Optimizers whose table grows while a study runs: the same bits wherever it is cut, and old states find their size."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.optimizers import registry
from jaxhpo.study.room import rounds_that_fit, with_room

TRIALS = 28


def growing():
    light = dict(registry.ENTRIES["BayesOpt"].light) | {"capacity": 8, "max_capacity": 60}
    return jh.BayesOpt(num_lanes=2, **light)


def bowl(key, hparams):
    return (hparams["x"] - 0.3) ** 2 + 0.1 * hparams["n"]


SPACE = {"x": jh.Float(0.0, 1.0), "n": jh.Int(0, 5)}


def rows(result):
    order = np.argsort(result.trials["number"])
    return np.asarray(result.trials["loss"], np.float32)[order]


def test_a_study_that_is_cut_and_resumed_grows_at_the_same_trials(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxhpo.study.driver._CHUNK_SECONDS", 0.0)  # chunks of one round: it can be cut anywhere
    whole = jh.minimize(bowl, SPACE, growing(), key=3, num_trials=TRIALS)

    for cut in (10, 20):  # with a table of 16 rows, and of 32

        def stop(progress, cut=cut):
            if cut <= progress.trials < TRIALS:
                raise RuntimeError("pulled the plug")

        settings = {"key": 3, "num_trials": TRIALS, "record": tmp_path / str(cut)}
        with pytest.raises(RuntimeError, match="plug"):
            jh.minimize(bowl, SPACE, growing(), progress=stop, **settings)
        resumed = jh.minimize(bowl, SPACE, growing(), resume=True, **settings)
        np.testing.assert_array_equal(rows(whole), rows(resumed))
    assert len(rows(whole)) == TRIALS


def test_tables_double_until_they_are_full_grown():
    optimizer = growing()
    spec = jh.Space(SPACE).spec
    state = optimizer.init(jax.random.key(0), spec)
    sizes = []
    while True:
        sizes.append(state.table.loss.shape[0])
        more = optimizer.enlarged(state)
        if more is state:
            break
        assert optimizer.holds(state) == sizes[-1] - optimizer.num_lanes
        state = more
    assert sizes == [16, 32, 64]
    assert optimizer.holds(state) > 10**6
    assert rounds_that_fit(optimizer, optimizer.init(jax.random.key(0), spec), 10) == 2
    assert with_room(optimizer, optimizer.init(jax.random.key(0), spec), 20).table.loss.shape == (32,)
    assert rounds_that_fit(jh.PSO(num_lanes=2), None, 10) is None


def test_a_pure_study_has_room_from_the_start_and_finds_the_bowl():
    state = jax.eval_shape(lambda: growing().init(jax.random.key(0), jh.Space(SPACE).spec))
    assert jax.eval_shape(lambda s: with_room(growing(), s, TRIALS + 2), state).table.loss.shape == (32,)
    study = jh.pure_study(bowl, SPACE, growing(), TRIALS)
    result = jax.jit(study)(jax.random.key(0))
    assert int(result.trials.done.sum()) == TRIALS
    # One fixed key. Uniform trials come so close in x, with n = 0, with probability 1 - (1 - 0.002 / 6)^28 < 0.01.
    assert float(result.loss) < 1e-6
