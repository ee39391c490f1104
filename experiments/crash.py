"""A study killed forty times, and one on other numbers of devices: are they the same study, bit for bit?

    python -m experiments.crash [--kind pso] [--kills 40] [--out crash.md]

The digits network under a particle swarm, or what else ``--kind`` says: early stopping, a population, static choices, or
several seeds and a race. Some trials diverge, so that lanes are at different places when the process dies. The kill is
SIGKILL at a random moment: while starting, compiling, training or writing. Trials and final state are then compared with
those of a study that ran straight through.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TRIAL_COLUMNS = "number, round, lane, loss, parent, start, steps, whole, metrics, hparams, cube, loss_bits, error"
KINDS = ("pso", "asha", "hyperband", "pbt", "static", "race")


def study(kind: str, num_trials: int, shard_width: int):
    """Learning rates up to where training blows up; short trainings, so that there are many commits."""
    import jaxhpo as jh
    from experiments.digits import plain_mlp
    from experiments.images import image_mlp

    leaves: dict[str, Any] = {
        "learning_rate": jh.Float(0.01, 300.0, log=True), "momentum": jh.Float(0.0, 0.99), "width": jh.Int(4, 16),
    }  # fmt: skip
    training, swarm = plain_mlp(num_steps=20, batch_size=16, max_width=16), jh.PSO(num_lanes=32)
    optimizer = {
        "asha": jh.ASHA(swarm), "hyperband": jh.Hyperband(jh.TPE(num_lanes=32)), "pbt": jh.PBT(jh.RandomSearch(num_lanes=32)),
        "static": jh.ASHA(swarm),
    }.get(kind, swarm)  # fmt: skip
    if kind == "static":
        leaves |= {"depth": jh.Choice((1, 2), static=True), "activation": jh.Choice(("relu", "tanh"), static=True)}
        training = image_mlp(num_steps=20, steps_per_round=2, batch_size=16, max_width=16)
    seeds: dict[str, Any] = {"seeds": 4, "race": 0.1} if kind == "race" else {}
    return jh.Study(
        training, jh.Space(leaves), optimizer, num_trials,
        seed=1, metric="loss", shard_width=shard_width, config={"task": f"experiments.crash {kind}"}, **seeds,
    )  # fmt: skip


def work(folder: Path, kind: str, num_trials: int, devices: int) -> None:
    """Run the study, or go on with it."""
    import jaxhpo as jh
    from jaxhpo.study import driver
    from jaxhpo.study.record import holds_study

    jh.prepare_jax(devices)
    driver._CHUNK_SECONDS = 0.05  # many commits, so that kills fall on them
    jh.run_study(study(kind, num_trials, shard_width=4), folder, resume=holds_study(folder))


def digest(folder: Path) -> tuple[int, int, str, str]:
    """Rows, diverged rows, a hash of all trials' bits, and a hash of the final state."""
    with sqlite3.connect(folder / "study.sqlite") as db:
        rows = db.execute(f"SELECT {TRIAL_COLUMNS} FROM trial ORDER BY number").fetchall()
        answers = db.execute("SELECT * FROM answer ORDER BY number, steps").fetchall()
        state = db.execute("SELECT sha FROM snapshot ORDER BY round DESC LIMIT 1").fetchone()[0]
        sound = db.execute("PRAGMA integrity_check").fetchone()[0]
    assert sound == "ok", sound
    assert [row[0] for row in rows] == list(range(len(rows))), "a row is lost or doubled"
    bits = hashlib.sha256(repr((rows, answers)).encode()).hexdigest()[:16]
    return len(rows), sum(row[3] is None for row in rows), bits, state[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="pso", choices=KINDS)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--trials", type=int, default=16000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.kind, arguments.trials, arguments.devices)
        return
    environment = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}

    def start(folder: Path, devices: int) -> subprocess.Popen[bytes]:
        options = [
            "--kind",
            arguments.kind,
            "--work",
            str(folder),
            "--trials",
            str(arguments.trials),
            "--devices",
            str(devices),
        ]
        return subprocess.Popen([sys.executable, "-m", "experiments.crash", *options], env=environment)

    with tempfile.TemporaryDirectory() as temporary:
        digests = {}
        for devices in (1, 2, 8):
            began = time.perf_counter()
            assert start(Path(temporary) / f"d{devices}", devices).wait() == 0
            seconds = time.perf_counter() - began
            digests[f"straight through, {devices} devices"] = digest(Path(temporary) / f"d{devices}")
        draw, kills, folder = random.Random(arguments.seed), 0, Path(temporary) / "killed"
        while kills < arguments.kills:
            process = start(folder, draw.choice([1, 2]))
            # Progress to the last trial takes about `seconds`; deaths come early enough for all of them to fit.
            time.sleep(
                draw.uniform(0.3, 2.0) if draw.random() < 0.3 else draw.uniform(2.0, 2.0 + 2.0 * seconds / arguments.kills)
            )
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            kills += 1
        assert start(folder, 2).wait() == 0
        digests[f"killed {kills} times, on 1 or 2 devices"] = digest(folder)
    equal = len(set(digests.values())) == 1
    lines = ["| study | trials | diverged | SHA-256 of all trials | SHA-256 of the final state |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {rows} | {diverged} | {trials} | {state} |" for name, (rows, diverged, trials, state) in digests.items()
    ]
    lines += ["", "All equal, bit for bit." if equal else "NOT equal."]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    if not equal or kills < arguments.kills:
        raise SystemExit(f"{kills} kills of {arguments.kills}, equal: {equal}")


if __name__ == "__main__":
    main()
