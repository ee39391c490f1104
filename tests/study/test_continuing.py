"""Trials that go on, wait, take over others' states and are stopped: the study around the wrappers that save training."""

import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.study.record import read_answers, read_record

STEPS = 27


def noisy_descent(num_steps=STEPS, steps_per_round=1):
    """Descent on a square with noise, for a task in which the rate matters and every key gives another result."""
    task = jh.Task(
        init=lambda key, h: {"w": jax.random.normal(key, (4,)), "steps": jnp.int32(0)},
        step=lambda key, h, s: {
            "w": s["w"] * (1.0 - h["rate"]) + 0.05 * h["rate"] * jax.random.normal(key, (4,)),
            "steps": s["steps"] + 1,
        },
        evaluate=lambda h, s: {"loss": (s["w"] ** 2).sum(), "steps": s["steps"].astype(jnp.float32)},
    )
    return jh.Training(task, num_steps, steps_per_round)


SPACE = jh.Space({"rate": jh.Float(0.01, 2.5, log=True), "plain": jh.Choice(["a", "b"])})
STATIC = jh.Space({"rate": jh.Float(0.01, 2.5, log=True), "plain": jh.Choice(["a", "b"], static=True)})


def wrappers(num_lanes=9):
    return {
        "ASHA": jh.ASHA(jh.RandomSearch(num_lanes)),
        "MedianStopping": jh.MedianStopping(jh.RandomSearch(num_lanes)),
        "PredictiveStopping": jh.PredictiveStopping(jh.TPE(num_lanes)),
        "SuccessiveHalving": jh.SuccessiveHalving(jh.PSO(num_lanes)),
        "Hyperband": jh.Hyperband(jh.TPE(num_lanes)),
        "PBT": jh.PBT(jh.RandomSearch(num_lanes)),
    }


every_wrapper = pytest.mark.parametrize("name", wrappers())


def assert_same_trials(one, other):
    assert one.trials.keys() == other.trials.keys()
    for name in one.trials.keys() - {"seconds"}:
        np.testing.assert_array_equal(one.trials[name], other.trials[name], err_msg=name)


@every_wrapper
def test_trials_are_numbered_trained_as_told_and_counted_once(name):
    result = jh.minimize(noisy_descent(), SPACE, wrappers()[name], key=0, num_trials=60)
    trials = result.trials
    np.testing.assert_array_equal(trials["number"], np.arange(60))
    sound = ~trials["diverged"]
    np.testing.assert_array_equal(trials["metrics.steps"][sound], trials["steps"][sound])
    assert (trials["steps"] <= STEPS).all()
    assert (trials["steps"] == STEPS).any()
    own = trials["steps"] - np.where(trials["parent"] >= 0, trials["start"], 0)
    # What lanes did beside is the last look of trials that were not answered again.
    assert own.sum() <= result.lanes["steps"] <= own.sum() + 60 * STEPS
    assert 0.3 < result.lanes["share"] <= 1.0


@every_wrapper
@pytest.mark.parametrize("space", [SPACE, STATIC], ids=["traced", "static"])
def test_a_replay_gives_the_recorded_bits(name, space):
    study = jh.Study(noisy_descent(), space, wrappers()[name], 40, 3)
    result = jh.run_study(study)
    worst = int(np.argmax(np.where(result.trials["diverged"], np.inf, result.trials["loss"])))
    for number in (None, worst):
        again = jh.replay(study, result, number)
        assert again["recorded"] == again["replayed"]
        assert again["schedule"][-1]["number"] == again["number"]
    hparams = result.best.hparams
    assert jh.replay(study, result)["schedule"][-1]["hparams"] == hparams


@pytest.mark.parametrize(
    ("name", "space"),
    [("ASHA", SPACE), ("Hyperband", SPACE), ("PBT", SPACE), ("ASHA", STATIC), ("PBT", STATIC)],
    ids=["ASHA", "Hyperband", "PBT", "ASHA static", "PBT static"],
)
def test_the_same_bits_on_one_device_and_on_four(name, space):
    run = lambda devices: jh.minimize(
        noisy_descent(), space, wrappers(8)[name], key=1, num_trials=40, devices=devices, shard_width=2
    )
    assert_same_trials(run(1), run(4))


