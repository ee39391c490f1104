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
Loss = Callable[[jax.Array, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to minimise.

    Attributes:
        name: what it is called.
        space: where.
        loss: ``(key, hparams) -> f32[]``; only :func:`noisy` problems use the key.
        optimum: the lowest loss, without noise.
        minimiser: hyperparameters that reach it, as NumPy arrays; None where they are not known.
        without_noise: the loss without its noise, None where it has none.
    """

    name: str
    space: Space
    loss: Loss
    optimum: float
    minimiser: Any
    without_noise: Loss | None = None

    @property
    def noiseless(self) -> Loss:
        """What a search is judged by: the loss without its noise."""
        return self.loss if self.without_noise is None else self.without_noise


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


def cosine_mixture(num_dims: int, shift: Any = 0.0, low: float = -1.0, high: float = 1.0) -> Problem:
    """A shallow bowl with waves of period 0.4; its optimum is moved to 0."""

    def raw(z: jax.Array) -> jax.Array:
        return jnp.sum(z**2 + 0.2 * jnp.sin(2.5 * jnp.pi * z) ** 2)  # 0.1 - 0.1 cos(5 pi z), without its cancellation

    return _boxed("cosine_mixture", raw, 0.0, num_dims, low, high, shift, 0.0)


def trid(num_dims: int) -> Problem:
    """A bowl whose neighbouring dimensions pull apart, on a box of the squared dimension either way; not shifted."""

    def raw(z: jax.Array) -> jax.Array:
        return jnp.sum((z - 1.0) ** 2) - jnp.sum(z[1:] * z[:-1])

    place = np.arange(1, num_dims + 1) * np.arange(num_dims, 0, -1)
    optimum = -num_dims * (num_dims + 4) * (num_dims - 1) / 6.0
    return _boxed("trid", raw, place, num_dims, -float(num_dims**2), float(num_dims**2), 0.0, optimum)


def powell(num_dims: int, shift: Any = 0.0, low: float = -4.0, high: float = 5.0) -> Problem:
    """A quartic that is singular at its minimum; groups of four dimensions."""
    if num_dims < 4 or num_dims % 4:
        raise ValueError(f"powell: num_dims must be a multiple of 4, not {num_dims}")

    def raw(z: jax.Array) -> jax.Array:
        a, b, c, d = z.reshape(-1, 4).T
        return jnp.sum((a + 10.0 * b) ** 2 + 5.0 * (c - d) ** 2 + (b - 2.0 * c) ** 4 + 10.0 * (a - d) ** 4)

    return _boxed("powell", raw, 0.0, num_dims, low, high, shift, 0.0)


def alpine(num_dims: int, shift: Any = 0.0, low: float = -10.0, high: float = 10.0) -> Problem:
    """Kinks at every local minimum, some of which are as low as the one at 0; separable."""
    return _boxed("alpine", lambda z: jnp.sum(jnp.abs(z * jnp.sin(z) + 0.1 * z)), 0.0, num_dims, low, high, shift, 0.0)


def _camel(x: jax.Array, y: jax.Array) -> jax.Array:
    return (4.0 - 2.1 * x**2 + x**4 / 3.0) * x**2 + x * y + (-4.0 + 4.0 * y**2) * y**2


_CAMEL = -1.031628453489877


def six_hump_camel() -> Problem:
    """Two dimensions, six minima, the lowest two equal."""

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        return _camel(hparams["x"], hparams["y"])

    best = {"x": np.float32(0.08984201), "y": np.float32(-0.7126564)}
    return Problem("six_hump_camel", Space({"x": Float(-3.0, 3.0), "y": Float(-2.0, 2.0)}), loss, _CAMEL, best)


def chosen_sums() -> Problem:
    """Two choices each name one of three functions of the same two floats, an integer stretches one axis; the sum counts.

    In the manner of func2C of Ru et al., "Bayesian optimisation over multiple continuous and categorical inputs", ICML 2020.
    """

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        x, y = hparams["x"], hparams["y"] * hparams["n"] / 4.0
        rosenbrock = ((1.0 - x) ** 2 + 100.0 * (y - x**2) ** 2) / 300.0
        beale = (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2
        values = jnp.stack([rosenbrock, _camel(x, y), beale / 50.0])
        return values[hparams["c"]].sum() + 0.05 * (hparams["n"] - 4.0) ** 2

    space = Space(
        {
            "x": Float(-2.0, 2.0),
            "y": Float(-1.0, 1.0),
            "n": Int(1, 12),
            "c": Choice(("rosenbrock", "camel", "beale"), shape=(2,)),
        }
    )
    best = {"x": np.float32(0.08984201), "y": np.float32(-0.7126564), "n": np.int32(4), "c": np.array([1, 1], np.int32)}
    return Problem("chosen_sums", space, loss, 2.0 * _CAMEL, best)


def goldstein_price() -> Problem:
    """The logarithm of a polynomial of degree eight in two dimensions, whose values span six orders of magnitude."""

    def raw(z: jax.Array) -> jax.Array:
        x, y = z[0], z[1]
        first = 19.0 - 14.0 * x + 3.0 * x**2 - 14.0 * y + 6.0 * x * y + 3.0 * y**2
        second = 18.0 - 32.0 * x + 12.0 * x**2 + 48.0 * y - 36.0 * x * y + 27.0 * y**2
        return jnp.log1p((x + y + 1.0) ** 2 * first) + jnp.log(30.0 + (2.0 * x - 3.0 * y) ** 2 * second)

    return _boxed("goldstein_price", raw, (0.0, -1.0), 2, -2.0, 2.0, 0.0, math.log(3.0))


def shekel() -> Problem:
    """Ten narrow wells of different depths in four dimensions."""
    centre = np.array(
        [
            [4, 4, 4, 4],
            [1, 1, 1, 1],
            [8, 8, 8, 8],
            [6, 6, 6, 6],
            [3, 7, 3, 7],
            [2, 9, 2, 9],
            [5, 5, 3, 3],
            [8, 1, 8, 1],
            [6, 2, 6, 2],
            [7, 3.6, 7, 3.6],
        ],
        np.float32,
    )
    width = np.array([0.1, 0.2, 0.2, 0.4, 0.4, 0.6, 0.3, 0.7, 0.5, 0.5], np.float32)

    def raw(z: jax.Array) -> jax.Array:
        return -jnp.sum(1.0 / (jnp.sum((z - centre) ** 2, axis=-1) + width))

    best = (4.000747, 4.000593, 3.999663, 3.999510)
    return _boxed("shekel", raw, best, 4, 0.0, 10.0, 0.0, -10.53640982)


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


def _hartmann(name: str, a: Any, p: Any, minimiser: Any, optimum: float) -> Problem:
    """Four Gaussian wells in the unit cube: steepness ``[4, D]``, ten thousand times the centres ``[4, D]``."""
    alpha, steep, centre = np.array([1.0, 1.2, 3.0, 3.2], np.float32), np.float32(a), np.float32(1e-4) * np.float32(p)

    def raw(z: jax.Array) -> jax.Array:
        return -jnp.sum(alpha * jnp.exp(-jnp.sum(steep * (z - centre) ** 2, axis=-1)))

    return _boxed(name, raw, minimiser, len(minimiser), 0.0, 1.0, 0.0, optimum)


def hartmann3() -> Problem:
    """Three dimensions, four minima in the unit cube."""
    a = [[3, 10, 30], [0.1, 10, 35], [3, 10, 30], [0.1, 10, 35]]
    p = [[3689, 1170, 2673], [4699, 4387, 7470], [1091, 8732, 5547], [381, 5743, 8828]]
    return _hartmann("hartmann3", a, p, (0.114589, 0.555649, 0.852547), -3.86277979)


_HARTMANN_STEEP = [[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14], [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]]
_HARTMANN_CENTRE = [
    [1312, 1696, 5569, 124, 8283, 5886],
    [2329, 4135, 8307, 3736, 1004, 9991],
    [2348, 1451, 3522, 2883, 3047, 6650],
    [4047, 8828, 8732, 5743, 1091, 381],
]


def hartmann4() -> Problem:
    """The first four dimensions of :func:`hartmann6`, at their own minimum."""
    a, p = ([row[:4] for row in table] for table in (_HARTMANN_STEEP, _HARTMANN_CENTRE))
    return _hartmann("hartmann4", a, p, (0.187395, 0.194152, 0.557918, 0.264780), -3.72984064)


def hartmann6() -> Problem:
    """Six dimensions, six minima in the unit cube."""
    best = (0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573)
    return _hartmann("hartmann6", _HARTMANN_STEEP, _HARTMANN_CENTRE, best, -3.32236801)


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


def on_integers(problem: Problem, levels: int) -> Problem:
    """A function in a box, read at ``levels`` evenly spaced places a dimension, one of which is the minimiser.

    Level 0 lies within half a step of the lower end of the box and the last level within half a step of the upper one.

    Raises:
        ValueError: if the space is not one vector of linear floats, or the minimiser is not known.
    """
    slots = problem.space.slots
    if problem.space.names != ["x"] or slots[0].log or not slots[0].shape or problem.minimiser is None:
        raise ValueError(f"on_integers: {problem.name} must be a function of one vector x in a box with a known minimiser")
    low, high = (np.asarray(end, np.float64) for end in (problem.space.low, problem.space.high))
    best, step = np.asarray(problem.minimiser["x"], np.float64), (high - low) / (levels - 1)
    level = np.round((best - low) / step).astype(np.int32)
    size = step.astype(np.float32)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        return problem.loss(key, {"x": problem.minimiser["x"] + (hparams["n"] - level) * size})

    space = Space({"n": Int(0, levels - 1, shape=slots[0].shape)})
    return Problem(f"{problem.name}_on_integers", space, loss, problem.optimum, {"n": level})


def integer_waves(num_dims: int = 5, levels: int = 25, seed: int = 0) -> Problem:
    """Ordered levels in a turned bowl of condition 10 with shallow waves along its axes; a lowest loss of 0.

    Every axis of the bowl mixes all dimensions, so that no level can be chosen alone. Where the best levels lie is
    drawn with ``seed``, as are the axes.
    """
    rng = np.random.default_rng(seed)
    best = rng.integers(levels // 5, levels - levels // 5, size=num_dims).astype(np.int32)
    turn = np.linalg.qr(rng.normal(size=(num_dims, num_dims)))[0].astype(np.float32)
    scale = np.logspace(0.0, 1.0, num_dims, dtype=np.float32)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        z = turn @ ((hparams["n"] - best) * np.float32(10.0 / levels))  # about -5 .. 5
        return jnp.sum(scale * z**2 + 2.0 * jnp.sin(jnp.pi * z) ** 2)

    return Problem("integer_waves", Space({"n": Int(0, levels - 1, shape=(num_dims,))}), loss, 0.0, {"n": best})


MAX_COMBINATIONS = 200_000
"""The combinations that :func:`categorical` looks through at most."""


def categorical(num_dims: int, options: int, seed: int = 0) -> Problem:
    """Choices only: every option has a cost, and every pair of options of two choices another; both drawn with ``seed``.

    The lowest sum is found by enumeration and moved to 0.

    Raises:
        ValueError: if there are more than ``MAX_COMBINATIONS`` combinations.
    """
    if options**num_dims > MAX_COMBINATIONS:
        raise ValueError(f"categorical: {options}^{num_dims} combinations are more than {MAX_COMBINATIONS}")
    rng = np.random.default_rng(seed)
    single = rng.normal(size=(num_dims, options))
    pair = rng.normal(size=(num_dims, num_dims, options, options)) / math.sqrt(max(num_dims - 1, 1))
    pair *= np.triu(np.ones((num_dims, num_dims)), 1)[:, :, None, None]  # each pair once
    total = np.zeros((options,) * num_dims)
    axis = [np.arange(options).reshape([-1 if i == j else 1 for j in range(num_dims)]) for i in range(num_dims)]
    for i in range(num_dims):
        total += single[i][axis[i]]
        for j in range(i + 1, num_dims):
            total += pair[i, j][axis[i], axis[j]]
    best = np.array(np.unravel_index(total.argmin(), total.shape), np.int32)
    lowest, place = total.min(), np.arange(num_dims)
    of_option, of_pair = single.astype(np.float32), pair.astype(np.float32)

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        c = hparams["c"]
        pairs = jnp.asarray(of_pair)[place[:, None], place, c[:, None], c]
        return jnp.asarray(of_option)[place, c].sum() + pairs.sum() - np.float32(lowest)

    space = Space({"c": Choice(tuple(range(options)), shape=(num_dims,))})
    return Problem("categorical", space, loss, 0.0, {"c": best})


def noisy(problem: Problem, sd: float) -> Problem:
    """The same with normal noise of standard deviation ``sd``, drawn from the key; ``noiseless`` stays within reach."""

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        clean = problem.noiseless(key, hparams)
        return clean + sd * jax.random.normal(key, dtype=clean.dtype)

    return dataclasses.replace(problem, name=f"noisy_{problem.name}", loss=loss, without_noise=problem.noiseless)


def nan_cliff() -> Problem:
    """A bowl whose trials diverge just beyond the optimum: NaN above ``log10 lr > -1.6``, the lowest loss at -1.8."""

    def loss(key: jax.Array, hparams: Any) -> jax.Array:
        del key
        rate = jnp.log10(hparams["lr"])
        return jnp.where(rate > -1.6, jnp.nan, (rate + 1.8) ** 2 + (hparams["wd"] - 0.3) ** 2)

    best = {"lr": np.float32(10.0**-1.8), "wd": np.float32(0.3)}
    return Problem("nan_cliff", Space({"lr": Float(1e-4, 1.0, log=True), "wd": Float(0.0, 1.0)}), loss, 0.0, best)
