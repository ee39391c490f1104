"""Hyper-cleaning: a weight for each training example, learned against a small clean set, finds the labels that are wrong.

    python -m experiments.cleaning [--data mnist5k] [--clean 250 500] [--seeds 5] [--out table.md]

Half of the training labels are replaced by another class, uniformly. A softmax regression (Flax NNX) is trained on full
batches, the loss of each example multiplied by its weight; thousands of weights are the hyperparameters, and a few hundred
examples with right labels the validation set (Franceschi et al., "Forward and reverse gradient-based hyperparameter
optimization", 2017, section 5.1). Each seed draws other clean and training examples, other wrong labels and other initial
weights; the test split is fixed, and no search sees it. Draw 0 is left out: the settings were chosen on it.

Compute is counted in trainings of ``num_steps`` steps; a hypergradient counts as many trainings as it takes time, measured in
the same run.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial

import jaxhpo as jh
from jaxhpo.benchmarks import datasets
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import Implicit, Unrolled
from jaxhpo.hypergradients.estimate import split_floats, trained
from jaxhpo.tasks import Task, from_nnx, metrics
from jaxhpo.tasks.nnx import NnxNetwork

Data = Literal["mnist5k", "digits"]
NUM_TRAIN: dict[str, int] = {"mnist5k": 3000, "digits": 1000}
NUM_CLASSES = 10
# Of 0.01, 0.1 and 0.3 this weight decay gives the uncleaned training on MNIST-5k the lowest loss on the clean set.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 0.1
NUM_FRESH = 4  # trainings from other initial weights that a reported accuracy is the mean of


class Corrupted(NamedTuple):
    """Training examples of which some labels are wrong, and clean ones.

    ``x`` ``f32[N, P]``, ``given`` and ``true`` labels ``i32[N]``; ``clean`` and ``test`` are pairs of inputs and labels.
    """

    x: np.ndarray
    given: np.ndarray
    true: np.ndarray
    clean: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


@functools.lru_cache(4)
def corrupted(data: str, num_train: int, num_clean: int, wrong: float, seed: int) -> Corrupted:
    """One draw of examples and wrong labels; pixels less their mean, divided by one scale, both of the training inputs."""
    arrays = datasets.load(data)
    x = np.concatenate([arrays["x_train"], arrays["x_valid"]])
    y = np.concatenate([arrays["y_train"], arrays["y_valid"]])
    clean, train = datasets.stratified_splits(y, (num_clean, num_train), seed)
    rng = np.random.default_rng((seed, 1))
    is_wrong = rng.permutation(num_train) < round(wrong * num_train)
    given = np.where(is_wrong, (y[train] + rng.integers(1, NUM_CLASSES, num_train)) % NUM_CLASSES, y[train])
    mean = x[train].mean(0)
    scale = (x[train] - mean).std()
    standard = lambda x: (x - mean) / scale
    test = standard(arrays["x_test"]), arrays["y_test"]
    return Corrupted(standard(x[train]), given.astype(np.int32), y[train], (standard(x[clean]), y[clean]), test)


class Network(nnx.Module):
    """A softmax regression, or one hidden layer of tanh."""

    def __init__(self, num_pixels: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(num_pixels, hidden, rngs=rngs) if hidden else None
        self.last = nnx.Linear(hidden or num_pixels, NUM_CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(x if self.hidden is None else jnp.tanh(self.hidden(x)))


def weighted_loss(hparams: Any, logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy under ``hparams["weights"]``, ``f32[N]``: on full batches the examples keep their places."""
    weights = hparams["weights"]
    if weights.shape != labels.shape:
        raise JaxhpoError(f"weights of shape {list(weights.shape)}: there are {len(labels)} training examples")
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(weights * losses) / jnp.maximum(jnp.sum(weights), 1e-3)


@functools.cache  # the same sizes give the same functions, hence the same compiled program
def network(num_pixels: int, hidden: int) -> Callable[[Any, nnx.Rngs], nnx.Module]:
    return lambda hparams, rngs: Network(num_pixels, hidden, rngs=rngs)