@jh.pytree_dataclass
class Waits:
    """Lane 0 waits at 4 steps until lane 1, whose budget is the whole training, is done; then it goes on to the end."""

    num_lanes: int = jh.setting(2, static=True)

    def init(self, key, spec):
        return jnp.zeros((), bool)

    def ask(self, key, state):
        parent = jnp.array([-1, -1], jnp.int32)
        return jh.Query(jnp.full((2, 2), 0.4), parent, jnp.array([4, jh.FULL], jnp.int32))

    def update(self, key, state, query, feedback):
        return state | feedback.done[1]


@jh.pytree_dataclass
class Held(Waits):
    def init(self, key, spec):
        return {"begun": jnp.zeros(2, bool), "free": jnp.zeros((), bool), "answers": jnp.zeros(2, jnp.int32)}

    def ask(self, key, state):
        own = jnp.arange(2, dtype=jnp.int32)
        budget = jnp.where(state["free"], jh.FULL, jnp.array([4, jh.FULL], jnp.int32))
        return jh.Query(jnp.full((2, 2), 0.4), jnp.where(state["begun"], own, -1), budget)

    def update(self, key, state, query, feedback):
        return {
            "begun": state["begun"] | feedback.done,
            "free": state["free"] | feedback.done[1],
            "answers": state["answers"] + feedback.done,
        }


def test_a_lane_that_waits_keeps_its_state_and_answers_again():
    result = jh.minimize(noisy_descent(16, 4), SPACE, Held(), key=0, num_trials=2)
    np.testing.assert_array_equal(result.trials["steps"], [16, 16])
    np.testing.assert_array_equal(result.trials["metrics.steps"], [16, 16])
    alone = jh.minimize(noisy_descent(16, 4), SPACE, Alike(), key=0, num_trials=2)
    np.testing.assert_array_equal(result.trials["loss"], alone.trials["loss"])
    assert result.lanes["steps"] == 32


@jh.pytree_dataclass
class Alike(Waits):
    """The same two trials, which nothing holds."""

    def ask(self, key, state):
        return jh.Query.fresh(jnp.full((2, 2), 0.4))


def test_the_incumbent_is_fully_trained_where_any_trial_is():
    """A training that gets worse: short ones have lower losses, and are no winners."""
    task = jh.Task(
        init=lambda key, h: jnp.float32(0.0),
        step=lambda key, h, s: s + 1.0,
        evaluate=lambda h, s: {"loss": s + h["x"]},
    )
    study = jh.Study(jh.Training(task, 9, 1), jh.Space({"x": jh.Float(0, 1)}), jh.ASHA(jh.RandomSearch(4)), 40)
    result = jh.run_study(study)
    assert result.trials["loss"].min() < 9.0 <= result.best.loss
    assert result.best.steps == 9
    whole = result.trials["steps"] == 9
    assert result.best.loss == result.trials["loss"][whole].min()


def test_limits():
    run = lambda **limits: jh.minimize(noisy_descent(), SPACE, jh.ASHA(jh.RandomSearch(8)), key=0, **limits)
    result = run(max_steps=1000)
    assert (result.status, result.lanes["steps"]) == ("finished", 1000)
    assert result.lanes["share"] == 1.0
    easy = run(target_loss=0.5)
    assert easy.best.loss <= 0.5
    assert easy.best.steps == STEPS
    assert run(target_loss=0.5, num_trials=3).lanes["steps"] <= 3 * STEPS
    high = jh.maximize(noisy_descent(), SPACE, jh.RandomSearch(8), key=0, metric="steps", target_value=27.0, num_trials=100)
    assert len(high.trials["number"]) == 8
    for wrong, text in (
        ({}, "num_trials: say how many"),
        ({"max_steps": 0}, "max_steps = 0"),
        ({"target_loss": "x"}, "target"),
    ):
        with pytest.raises(jh.JaxhpoError, match=text):
            run(**wrong)


def test_too_short_a_training_is_refused_in_one_line():
    with pytest.raises(jh.JaxhpoError, match="one round of 1 steps"):
        jh.minimize(lambda key, h: h["rate"], SPACE, jh.ASHA(jh.RandomSearch(4)), key=0, num_trials=8)
    with pytest.raises(jh.JaxhpoError, match="one round of 1 steps"):
        jh.minimize(jh.HostFunction(lambda h: 0.0), SPACE, jh.ASHA(jh.RandomSearch(4)), key=0, num_trials=8)


