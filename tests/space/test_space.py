"""Spaces: the map between the cube and hyperparameters, in both directions."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxhpo as jh
from jaxhpo.core import CubeSpec, Kind, Run
from jaxhpo.space import Bool, Choice, Float, Int, Space


@jh.pytree_dataclass
class Nested:
    rate: object
    sizes: object


def make_mixed(high=1.0):
    return Space(
        {
            "lr": Float(1e-4, high, log=True),
            "momentum": Float(-1.0, 0.99),
            "width": Int(16, 256, log=True),
            "layers": [Int(-2, 3), Choice(["relu", "gelu", ("a", "b")])],
            "nest": Nested(Float(0, 2, shape=(2, 3)), Int(1, 4, shape=(2,))),
            "flag": Bool(),
            "fixed": 0.5,
            "label": "sgd",
            "nothing": None,
        }
    )


MIXED = make_mixed()
CUBES = np.random.default_rng(0).uniform(size=(20_000, MIXED.num_dims)).astype(np.float32)


def test_decode_matches_the_formulas():
    cube = jnp.full(MIXED.num_dims, 0.25)
    hparams = MIXED.decode(cube)
    assert float(hparams["lr"]) == pytest.approx(10 ** (-4 + 0.25 * 4), rel=1e-5)
    assert float(hparams["momentum"]) == pytest.approx(-1 + 0.25 * 1.99, rel=1e-6)
    assert int(hparams["width"]) == round(15.5 * (256.5 / 15.5) ** 0.25 - 0.5 + 0.5 - 0.5)
    assert int(hparams["layers"][0]) == -2 + int(0.25 * 6)
    assert int(hparams["layers"][1]) == 0
    np.testing.assert_allclose(hparams["nest"].rate, np.full((2, 3), 0.5))
    assert hparams["nest"].sizes.tolist() == [2, 2]
    assert hparams["flag"].dtype == bool
    assert (hparams["fixed"], hparams["label"], hparams["nothing"]) == (0.5, "sgd", None)


def test_the_corners_of_the_cube_are_the_bounds_exactly():
    low, high = (MIXED.to_host(MIXED.decode(jnp.full(MIXED.num_dims, edge))) for edge in (0.0, 1.0))
    assert (low["lr"], high["lr"]) == (1e-4, 1.0)
    assert (low["momentum"], high["momentum"]) == (-1.0, 0.99)
    assert (low["width"], high["width"]) == (16, 256)
    assert (low["layers"], high["layers"]) == ([-2, "relu"], [3, ("a", "b")])
    assert (low["flag"], high["flag"]) == (False, True)


def test_encode_inverts_decode():
    decoded = MIXED.decode(CUBES)
    encoded = MIXED.encode(decoded)
    np.testing.assert_allclose(encoded, MIXED.spec.snap(CUBES), atol=2e-6)
    again = MIXED.decode(encoded)
    for a, b in zip(MIXED.flat(decoded).values(), MIXED.flat(again).values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_host_values_and_arrays_are_two_forms_of_the_same():
    for cube in CUBES[:20]:
        decoded = MIXED.decode(cube)
        host = MIXED.to_host(decoded)
        assert type(host["lr"]) is float
        assert type(host["width"]) is int
        assert type(host["flag"]) is bool
        assert isinstance(host["nest"].rate, list)
        back = MIXED.from_host(host)
        varying = lambda tree: list(MIXED.flat(tree).values())
        for a, b in zip(varying(decoded), varying(back), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_columns_equal_trial_by_trial_conversion():
    arrays = MIXED.decode_arrays(CUBES[:50])
    columns = MIXED.to_columns(arrays)
    for i in (0, 17, 49):
        flat = MIXED.flat(MIXED.to_host(MIXED.assemble([a[i] for a in arrays])))
        assert {name: column[i] for name, column in columns.items()} == flat


def test_every_level_owns_an_equal_share_and_log_levels_their_logarithms():
    counts = np.bincount(np.asarray(MIXED.decode(CUBES)["layers"][0]) + 2, minlength=6)
    # Chi-square with 5 degrees of freedom: above 30 with probability 1.5e-5.
    expected = len(CUBES) / 6
    assert ((counts - expected) ** 2 / expected).sum() < 30
    widths = np.asarray(MIXED.decode(CUBES)["width"])
    share = np.log((widths[widths < 64].max() + 0.5) / 15.5) / np.log(256.5 / 15.5)
    # Six standard deviations of a binomial share: fails with probability 2e-9.
    assert abs((widths < 64).mean() - share) < 6 * np.sqrt(share * (1 - share) / len(CUBES))


SMALL = [Run(Kind.INT, 7), Run(Kind.CHOICE, 3), Run(Kind.INT, 241, 16)]
GREATEST = [Run(Kind.INT, 2**22), Run(Kind.INT, 2**17, 1), Run(Kind.INT, 2**17, 10**6)]


@pytest.mark.parametrize("run", SMALL + GREATEST)
def test_levels_are_inverted_by_their_middles(run):
    spec = CubeSpec((run,))
    levels = jnp.arange(run.levels)[:, None]
    np.testing.assert_array_equal(spec.level_of(spec.cube_of(levels)), levels)
    assert int(spec.level_of(jnp.zeros(1))[0]) == 0
    assert int(spec.level_of(jnp.ones(1))[0]) == run.levels - 1


def test_gradients_reach_floats_everywhere_and_nothing_else():
    slope = jax.grad(lambda cube: MIXED.decode(cube)["lr"])
    for u in (0.0, 0.3, 1.0):  # the bounds included
        gradient = slope(jnp.full(MIXED.num_dims, u))
        at = [s.name for s in MIXED.slots].index("lr")
        place = MIXED.slots[at].offset
        expected = np.log(1e4) * 10 ** (-4 + 4 * u)
        assert float(gradient[place]) == pytest.approx(expected, rel=1e-4)
        assert float(jnp.abs(gradient).sum()) == pytest.approx(expected, rel=1e-4)


def test_gradient_against_finite_differences_in_double(x64):
    space = Space({"a": Float(0.1, 10, log=True, shape=(3,)), "b": Float(-3, 5)})
    value = lambda cube: jnp.sin(space.decode(cube)["a"]).sum() * space.decode(cube)["b"]
    cube = jnp.array([0.2, 0.5, 0.7, 0.4], jnp.float64)
    numeric = [(value(cube.at[i].add(1e-6)) - value(cube.at[i].add(-1e-6))) / 2e-6 for i in range(4)]
    np.testing.assert_allclose(jax.grad(value)(cube), numeric, rtol=1e-7)


def test_jit_and_vmap_agree_with_plain_calls():
    plain = MIXED.decode(CUBES[:64])
    arrays = jax.jit(jax.vmap(lambda space, cube: space.decode_arrays(cube), (None, 0)))(MIXED, CUBES[:64])
    for a, b in zip(MIXED.flat(plain).values(), arrays, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def test_other_bounds_trace_nothing_anew():
    chex.clear_trace_counter()
    decode = jax.jit(chex.assert_max_traces(n=1)(lambda space, cube: space.decode_arrays(cube)))
    results = [decode(make_mixed(high), jnp.ones(MIXED.num_dims)) for high in (1.0, 0.5, 0.25)]
    at = MIXED.names.index("lr")
    np.testing.assert_allclose([float(r[at]) for r in results], [1.0, 0.5, 0.25], rtol=1e-6)
    shifted = [Space({"n": Int(low, low + 4)}) for low in (0, 7)]
    decode = jax.jit(chex.assert_max_traces(n=2)(lambda space, cube: space.decode(cube)["n"]))
    assert [int(decode(space, jnp.zeros(1))) for space in shifted] == [0, 7]


def test_many_small_leaves_cost_a_constant_number_of_operations():
    """The compiled program's arithmetic does not grow with the number of leaves: only slices do."""

    def operations(count):
        space = Space({f"x{i}": Float(1e-3, 1 + i, log=True) for i in range(count)})
        text = str(jax.make_jaxpr(space.decode)(jnp.ones(count)))
        return text.count(" exp "), text.count(" mul ")

    assert operations(500) == operations(5)


