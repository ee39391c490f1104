"""Whole tuning jobs beside Optuna and hyperoptax: wall-clock to the loss that Optuna reaches, and the winner's test metric.

    python -m experiments.peers_studies [--problems digits letter] [--seeds 5] [--trainings 256] [--out peers_studies.md]

Everyone tunes the same network on the same data in the same space, trains it by the same functions (``jaxhpo.Task``), jitted
once, and may spend the training steps of ``--trainings`` full trainings. The peers are driven as their documentation does:

    optuna-tpe       ``TPESampler`` and ``MedianPruner``, one trial after the other, the loss reported every round
    optuna-tpe-2     the same with ``n_jobs=2``
    optuna-tpe-hb    ``TPESampler`` and ``HyperbandPruner``, its pruner for this sampler by its own tutorial
    optuna-gp        ``GPSampler``, whole trainings, ``--gp-trainings`` of them: each proposal costs more than the one before
    hyperoptax       ``BayesianSearch``, batches of eight under ``vmap``, whole trainings, as many as for ``optuna-gp``
    predictive-tpe   ours: ``PredictiveStopping(TPE)`` on 4 lanes, two a core: few, so that each proposal knows of most others
    asha-tpe         ours: ``ASHA(TPE)`` on 4 lanes
    asha-tpe-16      the same on 16 lanes
    asha-tpe-plain   on 4 lanes, with the densities that are TPE's default
    asha-pso         ours: ``ASHA(PSO)`` on 16 lanes
    bayesopt         ours: ``BayesOpt`` on 8 lanes, as many trainings as ``optuna-gp``

Every study runs in a process of its own, without a compile cache, one after the other in turns. The target of a seed is the
best loss of a whole training that ``optuna-tpe`` found with it, and its time is when it first had it; ours may go on for four
times the steps to reach it, but their winners and the time of their whole search are those at equal steps. Times are told
without and with compilation. Winners are trained again on the same fresh seeds. The steps of a trial of ours are charged when
it ends: at equal steps those under way, one a lane at most, are not.

The settings of TPE within ours were chosen on these problems, tumours, mixer and news with seeds below 50, the stopping rule of
``predictive-tpe`` on digits with seeds 10 to 41 and on letter with 10 to 25, its ``max_good`` on both with 10 to 25; the peers
have their defaults. Hence the first seed told is 50.

``--again`` tells of everyone's second study instead: a study of another seed fills a compile cache before those that count.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jaxhpo as jh
from experiments.peers_bayes import WIDE
from experiments.ranks import HIGHER_IS_BETTER, PROBLEMS, tpe
from jaxhpo.analysis.format import interval, number
from jaxhpo.analysis.statistics import mean_interval, paired_comparison

OVERTIME = 4
"""Times the steps of the others that ours may take to reach the target."""
FEW = ("optuna-gp", "hyperoptax", "bayesopt")
"""Those that get ``--gp-trainings`` full trainings."""


class Curve:
    """When which loss of a whole training was known: seconds after the search began, compiled; loss; steps spent."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float, int]] = []
        self.best: tuple[float, dict[str, Any]] = (math.inf, {})
        self.begun = time.perf_counter()

    def add(self, loss: float, hparams: dict[str, Any], steps: int, seconds: float | None = None, counts: bool = True) -> None:
        when = time.perf_counter() - self.begun if seconds is None else seconds
        if math.isfinite(loss):
            self.points.append((when, loss, steps))
            self.best = min(self.best, (loss, hparams), key=lambda pair: pair[0]) if counts else self.best


