"""Bayesian optimization and TPE beside Optuna's, BoTorch's and hyperoptax's: same problems, first points and evaluations.

    python -m experiments.peers_bayes --cells runs/bayes --out peers_bayes.md [--hyperoptax-python PATH]

Every method minimises the same compiled functions, ``--evaluations`` times from ten first points; the peers begin with the
same ten points of a scrambled Sobol sequence, drawn with the seed, ours with those that their own key draws. The functions
are evaluated in float64 (the trainings of ``experiments/trainings.py`` in float32, with one key, so that they are
deterministic). Ours propose in float32 unless ``--float64`` is given. What counts is the simple regret: the loss without
noise at the evaluated point whose observed loss is the lowest, less the optimum; for trainings less the lowest loss that
any method in the folder found.

Peers, with their documented defaults where they have them. All are told the worst finite loss so far where a trial diverged;
of a failed trial Optuna's GP learns nothing, and it would propose nearly the same point until the end.

- Optuna's ``GPSampler`` and ``TPESampler`` in the native space, first points by ``enqueue_trial``.
- BoTorch has no defaults: ``SingleTaskGP`` (its own priors, noise inferred, outcomes standardised) on the unit cube,
  ``qLogExpectedImprovement`` with q = 1, ``optimize_acqf`` with 8 restarts from 256 raw samples. With integers or choices
  ``optimize_acqf_mixed_alternating`` over the levels (BoTorch relaxes and rounds integers of more than 20 levels), with
  choices ``MixedSingleTaskGP``; there 5 restarts from 128 raw samples, and at most 200 steps of the fit of the mixed model,
  which would otherwise take ten seconds a suggestion.
- hyperoptax's ``BayesianSearch`` with n_parallel = 1 on the unit cube, told the raw losses; an integer or a choice is the
  level in which its coordinate lies, and the coordinate told is the middle of that level.

A peer that is not installed drops out with one line on stderr. Every result is kept as one JSON file in ``--cells``; what is
there is not run again, so that a stopped run goes on, and methods may be run by other commands and environments.
The problems ``HELD_BACK`` are for choosing defaults and are not reported; experiments/README.md says where ours owe anything
to a reported one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUM_INITIAL = 10
RESOLUTION = 1e-7
"""Regrets below this count as this: the optima are known to about eight digits."""


def make_problem(name: str) -> Any:
    """The problem of that name. Those held back are moved off the middle of their box."""
    from experiments.trainings import TRAININGS
    from jaxhpo.benchmarks import functions as f

    if name in TRAININGS:
        return TRAININGS[name]()

    def shift(num_dims: int, low: float, high: float) -> Any:
        return np.random.default_rng(num_dims).uniform(low, high, num_dims)

    problems: dict[str, Callable[[], Any]] = {
        "branin": f.branin,
        "hartmann6": f.hartmann6,
        "ackley-10": lambda: f.ackley(10),
        "rosenbrock-8": lambda: f.rosenbrock(8),
        "mixed_integer-6": lambda: f.mixed_integer(6),
        "levy-20": lambda: f.levy(20),
        "integer_waves-5": lambda: f.integer_waves(5),
        "categorical-8": lambda: f.categorical(8, 4),
        "noisy_hartmann6": lambda: f.noisy(f.hartmann6(), 0.1),
        "six_hump_camel": f.six_hump_camel,
        "hartmann4": f.hartmann4,
        "trid-6": lambda: f.trid(6),
        "powell-8": lambda: f.powell(8, shift=shift(8, -2.0, 3.0)),
        "alpine-12": lambda: f.alpine(12, shift=shift(12, -4.0, 4.0)),
        "levy_on_integers-6": lambda: f.on_integers(f.levy(6, shift=shift(6, -5.0, 5.0)), 21),
        "chosen_sums": f.chosen_sums,
        "noisy_hartmann4": lambda: f.noisy(f.hartmann4(), 0.15),
        "noisy_levy-4": lambda: f.noisy(f.levy(4, shift=shift(4, -5.0, 5.0)), 1.0),
        "styblinski_tang-5": lambda: f.styblinski_tang(5, shift=shift(5, -1.5, 1.5)),
        "griewank-4": lambda: f.griewank(4, shift=shift(4, -20.0, 60.0)),
        "schwefel-3": lambda: f.schwefel(3),
        "zakharov-6": lambda: f.zakharov(6, shift=shift(6, -2.0, 6.0)),
        "dixon_price-6": lambda: f.dixon_price(6),
        "michalewicz-5": lambda: f.michalewicz(5),
        "ellipsoid-10": lambda: f.ellipsoid(10, shift=shift(10, -3.0, 7.0)),
        "goldstein_price": f.goldstein_price,
        "shekel": f.shekel,
        "hartmann3": f.hartmann3,
        "cosine_mixture-4": lambda: f.cosine_mixture(4, shift=shift(4, -0.7, 0.7)),
        "network_like-6": lambda: f.network_like(6),
        "noisy_styblinski_tang-4": lambda: f.noisy(f.styblinski_tang(4, shift=shift(4, -1.5, 1.5)), 2.0),
        "noisy_cosine_mixture-4": lambda: f.noisy(f.cosine_mixture(4, shift=shift(4, -0.7, 0.7)), 0.1),
        "noisy_hartmann3": lambda: f.noisy(f.hartmann3(), 0.1),
        "noisy_michalewicz-5": lambda: f.noisy(f.michalewicz(5), 0.1),
        "categorical-6": lambda: f.categorical(6, 5, seed=1),
        "rastrigin_on_integers-4": lambda: f.on_integers(f.rastrigin(4, shift=shift(4, -3.0, 7.0)), 21),
        "sphere-15": lambda: f.sphere(15, shift=shift(15, -3.0, 7.0)),
        "rosenbrock-4": lambda: f.rosenbrock(4, shift=shift(4, -3.0, 4.0)),
        "ackley-5": lambda: f.ackley(5, shift=shift(5, -3.0, 7.0)),
    }
    return problems[name]()


TRAINED = ("digits", "breast_cancer", "diabetes", "wine")
REPORTED = (
    "branin",
    "hartmann6",
    "ackley-10",
    "rosenbrock-8",
    "mixed_integer-6",
    "levy-20",
    "integer_waves-5",
    "categorical-8",
    "noisy_hartmann6",
    *TRAINED[:3],
)
FRESH = (
    "six_hump_camel",
    "hartmann4",
    "trid-6",
    "powell-8",
    "alpine-12",
    "levy_on_integers-6",
    "chosen_sums",
    "noisy_hartmann4",
    "noisy_levy-4",
    "wine",
)
"""Reported, and not run with ours before its defaults were settled."""
HELD_BACK = (
    "styblinski_tang-5",
    "griewank-4",
    "schwefel-3",
    "zakharov-6",
    "dixon_price-6",
    "michalewicz-5",
    "ellipsoid-10",
    "goldstein_price",
    "shekel",
    "hartmann3",
    "cosine_mixture-4",
    "network_like-6",
    "noisy_styblinski_tang-4",
    "noisy_cosine_mixture-4",
    "noisy_hartmann3",
    "noisy_michalewicz-5",
    "categorical-6",
    "rastrigin_on_integers-4",
    "sphere-15",
    "rosenbrock-4",
    "ackley-5",
)
"""For choosing defaults of ours only: a default chosen on a reported problem would be fitted to the report."""


class Objective:
    """A problem as the methods see it: every call is one evaluation, and all are kept.

    Attributes:
        space: where.
        observed: what the method was told, one loss an evaluation.
        noiseless: the loss without noise at the same points.
    """

    def __init__(self, name: str, seed: int) -> None:
        self.problem, self.of_hparams, self.of_cube, self.in_float64 = compiled(name)
        self.space, self.seed = self.problem.space, seed
        self.observed: list[float] = []
        self.noiseless: list[float] = []

    def _evaluate(self, function: Any, point: Any) -> float:
        import jax

        with jax.enable_x64(self.in_float64):
            observed, noiseless = function(self.seed, len(self.observed), point)
            self.observed.append(float(observed))
            self.noiseless.append(float(noiseless))
        return self.observed[-1]

    def at(self, hparams: Any) -> float:
        """The loss of decoded hyperparameters, whatever their precision."""
        wide = np.float64 if self.in_float64 else np.float32
        return self._evaluate(self.of_hparams, map_floats(lambda leaf: leaf.astype(wide), hparams))

    def at_cube(self, cube: np.ndarray) -> float:
        """The loss at a point of the unit cube, ``[D]``, decoded in the precision of the function."""
        return self._evaluate(self.of_cube, np.asarray(cube, np.float64 if self.in_float64 else np.float32))


def map_floats(function: Callable[[np.ndarray], np.ndarray], tree: Any) -> Any:
    """The tree with its floating arrays changed, as NumPy arrays."""
    import jax

    arrays = jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda leaf: function(leaf) if np.issubdtype(leaf.dtype, np.floating) else leaf, arrays)


@functools.cache
def compiled(name: str) -> tuple[Any, Any, Any, bool]:
    """The problem, its losses (observed, without noise) of hyperparameters and of a point, and whether in float64."""
    import jax

    problem, trained = make_problem(name), name in TRAINED

    def of_hparams(seed: Any, number: Any, hparams: Any) -> Any:
        key = jax.random.key(0) if trained else jax.random.fold_in(jax.random.key(seed), number)
        observed = problem.loss(key, hparams)
        return observed, observed if problem.without_noise is None else problem.noiseless(key, hparams)

    def of_cube(seed: Any, number: Any, cube: Any) -> Any:
        return of_hparams(seed, number, problem.space.decode(cube))

    return problem, jax.jit(of_hparams), jax.jit(of_cube), not trained


def first_points(objective: Objective) -> np.ndarray:
    """The points the peers begin with, ``f64[NUM_INITIAL, D]``, integers and choices in the middle of their level."""
    from scipy.stats import qmc

    spec = objective.space.spec
    return snapped(spec, qmc.Sobol(spec.num_dims, scramble=True, rng=objective.seed).random_base2(4)[:NUM_INITIAL])


def snapped(spec: Any, points: np.ndarray) -> np.ndarray:
    """The same points in float64 with integers and choices in the middle of their level."""
    import jax

    with jax.enable_x64(True):
        return np.asarray(spec.snap(np.asarray(points, np.float64)), np.float64)


def worst_for_nan(losses: list[float]) -> np.ndarray:
    """Losses with NaN replaced by the highest finite one, for peers that cannot take a NaN."""
    array = np.array(losses)
    finite = array[np.isfinite(array)]
    return np.where(np.isfinite(array), array, finite.max() if finite.size else 0.0)


@functools.cache
def our_programs(name: str, num_lanes: int = 1, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """The optimizer with its functions, compiled once for all seeds."""
    import jax

    from jaxhpo.optimizers import load

    if name == "BayesOpt":
        settings["num_initial"] = NUM_INITIAL
    optimizer = load(name)(num_lanes=num_lanes, **settings)
    return optimizer, jax.jit(optimizer.init, static_argnums=1), jax.jit(optimizer.ask), jax.jit(optimizer.update)


def our_start(optimizer: Any, init: Any, key: Any, spec: Any, evaluations: int) -> Any:
    """A state for so many evaluations, in float64 where that is enabled."""
    import jax
    import jax.numpy as jnp

    from jaxhpo.study.room import with_room

    kind = jnp.zeros(()).dtype
    state = jax.tree.map(lambda x: x.astype(kind) if jnp.issubdtype(x.dtype, jnp.floating) else x, init(key, spec))
    return with_room(optimizer, state, evaluations)


def run_ours(name: str, objective: Objective, evaluations: int, **settings: Any) -> None:
    import jax
    import jax.numpy as jnp

    from jaxhpo.core import Feedback

    optimizer, init, ask, update = our_programs(name, **settings)
    key = jax.random.key(objective.seed)
    state = our_start(optimizer, init, jax.random.fold_in(key, 0), objective.space.spec, evaluations)
    decode = jax.jit(objective.space.decode)
    for i in range(evaluations):
        ask_key, update_key = jax.random.split(jax.random.fold_in(key, 1 + i))
        query = ask(ask_key, state)
        loss = objective.at(decode(query.cube[0]))
        state = update(update_key, state, query, Feedback.finished(jnp.array([loss], query.cube.dtype)))


def optuna_point(row: dict[str, Any], hparam: Any) -> dict[str, Any]:
    """What Optuna is given for one leaf: a value for each element, choices by their index."""
    values = np.asarray(hparam).ravel()
    if row["type"] == "float":  # decoding in another precision than that of the bounds may step over them
        values = np.clip(values, row["low"], row["high"])
    return {f"{row['name']}.{i}": value for i, value in enumerate(values.tolist())}


def optuna_suggest(row: dict[str, Any], trial: Any) -> np.ndarray:
    """The leaf that a trial asks for."""
    count = math.prod(row["shape"])
    if row["type"] == "float":
        values = [trial.suggest_float(f"{row['name']}.{i}", row["low"], row["high"], log=row["log"]) for i in range(count)]
    elif row["type"] == "int":
        values = [trial.suggest_int(f"{row['name']}.{i}", row["low"], row["high"], log=row["log"]) for i in range(count)]
    else:
        values = [trial.suggest_categorical(f"{row['name']}.{i}", range(len(row["options"]))) for i in range(count)]
    kind = np.float64 if row["type"] == "float" else np.int32
    return np.array(values, kind).reshape(row["shape"])


def run_optuna(sampler: str, objective: Objective, evaluations: int) -> None:
    import jax
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=getattr(optuna.samplers, sampler)(seed=objective.seed))
    rows = objective.space.describe()
    with jax.enable_x64(True):
        first = [jax.device_get(objective.space.decode_arrays(point)) for point in first_points(objective)]
    for arrays in first:
        study.enqueue_trial({k: v for row, leaf in zip(rows, arrays, strict=True) for k, v in optuna_point(row, leaf).items()})
    for _ in range(evaluations):
        trial = study.ask()
        objective.at(objective.space.assemble([optuna_suggest(row, trial) for row in rows]))
        study.tell(trial, float(worst_for_nan(objective.observed)[-1]))


def botorch_suggestion(spec: Any, points: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The next point of BoTorch, ``f64[D]``, after the evaluated points ``[N, D]`` with their losses."""
    import torch
    from botorch.acquisition import qLogExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import MixedSingleTaskGP, SingleTaskGP
    from botorch.optim import optimize_acqf
    from botorch.optim.optimize_mixed import optimize_acqf_mixed_alternating
    from gpytorch.mlls import ExactMarginalLogLikelihood

    x, y = torch.from_numpy(points), torch.from_numpy(-losses)[:, None]
    levels = {i: level_middles(spec, i) for i in np.flatnonzero(~spec.is_float).tolist()}
    choices = np.flatnonzero(spec.is_choice).tolist()
    model = MixedSingleTaskGP(x, y, cat_dims=choices) if choices else SingleTaskGP(x, y)
    limit = {"options": {"maxiter": 200}} if choices else None
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model), optimizer_kwargs=limit)
    acquisition = qLogExpectedImprovement(model, best_f=y.max())
    ends = [(levels[i][0], levels[i][-1]) if i in levels else (0.0, 1.0) for i in range(spec.num_dims)]
    bounds = torch.tensor(ends, dtype=torch.float64).T
    if not levels:
        found = optimize_acqf(acquisition, bounds, q=1, num_restarts=8, raw_samples=256)[0]
    else:
        found = optimize_acqf_mixed_alternating(
            acquisition,
            bounds,
            discrete_dims={i: values for i, values in levels.items() if i not in choices},
            cat_dims={i: levels[i] for i in choices},
            q=1,
            num_restarts=5,
            raw_samples=128,
        )[0]
    return found[0].numpy()


