"""A learning rate for each step of training, learned from bad starts by hypergradient descent through the whole training.

    python -m experiments.learned_schedule [--seeds 3] [--quick] [--out schedule.md]

The digits network in Flax NNX, Nesterov's momentum 0.9, 200 steps: 200 hyperparameters. The bad starts are constant rates
below and above the best one. A trial is the mean over four trainings on fresh keys, for random search over 32; only for the
row of the fixed key do all trials see one and the same training. Learned rates are the geometric mean over the last quarter
of the trials, a choice that looks at no loss; with the fixed key they are those of the best trial. All methods pay the same
number of training steps, an exact hypergradient as ``--ratio`` trainings (``--ratio 0`` measures it). What came out is
judged on 64 fresh keys.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxhpo as jh
from experiments.digits import METRICS, NnxMLP, digits
from experiments.quickstart import spread
from jaxhpo.core import Array, pytree_dataclass
from jaxhpo.hypergradients import Estimate, Estimator, Unrolled
from jaxhpo.hypergradients.estimate import Assemble, Floats, split_floats, trained, value_and_grad
from jaxhpo.tasks import Task, Training, from_nnx, over_seeds, schedules

WIDTH, MOMENTUM = 64, 0.9
GOOD = 0.03  # about the best constant rate
SEARCH_SEEDS = 32  # trainings to a trial of random search
STARTS = {"10 x too low": 0.1, "5 x too high": 5.0, "10 x too high": 10.0}


def rates(kind: str, hparams: Any, num_steps: int) -> schedules.Schedule:
    """``each``: a rate for each step, ``f32[T]``; ``constant``: one rate; ``cosine``: its peak."""
    rate = hparams["learning_rate"]
    made = {"each": lambda step: rate[step], "constant": schedules.constant(rate), "cosine": schedules.cosine(rate, num_steps)}
    return made[kind]


@functools.cache  # the same arguments give the same functions, hence the same compiled program
def scheduled(kind: str, num_steps: int, num_seeds: int) -> Task:
    """Digits, trained by a schedule of learning rates."""

    def optimizer(hparams: Any) -> optax.GradientTransformation:
        rate = optax.scale_by_learning_rate(rates(kind, hparams, num_steps))
        return optax.chain(optax.trace(MOMENTUM, nesterov=True), rate)

    model = lambda hparams, rngs: NnxMLP(WIDTH, WIDTH, rngs=rngs)
    return over_seeds(from_nnx(model, optimizer, *digits(), metrics=METRICS, batch_size=64), num_seeds)


def each_step(num_steps: int = 200, num_seeds: int = 4) -> Unrolled:
    """For configs: the hypergradient by ``learning_rate``, one for each step."""
    return Unrolled(scheduled("each", num_steps, num_seeds), num_steps)


@pytree_dataclass
class FixedKey:
    """An estimator whose trials all see the same training: what should not be done."""

    estimator: Unrolled
    key: Array

    @property
    def metric(self) -> str:
        return self.estimator.metric

    @property
    def training(self) -> Training:
        return self.estimator.training

    def check(self, floats: Floats, assemble: Assemble) -> None:
        self.estimator.check(floats, assemble)

    def estimate(self, key: Array, floats: Floats, assemble: Assemble) -> Estimate:
        return self.estimator.estimate(self.key, floats, assemble)

    def __call__(self, key: Array, hparams: Any) -> tuple[Array, Any]:
        return value_and_grad(self, key, hparams)


@functools.partial(jax.jit, static_argnums=1)
def _outcomes(task: Task, num_steps: int, hparams: Any, keys: Array) -> dict[str, Array]:
    def one(key: Array) -> dict[str, Array]:
        state = trained(task, key, hparams, num_steps)
        assert task.test is not None
        found = {"validation": task.evaluate(hparams, state), "test": task.test(hparams, state)}
        return {f"{split} {name}": found[split][name] for split in found for name in ("loss", "error")}

    return jax.tree.map(jnp.mean, jax.lax.map(one, keys, batch_size=8))


def outcomes(task: Task, num_steps: int, hparams: Any, keys: Array) -> dict[str, float]:
    """Mean loss and error on validation and test data of whole trainings of these keys; infinite if one diverged."""
    found = jax.device_get(_outcomes(jax.tree.map(jnp.asarray, task), num_steps, jax.tree.map(jnp.float32, hparams), keys))
    return {name: float(np.nan_to_num(value, nan=np.inf)) for name, value in found.items()}


def measured_ratio(estimator: Estimator, hparams: Any, repeats: int = 5) -> float:
    """Seconds of an estimate over seconds of the training alone, turn by turn; the median."""
    floats, assemble = split_floats(jax.tree.map(jnp.float32, hparams))
    task, num_steps = estimator.training.task, estimator.training.num_steps

    def train(key: Array, floats: Floats) -> Array:
        hparams = assemble(floats)
        state = trained(task, key, hparams, num_steps)
        return task.evaluate(hparams, state)["loss"]

    runs = jax.jit(train), jax.jit(lambda key, floats: estimator.estimate(key, floats, assemble).grad)
    quotients = []
    for number in range(repeats + 1):
        seconds = []
        for run in runs:
            began = time.perf_counter()
            jax.block_until_ready(run(jax.random.key(number), floats))
            seconds.append(time.perf_counter() - began)
        quotients.append(seconds[1] / seconds[0])
    return statistics.median(quotients[1:])  # the first one compiled


def learn(estimator: Estimator, initial: float, num_trials: int, rate: float, seed: int) -> tuple[Array, float]:
    """The rates that descent from a constant finds, ``f32[T]``, and the seconds that it took."""
    num_steps = estimator.training.num_steps
    # Descent starts in the middle of the cube.
    space = {"learning_rate": jh.Float(initial / 1e3, initial * 1e3, log=True, shape=(num_steps,))}
    # A loss on a fresh key is no progress and no lack of it: nothing restarts.
    optimizer = jh.HypergradientDescent(optax.adam, learning_rate=rate, num_lanes=1, num_initial=1, patience=10**6)
    result = jh.minimize(estimator, space, optimizer, key=seed, num_trials=num_trials)
    if isinstance(estimator, FixedKey):  # its losses do not depend on luck
        return jnp.asarray(result.best.hparams["learning_rate"]), result.run_seconds
    found = np.log(np.array(result.trials["hparams.learning_rate"]))
    return jnp.exp(jnp.asarray(found[-max(num_trials // 4, 1) :].mean(0))), result.run_seconds


def searched(kind: str, num_steps: int, num_seeds: int, num_trials: int, seed: int) -> tuple[float, float]:
    """The best scalar of random search, and the seconds. Many seeds to a trial: else a lucky, larger rate wins."""
    space = {"learning_rate": jh.Float(GOOD / 100, GOOD * 100, log=True)}
    training = Training(scheduled(kind, num_steps, num_seeds), num_steps)
    result = jh.minimize(training, space, jh.RandomSearch(num_lanes=4), key=seed, num_trials=num_trials)
    return result.best.hparams["learning_rate"], result.run_seconds


def profile(learned: Array) -> str:
    """Rates at the beginning, in the middle and at the end of the training; geometric means over a tenth each."""
    log, tenth = np.log(np.asarray(learned)), max(len(learned) // 10, 1)
    middle = (len(learned) - tenth) // 2
    return ", ".join(f"{np.exp(log[at : at + tenth].mean()):.3g}" for at in (0, middle, len(log) - tenth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="steps of a training")
    parser.add_argument("--outer", type=int, default=150, help="outer steps, of four trainings each")
    parser.add_argument("--rate", type=float, default=0.01, help="Adam's outer learning rate; the cube is six decades wide")
    parser.add_argument("--ratio", type=float, default=4.5, help="trainings that a hypergradient counts as; 0: measure")
    parser.add_argument("--fresh", type=int, default=64, help="fresh keys to judge by")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.outer, arguments.fresh = 1, 20, 4, 8
    jh.prepare_jax()
    T, num_seeds = arguments.steps, 4
    one = {kind: scheduled(kind, T, 1) for kind in ("each", "constant", "cosine")}
    ratio = arguments.ratio or measured_ratio(each_step(T, num_seeds), {"learning_rate": np.full(T, GOOD)})
    worth = arguments.outer * num_seeds * ratio
    rows: dict[str, list[dict[str, float]]] = {}

    def judge(row: str, kind: str, value: Any, seed: int, seconds: float, own: Array | None = None) -> None:
        fresh = jax.random.split(jax.random.key(1000 + seed), arguments.fresh)
        found = outcomes(one[kind], T, {"learning_rate": value}, fresh) | {"seconds": seconds}
        if own is not None:
            found["own"] = outcomes(one[kind], T, {"learning_rate": value}, own[None])["validation loss"]
        rows.setdefault(row, []).append(found)
        shown = profile(value) if kind == "each" else f"{value:.3g}"
        print(row, seed, {name: round(x, 4) for name, x in found.items()}, "rates", shown, flush=True)

    for seed in range(arguments.seeds):
        for name, factor in STARTS.items():
            initial = GOOD * factor
            judge(f"constant, {name}", "constant", initial, seed, 0.0)
            learned, seconds = learn(each_step(T, num_seeds), initial, arguments.outer, arguments.rate, seed)
            judge(f"learned with fresh keys, {name}", "each", learned, seed, seconds)
        # One training a trial instead of four: as many more trials for the same compute.
        key, name = jax.random.key(500 + seed), "10 x too low"
        fixed, num_trials = FixedKey(Unrolled(one["each"], T), key), arguments.outer * num_seeds
        learned, seconds = learn(fixed, GOOD * STARTS[name], num_trials, arguments.rate, seed)
        judge(f"learned with a fixed key, {name}", "each", learned, seed, seconds, own=key)
        for kind in ("constant", "cosine"):
            value, seconds = searched(kind, T, SEARCH_SEEDS, max(int(worth / SEARCH_SEEDS), 4), seed)
            judge(f"{kind}, random search", kind, value, seed, seconds)

    lines = [
        f"{T} steps, {arguments.seeds} seeds, each judged on {arguments.fresh} fresh keys; a hypergradient counted as "
        f"{ratio:.1f} trainings; median [range]",
        "",
        "| learning rates | validation loss, its own key | validation loss, fresh keys | test loss, fresh keys | test error | "
        "trainings' worth | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, found in rows.items():
        column = lambda name, form, found=found: spread([each[name] for each in found], form)
        own = column("own", ".3f") if "own" in found[0] else ""
        paid = "0" if found[0]["seconds"] == 0 else f"{worth:,.0f}"
        cells = [own, column("validation loss", ".3f"), column("test loss", ".3f"), column("test error", ".2%"), paid]
        lines.append(f"| {row} | {' | '.join(cells)} | {column('seconds', '.0f')} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
