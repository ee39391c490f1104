"""A valley at the edge of a cliff: the best learning rate lies just below where training diverges.

    python -m experiments.nan_cliff [--seeds 10] [--out cliff.md]

Loss ``(log10 lr + 1.8)^2 + (wd - 0.3)^2``, NaN where ``log10 lr > -1.6``; lr in [1e-4, 1] by its logarithm, wd in
[0, 1]; 60 trials. Every optimizer of the registry at its defaults with six lanes. The last column leaves out the first ten
trials, which those with a model draw without one.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--lanes", type=int, default=6)
    parser.add_argument("--optimizers", help="only these, by name, with commas between")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import jax

    import jaxhpo as jh
    from jaxhpo.benchmarks import nan_cliff
    from jaxhpo.optimizers.registry import OPTIMIZERS, load

    problem = nan_cliff()
    lines = ["| optimizer | best of 60 trials: median [range] | diverged | after ten trials |", "|---|---|---|---|"]
    for name in arguments.optimizers.split(",") if arguments.optimizers else OPTIMIZERS:
        study = jh.pure_study(problem.loss, problem.space, load(name)(num_lanes=arguments.lanes), arguments.trials)
        results = jax.jit(jax.vmap(study))(jax.random.split(jax.random.key(0), arguments.seeds))
        best = np.asarray(results.loss)
        assert not np.isnan(best).any(), "a NaN was reported as best"
        # Every trial ends in its round here, so that rows are in the order of trials.
        failed = np.isnan(np.asarray(results.trials.loss)).reshape(arguments.seeds, -1)[:, : arguments.trials]
        shares = f"{failed.mean():.0%} | {failed[:, 10:].mean():.0%}"
        lines.append(f"| {name} | {statistics.median(best):.1e} [{best.min():.1e} to {best.max():.1e}] | {shares} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