def level_middles(spec: Any, dim: int) -> list[float]:
    """The middle of every level of one dimension of the cube."""
    import jax

    level = np.zeros((spec.levels[dim], spec.num_dims), np.int32)
    level[:, dim] = np.arange(spec.levels[dim])
    with jax.enable_x64(True):
        return np.asarray(spec.cube_of(level), np.float64)[:, dim].tolist()


def run_botorch(objective: Objective, evaluations: int) -> None:
    import torch

    torch.manual_seed(objective.seed)
    torch.set_num_threads(1)
    spec = objective.space.spec
    points = list(first_points(objective))
    for point in points:
        objective.at_cube(point)
    while len(points) < evaluations:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optimizations that stop early, and duplicate points of discrete spaces
            point = botorch_suggestion(spec, np.array(points), worst_for_nan(objective.observed))
        points.append(snapped(spec, point))
        objective.at_cube(points[-1])


@functools.cache
def hyperoptax_programs(num_dims: int, evaluations: int) -> tuple[Any, Any, Any]:
    """Its first state and its functions, compiled once for all seeds."""
    import jax

    package: Any = importlib.import_module("hyperoptax")
    space = [package.LinearSpace(0.0, 1.0) for _ in range(num_dims)]
    state, search = package.BayesianSearch.init(space, n_max=evaluations, n_parallel=1, maximize=False)
    return state, jax.jit(search.get_next_params), jax.jit(search.update_state)


