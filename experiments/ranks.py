"""Which search to pick: every search on every kind of task at equal training steps, over seeds, ranked with paired tests.

    python -m experiments.ranks [--seeds 5] [--problems digits r8_bag ...] [--ways PSO ...] [--cells runs/ranks] [--table]
    python -m experiments.ranks --rules --trainings 128    the rules of early stopping around one search

Every way may spend the steps of ``--trainings`` full trainings and searches for the lowest validation loss. Its winner is
trained again on fresh seeds (a population's along its whole schedule), and judged by the median validation loss there; the
table tells the task's own test metric, too. One file a cell (problem, way, seed): what is there is not computed again.
A gradient counts as one training here, though it takes the time of several: see the column of seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

import jaxhpo as jh
from experiments import characters, images, mixers, tables, texts
from experiments.peers_bayes import WIDE
from jaxhpo.analysis.format import interval, number
from jaxhpo.analysis.statistics import PairedComparison, friedman, holm, mean_interval, paired_comparison
from jaxhpo.hypergradients import Unrolled

LANES = 8
HIGHER_IS_BETTER = ("macro_f1", "accuracy")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A task, its space, and the metric by which its users judge it."""

    training: Callable[[], jh.Training]
    space: dict[str, Any]
    metric: str


SGD: dict[str, Any] = {
    "learning_rate": jh.Float(1e-3, 3.0, log=True),
    "momentum": jh.Float(0.0, 0.99),
    "weight_decay": jh.Float(1e-6, 1e-1, log=True),
    "label_smoothing": jh.Float(0.0, 0.3),
}
ADAMW: dict[str, Any] = {
    "learning_rate": jh.Float(1e-4, 1e-1, log=True),
    "weight_decay": jh.Float(1e-5, 1.0, log=True),
    "one_minus_beta1": jh.Float(0.01, 0.5, log=True),
    "warmup": jh.Float(0.0, 0.5),
    "dropout": jh.Float(0.0, 0.7),
}
PROBLEMS = {
    "digits": Problem(
        functools.partial(images.image_mlp, "digits", num_steps=540, steps_per_round=18),
        {**SGD, "width": jh.Int(8, 128, log=True)},
        "error",
    ),
    "mnist_mixer": Problem(
        functools.partial(mixers.mixer, "mnist5k", 7),
        {**ADAMW, "label_smoothing": jh.Float(0.0, 0.3), "width": jh.Int(4, 48, log=True)},
        "error",
    ),
    "r8_bag": Problem(
        texts.bag_of_embeddings,
        {
            **ADAMW,
            "label_smoothing": jh.Float(0.0, 0.3),
            "width": jh.Int(2, 32, log=True),
            "pooling": jh.Choice(("mean", "root")),
        },
        "macro_f1",
    ),
    "r8_encoder": Problem(
        functools.partial(texts.encoder, length=32, batch_size=16, num_valid=500),
        {**ADAMW, "width": jh.Int(4, 64, log=True)},
        "macro_f1",
    ),
    "grimm": Problem(characters.recurrent, {**ADAMW, "width": jh.Int(8, 64, log=True)}, "bits"),
    "letter": Problem(
        functools.partial(tables.table_mlp, "letter", num_valid=1000),
        {**SGD, "width": jh.Int(8, 64, log=True), "activation": jh.Choice(("relu", "tanh", "gelu"))},
        "error",
    ),
    "breast_cancer": Problem(
        functools.partial(tables.table_mlp, "breast_cancer", num_steps=200, batch_size=32),
        {**SGD, "width": jh.Int(2, 64, log=True), "activation": jh.Choice(("relu", "tanh", "gelu"))},
        "error",
    ),
}


def _descent() -> Any:
    explorer = jh.TPE(num_lanes=LANES)
    return jh.HypergradientDescent(optax.adam, learning_rate=0.05, num_lanes=LANES, explorer=explorer)


WAYS: dict[str, Callable[[], Any]] = {
    "RandomSearch": lambda: jh.RandomSearch(num_lanes=LANES),
    "PSO": lambda: jh.PSO(num_lanes=LANES),
    "CMAES": lambda: jh.CMAES(num_lanes=LANES),
    "DifferentialEvolution": lambda: jh.DifferentialEvolution(num_lanes=LANES),
    "TPE": lambda: jh.TPE(num_lanes=LANES),
    "BayesOpt": lambda: jh.BayesOpt(num_lanes=LANES),
    "ASHA(BayesOpt)": lambda: jh.ASHA(jh.BayesOpt(num_lanes=2 * LANES)),
    "PBT": lambda: jh.PBT(jh.RandomSearch(num_lanes=2 * LANES)),
    "HypergradientDescent": _descent,
}
"""The searches, all with their defaults; populations and early stopping live on more lanes than the others."""


