"""Evolution against closed forms of the smoothed objective, and against the exact derivative.

The keys are fixed, so a test fails always or never. Statistical bounds are z = 5 standard errors of a mean over thousands of
estimates: with other keys one comparison would fail falsely with probability 6e-7, this whole file with less than 1e-4.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxhpo as jh
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients.estimate import split_floats, start, steps_from
from jaxhpo.hypergradients.evolution import Evolution, mean_of_pairs
from jaxhpo.hypergradients.unrolled import Unrolled
from jaxhpo.tasks.task import Task

Z = 5.0
STEPS, TRUNCATION = 10, 4
WINDOWS = [(0, 4), (4, 8), (8, 10)]
THRESHOLDS = np.array([0.7, 0.95, 1.1])
QUADRATIC, LINEAR, SQUARE, STAIRS, FRAGILE, CHANGED = range(6)

# The toy has integers to choose what is measured, so that few programs serve all tests. Floats are a and b.
CENTRE = {"a": 1.0, "b": -0.5, "kind": QUADRATIC, "tenths": 8, "limit": 10}


def _init(key, hparams):
    return hparams["a"] * 0.5


def _step(key, hparams, state):
    return hparams["tenths"] / 10 * state + hparams["a"]


def _evaluate(hparams, state):
    a, b = hparams["a"], hparams["b"]
    stairs = jnp.mean(a > THRESHOLDS)
    fragile = jnp.where(jnp.abs(a - 1) > hparams["limit"] / 100, jnp.nan, 3 * a)
    return {"loss": jnp.stack([(state - b) ** 2, state + 2 * b, a**2, stairs, fragile, state - a])[hparams["kind"]]}


toy = functools.partial(Evolution, Task(_init, _step, _evaluate), STEPS, truncation=TRUNCATION, num_pairs=2)


def toy_metrics(kind, tenths, a, b):
    """The metric at the end of each window, of hyperparameters ``[3]`` that hold in the windows; plain Python."""
    state, found = 0.5 * a[0], []
    for w, (first, last) in enumerate(WINDOWS):
        for _ in range(first, last):
            state = tenths / 10 * state + a[w]
        found.append((state - b[w]) ** 2 if kind == QUADRATIC else state + 2 * b[w])
    return jnp.stack(found)


def toy_gradient(kind, target, tenths=8):
    """Exact derivative by the values in each window, ``[2, 3]``."""
    target_of = lambda a, b: (toy_metrics(kind, tenths, a, b)[-1 if target == "final" else slice(None)]).mean()
    return np.stack(jax.grad(target_of, argnums=(0, 1))(jnp.full(3, CENTRE["a"]), jnp.full(3, CENTRE["b"])))


@jax.jit
def _of_lanes(evolution, keys, hparams):
    def one(key, hparams):
        floats, assemble = split_floats(hparams)
        evolution.check(floats, assemble)
        return evolution.estimate(key, floats, assemble)

    return jax.vmap(one)(keys, hparams)


def found_by(evolution, count=20_000, sigma=0.1, scale=(1.0, 1.0), **hparams):
    """Estimates for many keys at ``CENTRE``, but for ``hparams``."""
    evolution = dataclasses.replace(evolution, sigma=sigma, scale=dict(zip("ab", scale, strict=True)))
    lanes = {name: jnp.broadcast_to(jnp.asarray(value), count) for name, value in (CENTRE | hparams).items()}
    return _of_lanes(evolution, jax.random.split(jax.random.key(0), count), lanes)


def gradients(evolution, **options):
    """``[count, 2]``"""
    grad = found_by(evolution, **options).grad
    return np.stack([grad["a"], grad["b"]], axis=1)


def z_of(samples, expected):
    return np.abs(samples.mean(0) - expected) / (samples.std(0, ddof=1) / np.sqrt(len(samples)))


@pytest.mark.parametrize("target", ["final", "mean"])
@pytest.mark.parametrize("method", ["es", "pes"])  # es_single is es: see below
def test_unbiased_for_a_quadratic_metric(x64, method, target):
    # Smoothing a quadratic adds a constant: the gradient is that of the metric itself, however large sigma is.
    samples = gradients(toy(method=method, target=target), sigma=0.5, scale=(0.7, 2.0))
    exact = toy_gradient(QUADRATIC, target).sum(1)
    assert (z_of(samples, exact) < Z).all()
    np.testing.assert_allclose(samples.mean(0), exact, rtol=0.2)  # and the standard error is not just large


@pytest.mark.parametrize("target", ["final", "mean"])
def test_es_single_of_held_hyperparameters_is_es(x64, target):
    floats, assemble = split_floats(CENTRE)
    program = lambda method: str(
        jax.make_jaxpr(lambda key: toy(method=method, target=target).estimate(key, floats, assemble))(jax.random.key(0))
    )
    assert program("es_single") == program("es") != program("pes")


def test_unbiased_for_a_smoothed_staircase(x64):
    # E of the share of thresholds t below a + sigma e: its derivative is the mean normal density at t.
    samples = gradients(toy(), sigma=0.2, kind=STAIRS)
    density = np.exp(-0.5 * ((THRESHOLDS - 1) / 0.2) ** 2) / (0.2 * np.sqrt(2 * np.pi))
    assert (z_of(samples, [density.mean(), 0]) < Z).all()


def test_log_perturbation_is_unbiased_for_its_own_smoothing(x64):
    # E (a exp(sigma s e))^2 = a^2 exp(2 sigma^2 s^2): its derivative at a = 1 is larger than that of the metric, which is 2.
    of = lambda a: gradients(toy(log=("a",)), sigma=0.5, scale=(0.7, 1.0), kind=SQUARE, a=a)[:, 0]
    samples = of(1.0)
    assert z_of(samples, 2 * np.exp(2 * (0.5 * 0.7) ** 2)) < Z
    assert z_of(samples, 2.0) > 2 * Z
    np.testing.assert_allclose(of(0.01), samples * 0.01, rtol=1e-9)  # the chain rule at another centre


def test_truncated_es_is_biased_where_pes_is_not(x64):
    exact = toy_gradient(LINEAR, "mean").sum(1)
    # The same windows with nothing persistent: each finite difference is credited to the perturbation of its own window.
    e = np.random.default_rng(0).normal(size=(20_000, 2, 3))
    metrics = jax.jit(jax.vmap(lambda e: toy_metrics(LINEAR, 8, 1.0 + 0.1 * e[0], -0.5 + 0.1 * e[1])))
    rises = (np.asarray(metrics(e)) - np.asarray(metrics(-e))) / 0.2
    truncated, persistent = ((rises[:, None] * credited).mean(2) for credited in (e, e.cumsum(2)))
    samples = gradients(toy(method="pes", target="mean"), kind=LINEAR)
    assert z_of(truncated, exact)[0] > 5 * Z
    assert (z_of(persistent, exact) < Z).all()
    assert (z_of(samples, exact) < Z).all()
    np.testing.assert_allclose(samples.var(0), persistent.var(0) / 2, rtol=0.1)  # two pairs each; standard error 2 %


@pytest.mark.parametrize("tenths", [0, 8, 10])  # of the state that a step keeps
def test_variances_of_linear_metrics(x64, tenths):
    # Let the metric have the derivatives A by what perturbs a in the windows, and B for b. A pair of es then has the variance
    # 2 (sum of A)^2 + (sum of B)^2 for the float a, and one of pes K (|A|^2 + |B|^2) + (sum of A)^2.
    by_a, by_b = toy_gradient(LINEAR, "final", tenths)
    once, persistent = (gradients(toy(method=method), kind=LINEAR, tenths=tenths)[:, 0].var() for method in ("es", "pes"))
    np.testing.assert_allclose(once, (2 * by_a.sum() ** 2 + by_b.sum() ** 2) / 2, rtol=0.1)  # standard error 2 %
    np.testing.assert_allclose(persistent, (3 * (by_a @ by_a + by_b @ by_b) + by_a.sum() ** 2) / 2, rtol=0.1)
    if tenths == 0:
        assert persistent > 1.8 * once  # only the last window acts on the metric


def test_metrics_are_evaluated_with_the_hyperparameters_of_their_window(x64):
    # A step that keeps nothing makes its state a: the metric is the difference between the floats trained and evaluated with.
    for target in ("final", "mean"):
        assert (gradients(toy(method="pes", target=target), kind=CHANGED, tenths=0) == 0).all()


def test_mean_of_pairs_and_its_error():
    # Without the third pair: means 2, 1 and 3, each with the standard error 1: sqrt(3) by sqrt(14).
    slopes = {"a": jnp.array([1.0, 3.0, jnp.nan]), "b": jnp.array([[0.0, 2.0], [2.0, 4.0], [9.0, 9.0]])}
    mean, gauges = jax.jit(mean_of_pairs)(slopes)
    assert mean["a"] == 2
    np.testing.assert_array_equal(mean["b"], [1, 3])
    assert gauges["gauge/lost_pairs"] == 1
    np.testing.assert_allclose(gauges["gauge/standard_error"], np.sqrt(3 / 14), rtol=1e-6)


def test_standard_error_is_that_of_the_pairs(x64):
    # In units of the scales the spread of the estimates over keys is what the gauges say on average.
    found = found_by(toy(num_pairs=50), count=2000, scale=(0.7, 2.0), kind=LINEAR)
    scaled = np.stack([found.grad["a"] * 0.7, found.grad["b"] * 2.0], axis=1)
    errors = np.asarray(found.metrics["gauge/standard_error"]) * np.linalg.norm(scaled, axis=1)
    np.testing.assert_allclose(np.mean(errors**2), scaled.var(0).sum(), rtol=0.15)  # standard error 3 %
    assert (found.metrics["gauge/lost_pairs"] == 0).all()


def test_lost_pairs_are_left_out_and_counted(x64):
    # The pairs with |e| > 1 are NaN, a share of 0.317311; the others estimate 3 e^2, whose mean is 3 * 0.291125.
    found = found_by(toy(num_pairs=50), count=2000, kind=FRAGILE)
    assert z_of(np.asarray(found.metrics["gauge/lost_pairs"]) / 50, 0.317311) < Z
    assert z_of(np.asarray(found.grad["a"]) / 3, 0.291125) < Z
    assert z_of(np.asarray(found.grad["b"]), 0) < Z
    assert (found.metrics["gauge/standard_error"] < 1).all()

    none = found_by(toy(num_pairs=50), count=2000, kind=FRAGILE, limit=0)
    assert (none.metrics["gauge/lost_pairs"] == 50).all()
    assert np.isnan(none.grad["a"]).all()
    assert np.isinf(none.metrics["gauge/standard_error"]).all()
    np.testing.assert_allclose(none.metrics["loss"], 3)  # of the unperturbed training


def test_lanes_and_chunks_change_nothing(x64):
    evolution = toy(method="pes", target="mean", sigma=0.1, scale={"a": 0.7, "b": 2.0})
    lanes = {"a": np.array([0.01, 1.0, 30.0]), "b": np.array([0.0, -0.5, 3.0])}
    together = found_by(evolution, scale=(0.7, 2.0), **{name: np.resize(x, 20_000) for name, x in lanes.items()})
    chunked = dataclasses.replace(evolution, pairs_at_once=1)
    alone = jax.jit(lambda key, floats: chunked.estimate(key, floats, lambda floats: CENTRE | floats))
    keys = jax.random.split(jax.random.key(0), 20_000)[:3]
    one_by_one = [alone(key, {"a": a, "b": b}) for key, a, b in zip(keys, lanes["a"], lanes["b"], strict=True)]
    loop = jax.tree.map(lambda *found: jnp.stack(found), *one_by_one)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), jax.tree.map(lambda x: x[:3], together), loop)


@pytest.mark.parametrize("method", ["es", "pes"])
def test_perturbed_trainings_draw_the_numbers_of_the_unperturbed_one(method):
    # The state is a checksum of all random bits; one that differs makes the metric NaN, and no float acts on it otherwise.
    draw = lambda key: jax.random.bits(key).astype(jnp.int32)
    known = lambda h, state: {"loss": jnp.where(state == h["known"], 1.0, jnp.nan)}
    task = Task(lambda key, h: draw(key), lambda key, h, state: 31 * state + draw(key), known)

    @jax.jit
    def of(key):
        checksum = steps_from(task, key, {}, start(task, key, {}), 0, STEPS)
        floats, assemble = split_floats({"a": 1.0, "b": jnp.ones(3), "known": checksum})
        return Evolution(task, STEPS, method=method, truncation=TRUNCATION).estimate(key, floats, assemble)

    found = of(jax.random.key(0))
    assert found.metrics["loss"] == 1
    assert found.metrics["gauge/lost_pairs"] == 0
    assert found.metrics["gauge/standard_error"] == 0
    assert found.grad["a"] == 0
    assert (found.grad["b"] == 0).all()


def test_default_scales_are_relative():
    # A linear metric has the same relative error whatever the unit of the float is.
    linear = Task(lambda key, h: h["x"], lambda key, h, s: s, lambda h, s: {"loss": jnp.sum(h["x"] * jnp.array([3.0, 5.0]))})
    of = jax.jit(lambda x: Evolution(linear, 1)(jax.random.key(0), {"x": x})[1]["x"])
    ones = of(jnp.array([1.0, 1.0]))
    assert (ones != jnp.array([3.0, 5.0])).all()
    np.testing.assert_allclose(of(jnp.array([1e-4, -1e-4])), ones, rtol=1e-3)
    np.testing.assert_allclose(of(jnp.zeros(2)), ones, rtol=1e-3)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))


@pytest.fixture(scope="module")
def mlp():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 4)).astype(np.float32)
    y = np.argmax(x @ rng.normal(size=(4, 3)), axis=1).astype(np.int32)
    chain = lambda h: optax.chain(optax.add_decayed_weights(h["wd"]), optax.sgd(h["lr"], momentum=h["momentum"]))
    return jh.tasks.from_nnx(lambda h, rngs: Net(rngs), chain, (x[:64], y[:64]), (x[64:], y[64:]), batch_size=16)


HPARAMS = {"lr": 0.03, "momentum": 0.6, "wd": 0.02}


def test_agrees_with_the_exact_gradient_of_a_smooth_training(mlp):
    scale = {"momentum": 0.3, "wd": 1.0}
    evolution = jax.jit(Evolution(mlp, 20, num_pairs=256, pairs_at_once=128, sigma=0.02, log=("lr", "wd"), scale=scale))
    scaled = lambda grad: np.array(
        [grad[name] * HPARAMS[name] * scale.get(name, 1) for name in ("lr", "wd")] + [grad["momentum"] * 0.3]
    )
    for seed in range(2):
        key = jax.random.key(seed)
        loss, grad = evolution(key, HPARAMS)
        exact_loss, exact = jax.jit(Unrolled(mlp, 20))(key, HPARAMS)
        np.testing.assert_allclose(loss, exact_loss, rtol=1e-6)
        found, right = scaled(grad), scaled(exact)
        # tan^2 of the angle is chi^2(2) / 256: above 0.108, a cosine of 0.95, with probability 1e-6.
        assert found @ right / np.linalg.norm(found) / np.linalg.norm(right) > 0.95
        # The length has variance 2 / 256.
        np.testing.assert_allclose(np.linalg.norm(found), np.linalg.norm(right), rtol=Z * np.sqrt(2 / 256))


def test_gradient_of_an_accuracy_points_to_a_higher_one(mlp):
    keys = jax.random.split(jax.random.key(0), 64)
    evolution = Evolution(mlp, 20, "accuracy", num_pairs=8, sigma=0.3, log=("lr",), scale={"momentum": 0.1, "wd": 0.01})
    call = jax.jit(jax.vmap(evolution, in_axes=(0, None)))
    accuracy, grad = call(keys, HPARAMS | {"lr": 0.003})
    slope = np.asarray(grad["lr"]) * 0.003
    assert slope.mean() > Z * slope.std() / 8  # by log lr
    higher, _ = call(keys, HPARAMS | {"lr": 0.003 * np.exp(0.5)})
    assert higher.mean() > accuracy.mean()


def test_memory_does_not_grow_with_the_steps():
    walk = Task(lambda key, h: jnp.zeros(1000), lambda key, h, s: h["a"] - s, lambda h, s: {"loss": jnp.sum(s**2)})

    def temporary(steps):
        evolution = Evolution(walk, steps, method="pes", target="mean", truncation=5, num_pairs=2)
        return jax.jit(evolution).lower(jax.random.key(0), {"a": 0.1}).compile().memory_analysis().temp_size_in_bytes

    assert temporary(10_000) <= temporary(10) + 2 * 4 * 10_000 / 5  # the numbers of the windows, not their states


def test_mistakes_are_named(mlp):
    key = jax.random.key(0)
    for wrong, said in (
        ({"log": ("rate",)}, "log.*'rate'.*lr"),
        ({"scale": {"rate": 1.0}}, "scale.*'rate'"),
        ({"metric": "acc"}, "metric = 'acc'.*accuracy"),
        ({"method": "PES"}, "method = 'PES'"),
        ({"truncation": 0}, "truncation = 0"),
    ):
        with pytest.raises(JaxhpoError, match=said):
            Evolution(mlp, 3, **wrong)(key, HPARAMS)
    with pytest.raises(JaxhpoError, match="none of the hyperparameters is a float"):
        Evolution(mlp, 3)(key, {"lr": 1})