def run_hyperoptax(objective: Objective, evaluations: int) -> None:
    import jax
    import jax.numpy as jnp

    spec = objective.space.spec
    state, ask, tell = hyperoptax_programs(spec.num_dims, evaluations)
    key, rng = jax.random.key(objective.seed), np.random.default_rng(objective.seed)
    first = first_points(objective)
    for i in range(evaluations):
        if i < NUM_INITIAL:
            point = first[i].astype(np.float32)
        else:
            point = np.array(jax.device_get(ask(state, jax.random.fold_in(key, 2 * i)))).ravel()
            if not np.isfinite(point).all():  # a matrix that could not be factorised: a point at random
                point = rng.random(spec.num_dims, np.float32)
        point = np.asarray(spec.snap(point))
        objective.at_cube(point)
        loss = worst_for_nan(objective.observed)[-1:]
        state = tell(state, jax.random.fold_in(key, 2 * i + 1), jnp.asarray(loss, jnp.float32), jnp.asarray(point)[None])


WIDE: dict[str, Any] = {"equal_prior": True, "scott_factor": 1.0, "clip_good": 1.0}
"""Densities of TPE for noisy trainings: broad kernels, the prior alike in both."""
Runner = Callable[[Objective, int], None]
METHODS: dict[str, tuple[str, str, Runner]] = {
    "bayesopt": ("jaxhpo BayesOpt", "jaxhpo", functools.partial(run_ours, "BayesOpt")),
    "bayesopt-noisy": ("jaxhpo BayesOpt, noisy EI", "jaxhpo", functools.partial(run_ours, "BayesOpt", acquisition="noisy_ei")),
    "tpe": ("jaxhpo TPE", "jaxhpo", functools.partial(run_ours, "TPE")),
    "tpe-wide": ("jaxhpo TPE, wide", "jaxhpo", functools.partial(run_ours, "TPE", **WIDE)),
    "optuna-tpe": ("Optuna TPE", "optuna", functools.partial(run_optuna, "TPESampler")),
    "optuna-gp": ("Optuna GP", "optuna", functools.partial(run_optuna, "GPSampler")),
    "botorch": ("BoTorch", "botorch", run_botorch),
    "hyperoptax": ("hyperoptax", "hyperoptax", run_hyperoptax),
}
"""By name: the title of its column, the package it needs, and what runs it."""
OURS = {"bayesopt": "BayesOpt", "bayesopt-noisy": "BayesOpt", "tpe": "TPE", "tpe-wide": "TPE"}
EXTRA = ("bayesopt-noisy", "tpe-wide")
"""Run only when they are named."""
GAUSSIAN_PROCESSES = ("optuna-gp", "botorch", "hyperoptax")