def test_static_choices_arrive_as_labels_or_as_indices():
    space = Space({"act": Choice(["relu", "gelu"], static=True), "x": Float(0, 1), "depth": Choice([1, 2, 4], static=True)})
    cube = jnp.array([0.9, 0.4, 0.5])
    assert [slot.name for slot in space.static_slots] == ["act", "depth"]
    assert space.static_of(cube).tolist() == [1, 1]
    labelled = space.decode(cube, (1, 1))
    assert (labelled["act"], labelled["depth"]) == ("gelu", 2)
    assert int(space.decode(cube)["depth"]) == 1
    np.testing.assert_allclose(space.encode(labelled), space.encode(space.decode(cube)))


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-30, 1e30), st.floats(1.001, 1e6), st.booleans(), st.floats(0, 1))
def test_floats_stay_within_their_bounds(low, factor, log, u):
    high = low * factor
    value = Space(Float(low, high, log=log)).decode(np.array([u], np.float32))
    assert np.float32(low) <= value <= np.float32(high)


@settings(deadline=None, max_examples=60)
@given(st.integers(-(2**30), 2**30), st.integers(1, 2**22 - 1), st.floats(0, 1))
def test_integers_stay_within_their_bounds(low, extent, u):
    assert low <= int(Space(Int(low, low + extent)).decode(np.array([u], np.float32))) <= low + extent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1, 0), "low must be below high"),
        (lambda: Float(1, 1), "low must be below high"),
        (lambda: Float(0, 1, log=True), "log needs low above 0"),
        (lambda: Float(1, 1 + 1e-9), "float32 cannot represent"),
        (lambda: Float(-3e38, 3e38), "float32 cannot represent"),
        (lambda: Float(0, float("nan")), "high must be finite"),
        (lambda: Float("a", 1), "low must be a number"),
        (lambda: Float(0, 1, log="yes"), "log must be true or false"),
        (lambda: Float(0, 1, shape=(0,)), "at least 1"),
        (lambda: Float(0, 1, shape=2.5), "whole numbers"),
        (lambda: Int(0, 5, log=True), "log needs low of at least 1"),
        (lambda: Int(0.5, 5), "low must be a whole number"),
        (lambda: Int(0, 2**22), "use Float"),
        (lambda: Int(1, 2**18, log=True), "use Float"),
        (lambda: Int(3, 2), "low must be below high"),
        (lambda: Choice([]), "at least one label"),
        (lambda: Choice(["a", "a"]), "differ"),
        (lambda: Choice("abc"), "list of labels"),
        (lambda: Choice(["a", "b"], static=True, shape=(2,)), "must be a scalar"),
        (lambda: Space({}), "at least one"),
        (lambda: Space({"a": 1.0}), "at least one"),
        (lambda: Space({"a": object()}), "a: object is neither"),
        (lambda: Space({"a.b": Float(0, 1), "a": {"b": Float(0, 1)}}), "two hyperparameters are called 'a.b'"),
    ],
)
def test_mistakes_in_a_space_are_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_an_unregistered_dataclass_is_named_with_the_remedy():
    plain = dataclasses.make_dataclass("Plain", ["a"])
    with pytest.raises(TypeError, match=r"register the class with jaxhpo\.pytree_dataclass"):
        Space({"p": plain(Float(0, 1))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2.0}, "lr: 2.0 must lie between"),
        ({"width": 16.5}, "width: 16.5 must be a whole number"),
        ({"layers": [0, "elu"]}, "layers.1: 'elu' must be one of 'relu', 'gelu'"),
        ({"flag": 1}, "flag: 1 must be one of False, True"),
        ({"lr": 9.0, "width": 1}, "lr: .*; width: "),
    ],
)
def test_from_host_names_every_wrong_value(change, message):
    good = MIXED.to_host(MIXED.decode(CUBES[0]))
    with pytest.raises(ValueError, match=message):
        MIXED.from_host({**good, **change})


def test_describe_is_plain_and_true():
    rows = {row["name"]: row for row in MIXED.describe()}
    lr = rows["lr"]
    assert (lr["type"], lr["shape"], lr["low"], lr["high"], lr["log"]) == ("float", [], 1e-4, 1.0, True)
    assert rows["width"]["low"] == 16
    assert rows["width"]["high"] == 256
    assert rows["layers.1"]["options"][:2] == ["relu", "gelu"]
    assert "fixed" not in rows


def test_unhashable_labels_are_fine_under_jit():
    space = Space({"sizes": Choice([[64, 64], [128]]), "x": Float(0, 1)})
    index = jax.jit(lambda space, cube: space.decode(cube)["sizes"])(space, jnp.array([0.9, 0.1]))
    assert space.to_host({"sizes": index, "x": jnp.float32(0.5)})["sizes"] == [128]
