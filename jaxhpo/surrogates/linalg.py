"""Cholesky factors and triangular solves of covariance matrices as matrix products, for batches inside compiled loops.

A kernel matrix of n observations is factored hundreds of times inside a study, often many side by side under ``vmap``. Calls
of LAPACK that run at the same time inside nested loops of one program were seen to wait for each other for ever (jaxlib 0.10
on CPUs, with one or several BLAS threads); and their solves are slow on accelerators. Here all is products of blocks and one
short loop over the columns of a diagonal block. Pivots have a floor and entries a bound, so that a factor is always finite; it
is meaningful where the matrix has about ``N eps`` times its scale added to its diagonal (:func:`rounding`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxhpo.core import pytree_dataclass

_WIDTH, _MOST_BLOCKS = 32, 8  # least width of a diagonal block, greatest number of them


@pytree_dataclass
class Factor:
    """A lower Cholesky factor.

    Attributes:
        lower: ``[N, N]``, L.
        inverses: ``[N / W, W, W]``, inverses of its diagonal blocks.
    """

    lower: jax.Array
    inverses: jax.Array


def rounding(size: int, dtype: DTypeLike) -> float:
    """What keeps a covariance matrix ``[N, N]`` of variance 1 positive definite as rounded, added to its diagonal."""
    return size * float(jnp.finfo(dtype).eps)


def _width(size: int) -> int:
    width = max(_WIDTH, size // _MOST_BLOCKS)
    return width if size % width == 0 else size


def _factor_block(block: jax.Array, floor: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factor and its inverse of a symmetric block ``[W, W]``, column by column (Golub & Van Loan, algorithm 4.2.2)."""
    rows = np.arange(block.shape[0])

    def column(k: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        left, lower, inverse = carry
        at = rows == k
        pivot = jnp.sqrt(jnp.maximum(left[k, k], floor))
        # In exact arithmetic no entry exceeds the root of what is left of its row's diagonal (Cauchy-Schwarz).
        most = jnp.sqrt(jnp.maximum(jnp.diagonal(left), 0.0))
        below = jnp.where((rows > k) & (left[k, k] > floor), jnp.clip(left[:, k] / pivot, -most, most), 0.0)
        row = inverse[k] / pivot
        return (
            left - below[:, None] * below[None, :],
            jnp.where(at[None, :], jnp.where(at, pivot, below)[:, None], lower),
            jnp.where(at[:, None], row[None, :], inverse - below[:, None] * row[None, :]),
        )

    start = (block, jnp.zeros_like(block), jnp.eye(block.shape[0], dtype=block.dtype))
    _, lower, inverse = lax.fori_loop(0, block.shape[0], column, start)
    return lower, inverse


def cholesky(matrix: jax.Array) -> Factor:
    """The factor of a symmetric matrix ``[N, N]`` that is positive definite up to rounding.

    A pivot below ``8 eps`` times the largest diagonal entry is raised to that, and the column below it left out; no row of L
    becomes longer than the root of its diagonal entry, which rounding errors would else blow up.
    """
    size = matrix.shape[0]
    width = _width(size)
    floor = 8.0 * float(jnp.finfo(matrix.dtype).eps) * jnp.max(jnp.diagonal(matrix))
    columns, inverses, left = [], [], matrix
    with jax.default_matmul_precision("highest"):
        for start in range(0, size, width):
            lower, inverse = _factor_block(left[:width, :width], floor)
            panel = left[width:, :width] @ inverse.T
            squares, most = (panel * panel).sum(1), jnp.maximum(jnp.diagonal(left)[width:], 0.0)
            panel *= jnp.sqrt(jnp.where(squares > most, most / jnp.where(squares > most, squares, 1.0), 1.0))[:, None]
            left = left[width:, width:] - panel @ panel.T
            columns.append(jnp.concatenate([jnp.zeros((start, width), matrix.dtype), lower, panel]))
            inverses.append(inverse)
    return Factor(jnp.concatenate(columns, axis=1), jnp.stack(inverses))


def solve_lower(factor: Factor, right: jax.Array) -> jax.Array:
    """``L^-1 right`` for ``[N, M]`` or ``[N]``. Far more accurate than a product with the whole inverse."""
    width = factor.inverses.shape[-1]
    with jax.default_matmul_precision("highest"):
        solved = factor.inverses[0] @ right[:width]
        for i in range(1, factor.inverses.shape[0]):
            rows = slice(i * width, (i + 1) * width)
            rest = right[rows] - factor.lower[rows, : i * width] @ solved
            solved = jnp.concatenate([solved, factor.inverses[i] @ rest])
    return solved


def solve_upper(factor: Factor, right: jax.Array) -> jax.Array:
    """``L^-T right`` for ``[N, M]`` or ``[N]``."""
    width, blocks = factor.inverses.shape[-1], factor.inverses.shape[0]
    with jax.default_matmul_precision("highest"):
        solved = factor.inverses[-1].T @ right[(blocks - 1) * width :]
        for i in range(blocks - 2, -1, -1):
            rows = slice(i * width, (i + 1) * width)
            rest = right[rows] - factor.lower[(i + 1) * width :, rows].T @ solved
            solved = jnp.concatenate([factor.inverses[i].T @ rest, solved])
    return solved


def inverse(factor: Factor) -> jax.Array:
    """``(L L^T)^-1``, ``[N, N]``."""
    whole = solve_lower(factor, jnp.eye(factor.lower.shape[0], dtype=factor.lower.dtype))
    with jax.default_matmul_precision("highest"):
        return whole.T @ whole


def with_row(factor: Factor, row: jax.Array, values: jax.Array) -> Factor:
    """The factor with its row ``i32[]`` replaced by ``values [N]``, which end at the diagonal; below it L must be the
    identity."""
    width = factor.inverses.shape[-1]
    lower = factor.lower.at[row].set(values)
    # Within its block the inverse of the new row is (e_row - l X) / pivot, with X the inverse of the rows above.
    block, place = row // width, row % width
    inside = lax.dynamic_slice(values, (block * width,), (width,))
    here = np.arange(width) == place
    pivot = inside[place]
    old = factor.inverses[block]
    with jax.default_matmul_precision("highest"):
        new = (here - jnp.where(here, 0.0, inside) @ old) / pivot
    return Factor(lower, factor.inverses.at[block, place].set(new.astype(old.dtype)))