def cell_path(folder: Path, method: str, problem: str, seed: int, arguments: argparse.Namespace) -> Path:
    precision = "-float64" if arguments.float64 and method in OURS else ""
    return folder / f"{method}{precision}--{problem}--{arguments.evaluations}--{seed}.json"


def why_missing(method: str) -> str | None:
    """Why a method cannot run here, None if it can."""
    from jaxhpo.errors import JaxhpoError
    from jaxhpo.optimizers import load

    package = METHODS[method][1]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    try:
        if method in OURS:
            load(OURS[method])
    except (JaxhpoError, ImportError) as error:
        return str(error)
    return None


def run_method(method: str, arguments: argparse.Namespace) -> None:
    """Every cell of a method that is not in the folder yet."""
    import jax

    jax.config.update("jax_enable_x64", arguments.float64 and method in OURS)
    for problem in arguments.problems:
        for seed in arguments.seeds:
            path = cell_path(arguments.cells, method, problem, seed, arguments)
            if path.exists():
                continue
            objective, started = Objective(problem, seed), time.perf_counter()
            METHODS[method][2](objective, arguments.evaluations)
            cell = {
                "method": method,
                "problem": problem,
                "seed": seed,
                "observed": objective.observed,
                "noiseless": objective.noiseless,
                "seconds": time.perf_counter() - started,
            }
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(cell))
            os.replace(part, path)
            found = returned(cell)
            print(f"{method:11} {problem} seed {seed}: {found:.6g}, {cell['seconds']:.1f} s", file=sys.stderr, flush=True)


