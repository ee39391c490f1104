"""Population based training beside searches with constant hyperparameters, at equal training steps.

    python -m experiments.populations [--seeds 10] [--problems digits mnist] [--out populations.md]

Every way has 32 lanes and the steps of ``--trainings`` full trainings. Each winner is trained again on fresh seeds, the
winner of a population along its whole schedule; its figures are means over them. Differences are paired by seed.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np

import jaxhpo as jh
from experiments.early_stopping import space
from experiments.images import image_mlp
from jaxhpo.analysis.format import interval
from jaxhpo.analysis.statistics import mean_interval, paired_comparison

LANES = 32
PROBLEMS = {
    "digits": functools.partial(image_mlp, "digits", num_steps=540, steps_per_round=18),
    "mnist": functools.partial(image_mlp, "mnist5k", num_steps=540, steps_per_round=18),
}


def ways() -> dict[str, Any]:
    trials = jh.RandomSearch(num_lanes=LANES)
    return {
        "RandomSearch": trials,
        "ASHA(RandomSearch)": jh.ASHA(trials),
        "Hyperband(TPE)": jh.Hyperband(jh.TPE(num_lanes=LANES)),
        "PBT": jh.PBT(trials),
        "PB2": jh.PB2(trials),
    }


def measured(name: str, seeds: int, trainings: int, fresh: int) -> list[str]:
    """A table of one problem."""
    training = PROBLEMS[name]()
    columns: dict[str, dict[str, list[float]]] = {}
    for way, optimizer in ways().items():
        found = columns[way] = {"found": [], "valid": [], "test": [], "seconds": []}
        for seed in range(seeds):
            steps = trainings * training.num_steps
            study = jh.Study(training, space(), optimizer, seed=seed, metric="loss", max_steps=steps)
            result = jh.run_study(study)
            again = jh.confirm(study, result, fresh)
            found["found"].append(result.best.loss)
            for split, column in (("validation", "valid"), ("test", "test")):
                metric = "loss" if split == "validation" else "error"
                found[column].append(float(np.mean([x for x in again[split][metric] if x is not None])))
            found["seconds"].append(result.run_seconds)
            print(name, way, seed, {key: round(values[-1], 5) for key, values in found.items()}, flush=True)
    lines = [
        f"{name}: {trainings} full trainings of {training.num_steps} steps, {LANES} lanes, {seeds} seeds, each winner on "
        f"{fresh} fresh seeds; mean [95 % interval]",
        "",
        "| way | best validation loss found | the winner's, fresh seeds | its test error, fresh seeds | against random, test |",
        "|---|---|---|---|---|",
    ]
    for way, found in columns.items():
        cells = [interval(mean_interval(np.array(found[column]))) for column in ("found", "valid", "test")]
        other = "" if way == "RandomSearch" else _against(found["test"], columns["RandomSearch"]["test"])
        lines.append(f"| {way} | {' | '.join(cells)} | {other} |")
    return lines


def _against(values: list[float], others: list[float]) -> str:
    compared = paired_comparison(values, others)
    wins = sum(a < b for a, b in zip(values, others, strict=True))
    return f"better in {wins} of {len(values)}, p = {compared.p_value:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parser.add_argument("--trainings", type=int, default=64, help="full trainings whose steps every way may spend")
    parser.add_argument("--fresh", type=int, default=16, help="fresh seeds for each winner")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jh.prepare_jax()
    parts = []
    for name in arguments.problems:
        parts += [*measured(name, arguments.seeds, arguments.trainings, arguments.fresh), ""]
    text = "\n".join(parts) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
