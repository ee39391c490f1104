"""Implicit hypergradients: closed forms of ridge regression, agreement with Unrolled, solvers, gauges, refusals."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxhpo.core import problems_of
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import Implicit, Unrolled
from jaxhpo.hypergradients.estimate import is_estimator, split_floats
from jaxhpo.hypergradients.implicit import conjugate_gradient, neumann, nystrom, params_of
from jaxhpo.tasks import Task, from_nnx, training_loss
from jaxhpo.tasks.dropout import TracedDropout

KEY = jax.random.key(0)
N, D = 24, 5


def ridge_data():
    rng = np.random.default_rng(0)
    x, valid_x = rng.normal(size=(N, D)), rng.normal(size=(17, D))
    truth = rng.normal(size=D)
    return x, x @ truth + rng.normal(size=N), valid_x, valid_x @ truth + rng.normal(size=17)


X, Y, VALID_X, VALID_Y = ridge_data()
RIDGE = {"l2": np.log(0.1), "weights": np.linspace(0.2, 1.5, N), "name": "ridge"}


def ridge_loss(x, y, hparams, params, state):
    """Weighted squares and a penalty; the validation loss has a penalty of its own on ``l2``."""
    squares = jnp.mean(hparams["weights"] * (x @ params - y) ** 2)
    return 0.5 * squares + 0.5 * jnp.exp(hparams["l2"]) * params @ params


def ridge_task(damp=1.0):
    """One step goes to the minimum: a step of Newton's; ``damp`` of the way."""

    def step(x, y, key, hparams, state):
        loss = lambda params: ridge_loss(x, y, hparams, params, state)
        params = state["params"]
        move = jnp.linalg.solve(jax.hessian(loss)(params), jax.grad(loss)(params))
        return {"params": params - damp * move, "count": state["count"] + 1}

    def evaluate(x, y, hparams, state):
        loss = 0.5 * jnp.mean((x @ state["params"] - y) ** 2) + 0.1 * hparams["l2"] ** 2
        return {"loss": loss, "sum": jnp.sum(state["params"]), "positive": jnp.mean((state["params"] > 0) * 1.0)}

    init = lambda key, hparams: {"params": jnp.zeros(D), "count": jnp.zeros((), jnp.int32)}
    x, y, valid_x, valid_y = (jnp.asarray(a) for a in (X, Y, VALID_X, VALID_Y))
    task = Task(init, functools.partial(step, x, y), functools.partial(evaluate, valid_x, valid_y))
    return task, functools.partial(ridge_loss, x, y)


def ridge(solver="cg", damp=1.0, **settings):
    task, loss = ridge_task(damp)
    return Implicit(task, 1, train_loss=loss, solver=solver, **settings)


def ridge_hypergradient(damping=0.0, hparams=RIDGE):
    """In NumPy: the loss, its derivative by l2 and by the weights of the examples, and the largest curvature."""
    l2, weights = np.exp(hparams["l2"]), np.asarray(hparams["weights"])
    hessian = X.T @ (weights[:, None] * X) / N + l2 * np.eye(D)
    w = np.linalg.solve(hessian, X.T @ (weights * Y) / N)
    v = VALID_X.T @ (VALID_X @ w - VALID_Y) / len(VALID_Y)
    q = np.linalg.solve(hessian + damping * np.eye(D), v)
    loss = 0.5 * np.mean((VALID_X @ w - VALID_Y) ** 2) + 0.1 * hparams["l2"] ** 2
    return loss, 0.2 * hparams["l2"] - l2 * q @ w, -(X @ q) * (X @ w - Y) / N, np.linalg.eigvalsh(hessian)


