"""Which derivatives by which arguments of which optax optimizers are right, through a whole training?

    python -m experiments.optax_hypergradients [--only adam lion ...]

Every float that a factory of optax takes is a hyperparameter here. Reverse mode through 40 steps (``Unrolled``) of a tanh
network of 75 parameters on full batches, biases zero at first, float64, against central differences of the same training at
twelve step sizes, Richardson-extrapolated; the pair of step sizes that agrees best is taken. Verdicts:

    right            the two agree to 1e-4, or as closely as the differences agree with each other
    wrong            the differences settle on another number
    jagged           the differences settle on none: the loss jumps as the argument moves
    flat             both are 0 at these values
    zero             zero by structure: refused, with its name, by ``Unrolled.check``
    NaN              reverse mode gives no finite number
    not traceable    refused as an array, by the exception that is quoted
    no reverse mode  JAX refuses to differentiate

The last column of the short table trains again with an input that is always 0, so that its eight weights have exactly zero
gradient, at optax's own ``eps`` and ``eps_root``; where that gives NaN, once more with ``eps_root = 1e-16``.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial
from optax import contrib

from jaxhpo.core import Array
from jaxhpo.errors import JaxhpoError
from jaxhpo.hypergradients import Unrolled
from jaxhpo.hypergradients.estimate import Assemble, Floats, metric_after, split_floats
from jaxhpo.tasks.task import Task

NUM_STEPS = 40
STEP_SIZES = 0.2 * 4.0 ** -np.arange(12)  # of the distance of an argument to 0 or, where it lies between 0 and 1, to 1
MENDING = 1e-16

# Where optax's default is 0, or too small for a finite difference to see.
VALUES = {"weight_decay": 1e-2, "eps": 1e-6, "eps_root": 1e-8, "adam_eps_root": 1e-8}


def mechanized(learning_rate: float, **kwargs: Any) -> Any:
    return contrib.mechanize(optax.sgd(learning_rate), **kwargs)


def sharpness_aware(learning_rate: float, adv_learning_rate: float) -> Any:
    ascent = optax.chain(contrib.normalize(), optax.sgd(adv_learning_rate))
    both = contrib.sam(optax.sgd(learning_rate), ascent, sync_period=2)
    return optax.GradientTransformation(both.init, both.update)  # it refuses what other optimizers are told beside


_AT_A_HUNDREDTH = (
    "adabelief adam adamax adamaxw adamw adan amsgrad fromage lamb lion nadam nadamw novograd optimistic_adam_v2 radam "
    "sign_sgd signum acprop ademamix schedule_free_adamw sophia"
)
_SGD = {"learning_rate": 0.1, "momentum": 0.9}
_FACTORED = {"learning_rate": 0.03, "min_dim_size_to_factor": 2, "weight_decay_rate": 1e-3}

# Factory, and what it is given beside the floats among its defaults.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    **{n: (getattr(optax, n, None) or getattr(contrib, n), {"learning_rate": 0.01}) for n in _AT_A_HUNDREDTH.split()},
    "sgd": (optax.sgd, {"learning_rate": 0.3}),
    "sgd momentum": (optax.sgd, _SGD),
    "sgd nesterov": (optax.sgd, _SGD | {"nesterov": True}),
    "adadelta": (optax.adadelta, {"learning_rate": 1.0}),
    "adafactor": (optax.adafactor, _FACTORED | {"momentum": 0.9, "dtype_momentum": "float64"}),
    "adagrad": (optax.adagrad, {"learning_rate": 0.1}),
    "adopt": (contrib.adopt, {"learning_rate": 0.01, "eps": 0.02}),
    "cocob": (contrib.cocob, {}),
    "dadapt_adamw": (contrib.dadapt_adamw, {"betas": (0.9, 0.999), "estim_lr0": 1e-3}),
    "dog": (contrib.dog, {"init_step": ("heuristic", 1e-3), "weight_decay": 1e-2}),
    "dowg": (contrib.dowg, {"init_estim_sq_dist": 1e-4, "weight_decay": 1e-2}),
    "galore": (contrib.galore, {"learning_rate": 0.01, "rank": 2}),
    "lars": (optax.lars, {"learning_rate": 0.1, "trust_coefficient": 0.1}),
    "lbfgs": (optax.lbfgs, {"learning_rate": 1.0}),
    "lbfgs, no line search": (optax.lbfgs, {"learning_rate": 0.1, "linesearch": None}),
    "madgrad": (contrib.madgrad, {"learning_rate": 0.03}),
    "mechanize sgd": (mechanized, {"learning_rate": 0.3, "weight_decay": 1e-2, "eps": 1e-6, "s_init": 1e-3}),
    "momo": (contrib.momo, {"learning_rate": 1.0, "lower_bound": 0.7}),
    "momo_adam": (contrib.momo_adam, {"learning_rate": 0.03, "lower_bound": 0.7}),
    "muon": (contrib.muon, {"learning_rate": 0.01, "ns_coeffs": (3.4445, -4.775, 2.0315), "adam_weight_decay": 1e-2}),
    "noisy_sgd": (optax.noisy_sgd, {"learning_rate": 0.3, "seed": 0}),
    "optimistic_adam": (optax.optimistic_adam, {"learning_rate": 0.01, "optimism": 0.02}),
    "optimistic_gradient_descent": (optax.optimistic_gradient_descent, {"learning_rate": 0.2}),
    "polyak_sgd": (optax.polyak_sgd, {"max_learning_rate": 1.0, "f_min": 0.7, "eps": 1e-3}),
    "prodigy": (contrib.prodigy, {"betas": (0.9, 0.999), "beta3": 0.99, "estim_lr0": 1e-3}),
    "rmsprop": (optax.rmsprop, {"learning_rate": 0.01, "momentum": 0.9, "initial_scale": 0.01}),
    "rmsprop centered": (optax.rmsprop, {"learning_rate": 0.01, "initial_scale": 0.01, "centered": True}),
    "rprop": (optax.rprop, {"learning_rate": 0.01, "min_step_size": 0.005, "max_step_size": 0.03}),
    "sam sgd": (sharpness_aware, {"learning_rate": 0.3, "adv_learning_rate": 0.05}),
    "schedule_free_sgd": (contrib.schedule_free_sgd, {"learning_rate": 0.5, "weight_decay": 1e-2}),
    "simplified_ademamix": (contrib.simplified_ademamix, {"learning_rate": 0.001, "alpha": 1.0}),
    "sm3": (optax.sm3, {"learning_rate": 0.1}),
    "yogi": (optax.yogi, {"learning_rate": 0.01, "eps": 1e-3}),
}


class Finding(NamedTuple):
    """What is known of one argument."""

    argument: str
    value: float
    verdict: str
    error: float = float("nan")
    gradient: float = float("nan")
    difference: float = float("nan")


def arguments_of(name: str, own: bool = False) -> dict[str, Any]:
    """What a factory is called with; ``own`` keeps optax's epsilons."""
    factory, given = OPTIMIZERS[name]
    parameters = inspect.signature(factory).parameters.values()
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, float)}
    seen = defaults | {key: VALUES[key] for key in defaults if key in VALUES} | given
    return seen | {key: value for key, value in defaults.items() if own and "eps" in key}


