"""The driver: what it computes, what it compiles, and what it makes of divergence."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.optimizers.registry import ENTRIES, example
from jaxhpo.study import engines
from jaxhpo.study.lanes import train_round, whole_training
from jaxhpo.study.limits import Limits
from jaxhpo.study.loop import first_carry, run_round
from jaxhpo.study.problem import Plan, make_plan, make_problem

SPACE = jh.Space({"lr": jh.Float(1e-4, 1.0, log=True), "wd": jh.Float(0.0, 1.0), "n": jh.Int(1, 5)})


def bowl(key, hparams):
    return (jnp.log10(hparams["lr"]) + 2) ** 2 + (hparams["wd"] - 0.3) ** 2 + 0.1 * hparams["n"]


def noisy(key, hparams):
    return {"loss": hparams["wd"], "noise": jax.random.normal(key)}


def sgd(steps_per_round=5, num_steps=20):
    """Gradient descent on x^2 from x = 1: after t steps x = (1 - 2 lr)^t, known in closed form."""

    def step(key, hparams, state):
        return {"x": state["x"] - hparams["lr"] * 2 * state["x"], "t": state["t"] + 1}

    task = jh.Task(
        init=lambda key, hparams: {"x": jnp.float32(1.0), "t": jnp.int32(0)},
        step=step,
        evaluate=lambda hparams, state: {"loss": state["x"] ** 2, "t": state["t"].astype(jnp.float32)},
    )
    return jh.Training(task, num_steps, steps_per_round)


def test_trials_are_what_was_asked_and_computed():
    result = jh.minimize(bowl, SPACE, jh.RandomSearch(num_lanes=4), key=0, num_trials=10)
    trials = result.trials
    assert trials["number"].tolist() == list(range(10))
    expected = (np.log10(trials["hparams.lr"]) + 2) ** 2 + (trials["hparams.wd"] - 0.3) ** 2 + 0.1 * trials["hparams.n"]
    np.testing.assert_allclose(trials["loss"], expected, rtol=1e-4)
    assert result.best.number == int(np.argmin(trials["loss"]))
    assert result.best.loss == pytest.approx(float(trials["loss"].min()))
    assert isinstance(result.best.hparams["n"], int)


def test_maximize_finds_the_highest_and_reports_it_as_stated():
    low = jh.minimize(bowl, SPACE, jh.RandomSearch(num_lanes=4), key=0, num_trials=12)
    high = jh.maximize(lambda key, h: -bowl(key, h), SPACE, jh.RandomSearch(num_lanes=4), key=0, num_trials=12)
    assert high.best.number == low.best.number
    assert high.best.value == pytest.approx(-low.best.loss)
    np.testing.assert_array_equal(high.trials["loss"], low.trials["loss"])


def test_training_gives_the_closed_form_and_counts_steps():
    result = jh.minimize(sgd(), {"lr": jh.Float(0.01, 0.4)}, jh.RandomSearch(num_lanes=4), key=1, num_trials=8)
    lr = result.trials["hparams.lr"]
    np.testing.assert_allclose(result.trials["loss"], (1 - 2 * lr) ** 40, rtol=1e-3, atol=1e-12)
    assert (result.trials["metrics.t"] == 20).all()
    assert (result.trials["steps"] == 20).all()


@pytest.mark.parametrize("steps_per_round", [1, 4, 20])
def test_rounds_do_not_change_a_trial(steps_per_round):
    study = lambda k: jh.minimize(sgd(k), {"lr": jh.Float(0.01, 0.4)}, jh.RandomSearch(num_lanes=4), key=1, num_trials=4)
    np.testing.assert_array_equal(study(steps_per_round).trials["loss"], study(10).trials["loss"])


def test_diverged_lanes_are_refilled_at_once_and_never_win():
    def step(key, hparams, x):
        return jnp.where(hparams["lr"] > 0.5, jnp.nan, x - hparams["lr"] * x)

    task = jh.Task(lambda key, h: jnp.float32(1.0), step, lambda h, x: {"loss": x})
    result = jh.minimize(
        jh.Training(task, 40, 4), {"lr": jh.Float(0.1, 0.9)}, jh.RandomSearch(num_lanes=4), key=3, num_trials=24
    )
    lr, diverged = result.trials["hparams.lr"], result.trials["diverged"]
    np.testing.assert_array_equal(diverged, lr > 0.5)
    assert 0 < diverged.sum() < 24
    assert (result.trials["steps"][diverged] == 0).all()
    assert (result.trials["steps"][~diverged] == 40).all()
    # A full trial takes 10 rounds, a diverged one 1: greedy refill ends no later than this bound of list scheduling.
    durations = np.where(diverged, 1, 10)
    assert result.trials["round"].max() + 1 <= durations.sum() / 4 + 10
    assert np.isfinite(result.best.loss)


def test_a_loss_that_is_not_finite_is_a_failure_and_no_best():
    losses = lambda key, h: jnp.where(h["x"] < 0.5, jnp.where(h["x"] < 0.25, -jnp.inf, jnp.nan), h["x"])
    result = jh.minimize(losses, {"x": jh.Float(0, 1)}, jh.RandomSearch(num_lanes=8), key=0, num_trials=40)
    np.testing.assert_array_equal(result.trials["diverged"], result.trials["hparams.x"] < 0.5)
    assert result.best.loss >= 0.5


def test_all_trials_diverging_is_told_clearly():
    result = jh.minimize(lambda key, h: jnp.nan * h["x"], {"x": jh.Float(0, 1)}, jh.PSO(num_lanes=4), key=0, num_trials=8)
    assert result.trials["diverged"].all()
    with pytest.raises(jh.JaxhpoError, match="all 8 trials diverged"):
        _ = result.best


def test_an_auxiliary_metric_may_be_nan():
    losses = lambda key, h: {"loss": h["x"], "f1": jnp.nan * h["x"]}
    result = jh.minimize(losses, {"x": jh.Float(0, 1)}, jh.RandomSearch(num_lanes=4), key=0, num_trials=8)
    assert not result.trials["diverged"].any()
    assert np.isnan(result.trials["metrics.f1"]).all()


def test_trial_keys_depend_on_the_trial_alone():
    wide = jh.minimize(noisy, SPACE, jh.RandomSearch(num_lanes=8), key=5, num_trials=16)
    narrow = jh.minimize(noisy, SPACE, jh.RandomSearch(num_lanes=4), key=5, num_trials=16)
    np.testing.assert_allclose(wide.trials["metrics.noise"], narrow.trials["metrics.noise"], rtol=1e-6)
    assert len(set(wide.trials["metrics.noise"].tolist())) == 16
    other = jh.minimize(noisy, SPACE, jh.RandomSearch(num_lanes=8), key=6, num_trials=16)
    assert not np.isclose(wide.trials["metrics.noise"], other.trials["metrics.noise"]).any()


@pytest.mark.parametrize(("lanes", "width"), [(5, None), (5, 2), (8, 1), (8, 8), (6, 4)])
def test_padding_lanes_change_nothing(lanes, width):
    study = lambda w: jh.minimize(bowl, SPACE, jh.RandomSearch(num_lanes=lanes), key=0, num_trials=13, shard_width=w)
    np.testing.assert_allclose(study(width).trials["loss"], study(lanes).trials["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("lanes", "devices", "width", "padded"),
    [(64, 2, 8, 64), (20, 2, 5, 20), (9, 1, 5, 10), (3, 4, 1, 3), (1, 4, 1, 1), (34, 4, 5, 40)],
)
def test_default_shards_of_trainings_are_narrow_and_even(lanes, devices, width, padded):
    plan = make_plan(lanes, 2, None, devices)
    assert (plan.width, plan.padded_lanes) == (width, padded)
    assert plan.padded_lanes == plan.width * plan.shards_per_device * plan.num_devices
    wide = make_plan(lanes, 2, None, devices, training=False)
    assert wide.shards_per_device == 1
    assert (plan.lanes_in_turn, wide.lanes_in_turn) == (True, False)


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_shard_begins_and_scores_the_lanes_that_need_it(in_turn):
    """Six lanes: two begin, of which one is due and one diverges; four go on, of which one is due, one waits, one is idle.

    In turn, nobody else is begun or evaluated. States hold a typed key.
    """
    begun, evaluated = [], []

    def init(key, hparams):
        jax.debug.callback(lambda x: begun.append(float(x)), hparams["lr"])
        return {"w": 0.0 * hparams["lr"], "key": key}

    def evaluate(hparams, state):
        jax.debug.callback(lambda x: evaluated.append(float(x)), state["w"])
        return {"loss": state["w"]}

    task = jh.Task(init, lambda key, hparams, s: s | {"w": s["w"] + hparams["lr"]}, evaluate)
    space = jh.Space({"lr": jh.Float(0.0, 1.0)})
    optimizer, key = jh.RandomSearch(6), jax.random.key(0)
    problem = make_problem(jh.Training(task, 40, 10), space, optimizer, key=key, limits=Limits(8), metric=None, maximize=False)
    flags = lambda *lanes: jnp.isin(jnp.arange(6), jnp.asarray(lanes))
    rates = jnp.asarray([0.1, jnp.nan, 0.2, 0.3, 0.4, 0.5])
    row = dataclasses.replace(
        whole_training([rates], jnp.arange(6), 40),
        fresh=flags(0, 1),
        steps=jnp.where(flags(0, 1), 0, 10),
        due=jnp.asarray([10, 40, 20, 10, 20, 30]),
        waits=flags(3),
        idle=flags(4),
    )
    before = {"w": jnp.arange(6.0) + 10.0, "key": jax.random.split(key, 6)}
    begun.clear()
    evaluated.clear()
    plan = Plan(6, 6, None, lanes_in_turn=in_turn)
    state, outcome = jax.jit(lambda r, s: train_round(problem, plan, r, s))(row, before)
    jax.effects_barrier()
    np.testing.assert_allclose(state["w"], [1.0, np.nan, 14.0, 13.0, 18.0, 20.0], rtol=1e-5)
    kept = np.asarray((jax.random.key_data(state["key"]) == jax.random.key_data(before["key"])).all(1))
    np.testing.assert_array_equal(kept, [False, False, True, True, True, True])
    np.testing.assert_array_equal(outcome.over, [True, True, True, True, False, False])
    np.testing.assert_allclose(outcome.metrics["loss"], [1.0, np.nan, 14.0, 13.0, np.nan, np.nan], rtol=1e-5)
    if in_turn:
        np.testing.assert_allclose(np.sort(begun), np.sort(rates[:2]), rtol=1e-5)
        np.testing.assert_allclose(evaluated, [1.0, np.nan, 14.0, 13.0], rtol=1e-5)
    else:
        assert (len(begun), len(evaluated)) == (6, 6)


def test_pure_study_equals_minimize_and_vmaps_over_keys():
    optimizer = jh.RandomSearch(num_lanes=4)
    study = jh.pure_study(bowl, SPACE, optimizer, 10)
    keys = jax.random.split(jax.random.key(9), 3)
    many = jax.jit(jax.vmap(study))(keys)
    for i in range(3):
        alone = jh.minimize(bowl, SPACE, optimizer, key=keys[i], num_trials=10)
        done = np.asarray(many.trials.done[i])
        order = np.argsort(np.asarray(many.trials.number[i])[done])
        np.testing.assert_allclose(np.asarray(many.trials.loss[i])[done][order], alone.trials["loss"], rtol=1e-5)
        assert float(many.loss[i]) == pytest.approx(alone.best.loss, rel=1e-5)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_studies_run_in_double_precision_too(x64, name):
    optimizer = example(name, 4)
    # What saves training needs some; this one stands still.
    still = jh.Task(lambda key, h: jnp.zeros(()), lambda key, h, s: s, lambda h, s: {"loss": bowl(None, h)})
    objective = bowl
    if hasattr(optimizer, "for_training"):
        objective = jh.Training(still, 4, 1)
        open_ = {field.name: None for field in dataclasses.fields(optimizer) if field.default is None}
        optimizer = dataclasses.replace(optimizer, **open_)
    result = jh.minimize(objective, SPACE, optimizer, key=0, num_trials=12)
    lr, wd, n = (result.trials[f"hparams.{leaf}"] for leaf in ("lr", "wd", "n"))
    np.testing.assert_allclose(result.trials["loss"], (np.log10(lr) + 2) ** 2 + (wd - 0.3) ** 2 + 0.1 * n, rtol=1e-4)


@jh.pytree_dataclass
class Quadratic:
    """An objective that is a pytree: its array is an argument of the program."""

    center: object

    def __call__(self, key, hparams):
        return (hparams["x"] - self.center) ** 2


def test_an_objective_may_be_a_pytree_and_its_arrays_recompile_nothing():
    space = {"x": jh.Float(0.0, 1.0)}
    run = lambda center: jh.minimize(Quadratic(jnp.float32(center)), space, jh.RandomSearch(num_lanes=4), key=0, num_trials=8)
    first, second = run(0.2), run(0.7)
    for result, center in ((first, 0.2), (second, 0.7)):
        np.testing.assert_allclose(result.trials["loss"], (result.trials["hparams.x"] - center) ** 2, rtol=1e-4, atol=1e-7)


def test_data_bound_to_a_task_may_be_numpy_arrays():
    """Indexed by a traced number, which numpy itself cannot: they must arrive as arguments of the program."""
    data = np.arange(10.0, dtype=np.float32)
    task = jh.Task(
        init=lambda key, h: jnp.int32(0),
        step=jax.tree_util.Partial(lambda data, key, h, i: i + (data[i] >= 0).astype(jnp.int32), data),
        evaluate=jax.tree_util.Partial(lambda data, h, i: {"loss": data[i] + h["x"]}, data),
    )
    result = jh.minimize(jh.Training(task, 6), {"x": jh.Float(0, 1)}, jh.RandomSearch(num_lanes=3), key=0, num_trials=5)
    np.testing.assert_allclose(result.trials["loss"], 6 + result.trials["hparams.x"], rtol=1e-6)


def test_a_task_without_a_state_is_scored():
    task = jh.Task(lambda key, h: (), lambda key, h, s: s, lambda h, s: {"loss": h["x"]})
    result = jh.minimize(jh.Training(task, 2), {"x": jh.Float(0, 1)}, jh.RandomSearch(num_lanes=3), key=0, num_trials=5)
    np.testing.assert_allclose(result.trials["loss"], result.trials["hparams.x"], rtol=1e-6)


def test_an_optimizer_with_a_query_of_the_wrong_shape_is_caught_at_once():
    @jh.pytree_dataclass
    class Broken:
        num_lanes: int = jh.setting(4, static=True)

        def init(self, key, spec):
            return jnp.zeros((4, spec.num_dims + 1))

        def ask(self, key, state):
            return jh.Query.fresh(state)

        def update(self, key, state, query, feedback):
            return state

    with pytest.raises(AssertionError, match="shape"):
        jh.minimize(bowl, SPACE, Broken(), key=0, num_trials=8)


def test_a_study_compiles_once_whatever_numbers_change():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(n=1)(lambda problem, plan, carry: run_round(problem, plan, carry))
    plan = Plan(4, 4, None)
    compiled = jax.jit(lambda problem, carry: traced(problem, plan, carry))

    def problem(seed, high, optimizer):
        space = jh.Space({"lr": jh.Float(1e-4, high, log=True), "n": jh.Int(2, 6)})
        loss = _loss_of_two
        return make_problem(
            loss, space, optimizer, key=jax.random.key(seed), limits=Limits(8 + seed), metric=None, maximize=False
        )

    for seed, high, change in [(0, 1.0, {}), (1, 0.5, {}), (2, 0.1, {"social": 1.1})]:
        made = problem(seed, high, dataclasses.replace(jh.PSO(num_lanes=4), **change))
        carry, _ = compiled(made, first_carry(made, plan))
        assert int(carry.finished) == 4


def _loss_of_two(key, hparams):
    return hparams["lr"] * hparams["n"]


def test_minimize_again_with_other_numbers_compiles_nothing():
    def run(seed, high):
        space = {"lr": jh.Float(0.1, high), "n": jh.Int(2, 6)}
        return jh.minimize(_loss_of_two, space, jh.PSO(num_lanes=4), key=seed, num_trials=8)

    run(0, 1.0)
    before = sum(programs.chunk._cache_size() for programs in _ALL_PROGRAMS)
    assert before >= 1
    run(1, 2.0)
    run(2, 3.0)
    assert sum(programs.chunk._cache_size() for programs in _ALL_PROGRAMS) == before


_ALL_PROGRAMS = []


@pytest.fixture(autouse=True)
def _watch_programs(monkeypatch):
    """Every plan's programs, as the driver asks for them."""
    real = engines.programs_of

    def watched(plan):
        programs = real(plan)
        if all(programs is not known for known in _ALL_PROGRAMS):
            _ALL_PROGRAMS.append(programs)
        return programs

    monkeypatch.setattr(engines, "programs_of", watched)


