"""Synthetic problems with known optima, pure JAX, each a space and a loss.

    problem = rastrigin(10, shift=1.5)
    result = jaxhpo.minimize(problem.loss, problem.space, optimizer, ...);   result.best.loss - problem.optimum

``shift`` moves the minimiser away from where the formula puts it (a number, or one number for each dimension); the box
stays where it is, so that a shift must leave the minimiser inside. The formulas are the usual ones of the field, as in
Jamil & Yang, "A literature survey of benchmark functions for global optimisation problems", IJMMNO 4(2), 2013.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.space import Choice, Float, Int, Space

Raw = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to minimise.

    Attributes:
        name: what it is called.
        space: where.
        loss: ``(key, hparams) -> f32[]``; the key is not used.
        optimum: the lowest loss.
        minimiser: hyperparameters that reach it, as NumPy arrays.
    """

    name: str
    space: Space
    loss: Callable[[jax.Array, Any], jax.Array]
    optimum: float
    minimiser: Any


def _boxed(name: str, raw: Raw, minimiser: Any, num_dims: int, low: float, high: float, shift: Any, optimum: float) -> Problem:
    """A function of one vector in a box, moved by ``shift``."""
    if num_dims < 1:
        raise ValueError(f"{name}: num_dims must be at least 1, not {num_dims}")
    moved = np.broadcast_to(np.asarray(shift, np.float64), (num_dims,))
    place = np.broadcast_to(np.asarray(minimiser, np.float64), (num_dims,)) + moved
    if (place < low).any() or (place > high).any():
        raise ValueError(f"{name}: shift moves the minimiser out of the box from {low} to {high}")

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        return raw(hparams["x"] - moved.astype(np.float32))

    return Problem(name, Space({"x": Float(low, high, shape=(num_dims,))}), loss, optimum, {"x": place.astype(np.float32)})


def sphere(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 10.0) -> Problem:
    """Sum of squares."""
    return _boxed("sphere", lambda z: jnp.sum(z**2), 0.0, num_dims, low, high, shift, 0.0)


def ellipsoid(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 10.0, seed: int | None = 0) -> Problem:
    """A quadratic of condition 10^4 in axes turned at random; along the given axes with ``seed=None``."""
    scale = np.logspace(0.0, 4.0, num_dims, dtype=np.float32)
    turn = np.eye(num_dims) if seed is None else np.linalg.qr(np.random.default_rng(seed).normal(size=(num_dims, num_dims)))[0]
    matrix = turn.astype(np.float32)
    return _boxed("ellipsoid", lambda z: jnp.sum(scale * (matrix @ z) ** 2), 0.0, num_dims, low, high, shift, 0.0)


def rosenbrock(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 10.0) -> Problem:
    """A long bent valley; at least two dimensions."""
    if num_dims < 2:
        raise ValueError(f"rosenbrock: num_dims must be at least 2, not {num_dims}")

    def raw(z: jax.Array) -> jax.Array:
        return jnp.sum(100.0 * (z[1:] - z[:-1] ** 2) ** 2 + (1.0 - z[:-1]) ** 2)

    return _boxed("rosenbrock", raw, 1.0, num_dims, low, high, shift, 0.0)


def rastrigin(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 10.0) -> Problem:
    """A bowl full of regular local minima, separable."""

    def raw(z: jax.Array) -> jax.Array:
        return jnp.sum(z**2 + 20.0 * jnp.sin(jnp.pi * z) ** 2)  # 10 - 10 cos(2 pi z), without its cancellation

    return _boxed("rastrigin", raw, 0.0, num_dims, low, high, shift, 0.0)


def ackley(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 10.0) -> Problem:
    """A narrow funnel in a wide wavy plain."""

    def raw(z: jax.Array) -> jax.Array:
        root, wave = jnp.sqrt(jnp.mean(z**2)), jnp.mean(jnp.cos(2.0 * jnp.pi * z))
        return -20.0 * jnp.expm1(-0.2 * root) - math.e * jnp.expm1(wave - 1.0)

    return _boxed("ackley", raw, 0.0, num_dims, low, high, shift, 0.0)


def griewank(num_dims: int, shift: Any = 0.0, low: float = -50.0, high: float = 100.0) -> Problem:
    """A flat bowl with a product of waves."""
    root = np.sqrt(np.arange(1, num_dims + 1)).astype(np.float32)

    def raw(z: jax.Array) -> jax.Array:
        return 1.0 + jnp.sum(z**2) / 4000.0 - jnp.prod(jnp.cos(z / root))

    return _boxed("griewank", raw, 0.0, num_dims, low, high, shift, 0.0)


