"""A masked layer of greatest width 24 with 7 active units is a layer of width 7."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxhpo.tasks import from_nnx
from jaxhpo.tasks.masked import MaskedLinear, masked_init, width_mask

IN, MAX_WIDTH, WIDTH, OUT = 5, 24, 7, 3
# What lies at the active units of every layer.
CUT = {"first": (slice(None), slice(WIDTH)), "second": (slice(WIDTH), slice(WIDTH)), "last": (slice(WIDTH), slice(None))}


class Masked(nnx.Module):
    def __init__(self, width, rngs):
        hidden = lambda size_in, active_in: MaskedLinear(
            size_in, MAX_WIDTH, active_in=active_in, active_out=width, activation=nnx.sigmoid, rngs=rngs
        )
        self.first, self.second = hidden(IN, None), hidden(MAX_WIDTH, width)
        self.last = MaskedLinear(MAX_WIDTH, OUT, active_in=width, rngs=rngs)

    def __call__(self, x):
        return self.last(self.second(self.first(x)))


class Small(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(IN, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, OUT, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.sigmoid(self.second(nnx.sigmoid(self.first(x)))))


def cut(params):
    return {name: {"kernel": params[name]["kernel"][i, j], "bias": params[name]["bias"][j]} for name, (i, j) in CUT.items()}


def train(chain, params, grad):
    @jax.jit
    def step(params, state):
        updates, state = chain.update(grad(params), state, params)
        return optax.apply_updates(params, updates), state

    state = chain.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


@pytest.fixture(scope="module")
def networks():
    """Two losses of parameters as dicts, one masked with a traced width, one small; and masked parameters."""
    x = jax.random.normal(jax.random.key(0), (11, IN))

    @jax.jit
    def make(width):
        return nnx.to_pure_dict(nnx.state(Masked(width, nnx.Rngs(1)), nnx.Param))

    def loss(module, params):
        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(module, state)
        return jnp.sum(jnp.sin(module(x)))

    masked = jax.jit(jax.value_and_grad(lambda params: loss(Masked(jnp.int32(WIDTH), nnx.Rngs(2)), params)))
    small = jax.jit(jax.value_and_grad(lambda params: loss(Small(nnx.Rngs(2)), params)))
    return masked, small, make(WIDTH)


def test_output_and_gradients_are_those_of_the_small_network(networks):
    masked, small, params = networks
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # whatever stands at the inactive units
    value, grads = masked(params)
    expected, expected_grads = small(cut(params))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), cut(grads), expected_grads)
    for name, (i, j) in CUT.items():
        assert not np.asarray(grads[name]["kernel"].at[i, j].set(0)).any()
        assert not np.asarray(grads[name]["bias"].at[j].set(0)).any()


def test_training_with_decay_momentum_and_clipping_is_that_of_the_small_network(networks):
    masked, small, params = networks
    for chain in (
        optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.05, weight_decay=0.3)),
        optax.lamb(0.05, weight_decay=0.3),
    ):
        trained = train(chain, params, lambda p: masked(p)[1])
        expected = train(chain, cut(params), lambda p: small(p)[1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6), cut(trained), expected)
        assert not np.asarray(trained["second"]["kernel"][WIDTH:]).any()
        assert not np.asarray(trained["second"]["kernel"][:, WIDTH:]).any()


@pytest.mark.parametrize(
    ("init", "mode", "variance"),
    [
        (jax.nn.initializers.lecun_normal(), "fan_in", 1 / 40),
        (jax.nn.initializers.he_uniform(), "fan_in", 2 / 40),
        (jax.nn.initializers.glorot_normal(), "fan_avg", 2 / 100),
        (jax.nn.initializers.variance_scaling(1.0, "fan_out", "normal"), "fan_out", 1 / 60),
        (jax.nn.initializers.normal(0.5), "none", 0.25),
    ],
)
def test_initial_variance_is_that_of_the_small_layer(init, mode, variance):
    # 40 x 60 active weights of 200 x 100: the sample variance has a relative standard error of at most
    # sqrt(2 / 2400) = 3 %; off by 15 % happens once in 1e6.
    kernel = jax.jit(lambda a, b: masked_init(init, a, b, mode=mode)(jax.random.key(3), (200, 100)))(40, 60)
    np.testing.assert_allclose(jnp.var(kernel[:40, :60]), variance, rtol=0.15)
    assert not np.asarray(kernel.at[:40, :60].set(0)).any()


def test_lanes_of_different_widths():
    masks = jax.vmap(width_mask, (0, None))(jnp.array([1, 3, 4]), 4)
    np.testing.assert_array_equal(masks, [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode = 'fan'"):
        masked_init(jax.nn.initializers.normal(), 1, 1, mode="fan")


def test_a_traced_batch_size_trains_as_a_fixed_one():
    """Every lane sees the same examples in the same order as an unmasked training of its batch size, and ends the same."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 5)).astype(np.float32), rng.integers(0, 3, 50)
    network = lambda hparams, rngs: nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
    sgd = lambda hparams: optax.sgd(0.3, momentum=0.9)
    masked = from_nnx(network, sgd, (x, y), (x, y), batch_size=lambda hparams: hparams["batch"], max_batch_size=32)

    def trained(task, key, hparams):
        keys = jax.random.split(key, 41)
        state, _ = jax.lax.scan(lambda s, k: (task.step(k, hparams, s), None), task.init(keys[0], hparams), keys[1:])
        return state.params

    sizes, key = jnp.array([1, 7, 32]), jax.random.key(3)
    together = jax.jit(jax.vmap(lambda batch: trained(masked, key, {"batch": batch})))(sizes)
    for i, size in enumerate([1, 7, 32]):
        alone = jax.jit(lambda n=size: trained(from_nnx(network, sgd, (x, y), (x, y), batch_size=n), key, {}))()
        chex.assert_trees_all_close(jax.tree.map(lambda p, i=i: p[i], together), alone, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("sizes", [{"batch_size": lambda h: 3}, {"batch_size": 4, "max_batch_size": 8}, {"max_batch_size": 8}])
def test_a_traced_batch_size_and_its_greatest_go_together(sizes):
    data = np.zeros((8, 2), np.float32), np.zeros(8, np.int32)
    with pytest.raises(ValueError, match="max_batch_size"):
        from_nnx(lambda h, rngs: nnx.Linear(2, 2, rngs=rngs), lambda h: optax.sgd(0.1), data, data, **sizes)
