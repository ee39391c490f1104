"""Reverse mode through training, whole and truncated: closed forms, differences, and what it refuses."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trainings import ADAM, SGD, adam, central_differences, flax_task, jitted, relative_error, sgd, task

import jaxhpo as jh
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import Forward, Truncated, Unrolled, memory
from jaxhpo.hypergradients.estimate import split_floats

STEPS = 43  # no product: segments end with a shorter one
EXACT = 1e-6


@pytest.mark.parametrize(("optimizer", "hparams"), [(sgd, SGD), (adam, ADAM)], ids=["sgd", "adam"])
def test_equals_central_differences(x64, optimizer, hparams):
    value_and_grad = jitted(Unrolled(task(optimizer), STEPS))
    grad = value_and_grad(hparams)[1]
    expected = central_differences(lambda h: value_and_grad(h)[0], hparams)
    assert relative_error(grad, expected) < EXACT


def test_what_is_stored_changes_nothing(x64):
    """Everything stored, one and two levels of segments, truncated after all steps, and forward mode: the same number."""
    one = task(adam)
    reference = jitted(Unrolled(one, STEPS, segments=()))(ADAM)
    others = [Unrolled(one, STEPS, segments=s) for s in ((7,), (15, 4))]
    others += [Truncated(one, STEPS, 500, segments=(9,)), Forward(one, STEPS)]
    for other in others:
        loss, grad = jitted(other)(ADAM)
        assert abs(loss - reference[0]) < 1e-12
        assert relative_error(grad, reference[1]) < 1e-9, other


def test_the_loss_is_that_of_the_training(x64):
    """The same key trains the same network with and without derivatives."""
    one = task(sgd)
    study = jh.pure_study(jh.Training(one, STEPS), {"lr": jh.Float(0.05, 0.2), "momentum": 0.8}, jh.RandomSearch(3), 3)
    with_gradient = jh.pure_study(Unrolled(one, STEPS), {"lr": jh.Float(0.05, 0.2), "momentum": 0.8}, jh.RandomSearch(3), 3)
    plain, differentiated = jax.jit(study)(jax.random.key(3)), jax.jit(with_gradient)(jax.random.key(3))
    done = np.asarray(plain.trials.done)
    np.testing.assert_allclose(plain.trials.loss[done], differentiated.trials.loss[0], rtol=1e-5)


def quadratic(curvature):
    """Gradient descent on ``sum(c x^2) / 2`` from ones; the metric is ``sum(x^2) / 2``: all in closed form."""
    curvature = jnp.asarray(curvature)
    return jh.Task(
        init=lambda key, h: jnp.ones_like(curvature),
        step=lambda key, h, x: x - h["lr"] * curvature * x,
        evaluate=lambda h, x: {"loss": 0.5 * jnp.sum(x**2)},
    )


def test_quadratic_closed_form(x64):
    """x_T = (1 - a c)^T: d loss / d a = - sum T c (1 - a c)^(2T - 1)."""
    curvature, rate, steps = np.array([0.1, 1.0, 3.0]), 0.2, 30
    expected = -np.sum(steps * curvature * (1 - rate * curvature) ** (2 * steps - 1))
    for estimator in (Unrolled(quadratic(curvature), steps), Forward(quadratic(curvature), steps)):
        loss, grad = jitted(estimator)({"lr": rate})
        np.testing.assert_allclose(loss, 0.5 * np.sum((1 - rate * curvature) ** (2 * steps)), rtol=1e-12)
        np.testing.assert_allclose(grad["lr"], expected, rtol=1e-12)


def test_ridge_closed_form(x64):
    """Gradient descent to convergence on ridge regression: w = (X'X + n p)^-1 X'y, and its derivative by the penalty."""
    rng = np.random.default_rng(0)
    x, y, xv, yv = rng.normal(size=(40, 4)), rng.normal(size=40), rng.normal(size=(30, 4)), rng.normal(size=30)
    train = lambda h, w: jnp.mean((x @ w - y) ** 2) / 2 + h["penalty"] * jnp.sum(w**2) / 2
    one = jh.Task(
        init=lambda key, h: jnp.zeros(4),
        step=lambda key, h, w: w - 0.5 * jax.grad(train, argnums=1)(h, w),
        evaluate=lambda h, w: {"loss": jnp.mean((xv @ w - yv) ** 2) / 2},
    )
    penalty = 0.3
    hessian = x.T @ x / 40 + penalty * np.eye(4)
    w = np.linalg.solve(hessian, x.T @ y / 40)
    expected = -(xv.T @ (xv @ w - yv) / 30) @ np.linalg.solve(hessian, w)
    for estimator in (Unrolled(one, 150), Forward(one, 150), Truncated(one, 150, 80)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grad = jitted(estimator)({"penalty": penalty})[1]
        np.testing.assert_allclose(grad["penalty"], expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [{"batch_norm": True}, {"rate": 0.3}], ids=["batch norm", "dropout"])
def test_networks_with_state_and_noise(x64, kind):
    """Batch statistics stay in float32 under float64 in Flax, hence the bound; recomputing changes nothing."""
    one = flax_task(sgd, **kind)
    stored, recomputed = (jitted(Unrolled(one, 24, segments=s)) for s in ((), (5,)))
    grad = recomputed(SGD)[1]
    assert relative_error(grad, stored(SGD)[1]) < 1e-9
    expected = central_differences(lambda h: stored(h)[0], SGD, step=1e-3 if "batch_norm" in kind else 1e-5)
    assert relative_error(grad, expected) < (1e-3 if "batch_norm" in kind else EXACT)


@pytest.mark.parametrize(
    "kind", [pytest.param({"batch_norm": True}, marks=pytest.mark.slow), {"rate": 0.3}], ids=["batch norm", "dropout"]
)
def test_mixed_mode_is_the_same_number(x64, kind):
    """A smoothing of the labels puts a hyperparameter into the training loss, too."""
    loss = lambda h, logits, labels: jh.tasks.metrics.cross_entropy(logits, labels, h["smoothing"])
    one, hparams = flax_task(sgd, loss=loss, **kind), {**SGD, "smoothing": 0.1}
    plain, mixed = (jitted(Unrolled(one, 24, segments=(5,), mixed_mode=m))(hparams)[1] for m in (False, True))
    assert relative_error(mixed, plain) < (1e-5 if "batch_norm" in kind else 1e-9)


def test_truncation_gives_a_learning_rate_the_wrong_sign(x64):
    """On a quadratic with slow directions: from a rate that is too small more is better, but the last steps alone, which
    are noisy, say the opposite."""
    curvature = jnp.asarray([1.0, 0.02])

    def step(key, h, x):
        return x - h["lr"] * curvature * (x + 3.0 * jax.random.normal(key, x.shape))

    one = jh.Task(lambda key, h: jnp.asarray([1.0, 30.0]), step, lambda h, x: {"loss": 0.5 * jnp.sum(curvature * x**2)})
    mean = lambda e: jax.jit(lambda keys: jax.vmap(lambda key: e(key, {"lr": 0.3})[1]["lr"])(keys).mean())
    keys = jax.random.split(jax.random.key(0), 200)
    whole = mean(Unrolled(one, 100))(keys)
    with pytest.warns(UserWarning, match="Truncated: if any of lr acts through the optimizer"):
        last = mean(Truncated(one, 100, 3))(keys)
    assert whole < 0 < last


def test_truncation_warns_of_the_optimizer_alone():
    """Label smoothing is in the training loss, the learning rate is not."""
    loss = lambda h, logits, labels: jh.tasks.metrics.cross_entropy(logits, labels, h["smoothing"])
    one = flax_task(lambda h: optax.sgd(h["lr"]), dtype=np.float32, loss=loss)
    with pytest.warns(UserWarning, match="Truncated: lr act"):
        Truncated(one, 20, 5).check(*split_floats({"lr": 0.1, "smoothing": 0.1}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Truncated(flax_task(lambda h: optax.sgd(0.1), loss=loss, dtype=np.float32), 20, 5).check(
            *split_floats({"smoothing": 0.1})
        )
        Truncated(one, 20, 20).check(*split_floats({"lr": 0.1, "smoothing": 0.1}))


@pytest.mark.parametrize("estimator", [Unrolled, Forward])
def test_derivatives_that_are_zero_by_structure_are_refused_by_name(estimator):
    lion = task(lambda h: optax.lion(h["lr"], b1=h["b1"], b2=h["b2"]), dtype=np.float32)
    with pytest.raises(JaxhpoError, match="the derivative of loss by b1, b2 is zero"):
        estimator(lion, 10)(jax.random.key(0), {"lr": 1e-3, "b1": 0.9, "b2": 0.99})
    with pytest.raises(JaxhpoError, match="by unused is zero"):
        estimator(task(sgd, dtype=np.float32), 10)(jax.random.key(0), {**SGD, "unused": 1.0})
    with pytest.raises(JaxhpoError, match="by lr, momentum is zero"):
        estimator(task(sgd, dtype=np.float32), 10, metric="accuracy")(jax.random.key(0), SGD)
    with pytest.raises(JaxhpoError, match="metric = 'nothing': the task reports loss, accuracy, error"):
        estimator(task(sgd, dtype=np.float32), 10, metric="nothing")(jax.random.key(0), SGD)
    with pytest.raises(JaxhpoError, match="none of the hyperparameters is a float"):
        estimator(task(sgd, dtype=np.float32), 10)(jax.random.key(0), {"lr": 1, "momentum": 0})


def test_integers_and_labels_have_no_gradient_and_do_not_disturb(x64):
    one = task(lambda h: optax.sgd(h["lr"], momentum=h["momentum"], nesterov=h["nesterov"] == "yes"))
    _, grad = jax.jit(lambda lr: Unrolled(one, 10)(jax.random.key(0), {"lr": lr, "momentum": 0.5, "nesterov": "yes"}))(0.1)
    assert grad["nesterov"] is None
    assert jnp.isfinite(grad["lr"])


def test_array_shaped_hyperparameters(x64):
    """A rate for each step: the sum of its derivatives is that by a common rate; forward mode shares stretches."""
    steps = 12

    def step(key, h, x):
        t, x = x
        return t + 1, x - h["lr"][t] * jnp.asarray([0.5, 2.0]) * x

    one = jh.Task(lambda key, h: (jnp.zeros((), jnp.int32), jnp.ones(2)), step, lambda h, x: {"loss": jnp.sum(x[1] ** 2)})
    rates = {"lr": jnp.linspace(0.1, 0.4, steps)}
    grad = jitted(Unrolled(one, steps))(rates)[1]["lr"]
    np.testing.assert_allclose(jitted(Forward(one, steps))(rates)[1]["lr"], grad, rtol=1e-10)
    shared = jitted(Forward(one, steps, stretch=5))(rates)[1]["lr"]
    expected = np.concatenate([np.full(len(part), part.mean()) for part in np.split(np.asarray(grad), [5, 10])])
    np.testing.assert_allclose(shared, expected, rtol=1e-10)
    by_common = jitted(Forward(one, steps, stretch=steps))(rates)[1]["lr"]
    np.testing.assert_allclose(by_common.sum(), grad.sum(), rtol=1e-10)
    with pytest.raises(JaxhpoError, match="lr need 300 tangents, at most 256"):
        Forward(one, 300)(jax.random.key(0), {"lr": jnp.ones(300)})


def test_lanes_under_vmap_equal_single_calls(x64):
    rates = jnp.asarray([0.02, 0.1, 0.3])
    for estimator in (Unrolled(task(sgd), 20, segments=(6,)), Forward(task(sgd), 20)):
        one = lambda lr, e=estimator: e(jax.random.key(1), {"lr": lr, "momentum": 0.8})
        together = jax.jit(jax.vmap(one))(rates)
        for i, rate in enumerate(rates):
            alone = jax.jit(one)(rate)
            jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-9), together, alone)


def test_the_gauge_tells_chaos_from_order(x64):
    """A logistic map x -> r x (1 - x): beyond r = 3.57 it is chaotic with an exponent of up to ln 2 a step."""
    one = jh.Task(
        init=lambda key, h: jnp.asarray(0.4),
        step=lambda key, h, x: h["r"] * x * (1 - x),
        evaluate=lambda h, x: {"loss": x},
    )
    for estimator in (Unrolled(one, 100), Forward(one, 100)):
        growth = jax.jit(lambda r, e=estimator: e.estimate(jax.random.key(0), {"r": r}, dict).metrics["gauge/growth"])
        assert growth(2.9) < 1
        assert growth(3.99) > 10


def test_a_gradient_beyond_float32_is_not_hidden():
    """The loss is ordinary, its derivative is not: the estimator returns it as infinite or NaN, never a number made up."""
    one = jh.Task(
        init=lambda key, h: jnp.asarray(0.4),
        step=lambda key, h, x: h["r"] * x * (1 - x),
        evaluate=lambda h, x: {"loss": x},
    )
    loss, grad = jitted(Unrolled(one, 1000))({"r": jnp.float32(3.99)})
    assert 0 < loss < 1
    assert not jnp.isfinite(grad["r"])


def test_memory_is_foretold():
    """XLA's own count of temporary buffers lies near the prediction, and grows no faster than the root of the steps."""
    one = task(adam, dtype=np.float32)
    floats, assemble = split_floats(ADAM)
    used = {}
    for steps in (64, 1024):
        segments = (int(np.sqrt(steps)),)
        estimator = Unrolled(one, steps, segments=segments)
        plan = estimator.memory_plan(floats, assemble)
        compiled = jax.jit(lambda f, e=estimator: e.estimate(jax.random.key(0), f, assemble).grad).lower(floats).compile()
        used[steps] = compiled.memory_analysis().temp_size_in_bytes
        assert 0.5 < plan.predicted_bytes / used[steps] < 2
    assert used[1024] < 4.5 * used[64]


def test_activations_of_the_shape_of_the_data_are_foretold_too():
    """A full batch of 400 through layers as wide as the inputs: the residuals are activations, the state is small."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(400, 16)), jnp.float32)

    def loss(x, params):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - 0.5) ** 2)

    one = jh.Task(
        init=lambda key, h: list(0.3 * jax.random.normal(key, (3, 16, 16))),
        step=jax.tree_util.Partial(
            lambda x, key, h, w: jax.tree.map(lambda w, g: w - h["lr"] * g, w, jax.grad(loss, argnums=1)(x, w)), x
        ),
        evaluate=jax.tree_util.Partial(lambda x, h, w: {"loss": loss(x, w)}, x),
    )
    estimator = Unrolled(one, 40, segments=())
    floats, assemble = split_floats({"lr": jnp.float32(0.1)})
    predicted = estimator.memory_plan(floats, assemble).predicted_bytes
    compiled = jax.jit(lambda e, f: e.estimate(jax.random.key(0), f, assemble).grad).lower(estimator, floats).compile()
    assert 0.5 < predicted / compiled.memory_analysis().temp_size_in_bytes < 2


def test_growth_where_a_hyperparameter_acts_late_or_not_at_all(x64):
    """A norm of zero is no growth: of a tangent before its hyperparameter acts, of an adjoint where nothing is passed on."""

    def task_of(use):
        return jh.Task(
            lambda key, h: (jnp.zeros((), jnp.int32), jnp.ones(3)), use, lambda h, x: {"loss": jnp.sum(x[1]) * h["a"]}
        )

    late = task_of(lambda key, h, x: (x[0] + 1, 0.9 * x[1] + jnp.where(x[0] > 20, h["a"], 0.0)))
    never = task_of(lambda key, h, x: (x[0] + 1, 0.9 * x[1]))
    reset = task_of(lambda key, h, x: (x[0] + 1, 0.9 * jnp.where(x[0] == 30, h["a"], x[1])))
    for one in (late, never, reset):
        for estimator in (Forward(one, 40), Unrolled(one, 40)):
            growth = jax.jit(lambda a, e=estimator: e.estimate(jax.random.key(0), {"a": a}, dict).metrics["gauge/growth"])(0.3)
            assert 0 <= growth < 2


def test_two_hyperparameters_of_one_name_are_refused():
    with pytest.raises(JaxhpoError, match=r"two hyperparameters are called 'a\.b'"):
        Unrolled(task(sgd), 5)(jax.random.key(0), {"a.b": 0.1, "a": {"b": 0.3}})


def test_plans():
    mib = 2**20
    assert memory.plan_memory(500, mib // 100, mib // 100, 64 * mib).segments == ()
    two = memory.plan_memory(500, mib, 2 * mib, 128 * mib)
    assert two.segments == (16,)  # sqrt(500 * 1 / 2)
    assert two.predicted_bytes == (32 + 16 * 2 + 6) * mib
    deeper = memory.plan_memory(500, mib, 2 * mib, 60 * mib)
    assert len(deeper.segments) == 2
    assert deeper.predicted_bytes <= 60 * mib
    with pytest.raises(JaxhpoError, match=r"budget_mib = 8: .* needs at least \d+ MiB a lane"):
        memory.plan_memory(500, mib, 2 * mib, 8 * mib)
    assert memory.plan_memory(500, mib, mib, 8 * mib, segments=(20,)).segments == (20,)