def test_training_exchanges_nothing_between_devices():
    from jaxhpo.study.lanes import init_state

    training = sgd()
    space = jh.Space({"lr": jh.Float(0.01, 0.4)})
    problem = make_problem(
        training, space, jh.RandomSearch(num_lanes=8), key=jax.random.key(0), limits=Limits(8), metric=None, maximize=False
    )
    plan = make_plan(8, 1, 2, 4)
    assert plan.num_devices == 4
    row = whole_training([jnp.zeros(8)], jnp.arange(8), 20)
    state = jax.vmap(init_state, (None, 0))(problem, row)
    text = jax.jit(lambda p, r, s: train_round(p, plan, r, s)).lower(problem, row, state).compile().as_text()
    assert "while" in text
    for collective in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert collective not in text


COLLECTIVE = r"= .* (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("


@pytest.mark.parametrize("wrapper", [jh.ASHA, jh.PBT])
def test_devices_exchange_states_once_and_what_became_of_lanes_once(wrapper):
    """Two exchanges of which neither needs the other may wait for each other: so there are two in all, one after the other."""
    from jaxhpo.study.lanes import Schedule

    optimizer = wrapper(jh.RandomSearch(num_lanes=8)).for_training(20, 2)
    space = jh.Space({"lr": jh.Float(0.01, 0.4)})
    problem = make_problem(sgd(), space, optimizer, key=jax.random.key(0), limits=Limits(8), metric=None, maximize=False)
    programs = engines.programs_of(make_plan(8, 1, 2, 4))
    carry = programs.first(problem)
    count = lambda lowered: re.findall(COLLECTIVE, lowered.compile().as_text())
    assert count(programs.chunk.lower(problem, carry, np.int32(1))) == ["all-gather"] * 2
    one = jnp.zeros(8, jnp.int32)
    schedule = Schedule([jnp.zeros((8, 1))], one[:, None], one, jnp.zeros(10, jnp.int32), jnp.int32(10))
    assert count(programs.schedule.lower(problem, schedule)) == ["all-gather"]