def levy(num_dims: int, shift: Any = 0.0, low: float = -10.0, high: float = 10.0) -> Problem:
    """Waves in a bowl, of another period in the first and the last dimension."""

    def raw(z: jax.Array) -> jax.Array:
        w = 1.0 + (z - 1.0) / 4.0
        middle = jnp.sum((w[:-1] - 1.0) ** 2 * (1.0 + 10.0 * jnp.sin(jnp.pi * w[:-1] + 1.0) ** 2))
        last = (w[-1] - 1.0) ** 2 * (1.0 + jnp.sin(2.0 * jnp.pi * w[-1]) ** 2)
        return jnp.sin(jnp.pi * w[0]) ** 2 + middle + last

    return _boxed("levy", raw, 1.0, num_dims, low, high, shift, 0.0)


def schwefel(num_dims: int, low: float = -500.0, high: float = 500.0) -> Problem:
    """The best minimum near a corner, far from the second best; not shifted."""
    best = 420.968746

    def raw(z: jax.Array) -> jax.Array:
        return 418.98288727 * num_dims - jnp.sum(z * jnp.sin(jnp.sqrt(jnp.abs(z))))

    return _boxed("schwefel", raw, best, num_dims, low, high, 0.0, 0.0)


def zakharov(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 10.0) -> Problem:
    """A bowl with one very steep direction."""
    weight = (0.5 * np.arange(1, num_dims + 1)).astype(np.float32)

    def raw(z: jax.Array) -> jax.Array:
        slope = jnp.sum(weight * z)
        return jnp.sum(z**2) + slope**2 + slope**4

    return _boxed("zakharov", raw, 0.0, num_dims, low, high, shift, 0.0)


def styblinski_tang(num_dims: int, shift: Any = 0.0, low: float = -5.0, high: float = 5.0) -> Problem:
    """Two minima in each dimension, one a little lower; its optimum is moved to 0."""

    def raw(z: jax.Array) -> jax.Array:
        return jnp.sum(0.5 * (z**4 - 16.0 * z**2 + 5.0 * z) + 39.16616570377142)

    return _boxed("styblinski_tang", raw, -2.903534027771178, num_dims, low, high, shift, 0.0)


def dixon_price(num_dims: int, shift: Any = 0.0, low: float = -10.0, high: float = 10.0) -> Problem:
    """A valley along which each coordinate halves the square of the one before."""
    weight = np.arange(2, num_dims + 1).astype(np.float32)
    best = 2.0 ** (-(1.0 - 2.0 ** (1.0 - np.arange(1, num_dims + 1))))  # exponents -(2^i - 2) / 2^i

    def raw(z: jax.Array) -> jax.Array:
        return (z[0] - 1.0) ** 2 + jnp.sum(weight * (2.0 * z[1:] ** 2 - z[:-1]) ** 2)

    return _boxed("dixon_price", raw, best, num_dims, low, high, shift, 0.0)


_MICHALEWICZ = {2: -1.8013034, 5: -4.6876582, 10: -9.6601517}


def michalewicz(num_dims: int) -> Problem:
    """Steep ridges on plateaus; its optimum is known for 2, 5 and 10 dimensions. Its minimiser is not given."""
    if num_dims not in _MICHALEWICZ:
        raise ValueError(f"michalewicz: the optimum is known for 2, 5 and 10 dimensions, not for {num_dims}")
    index = np.arange(1, num_dims + 1).astype(np.float32)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        z = hparams["x"]
        return -jnp.sum(jnp.sin(z) * jnp.sin(index * z**2 / jnp.pi) ** 20)

    return Problem("michalewicz", Space({"x": Float(0.0, math.pi, shape=(num_dims,))}), loss, _MICHALEWICZ[num_dims], None)


def branin() -> Problem:
    """Two dimensions, three equal minima."""

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        x, y = hparams["x"], hparams["y"]
        valley = y - 5.1 / (4.0 * jnp.pi**2) * x**2 + 5.0 / jnp.pi * x - 6.0
        return valley**2 + 10.0 * (1.0 - 1.0 / (8.0 * jnp.pi)) * jnp.cos(x) + 10.0

    best = {"x": np.float32(math.pi), "y": np.float32(2.275)}
    return Problem("branin", Space({"x": Float(-5.0, 10.0), "y": Float(0.0, 15.0)}), loss, 10.0 / (8.0 * math.pi), best)


def hartmann6() -> Problem:
    """Six dimensions, six minima in the unit cube."""
    alpha = np.array([1.0, 1.2, 3.0, 3.2], np.float32)
    a = np.array(
        [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]], np.float32
    )
    p = np.float32(1e-4) * np.array(
        [
            [1312, 1696, 5569, 124, 8283, 5886],
            [2329, 4135, 8307, 3736, 1004, 9991],
            [2348, 1451, 3522, 2883, 3047, 6650],
            [4047, 8828, 8732, 5743, 1091, 381],
        ],
        np.float32,
    )

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        return -jnp.sum(alpha * jnp.exp(-jnp.sum(a * (hparams["x"] - p) ** 2, axis=-1)))

    best = {"x": np.array([0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573], np.float32)}
    return Problem("hartmann6", Space({"x": Float(0.0, 1.0, shape=(6,))}), loss, -3.32236801, best)


