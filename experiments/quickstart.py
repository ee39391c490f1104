"""The quickstart over several seeds: what the swarm's winner reaches on the test split, and random search's beside it.

    python -m experiments.quickstart [--seeds 5] [--out quickstart.md]

Runs ``configs/digits_pso.toml`` and ``configs/digits_random.toml`` (equal trials) once a seed. Each winner is trained
again on fresh seeds; its figure is the mean over them. The comparison is paired by seed.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

CONFIGS = Path(__file__).parent.parent / "configs"


def spread(values: list[float], form: str = ".2%") -> str:
    """Median and range."""
    return f"{statistics.median(values):{form}} [{min(values):{form}} to {max(values):{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--configs", nargs="+", default=["digits_pso", "digits_random"])
    parser.add_argument("--fresh", type=int, default=64, help="fresh seeds for each winner")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import jaxhpo as jh
    from jaxhpo.config import build, load

    jh.prepare_jax()
    table: dict[str, dict[str, list[float]]] = {}
    for name in arguments.configs:
        columns = table[name] = {"found": [], "valid": [], "test": [], "seconds": []}
        for seed in range(arguments.seeds):
            study = build(load(CONFIGS / f"{name}.toml", [f"study.seed={seed}"]))
            result = jh.run_study(study)
            fresh = jh.confirm(study, result, arguments.fresh)
            columns["found"].append(result.best.loss)
            columns["valid"].append(float(np.mean(fresh["validation"][study.metric or "loss"])))
            columns["test"].append(float(np.mean(fresh["test"]["error"])))
            columns["seconds"].append(result.run_seconds)
            print(name, seed, {key: round(values[-1], 5) for key, values in columns.items()}, result.best.hparams, flush=True)
    lines = [
        f"{arguments.seeds} seeds, each winner on {arguments.fresh} fresh seeds; median [range]",
        "",
        "| study | best validation error found | the winner's, fresh seeds | its test error, fresh seeds | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, columns in table.items():
        cells = [spread(columns["found"]), spread(columns["valid"]), spread(columns["test"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {spread(columns['seconds'], '.0f')} |")
    first, *others = arguments.configs
    for other in others:
        for column in ("found", "valid", "test"):
            pairs = list(zip(table[first][column], table[other][column], strict=True))
            wins = sum(a < b for a, b in pairs)
            gain = [b - a for a, b in pairs]
            lines.append(f"\n{first} against {other}, {column}: better in {wins} of {len(pairs)} seeds, by {spread(gain)}")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
