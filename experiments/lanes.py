"""What the lane machine costs and gains: against a hand-written batch, against Optuna, and with an empty task.

    python -m experiments.lanes [--repeats 7] [--out lanes.md]

Workers that differ in the number of devices run in processes of their own and take turns, so that a drift of the
machine's speed falls on all of them alike; ratios are taken turn by turn.

    ideal      one ``jit(vmap(scan))`` of the same training by hand: 64 lanes, one device
    lanes 1    a study of the same training, 64 lanes, held to one device
    lanes all  the same, one virtual device a core
    optuna     an Optuna loop (random sampler) that calls the same training, jitted once, once a trial
    empty      a study whose task does nothing, 64 lanes, record on: the driver's own cost a trial
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LANES, STEPS, TRIALS = 64, 300, 128
WORKERS = ("ideal", "lanes 1", "lanes all", "optuna", "empty")


def gentle_space() -> Any:
    """The digits' space without the learning rates that diverge, so that every trial trains all its steps."""
    import jaxhpo as jh

    return jh.Space(
        {
            "learning_rate": jh.Float(1e-3, 0.2, log=True),
            "momentum": jh.Float(0.0, 0.9),
            "weight_decay": jh.Float(1e-6, 1e-2, log=True),
            "label_smoothing": jh.Float(0.0, 0.3),
            "width": jh.Int(8, 128, log=True),
        }
    )


def ideal() -> Callable[[], float]:
    """Inner steps a second of the batch that one would write by hand for this one training."""
    import jax

    from experiments.digits import nnx_mlp

    task, space = nnx_mlp(num_steps=STEPS).task, gentle_space()

    @jax.jit
    def batch(task, keys, cubes):
        def trial(key, cube):
            hparams, (init_key, steps_key) = space.decode(cube), jax.random.split(key)
            step = lambda state, key: (task.step(key, hparams, state), None)
            state, _ = jax.lax.scan(step, task.init(init_key, hparams), jax.random.split(steps_key, STEPS))
            return task.evaluate(hparams, state)

        return jax.vmap(trial)(keys, cubes)

    def run() -> float:
        began = time.perf_counter()
        for seed in range(TRIALS // LANES):
            key = jax.random.key(seed)
            jax.block_until_ready(batch(task, jax.random.split(key, LANES), jax.random.uniform(key, (LANES, space.num_dims))))
        return TRIALS * STEPS / (time.perf_counter() - began)

    return run


def lanes() -> Callable[[], float]:
    """Inner steps a second of a study, record on."""
    import jaxhpo as jh
    from experiments.digits import nnx_mlp

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            result = jh.minimize(
                nnx_mlp(num_steps=STEPS), gentle_space(), jh.RandomSearch(num_lanes=LANES),
                key=0, num_trials=TRIALS, metric="loss", record=Path(folder) / "s",
            )  # fmt: skip
        assert not result.trials["diverged"].any()
        return TRIALS * STEPS / result.run_seconds

    return run


def optuna_loop() -> Callable[[], float]:
    """Inner steps a second of Optuna around the same training, jitted once."""
    import jax
    import optuna

    from experiments.digits import nnx_mlp

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    task = nnx_mlp(num_steps=STEPS).task

    @jax.jit
    def train(task, key, hparams):
        init_key, steps_key = jax.random.split(key)
        step = lambda state, key: (task.step(key, hparams, state), None)
        state, _ = jax.lax.scan(step, task.init(init_key, hparams), jax.random.split(steps_key, STEPS))
        return task.evaluate(hparams, state)["loss"]

    def objective(trial: optuna.Trial) -> float:
        hparams = {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 0.2, log=True),
            "momentum": trial.suggest_float("momentum", 0.0, 0.9),
            "weight_decay": trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True),
            "label_smoothing": trial.suggest_float("label_smoothing", 0.0, 0.3),
            "width": trial.suggest_int("width", 8, 128, log=True),
        }
        return float(train(task, jax.random.key(trial.number), hparams))

    def run() -> float:
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        began = time.perf_counter()
        study.optimize(objective, n_trials=TRIALS // 4)
        return TRIALS // 4 * STEPS / (time.perf_counter() - began)

    return run


def empty() -> Callable[[], float]:
    """Trials a second of a study whose task does nothing."""
    import jaxhpo as jh

    space, trials = gentle_space(), 200 * LANES

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            result = jh.minimize(
                nothing, space, jh.RandomSearch(num_lanes=LANES), key=0, num_trials=trials, record=Path(folder) / "s"
            )
        return trials / result.run_seconds

    return run


def nothing(key, hparams):
    """The empty task."""
    return 0.0


def work(worker: str) -> None:
    """A worker: one line of output for every line of input."""
    import jaxhpo as jh

    jh.prepare_jax(None if worker in ("lanes all", "empty") else 1)
    run = {"ideal": ideal, "lanes 1": lanes, "lanes all": lanes, "optuna": optuna_loop, "empty": empty}[worker]()
    run()  # compiles
    print("ready", flush=True)
    for _ in sys.stdin:
        print(run(), flush=True)


def spread(values: list[float], form: str) -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", choices=WORKERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    command = [sys.executable, "-m", "experiments.lanes", "--work"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    workers: dict[str, Any] = {}
    for name in WORKERS:  # one after the other: they must not compile side by side
        workers[name] = subprocess.Popen([*command, name], **pipes)
        assert workers[name].stdout.readline().strip() == "ready", name
    figures: dict[str, list[float]] = {name: [] for name in WORKERS}
    for _ in range(arguments.repeats):
        for name, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            figures[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    ratio = lambda a, b: spread([x / y for x, y in zip(figures[a], figures[b], strict=True)], ".2f")
    lines = [
        f"{LANES} lanes, {STEPS} steps of the digits network, {arguments.repeats} turns; median [range]",
        "",
        "| what | inner steps a second |",
        "|---|---|",
        *(f"| {name} | {spread(figures[name], ',.0f')} |" for name in WORKERS[:4]),
        "",
        "| ratio | measured | wanted |",
        "|---|---|---|",
        f"| lanes on all cores / ideal | {ratio('lanes all', 'ideal')} | 1.6 |",
        f"| lanes on one device / ideal | {ratio('lanes 1', 'ideal')} | 0.95 |",
        f"| lanes on all cores / Optuna loop | {ratio('lanes all', 'optuna')} | 2 |",
        f"| driver, microseconds a trial | {spread([1e6 / x for x in figures['empty']], '.0f')} | below 100 |",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