def _cost_of_options(rng: np.random.Generator, count: int, options: int) -> tuple[np.ndarray, np.ndarray]:
    """For each choice the cost of every option in scrambled order, 0 for the best one, and which that is."""
    cost = np.stack([rng.permutation(options) for _ in range(count)]).astype(np.float32)
    return cost, cost.argmin(axis=1).astype(np.int32)


def _mixed_sizes(num_dims: int) -> tuple[int, int, int]:
    if num_dims < 3:
        raise ValueError(f"a mixed problem needs at least 3 dimensions, not {num_dims}")
    choices = max(1, num_dims // 5)
    ints = max(1, 2 * num_dims // 5)
    return num_dims - ints - choices, ints, choices


def mixed_integer(num_dims: int, shift: Any = 0.0, seed: int = 0, low: int = -5, high: int = 10) -> Problem:
    """Two fifths floats and two fifths integers in a quadratic that couples them in pairs, one fifth choices.

    Each of the 5 options of a choice adds a cost of its own, in scrambled order, and so widens the bowl of the floats.
    ``shift`` moves the floats; where the best integers and options lie is drawn with ``seed``.
    """
    floats, ints, choices = _mixed_sizes(num_dims)
    rng = np.random.default_rng(seed)
    place = np.broadcast_to(np.asarray(shift, np.float32), (floats,))
    whole = rng.integers(low + 1, high, size=ints).astype(np.int32)
    cost, best = _cost_of_options(rng, choices, 5)
    scale = np.logspace(0.0, 2.0, ints, dtype=np.float32)
    pair = np.arange(ints) % floats

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        z, n = hparams["x"] - place, (hparams["n"] - whole).astype(jnp.float32)
        extra = jnp.sum(jnp.asarray(cost)[np.arange(choices), hparams["c"]])
        return jnp.sum(z**2) * (1.0 + extra) + jnp.sum(scale * (n + 0.5 * z[pair]) ** 2) + extra

    space = Space(
        {
            "x": Float(float(low), float(high), shape=(floats,)),
            "n": Int(low, high, shape=(ints,)),
            "c": Choice(tuple(range(5)), shape=(choices,)),
        }
    )
    return Problem("mixed_integer", space, loss, 0.0, {"x": place.astype(np.float32), "n": whole, "c": best})


def network_like(num_dims: int, seed: int = 0) -> Problem:
    """A smooth stand-in for tuning a network: log floats, log integers and choices that set where the valley lies.

    The best learning rate falls with the width, and every option moves the best place of one float; local waves lie
    over the whole. A lowest loss of 0.
    """
    floats, ints, choices = _mixed_sizes(num_dims)
    rng = np.random.default_rng(seed)
    centre = rng.uniform(-3.5, -1.5, size=floats).astype(np.float32)
    whole = np.exp2(rng.uniform(3.5, 7.5, size=ints)).astype(np.int32)
    cost, best = _cost_of_options(rng, choices, 4)
    move = (rng.uniform(-1.0, 1.0, size=(choices, 4)) * (cost > 0)).astype(np.float32)
    pair, turned = np.arange(ints) % floats, np.arange(choices) % floats

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        chosen = np.arange(choices), hparams["c"]
        n = jnp.log2(hparams["n"].astype(jnp.float32) / whole)
        z = (jnp.log10(hparams["x"]) - centre).at[pair].add(0.3 * n).at[turned].add(jnp.asarray(move)[chosen])
        waves = 0.1 * jnp.sum(1.0 - jnp.cos(6.0 * z))
        return jnp.sum(z**2) + waves + 0.1 * jnp.sum(n**2) + 0.2 * jnp.sum(jnp.asarray(cost)[chosen])

    space = Space(
        {
            "x": Float(1e-5, 1.0, log=True, shape=(floats,)),
            "n": Int(4, 512, log=True, shape=(ints,)),
            "c": Choice(("a", "b", "c", "d"), shape=(choices,)),
        }
    )
    return Problem("network_like", space, loss, 0.0, {"x": 10.0**centre, "n": whole, "c": best})


def nan_cliff() -> Problem:
    """A bowl whose trials diverge just beyond the optimum: NaN above ``log10 lr > -1.6``, the lowest loss at -1.8."""

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        rate = jnp.log10(hparams["lr"])
        return jnp.where(rate > -1.6, jnp.nan, (rate + 1.8) ** 2 + (hparams["wd"] - 0.3) ** 2)

    best = {"lr": np.float32(10.0**-1.8), "wd": np.float32(0.3)}
    return Problem("nan_cliff", Space({"lr": Float(1e-4, 1.0, log=True), "wd": Float(0.0, 1.0)}), loss, 0.0, best)