@pytest.mark.parametrize(
    ("solver", "settings"),
    [("cg", {"num_iterations": D}), ("neumann", {"num_iterations": 400}), ("nystrom", {"rank": D + 3})],
)
def test_ridge_regression_has_the_hypergradient_of_its_closed_form(x64, solver, settings):
    step_size = 1.0 / ridge_hypergradient()[3][-1]
    call = jax.jit(lambda estimator: estimator(KEY, RIDGE))
    for damping in (0.0, 0.05):
        loss, by_l2, by_weights, _ = ridge_hypergradient(damping)
        found, grad = call(ridge(solver, damping=damping, step_size=step_size, **settings))
        np.testing.assert_allclose(found, loss, rtol=1e-10)
        np.testing.assert_allclose(grad["l2"], by_l2, rtol=1e-8)
        np.testing.assert_allclose(grad["weights"], by_weights, rtol=1e-8, atol=1e-10)
        assert grad["name"] is None


def test_gauges_are_the_residual_the_gradient_and_what_is_left_to_gain(x64):
    floats, assemble = split_floats(RIDGE)
    estimate = jax.jit(lambda estimator: estimator.estimate(KEY, floats, assemble).metrics)
    # The sum of the weights is linear and the training loss a parabola, so that the first order is exact.
    done, half = (estimate(ridge(damp=damp, metric="sum", num_iterations=8)) for damp in (1.0, 0.5))
    assert done["gauge/residual"] < 1e-12
    assert done["gauge/gradient_norm"] < 1e-12
    assert abs(done["gauge/unconverged"]) < 1e-12
    np.testing.assert_allclose(half["gauge/unconverged"], half["sum"] - done["sum"], rtol=1e-10)
    at_zero = X.T @ (np.asarray(RIDGE["weights"]) * Y) / N  # minus the gradient, half of which is left
    np.testing.assert_allclose(half["gauge/gradient_norm"], 0.5 * np.linalg.norm(at_zero), rtol=1e-10)
    # Two of five directions are not enough, and the gauge says so as it is defined.
    few = estimate(ridge(metric="sum", num_iterations=2, damping=0.2))
    hessian = X.T @ (np.asarray(RIDGE["weights"])[:, None] * X) / N + (0.1 + 0.2) * np.eye(D)
    q = conjugate_gradient(lambda u: jnp.asarray(hessian) @ u, jnp.ones(D) / np.sqrt(D), 2)
    np.testing.assert_allclose(few["gauge/residual"], np.linalg.norm(np.ones(D) / np.sqrt(D) - hessian @ q), rtol=1e-8)
    assert few["gauge/residual"] > 1e-3


@pytest.mark.parametrize("solver", ["cg", "nystrom"])
def test_lanes_side_by_side_are_lanes_one_by_one(x64, solver):
    estimator = ridge(solver, num_iterations=D, rank=3, damping=0.01)
    call = lambda key, l2: estimator(key, RIDGE | {"l2": l2})
    keys, l2 = jax.random.split(KEY, 3), jnp.log(jnp.asarray([0.01, 0.1, 1.0]))
    losses, grads = jax.jit(jax.vmap(call))(keys, l2)
    one = jax.jit(call)
    for i in range(3):
        loss, grad = one(keys[i], l2[i])
        np.testing.assert_allclose(losses[i], loss, rtol=1e-12)
        np.testing.assert_allclose(grads["l2"][i], grad["l2"], rtol=1e-9)
        np.testing.assert_allclose(grads["weights"][i], grad["weights"], rtol=1e-9, atol=1e-13)


class Softmax(nnx.Module):
    def __init__(self, hparams, rngs):
        self.out = nnx.Linear(3, 3, rngs=rngs, param_dtype=jnp.zeros(0).dtype)

    def __call__(self, x):
        return self.out(x)


def smoothed(hparams, logits, labels):
    """Cross entropy with smoothed labels and with a weight for each class."""
    targets = (1 - hparams["smoothing"]) * jax.nn.one_hot(labels, 3) + hparams["smoothing"] / 3
    return jnp.mean(hparams["class_weights"][labels] * optax.softmax_cross_entropy(logits, targets))