def sgd(hparams: Any) -> optax.GradientTransformation:
    """Nesterov's momentum with weight decay as a penalty: where it ends, it has added to the gradient of the loss."""
    del hparams
    return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True))


def training_on(x: np.ndarray, y: np.ndarray, draw: Corrupted, hidden: int = 0) -> Task:
    """Training on the given examples by their weights, validated on the clean set."""
    measures = {"loss": metrics.cross_entropy, "accuracy": metrics.accuracy}
    model = network(x.shape[1], hidden)
    return from_nnx(model, sgd, (x, y), draw.clean, draw.test, loss=weighted_loss, metrics=measures)


def unrolled(
    data: Data = "mnist5k",
    num_train: int = 3000,
    num_clean: int = 250,
    wrong: float = 0.5,
    num_steps: int = 100,
    hidden: int = 0,
    seed: int = 0,
) -> Unrolled:
    """Validation loss on ``num_clean`` clean examples, and its exact derivative by the weights of ``num_train`` others.

    Args:
        data: MNIST-5k holds 4,000 examples beside its test split, digits 1,437.
        wrong: share of the training labels that are wrong.
        hidden: units of a hidden layer; 0 is softmax regression.
        seed: of the draw of examples and wrong labels.
    """
    draw = corrupted(data, num_train, num_clean, wrong, seed)
    return Unrolled(training_on(draw.x, draw.given, draw, hidden), num_steps)


def implicit(
    data: Data = "mnist5k",
    num_train: int = 3000,
    num_clean: int = 250,
    wrong: float = 0.5,
    num_steps: int = 100,
    hidden: int = 0,
    seed: int = 0,
) -> Implicit:
    """As :func:`unrolled`, by the implicit function theorem; the damping is the weight decay, which the loss leaves out."""
    draw = corrupted(data, num_train, num_clean, wrong, seed)
    return Implicit(training_on(draw.x, draw.given, draw, hidden), num_steps, damping=WEIGHT_DECAY)


def filter_weights(hparams: Any, confidence: jax.Array) -> dict[str, jax.Array]:
    """Weights by how probable a model of the clean examples finds the given labels: two hyperparameters."""
    return {"weights": jax.nn.sigmoid(hparams["sharpness"] * (confidence - hparams["threshold"]))}


def _filtered_init(task: Task, confidence: jax.Array, key: jax.Array, hparams: Any) -> Any:
    return task.init(key, filter_weights(hparams, confidence))


def _filtered_step(task: Task, confidence: jax.Array, key: jax.Array, hparams: Any, state: Any) -> Any:
    return task.step(key, filter_weights(hparams, confidence), state)


def _filtered_evaluate(task: Task, confidence: jax.Array, hparams: Any, state: Any) -> Any:
    return task.evaluate(filter_weights(hparams, confidence), state)


def filtered(task: Task, confidence: jax.Array) -> Task:
    """A task whose hyperparameters are those of ``filter_weights``."""
    parts = (_filtered_init, _filtered_step, _filtered_evaluate)
    return Task(*(Partial(part, task, confidence) for part in parts))


FILTER_SPACE = {"threshold": jh.Float(0.0, 1.0), "sharpness": jh.Float(1.0, 100.0, log=True)}


@functools.partial(jax.jit, static_argnames="num_steps")
def _trained(task: Task, key: jax.Array, weights: jax.Array, num_steps: int) -> tuple[Any, jax.Array]:
    """The end of one training, and its accuracy on the test split."""
    hparams = {"weights": weights}
    state = trained(task, key, hparams, num_steps)
    assert task.test is not None
    return state, task.test(hparams, state)["accuracy"]


def test_accuracy(task: Task, weights: np.ndarray, key: jax.Array, num_steps: int) -> float:
    """Mean over trainings from initial weights that no search has seen."""
    keys = jax.random.split(key, NUM_FRESH)
    return float(np.mean([_trained(task, key, jnp.asarray(weights, jnp.float32), num_steps)[1] for key in keys]))


