"""What hypergradients cost: time as a multiple of plain training, and XLA's own count of temporary memory.

    python -m experiments.hypergradients [--quick] [--only reverse forward many lanes] [--steps 500]

Everything is measured as the driver runs it, several trainings in turn within one compiled loop, plain training and
estimators turn by turn in one process; medians over the turns with their range. Networks of 10^4 (64-128-10) and 10^6
parameters (784-800-400-10), tanh, SGD with momentum and Adam.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxhpo as jh
from jaxhpo.hypergradients import Estimator, Forward, Truncated, Unrolled
from jaxhpo.hypergradients.estimate import score, split_floats, trained

SIZES = {"10^4": (64, 128, 10), "10^6": (784, 800, 400, 10)}
EXAMPLES = 2000
MIB = 2**20


def network_task(sizes: tuple[int, ...], optimizer: Callable[[Any], Any], batch_size: int) -> jh.Task:
    """A tanh network on random data, its minibatches drawn by each step's key; ``weights`` may weigh examples."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(EXAMPLES, sizes[0])).astype(np.float32)
    y = rng.integers(0, sizes[-1], EXAMPLES).astype(np.int32)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        for i, (w, b) in enumerate(params):
            x = x @ w + b
            x = jnp.tanh(x) if i < len(params) - 1 else x
        return x

    def init(x: jax.Array, y: jax.Array, key: jax.Array, hparams: Any) -> Any:
        keys = jax.random.split(key, len(sizes) - 1)
        pairs = zip(keys, itertools.pairwise(sizes), strict=True)
        params = [(jax.random.normal(k, (a, b)) / np.sqrt(a), jnp.zeros(b)) for k, (a, b) in pairs]
        return {"params": params, "opt_state": optimizer(hparams).init(params)}

    def step(x: jax.Array, y: jax.Array, key: jax.Array, hparams: Any, state: Any) -> Any:
        index = jax.random.randint(key, (batch_size,), 0, EXAMPLES)

        def loss(params: Any, hparams: Any, x: jax.Array, y: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
            each = optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y)
            if "weights" in hparams:
                each *= hparams["weights"][index % hparams["weights"].size]
            return jnp.mean(each), None

        _, grads = jh.tasks.value_and_grad(loss, state["params"], hparams, x[index], y[index], index)
        updates, opt_state = optimizer(hparams).update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}

    def evaluate(x: jax.Array, y: jax.Array, hparams: Any, state: Any) -> dict[str, jax.Array]:
        return {"loss": jh.tasks.metrics.cross_entropy(predict(state["params"], x[:256]), y[:256])}

    bound = [jax.tree_util.Partial(f, jnp.asarray(x), jnp.asarray(y)) for f in (init, step, evaluate)]
    return jh.Task(*bound)


def sgd(hparams: Any) -> optax.GradientTransformation:
    return optax.sgd(hparams["lr"], momentum=hparams["momentum"])


def adam(hparams: Any) -> optax.GradientTransformation:
    return optax.adam(hparams["lr"], b1=hparams["b1"], eps_root=1e-16)


OPTIMIZERS = {"SGD-momentum": (sgd, {"lr": 0.01, "momentum": 0.9}), "Adam": (adam, {"lr": 1e-3, "b1": 0.9})}


def trained_metric(task: jh.Task, num_steps: int) -> Callable[[jax.Array, Any], Any]:
    """The training without derivatives, as a function like an estimator."""

    def run(key: jax.Array, hparams: Any) -> Any:
        state = trained(task, key, hparams, num_steps)
        return score(task, "loss", hparams, state)[0]

    return run


def estimated(estimator: Estimator) -> Callable[[jax.Array, Any], Any]:
    return lambda key, hparams: estimator.estimate(key, *split_floats(hparams)).grad


def compiled(run: Callable[[jax.Array, Any], Any], hparams: Any, repeats: int) -> tuple[Callable[[], Any], float]:
    """``repeats`` runs in turn as one program, and the MiB of temporary memory that XLA counts for it."""

    def loop(key: jax.Array, hparams: Any) -> Any:
        shapes = jax.eval_shape(run, key, hparams)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        one = lambda i, total: jax.tree.map(jnp.add, total, run(jax.random.fold_in(key, i), hparams))
        return lax.fori_loop(0, repeats, one, zeros)

    hparams = jax.tree.map(jnp.asarray, hparams)
    program = jax.jit(loop).lower(jax.random.key(0), hparams).compile()
    analysis: Any = program.memory_analysis()
    return lambda: jax.block_until_ready(program(jax.random.key(0), hparams)), analysis.temp_size_in_bytes / MIB


def measured(runs: dict[str, tuple[Callable[..., Any], Any]], repeats: int, turns: int) -> dict[str, tuple[np.ndarray, float]]:
    """Seconds a training of every run, ``[turns]``, taken turn by turn; and its MiB."""
    programs = {name: compiled(run, hparams, repeats) for name, (run, hparams) in runs.items()}
    for call, _ in programs.values():
        call()
    seconds = {name: np.zeros(turns) for name in programs}
    for turn in range(turns):
        for name, (call, _) in programs.items():
            begin = time.perf_counter()
            call()
            seconds[name][turn] = (time.perf_counter() - begin) / repeats
    return {name: (seconds[name], programs[name][1]) for name in programs}