def softmax_task():
    rng = np.random.default_rng(1)
    labels, valid_labels = rng.integers(0, 3, 40), rng.integers(0, 3, 30)
    examples = lambda labels: rng.normal(size=(len(labels), 3)) + np.eye(3)[labels]
    train, valid = (examples(labels), labels), (examples(valid_labels), valid_labels)
    return from_nnx(Softmax, lambda hparams: optax.sgd(0.5, momentum=0.9), train, valid, loss=smoothed)


def test_softmax_regression_agrees_with_reverse_mode_through_the_training_and_with_differences(x64):
    task = softmax_task()
    hparams = {"smoothing": 0.2, "class_weights": jnp.asarray([0.5, 1.0, 1.5])}
    # The Hessian is singular: a number added to all logits changes nothing. No damping is needed.
    implicit, unrolled = Implicit(task, 400, num_iterations=12), Unrolled(task, 400)
    loss, grad = jax.jit(implicit)(KEY, hparams)
    exact_loss, exact = jax.jit(unrolled)(KEY, hparams)
    np.testing.assert_allclose(loss, exact_loss, rtol=1e-13)  # the same training from the same key
    np.testing.assert_allclose(grad["smoothing"], exact["smoothing"], rtol=1e-6)
    np.testing.assert_allclose(grad["class_weights"], exact["class_weights"], rtol=1e-6)

    @jax.jit
    def value(smoothing):
        state = jax.lax.fori_loop(
            0, 400, lambda i, state: task.step(KEY, hparams | {"smoothing": smoothing}, state), task.init(KEY, hparams)
        )
        return task.evaluate(hparams, state)["loss"]

    differences = (value(0.2 + 1e-5) - value(0.2 - 1e-5)) / 2e-5
    np.testing.assert_allclose(grad["smoothing"], differences, rtol=1e-5)


def spectrum(values, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values), len(values))))[0]
    return basis * np.asarray(values) @ basis.T


def test_conjugate_gradients_go_as_far_as_float32_does_and_stay_there():
    matrix = spectrum(np.geomspace(1e-2, 1.0, 30)).astype(np.float32)
    b = np.ones(30, np.float32) / np.sqrt(30).astype(np.float32)
    solve = jax.jit(conjugate_gradient, static_argnums=(0, 2))
    error = lambda k: np.linalg.norm(solve(lambda u: matrix @ u, b, k) / np.linalg.solve(matrix, b) - 1) / np.sqrt(30)
    assert error(60) < 2e-3  # and no NaN once rounding is all that is left of the residual
    assert error(4) > 10 * error(60)


def test_neumann_series_is_short_by_the_stated_factor(x64):
    matrix, b, step_size, terms = jnp.asarray(spectrum(np.linspace(0.1, 1.9, 6))), jnp.arange(1.0, 7.0), 0.8, 7
    exact = np.linalg.solve(matrix, b)
    short = np.eye(6) - np.linalg.matrix_power(np.eye(6) - step_size * np.asarray(matrix), terms)
    np.testing.assert_allclose(neumann(lambda u: matrix @ u, b, terms, step_size), short @ exact, rtol=1e-10)


def test_nystrom_is_woodburys_formula(x64):
    matrix, b, columns, damping = spectrum(np.linspace(0.0, 2.0, 8)), np.linspace(-1, 1, 8), np.array([6, 1, 3]), 0.3
    c, m = matrix[:, columns], matrix[np.ix_(columns, columns)]
    expected = b / damping - c @ np.linalg.solve(m + c.T @ c / damping, c.T @ b) / damping**2
    solve = jax.jit(lambda damping: nystrom(lambda u: jnp.asarray(matrix) @ u, jnp.asarray(b), jnp.asarray(columns), damping))
    found = solve(jnp.asarray(damping))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    # Without damping: the pseudo-inverse of H[:, K] H[K, K]^-1 H[:, K]^T.
    found = solve(jnp.asarray(0.0))
    np.testing.assert_allclose(found, np.linalg.pinv(c @ np.linalg.solve(m, c.T), rcond=1e-10) @ b, rtol=1e-9)


