"""from_steps and from_nnx_steps: loops written by hand train as from_linen and from_nnx do, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState

import jaxhpo as jh
from jaxhpo.errors import JaxhpoError
from jaxhpo.tasks import check_task, from_linen, from_nnx, from_nnx_steps, from_steps, training_loss
from jaxhpo.tasks.dropout import TracedDropout, dropout

FEATURES, CLASSES, BATCH = 4, 3, 16


def data(seed, size):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size).astype(np.int32)
    return (rng.normal(size=(size, FEATURES)) + 2 * np.eye(CLASSES, FEATURES)[labels]).astype(np.float32), labels


TRAIN, VALID, TEST = data(0, 90), data(1, 50), data(2, 60)
HPARAMS = {"rate": jnp.float32(0.05), "dropout": jnp.float32(0.3)}


def adam(hparams):
    return optax.adam(hparams["rate"])


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class NnxNet(nnx.Module):
    def __init__(self, hparams, rngs):
        self.norm = nnx.BatchNorm(FEATURES, momentum=0.9, rngs=rngs)
        self.hidden = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.drop = TracedDropout(hparams["dropout"], rngs=rngs)
        self.out = nnx.Linear(8, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(nnx.relu(self.hidden(self.norm(x)))))


def nnx_loss(model, batch):
    logits = model(batch[0])
    return cross_entropy(logits, batch[1]), logits


def nnx_create(hparams, rngs):
    model = NnxNet(hparams, rngs)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())
    return model, nnx.Optimizer(model, adam(hparams), wrt=nnx.Param), metrics


@nnx.jit
def nnx_train(model, optimizer, metrics, batch):
    (loss, logits), grads = nnx.value_and_grad(nnx_loss, has_aux=True)(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch[1])
    optimizer.update(model, grads)


@nnx.jit
def nnx_eval(model, metrics, batch):
    loss, logits = nnx_loss(model, batch)
    # An average over examples, as that of the accuracies: batches may differ in size.
    metrics.update(loss=jnp.broadcast_to(loss, batch[1].shape), logits=logits, labels=batch[1])


class LinenNet(linen.Module):
    rate: jax.Array  # traced: a jit below the study's would have to hash it

    @linen.compact
    def __call__(self, x, train):
        x = linen.relu(linen.Dense(8, name="hidden")(x))
        x = dropout(self.make_rng("dropout"), self.rate, x) if train else x
        return linen.Dense(CLASSES, name="out")(x)


class State(TrainState):
    key: jax.Array  # carried from step to step, as loops do that draw from it


def linen_create(hparams, key):
    model = LinenNet(hparams["dropout"])
    params = model.init({"params": jax.random.fold_in(key, 0)}, jnp.zeros((1, FEATURES)), train=False)["params"]
    return State.create(apply_fn=model.apply, params=params, tx=adam(hparams), key=key)


@jax.jit
def linen_train(state, batch, key):
    def loss_fn(params):
        rngs = {"dropout": jax.random.fold_in(key, 1)}  # from_linen's name for its first random stream
        return cross_entropy(state.apply_fn({"params": params}, batch[0], train=True, rngs=rngs), batch[1])

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


@jax.jit
def linen_eval(state, batch):
    logits = state.apply_fn({"params": state.params}, batch[0], train=False)
    return {"loss": cross_entropy(logits, batch[1]), "accuracy": (logits.argmax(-1) == batch[1]).mean()}


def by_hand(kind, **settings):
    if kind == "nnx":
        return from_nnx_steps(nnx_create, nnx_train, nnx_eval, TRAIN, VALID, TEST, **settings)
    return from_steps(linen_create, linen_train, linen_eval, TRAIN, VALID, TEST, **settings)


def ready_made(kind, **settings):
    if kind == "nnx":
        return from_nnx(NnxNet, adam, TRAIN, VALID, TEST, **settings)
    return from_linen(lambda hparams: LinenNet(hparams["dropout"]), adam, TRAIN, VALID, TEST, **settings)


def trained(task, hparams, num_steps=8):
    state = task.init(jax.random.key(3), hparams)
    return jax.lax.fori_loop(0, num_steps, lambda i, s: task.step(jax.random.key(i), hparams, s), state)


def numbers(tree):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_loop_by_hand_trains_and_evaluates_as_the_ready_made_task_also_in_batches(kind):
    whole, known = by_hand(kind, batch_size=BATCH), ready_made(kind, batch_size=BATCH)
    # Of 50 examples six batches of 8 and one of 2; a MultiMetric wants equal ones.
    parts = by_hand(kind, batch_size=BATCH, eval_batch_size=10 if kind == "nnx" else 8)

    @jax.jit  # one program, for compiling takes most of the time
    def all_of_it(whole, known, parts, hparams):
        state, other = trained(whole, hparams), trained(known, hparams)
        return state, other, known.evaluate(hparams, other), [task.evaluate(hparams, state) for task in (whole, parts)]

    state, other, expected, found_metrics = all_of_it(whole, known, parts, HPARAMS)
    if kind == "nnx":
        net = state.values[0]
        moments = {name: net["norm"].pop(name) for name in ("mean", "var")}
        found = numbers({"params": net, "variables": {"norm": moments}})
    else:
        renamed = {name.replace(".params", "['params']"): value for name, value in state.values.items()}
        found = {name: np.asarray(value) for name, value in renamed.items() if name.startswith("['params']")}
    weights = numbers({"params": other.params, "variables": other.variables})
    for name, value in weights.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert len(weights) == {"nnx": 8, "linen": 4}[kind]
    for metrics in found_metrics:
        assert metrics.keys() == {"loss", "accuracy"}
        for name, value in metrics.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-4)
    assert expected["accuracy"] > 0.5  # of three classes: it learns


def test_steps_may_ask_for_the_hyperparameters_and_arrays_may_be_the_whole_batch():
    x = jnp.arange(6.0)
    task = from_steps(
        lambda hparams, key: {"sum": 0},  # a number of Python's becomes an array of one type throughout
        lambda state, batch, hparams: {"sum": state["sum"] + (hparams["scale"] * batch.sum()).astype(int)},
        lambda state, batch, *, hparams: {"loss": (hparams["scale"] * batch).mean(), "sum": state["sum"]},
        x,
        x[:4],
        x[:3],
        eval_batch_size=3,
    )
    hparams = {"scale": jnp.float32(2.0)}
    state = task.step(jax.random.key(1), hparams, task.init(jax.random.key(0), hparams))
    assert state.values["['sum']"] == 30
    assert task.evaluate(hparams, state) == {"loss": 3.0, "sum": 30.0}
    assert task.test(hparams, state) == {"loss": 2.0, "sum": 30.0}


def test_a_multi_metric_wants_batches_of_one_size():
    task = by_hand("nnx", batch_size=BATCH, eval_batch_size=8)
    with pytest.raises(JaxhpoError, match=r"eval_batch_size = 8: must divide the 50 examples, .*; 5 does"):
        jax.eval_shape(lambda: task.evaluate(HPARAMS, task.init(jax.random.key(0), HPARAMS)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_study_of_a_loop_by_hand_finds_what_learns(kind):
    space = {"rate": jh.Float(1e-5, 0.1, log=True), "dropout": jh.Float(0.0, 0.2)}
    training = jh.Training(by_hand(kind, batch_size=BATCH), 60)
    result = jh.minimize(training, space, jh.SobolSearch(num_lanes=4), key=1, num_trials=4, shard_width=4)
    rates, losses = result.trials["hparams.rate"], result.trials["loss"]
    assert result.best.loss == losses[rates.argmax()] < 0.6 < 0.9 < losses[rates.argmin()]


def test_only_ready_made_tasks_have_a_loss_of_training():
    assert training_loss(by_hand("nnx")) is None
    assert training_loss(ready_made("nnx")) is not None


MISTAKES = {
    r"train_step\(s\) is called as train_step\(state, batch\): too many": {"train_step": lambda s: s},
    r"missing a required argument: 'c'; bind it by functools.partial": {"train_step": lambda a, b, c, d: a},
    r"train_step must return the state.*it returned a dict": {"train_step": lambda s, b: s.params},
    r"eval_step must return a dict of scalars.*not a float": {"eval_step": lambda s, b: 1.0},
    r"eval_step must return a dict of scalars.*not \{'loss': \(50,": {"eval_step": lambda s, b: {"loss": b[1]}},
    r"create: the state's \['a'\] is a str: an array is due": {"create": lambda h, k: {"a": "x"}},
}
NNX_MISTAKES = {
    r"is called as train_step\(NnxNet, Optimizer, MultiMetric, batch\)": {"train_step": lambda m, o, b: None},
    r"create must return a tuple of the modules .* not NnxNet": {"create": NnxNet},
    r"create must return a tuple of the modules .* not \['list'": {"create": lambda h, r: ([NnxNet(h, r)],)},
    r"eval_step must return a dict of scalars.*not a NoneType": {
        "create": lambda h, r: nnx_create(h, r)[:2],
        "train_step": lambda m, o, b: None,
        "eval_step": lambda m, b: None,
    },
}


@pytest.mark.parametrize(("message", "wrong"), [*MISTAKES.items(), *NNX_MISTAKES.items()])
def test_what_does_not_fit_is_one_line(message, wrong):
    if message in MISTAKES:
        parts = {"create": linen_create, "train_step": linen_train, "eval_step": linen_eval, **wrong}
        task = from_steps(**parts, train_data=TRAIN, valid_data=VALID)
    else:
        parts = {"create": nnx_create, "train_step": nnx_train, "eval_step": nnx_eval, **wrong}
        task = from_nnx_steps(**parts, train_data=TRAIN, valid_data=VALID)
    with pytest.raises(JaxhpoError, match=message) as error:
        check_task(task, HPARAMS)
    assert "\n" not in str(error.value)


def test_data_and_sizes_are_checked_at_once():
    make = functools.partial(from_steps, linen_create, linen_train, linen_eval)
    with pytest.raises(ValueError, match=r"train_data\[1\] is an array of shape \[3\]: one \[90, ...\] as the first is due"):
        make((TRAIN[0], TRAIN[1][:3]), VALID)
    with pytest.raises(ValueError, match=r"valid_data\['x'\] is an array of shape \[\]: one \[N, ...\] is due"):
        make(TRAIN, {"x": 1.0})
    with pytest.raises(ValueError, match="test_data holds no array"):
        make(TRAIN, VALID, ())
    with pytest.raises(ValueError, match="batch_size = 91: there are only 90 training examples"):
        make(TRAIN, VALID, batch_size=91)
    with pytest.raises(ValueError, match="eval_batch_size = 0"):
        make(TRAIN, VALID, eval_batch_size=0)
    with pytest.raises(TypeError, match="eval_step must be a function"):
        from_steps(linen_create, linen_train, "loss", TRAIN, VALID)