def data(seed: int, zero_input: bool) -> tuple[Array, Array]:
    """64 examples of 5 inputs in 3 classes; the first input is always 0 if ``zero_input``."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 5))
    y = np.argmax(np.sin(x @ np.random.default_rng(0).normal(size=(5, 3))) + 0.3 * rng.normal(size=(64, 3)), axis=1)
    x[:, 0] *= not zero_input
    return jnp.asarray(x), jnp.asarray(y)


def network_task(
    factory: Callable[..., Any], activation: Callable[..., Any] = jnp.tanh, zero_input: bool = False, first_bias: float = 0.0
) -> Task:
    """A network of 8 hidden units, trained by ``factory(**hparams)`` on full batches; -9 as bias kills the first relu unit."""

    def loss(params: Any, x: Array, y: Array) -> Array:
        logits = activation(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def init(key: Array, hparams: Any) -> Any:
        one, two = jax.random.split(key)
        weights = {"w1": jax.random.normal(one, (5, 8)) / 5**0.5, "w2": jax.random.normal(two, (8, 3)) / 8**0.5}
        params = weights | {"b1": jnp.zeros(8).at[0].set(first_bias), "b2": jnp.zeros(3)}
        return params, factory(**hparams).init(params)

    def step(x: Array, y: Array, key: Array, hparams: Any, state: Any) -> Any:
        params, opt_state = state
        of_params = lambda params, obj_fn=None: loss(params, x, y)  # L-BFGS refuses what its value_fn does not take
        value, grad = jax.value_and_grad(of_params)(params)
        extra = {"value": value, "grad": grad, "value_fn": of_params, "obj_fn": of_params}
        chain = optax.with_extra_args_support(factory(**hparams))
        updates, opt_state = chain.update(grad, opt_state, params, **extra)
        return optax.apply_updates(params, updates), opt_state

    evaluate = lambda x, y, hparams, state: {"loss": loss(state[0], x, y)}
    return Task(init, Partial(step, *data(1, zero_input)), Partial(evaluate, *data(2, zero_input)))


def final_loss(task: Task, floats: Floats, assemble: Assemble) -> Array:
    return metric_after(task, "loss", NUM_STEPS, floats, assemble)


def programs(assemble: Assemble) -> tuple[Callable[..., Floats], Callable[..., Array]]:
    """Compiled for a task: the gradient at floats, and the losses at stacked floats ``[N]``."""
    gradient = lambda task, floats: Unrolled(task, NUM_STEPS).estimate(jax.random.key(0), floats, assemble).grad
    losses = lambda task, points: lax.map(lambda floats: final_loss(task, floats, assemble), points)
    return jax.jit(gradient), jax.jit(losses)


def differences(losses: Callable[[Floats], Array], floats: Floats) -> dict[str, tuple[float, float]]:
    """Derivative by each float, and how far it is to be doubted; ``losses`` is called once with all points."""
    points, widths = [], {}
    for name, value in floats.items():
        value = float(value)
        widths[name] = STEP_SIZES * (min(value, 1 - value) if 0 < value < 1 else abs(value) or 1.0)
        points += [floats | {name: jnp.asarray(value + sign * h)} for h in widths[name] for sign in (1, -1)]
    values = np.asarray(losses(jax.tree.map(lambda *leaves: jnp.stack(leaves), *points))).reshape(len(floats), -1, 2)
    return {name: extrapolated(found, widths[name]) for name, found in zip(floats, values, strict=True)}


def extrapolated(values: np.ndarray, widths: np.ndarray) -> tuple[float, float]:
    """Richardson's extrapolation of central differences, ``values`` ``[K, 2]`` at ``widths`` ``[K]``, a fourth each time."""
    central = (values[:, 0] - values[:, 1]) / (2 * widths)
    rich = (16 * central[1:] - central[:-1]) / 15
    rounding = 2e-16 * np.abs(values).max(axis=1)[2:] / widths[2:]
    doubt = np.nan_to_num(np.abs(rich[1:] - rich[:-1]) + rounding, nan=np.inf)
    best = int(np.argmin(doubt))
    return float(rich[1:][best]), float(doubt[best])


