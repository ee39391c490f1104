"""The particle swarm beside evosax's, pyswarms' and EvoX's: same problems, boxes, swarms and evaluations.

    python -m experiments.peers_pso --out peers_pso.md --speed [--evox-python PATH]

Each peer runs with its documented defaults. A peer that is not installed drops out of the table. EvoX needs another
version of JAX: give the Python of an environment with ``evox==0.9.0 jax==0.5.3 jaxlib==0.5.3``. pyswarms has no
defaults; its documentation uses ``c1 = 0.5, c2 = 0.3, w = 0.9``.

All losses are differences to the optimum. The peers search the box, ours the unit cube; all in float64 by default, as
float32 ends the search on sphere and ackley before the algorithms do (``--float32`` for that). On the mixed problem
the peers search ``[0, 1]^D``, and integers and choices are the level in which a coordinate lies.
The defaults of ours were chosen by other functions, see ``jaxhpo/optimizers/pso.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOW, HIGH = -5.0, 10.0
NAMES = ("sphere", "rosenbrock", "rastrigin", "ackley", "mixed_integer")


def make_problem(name: str, num_dims: int) -> Any:
    """A problem whose optimum lies at a random place, the same for every peer and seed."""
    import numpy as np

    from jaxhpo.benchmarks import functions

    rng = np.random.default_rng([NAMES.index(name), num_dims])
    count = num_dims - num_dims // 5 - 2 * num_dims // 5 if name == "mixed_integer" else num_dims
    return getattr(functions, name)(num_dims, shift=rng.uniform(-3.0, 7.0, count))


def make_loss(name: str, num_dims: int) -> tuple[Callable[[Any], Any], float, float]:
    """The loss of a swarm ``[B, D] -> [B]`` as a peer sees it, and the box of each coordinate."""
    import jax

    problem = make_problem(name, num_dims)
    if name == "mixed_integer":
        return jax.vmap(lambda z: problem.loss(None, problem.space.decode(z)) - problem.optimum), 0.0, 1.0
    return jax.vmap(lambda z: problem.loss(None, {"x": z}) - problem.optimum), LOW, HIGH


def run_ours(name: str, num_dims: int, particles: int, generations: int, seeds: int) -> list[float]:
    import jax
    import jax.numpy as jnp

    from jaxhpo.core import Feedback
    from jaxhpo.optimizers.pso import PSO

    problem, swarm = make_problem(name, num_dims), PSO(particles)

    def search(key: jax.Array) -> jax.Array:
        def one_round(carry: Any, key: jax.Array) -> Any:
            state, lowest = carry
            query = swarm.ask(key, state)
            loss = jax.vmap(lambda z: problem.loss(None, problem.space.decode(z)) - problem.optimum)(query.cube)
            return (swarm.update(key, state, query, Feedback.finished(loss)), jnp.minimum(lowest, loss.min())), None

        state = swarm.init(jax.random.fold_in(key, 0), problem.space.spec)
        kind = jnp.zeros(()).dtype  # float64 where enabled
        state = jax.tree.map(lambda x: x.astype(kind), state)
        keys = jax.random.split(jax.random.fold_in(key, 1), generations)
        return jax.lax.scan(one_round, (state, jnp.array(jnp.inf, kind)), keys)[0][1]

    return [float(x) for x in jax.jit(jax.vmap(search))(jax.random.split(jax.random.key(0), seeds))]


def run_evosax(name: str, num_dims: int, particles: int, generations: int, seeds: int) -> list[float]:
    import jax
    import jax.numpy as jnp
    from evosax.algorithms import PSO

    loss, low, high = make_loss(name, num_dims)
    peer = PSO(particles, jnp.zeros(num_dims))
    params = peer.default_params

    def search(key: jax.Array) -> jax.Array:
        start = jax.random.uniform(jax.random.fold_in(key, 0), (particles, num_dims), minval=low, maxval=high)
        first = loss(start)  # the first generation

        def one_round(carry: Any, key: jax.Array) -> Any:
            state, lowest = carry
            cube, state = peer.ask(key, state, params)
            cube = jnp.clip(cube, low, high)
            losses = loss(cube)
            state, _ = peer.tell(key, cube, losses, state, params)
            return (state, jnp.minimum(lowest, losses.min())), None

        state = peer.init(jax.random.fold_in(key, 1), start, first, params)
        keys = jax.random.split(jax.random.fold_in(key, 2), generations - 1)
        return jax.lax.scan(one_round, (state, first.min()), keys)[0][1]

    return [float(x) for x in jax.jit(jax.vmap(search))(jax.random.split(jax.random.key(0), seeds))]


def run_pyswarms(name: str, num_dims: int, particles: int, generations: int, seeds: int) -> list[float]:
    import logging

    import jax
    import numpy as np
    from pyswarms.single import GlobalBestPSO

    logging.disable(logging.CRITICAL)
    loss, low, high = make_loss(name, num_dims)
    compiled, box = jax.jit(loss), (np.full(num_dims, low), np.full(num_dims, high))
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # it leaves a log file where it runs
        for seed in range(seeds):
            np.random.seed(seed)  # noqa: NPY002, its only way to be seeded
            peer = GlobalBestPSO(particles, num_dims, {"c1": 0.5, "c2": 0.3, "w": 0.9}, bounds=box)
            found.append(float(peer.optimize(lambda x: np.asarray(compiled(x)), generations, verbose=False)[0]))
        logging.shutdown()
    return found


def run_evox(name: str, num_dims: int, particles: int, generations: int, seeds: int) -> list[float]:
    import jax
    import jax.numpy as jnp

    loss, low, high = make_loss(name, num_dims)
    peer = importlib.import_module("evox.algorithms").PSO(jnp.full(num_dims, low), jnp.full(num_dims, high), particles)
    found = []
    ask, tell, evaluate = jax.jit(peer.ask), jax.jit(peer.tell), jax.jit(loss)
    for seed in range(seeds):
        state, lowest = peer.init(jax.random.PRNGKey(seed)), float("inf")
        for _ in range(generations):
            points, state = ask(state)
            losses = evaluate(points)
            state = tell(state, losses)
            lowest = min(lowest, float(losses.min()))
        found.append(lowest)
    return found


RUNNERS = {"jaxhpo": run_ours, "evosax": run_evosax, "pyswarms": run_pyswarms, "EvoX": run_evox}


def in_other_python(python: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """EvoX's results from another environment, which reads this project from its source."""
    root = Path(__file__).resolve().parent.parent
    command = [python, "-m", "experiments.peers_pso", "--worker", *forwarded(arguments)]
    done = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True)
    if done.returncode:
        print(f"EvoX left out: {(done.stderr.strip().splitlines() or ['no output'])[-1]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def forwarded(arguments: argparse.Namespace) -> list[str]:
    words = ["--seeds", arguments.seeds, "--particles", arguments.particles, "--generations", arguments.generations]
    return [str(word) for word in [*words, "--dims", *arguments.dims, *(["--float32"] if arguments.float32 else [])]]


def run_peer(peer: str, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The lowest loss of every seed by ``problem-D``."""
    found = {}
    for num_dims in arguments.dims:
        for name in NAMES:
            started = time.perf_counter()
            sizes = (num_dims, arguments.particles, arguments.generations, arguments.seeds)
            found[f"{name}-{num_dims}"] = RUNNERS[peer](name, *sizes)
            print(f"{peer:9} {name}-{num_dims}  {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    return found


def quality_table(results: dict[str, dict[str, list[float]]]) -> list[str]:
    """Markdown: median [quartiles] by problem and peer, and how often ours has the lower median."""
    peers = list(results)
    lines = ["| problem | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    for problem in results["jaxhpo"]:
        cells = []
        for peer in peers:
            low, middle, high = statistics.quantiles(results[peer][problem], n=4, method="inclusive")
            cells.append(f"{middle:.3g} [{low:.2g}, {high:.2g}]")
        lines.append(f"| {problem} | " + " | ".join(cells) + " |")
    ours = {problem: statistics.median(values) for problem, values in results["jaxhpo"].items()}
    for peer in peers[1:]:
        wins = sum(ours[problem] < statistics.median(values) for problem, values in results[peer].items())
        lines.append(f"\njaxhpo has the lower median than {peer} on {wins} of {len(ours)} problems.")
    return lines


def speed_lines(repeats: int = 15) -> list[str]:
    """Generations a second of a scanned swarm on rastrigin-10, ours and evosax's in turn, both in float32.

    Ours once on the same objective on the box, once through ``Space.decode``, which the peer does not have.
    """
    import jax
    import jax.numpy as jnp
    from evosax.algorithms import PSO as Peer

    from jaxhpo.core import Feedback
    from jaxhpo.optimizers.pso import PSO

    problem, (loss, low, high) = make_problem("rastrigin", 10), make_loss("rastrigin", 10)
    lines = [
        "| particles | ours | jaxhpo, generations/s | evosax, generations/s | ratio [lowest, highest of repeats] |",
        "|---|---|---|---|---|",
    ]
    for particles, generations in ((64, 4000), (1024, 400)):
        swarm, peer = PSO(particles), Peer(particles, jnp.zeros(10))
        params = peer.default_params

        def ours(key: jax.Array, decodes: bool, swarm: PSO = swarm, generations: int = generations) -> jax.Array:
            def evaluate(cube: Any) -> Any:
                if decodes:
                    return jax.vmap(lambda z: problem.loss(None, problem.space.decode(z)))(cube)
                return loss(low + (high - low) * cube)

            def one_round(carry: Any, key: jax.Array) -> Any:
                state, lowest = carry
                query = swarm.ask(key, state)
                losses = evaluate(query.cube)
                return (swarm.update(key, state, query, Feedback.finished(losses)), jnp.minimum(lowest, losses.min())), None

            start = (swarm.init(key, problem.space.spec), jnp.array(jnp.inf))
            return jnp.asarray(jax.lax.scan(one_round, start, jax.random.split(key, generations))[0][1])

        def theirs(
            key: jax.Array, peer: Any = peer, params: Any = params, size: tuple[int, int] = (particles, generations)
        ) -> Any:
            def one_round(state: Any, key: jax.Array) -> Any:
                points, state = peer.ask(key, state, params)
                return peer.tell(key, points, loss(points), state, params)[0], None

            start = jax.random.uniform(key, (size[0], 10), minval=low, maxval=high)
            state = peer.init(key, start, loss(start), params)
            return jax.lax.scan(one_round, state, jax.random.split(key, size[1]))[0].best_fitness

        programs: dict[str, Any] = {
            "on the box": jax.jit(functools.partial(ours, decodes=False)),
            "evosax": jax.jit(theirs),
            "through Space.decode": jax.jit(functools.partial(ours, decodes=True)),
        }
        rates: dict[str, list[float]] = {label: [] for label in programs}
        for repeat in range(repeats + 1):  # the first compiles
            for label, program in programs.items():
                started = time.perf_counter()
                jax.block_until_ready(program(jax.random.key(repeat)))
                if repeat:
                    rates[label].append(generations / (time.perf_counter() - started))
        for label in ("on the box", "through Space.decode"):
            ratios = [a / b for a, b in zip(rates[label], rates["evosax"], strict=True)]
            cells = [f"{statistics.median(rates[name]):.3g}" for name in (label, "evosax")]
            spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
            lines.append(f"| {particles} | {label} | {cells[0]} | {cells[1]} | {spread} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--generations", type=int, default=200)
    parser.add_argument("--float32", action="store_true", help="search in float32")
    parser.add_argument("--speed", action="store_true", help="measure speed against evosax, too")
    parser.add_argument("--evox-python", help="the Python of an environment that has EvoX")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    lines = []
    if arguments.speed and not arguments.worker:
        if importlib.util.find_spec("evosax"):
            lines += ["## Speed", "", *speed_lines(), ""]
        else:
            print("speed left out: evosax is not installed", file=sys.stderr)
    jax.config.update("jax_enable_x64", not arguments.float32)
    if arguments.worker:
        print(json.dumps(run_peer("EvoX", arguments)))
        return
    results = {"jaxhpo": run_peer("jaxhpo", arguments)}
    for peer in ("evosax", "pyswarms"):
        if importlib.util.find_spec(peer):
            results[peer] = run_peer(peer, arguments)
    if arguments.evox_python:
        results |= {"EvoX": found} if (found := in_other_python(arguments.evox_python, arguments)) else {}
    kind = "float32" if arguments.float32 else "float64"
    head = f"{arguments.particles} particles, {arguments.generations} generations, {arguments.seeds} seeds, {kind}"
    title = f"Loss above the optimum, median [quartiles]: {head}. JAX {jax.__version__}, Python {platform.python_version()}."
    text = "\n".join(["# Particle swarms side by side", "", title, "", *quality_table(results), "", *lines])
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
