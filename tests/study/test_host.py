"""Host functions: the same optimizers, driven from the host, serially or in processes."""

import functools
import os
import time

import jax
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.study import read_record

SPACE = {"x": jh.Float(-1.0, 1.0), "kind": jh.Choice(["round", "flat"], static=True), "n": jh.Int(1, 4)}


def bowl(hparams):
    assert isinstance(hparams["x"], float)
    assert isinstance(hparams["n"], int)
    return hparams["x"] ** 2 + hparams["n"] + (5.0 if hparams["kind"] == "flat" else 0.0)


def seeded(hparams, seed):
    return {"loss": hparams["x"], "seed": float(seed), "pid": float(os.getpid())}


def failing(hparams):
    if hparams["x"] < -0.5:
        raise RuntimeError("this rate is too low")
    return float("nan") if hparams["x"] < 0.0 else hparams["x"]


def sleepy(hparams):
    if hparams["x"] > 0:
        time.sleep(60)
    return hparams["x"]


def counted(folder, hparams, seed):
    path = os.path.join(folder, str(seed))
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) < 2:
        raise RuntimeError("first try")
    return hparams["x"]


def test_serial_trials_are_what_the_function_says():
    result = jh.minimize(jh.HostFunction(bowl), SPACE, jh.PSO(num_lanes=4), key=0, num_trials=20)
    trials = result.trials
    expected = trials["hparams.x"] ** 2 + trials["hparams.n"] + np.where(trials["hparams.kind"] == "flat", 5.0, 0.0)
    np.testing.assert_allclose(trials["loss"], expected, rtol=1e-5)
    assert trials["number"].tolist() == list(range(20))
    assert result.best.hparams["kind"] == "round"


def test_the_search_is_the_compiled_one():
    """The same loss in JAX and on the host: the same points, the same incumbent."""
    space = {"x": jh.Float(-1.0, 1.0), "y": jh.Float(0.0, 1.0)}
    on_host = jh.HostFunction(lambda h: float(np.float32(h["x"]) ** 2 + np.float32(h["y"])))
    compiled = jh.minimize(lambda key, h: h["x"] ** 2 + h["y"], space, jh.RandomSearch(num_lanes=4), key=7, num_trials=12)
    hosted = jh.minimize(on_host, space, jh.RandomSearch(num_lanes=4), key=7, num_trials=12)
    np.testing.assert_array_equal(compiled.trials["hparams.x"], hosted.trials["hparams.x"])
    np.testing.assert_allclose(compiled.trials["loss"], hosted.trials["loss"], rtol=1e-5)
    assert compiled.best.number == hosted.best.number


def test_failures_are_data_with_their_reason_in_the_record(tmp_path):
    result = jh.minimize(
        jh.HostFunction(failing),
        {"x": jh.Float(-1, 1)},
        jh.RandomSearch(num_lanes=4),
        key=0,
        num_trials=24,
        record=tmp_path / "s",
    )
    x = result.trials["hparams.x"]
    np.testing.assert_array_equal(result.trials["diverged"], x < 0)
    trials = read_record(tmp_path / "s").trials
    raised = [t for t in trials if t.hparams["x"] < -0.5]
    assert raised
    assert all("this rate is too low" in t.error for t in raised)
    assert all(t.error is None for t in trials if t.hparams["x"] >= 0)
    assert result.best.loss >= 0


def test_processes_give_what_serial_gives():
    make = lambda processes: jh.HostFunction(seeded, processes=processes)
    run = lambda processes: jh.minimize(make(processes), SPACE, jh.PSO(num_lanes=4), key=3, num_trials=12).trials
    serial, parallel = run(0), run(2)
    np.testing.assert_array_equal(serial["loss"], parallel["loss"])
    np.testing.assert_array_equal(serial["metrics.seed"], parallel["metrics.seed"])
    assert len(set(serial["metrics.seed"].tolist())) == 12
    assert set(serial["metrics.pid"]) == {float(os.getpid())}
    assert os.getpid() not in set(parallel["metrics.pid"])


@pytest.mark.slow
def test_timeouts_and_asynchronous_refill():
    objective = jh.HostFunction(sleepy, processes=2, timeout=1.0, asynchronous=True)
    result = jh.minimize(objective, {"x": jh.Float(-1, 1)}, jh.RandomSearch(num_lanes=2), key=0, num_trials=8)
    np.testing.assert_array_equal(result.trials["diverged"], result.trials["hparams.x"] > 0)
    assert 0 < result.trials["diverged"].sum() < 8
    assert sorted(result.trials["number"].tolist()) == list(range(8))


def test_retries_reach_the_executor(tmp_path):
    objective = jh.HostFunction(functools.partial(counted, str(tmp_path)), retries=1)
    result = jh.minimize(objective, {"x": jh.Float(0, 1)}, jh.RandomSearch(num_lanes=2), key=0, num_trials=4)
    assert not result.trials["diverged"].any()
    assert len(os.listdir(tmp_path)) == 4


def test_resume_asks_only_for_what_is_missing(tmp_path):
    calls = []

    def slow_to_come(hparams):
        calls.append(hparams["x"])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return hparams["x"]

    run = lambda resume, folder: jh.minimize(
        jh.HostFunction(slow_to_come),
        {"x": jh.Float(0, 1)},
        jh.PSO(num_lanes=2),
        key=0,
        num_trials=10,
        record=folder,
        resume=resume,
    )
    with pytest.raises(KeyboardInterrupt):
        run(False, tmp_path / "s")
    resumed = run(True, tmp_path / "s")
    assert len(calls) == 7 + 4
    calls.extend([0.0] * 10)
    whole = run(False, tmp_path / "whole")
    np.testing.assert_array_equal(resumed.trials["loss"], whole.trials["loss"])


def test_a_missing_metric_is_named_and_leaves_no_record(tmp_path):
    settings = {"space": SPACE, "optimizer": jh.RandomSearch(num_lanes=2), "key": 0, "num_trials": 2, "record": tmp_path / "s"}
    with pytest.raises(jh.JaxhpoError, match="the function returned loss, seed, pid, and no 'f1'; set metric to one of these"):
        jh.minimize(jh.HostFunction(seeded), metric="f1", **settings)
    assert jh.minimize(jh.HostFunction(seeded), metric="seed", **settings).best.loss > 0


def test_errors_of_every_trial_are_told_in_the_end():
    result = jh.minimize(jh.HostFunction(broken), SPACE, jh.RandomSearch(num_lanes=2), key=0, num_trials=4)
    with pytest.raises(jh.JaxhpoError, match=r"all 4 trials failed, the first with .*KeyError: 'nope'"):
        _ = result.best
    assert "no winner" in repr(result)


def broken(hparams):
    return hparams["nope"]


def test_static_labels_and_seed_keys_do_not_leak_between_studies():
    first = jh.minimize(jh.HostFunction(seeded), SPACE, jh.RandomSearch(num_lanes=2), key=0, num_trials=4)
    second = jh.minimize(jh.HostFunction(seeded), SPACE, jh.RandomSearch(num_lanes=2), key=jax.random.key(1), num_trials=4)
    assert not set(first.trials["metrics.seed"]) & set(second.trials["metrics.seed"])