def test_a_lane_can_continue_and_copy_training():
    """Parents: lane 0 trains on, lane 1 copies lane 0's state; the state tells who trained how long."""

    @jh.pytree_dataclass
    class Copycat:
        num_lanes: int = jh.setting(2, static=True)

        def init(self, key, spec):
            return jnp.zeros((), jnp.int32)

        def ask(self, key, state):
            first = state == 0
            parent = jnp.where(first, -1, jnp.array([0, 0], jnp.int32))
            budget = jnp.where(first, jnp.array([8, 4], jnp.int32), jnp.array([16, 16], jnp.int32))
            return jh.Query(jnp.full((2, 1), 0.5), parent, budget)

        def update(self, key, state, query, feedback):
            return jnp.where(feedback.done.all() | (state > 0), state + 1, state)

    @jh.pytree_dataclass
    class Waiting(Copycat):
        """Lane 1 waits for lane 0: its first budget is as long."""

        def ask(self, key, state):
            query = Copycat.ask(self, key, state)
            return dataclasses.replace(query, budget=jnp.where(state == 0, 8, query.budget))

    task = jh.Task(
        init=lambda key, h: {"t": jnp.int32(0), "who": jax.random.uniform(key)},
        step=lambda key, h, s: {"t": s["t"] + 1, "who": s["who"]},
        evaluate=lambda h, s: {"loss": s["t"].astype(jnp.float32), "who": s["who"]},
    )
    problem = make_problem(
        jh.Training(task, 16, 4), jh.Space({"x": jh.Float(0, 1)}), Waiting(),
        key=jax.random.key(0), limits=Limits(3), metric="loss", maximize=False,
    )  # fmt: skip
    plan = Plan(2, 2, None)
    carry, rows = first_carry(problem, plan), []
    for _ in range(4):
        carry, row = run_round(problem, plan, carry)
        rows.append(row)
    assert rows[1].done.tolist() == [True, True]
    assert rows[1].loss.tolist() == [8.0, 8.0]
    assert rows[3].done.tolist() == [True, True]
    assert rows[3].number.tolist() == [0, 2]  # lane 0 went on with trial 0, lane 1 began trial 2 from its state
    assert rows[3].loss.tolist() == [16.0, 16.0]
    assert rows[3].metrics["who"][0] == rows[3].metrics["who"][1] == rows[1].metrics["who"][0]
    assert rows[1].metrics["who"][1] != rows[1].metrics["who"][0]


