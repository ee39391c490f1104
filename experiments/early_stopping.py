"""What early stopping with refill is worth: wall-clock to the same loss, and the share of training steps that is of use.

    python -m experiments.early_stopping [--seeds 10] [--problems digits mnist] [--out early_stopping.md]

All ways try the same trials in the same order (one scrambled Sobol sequence a seed, the same keys), in the same lanes:

    full        every trial trained to the end, lanes refilled
    asha        ASHA stops trials, lanes refilled at once
    lock-step   successive halving of a batch as a plain vmapped loop does it: lanes of stopped trials wait for the batch

The target is the median over other seeds of the best loss of ``--target`` full trainings. Compilation is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxhpo as jh
from experiments.images import image_mlp
from experiments.quickstart import spread
from jaxhpo.core import FRESH, Array, CubeSpec, Feedback, Query, pytree_dataclass, setting

LANES = 32
PROBLEMS = {
    "digits": functools.partial(image_mlp, "digits", num_steps=270, steps_per_round=10),
    "mnist": functools.partial(image_mlp, "mnist5k", num_steps=540, steps_per_round=20),
}


def space() -> jh.Space:
    return jh.Space(
        {
            "learning_rate": jh.Float(1e-3, 3.0, log=True),
            "momentum": jh.Float(0.0, 0.99),
            "weight_decay": jh.Float(1e-6, 1e-1, log=True),
            "label_smoothing": jh.Float(0.0, 0.3),
            "width": jh.Int(8, 128, log=True),
        }
    )


@pytree_dataclass
class Batch:
    """``rung`` i32[]; ``waits``, ``begun`` bool[B]; ``loss`` f32[B]; the inner optimizer's state."""

    inner: Any
    rung: Array
    waits: Array
    begun: Array
    loss: Array


