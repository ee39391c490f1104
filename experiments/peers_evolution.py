"""CMA-ES and differential evolution beside cmaes, evosax and SciPy: same problems, lanes and evaluations.

    python -m experiments.peers_evolution --out peers_evolution.md

All search the unit cube in float64 (``--float32`` for that), and losses are differences to the optimum, which lies at a
random place; "at the bound" is the ellipsoid with half of its coordinates at an end of the box. Everybody's CMA-ES starts in
the middle with a step of 0.3, as ours does by default. cmaes' are restarted with twice the population, as its documentation
shows; evosax has neither bounds nor restarts, so its points are clipped. SciPy's differential evolution runs without its
final descent; ours has its default population, the peers' is the batch of lanes. On the mixed problem integers and choices
are the level in which a coordinate lies, but for those peers that know them: ``CMAwM`` integers (choices are integers to it),
``CatCMAwM`` both. On the cliff (a sphere that fails beyond its optimum in the first coordinate) a failure is told as NaN to
ours, as a large number to the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("sphere", "ellipsoid", "rosenbrock", "rastrigin", "ackley", "at the bound", "cliff", "mixed_integer")
STEP = 0.3
FAILED = 1e30
Found = dict[str, list[float]]  # the lowest loss of each seed, by problem


def make_problem(name: str, num_dims: int) -> Any:
    """A problem whose optimum lies at a random place, the same for every peer and seed."""
    from jaxhpo.benchmarks import functions

    rng = np.random.default_rng([NAMES.index(name), num_dims])
    count = num_dims - num_dims // 5 - 2 * num_dims // 5 if name == "mixed_integer" else num_dims
    shift = rng.uniform(-3.0, 7.0, count)
    if name == "at the bound":  # half of the coordinates at either end of the box
        shift[::2] = np.where(rng.random(shift[::2].size) < 0.5, -5.0, 10.0)
    plain = {"at the bound": "ellipsoid", "cliff": "sphere"}.get(name, name)
    return getattr(functions, plain)(num_dims, shift=shift)


def make_loss(names: Sequence[str], num_dims: int) -> Callable[[Any, Any], Any]:
    """``(number of the problem, points of the cube [B, D]) -> losses [B]``, NaN where it fails; one program for all of them."""
    import jax
    import jax.numpy as jnp

    def of(name: str) -> Callable[[Any], Any]:
        problem = make_problem(name, num_dims)
        # The cliff is just beyond the optimum.
        edge = float(problem.space.encode(problem.minimiser)[0]) + 0.02 if name == "cliff" else 2.0

        def loss(cube: Any) -> Any:
            value = problem.loss(None, problem.space.decode(cube)) - problem.optimum
            return jnp.where(cube[0] > edge, jnp.nan, value)

        return jax.vmap(loss)

    branches = [of(name) for name in names]
    return lambda number, cube: jax.lax.switch(number, branches, cube)


def as_float64(state: Any) -> Any:
    """The state with its floats in the widest type that is enabled."""
    import jax
    import jax.numpy as jnp

    kind = jnp.zeros(()).dtype
    return jax.tree.map(lambda x: x.astype(kind) if jnp.issubdtype(x.dtype, jnp.floating) else x, state)


def all_seeds(search: Callable[[Any, Any], Any], names: Sequence[str], seeds: int) -> Found:
    """A search ``(key, number of the problem) -> lowest loss``, compiled once, for all seeds of each problem."""
    import jax

    compiled, keys = jax.jit(jax.vmap(search, (0, None))), jax.random.split(jax.random.key(0), seeds)
    return {name: [float(x) for x in compiled(keys, number)] for number, name in enumerate(names)}


def run_ours(optimizer: Any, names: Sequence[str], num_dims: int, rounds: int, seeds: int) -> Found:
    import jax
    import jax.numpy as jnp

    from jaxhpo.core import Feedback

    spec, loss = make_problem(names[0], num_dims).space.spec, make_loss(names, num_dims)

    def search(key: jax.Array, number: Any) -> jax.Array:
        def one_round(carry: Any, key: jax.Array) -> Any:
            state, lowest = carry
            query = optimizer.ask(key, state)
            losses = loss(number, query.cube)
            return (optimizer.update(key, state, query, Feedback.finished(losses)), jnp.fmin(lowest, jnp.nanmin(losses))), None

        state = as_float64(optimizer.init(jax.random.fold_in(key, 0), spec))
        keys = jax.random.split(jax.random.fold_in(key, 1), rounds)
        return jax.lax.scan(one_round, (state, jnp.array(jnp.inf)), keys)[0][1]

    return all_seeds(search, names, seeds)


def run_evosax(peer: Any, params: Any, names: Sequence[str], num_dims: int, size: int, rounds: int, seeds: int) -> Found:
    """An algorithm of evosax, whether it has a mean or a population."""
    import jax
    import jax.numpy as jnp

    loss = make_loss(names, num_dims)

    def told(number: Any, points: Any) -> Any:
        losses = loss(number, jnp.clip(points, 0.0, 1.0))
        return jnp.where(jnp.isnan(losses), FAILED, losses)

    def search(key: jax.Array, number: Any) -> jax.Array:
        key_start, key_init, key_loop = jax.random.split(key, 3)
        lowest, left = jnp.array(jnp.inf), rounds
        if hasattr(params, "std_init"):
            state = peer.init(key_init, jnp.full(num_dims, 0.5), params)
        else:
            start = jax.random.uniform(key_start, (size, num_dims))
            first = told(number, start)
            state, lowest, left = peer.init(key_init, start, first, params), first.min(), rounds - 1

        def one_round(carry: Any, key: jax.Array) -> Any:
            state, lowest = carry
            key_ask, key_tell = jax.random.split(key)
            points, state = peer.ask(key_ask, state, params)
            losses = told(number, points)
            state, _ = peer.tell(key_tell, points, losses, state, params)
            return (state, jnp.minimum(lowest, losses.min())), None

        return jax.lax.scan(one_round, (state, lowest), jax.random.split(key_loop, left))[0][1]

    return all_seeds(search, names, seeds)


def run_cmaes(kind: str, names: Sequence[str], num_dims: int, size: int, rounds: int, seeds: int) -> Found:
    """A class of the library cmaes, started again with twice the population where it says that it should stop."""
    import cmaes
    import jax

    spec, compiled = make_problem(names[0], num_dims).space.spec, jax.jit(make_loss(names, num_dims))
    floats, ints, choices = spec.is_float, spec.is_int, spec.is_choice
    levels = spec.levels

    def evaluate(number: int, points: np.ndarray) -> np.ndarray:
        padded = np.full((-(-len(points) // size) * size, num_dims), 0.5)  # few shapes to compile
        padded[: len(points)] = points
        found = np.concatenate([np.asarray(compiled(number, part)) for part in padded.reshape(-1, size, num_dims)])[
            : len(points)
        ]
        return np.where(np.isnan(found), FAILED, found)

    def make(population: int, mean: np.ndarray, seed: int) -> Any:
        box = np.tile([0.0, 1.0], (num_dims, 1))
        if kind == "CMAwM":  # its levels: the middles of ours
            steps = np.where(floats, 0.0, 1.0 / np.maximum(levels, 1))
            box = np.where(floats[:, None], box, np.stack([0.5 * steps, 1.0 - 0.5 * steps], axis=1))
            return cmaes.CMAwM(mean, STEP, box, steps, seed=seed, population_size=population)
        if kind == "CatCMAwM":
            return cmaes.CatCMAwM(
                x_space=[[0.0, 1.0]] * int(floats.sum()),
                z_space=[list((np.arange(k) + 0.5) / k) for k in levels[ints]],
                c_space=[int(k) for k in levels[choices]],
                population_size=population,
                seed=seed,
            )
        return getattr(cmaes, kind)(mean, STEP, bounds=box, seed=seed, population_size=population)

    def asked(peer: Any) -> tuple[np.ndarray, Any]:
        """A point of the cube, and what the peer wants to be told."""
        if kind == "CMAwM":
            return peer.ask()
        if kind == "CatCMAwM":
            found = peer.ask()
            point = np.empty(num_dims)
            point[floats], point[ints] = found.x, found.z
            point[choices] = (np.argmax(found.c, axis=1) + 0.5) / levels[choices]
            return point, found
        point = peer.ask()
        return point, point

    def search(number: int, seed: int) -> float:
        rng = np.random.default_rng(seed)
        population, left, lowest = size, size * rounds, np.inf
        peer = make(population, np.full(num_dims, 0.5), seed)
        while left > 0:
            pairs = [asked(peer) for _ in range(min(population, left))]
            losses = evaluate(number, np.stack([point for point, _ in pairs]))
            lowest, left = min(lowest, losses.min()), left - len(pairs)
            if len(pairs) < population:
                break
            peer.tell([(told, loss) for (_, told), loss in zip(pairs, losses.tolist(), strict=True)])
            if peer.should_stop():
                population *= 2
                peer = make(population, rng.uniform(size=num_dims), seed + 1000 * population)
        return float(lowest)

    return {name: [search(number, seed) for seed in range(seeds)] for number, name in enumerate(names)}


def run_scipy(names: Sequence[str], num_dims: int, size: int, rounds: int, seeds: int) -> Found:
    """SciPy's differential evolution with its defaults (best/1/bin, dither), but for the population."""
    import jax
    from scipy.optimize import differential_evolution

    compiled = jax.jit(make_loss(names, num_dims))

    def search(number: int, seed: int) -> float:
        def evaluate(points: np.ndarray) -> np.ndarray:
            losses = np.asarray(compiled(number, points.T))
            return np.where(np.isnan(losses), FAILED, losses)

        start = np.random.default_rng(seed).uniform(size=(size, num_dims))
        found = differential_evolution(
            evaluate, [(0.0, 1.0)] * num_dims, init=start, maxiter=rounds - 1, tol=0.0, polish=False, vectorized=True,
            updating="deferred", rng=np.random.default_rng(seed),
        )  # fmt: skip
        return float(found.fun)

    return {name: [search(number, seed) for seed in range(seeds)] for number, name in enumerate(names)}


