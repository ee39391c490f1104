"""One trial over several seeds: the mean of what each seed alone would give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxhpo as jh
from jaxhpo.tasks import over_seeds


def noisy_task():
    return jh.Task(
        init=lambda key, h: jax.random.normal(key, (3,)),
        step=lambda key, h, x: x - h["lr"] * x + 0.1 * jax.random.normal(key, (3,)),
        evaluate=lambda h, x: {"loss": (x**2).sum(), "first": x[0]},
        test=lambda h, x: {"loss": jnp.abs(x).sum()},
    )


def test_metrics_are_means_over_separate_trainings():
    task, hparams = noisy_task(), {"lr": 0.3}
    repeated = over_seeds(task, 4)
    init_key, step_key = jax.random.split(jax.random.key(0))
    together = repeated.step(step_key, hparams, repeated.init(init_key, hparams))
    pairs = zip(jax.random.split(init_key, 4), jax.random.split(step_key, 4), strict=True)
    alone = [task.step(s, hparams, task.init(i, hparams)) for i, s in pairs]
    for name in ("loss", "first"):
        mean = np.mean([task.evaluate(hparams, state)[name] for state in alone])
        np.testing.assert_allclose(repeated.evaluate(hparams, together)[name], mean, rtol=1e-5)
    mean = np.mean([task.test(hparams, state)["loss"] for state in alone])
    np.testing.assert_allclose(repeated.test(hparams, together)["loss"], mean, rtol=1e-5)


def test_one_seed_is_the_task_itself_and_a_test_split_stays_optional():
    task = noisy_task()
    assert over_seeds(task, 1) is task
    assert over_seeds(jh.Task(task.init, task.step, task.evaluate), 2).test is None
    with pytest.raises(ValueError, match="num_seeds = 0"):
        over_seeds(task, 0)


def test_equal_repetitions_share_a_program_and_one_diverged_seed_is_a_diverged_trial():
    task = noisy_task()
    assert jax.tree.structure(over_seeds(task, 3)) == jax.tree.structure(over_seeds(task, 3))
    assert jax.tree.structure(over_seeds(task, 3)) != jax.tree.structure(over_seeds(task, 2))
    fragile = jh.Task(task.init, lambda key, h, x: jnp.where(x[0] > 0, jnp.nan, x), task.evaluate)
    space = {"lr": jh.Float(0.1, 0.2)}
    run = lambda seeds: jh.minimize(
        jh.Training(over_seeds(fragile, seeds), 2), space, jh.RandomSearch(num_lanes=8), key=0, num_trials=400
    )
    # P(diverged) is 1/2 for one seed and 1 - 1/16 for four; six standard deviations of 400 draws fail below 1e-8.
    assert abs(run(1).trials["diverged"].mean() - 0.5) < 6 * 0.5 / 20
    assert abs(run(4).trials["diverged"].mean() - 15 / 16) < 6 * np.sqrt(15 / 256 / 400)