def compared(argument: str, value: float, gradient: float, difference: float, doubt: float) -> Finding:
    size = max(abs(gradient), abs(difference))
    error = abs(gradient - difference) / size if size else 0.0
    if not np.isfinite(gradient):
        verdict = "NaN"
    elif size * (abs(value) or 1.0) < 1e-12:
        verdict = "flat"
    elif error <= 1e-4 or (error * size <= 3 * doubt and doubt <= 1e-2 * size):
        verdict = "right"
    else:
        verdict = "jagged" if doubt > 1e-2 * size else "wrong"
    return Finding(argument, value, verdict, error, gradient, difference)


def refused(task: Task, floats: Floats, assemble: Assemble) -> dict[str, str]:
    """Why some arguments cannot be differentiated, each alone where not all can be; found by tracing."""
    try:
        Unrolled(task, NUM_STEPS).check(floats, assemble)
        return {}
    except Exception as error:
        if len(floats) == 1:
            zero = isinstance(error, JaxhpoError)
            return dict.fromkeys(floats, "zero" if zero else f"not traceable: {first_line(error)}")
    return functools.reduce(dict.__or__, (refused(task, {name: value}, assemble) for name, value in floats.items()))


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110]}".replace("|", "/")


def examine(name: str) -> tuple[list[Finding], str]:
    """One optimizer: its arguments, and what a parameter without gradient does."""
    factory, hparams = OPTIMIZERS[name][0], arguments_of(name)
    task = network_task(factory)
    floats, assemble = split_floats(hparams)
    why = refused(task, floats, assemble)
    findings = [Finding(a, float(floats[a]), why[a]) for a in why]
    floats = {a: value for a, value in floats.items() if a not in why}
    if not floats:
        return findings, "-"
    gradient, losses = programs(assemble)
    try:
        grads = jax.device_get(gradient(task, floats))
    except Exception as error:
        return findings + [Finding(a, float(x), f"no reverse mode: {first_line(error)}") for a, x in floats.items()], "-"
    found = differences(functools.partial(losses, task), floats)
    findings = [compared(a, float(floats[a]), float(grads[a]), *found[a]) for a in floats] + findings
    own = split_floats(arguments_of(name, own=True))[0]
    still = without_gradient(network_task(factory, zero_input=True), gradient, losses, {a: own[a] for a in floats})
    return findings, still