def runners(family: str, names: Sequence[str], size: int, num_dims: int) -> dict[str, Callable[[int, int], Found]]:
    """Who takes part, ours first: ``(rounds, seeds) -> losses``."""
    import jax.numpy as jnp

    from jaxhpo.optimizers import CMAES, DifferentialEvolution

    def ours(optimizer: Any) -> Callable[[int, int], Found]:
        return lambda rounds, seeds: run_ours(optimizer, names, num_dims, rounds, seeds)

    def evosax(cls: str, **settings: Any) -> Callable[[int, int], Found]:
        import evosax.algorithms

        peer = getattr(evosax.algorithms, cls)(size, jnp.zeros(num_dims))
        params = peer.default_params.replace(**settings)
        return lambda rounds, seeds: run_evosax(peer, params, names, num_dims, size, rounds, seeds)

    def cmaes(kind: str) -> Callable[[int, int], Found]:
        return lambda rounds, seeds: run_cmaes(kind, names, num_dims, size, rounds, seeds)

    mixed = names[0] == "mixed_integer"
    has = {package: importlib.util.find_spec(package) is not None for package in ("evosax", "cmaes")}
    if family == "CMA-ES":
        found = {"jaxhpo": ours(CMAES(size))}
        if has["cmaes"]:
            found |= {f"cmaes {kind}": cmaes(kind) for kind in (("CMAwM", "CatCMAwM") if mixed else ("CMA",))}
        if has["evosax"]:
            found["evosax CMA_ES"] = evosax("CMA_ES", std_init=STEP)
    elif family == "separable CMA-ES":
        found = {"jaxhpo": ours(CMAES(size, separable=True))}
        if has["cmaes"]:
            found["cmaes SepCMA"] = cmaes("SepCMA")
        if has["evosax"]:
            found["evosax Sep_CMA_ES"] = evosax("Sep_CMA_ES", std_init=STEP)
    else:
        found = {"jaxhpo": ours(DifferentialEvolution(size))}
        found["SciPy"] = lambda rounds, seeds: run_scipy(names, num_dims, size, rounds, seeds)
        if has["evosax"]:
            found["evosax best/1"] = evosax("DifferentialEvolution")
            found["evosax rand/1"] = evosax("DifferentialEvolution", elitism=False)
    return found