@pytree_dataclass
class LockStep:
    """Successive halving of all lanes together; a lane whose trial was stopped waits until the last one of the batch ends.

    Attributes:
        inner: proposes the trials.
        reduction: every rung keeps one of so many.
        rungs: total steps of the rungs below the whole training (static).
    """

    inner: Any
    reduction: float = setting(3.0, low=1.5)
    rungs: tuple[int, ...] = setting((), static=True)

    @property
    def num_lanes(self) -> int:
        return self.inner.num_lanes

    def for_training(self, num_steps: int, round_steps: int) -> LockStep:
        del round_steps
        return dataclasses.replace(self, rungs=tuple(num_steps // 3**k for k in (3, 2, 1)))

    def init(self, key: jax.Array, spec: CubeSpec) -> Batch:
        none = jnp.zeros(self.num_lanes, bool)
        return Batch(self.inner.init(key, spec), jnp.zeros((), jnp.int32), none, none, jnp.full(self.num_lanes, jnp.inf))

    def ask(self, key: jax.Array, state: Batch) -> Query:
        query = self.inner.ask(key, state.inner)
        own = jnp.arange(self.num_lanes, dtype=jnp.int32)
        budget = jnp.array([*self.rungs, jh.FULL], jnp.int32)[state.rung]
        return Query(query.cube, jnp.where(state.begun, own, FRESH), jnp.where(state.waits, 1, budget))

    def update(self, key: jax.Array, state: Batch, query: Query, feedback: Feedback) -> Batch:
        now = feedback.done & ~state.waits
        loss = jnp.where(now, jnp.where(jnp.isfinite(feedback.loss), feedback.loss, jnp.inf), state.loss)
        answered = (feedback.done | state.waits).all()
        rank = jnp.argsort(jnp.argsort(jnp.where(state.waits, jnp.inf, loss)))
        keep = jnp.floor(self.num_lanes / self.reduction ** (state.rung + 1).astype(jnp.float32))
        ends = answered & (state.rung == len(self.rungs))
        told = Feedback(jnp.where(ends, loss, jnp.nan), jnp.broadcast_to(ends, now.shape), feedback.steps, feedback.grad)
        inner = self.inner.update(key, state.inner, query, told)
        stopped = (rank >= keep) | jnp.isinf(loss)
        waits = jnp.where(answered, state.waits | stopped, state.waits)
        return Batch(
            inner,
            jnp.where(ends, 0, state.rung + answered),
            jnp.where(ends, False, waits),
            jnp.where(ends, False, state.begun | now),
            jnp.where(ends, jnp.inf, loss),
        )


def ways() -> dict[str, Any]:
    trials = jh.SobolSearch(num_lanes=LANES)
    return {"full": trials, "asha": jh.ASHA(trials), "lock-step": LockStep(trials)}


def target_of(training: jh.Training, num_trials: int) -> float:
    """The median, over seeds that are used for nothing else, of the best loss of so many full trainings."""
    best = [
        jh.minimize(training, space(), ways()["full"], key=1000 + seed, num_trials=num_trials, metric="loss").best.loss
        for seed in range(7)
    ]
    return statistics.median(best)


def run(training: jh.Training, optimizer: Any, seed: int, **limits: Any) -> jh.Result:
    return jh.minimize(training, space(), optimizer, key=seed, metric="loss", **limits)


def measured(name: str, seeds: int, num_target: int) -> list[str]:
    """A table of one problem."""
    training = PROBLEMS[name]()
    target = target_of(training, num_target)
    rows: dict[str, list[tuple[float, int, float, int]]] = {way: [] for way in ways()}
    most = 40 * num_target * training.num_steps
    for optimizer in ways().values():
        run(training, optimizer, 0, max_steps=1)  # compiles
    for seed in range(seeds):
        for way, optimizer in ways().items():
            result = run(training, optimizer, seed, target_loss=target, max_steps=most)
            assert result.best.loss <= target, "the target was not reached"
            share = result.lanes["share"]
            rows[way].append((result.run_seconds, result.lanes["steps"], share, len(result.trials["number"])))
            print(name, way, seed, *rows[way][-1], flush=True)
    lines = [
        f"{name}: target loss {target:.4f}, what {num_target} full trainings reach; {seeds} seeds, median [range]",
        "",
        "| way | seconds | steps on trials that had not ended | share of all steps | trials answered |",
        "|---|---|---|---|---|",
    ]
    for way, found in rows.items():
        seconds, steps, share, trials = map(list, zip(*found, strict=True))
        cells = [spread(seconds, ".2f"), spread(steps, ",.0f"), spread(share, ".3f"), spread(trials, ".0f")]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    for other in ("full", "lock-step"):
        ratio = [a[0] / b[0] for a, b in zip(rows[other], rows["asha"], strict=True)]
        middle = statistics.median([a[0] for a in rows[other]]) / statistics.median([b[0] for b in rows["asha"]])
        lines.append(f"\nasha is {spread(ratio, '.2f')} times as fast as {other}, seed by seed; {middle:.2f} by the medians")
    return lines


def shares(name: str, num_trials: int) -> list[str]:
    """The share of useful steps where the same number of trials is run to its end."""
    training = PROBLEMS[name]()
    lines = [
        f"\n{name}: {num_trials} trials, each to its end",
        "",
        "| way | share of useful steps | seconds |",
        "|---|---|---|",
    ]
    for way, optimizer in ways().items():
        run(training, optimizer, 0, max_steps=1)
        result = run(training, optimizer, 0, num_trials=num_trials)
        lines.append(f"| {way} | {result.lanes['share']:.3f} | {result.run_seconds:.1f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--target", type=int, default=128, help="full trainings whose best loss is the target")
    parser.add_argument("--trials", type=int, default=2048, help="trials for the share of useful steps")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jh.prepare_jax()
    parts = []
    for name in arguments.problems:
        parts += [*measured(name, arguments.seeds, arguments.target), *shares(name, arguments.trials), ""]
    text = "\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
