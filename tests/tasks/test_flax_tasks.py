"""from_nnx and from_linen: steps in closed form, statistics, dropout, data shared by lanes, learning that is real."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jaxhpo.tasks import Task, Training, check_task, from_linen, from_nnx
from jaxhpo.tasks.dropout import TracedDropout, dropout

KINDS = ("nnx", "linen")
N, FEATURES, CLASSES = 90, 4, 3


def data(seed, size=N):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size)
    x = rng.normal(size=(size, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[labels]
    return x.astype(np.float32), labels


TRAIN, VALID, TEST = data(0), data(1, 50), data(2, 60)


class NnxLinear(nnx.Module):
    def __init__(self, hparams, rngs):
        self.out = nnx.Linear(FEATURES, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(x)


class LinenLinear(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(CLASSES, name="out")(x)


class NnxDeep(nnx.Module):
    def __init__(self, hparams, rngs):
        self.norm = nnx.BatchNorm(FEATURES, momentum=0.9, rngs=rngs)
        self.first = nnx.Linear(FEATURES, 16, rngs=rngs)
        self.drop = TracedDropout(hparams["dropout"], rngs=rngs)
        self.out = nnx.Linear(16, CLASSES, kernel_init=nnx.initializers.normal(0.1), rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.first(self.norm(x)))))


class LinenDeep(linen.Module):
    rate: jax.Array

    @linen.compact
    def __call__(self, x, train):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = linen.relu(linen.Dense(16, name="first")(x))
        x = dropout(self.make_rng("dropout"), self.rate, x) if train else x
        return linen.Dense(CLASSES, kernel_init=linen.initializers.normal(0.1), name="out")(x)


def sgd(hparams):
    return optax.sgd(hparams["rate"], momentum=0.9)


def linear(kind, **settings):
    if kind == "nnx":
        return from_nnx(NnxLinear, sgd, TRAIN, VALID, TEST, **settings)
    return from_linen(lambda hparams: LinenLinear(), sgd, TRAIN, VALID, TEST, **settings)


def deep(kind, **settings):
    if kind == "nnx":
        return from_nnx(NnxDeep, sgd, TRAIN, VALID, TEST, **settings)
    return from_linen(lambda hparams: LinenDeep(hparams["dropout"]), sgd, TRAIN, VALID, TEST, **settings)


HPARAMS = {"rate": jnp.float32(0.1), "dropout": jnp.float32(0.3)}


def train(task, key, hparams, num_steps):
    state = task.init(jax.random.fold_in(key, 0), hparams)
    step = lambda i, state: task.step(jax.random.fold_in(key, i + 1), hparams, state)
    state = jax.lax.fori_loop(0, num_steps, step, state)
    return state, task.evaluate(hparams, state), task.test(hparams, state)


TRAIN_ONE = jax.jit(train)
TRAIN_LANES = jax.jit(jax.vmap(train, (None, 0, 0, None)))


@pytest.mark.parametrize("kind", KINDS)
def test_full_batch_steps_are_those_of_logistic_regression(kind):
    task = linear(
        kind, loss=lambda hparams, logits, y: optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).sum() / N
    )
    state = jax.jit(task.init)(jax.random.key(0), HPARAMS)
    kernel, bias = (np.asarray(state.params["out"][name], np.float64) for name in ("kernel", "bias"))
    assert 0.1 < kernel.std() < 1.0
    x, y = TRAIN
    trace = [0.0, 0.0]
    for _ in range(2):
        error = np.asarray(jax.nn.softmax(x @ kernel + bias)) - np.eye(CLASSES)[y]
        trace = [x.T @ error / N + 0.9 * trace[0], error.mean(0) + 0.9 * trace[1]]
        kernel, bias = kernel - 0.1 * trace[0], bias - 0.1 * trace[1]
    after, valid, test = TRAIN_ONE(task, jax.random.key(0), HPARAMS, 2)
    # fold_in(key, 0) began the training, so begin the closed form there too.
    start = jax.jit(task.init)(jax.random.fold_in(jax.random.key(0), 0), HPARAMS)
    moved = jax.jit(lambda s: task.step(jax.random.key(9), HPARAMS, task.step(jax.random.key(8), HPARAMS, s)))
    np.testing.assert_allclose(moved(state).params["out"]["kernel"], kernel, rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(moved(state).params["out"]["bias"], bias, rtol=2e-4, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved(start).params, after.params)
    for metrics, (x, y) in ((valid, VALID), (test, TEST)):
        logits = x @ after.params["out"]["kernel"] + after.params["out"]["bias"]
        expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(1) == y).mean(), rtol=1e-6)
        np.testing.assert_allclose(metrics["error"], (logits.argmax(1) != y).mean(), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_learn_and_every_example_is_used(kind):
    task = linear(kind, batch_size=16)
    assert jax.tree.map(jnp.shape, TRAIN_ONE(task, jax.random.key(0), HPARAMS, 60)[0].order.seed) == (2,)
    state, valid, test = TRAIN_ONE(task, jax.random.key(0), HPARAMS, 60)
    assert (int(state.order.epoch), int(state.order.position)) == divmod(60 * 16, N)
    # Classes two standard deviations from the origin each: Bayes error about 0.12; chance is 0.67.
    assert valid["loss"] < 0.5
    assert valid["error"] < 0.25
    assert test["error"] < 0.25


@pytest.mark.parametrize("kind", KINDS)
def test_batch_statistics_follow_the_data_in_training_only(kind):
    task = deep(kind)
    state = jax.jit(task.init)(jax.random.key(0), HPARAMS)
    after = jax.jit(task.step)(jax.random.key(1), HPARAMS, state)
    statistics = after.variables["norm"] if kind == "nnx" else after.variables["batch_stats"]["norm"]
    x = TRAIN[0].astype(np.float64)
    np.testing.assert_allclose(statistics["mean"], 0.1 * x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * x.var(0), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_follows_the_step_key_and_is_off_in_evaluation(kind):
    task = deep(kind)
    state = jax.jit(task.init)(jax.random.key(0), HPARAMS)
    step = jax.jit(task.step)
    first = lambda key, hparams: np.asarray(step(jax.random.key(key), hparams, state).params["first"]["kernel"])
    np.testing.assert_array_equal(first(1, HPARAMS), first(1, HPARAMS))
    assert np.abs(first(1, HPARAMS) - first(2, HPARAMS)).max() > 1e-4
    without = {**HPARAMS, "dropout": jnp.float32(0.0)}
    np.testing.assert_array_equal(first(1, without), first(2, without))
    # Evaluation by hand, with running statistics and no dropout.
    params = jax.tree.map(np.asarray, state.params)
    hidden = VALID[0] / np.sqrt(1 + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    hidden = np.maximum(hidden @ params["first"]["kernel"] + params["first"]["bias"], 0)
    logits = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, VALID[1]).mean()
    np.testing.assert_allclose(jax.jit(task.evaluate)(HPARAMS, state)["loss"], expected, rtol=1e-5)


def test_dropout_keeps_the_mean_and_the_stated_share():
    # 1e5 elements: standard error of the share 0.0015, of the mean 0.0021; 6 of them: false-failure rate 1e-8.
    kept = jax.jit(dropout)(jax.random.key(0), 0.3, jnp.ones(100_000))
    assert abs(float((kept == 0).mean()) - 0.3) < 0.009
    assert abs(float(kept.mean()) - 1) < 0.013


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_train_as_they_would_alone(kind):
    task = deep(kind, batch_size=16)
    keys = jax.random.split(jax.random.key(3), 3)
    hparams = {"rate": jnp.array([0.01, 0.05, 0.1]), "dropout": jnp.array([0.0, 0.2, 0.5])}
    lanes = TRAIN_LANES(task, keys, hparams, 20)
    for lane in range(3):
        cut = lambda tree, lane=lane: jax.tree.map(lambda leaf: leaf[lane], tree)
        alone = TRAIN_ONE(task, keys[lane], cut(hparams), 20)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), cut(lanes), alone)
    assert len(np.unique(np.asarray(lanes[1]["loss"]))) == 3


def test_building_the_nnx_module_in_every_step_draws_no_weights():
    def flops(kind):
        task = linear(kind, batch_size=16)
        state = jax.jit(task.init)(jax.random.key(0), HPARAMS)
        return jax.jit(task.step).lower(jax.random.key(0), HPARAMS, state).compile().cost_analysis()["flops"]

    assert flops("nnx") <= 1.01 * flops("linen")


def every_equation(jaxpr):
    """All equations of a jaxpr and the constants it closes over, inner ones included."""
    equations, constants = list(jaxpr.jaxpr.eqns), list(jaxpr.consts)
    for equation in jaxpr.jaxpr.eqns:
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            if hasattr(parameter, "eqns"):
                parameter = jax.extend.core.ClosedJaxpr(parameter, [])
            if hasattr(parameter, "jaxpr"):
                inner = every_equation(parameter)
                equations, constants = equations + inner[0], constants + inner[1]
    return equations, constants


def largest_constant_and_batched_data(task):
    keys = jax.random.split(jax.random.key(0), 7)
    hparams = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, 7), HPARAMS)
    lanes = jax.vmap(train, (None, 0, 0, None))
    equations, constants = every_equation(jax.make_jaxpr(lanes, static_argnums=3)(task, keys, hparams, 3))
    assert len(equations) > 100
    shapes = {out.aval.shape for equation in equations for out in equation.outvars if hasattr(out.aval, "shape")}
    return max((np.size(c) for c in constants), default=0), any(shape[:3] == (7, N, FEATURES) for shape in shapes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [None, 16])
def test_data_are_arguments_shared_by_all_lanes(kind, batch_size):
    task = linear(kind, batch_size=batch_size)
    leaves = [TRAIN[0], TRAIN[1], *VALID, *TEST]
    assert all(leaf is expected for leaf, expected in zip(jax.tree.leaves(task), leaves, strict=True))
    constant, batched = largest_constant_and_batched_data(task)
    assert constant < 10
    assert not batched


def test_the_search_for_constants_and_batched_data_finds_them():
    task = linear("nnx")
    x, y = jnp.asarray(TRAIN[0]), jnp.asarray(TRAIN[1])
    closed = Task(task.init, lambda *args: task.step.func(x, y, *args), task.evaluate, task.test)
    assert largest_constant_and_batched_data(closed)[0] == x.size
    noisy = lambda x, y, key, hparams, state: task.step.func(x * hparams["rate"], y, key, hparams, state)
    copied = Task(task.init, jax.tree_util.Partial(noisy, x, y), task.evaluate, task.test)
    assert largest_constant_and_batched_data(copied)[1]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_tasks_on_other_data_share_a_program(kind):
    model = {"nnx": NnxLinear, "linen": lambda hparams: LinenLinear()}[kind]
    make = {"nnx": from_nnx, "linen": from_linen}[kind]
    one, other = make(model, sgd, TRAIN, VALID, batch_size=16), make(model, sgd, data(5), data(6, 50), batch_size=16)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert jax.tree.structure(one) != jax.tree.structure(make(model, sgd, TRAIN, VALID, batch_size=17))


@pytest.mark.parametrize("kind", KINDS)
def test_step_keeps_shapes_and_dtypes_also_in_double_precision(kind, x64):
    for task in (deep(kind, batch_size=16), linear(kind)):
        assert set(check_task(task, HPARAMS)) == {"loss", "accuracy", "error"}


@pytest.mark.parametrize("kind", KINDS)
def test_regression_and_own_metrics(kind):
    x, y = TRAIN[0], TRAIN[0] @ np.array([[1.0], [-1.0], [0.5], [0.0]], np.float32) + 2
    model = {
        "nnx": lambda hparams, rngs: nnx.Linear(FEATURES, 1, rngs=rngs),
        "linen": lambda hparams: linen.Dense(1),
    }[kind]
    make = {"nnx": from_nnx, "linen": from_linen}[kind]
    task = make(model, sgd, (x, y), (x, y), (x, y))
    state, valid, _ = TRAIN_ONE(task, jax.random.key(0), HPARAMS, 300)
    assert set(valid) == {"loss"}
    assert valid["loss"] < 1e-6  # a line fits exactly
    np.testing.assert_allclose(state.params["kernel"][:, 0], [1.0, -1.0, 0.5, 0.0], atol=1e-3)
    own = make(model, sgd, (x, y), (x, y), (x, y), metrics={"worst": lambda p, y: jnp.abs(p - y).max()})
    assert set(TRAIN_ONE(own, jax.random.key(0), HPARAMS, 300)[1]) == {"worst"}


def test_a_loss_may_use_hyperparameters_and_the_validation_loss_does_not():
    task = linear("nnx", loss=lambda hparams, logits, y: hparams["rate"] * optax.losses.squared_error(logits).mean())
    state, valid, _ = TRAIN_ONE(task, jax.random.key(0), {**HPARAMS, "rate": jnp.float32(1.0)}, 200)
    logits = VALID[0] @ state.params["out"]["kernel"] + state.params["out"]["bias"]
    np.testing.assert_allclose(logits, 0, atol=0.05)  # shrunk by the loss
    np.testing.assert_allclose(valid["loss"], np.log(CLASSES), atol=0.05)  # cross entropy of knowing nothing


def test_bad_data_and_batch_sizes_are_refused():
    x, y = TRAIN
    with pytest.raises(ValueError, match="batch_size = 91: there are only 90 training examples"):
        linear("nnx", batch_size=91)
    with pytest.raises(ValueError, match="batch_size = 0: must be"):
        linear("linen", batch_size=0)
    with pytest.raises(ValueError, match=r"valid_data: inputs of shape \(90, 4\) and targets of shape \(89,\)"):
        from_nnx(NnxLinear, sgd, TRAIN, (x, y[1:]))
    with pytest.raises(TypeError, match="train_data must be a pair"):
        from_nnx(NnxLinear, sgd, x, VALID)
    assert linear("nnx", batch_size=N).step.func.recipe.batch_size is None
    assert dataclasses.replace(Training(linear("nnx"), 10), num_steps=20).round_steps == 2