ASKS_FOR_A_VALUE = "asks for the value of a hyperparameter while it is traced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_trials": 0}, "num_trials = 0"),
        ({"num_trials": float("nan")}, "num_trials = nan"),
        ({"num_trials": "5"}, "num_trials = '5'"),
        ({"optimizer": jh.RandomSearch(num_lanes=True)}, "num_lanes = True"),
        ({"optimizer": jh.RandomSearch(num_lanes=0)}, "num_lanes = 0"),
        ({"metric": "f1"}, "no metric 'f1'; the task reports loss"),
        ({"objective": "text"}, "the objective is a str"),
        ({"objective": lambda h: h["wd"]}, r"the loss takes \(h\): \(key, hparams\) is due"),
        ({"objective": lambda key, h: None}, "'loss' as a NoneType: a scalar is due"),
        (
            {"objective": lambda key, h: 1.0 if h["wd"] > 0.5 else 0.0},
            ASKS_FOR_A_VALUE,
        ),
        ({"objective": lambda key, h: jnp.zeros(h["n"]).sum()}, ASKS_FOR_A_VALUE),
        ({"objective": lambda key, h: {"a": 1.0}[h["n"]]}, ASKS_FOR_A_VALUE),
        ({"optimizer": jh.PSO}, r"an instance such as PSO\(num_lanes=32\) is due, not PSO"),
        ({"optimizer": "PSO"}, "is due, not 'PSO'"),
        ({"objective": lambda key, h: h["learning_rate"]}, "hyperparameter 'learning_rate' that the space lacks"),
        ({"objective": lambda key, h: jnp.zeros(3)}, "'loss' of shape \\(3,\\): a scalar is due"),
        ({"objective": lambda key, h: {"a": h["wd"], "b": h["wd"]}}, "say which metric is to be optimized"),
        ({"devices": 99}, "devices = 99"),
        ({"shard_width": 0}, "shard_width = 0"),
        ({"max_seconds": -1.0}, "max_seconds = -1.0"),
    ],
)
def test_mistakes_get_one_clear_line(change, message):
    settings = {"objective": bowl, "space": SPACE, "optimizer": jh.RandomSearch(num_lanes=2), "key": 0, "num_trials": 4}
    settings |= change
    with pytest.raises(jh.JaxhpoError, match=message) as caught:
        jh.minimize(**settings)
    assert "\n" not in str(caught.value)