def table(results: dict[str, Found]) -> list[str]:
    """Markdown: median [quartiles] by problem and peer, and how often ours has the lower median."""
    peers = list(dict.fromkeys(peer for found in results.values() for peer in found))
    lines = ["| problem | " + " | ".join(peers) + " |", "|---" * (len(peers) + 1) + "|"]
    for problem, found in results.items():
        cells = []
        for peer in peers:
            if peer not in found:
                cells.append("")
                continue
            low, middle, high = statistics.quantiles(found[peer], n=4, method="inclusive")
            cells.append(f"{middle:.2g} [{low:.1g}, {high:.1g}]")
        lines.append(f"| {problem} | " + " | ".join(cells) + " |")
    for peer in peers[1:]:
        both = [(statistics.median(f["jaxhpo"]), statistics.median(f[peer])) for f in results.values() if peer in f]
        wins = sum(ours < theirs for ours, theirs in both)
        lines.append(f"\njaxhpo has the lower median than {peer} on {wins} of {len(both)} problems.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument(
        "--cmaes-seeds", type=int, default=8, help="seeds of cmaes, whose resampling takes minutes in many dimensions"
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[10, 30])
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=250)
    parser.add_argument("--problems", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--families", nargs="+", default=["CMA-ES", "separable CMA-ES", "DE"])
    parser.add_argument("--ours", action="store_true", help="without the peers")
    parser.add_argument("--float32", action="store_true", help="search in float32")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    import jax

    jax.config.update("jax_enable_x64", not arguments.float32)
    warnings.simplefilter("ignore")
    kind = "float32" if arguments.float32 else "float64"
    head = (
        f"{arguments.lanes} lanes, {arguments.rounds} rounds, {arguments.seeds} seeds (cmaes: {arguments.cmaes_seeds}), {kind}"
    )
    title = f"Loss above the optimum, median [quartiles]: {head}. JAX {jax.__version__}, Python {platform.python_version()}."
    lines = ["# Evolution side by side", "", title]
    for family in arguments.families:
        results: dict[str, Found] = {}
        for num_dims in arguments.dims:
            floats = [name for name in arguments.problems if name != "mixed_integer"]
            for names in filter(None, (floats, [name for name in arguments.problems if name == "mixed_integer"])):
                for peer, search in runners(family, names, arguments.lanes, num_dims).items():
                    if arguments.ours and peer != "jaxhpo":
                        continue
                    started = time.perf_counter()
                    seeds = min(arguments.seeds, arguments.cmaes_seeds) if peer.startswith("cmaes") else arguments.seeds
                    for name, found in search(arguments.rounds, seeds).items():
                        results.setdefault(f"{name}-{num_dims}", {})[peer] = found
                    spent = time.perf_counter() - started
                    print(f"{family}, {peer}, {num_dims} dimensions: {spent:.1f} s", file=sys.stderr, flush=True)
        lines += ["", f"## {family}", "", *table(results)]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