def without_gradient(task: Task, gradient: Callable[..., Floats], losses: Callable[..., Array], floats: Floats) -> str:
    """The verdict where some parameters have no gradient, and whether ``eps_root`` mends it."""

    def verdict(floats: Floats) -> str:
        grads = jax.device_get(gradient(task, floats))
        if not all(np.isfinite(g) for g in grads.values()):
            return "NaN"
        found = differences(functools.partial(losses, task), floats)
        seen = [a for a in floats if "eps" not in a]  # a default epsilon is too small for a difference
        verdicts = {a: compared(a, float(floats[a]), float(grads[a]), *found[a]).verdict for a in seen}
        return ", ".join(f"{v}: {a}" for a, v in verdicts.items() if v in ("wrong", "jagged")) or "right"

    first, root = verdict(floats), next((a for a in floats if a.endswith("eps_root")), None)
    if first != "NaN" or root is None:
        return first
    return f"NaN; {verdict(floats | {root: jnp.asarray(MENDING)})} with {root} = {MENDING:g}"


def row(name: str, f: Finding) -> str:
    numbers = f"{f.error:.0e} | {f.gradient:+.4e} | {f.difference:+.4e}" if np.isfinite(f.difference) else " | | "
    return f"| {name} | {f.argument} = {f.value:g} | {f.verdict} | {numbers} |"


def short_row(name: str, findings: list[Finding], still: str) -> str:
    verdicts = [f.verdict.split(":")[0] for f in findings]
    named = lambda verdict: ", ".join(f.argument for f, v in zip(findings, verdicts, strict=True) if v == verdict)
    return f"| {name} | {'; '.join(f'{v}: {named(v)}' for v in dict.fromkeys(verdicts))} | {still} |"


def relu_rows() -> list[str]:
    """Adam on relu: a second moment of exactly 0 makes the hypergradient NaN, whatever the learning rate."""
    lines = [
        "| Adam on relu | learning rate | eps_root | gradient by the learning rate | difference |",
        "|---|---|---|---|---|",
    ]
    gradient, losses = programs(lambda floats: floats)
    for what, bias in (("all units alive at first", 0.0), ("one unit dead from the first step", -9.0)):
        task = network_task(optax.adam, jax.nn.relu, first_bias=bias)
        for rate, root in itertools.product((0.001, 0.03, 0.3), (0.0, MENDING)):
            floats: Floats = {"learning_rate": jnp.asarray(rate), "eps_root": jnp.asarray(root)}
            expected = differences(functools.partial(losses, task), floats)["learning_rate"][0]
            found = float(gradient(task, floats)["learning_rate"])
            lines.append(f"| {what} | {rate} | {root:g} | {found:+.6e} | {expected:+.6e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(OPTIMIZERS), default=list(OPTIMIZERS))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    print("| optimizer | argument | verdict | relative error | gradient | finite difference |\n|---|---|---|---|---|---|")
    short = ["\n| optimizer | arguments | optax's own epsilons, some gradients 0 |", "|---|---|---|"]
    for name in arguments.only:
        findings, still = examine(name)
        print("\n".join(row(name, f) for f in findings), flush=True)
        short.append(short_row(name, findings, still))
    print("\n".join([*short, "", *(relu_rows() if "adam" in arguments.only else [])]))


if __name__ == "__main__":
    main()