def found_wrong(flagged: np.ndarray, draw: Corrupted) -> tuple[float, float]:
    """Accuracy and F1 of the examples flagged as wrongly labelled, ``bool[N]``."""
    is_wrong = draw.given != draw.true
    hits = np.sum(flagged & is_wrong)
    return float(np.mean(flagged == is_wrong)), float(2 * hits / max(flagged.sum() + is_wrong.sum(), 1))


def _fastest(functions: list[Callable[[], Any]], turns: int = 5) -> list[float]:
    """Seconds of the fastest call of each, turn by turn, after one to compile."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(turns + 1):
        for function, seconds in zip(functions, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                seconds.append(time.perf_counter() - begin)
    return [min(seconds) for seconds in times]


class Row(NamedTuple):
    """What one way of training reached on one draw; trainings is their worth of compute."""

    method: str
    test: float
    accuracy: float
    f1: float
    trainings: float
    seconds: float


class Settings(NamedTuple):
    """What is the same on every draw."""

    data: Data
    num_train: int
    num_clean: int
    wrong: float
    num_steps: int
    hidden: int
    num_trials: int


def descent(num_train: int) -> jh.HypergradientDescent:
    """Plain gradient descent from weights of one half; the derivative by one of N weights is of the order of 1 / N.

    Not Adam: it gives every weight steps of the same size, those whose derivative is next to nothing included.
    """
    return jh.HypergradientDescent(optax.sgd, learning_rate=num_train / 30, num_lanes=1, num_initial=1)


ESTIMATORS = {"unrolled": unrolled, "implicit": implicit}


def costs(settings: Settings) -> dict[str, float]:
    """Seconds of a training, ``"training"``; and how many times that an estimate of a hypergradient takes."""
    s = settings
    draw = corrupted(s.data, s.num_train, s.num_clean, s.wrong, 0)
    task, key = training_on(draw.x, draw.given, draw, s.hidden), jax.random.key(0)
    floats, assemble = split_floats({"weights": jnp.full(s.num_train, 0.5)})
    gradient = jax.jit(lambda estimator: estimator.estimate(key, floats, assemble).grad)
    made = [make(s.data, s.num_train, s.num_clean, s.wrong, s.num_steps, s.hidden, 0) for make in ESTIMATORS.values()]
    calls = [functools.partial(gradient, estimator) for estimator in made]
    one, *others = _fastest([lambda: _trained(task, key, floats["weights"], s.num_steps), *calls])
    return {"training": one, **{name: seconds / one for name, seconds in zip(ESTIMATORS, others, strict=True)}}


def ways(settings: Settings, cost: dict[str, float], seed: int) -> Iterator[Row]:
    """All rows of the table on one draw."""
    s = settings
    draw = corrupted(s.data, s.num_train, s.num_clean, s.wrong, seed)
    is_right = draw.given == draw.true
    fresh, key = jax.random.split(jax.random.key(1000 + seed))
    x_clean, y_clean = draw.clean
    dirty = training_on(draw.x, draw.given, draw, s.hidden)
    both = training_on(np.concatenate([draw.x, x_clean]), np.concatenate([draw.given, y_clean]), draw, s.hidden)
    clean = training_on(x_clean, y_clean, draw, s.hidden)
    ones, ones_clean = np.ones(s.num_train, np.float32), np.ones(s.num_clean, np.float32)
    keep = lambda weights: np.concatenate([weights, ones_clean])
    nan = float("nan")

    one = cost["training"]
    reach = lambda task, weights: test_accuracy(task, weights, fresh, s.num_steps)
    yield Row("no cleaning", reach(dirty, ones), nan, nan, 1, one)
    yield Row("right labels only (oracle)", reach(dirty, is_right), 1.0, 1.0, 1, one)
    yield Row("no cleaning, with the clean set", reach(both, keep(ones)), nan, nan, 1, one)
    yield Row("right labels only, with the clean set (oracle)", reach(both, keep(is_right)), 1.0, 1.0, 1, one)

    # A model of the clean set alone, and the labels that it doubts.
    state, _ = _trained(clean, key, jnp.asarray(ones_clean), s.num_steps)
    model = NnxNetwork(network(draw.x.shape[1], s.hidden))
    logits = model.predict({}, state.params, state.variables, jnp.asarray(draw.x))
    confidence = jax.nn.softmax(logits)[np.arange(s.num_train), draw.given]
    doubted = np.asarray(logits.argmax(-1) != draw.given)
    yield Row("clean set alone", reach(clean, ones_clean), *found_wrong(doubted, draw), 1, one)

    def rows(name: str, weights: np.ndarray, trainings: float, seconds: float) -> Iterator[Row]:
        found = found_wrong(weights < 0.5, draw)
        yield Row(name, reach(dirty, weights), *found, trainings, seconds)
        yield Row(f"{name}, with the clean set", reach(both, keep(weights)), *found, trainings, seconds)

    space = {"weights": jh.Float(0.0, 1.0, shape=(s.num_train,))}
    for name, make in ESTIMATORS.items():
        estimator = make(s.data, s.num_train, s.num_clean, s.wrong, s.num_steps, s.hidden, seed)
        result = jh.minimize(estimator, space, descent(s.num_train), key=seed, num_trials=s.num_trials)
        weights = np.asarray(result.best.hparams["weights"], np.float32)
        yield from rows(f"learned weights, {name}", weights, s.num_trials * cost[name], result.run_seconds)

    searched = jh.Training(filtered(dirty, confidence), s.num_steps, s.num_steps)
    budget = round(s.num_trials * cost["unrolled"])
    result = jh.minimize(searched, FILTER_SPACE, jh.RandomSearch(num_lanes=8), key=seed, num_trials=budget, metric="loss")
    weights = np.asarray(filter_weights(result.best.hparams, confidence)["weights"])
    yield from rows("confidence filter", weights, budget + 1, result.run_seconds)


def _spread(values: list[float], form: str) -> str:
    low, high = (format(x, form) for x in (min(values), max(values)))
    if np.isnan(values).any():
        return ""
    return low if low == high else f"{np.median(values):{form}} [{low} to {high}]"


def table(settings: Settings, seeds: int) -> str:
    """Medians and ranges over draws, in Markdown."""
    cost = costs(settings)
    draws = [list(ways(settings, cost, seed)) for seed in range(1, seeds + 1)]
    lines = [
        f"{settings.data}: {settings.num_train} training examples of which {settings.wrong:.0%} are labelled wrongly, "
        f"{settings.num_clean} clean ones; {settings.num_steps} steps, {settings.num_trials} hypergradients, each of which "
        f"takes the time of {cost['unrolled']:.1f} trainings (implicit: {cost['implicit']:.1f}); {seeds} draws, median [range]",
        "",
        "| method | test accuracy | wrong labels found: accuracy | F1 | trainings' worth | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for rows in zip(*draws, strict=True):
        _, *columns = zip(*rows, strict=True)
        cells = [_spread(list(c), form) for c, form in zip(columns, (".1%", ".1%", ".2f", ".0f", ".1f"), strict=True)]
        lines.append(f"| {' | '.join([rows[0].method, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(NUM_TRAIN), default="mnist5k")
    parser.add_argument("--clean", type=int, nargs="+", default=[250, 500])
    parser.add_argument("--wrong", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--hidden", type=int, default=0)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    text = ""
    for num_clean in a.clean:
        found = table(Settings(a.data, NUM_TRAIN[a.data], num_clean, a.wrong, a.steps, a.hidden, a.trials), a.seeds)
        print(found, flush=True)
        text += found + "\n"
    if a.out:
        a.out.write_text(text)


if __name__ == "__main__":
    main()