def test_a_record_holds_lineage_and_answers(tmp_path):
    study = jh.Study(noisy_descent(), SPACE, jh.PBT(jh.RandomSearch(8)), 40)
    result = jh.run_study(study, tmp_path / "s")
    record = read_record(tmp_path / "s")
    assert record.has_lineage
    answers = read_answers(tmp_path / "s")
    for trial in record.trials:
        assert trial.parent < trial.number
        if trial.parent >= 0:
            steps = [steps for steps, _ in answers[trial.parent]]
            assert trial.start in steps or trial.start > 0
            assert trial.start < trial.steps
        assert answers[trial.number][-1][0] == trial.steps
    assert record.best is not None
    assert record.best.number == result.best.number
    assert record.notes["lanes"]["share"] == result.lanes["share"]
    again = jh.replay(study, tmp_path / "s")
    assert again["recorded"] == again["replayed"] == result.best.loss


KILLED = """
    import os, signal, sys
    import jax, jaxhpo as jh
    sys.path.insert(0, {here!r})
    import test_continuing as t
    jax.config.update("jax_num_cpu_devices", 4)
    study = t.long_study({name!r}, {static!r})
    seen = 0
    def kill(progress):
        global seen
        seen += progress.phase == "running"
        if seen == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
    jh.run_study(study, {folder!r}, progress=kill)
"""


def long_study(name, static):
    space = STATIC if static else SPACE
    return jh.Study(noisy_descent(), space, wrappers(8)[name], 60, 2, shard_width=2, devices=2)


@pytest.mark.parametrize(("name", "static"), [("ASHA", False), ("PBT", False), ("Hyperband", True)])
def test_killed_in_between_and_resumed_gives_the_same_bits(name, static, tmp_path, monkeypatch):
    study, folder = long_study(name, static), tmp_path / "s"
    straight = jh.run_study(study)
    code = textwrap.dedent(KILLED.format(here=os.path.dirname(__file__), name=name, static=static, folder=str(folder), after=2))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    begun = len(read_record(folder).trials)
    resumed = jh.run_study(study, folder, resume=True)
    assert_same_trials(straight, resumed)
    assert 0 < begun < len(resumed.trials["number"])


@pytest.mark.parametrize("space", [SPACE, STATIC], ids=["traced", "static"])
def test_a_study_whose_limit_was_raised_goes_on_as_if_it_had_never_ended(space, tmp_path):
    study = lambda steps: jh.Study(noisy_descent(), space, jh.ASHA(jh.RandomSearch(8)), seed=4, max_steps=steps, shard_width=2)
    straight = jh.run_study(study(1200))
    jh.run_study(study(400), tmp_path / "s")
    assert_same_trials(straight, jh.run_study(study(1200), tmp_path / "s", resume=True))


def test_trials_of_rare_static_choices_do_not_starve():
    """At most as many trials are answered before one as could begin while it was not yet late, and those of its own batch."""
    lanes = 8
    space = jh.Space({"rate": jh.Float(0.01, 0.5), "kind": jh.Choice([*"abcd"], static=True)})
    result = jh.minimize(noisy_descent(3, 1), space, jh.RandomSearch(lanes), key=0, num_trials=200, shard_width=2)
    answered = np.argsort(np.argsort(result.trials["round"], kind="stable"), kind="stable")
    assert (answered - result.trials["number"]).max() <= 4 * lanes


def test_where_every_training_fails_at_the_end_the_winner_is_one_that_has_not_failed_yet():
    task = jh.Task(
        init=lambda key, h: jnp.float32(0.0),
        step=lambda key, h, s: s + 1.0,
        evaluate=lambda h, s: {"loss": jnp.where(s > 3, jnp.nan, h["x"])},
    )
    optimizer = jh.ASHA(jh.RandomSearch(4), budgets=(1, 3))
    result = jh.minimize(jh.Training(task, 9, 1), {"x": jh.Float(0, 1)}, optimizer, key=0, num_trials=40)
    sound = ~result.trials["diverged"]
    assert (~sound).any()
    assert result.best.loss == result.trials["loss"][sound].min()
    assert result.best.metrics["loss"] == result.best.loss


def test_no_answer_before_the_end_is_said_so():
    result = jh.minimize(noisy_descent(), SPACE, jh.RandomSearch(8), key=0, max_steps=16)
    with pytest.raises(jh.JaxhpoError, match="no trial was answered before the study ended: raise max_steps"):
        result.best  # noqa: B018