def print_table(title: str, runs: dict[str, tuple[Callable[..., Any], Any]], repeats: int, turns: int) -> None:
    """One row a run, the first of which is plain training."""
    found = measured(runs, repeats, turns)
    plain = next(iter(found.values()))[0]
    for name, (seconds, mib) in found.items():
        ratio = seconds / plain
        print(
            f"| {title} | {name} | {1e3 * np.median(seconds):.0f} ms | {np.median(ratio):.2f}x [{ratio.min():.2f} to "
            f"{ratio.max():.2f}] | {mib:.1f} |",
            flush=True,
        )


def reverse(sizes: list[str], num_steps: int, repeats: int, turns: int, batch_size: int) -> None:
    for size, (name, (optimizer, hparams)) in itertools.product(sizes, OPTIMIZERS.items()):
        layers = SIZES[size]
        task = network_task(layers, optimizer, batch_size)
        budget = 1024 if size == "10^4" else 4096
        runs: dict[str, Any] = {"plain training": (trained_metric(task, num_steps), hparams)}
        plans = {"chosen": Unrolled(task, num_steps, budget_mib=budget)}
        if size == "10^4":
            plans["everything stored"] = Unrolled(task, num_steps, segments=())
        root = int(np.sqrt(num_steps))
        plans |= {f"segments of {root}": Unrolled(task, num_steps, segments=(root,))}
        plans |= {"mixed mode": Unrolled(task, num_steps, segments=(root,), mixed_mode=True)}
        plans |= {"three levels": Unrolled(task, num_steps, segments=(num_steps // 8, -(-num_steps // 64)))}
        runs |= {plan: (estimated(estimator), hparams) for plan, estimator in plans.items()}
        runs["last tenth only"] = (estimated(Truncated(task, num_steps, max(num_steps // 10, 1))), hparams)
        print_table(f"{size}, {name}", runs, repeats if size == "10^4" else 1, turns)
        quarter = Unrolled(task, num_steps // 4, segments=(int(np.sqrt(num_steps // 4)),))
        mib = compiled(estimated(quarter), hparams, 1)[1]
        print(f"| {size}, {name} | a quarter of the steps in segments of the root | | | {mib:.1f} |")


def forward(sizes: list[str], num_steps: int, repeats: int, turns: int, batch_size: int) -> None:
    """One rate for each stretch of the training: k hyperparameters, k tangents."""
    for size, count in itertools.product(sizes, (1, 4, 16)):
        if size == "10^6" and count == 16:
            continue
        optimizer: Any = lambda h, count=count: optax.sgd(lambda t: h["lr"][jnp.asarray(t) * count // num_steps], momentum=0.9)
        task = network_task(SIZES[size], optimizer, batch_size)
        hparams = {"lr": np.full(count, 0.01, np.float32)}
        runs = {
            "plain training": (trained_metric(task, num_steps), hparams),
            f"forward, k = {count}": (estimated(Forward(task, num_steps)), hparams),
        }
        print_table(f"{size}, SGD-momentum", runs, repeats if size == "10^4" else 1, turns)
        short = compiled(estimated(Forward(task, num_steps // 4)), hparams, 1)[1]
        print(f"| {size}, SGD-momentum | forward, k = {count}, a quarter of the steps | | | {short:.1f} |")


def many(sizes: list[str], num_steps: int, repeats: int, turns: int, batch_size: int) -> None:
    """A weight for each training example: 10^4 and 10^5 hyperparameters beside one, and a rate for each step."""
    del sizes
    task = network_task(SIZES["10^4"], lambda h: optax.sgd(0.01, momentum=0.9), batch_size)
    rates = network_task(SIZES["10^4"], lambda h: optax.sgd(lambda t: h["lr"][t % h["lr"].size], momentum=0.9), batch_size)
    runs: dict[str, Any] = {}
    for count in (1, 10_000, 100_000):
        runs[f"reverse, {count} weights"] = (estimated(Unrolled(task, num_steps)), {"weights": np.ones(count, np.float32)})
    for count in (1, num_steps):
        runs[f"reverse, {count} learning rates"] = (
            estimated(Unrolled(rates, num_steps)),
            {"lr": np.full(count, 0.01, np.float32)},
        )
    print_table("10^4, SGD-momentum (ratios to one weight)", runs, repeats, turns)


def lanes(sizes: list[str], num_steps: int, repeats: int, turns: int, batch_size: int) -> None:
    """Eight lanes at once, by a batch and one after the other."""
    del sizes
    for name, (optimizer, hparams) in OPTIMIZERS.items():
        task = network_task(SIZES["10^4"], optimizer, batch_size)
        estimator = Unrolled(task, num_steps)
        spread_out = jax.tree.map(lambda x: jnp.full(8, x), hparams)
        one = estimated(estimator)
        runs: dict[str, Any] = {
            "plain training, 8 lanes batched": (
                lambda key, h, t=task: jax.vmap(lambda h: trained_metric(t, num_steps)(key, h))(h),
                spread_out,
            ),
            "reverse, 8 lanes batched": (lambda key, h, one=one: jax.vmap(lambda h: one(key, h))(h), spread_out),
            "reverse, 8 lanes in turn": (lambda key, h, one=one: lax.map(lambda h: one(key, h), h), spread_out),
        }
        print_table(f"10^4, {name}", runs, 1, turns)


PARTS = {"reverse": reverse, "forward": forward, "many": many, "lanes": lanes}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few steps and turns: does it run?")
    given = parser.parse_args()
    steps, turns = (40, 1) if given.quick else (given.steps, given.turns)
    print(f"{steps} steps, batches of {given.batch_size}\n\n| network | what | time | ratio | MiB |\n|---|---|---|---|---|")
    for part in given.only:
        PARTS[part](given.sizes, steps, 1 if given.quick else 4, turns, given.batch_size)


if __name__ == "__main__":
    main()