def stepwise(training: Any, round_steps: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``begin(key, hparams)`` and ``advance(key, hparams, state, done)``, which trains one round: state and loss."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def begin(task: Any, key: Any, hparams: Any) -> Any:
        return task.init(jax.random.fold_in(key, 0), hparams)

    @jax.jit
    def advance(task: Any, key: Any, hparams: Any, state: Any, done: Any) -> Any:
        step = lambda i, state: task.step(jax.random.fold_in(key, 1 + done + i), hparams, state)
        state = jax.lax.fori_loop(0, jnp.minimum(round_steps, training.num_steps - done), step, state)
        return state, task.evaluate(hparams, state)["loss"]

    task = jax.device_put(training.task)
    return functools.partial(begin, task), functools.partial(advance, task)


def suggested(space: Any, trial: Any) -> dict[str, Any]:
    """A trial of Optuna in the same space; a traced choice arrives as its index."""
    found = {}
    for row in space.describe():
        name = row["name"]
        if row["type"] == "choice":
            found[name] = trial.suggest_categorical(name, list(range(len(row["options"]))))
        else:
            suggest = trial.suggest_int if row["type"] == "int" else trial.suggest_float
            found[name] = suggest(name, row["low"], row["high"], log=row["log"])
    return found


def as_floats(hparams: dict[str, Any]) -> dict[str, Any]:
    """Arrays of one dtype for each kind, so that no trial compiles anew."""
    return {name: np.int32(x) if isinstance(x, int) else np.float32(x) for name, x in hparams.items()}


def run_optuna(training: Any, space: Any, seed: int, trainings: int, way: str) -> tuple[Curve, float]:
    import jax
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    gaussian = way == "optuna-gp"
    sampler = optuna.samplers.GPSampler(seed=seed) if gaussian else optuna.samplers.TPESampler(seed=seed)
    round_steps = training.steps_per_round or -(-training.num_steps // 10)
    if gaussian:
        pruner = optuna.pruners.NopPruner()
    elif way == "optuna-tpe-hb":
        pruner = optuna.pruners.HyperbandPruner(min_resource=round_steps, max_resource=training.num_steps)
    else:
        pruner = optuna.pruners.MedianPruner()
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    began = time.perf_counter()
    begin, advance = stepwise(training, round_steps)
    middle = as_floats(suggested(space, optuna.create_study().ask()))
    jax.block_until_ready(advance(jax.random.key(0), middle, begin(jax.random.key(0), middle), 0))
    compile_seconds = time.perf_counter() - began
    curve, steps, lock = Curve(), [0], threading.Lock()

    def objective(trial: Any) -> float:
        told = suggested(space, trial)
        hparams, key, done = as_floats(told), jax.random.fold_in(jax.random.key(seed), trial.number), 0
        state = begin(key, hparams)
        while done < training.num_steps:
            state, loss = advance(key, hparams, state, done)
            taken = min(round_steps, training.num_steps - done)
            done, loss = done + taken, float(loss)
            with lock:
                steps[0] += taken
            if not math.isfinite(loss):
                raise optuna.TrialPruned
            if not gaussian:
                trial.report(loss, done)
                if done < training.num_steps and trial.should_prune():
                    raise optuna.TrialPruned
        curve.add(loss, told, steps[0])
        return loss

    def over(study: Any, trial: Any) -> None:
        if steps[0] >= trainings * training.num_steps:
            study.stop()

    study.optimize(objective, callbacks=[over], n_jobs=2 if way == "optuna-tpe-2" else 1)
    return curve, compile_seconds


def run_hyperoptax(training: Any, space: Any, seed: int, trainings: int, way: str) -> tuple[Curve, float]:
    import jax
    import jax.numpy as jnp

    package: Any = importlib.import_module("hyperoptax")
    lanes, spec = 8, space.spec
    cube = [package.LinearSpace(0.0, 1.0) for _ in range(spec.num_dims)]
    state, search = package.BayesianSearch.init(cube, n_max=trainings, n_parallel=lanes, maximize=False)
    ask, tell = jax.jit(search.get_next_params), jax.jit(search.update_state)

    @jax.jit
    def train(task: Any, keys: Any, points: Any) -> Any:
        def one(key: Any, point: Any) -> Any:
            hparams = space.decode(point)
            step = lambda i, state: task.step(jax.random.fold_in(key, 1 + i), hparams, state)
            trained = jax.lax.fori_loop(0, training.num_steps, step, task.init(jax.random.fold_in(key, 0), hparams))
            return task.evaluate(hparams, trained)["loss"]

        return jax.vmap(one)(keys, points)

    task, key = jax.device_put(training.task), jax.random.key(seed)
    began = time.perf_counter()
    trained = train.lower(task, jax.random.split(key, lanes), jnp.zeros((lanes, spec.num_dims))).compile()
    jax.block_until_ready(tell(state, key, jnp.zeros(lanes), ask(state, key)))
    compile_seconds = time.perf_counter() - began
    curve, worst = Curve(), 0.0
    for i in range(trainings // lanes):
        asked = ask(state, jax.random.fold_in(key, 3 * i))
        points = np.stack([np.asarray(x).reshape(lanes) for x in asked], axis=1)
        drawn = np.random.default_rng((seed, i)).random(points.shape)
        points = np.where(np.isfinite(points).all(1, keepdims=True), points, drawn)  # a matrix without a factor
        points = np.stack([np.asarray(spec.snap(point.astype(np.float32))) for point in points])
        losses = np.asarray(trained(task, jax.random.split(jax.random.fold_in(key, 3 * i + 1), lanes), points))
        sound = np.isfinite(losses)
        worst = max(worst, float(losses[sound].max(initial=0.0)))
        told = [jnp.asarray(points[:, d : d + 1].reshape(np.asarray(x).shape)) for d, x in enumerate(asked)]
        state = tell(state, jax.random.fold_in(key, 3 * i + 2), jnp.where(sound, losses, worst).astype(jnp.float32), told)
        for point, loss in zip(points, losses, strict=True):
            curve.add(float(loss), plain(jax.device_get(space.decode(point))), (i + 1) * lanes * training.num_steps)
    return curve, compile_seconds


def plain(hparams: Any) -> dict[str, Any]:
    return {name: np.asarray(x).item() for name, x in hparams.items()}


OURS: dict[str, Callable[[], Any]] = {
    "predictive-tpe": lambda: jh.PredictiveStopping(tpe(4, **WIDE, max_good=100)),
    "asha-tpe": lambda: jh.ASHA(tpe(4, **WIDE)),
    "asha-tpe-16": lambda: jh.ASHA(tpe(16, **WIDE)),
    "asha-tpe-plain": lambda: jh.ASHA(tpe(4)),
    "asha-pso": lambda: jh.ASHA(jh.PSO(num_lanes=16)),
    "bayesopt": lambda: jh.BayesOpt(num_lanes=8),
}


def run_ours(training: Any, space: Any, seed: int, trainings: int, way: str) -> tuple[Curve, float]:
    """Goes on beyond the steps of the others, to see when the target is reached; the winner is the best within theirs."""
    allowed = trainings * training.num_steps
    most = allowed if way in FEW else OVERTIME * allowed
    study = jh.Study(training, space, OURS[way](), seed=seed, metric="loss", max_steps=most)
    result = jh.run_study(study)
    curve, trials = Curve(), result.trials
    choices = {row["name"]: list(row["options"]) for row in space.describe() if row["type"] == "choice"}
    order = np.argsort(trials["seconds"], kind="stable")
    steps = np.cumsum((trials["steps"] - trials["start"])[order])
    for i, spent in zip(order, steps, strict=True):
        if trials["whole"][i] and not trials["diverged"][i]:
            told = {row["name"]: trials[f"hparams.{row['name']}"][i] for row in space.describe()}
            told = {k: choices[k].index(x) if k in choices else np.asarray(x).item() for k, x in told.items()}
            curve.add(float(trials["loss"][i]), told, int(spent), float(trials["seconds"][i]), counts=spent <= allowed)
    last = order[np.searchsorted(steps, allowed, side="right") - 1]
    curve.begun = time.perf_counter() - float(trials["seconds"][last])
    return curve, result.compile_seconds


RUNNERS: dict[str, Callable[..., tuple[Curve, float]]] = {
    "optuna-tpe": run_optuna,
    "optuna-tpe-2": run_optuna,
    "optuna-tpe-hb": run_optuna,
    "optuna-gp": run_optuna,
    "hyperoptax": run_hyperoptax,
    **dict.fromkeys(OURS, run_ours),
}


def work(way: str, problem: str, seed: int, trainings: int, fresh: int, again: bool) -> None:
    """One study in this process; one JSON object on standard output."""
    import jax

    jh.prepare_jax(None if RUNNERS[way] is run_ours else 1)
    jax.config.update("jax_enable_compilation_cache", again)
    training, space = PROBLEMS[problem].training(), jh.Space(PROBLEMS[problem].space)
    curve, compile_seconds = RUNNERS[way](training, space, seed, trainings, way)
    told = {
        "points": [(when, loss, steps / training.num_steps) for when, loss, steps in curve.points],
        "seconds": time.perf_counter() - curve.begun,
        "compile_seconds": compile_seconds,
        "test": fresh_test(training, curve.best[1], PROBLEMS[problem].metric, fresh) if curve.points else None,
    }
    print(json.dumps(told), flush=True)


def fresh_test(training: Any, hparams: dict[str, Any], metric: str, fresh: int) -> float:
    """The mean test metric of a setting over fresh seeds, the same for everyone."""
    import jax

    @jax.jit
    def trained(task: Any, key: Any, hparams: Any) -> Any:
        step = lambda i, state: task.step(jax.random.fold_in(key, 1 + i), hparams, state)
        state = jax.lax.fori_loop(0, training.num_steps, step, task.init(jax.random.fold_in(key, 0), hparams))
        return task.test(hparams, state)[metric]

    keys = jax.random.split(jax.random.key(2**31 - 1), fresh)
    return float(np.mean([float(trained(training.task, key, as_floats(hparams))) for key in keys]))


def reached(points: list[tuple[float, float, float]], target: float) -> tuple[float, float]:
    """The seconds and the full trainings after which a loss at or below the target was known; infinity if never."""
    return min(((when, spent) for when, loss, spent in points if loss <= target), default=(math.inf, math.inf))


def measured(problem: str, arguments: argparse.Namespace) -> list[str]:
    """A table of one problem."""
    environment = {name: x for name, x in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in arguments.ways}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        if arguments.again:
            for way in arguments.ways:
                studied(way, problem, arguments.first_seed + arguments.seeds, arguments, environment)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for way in arguments.ways:
                found[way].append(studied(way, problem, seed, arguments, environment))
    return table(problem, found, arguments)


def studied(way: str, problem: str, seed: int, arguments: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """What ``work`` tells of a study in a process of its own."""
    trainings = arguments.gp_trainings if way in FEW else arguments.trainings
    command = [sys.executable, "-m", "experiments.peers_studies", "--work", way, problem, str(seed), str(trainings)]
    command += ["--fresh", str(arguments.fresh), *(["--again"] if arguments.again else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} on {problem}, seed {seed}:\n{done.stderr[-2000:]}")
    one = json.loads(done.stdout.splitlines()[-1])
    best = min((loss for _, loss, _ in one["points"]), default=math.inf)
    told = {key: round(one[key], 2) for key in ("seconds", "compile_seconds")}
    print(problem, way, seed, round(best, 5), told, one["test"], file=sys.stderr, flush=True)
    return one


def table(problem: str, found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> list[str]:
    targets = [min((loss for _, loss, _ in one["points"]), default=-math.inf) for one in found["optuna-tpe"]]
    times, shares = {}, {}
    for way, runs in found.items():
        when_where = [reached(one["points"], target) for one, target in zip(runs, targets, strict=True)]
        times[way] = [when for when, _ in when_where]
        shares[way] = [spent / arguments.trainings for _, spent in when_where]
    metric = PROBLEMS[problem].metric
    few = ", ".join(way for way in found if way in FEW)
    few = f" ({few}: {arguments.gp_trainings})" if few else ""
    lines = [
        f"{problem}: {arguments.trainings} full trainings{few}, {arguments.seeds} seeds from {arguments.first_seed}"
        f"{', compiled by an earlier study' * arguments.again}; median [range]; test: mean [95 % interval] over seeds",
        "",
        "| who | whole search, s | to compile, s | to Optuna's target, s | and in steps, of the whole | faster than optuna-tpe "
        f"| with compilation | test {metric} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    each = []
    for way, runs in found.items():
        bare = [a / b for a, b in zip(times["optuna-tpe"], times[way], strict=True)]
        compiled = [
            (a + mine["compile_seconds"]) / (b + theirs["compile_seconds"])
            for a, mine, b, theirs in zip(times["optuna-tpe"], found["optuna-tpe"], times[way], runs, strict=True)
        ]
        cells = [
            spread([one["seconds"] for one in runs]),
            spread([one["compile_seconds"] for one in runs]),
            spread(times[way]),
            spread(shares[way]),
            spread(bare),
            spread(compiled),
            interval(mean_interval(tests_of(runs, metric))),
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
        if way != "optuna-tpe":
            each.append(f"Faster, {way}, seed by seed: {', '.join(number(ratio, 2) for ratio in bare)}.")
    lines += ["", *each, ""]
    higher = metric in HIGHER_IS_BETTER
    for way in found:
        against = "optuna-gp" if way in FEW else "optuna-tpe"
        if way == against or against not in found:
            continue
        sign = -1.0 if higher else 1.0
        a, b = ([sign * x for x in tests_of(found[name], metric)] for name in (way, against))
        one = paired_comparison(a, b)
        lines.append(
            f"Test {metric}, {way} against {against}: better in {one.wins} of {one.count}, p = {one.p_value:.2g} (the least "
            f"that so many seeds can give: {one.smallest_p:.2g})."
        )
    return lines


def tests_of(runs: list[dict[str, Any]], metric: str) -> list[float]:
    """The winners' test metrics; without a winner, or where it diverges, worse than any number."""
    worst = -math.inf if metric in HIGHER_IS_BETTER else math.inf
    return [worst if one["test"] is None or math.isnan(one["test"]) else one["test"] for one in runs]


def spread(values: list[float]) -> str:
    """Median and range; what was never reached is infinite."""
    told = lambda x: "never" if math.isinf(x) else number(x, 2)
    return f"{told(statistics.median(values))} [{told(min(values))} to {told(max(values))}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["digits", "letter"], choices=PROBLEMS)
    parser.add_argument("--ways", nargs="+", default=list(RUNNERS), choices=RUNNERS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=50, help="settings were chosen with those before it")
    parser.add_argument("--trainings", type=int, default=256, help="full trainings whose steps everyone may spend")
    parser.add_argument("--gp-trainings", type=int, default=64, help=f"the same for {', '.join(FEW)}")
    parser.add_argument("--fresh", type=int, default=16, help="fresh seeds for each winner")
    parser.add_argument("--again", action="store_true", help="with a compile cache that an earlier study filled")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=4, metavar=("WAY", "PROBLEM", "SEED", "TRAININGS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        way, problem, seed, trainings = arguments.work
        work(way, problem, int(seed), int(trainings), arguments.fresh, arguments.again)
        return
    if "optuna-tpe" not in arguments.ways:
        raise SystemExit("optuna-tpe sets the target: it must be among --ways")
    text = "\n".join(line for problem in arguments.problems for line in [*measured(problem, arguments), ""])
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
