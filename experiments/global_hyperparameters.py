"""Eight global hyperparameters: hypergradient descent against black-box search that may train as often.

    python -m experiments.global_hyperparameters [--problems digits,breast_cancer] [--seeds 5] [--quick] [--out global.md]

The network of ``experiments/regularized.py``, 150 steps, eight hyperparameters. Every trial is one training on fresh keys.
All methods may spend ``--budget`` trainings; an exact hypergradient counts as ``--ratio`` of them (``--ratio 0`` measures
it). The winner of a search is its trial of the lowest validation loss, judged on 64 fresh keys, the same for all methods.
The optimizers of ``optax.contrib`` that want no learning rate train once, with the settings of optax.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import jaxhpo as jh
from experiments.learned_schedule import measured_ratio, outcomes
from experiments.quickstart import spread
from experiments.regularized import NUM_STEPS, SPACE, network_task, unrolled
from jaxhpo.core import Array, CubeSpec, Feedback, Query, pytree_dataclass
from jaxhpo.hypergradients.estimate import trained
from jaxhpo.tasks import Task, Training


@pytree_dataclass
class StartAt:
    """An explorer that sends every lane to a point of its own, ``f32[B, D]``, again and again."""

    points: Array

    @property
    def num_lanes(self) -> int:
        return self.points.shape[0]

    def init(self, key: Array, spec: CubeSpec) -> tuple[()]:
        return ()

    def ask(self, key: Array, state: tuple[()]) -> Query:
        return Query.fresh(jnp.asarray(self.points))

    def update(self, key: Array, state: tuple[()], query: Query, feedback: Feedback) -> tuple[()]:
        return state


Search = Callable[[str, int, int, float], Array]
"""``(data set, seed, budget in trainings, ratio) -> winner``, ``f32[D]`` in the cube."""


def black_box(make: Callable[[], Any]) -> Search:
    def search(name: str, seed: int, budget: int, ratio: float) -> Array:
        training = Training(network_task(name), NUM_STEPS)
        return jh.minimize(training, SPACE, make(), key=seed, num_trials=budget).best.cube

    return search


def descent(**settings: Any) -> Search:
    def search(name: str, seed: int, budget: int, ratio: float) -> Array:
        optimizer = jh.HypergradientDescent(**settings)
        return jh.minimize(unrolled(name), SPACE, optimizer, key=seed, num_trials=max(int(budget / ratio), 1)).best.cube

    return search


def then_descent(make: Callable[[], Any], **settings: Any) -> Search:
    """A black-box search for half the budget, descent from its winner for the other half; the winner is of the second."""

    def search(name: str, seed: int, budget: int, ratio: float) -> Array:
        found = black_box(make)(name, seed, budget // 2, ratio)
        return descent(num_lanes=1, explorer=StartAt(found[None]), **settings)(name, seed, budget - budget // 2, ratio)

    return search


@functools.partial(jax.jit, static_argnums=1)
def _losses(task: Task, num_steps: int, keys: Array, cube: Array) -> Array:
    def one(key: Array, cube: Array) -> Array:
        hparams = SPACE.decode(cube)
        state = trained(task, key, hparams, num_steps)
        return task.evaluate(hparams, state)["loss"]

    return jax.vmap(one)(keys, cube)


def cma_es(name: str, seed: int, budget: int, ratio: float) -> Array:
    """CMA-ES of the package ``cmaes``, from the middle of the cube, with its own size of population."""
    from cmaes import CMA

    dims, task = SPACE.num_dims, jax.tree.map(jnp.asarray, network_task(name))
    peer = CMA(np.full(dims, 0.5), 0.25, bounds=np.tile([0.0, 1.0], (dims, 1)), seed=seed + 1)
    best, winner, spent = np.inf, np.full(dims, 0.5), 0
    while spent + peer.population_size <= budget:
        cube = np.stack([peer.ask() for _ in range(peer.population_size)])
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), spent), len(cube))
        losses = np.nan_to_num(_losses(task, NUM_STEPS, keys, jnp.asarray(cube, jnp.float32)), nan=1e3, posinf=1e3)
        peer.tell([(u, float(loss)) for u, loss in zip(cube, losses, strict=True)])
        if losses.min() < best:
            best, winner = losses.min(), cube[losses.argmin()]
        spent += len(cube)
    return winner.astype(np.float32)


SEARCHES: dict[str, Search] = {
    "random search": black_box(lambda: jh.RandomSearch(num_lanes=8)),
    "TPE": black_box(lambda: jh.TPE(num_lanes=4)),
    "CMA-ES": cma_es,
    "hypergradient descent": descent(),
    "hypergradient descent, one lane from the middle": descent(num_lanes=1, num_initial=1),
    "TPE, then hypergradient descent": then_descent(lambda: jh.TPE(num_lanes=4)),
}
FREE: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "prodigy": lambda hparams: contrib.prodigy(),
    "dadapt_adamw": lambda hparams: contrib.dadapt_adamw(),
    "dowg": lambda hparams: contrib.dowg(),
    "cocob": lambda hparams: contrib.cocob(),
    "schedule_free_sgd": lambda hparams: contrib.schedule_free_sgd(),
    "adam(1e-3)": lambda hparams: optax.adam(1e-3),
}


@pytree_dataclass
class Averaged:
    """The evaluation of a task at the averaged parameters of a schedule-free optimizer."""

    evaluate: Callable[..., Any]

    def __call__(self, hparams: Any, state: Any) -> Any:
        params = contrib.schedule_free_eval_params(state.opt_state, state.params)
        return self.evaluate(hparams, dataclasses.replace(state, params=params))


@functools.cache
def free_task(name: str, optimizer: str) -> Task:
    task = network_task(name, FREE[optimizer])
    if not optimizer.startswith("schedule_free"):
        return task
    assert task.test is not None
    return Task(task.init, task.step, Averaged(task.evaluate), Averaged(task.test))


def table(name: str, arguments: argparse.Namespace) -> list[str]:
    middle = SPACE.decode(jnp.full(SPACE.num_dims, 0.5))
    ratio = arguments.ratio or measured_ratio(unrolled(name), middle)
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        fresh = jax.random.split(jax.random.key(1000 + seed), arguments.fresh)
        for row, search in SEARCHES.items():
            began = time.perf_counter()
            cube = search(name, seed, arguments.budget, ratio)
            seconds = time.perf_counter() - began
            found = outcomes(network_task(name), NUM_STEPS, SPACE.decode(jnp.asarray(cube)), fresh)
            rows.setdefault(row, []).append(found | {"seconds": seconds, "paid": arguments.budget})
            print(
                name,
                row,
                seed,
                {key: round(x, 4) for key, x in found.items()},
                np.round(cube, 2),
                f"{seconds:.1f} s",
                flush=True,
            )
        rows.setdefault("middle of the space", []).append(outcomes(network_task(name), NUM_STEPS, middle, fresh) | {"paid": 0})
        for optimizer in FREE:
            found = outcomes(free_task(name, optimizer), NUM_STEPS, {}, fresh)
            rows.setdefault(f"`{optimizer}`", []).append(found | {"paid": 1})
    lines = [
        f"{name}: {NUM_STEPS} steps, {arguments.seeds} seeds, judged on {arguments.fresh} fresh keys; a hypergradient "
        f"counted as {ratio:.1f} trainings; median [range]",
        "",
        "| search | validation loss, fresh keys | test loss, fresh keys | test error | trainings' worth | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row, found in rows.items():
        column = lambda key, form, found=found: spread([each[key] for each in found], form)
        cells = [
            column("validation loss", ".3f"),
            column("test loss", ".3f"),
            column("test error", ".2%"),
            f"{found[0]['paid']}",
        ]
        lines.append(f"| {row} | {' | '.join(cells)} | {column('seconds', '.0f') if 'seconds' in found[0] else ''} |")
    ours = [each["validation loss"] for each in rows["hypergradient descent"]]
    for row in SEARCHES:
        if row != "hypergradient descent":
            wins = sum(a < b["validation loss"] for a, b in zip(ours, rows[row], strict=True))
            lines.append(f"\nhypergradient descent against {row}, validation loss: lower in {wins} of {len(ours)} seeds")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--problems", default="digits,breast_cancer", help="data sets, with commas between; mnist5k is to be fetched"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=250, help="trainings")
    parser.add_argument("--ratio", type=float, default=4.0, help="trainings that a hypergradient counts as; 0: measure")
    parser.add_argument("--fresh", type=int, default=64, help="fresh keys to judge by")
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.budget, arguments.fresh = 1, 40, 8
    jh.prepare_jax()
    lines: list[str] = []
    for name in arguments.problems.split(","):
        lines += [*table(name, arguments), ""]
        print("\n".join(lines), flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