def tpe(num_lanes: int, **densities: Any) -> Any:
    """As many candidates as Optuna draws; more initial points, since most trials are stopped early."""
    return jh.TPE(num_lanes, num_initial=24, num_candidates=24, **densities)


RULES: dict[str, Callable[[], Any]] = {
    "whole": lambda: tpe(LANES, **WIDE),
    "ASHA": lambda: jh.ASHA(tpe(LANES, **WIDE)),
    "MedianStopping": lambda: jh.MedianStopping(tpe(LANES, **WIDE)),
    "PredictiveStopping": lambda: jh.PredictiveStopping(tpe(LANES, **WIDE)),
}
"""The rules that stop single trials, with their defaults, around ``TPE`` with densities for noisy trainings."""


def cell(problem: Problem, way: str, optimizer: Any, seed: int, trainings: int, fresh: int) -> dict[str, Any]:
    """One study and its winner on fresh seeds."""
    training = problem.training()
    steps = trainings * training.num_steps
    task = Unrolled(training.task, training.num_steps) if way == "HypergradientDescent" else training
    study = jh.Study(task, jh.Space(problem.space), optimizer, seed=seed, metric="loss", max_steps=steps)
    result = jh.run_study(study)
    again = jh.confirm(study, result, fresh)
    return {
        "found": result.best.loss,
        "trials": len(result.trials["number"]),
        "run_seconds": result.run_seconds,
        "hparams": result.best.hparams,
        "valid": again["validation"],
        "test": again["test"],
    }


def middle(values: list[float | None], metric: str = "loss") -> float:
    """The median over fresh seeds, one that diverged being worse than any number."""
    worst = -np.inf if metric in HIGHER_IS_BETTER else np.inf
    return float(np.median([worst if x is None else x for x in values]))


def cell_path(folder: Path, name: str, way: str, seed: int, trainings: int, fresh: int) -> Path:
    return folder / f"{name}-{way}-{seed}-{trainings}-{fresh}.json"


