import jax
import numpy as np
import pytest
from scipy import linalg

from jaxhpo.surrogates.linalg import cholesky, inverse, solve_lower, solve_upper, with_row


@jax.jit
def everything(matrix, right):
    factor = cholesky(matrix)
    return factor, solve_lower(factor, right), solve_upper(factor, right), solve_lower(factor, right[:, 0]), inverse(factor)


def positive_definite(size, condition):
    rng = np.random.default_rng(size)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    matrix = (basis * np.geomspace(1.0, 1.0 / condition, size)) @ basis.T
    return (matrix + matrix.T) / 2, rng.normal(size=(size, 3))


def check(size, dtype, tolerance):
    """Against LAPACK in float64. Errors of solves grow with the condition number of L (10) and of K (100)."""
    matrix, right = positive_definite(size, 100.0)
    factor, lower, upper, single, whole = everything(matrix.astype(dtype), right.astype(dtype))
    assert factor.lower.dtype == lower.dtype == upper.dtype == whole.dtype == dtype
    expected = np.linalg.cholesky(matrix)
    np.testing.assert_allclose(factor.lower, expected, atol=tolerance)
    np.testing.assert_array_equal(np.triu(factor.lower, 1), 0.0)
    width = factor.inverses.shape[-1]
    for i, block in enumerate(factor.inverses):
        here = slice(i * width, (i + 1) * width)
        np.testing.assert_allclose(block, np.linalg.inv(expected[here, here]), atol=100 * tolerance)
    solved = linalg.solve_triangular(expected, right, lower=True)
    np.testing.assert_allclose(lower, solved, atol=100 * tolerance)
    np.testing.assert_allclose(single, solved[:, 0], atol=100 * tolerance)
    np.testing.assert_allclose(upper, linalg.solve_triangular(expected.T, right), atol=100 * tolerance)
    np.testing.assert_allclose(whole, np.linalg.inv(matrix), atol=1000 * tolerance)


@pytest.mark.parametrize("size", [1, 33, 64])  # one diagonal block, or several where the size is a multiple of their width
def test_float64_is_lapack(x64, size):
    check(size, np.float64, 1e-14)


@pytest.mark.parametrize("size", [33, 64])
def test_float32_is_lapack(size):
    check(size, np.float32, 4e-6)


@pytest.mark.parametrize("size", [33, 64])
def test_solves_are_backward_stable_in_float32(size):
    """With a condition number of 10^6 the residual stays a few rounding errors of the parts it is made of."""
    matrix, right = positive_definite(size, 1e6)
    factor, lower, upper, _, _ = everything(matrix.astype(np.float32), right.astype(np.float32))
    whole = np.asarray(factor.lower, np.float64)
    np.testing.assert_allclose(whole @ whole.T, matrix, atol=2e-6)
    for left, solved in ((whole, np.asarray(lower, np.float64)), (whole.T, np.asarray(upper, np.float64))):
        error = np.abs(left @ solved - right.astype(np.float32)) / (np.abs(left) @ np.abs(solved))
        assert error.max() < 3e-5


def test_large_matrices_have_wider_blocks(x64, monkeypatch):
    """As 2 blocks at most would have it of 80 rows."""
    monkeypatch.setattr("jaxhpo.surrogates.linalg._MOST_BLOCKS", 2)
    check(80, np.float64, 1e-14)
    assert everything(*positive_definite(80, 100.0))[0].inverses.shape == (2, 40, 40)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [33, 64])
def test_singular_matrices_have_finite_factors(size, dtype):
    """Ones everywhere, zeros, rank 3, the same with an indefinite rounding error: pivots are raised, by no more than the floor
    of 8 eps times the largest entry for each of the rows it may build up in."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=(size, 3))
    eps = np.finfo(dtype).eps
    noise = rng.normal(size=(size, size)) * eps
    with jax.enable_x64(dtype == np.float64):
        for matrix in (np.ones((size, size)), np.zeros((size, size)), low @ low.T, low @ low.T + noise + noise.T):
            parts = everything(matrix.astype(dtype), np.ones((size, 3), dtype))
            if matrix.any():  # without a scale the floor is 0
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parts))
                whole = np.asarray(parts[0].lower, np.float64)
                assert np.abs(whole @ whole.T - matrix).max() < 8 * size * eps * matrix.max()


def test_vmap_is_the_loop(x64):
    size = 64
    pairs = [positive_definite(size, condition) for condition in (2.0, 100.0, 1e4)]
    matrix, right = (np.stack(part) for part in zip(*pairs, strict=True))
    batch = jax.jit(jax.vmap(everything))(matrix, right)
    for i in range(3):
        one = everything(matrix[i], right[i])
        jax.tree.map(lambda many, single, i=i: np.testing.assert_allclose(many[i], single, rtol=1e-9, atol=1e-11), batch, one)


@pytest.mark.parametrize(("size", "rows"), [(33, (20,)), (64, (31, 32, 50))])
def test_with_row_is_the_factor_of_the_larger_matrix(x64, size, rows):
    """A matrix of the first rows, the identity below, gains its next row: as if factored afresh."""
    matrix, right = positive_definite(size, 100.0)

    def padded(count):
        out = np.eye(size)
        out[:count, :count] = matrix[:count, :count]
        return out

    for row in rows:
        expected, *solved = everything(padded(row + 1), right)
        got = jax.jit(with_row)(everything(padded(row), right)[0], row, expected.lower[row])
        np.testing.assert_allclose(got.lower, expected.lower, atol=1e-13)
        np.testing.assert_allclose(got.inverses, expected.inverses, atol=1e-12)
        np.testing.assert_allclose(solve_lower(got, right), solved[0], atol=1e-12)
        np.testing.assert_allclose(solve_upper(got, right), solved[1], atol=1e-12)
