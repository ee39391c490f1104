"""What Bayesian optimization costs, and that one program does what a host loop does.

    python -m experiments.bayes [--only batches,programs,long] [--out bayes.md]

- batches: milliseconds for a batch of 1 and of 16 lanes after 100 observations.
- programs: a study of 100 trials on Hartmann-6 under one ``jit``, 32 of them under ``vmap`` in one call, and 32 host loops of
  ``init / ask / update``; regrets compared by the two-sample Kolmogorov-Smirnov test.
- long: 3,000 observations; milliseconds for each suggestion along the way, and the memory that the compiled update asks for.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def update_after(optimizer: Any, problem: Any, num_observations: int) -> Callable[[int], Any]:
    """A compiled update of a batch when so many random points have been observed; takes a number for its key."""
    import jax
    import jax.numpy as jnp

    from jaxhpo import Feedback

    key, space = jax.random.key(0), problem.space
    loss = jax.vmap(lambda u: problem.loss(key, space.decode(u)))
    state = optimizer.init(key, space.spec)
    cube = space.spec.snap(jax.random.uniform(key, (num_observations, space.num_dims)))
    table = dataclasses.replace(
        state.table,
        cube=state.table.cube.at[:num_observations].set(cube),
        loss=state.table.loss.at[:num_observations].set(loss(cube)),
        count=jnp.int32(num_observations),
    )
    design = dataclasses.replace(state.design, left=jnp.int32(0))
    state = dataclasses.replace(state, table=table, design=design)
    query, update = optimizer.ask(key, state), jax.jit(optimizer.update)
    feedback = Feedback.finished(loss(query.cube))
    return lambda number: jax.block_until_ready(update(jax.random.fold_in(key, number), state, query, feedback))


def batches() -> list[str]:
    """Milliseconds a batch."""
    import jaxhpo as jh
    from jaxhpo import benchmarks

    lines = ["| problem | lanes | milliseconds a batch: median [range] | of one lane's |", "|---|---|---|---|"]
    for problem in (benchmarks.hartmann6(), benchmarks.ackley(10), benchmarks.mixed_integer(6)):
        runs = {}
        for lanes in (1, 16):
            optimizer = jh.BayesOpt(num_lanes=lanes, num_initial=1, capacity=200)
            runs[lanes] = update_after(optimizer, problem, 100)
            runs[lanes](0)
        seconds: dict[int, list[float]] = {1: [], 16: []}
        for number in range(15):
            for lanes, run in runs.items():
                began = time.perf_counter()
                run(number)
                seconds[lanes].append(1e3 * (time.perf_counter() - began))
        one = np.median(seconds[1])
        for lanes, values in seconds.items():
            spread = f"{np.median(values):.1f} [{min(values):.1f} to {max(values):.1f}]"
            lines.append(f"| {problem.name}-{problem.space.num_dims} | {lanes} | {spread} | {np.median(values) / one:.1f} |")
    return lines


def programs(num_studies: int = 32, num_trials: int = 100) -> list[str]:
    """One jit, one vmap, and host loops."""
    import jax
    from scipy.stats import ks_2samp

    import jaxhpo as jh
    from jaxhpo import benchmarks

    problem, optimizer = benchmarks.hartmann6(), jh.BayesOpt(num_lanes=1)
    study = jh.pure_study(problem.loss, problem.space, optimizer, num_trials)
    keys = jax.random.split(jax.random.key(0), num_studies)
    took, regrets = {}, {}
    one, many = jax.jit(study).lower(keys[0]).compile(), jax.jit(jax.vmap(study)).lower(keys).compile()
    began = time.perf_counter()
    regrets["one jit, one after the other"] = np.array([float(one(key).loss) for key in keys]) - problem.optimum
    took["one jit, one after the other"] = time.perf_counter() - began
    began = time.perf_counter()
    regrets["one vmap"] = np.asarray(many(keys).loss) - problem.optimum
    took["one vmap"] = time.perf_counter() - began

    ask, update = jax.jit(optimizer.ask), jax.jit(optimizer.update)
    loss = jax.jit(lambda u: problem.loss(keys[0], problem.space.decode(u)))
    init = jax.jit(optimizer.init, static_argnums=1)
    state = init(keys[0], problem.space.spec)
    query = ask(keys[0], state)
    update(keys[0], state, query, jh.Feedback.finished(loss(query.cube[0])[None]))  # all compiled before the clock starts
    began, found = time.perf_counter(), []
    for key in jax.random.split(jax.random.key(1), num_studies):
        state, best = init(key, problem.space.spec), np.inf
        for number in range(num_trials):
            now = jax.random.fold_in(key, number)
            query = ask(now, state)
            value = loss(query.cube[0])
            best = min(best, float(value))
            state = update(now, state, query, jh.Feedback.finished(value[None]))
        found.append(best - problem.optimum)
    regrets["host loop, other keys"], took["host loop, other keys"] = np.array(found), time.perf_counter() - began

    lines = [
        "| how | regret of 32 studies: median [quartiles] | p against the host loop | seconds in all |",
        "|---|---|---|---|",
    ]
    for how, values in regrets.items():
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
        p = ks_2samp(values, regrets["host loop, other keys"]).pvalue
        lines.append(f"| {how} | {median:.1e} [{low:.1e}, {high:.1e}] | {p:.2f} | {took[how]:.0f} |")
    return lines


def long(num_trials: int = 3000) -> list[str]:
    """A study of many trials."""
    import jax

    import jaxhpo as jh
    from jaxhpo import benchmarks

    problem, optimizer = benchmarks.hartmann6(), jh.BayesOpt(num_lanes=8)
    seen: list[tuple[int, float]] = []
    began = time.perf_counter()
    result = jh.minimize(
        problem.loss,
        problem.space,
        optimizer,
        key=jax.random.key(0),
        num_trials=num_trials,
        progress=lambda progress: seen.append((progress.trials, progress.elapsed)),
    )
    took = time.perf_counter() - began
    assert np.isfinite(result.trials["loss"]).all()
    regret = result.best.loss - problem.optimum
    lines = [f"{num_trials} trials in {took:.0f} s with compilation, best {regret:.1e} above the optimum.", ""]
    lines += ["| observations | milliseconds a suggestion, batches of 8 |", "|---|---|"]
    trials, elapsed = np.array(seen).T
    for low, high in ((0, 100), (100, 250), (250, 500), (500, 1000), (1000, 2000), (2000, num_trials)):
        inside = (trials >= low) & (trials <= high)
        if inside.sum() > 1:
            first, last = np.flatnonzero(inside)[[0, -1]]
            each = 1e3 * (elapsed[last] - elapsed[first]) / max(trials[last] - trials[first], 1)
            lines.append(f"| {low} to {high} | {each:.1f} |")
    state = optimizer.init(jax.random.key(0), problem.space.spec)
    while (more := optimizer.enlarged(state)) is not state:
        state = more
    query = optimizer.ask(jax.random.key(0), state)
    feedback = jh.Feedback.finished(query.cube[:, 0])
    memory = jax.jit(optimizer.update).lower(jax.random.key(0), state, query, feedback).compile().memory_analysis()
    if memory is not None:
        lines += ["", f"The compiled update of the largest table asks for {memory.temp_size_in_bytes / 2**20:.0f} MiB."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="batches,programs,long", help="parts, with commas between")
    parser.add_argument("--out", type=Path, help="write the tables to this Markdown file")
    arguments = parser.parse_args()
    parts = {"batches": batches, "programs": programs, "long": long}
    lines: list[str] = []
    for name in arguments.only.split(","):
        if name not in parts:
            parser.error(f"--only {name}: must be one of {', '.join(parts)}")
        lines += [f"## {name.capitalize()}", "", *parts[name](), ""]
        print("\n".join(lines), flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
