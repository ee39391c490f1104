import jax
import numpy as np
from scipy import stats

from jaxhpo.core import CubeSpec, Feedback, problems_of
from jaxhpo.optimizers import RandomSearch


def test_points_are_uniform_and_new_ones_do_not_depend_on_the_old():
    """False-failure rate: 1e-3 for each of the 5 tests below, were the key drawn anew; with this key they hold."""
    search = RandomSearch(num_lanes=4000)
    state = search.init(jax.random.key(0), CubeSpec.floats(2))
    first = search.ask(jax.random.key(1), state)
    state = search.update(jax.random.key(2), state, first, Feedback.finished(first.cube[:, 0]))
    columns = np.concatenate([first.cube, search.ask(jax.random.key(1), state).cube], axis=1)
    for column in columns.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    between = np.corrcoef(columns.T)[np.triu_indices(4, 1)]
    assert stats.chi2.sf(4000 * (between**2).sum(), df=6) > 1e-3


def test_sizes_are_whole_numbers_by_type():
    assert problems_of(RandomSearch(4.0)) == ["num_lanes = 4.0: must be whole and at least 1"]
    assert problems_of(RandomSearch(np.int64(4))) == []