def test_negative_curvature_stops_a_lane_and_spares_its_neighbours():
    diagonals = jnp.asarray([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
    b = jnp.asarray([0.6, 0.64, 0.48])
    solvers = {
        "cg": lambda d: conjugate_gradient(lambda u: d * u, b, 50),
        "neumann": lambda d: neumann(lambda u: d * u, b, 200, jnp.asarray(0.3)),
        "nystrom": lambda d: nystrom(lambda u: d * u, b, jnp.arange(3), jnp.asarray(0.0)),
    }
    for name, solve in solvers.items():
        found = np.asarray(jax.jit(jax.vmap(solve))(diagonals))
        np.testing.assert_allclose(found[0], b / diagonals[0], rtol=1e-5, err_msg=name)
        assert np.isfinite(found).all(), name
        # What is found never makes the residual worse than nothing found.
        residuals = np.linalg.norm(b - diagonals[:3] * found[:3], axis=1)
        assert (residuals <= 1.0001).all(), (name, residuals)
        if name == "nystrom":
            np.testing.assert_allclose(found[1], [0.6, 0.0, 0.16], rtol=1e-5, atol=1e-6)
        if name != "neumann":  # a term of the series does not grow where the matrix is zero
            np.testing.assert_array_equal(found[2:], 0.0, err_msg=name)


def test_a_training_that_is_done_at_a_point_without_slope_gives_the_direct_derivative_alone(x64):
    task = Task(
        lambda key, hparams: {"params": jnp.zeros(3)},
        lambda key, hparams, state: state,
        lambda hparams, state: {"loss": jnp.sum(state["params"] ** 2) + hparams["l2"] ** 3},
    )
    estimator = Implicit(task, 1, train_loss=lambda hparams, params, state: hparams["l2"] * params @ params)
    floats, assemble = split_floats({"l2": 2.0})
    estimate = jax.jit(estimator.estimate, static_argnums=2)(KEY, floats, assemble)
    np.testing.assert_allclose(estimate.grad["l2"], 12.0)
    assert estimate.metrics["gauge/residual"] == 0.0


def tuned(optimizer, loss=smoothed):
    x, y = np.zeros((6, 3)), np.zeros(6, np.int32)
    return from_nnx(Softmax, optimizer, (x, y), (x, y), loss=loss)


ALL = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "smoothing": 0.1, "class_weights": jnp.ones(3)}


def test_hyperparameters_of_the_optimizer_are_refused_by_name():
    task = tuned(lambda h: optax.chain(optax.add_decayed_weights(h["weight_decay"]), optax.sgd(h["lr"], h["momentum"])))
    with pytest.raises(JaxhpoError, match=r"loss by lr, momentum, weight_decay: .* use Unrolled or Forward") as error:
        Implicit(task, 3)(KEY, ALL)
    assert "\n" not in str(error.value)
    # A decay that the chain adds to the gradient is the slope of a penalty: then it may be told as one.
    decayed = lambda base, hparams, params, state: (
        base(hparams, params, state) + 0.5 * hparams["weight_decay"] * sum(jnp.vdot(p, p) for p in jax.tree.leaves(params))
    )
    penalised = Implicit(task, 3, train_loss=functools.partial(decayed, training_loss(task)))
    with pytest.raises(JaxhpoError, match="loss by lr, momentum: "):
        penalised(KEY, ALL)
    data = jax.tree.leaves(task.step)
    shared = [x for x in jax.tree.leaves(penalised.train_loss) if any(x is other for other in data)]
    assert len(shared) == len(data) == 2  # the arrays of the task themselves


def test_a_metric_that_depends_on_a_hyperparameter_directly_needs_no_training_loss_that_does():
    task, loss = ridge_task()
    direct = Task(task.init, task.step, lambda hparams, state: {"loss": jnp.sum(state["params"]) + hparams["cost"] ** 2})
    floats, assemble = split_floats(RIDGE | {"cost": 3.0})
    Implicit(direct, 1, train_loss=loss).check(floats, assemble)
    grad = jax.jit(Implicit(direct, 1, train_loss=loss).estimate, static_argnums=2)(KEY, floats, assemble).grad
    np.testing.assert_allclose(grad["cost"], 6.0, rtol=1e-6)
    scaled = Task(lambda key, h: {"params": h["scale"] * jnp.ones(D), "count": 0}, task.step, task.evaluate)
    with pytest.raises(JaxhpoError, match="loss by scale: "):  # of the weights that training begins with
        Implicit(scaled, 1, train_loss=loss)(KEY, RIDGE | {"scale": 1.0})
    with pytest.raises(JaxhpoError, match="loss by other: "):
        Implicit(direct, 1, train_loss=loss)(KEY, RIDGE | {"cost": 3.0, "other": 1.0})


class Pair(NamedTuple):
    params: jax.Array
    rest: int


def test_other_mistakes_are_told_in_a_line():
    task, loss = ridge_task()
    with pytest.raises(JaxhpoError, match=r"train_loss = \(hparams, params, train_state\) -> scalar"):
        Implicit(task, 1)(KEY, RIDGE)
    with pytest.raises(JaxhpoError, match="metric = 'positive': its derivative by the weights is zero"):
        Implicit(task, 1, metric="positive", train_loss=loss)(KEY, RIDGE)
    with pytest.raises(JaxhpoError, match="metric = 'f1': the task reports loss, sum, positive"):
        Implicit(task, 1, metric="f1", train_loss=loss)(KEY, RIDGE)
    with pytest.raises(JaxhpoError, match="solver = 'lu': must be one of 'cg', 'neumann', 'nystrom'"):
        Implicit(task, 1, train_loss=loss, solver="lu")(KEY, RIDGE)
    assert [line.split(" = ")[0] for line in problems_of(Implicit(task, 0, train_loss=loss, solver="lu", damping=-1.0))] == [
        "num_steps", "solver", "damping"
    ]  # fmt: skip
    with pytest.raises(JaxhpoError, match="the training state is a dict of 'w', 'm', and Implicit does not see"):
        params_of({"w": 1, "m": 2})
    with pytest.raises(JaxhpoError, match="the training state is a tuple, and"):
        params_of((1, 2))
    params, put = params_of(Pair(jnp.ones(2), 3))
    assert put(params * 2).rest == 3
    assert is_estimator(ridge())


class Mixed(nnx.Module):
    """BatchNorm, and dropout where it is asked for."""

    def __init__(self, hparams, rngs):
        self.norm = nnx.BatchNorm(3, momentum=0.5, rngs=rngs)
        self.drop = TracedDropout(hparams["dropout"], rngs=rngs) if "dropout" in hparams else None
        self.out = nnx.Linear(3, 1, rngs=rngs)

    def __call__(self, x):
        x = self.norm(x)
        return self.out(x if self.drop is None else self.drop(x))[:, 0]


@pytest.mark.parametrize("dropout", [False, True])
def test_the_training_loss_is_that_of_training_mode_unless_numbers_are_drawn_in_it(dropout):
    hparams = {"dropout": 0.5} if dropout else {}
    train = X[:, :3].astype(np.float32), Y.astype(np.float32)
    task = from_nnx(Mixed, lambda hparams: optax.sgd(0.1), train, train, batch_size=8)
    state = task.init(KEY, hparams)
    found = training_loss(task)(hparams, state.params, state)
    x = train[0]
    mean, var = (state.variables["norm"][name] for name in ("mean", "var")) if dropout else (x.mean(0), x.var(0))
    normal = (x - mean) / np.sqrt(var + 1e-5) * state.params["norm"]["scale"] + state.params["norm"]["bias"]
    predictions = (normal @ state.params["out"]["kernel"] + state.params["out"]["bias"])[:, 0]
    np.testing.assert_allclose(found, np.mean((predictions - train[1]) ** 2), rtol=1e-5)
    assert training_loss(ridge_task()[0]) is None