def measured(names: list[str], chosen: list[str], seeds: int, trainings: int, fresh: int, folder: Path) -> None:
    """Computes what cells are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        for way in chosen:
            for seed in range(seeds):
                path = cell_path(folder, name, way, seed, trainings, fresh)
                if not path.exists():
                    found = cell(PROBLEMS[name], way, (WAYS | RULES)[way](), seed, trainings, fresh)
                    jax.clear_caches()  # programs of hundreds of studies are more than a process may map
                    aside = path.with_suffix(".tmp")
                    aside.write_text(json.dumps(found))
                    aside.replace(path)  # a cell is whole or not there
                    told = [found["found"], middle(found["valid"]["loss"]), found["run_seconds"]]
                    print(path.stem, [round(x, 4) for x in told], flush=True)


def read_cells(
    names: list[str], chosen: list[str], seeds: int, trainings: int, fresh: int, folder: Path
) -> dict[tuple[str, str], list]:
    """All seeds of every problem and way.

    Raises:
        SystemExit: where a cell is missing.
    """
    cells: dict[tuple[str, str], list] = {}
    for name in names:
        for way in chosen:
            paths = [cell_path(folder, name, way, seed, trainings, fresh) for seed in range(seeds)]
            missing = [path.name for path in paths if not path.exists()]
            if missing:
                raise SystemExit(f"{folder} lacks {missing[0]} and {len(missing) - 1} more: run without --table first")
            cells[name, way] = [json.loads(path.read_text()) for path in paths]
    return cells


def tables_of(cells: dict[tuple[str, str], list], names: list[str], chosen: list[str]) -> list[str]:
    """One table a problem, then the ranks over all."""
    lines = []
    for name in names:
        metric = PROBLEMS[name].metric
        lines += [
            f"{name}",
            "",
            f"| search | validation loss found | the winner's, fresh seeds | its test {metric}, fresh seeds "
            "| of them diverged | trials | seconds |",
            "|---|---|---|---|---|---|---|",
        ]
        for way in chosen:
            found = cells[name, way]
            columns = (
                [one["found"] for one in found],
                [middle(one["valid"]["loss"]) for one in found],
                [middle(one["test"][metric], metric) for one in found],
            )
            told = " | ".join(interval(mean_interval(values)) for values in columns)
            trials, seconds = (np.median([one[key] for one in found]) for key in ("trials", "run_seconds"))
            lost = sum(x is None for one in found for x in one["valid"]["loss"])
            diverged = f"{lost} of {sum(len(one['valid']['loss']) for one in found)}" if lost else "none"
            lines.append(f"| {way} | {told} | {diverged} | {trials:.0f} | {number(seconds, 2)} |")
        lines.append("")
    return lines + ranks_of(cells, names, chosen)


def ranks_of(cells: dict[tuple[str, str], list], names: list[str], chosen: list[str]) -> list[str]:
    """Mean ranks over problems and seeds by the winner's validation loss on fresh seeds, and who differs from whom.

    Seeds of a problem are blocks of their own: what is claimed is claimed of these problems.
    """
    values = np.array([[middle(one["valid"]["loss"]) for one in cells[name, way]] for way in chosen for name in names])
    values = np.log(values)  # Wilcoxon's test ranks differences over all problems: they are ratios then, whatever the scale
    blocks = values.reshape(len(chosen), -1).T
    ranks = friedman(blocks)
    by_problem = {
        name: friedman(values.reshape(len(chosen), len(names), -1)[:, i].T).mean_ranks for i, name in enumerate(names)
    }
    order = np.argsort(ranks.mean_ranks)
    best = order[0]
    # All pairs are adjusted for together, since which one is the best is seen only in the ranks; the front one comes first.
    pairs = list(itertools.combinations(order, 2))
    compared = [paired_comparison(blocks[:, i], blocks[:, j]) for i, j in pairs]
    p_values = holm([one.p_value for one in compared])
    adjusted = {frozenset(pair): p for pair, p in zip(pairs, p_values, strict=True)}
    random = chosen.index("RandomSearch") if "RandomSearch" in chosen else best
    lines = [
        f"Mean rank (1 is best) over {len(names)} problems and {blocks.shape[0] // len(names)} seeds; Friedman's test that all "
        f"are alike: p = {ranks.p_value:.1g}",
        "",
        f"| search | mean rank | {' | '.join(names)} | {chosen[best]} against it | it against {chosen[random]} |",
        f"|---|---|{'---|' * len(names)}---|---|",
    ]
    for i in order:
        each = " | ".join(f"{by_problem[name][i]:.1f}" for name in names)
        said = [
            "" if a == b else _verdict(paired_comparison(blocks[:, a], blocks[:, b]), adjusted[frozenset((a, b))])
            for a, b in ((best, i), (i, random))
        ]
        lines.append(f"| {chosen[i]} | {ranks.mean_ranks[i]:.2f} | {each} | {' | '.join(said)} |")
    told_apart = [
        f"{chosen[i]} {_direction(one)} than {chosen[j]} (p = {p:.1g})"
        for (i, j), one, p in zip(pairs, compared, p_values, strict=True)
        if p <= 0.05
    ]
    lines += ["", f"p: Wilcoxon's test on log losses, by Holm for all {len(pairs)} pairs; above 0.05 it is a tie."]
    return [*lines, f"Told apart: {'; '.join(told_apart) or 'none'}."]


def _direction(one: PairedComparison) -> str:
    return "better" if one.effect < 0 else "worse"


def _verdict(one: PairedComparison, p: float) -> str:
    verdict = "a tie" if p > 0.05 else _direction(one)
    return f"{verdict}, wins {one.wins} of {one.count}, p = {p:.1g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, *RULES], help="by default all searches")
    parser.add_argument("--rules", action="store_true", help="the rules of early stopping instead")
    parser.add_argument("--trainings", type=int, default=64, help="full trainings whose steps every way may spend")
    parser.add_argument("--fresh", type=int, default=16, help="fresh seeds for each winner")
    parser.add_argument("--cells", type=Path, default=Path("runs/ranks"), help="one file for each study")
    parser.add_argument("--table", action="store_true", help="only make the tables of the cells there are")
    arguments = parser.parse_args()
    jh.prepare_jax()
    ways = arguments.ways or list(RULES if arguments.rules else WAYS)
    which = (arguments.problems, ways, arguments.seeds, arguments.trainings, arguments.fresh)
    if not arguments.table:
        measured(*which, arguments.cells)
    print("\n".join(tables_of(read_cells(*which, arguments.cells), arguments.problems, ways)))


if __name__ == "__main__":
    main()
