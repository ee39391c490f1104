"""Hyper-cleaning: the weights that hypergradients give tell wrong labels from right ones."""

import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from experiments import cleaning
from jaxhpo.errors import JaxhpoError

SMALL = {"data": "digits", "num_train": 200, "num_clean": 100, "num_steps": 20}


def test_half_of_the_labels_are_wrong_and_no_split_shares_an_example():
    draw = cleaning.corrupted("digits", 200, 100, 0.5, 3)
    assert np.sum(draw.given != draw.true) == 100
    rows = [tuple(row) for x in (draw.x, draw.clean[0], draw.test[0]) for row in np.round(x, 4)]
    assert len(rows) == 200 + 100 + 360
    assert len(set(rows)) == len(rows)  # no two of the digits are equal
    again = cleaning.corrupted("digits", 200, 100, 0.5, 4)
    assert np.array_equal(draw.test[1], again.test[1])
    assert not np.array_equal(draw.given, again.given)


@pytest.mark.parametrize("make", [cleaning.unrolled, cleaning.implicit])
def test_learned_weights_separate_wrong_labels_from_right_ones(make):
    space = {"weights": jh.Float(0.0, 1.0, shape=(200,))}
    result = jh.minimize(make(**SMALL), space, cleaning.descent(200), key=0, num_trials=8)
    weights = np.asarray(result.best.hparams["weights"])
    draw = cleaning.corrupted("digits", 200, 100, 0.5, 0)
    accuracy, f1 = cleaning.found_wrong(weights < 0.5, draw)
    assert accuracy > 0.85  # chance is 0.5 with a standard deviation of 0.035
    assert f1 > 0.85
    losses = result.trials["loss"]
    assert losses[-1] < losses[0]


def test_labels_of_examples_of_weight_zero_do_not_matter():
    draw = cleaning.corrupted("digits", 200, 100, 0.5, 0)
    right = draw.given == draw.true
    ends = [
        cleaning._trained(cleaning.training_on(draw.x, labels, draw), jax.random.key(0), jnp.asarray(right, jnp.float32), 20)[0]
        for labels in (draw.given, draw.true, np.where(right, 9 - draw.true, 0).astype(np.int32))
    ]
    kernels = [np.asarray(end.params["last"]["kernel"]) for end in ends]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(kernels[0] - kernels[2]).max() > 0.01  # those of the others do


def test_found_wrong_counts_by_hand():
    given, true = np.array([0, 1, 2, 3]), np.array([0, 1, 5, 6])
    draw = cleaning.Corrupted(np.zeros((4, 1)), given, true, (np.zeros(0),) * 2, (np.zeros(0),) * 2)
    # one hit, one false alarm, one miss: precision and recall of one half
    assert cleaning.found_wrong(np.array([True, False, True, False]), draw) == (0.5, 0.5)


def test_a_space_of_another_length_is_refused():
    with pytest.raises(JaxhpoError, match=r"weights of shape \[100\]: there are 200 training examples"):
        jh.minimize(
            cleaning.unrolled(**SMALL),
            {"weights": jh.Float(0.0, 1.0, shape=(100,))},
            cleaning.descent(100),
            key=0,
            num_trials=1,
        )


def test_without_the_data_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cleaning.corrupted.cache_clear()
    with pytest.raises(JaxhpoError, match="jaxhpo data fetch mnist5k"):
        cleaning.unrolled("mnist5k")


def test_the_config_agrees_with_the_experiment():
    config = tomllib.loads((Path(__file__).parents[2] / "configs/mnist_cleaning.toml").read_text())
    num_train = config["task"]["num_train"]
    assert config["space"]["weights"]["shape"] == [num_train] == [cleaning.NUM_TRAIN["mnist5k"]]
    assert config["optimizer"]["learning_rate"] == pytest.approx(cleaning.descent(num_train).learning_rate)
