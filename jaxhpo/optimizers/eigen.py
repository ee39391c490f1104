"""Eigenvalues of symmetric matrices by rotations, for compiled loops and batches: no LAPACK (see ``surrogates/linalg.py``).

The two-sided Jacobi iteration in rounds of disjoint pairs: Brent & Luk, "The solution of singular-value and symmetric
eigenvalue problems on multiprocessor arrays", SIAM J. Sci. Stat. Comput. 6(1), 1985. A round turns all pairs at once by
elementwise operations, and a matrix whose eigenvectors are nearly known takes one or two sweeps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MOST_SWEEPS = 15  # a random matrix takes 6 to 9


def _next_round(half: int) -> np.ndarray:
    """Where each place of the next round takes its index from: a tournament with place 0 fixed, ``i32[2 * half]``.

    Place i plays against place ``half + i``.
    """
    top, bottom = list(range(half)), list(range(half, 2 * half))
    if half > 1:
        top, bottom = [top[0], bottom[0], *top[1:-1]], [*bottom[1:], top[-1]]
    return np.asarray(top + bottom)


def eigh(matrix: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues ``[N]``, in no order, and eigenvectors ``[N, N]`` in columns of a symmetric matrix ``[N, N]``.

    Args:
        matrix: ``[N, N]``, finite.
        start: ``[N, N]``, orthogonal up to rounding; the closer to the eigenvectors the fewer sweeps.
    """
    size = matrix.shape[0]
    if size == 1:
        return matrix[0], jnp.ones_like(matrix)
    half = (size + 1) // 2
    turn, padded = _next_round(half), 2 * half
    eps = jnp.finfo(matrix.dtype).eps
    with jax.default_matmul_precision("highest"):
        # One step of Newton and Schulz: what rounding took from the orthogonality comes back.
        start = 1.5 * start - 0.5 * start @ (start.T @ start)
        first = start.T @ matrix @ start
    pad = ((0, padded - size), (0, padded - size))
    left, vectors = jnp.pad(0.5 * (first + first.T), pad), jnp.pad(start, ((0, 0), pad[1]))
    off = ~np.eye(padded, dtype=bool)
    small = eps * jnp.linalg.norm(left)

    def one_round(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[tuple[jax.Array, jax.Array], None]:
        a, v = carry
        diagonal, across = jnp.diagonal(a), jnp.diagonal(a[:half, half:])
        # Golub & Van Loan, algorithm 8.5.1: the rotation by at most 45 degrees that clears the entry.
        flat = across == 0.0
        tau = (diagonal[half:] - diagonal[:half]) / jnp.where(flat, 1.0, 2.0 * across)
        tangent = jnp.where(tau >= 0.0, 1.0, -1.0) / (jnp.abs(tau) + jnp.sqrt(1.0 + tau * tau))
        tangent = jnp.where(flat, 0.0, tangent)
        cosine = lax.rsqrt(1.0 + tangent * tangent)
        sine = tangent * cosine
        top, bottom = a[:half], a[half:]
        a = jnp.concatenate([cosine[:, None] * top - sine[:, None] * bottom, sine[:, None] * top + cosine[:, None] * bottom])
        both = jnp.concatenate([a, v])
        left, right = both[:, :half], both[:, half:]
        both = jnp.concatenate([cosine * left - sine * right, sine * left + cosine * right], axis=1)[:, turn]
        return (both[:padded][turn], both[padded:]), None

    def is_rough(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return (jnp.max(jnp.abs(carry[0]), where=off, initial=0.0) > small) & (carry[2] < _MOST_SWEEPS)

    def sweep(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        # After padded - 1 rounds everything has met everything and is back in its place.
        (a, v), _ = lax.scan(one_round, carry[:2], None, length=padded - 1)
        return a, v, carry[2] + 1

    a, v, _ = lax.while_loop(is_rough, sweep, (left, vectors, jnp.zeros((), jnp.int32)))
    return jnp.diagonal(a)[:size], v[:, :size]