def test_max_seconds_ends_a_study_early_with_what_it_has():
    result = jh.minimize(bowl, SPACE, jh.RandomSearch(num_lanes=2), key=0, num_trials=10**6, max_seconds=0.5)
    assert 0 < len(result.trials["number"]) < 10**6
    assert result.status == "stopped"


def test_static_choices_get_a_program_each_and_arrive_as_labels():
    seen = []

    def loss(key, hparams):
        seen.append((hparams["depth"], hparams["act"]))
        assert isinstance(hparams["depth"], int)
        return hparams["x"] + {"relu": 0.0, "tanh": 10.0}[hparams["act"]] + hparams["depth"]

    space = {
        "x": jh.Float(0, 1),
        "depth": jh.Choice([1, 2], static=True),
        "act": jh.Choice(["relu", "tanh"], static=True),
        "note": "a constant",
    }
    result = jh.minimize(loss, space, jh.RandomSearch(num_lanes=8), key=0, num_trials=32)
    trials = result.trials
    expected = trials["hparams.x"] + trials["hparams.depth"] + np.where(trials["hparams.act"] == "tanh", 10.0, 0.0)
    np.testing.assert_allclose(trials["loss"], expected, rtol=1e-5)
    assert set(seen) == {(1, "relu"), (1, "tanh"), (2, "relu"), (2, "tanh")}
    assert result.best.hparams["act"] == "relu"
    with pytest.raises(jh.JaxhpoError, match="static"):
        jh.pure_study(loss, space, jh.RandomSearch(num_lanes=8), 8)