def returned(cell: dict[str, Any]) -> float:
    """The loss without noise of the point with the lowest observed loss; NaN if every trial diverged."""
    observed = np.array(cell["observed"])
    return float("nan") if np.isnan(observed).all() else cell["noiseless"][int(np.nanargmin(observed))]


def in_other_python(python: str, method: str, arguments: argparse.Namespace) -> None:
    """The cells of a method from another environment, which reads this project from its source."""
    root = Path(__file__).resolve().parent.parent
    words = ["--methods", method, "--evaluations", arguments.evaluations, "--cells", arguments.cells.resolve()]
    words += ["--problems", ",".join(arguments.problems), "--seeds", ",".join(map(str, arguments.seeds)), "--run-only"]
    command = [python, "-m", "experiments.peers_bayes", *map(str, words)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    if done.returncode:
        print(f"{METHODS[method][0]} stopped early: {python} gave exit status {done.returncode}", file=sys.stderr)


def load_cells(arguments: argparse.Namespace) -> dict[str, dict[tuple[str, int], float]]:
    """The loss returned, by method and then by problem and seed; methods without any result are left out."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    for method in arguments.methods:
        for problem in arguments.problems:
            for seed in arguments.seeds:
                path = cell_path(arguments.cells, method, problem, seed, arguments)
                if path.exists():
                    found.setdefault(method, {})[problem, seed] = returned(json.loads(path.read_text()))
    return found


def lowest_found(problem: str, arguments: argparse.Namespace) -> float:
    """The lowest loss without noise of any evaluation of a problem in the folder, whoever made it."""
    cells = arguments.cells.glob(f"*--{problem}--{arguments.evaluations}--*.json")
    return min(float(np.nanmin(json.loads(path.read_text())["noiseless"])) for path in cells)


def regrets(arguments: argparse.Namespace) -> dict[str, dict[tuple[str, int], float]]:
    """The same above the optimum, no less than ``RESOLUTION``; infinite where every trial diverged."""
    losses = load_cells(arguments)
    known = {problem for of_method in losses.values() for problem, _ in of_method}
    best = {name: lowest_found(name, arguments) if name in TRAINED else compiled(name)[0].optimum for name in known}

    def above(problem: str, loss: float) -> float:
        return math.inf if math.isnan(loss) else max(loss - best[problem], RESOLUTION)

    return {
        method: {(problem, seed): above(problem, loss) for (problem, seed), loss in of_method.items()}
        for method, of_method in losses.items()
    }


def medians(of_method: dict[tuple[str, int], float]) -> dict[str, float]:
    """Over seeds, by problem."""
    problems = dict.fromkeys(problem for problem, _ in of_method)
    return {name: float(np.median([x for (problem, _), x in of_method.items() if problem == name])) for name in problems}


def in_digits(value: float, count: int) -> str:
    """A regret in so many digits; 0 for one that is below what can be told apart from the optimum."""
    return "0" if value <= RESOLUTION else f"{value:.{count}g}"


def regret_table(found: dict[str, dict[tuple[str, int], float]], arguments: argparse.Namespace) -> list[str]:
    """Markdown: median [quartiles] by problem and method; the lowest median in bold."""
    lines = ["| problem | " + " | ".join(METHODS[m][0] for m in found) + " |", "|---" * (len(found) + 1) + "|"]
    middle = {method: medians(of_method) for method, of_method in found.items()}
    for problem in arguments.problems:
        lowest, row = min((m[problem] for m in middle.values() if problem in m), default=math.inf), []
        for of_method in found.values():
            values = [of_method[problem, seed] for seed in arguments.seeds if (problem, seed) in of_method]
            if not values:
                row.append("")
                continue
            low, half, high = np.quantile(values, [0.25, 0.5, 0.75])
            mark = "**" if half == lowest else ""
            few = f" ({len(values)} seeds)" if len(values) < len(arguments.seeds) else ""
            row.append(f"{mark}{in_digits(half, 3)}{mark} [{in_digits(low, 2)}, {in_digits(high, 2)}]{few}")
        lines.append(f"| {problem} | " + " | ".join(row) + " |")
    return lines


def rank_lines(found: dict[str, dict[tuple[str, int], float]]) -> list[str]:
    """Average ranks over problems and seeds that all methods ran; each of ours against each peer; medians counted."""
    from scipy import stats

    methods = list(found)
    pairs = [pair for pair in found[methods[0]] if all(pair in found[m] for m in methods)]
    if len(methods) < 2 or not pairs:
        return []
    ranks = stats.rankdata([[found[m][pair] for pair in pairs] for m in methods], axis=0)
    lines = ["| method | average rank |", "|---|---|"]
    lines += [f"| {METHODS[m][0]} | {ranks[i].mean():.2f} |" for i, m in enumerate(methods)]
    lines.append(f"\nRanks among the {len(methods)} methods over {len(pairs)} pairs of problem and seed, ties averaged.")
    middle = {m: medians(of_method) for m, of_method in found.items()}
    for i, ours in [(i, m) for i, m in enumerate(methods) if m in OURS]:
        for j, peer in [(j, m) for j, m in enumerate(methods) if m not in OURS]:
            difference = ranks[i] - ranks[j]
            p = stats.wilcoxon(difference, zero_method="pratt").pvalue if difference.any() else 1.0
            better, worse = int((difference < 0).sum()), int((difference > 0).sum())
            shared = [name for name in middle[ours] if name in middle[peer]]
            ahead = sum(middle[ours][name] <= middle[peer][name] for name in shared)
            lines.append(
                f"\n{METHODS[ours][0]} against {METHODS[peer][0]}: better on {better} pairs, worse on {worse}, equal on "
                f"{len(pairs) - better - worse}; p = {p:.2g} (Wilcoxon's signed-rank test of the ranks, two-sided, ties by "
                f"Pratt); median no worse on {ahead} of {len(shared)} problems."
            )
        peers = [m for m in GAUSSIAN_PROCESSES if m in found]
        shared = [name for name in middle[ours] if peers and all(name in middle[m] for m in peers)]
        ahead = sum(middle[ours][name] <= min(middle[m][name] for m in peers) for name in shared)
        names = ", ".join(METHODS[m][0] for m in peers)
        lines.append(
            f"\n{METHODS[ours][0]}: median no worse than the best of {names or 'no peer'} on {ahead} of {len(shared)} problems."
        )
    return lines


SPEED_PROBLEMS = ("hartmann6", "ackley-10", "mixed_integer-6")
SPEED_SIZES = ((100, 15), (500, 5))
"""Evaluations of a study, and how many of its last suggestions are timed."""


class OurStudy:
    """A study of ours with observations at random points, to time its suggestions."""

    def __init__(self, problem: str, observations: int, size: int, float64: bool, num_lanes: int = 1) -> None:
        import jax
        import jax.numpy as jnp

        from jaxhpo.core import Feedback, Query

        self.in_float64, self.objective = float64, Objective(problem, 0)
        optimizer, _, self.ask, self.update = our_programs("BayesOpt", num_lanes)
        spec = self.objective.space.spec
        # An optimizer that gives out a design, and does not begin to model, until it has seen all of this.
        patient = dataclasses.replace(optimizer, num_initial=observations + num_lanes)
        collect = jax.jit(patient.update)
        with jax.enable_x64(float64):
            state = our_start(optimizer, jax.jit(patient.init, static_argnums=1), jax.random.key(0), spec, size)
            for cube in np.array_split(
                np.random.default_rng(0).random((observations, spec.num_dims)), observations // num_lanes
            ):
                cube = jnp.asarray(cube[:num_lanes])
                loss = jnp.array([self.objective.at_cube(point) for point in np.asarray(cube)], cube.dtype)
                state = collect(jax.random.key(1), state, Query.fresh(cube), Feedback.finished(loss))
            design = dataclasses.replace(state.design, left=jnp.zeros_like(state.design.left))
        self.state = jax.block_until_ready(dataclasses.replace(state, design=design))

    def suggestion(self) -> float:
        """The seconds of one suggestion and of learning from it, without its evaluation."""
        import jax
        import jax.numpy as jnp

        from jaxhpo.core import Feedback

        key = jax.random.key(len(self.objective.observed))
        with jax.enable_x64(self.in_float64):
            started = time.perf_counter()
            query = jax.block_until_ready(self.ask(key, self.state))
            seconds = time.perf_counter() - started
            losses = [self.objective.at_cube(point) for point in np.asarray(query.cube)]
            feedback = Feedback.finished(jnp.array(losses, query.cube.dtype))
            started = time.perf_counter()
            self.state = jax.block_until_ready(self.update(key, self.state, query, feedback))
            return seconds + time.perf_counter() - started


class OptunaStudy:
    """The same of Optuna's Gaussian process."""

    def __init__(self, problem: str, observations: int) -> None:
        import jax
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.objective = Objective(problem, 0)
        self.rows = self.objective.space.describe()
        self.study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=0))
        for point in np.random.default_rng(0).random((observations, self.objective.space.num_dims)):
            with jax.enable_x64(True):
                arrays = jax.device_get(self.objective.space.decode_arrays(point))
            fixed = {k: v for row, leaf in zip(self.rows, arrays, strict=True) for k, v in optuna_point(row, leaf).items()}
            trial = optuna.trial.FixedTrial(fixed)
            loss = self.objective.at(self.objective.space.assemble([optuna_suggest(row, trial) for row in self.rows]))
            made = optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=loss)
            self.study.add_trial(made)

    def suggestion(self) -> float:
        started = time.perf_counter()
        trial = self.study.ask()
        arrays = [optuna_suggest(row, trial) for row in self.rows]
        seconds = time.perf_counter() - started
        loss = self.objective.at(self.objective.space.assemble(arrays))
        started = time.perf_counter()
        self.study.tell(trial, loss)
        return seconds + time.perf_counter() - started


