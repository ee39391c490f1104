"""What static choices cost: one study over 3 x 2 programs against the six separate studies of the same trials.

    python -m experiments.static_choices [--trials 200] [--seeds 5] [--out static_choices.md]

The space has two static choices, depth (1, 2, 3) and activation (relu, tanh), beside three numbers. The grouped study's
trials of each combination are then run again by a study of that combination alone: the same hyperparameters in the same
order, in as many lanes as a batch of the grouped study has. Programs are compiled before the clock runs.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxhpo as jh
from experiments.images import image_mlp
from experiments.quickstart import spread
from jaxhpo.core import Array, CubeSpec, Feedback, Query, pytree_dataclass, setting

LANES = 48
DEPTHS, ACTIVATIONS = (1, 2, 3), ("relu", "tanh")
NUMBERS: dict[str, Any] = {
    "learning_rate": jh.Float(1e-3, 0.3, log=True),
    "momentum": jh.Float(0.0, 0.9),
    "weight_decay": jh.Float(1e-6, 1e-2, log=True),
}


@pytree_dataclass
class Listed:
    """The points of a list, ``f32[N, D]``, one after another."""

    points: Array
    num_lanes: int = setting(static=True, low=1)

    starts_afresh = True

    def init(self, key: jax.Array, spec: CubeSpec) -> dict[str, jax.Array]:
        del key, spec
        return {"at": jnp.arange(self.num_lanes), "next": jnp.int32(self.num_lanes)}

    def ask(self, key: jax.Array, state: dict[str, jax.Array]) -> Query:
        del key
        return Query.fresh(jnp.asarray(self.points)[jnp.minimum(state["at"], len(self.points) - 1)])

    def update(self, key: jax.Array, state: dict[str, jax.Array], query: Query, feedback: Feedback) -> dict[str, jax.Array]:
        del key, query
        new = state["next"] + jnp.cumsum(feedback.done) - 1
        return {"at": jnp.where(feedback.done, new, state["at"]), "next": state["next"] + feedback.done.sum()}


def grouped_space() -> jh.Space:
    static: dict[str, Any] = {
        "depth": jh.Choice(DEPTHS, static=True),
        "activation": jh.Choice(ACTIVATIONS, static=True),
    }
    return jh.Space(NUMBERS | static)


def grouped(num_trials: int, seed: int) -> jh.Result:
    return jh.minimize(
        image_mlp(num_steps=300, steps_per_round=30), grouped_space(), jh.RandomSearch(num_lanes=LANES),
        key=seed, num_trials=num_trials, metric="loss",
    )  # fmt: skip


def alone(depth: int, activation: str, points: np.ndarray, num_lanes: int, most: int) -> jh.Result:
    """A study of one combination at given points."""
    static: dict[str, Any] = {"depth": jh.Choice((depth,), static=True), "activation": jh.Choice((activation,), static=True)}
    space = jh.Space(NUMBERS | static)
    both = np.full((len(points), 2), 0.5, np.float32)
    cube = np.concatenate([points, both], axis=1)[:, _order(space)]
    cube = np.pad(cube, ((0, most - len(cube)), (0, 0)))  # one shape, so that only the first study compiles
    return jh.minimize(
        image_mlp(num_steps=300, steps_per_round=30), space, Listed(jnp.asarray(cube), num_lanes),
        key=0, num_trials=len(points), metric="loss",
    )  # fmt: skip


def _order(space: jh.Space) -> list[int]:
    return [[*NUMBERS, "depth", "activation"].index(name) for name in space.names]


def measured(num_trials: int, seed: int) -> dict[str, Any]:
    result = grouped(num_trials, seed)
    cubes = {row["number"]: row["cube"] for row in result.facts}
    names = grouped_space().names
    columns = [names.index(name) for name in NUMBERS]
    separate = 0.0
    groups = Counter(zip(result.trials["hparams.depth"].tolist(), result.trials["hparams.activation"].tolist(), strict=True))
    for (depth, activation), count in sorted(groups.items()):
        of_group = (result.trials["hparams.depth"] == depth) & (result.trials["hparams.activation"] == activation)
        points = np.stack([cubes[number] for number in result.trials["number"][of_group].tolist()])[:, columns]
        found = alone(depth, activation, points, LANES // len(groups), num_trials)
        assert len(found.trials["number"]) == count
        separate += found.run_seconds
    return {"programs": len(result.programs), "grouped": result.run_seconds, "separate": separate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    jh.prepare_jax()
    began = time.perf_counter()
    first = grouped(arguments.trials, 99)
    whole = time.perf_counter() - began
    measured(arguments.trials, 99)  # compiles what the six studies need
    rows = []
    for seed in range(arguments.seeds):
        rows.append(measured(arguments.trials, seed))
        print(seed, rows[-1], flush=True)
    ratio = [row["grouped"] / row["separate"] for row in rows]
    text = "\n".join(
        [
            f"{arguments.trials} trials of 300 steps, 3 depths x 2 activations, {LANES} lanes, {arguments.seeds} seeds",
            "",
            f"- programs of trainings that the one study compiled: at most {max(row['programs'] for row in rows)}",
            f"- seconds without compilation: {spread([row['grouped'] for row in rows], '.2f')} in one study, "
            f"{spread([row['separate'] for row in rows], '.2f')} in six: ratio {spread(ratio, '.2f')}",
            f"- the first study of the process took {whole:.1f} s, of which its {len(first.programs)} programs compiled for "
            f"{sum(first.programs.values()):.1f} s beside the training (all from XLA's cache on disk, if they are there)",
            "",
        ]
    )
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()
