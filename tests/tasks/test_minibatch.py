"""The shuffle is a permutation, and a uniform one; minibatches see every element once an epoch.

Keys are fixed: a test passes always or never. Stated rates are those over random keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxhpo.tasks.minibatch import epoch_keys, first_order, next_batch, shuffled


def permutations(n, seeds):
    """``[seeds, n]``."""
    keys = jax.random.split(jax.random.key(n), seeds)
    seed = jax.vmap(lambda key: first_order(key).seed)(keys)
    one = lambda seed: shuffled(jnp.arange(n), n, epoch_keys(n, seed, jnp.zeros((), jnp.int32)))
    return np.asarray(jax.jit(jax.vmap(one))(seed))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 31, 100, 1077])
def test_exact_permutation(n):
    for row in permutations(n, 3):
        assert sorted(row) == list(range(n))


def test_all_permutations_of_few_elements_are_equally_likely():
    # Chi-square over all 120 permutations of 5: false-failure rate 1e-6.
    code = permutations(5, 24_000) @ 5 ** np.arange(5)
    counts = np.unique_counts(code).counts
    assert len(counts) == 120
    assert stats.chisquare(counts).pvalue > 1e-6


def test_every_element_is_equally_likely_at_every_position():
    # 17 x 17 counts with fixed margins, (17 - 1)^2 degrees of freedom: false-failure rate 1e-6.
    n, seeds = 17, 8000
    rows = permutations(n, seeds)
    counts = np.stack([np.bincount(rows[:, position], minlength=n) for position in range(n)])
    expected = seeds / n
    statistic = ((counts - expected) ** 2 / expected).sum() * (n - 1) / n
    assert stats.chi2.sf(statistic, (n - 1) ** 2) > 1e-6


def test_elements_of_one_batch_are_drawn_independently():
    # The lower half of the elements among the first 250 positions of 1000: hypergeometric. Over 2000 seeds its
    # mean and variance are known to 5 standard errors: false-failure rate 1e-6.
    n, batch, seeds = 1000, 250, 2000
    count = (permutations(n, seeds)[:, :batch] < n // 2).sum(1)
    law = stats.hypergeom(n, n // 2, batch)
    assert abs(count.mean() - law.mean()) < 5 * law.std() / np.sqrt(seeds)
    assert abs(count.var() / law.var() - 1) < 5 * np.sqrt(2 / seeds)


def batches(key, n, batch_size, num_batches):
    def one(order, _):
        index, order = next_batch(order, n, batch_size)
        return order, index

    return np.asarray(jax.jit(lambda key: jax.lax.scan(one, first_order(key), length=num_batches)[1])(key))


@pytest.mark.parametrize(("n", "batch_size"), [(23, 5), (24, 6), (7, 7)])
def test_every_element_once_an_epoch_and_epochs_differ(n, batch_size):
    epochs = batches(jax.random.key(1), n, batch_size, 5 * n // batch_size).reshape(-1)[: 5 * n].reshape(-1, n)
    assert (np.sort(epochs, 1) == np.arange(n)).all()
    assert len(np.unique(epochs, axis=0)) == len(epochs) >= 5
    other = batches(jax.random.key(2), n, batch_size, 5 * n // batch_size).reshape(-1)[: 5 * n].reshape(-1, n)
    assert len(np.unique(np.concatenate([epochs, other]), axis=0)) == 2 * len(epochs)


def test_order_holds_no_permutation():
    assert sum(leaf.size for leaf in jax.tree.leaves(first_order(jax.random.key(0)))) == 4
