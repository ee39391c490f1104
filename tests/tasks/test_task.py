"""Task, Training, HostFunction: pytrees, checks, clear refusals."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxhpo.tasks import HostFunction, Task, Training, check_task


def init(key, hparams):
    return {"w": jnp.zeros(3), "count": jnp.zeros((), jnp.int32)}


def step(target, key, hparams, state):
    w = state["w"] - hparams["rate"] * (state["w"] - target)
    return {"w": w, "count": state["count"] + 1}


def evaluate(target, hparams, state):
    return {"loss": jnp.sum((state["w"] - target) ** 2)}


def make(target):
    return Task(init, Partial(step, target), Partial(evaluate, target))


def run(task, rate, num_steps):
    hparams = {"rate": rate}
    state = task.init(None, hparams)
    state = jax.lax.fori_loop(0, num_steps, lambda i, state: task.step(None, hparams, state), state)
    return task.evaluate(hparams, state)["loss"]


def test_task_is_a_pytree_whose_leaves_are_the_data():
    target = jnp.array([1.0, 2.0, 2.0])
    task = make(target)
    leaves, treedef = jax.tree.flatten(task)
    assert [leaf is target for leaf in leaves] == [True, True]
    assert jax.tree.structure(make(2 * target)) == treedef
    # |target|^2 (1 - rate)^(2 n)
    traced = jax.jit(run, static_argnums=2)
    np.testing.assert_allclose(traced(task, 0.5, 2), 9 * 0.5**4, rtol=1e-6)
    np.testing.assert_allclose(traced(make(2 * target), 0.5, 2), 36 * 0.5**4, rtol=1e-6)
    assert traced._cache_size() == 1


def test_unflattening_neither_wraps_nor_checks():
    training = Training(make(np.ones(3)), 12, steps_per_round=4)
    axes = jax.tree.map(lambda leaf: None, training)
    assert axes.task.step.args == (None,)
    assert jax.tree.unflatten(jax.tree.structure(training), ["a", "b"]).task.evaluate.args == ("b",)
    assert (axes.num_steps, axes.round_steps) == (12, 4)
    batched = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), training.task)
    np.testing.assert_allclose(jax.vmap(run, (0, None, None))(batched, 0.5, 1), [0.75, 3.0])


def test_arrays_bound_by_functools_partial_become_leaves():
    target = np.array([1.0, 2.0, 2.0], np.float32)
    task = Task(init, functools.partial(step, target), functools.partial(evaluate, target))
    assert [leaf is target for leaf in jax.tree.leaves(task)] == [True, True]
    np.testing.assert_allclose(jax.jit(run, static_argnums=2)(task, 0.5, 2), 9 * 0.5**4, rtol=1e-6)


def test_refusals_of_task_and_training():
    with pytest.raises(TypeError, match="step must be a function, not 3"):
        Task(init, 3, evaluate)
    task = make(np.ones(3))
    with pytest.raises(ValueError, match="steps_per_round = 7: must divide num_steps = 300"):
        Training(task, 300, 7)
    for bad in (0, -1, 2.5, True, "9"):
        with pytest.raises(ValueError, match=r"num_steps = .*whole number of at least 1"):
            Training(task, bad)
    with pytest.raises(TypeError, match="must be a Task"):
        Training(init, 3)


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, 1), (4, 4), (5, 1), (10, 1), (12, 1), (101, 101), (300, 30), (350, 35), (64, 8), (500, 50)]
)
def test_default_round(num_steps, expected):
    assert Training(make(np.ones(3)), num_steps).round_steps == expected


def test_check_task_names_the_leaf_that_changes():
    hparams = {"rate": jax.ShapeDtypeStruct((), jnp.float32)}
    task = make(np.ones(3, np.float32))
    assert check_task(task, hparams) == {"loss": jax.ShapeDtypeStruct((), jnp.float32)}
    other = Task(init, lambda key, hparams, state: {**state, "count": state["count"] + 0.5}, task.evaluate)
    with pytest.raises(TypeError, match=r"leaf \['count'\] .*int32\[\], as made by init, to float32\[\]"):
        check_task(other, hparams)
    with pytest.raises(TypeError, match="built as that of init"):
        check_task(Task(init, lambda key, hparams, state: state["w"], task.evaluate), hparams)
    with pytest.raises(TypeError, match="evaluate must return a dict of scalars"):
        check_task(Task(init, task.step, lambda hparams, state: {"w": state["w"]}), hparams)
    with pytest.raises(TypeError, match="test must return a dict of scalars"):
        check_task(Task(init, task.step, task.evaluate, lambda hparams, state: 1.0), hparams)


def on_host(hparams, seed):
    return {"loss": hparams["x"] + seed, "time": jnp.float32(2)}


def test_host_function_passes_a_seed_only_where_asked():
    assert HostFunction(on_host)({"x": 1.5}, 7) == {"loss": 8.5, "time": 2.0}
    assert HostFunction(lambda hparams: hparams["x"])({"x": 1.5}, 7) == {"loss": 1.5}
    assert HostFunction(max)([1.0, 3.0], 7) == {"loss": 3.0}  # a builtin without a signature
    with pytest.raises(TypeError, match="returned None; a number, or a dict of numbers by name, is due"):
        HostFunction(lambda hparams: None)({}, 7)
    assert pickle.loads(pickle.dumps(HostFunction(on_host, retries=2))) == HostFunction(on_host, retries=2)
    assert jax.tree.leaves(function := HostFunction(on_host)) == [function]


def test_host_function_refuses_nonsense():
    for settings in ({"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}, {"processes": 1.5}):
        (name,) = settings
        with pytest.raises(ValueError, match=f"{name} = "):
            HostFunction(on_host, **settings)
    with pytest.raises(TypeError, match="fn must be a function"):
        HostFunction(0.3)