class BoTorchStudy:
    """The same of BoTorch."""

    def __init__(self, problem: str, observations: int) -> None:
        import torch

        torch.set_num_threads(1)
        self.objective = Objective(problem, 0)
        spec = self.objective.space.spec
        self.points = list(snapped(spec, np.random.default_rng(0).random((observations, spec.num_dims))))
        for point in self.points:
            self.objective.at_cube(point)

    def suggestion(self) -> float:
        spec = self.objective.space.spec
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            started = time.perf_counter()
            point = botorch_suggestion(spec, np.array(self.points), worst_for_nan(self.objective.observed))
            seconds = time.perf_counter() - started
        self.points.append(snapped(spec, point))
        self.objective.at_cube(self.points[-1])
        return seconds


def taken_in_turn(studies: dict[Any, Any], repeats: int) -> dict[Any, list[float]]:
    """Milliseconds of ``repeats`` suggestions of every study, one of each in turn; the first of each is not counted."""
    times: dict[Any, list[float]] = {name: [] for name in studies}
    for repeat in range(repeats + 1):
        for name, study in studies.items():
            seconds = study.suggestion()
            if repeat:
                times[name].append(1e3 * seconds)
    return times


def with_range(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} [{min(values):.2g}, {max(values):.2g}]"


def speed_lines(arguments: argparse.Namespace) -> list[str]:
    """Milliseconds a suggestion at the end of studies of 100 and of 500 evaluations, and what the first one costs."""
    if reason := why_missing("bayesopt"):
        print(f"speed left out: {reason}", file=sys.stderr)
        return []
    peers = {"Optuna GP": ("optuna-gp", OptunaStudy), "BoTorch": ("botorch", BoTorchStudy)}
    peers = {title: study for title, (method, study) in peers.items() if why_missing(method) is None}
    lines = ["# Milliseconds a suggestion", "", f"Median [range] of suggestions taken in turn, on one core. {versions()}.", ""]
    names = ["jaxhpo float32", "jaxhpo float64", *peers]
    ratios = [f"{title} / jaxhpo float32" for title in names[1:]]
    lines += ["| problem | evaluations | " + " | ".join(names + ratios) + " |", "|---" * (2 + len(names + ratios)) + "|"]
    for size, repeats in SPEED_SIZES:
        for problem in SPEED_PROBLEMS:
            start = size - repeats - 1
            studies: dict[str, Any] = {
                "jaxhpo float32": OurStudy(problem, start, size, float64=False),
                "jaxhpo float64": OurStudy(problem, start, size, float64=True),
            }
            studies |= {title: study(problem, start) for title, study in peers.items()}
            times = taken_in_turn(studies, repeats)
            turns = [[b / a for a, b in zip(times[names[0]], times[name], strict=True)] for name in names[1:]]
            cells = [with_range(times[name]) for name in names] + [with_range(ratio) for ratio in turns]
            lines.append(f"| {problem} | {size} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    lines += ["", "| batch on hartmann6 after 96 evaluations | ms | ms a suggestion |", "|---|---|---|"]
    times = taken_in_turn({lanes: OurStudy("hartmann6", 96, 192, False, lanes) for lanes in (1, 16)}, 5)
    for lanes, values in times.items():
        lines.append(f"| {lanes} lanes | {with_range(values)} | {with_range([value / lanes for value in values])} |")
    lines += ["", "| first suggestion by the model, from `init` | seconds |", "|---|---|"]
    for problem in SPEED_PROBLEMS:
        with tempfile.TemporaryDirectory() as cache:
            for label in ("nothing compiled before", "compiled by an earlier process"):
                lines.append(f"| {problem}, {label} | {first_in_other_process(problem, cache, arguments):.2f} |")
    return lines


def first_in_other_process(problem: str, cache: str, arguments: argparse.Namespace) -> float:
    """The seconds to the first suggestion in a process of its own, with a compilation cache in that folder."""
    settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = ["--first-suggestion", problem, *(["--float64"] if arguments.float64 else [])]
    command = [sys.executable, "-m", "experiments.peers_bayes", *words]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def first_suggestion(problem: str) -> float:
    """The seconds from ``init`` to the first suggestion by the model, compilation included, evaluations not."""
    import jax
    import jax.numpy as jnp

    from jaxhpo.core import Feedback

    objective = Objective(problem, 0)
    objective.at_cube(np.full(objective.space.num_dims, 0.5))  # compiled before the clock starts
    seconds, started = 0.0, time.perf_counter()
    optimizer, init, ask, update = our_programs("BayesOpt")
    state = our_start(optimizer, init, jax.random.key(0), objective.space.spec, 100)
    for i in range(NUM_INITIAL + 1):
        query = jax.block_until_ready(ask(jax.random.key(2 * i), state))
        if i == NUM_INITIAL:
            break
        seconds += time.perf_counter() - started
        loss = jnp.array([objective.at_cube(np.asarray(query.cube[0]))], query.cube.dtype)
        started = time.perf_counter()
        state = update(jax.random.key(2 * i + 1), state, query, Feedback.finished(loss))
    return seconds + time.perf_counter() - started


def report_lines(arguments: argparse.Namespace) -> list[str]:
    """The whole report."""
    found = regrets(arguments)
    if not found:
        return ["No results."]
    precision = "float64" if arguments.float64 else "float32"
    head = f"{arguments.evaluations} evaluations, {NUM_INITIAL} first points, {len(arguments.seeds)} seeds; ours in {precision}"
    title = f"Simple regret, median [quartiles]: {head}. {versions()}."
    return ["# Bayesian optimization side by side", "", title, "", *regret_table(found, arguments), "", *rank_lines(found)]


def versions() -> str:
    """What was compared, as installed here."""
    names = ("jax", "optuna", "botorch", "torch", "hyperoptax")
    found = []
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return ", ".join([*found, f"Python {platform.python_version()}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default="reported", help="reported, fresh, held-back or names, with commas")
    parser.add_argument(
        "--methods", default=",".join(m for m in METHODS if m not in EXTRA), help="names with commas: " + ", ".join(METHODS)
    )
    parser.add_argument("--seeds", default="0,1,2,3,4,5,6,7,8,9", help="whole numbers with commas")
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--float64", action="store_true", help="ours propose in float64")
    parser.add_argument("--cells", type=Path, help="the folder of results; what is there is not run again")
    parser.add_argument("--hyperoptax-python", help="the Python of an environment that has hyperoptax")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--speed", action="store_true", help="measure times instead")
    parser.add_argument("--run-only", action="store_true", help="fill the folder, print no tables")
    parser.add_argument("--report-only", action="store_true", help="print the tables of what is in the folder, run nothing")
    parser.add_argument("--first-suggestion", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    named = {"reported": REPORTED, "fresh": FRESH, "held-back": HELD_BACK}
    arguments.problems = tuple(name for word in arguments.problems.split(",") for name in named.get(word, (word,)))
    arguments.methods = tuple(arguments.methods.split(","))
    arguments.seeds = tuple(int(word) for word in arguments.seeds.split(","))
    for word, known in [(p, REPORTED + FRESH + HELD_BACK) for p in arguments.problems] + [
        (m, METHODS) for m in arguments.methods
    ]:
        if word not in known:
            parser.error(f"{word!r}: must be one of {', '.join(known)}")
    # One core for everybody, set before any of them is imported.
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }.items():
        os.environ.setdefault(name, value)
    if arguments.first_suggestion:
        import jax

        jax.config.update("jax_enable_x64", arguments.float64)
        print(first_suggestion(arguments.first_suggestion))
        return
    lines = speed_lines(arguments) if arguments.speed else quality_lines(arguments)
    if not arguments.run_only:
        print("\n".join(lines))
        if arguments.out:
            arguments.out.write_text("\n".join(lines) + "\n")


def quality_lines(arguments: argparse.Namespace) -> list[str]:
    """Run what is missing, and report."""
    with contextlib.ExitStack() as stack:
        if arguments.cells is None:
            arguments.cells = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        arguments.cells.mkdir(parents=True, exist_ok=True)
        for method in () if arguments.report_only else arguments.methods:
            if method == "hyperoptax" and arguments.hyperoptax_python:
                in_other_python(arguments.hyperoptax_python, method, arguments)
            elif reason := why_missing(method):
                print(f"{METHODS[method][0]} left out: {reason}", file=sys.stderr)
            else:
                run_method(method, arguments)
        return [] if arguments.run_only else report_lines(arguments)


if __name__ == "__main__":
    main()
