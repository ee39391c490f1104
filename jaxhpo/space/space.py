"""A space: a pytree of leaves, mapped to and from the unit cube.

    cube  [..., D]  --decode-->  hparams, arrays [..., *shape] in the shape of the tree  --to_host-->  Python values
    cube  [..., D]  <--encode--  hparams                                               <--from_host--  Python values

Decoding works on all ``D`` dimensions at once and cuts the result into leaves afterwards, so that a thousand
small leaves cost no more than one large one.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.core import Array, CubeSpec, Kind, Run
from jaxhpo.space.leaves import LEAF_TYPES, Choice, Float, Int, Leaf, label_of

_CONSTANTS = (bool, int, float, str, type(None), np.generic)


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one leaf lies in the cube; all that is static about it.

    Labels may be unhashable (a list of layer sizes), so they count for equality but not for the hash.
    """

    name: str
    run: Run
    shape: tuple[int, ...] = ()
    log: bool = False
    options: tuple[Any, ...] = dataclasses.field(default=(), hash=False)
    static: bool = False
    offset: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def is_bool(self) -> bool:
        return len(self.options) == 2 and self.options[0] is False and self.options[1] is True


@dataclasses.dataclass(frozen=True)
class Constant:
    """A leaf that does not vary."""

    name: str
    value: Any = dataclasses.field(hash=False)


@dataclasses.dataclass(frozen=True)
class _Layout:
    treedef: Any
    leaves: tuple[Slot | Constant, ...]
    spec: CubeSpec


def _spec_of(runs: Sequence[Run]) -> CubeSpec:
    """Neighbouring runs of the same sort are merged, so that the spec stays small."""
    merged: list[Run] = []
    for run in runs:
        if merged and dataclasses.replace(merged[-1], count=1) == dataclasses.replace(run, count=1):
            merged[-1] = dataclasses.replace(run, count=merged[-1].count + run.count)
        else:
            merged.append(run)
    return CubeSpec(tuple(merged))


@jax.tree_util.register_pytree_node_class
class Space:
    """A pytree of leaves (dicts, lists, tuples, registered dataclasses, nested at will).

    Numbers, labels and None in the tree are constants and pass through ``decode`` as they are. The bounds of
    floats and linear integers are arrays, so that changing one recompiles nothing; what is static is the shape
    of the tree, which dimensions are logarithmic, and the levels of integers and choices.

    Args:
        tree: the leaves, or a single leaf. What JAX does not know and gives itself as a dictionary by ``to_dict``, as a
            ConfigDict does, is that dictionary.

    Raises:
        TypeError: for something in the tree that is neither a leaf nor a constant.
        ValueError: if nothing in the tree may vary.
    """

    lower: Array  # f32[D], the lower bound as the cube sees it: its logarithm where log
    upper: Array  # f32[D]
    low: Array  # f32[D], the lower bound itself
    high: Array  # f32[D]
    first: Array  # i32[D], the lowest integer; 0 elsewhere
    _layout: _Layout

    def __init__(self, tree: Any):
        tree = _as_dictionaries(tree)
        paths, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or isinstance(x, LEAF_TYPES))
        layout, leaves, offset = [], [], 0
        for path, leaf in paths:
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
            if isinstance(leaf, LEAF_TYPES):
                options, static = (leaf.options, leaf.static) if isinstance(leaf, Choice) else ((), False)
                slot = Slot(name, leaf.run, leaf.shape, getattr(leaf, "log", False), options, static, offset)
                layout.append(slot)
                leaves.append((leaf, slot.size))
                offset += slot.size
            elif isinstance(leaf, _CONSTANTS):
                layout.append(Constant(name, leaf))
            else:
                hint = "; register the class with jaxhpo.pytree_dataclass" if dataclasses.is_dataclass(leaf) else ""
                raise TypeError(f"{name}: {type(leaf).__name__} is neither Float, Int, Choice nor a constant{hint}")
        if not leaves:
            raise ValueError("a space needs at least one Float, Int or Choice")
        (name, times), *_ = collections.Counter(leaf.name for leaf in layout).most_common(1)
        if times > 1:
            raise ValueError(f"two hyperparameters are called {name!r}")
        self._layout = _Layout(treedef, tuple(layout), _spec_of([dataclasses.replace(x.run, count=n) for x, n in leaves]))

        def spread(values: Sequence[float], dtype: Any) -> np.ndarray:
            return np.repeat(np.asarray(values, dtype), [n for _, n in leaves])

        bounds = [(x.low, x.high, x.log) if isinstance(x, Float) else (0.0, 1.0, False) for x, _ in leaves]
        self.lower = spread([math.log(low) if log else low for low, _, log in bounds], np.float32)
        self.upper = spread([math.log(high) if log else high for _, high, log in bounds], np.float32)
        self.low = spread([low for low, _, _ in bounds], np.float32)
        self.high = spread([high for _, high, _ in bounds], np.float32)
        self.first = spread([x.low if isinstance(x, Int) else 0 for x, _ in leaves], np.int32)

    def tree_flatten(self) -> tuple[tuple[Any, ...], _Layout]:
        return (self.lower, self.upper, self.low, self.high, self.first), self._layout

    @classmethod
    def tree_unflatten(cls, layout: _Layout, arrays: Sequence[Any]) -> Space:
        space = object.__new__(cls)
        space.lower, space.upper, space.low, space.high, space.first = arrays
        space._layout = layout
        return space

    @property
    def spec(self) -> CubeSpec:
        return self._layout.spec

    @property
    def num_dims(self) -> int:
        return self._layout.spec.num_dims

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The leaves that may vary, in the order of their dimensions."""
        return tuple(leaf for leaf in self._layout.leaves if isinstance(leaf, Slot))

    @property
    def names(self) -> list[str]:
        """One dotted name a leaf that may vary."""
        return [slot.name for slot in self.slots]

    @property
    def static_slots(self) -> tuple[Slot, ...]:
        return tuple(slot for slot in self.slots if slot.static)

    def _is_log(self) -> np.ndarray:
        return np.repeat([s.log and s.run.kind == Kind.FLOAT for s in self.slots], [s.size for s in self.slots])

    @property
    def static_dims(self) -> np.ndarray:
        """Dimensions of the cube that are static choices, ``bool[D]``."""
        static = np.zeros(self.num_dims, bool)
        static[[slot.offset for slot in self.static_slots]] = True
        return static

    def decode(self, cube: Array, static: tuple[int, ...] | None = None) -> Any:
        """Hyperparameters at a point of the cube, ``f32[..., D]`` -> arrays ``[..., *shape]``.

        Differentiable in float leaves. Integers are ``i32``, choices their index (``i32``; ``bool`` for Bool).

        Args:
            cube: the point; coordinates outside ``[0, 1]`` are clipped.
            static: an index for every static choice, which then arrives as its label.
        """
        return self.assemble(self.decode_arrays(cube), static)

    def decode_arrays(self, cube: Array) -> list[jax.Array]:
        """Only what varies, one array ``[..., *shape]`` a leaf in the order of :attr:`slots`; fit to be vmapped."""
        values, levels = self._decode_floats(cube), self.spec.level_of(cube) + self.first
        return [self._cut(slot, values if slot.run.kind == Kind.FLOAT else levels) for slot in self.slots]

    def assemble(self, arrays: Sequence[Any], static: tuple[int, ...] | None = None) -> Any:
        """The output of :meth:`decode_arrays` in the shape of the tree, with the constants and the static labels."""
        varying, chosen = iter(arrays), iter(static or ())
        leaves = []
        for leaf in self._layout.leaves:
            if isinstance(leaf, Constant):
                leaves.append(leaf.value)
            else:
                array = next(varying)
                leaves.append(leaf.options[next(chosen)] if leaf.static and static is not None else array)
        return jax.tree_util.tree_unflatten(self._layout.treedef, leaves)

    def _decode_floats(self, cube: Array) -> jax.Array:
        value = self.lower + cube * (self.upper - self.lower)
        is_log = self._is_log()
        if is_log.any():
            value = jnp.where(is_log, jnp.exp(jnp.where(is_log, value, 0.0)), value)
        return _clipped(value, jnp.asarray(self.low), jnp.asarray(self.high))

    def _cut(self, slot: Slot, source: jax.Array) -> jax.Array:
        piece = source[..., slot.offset : slot.offset + slot.size].reshape(source.shape[:-1] + slot.shape)
        return piece.astype(bool) if slot.is_bool else piece

    def encode(self, hparams: Any) -> Array:
        """The point of the cube that decodes to ``hparams``: arrays ``[..., *shape]`` -> ``f32[..., D]``.

        Integers and choices go to the middle of their level. A static choice may come as label or index.
        """
        pieces = []
        for slot, leaf in self._varying(hparams):
            if slot.static and not hasattr(leaf, "dtype"):
                leaf = _index_of(slot, leaf)
            array = jnp.asarray(leaf, jnp.float32)
            pieces.append(array.reshape((*array.shape[: array.ndim - len(slot.shape)], slot.size)))
        batch = jnp.broadcast_shapes(*[piece.shape[:-1] for piece in pieces])
        value = jnp.concatenate([jnp.broadcast_to(piece, (*batch, piece.shape[-1])) for piece in pieces], axis=-1)
        is_log = self._is_log()
        moved = jnp.where(is_log, jnp.log(jnp.where(is_log, value, 1.0)), value) if is_log.any() else value
        cube = jnp.clip((moved - self.lower) / (self.upper - self.lower), 0.0, 1.0)
        if self.spec.is_float.all():
            return cube
        middle = self.spec.cube_of(jnp.round(value).astype(jnp.int32) - self.first)
        return jnp.where(self.spec.is_float, cube, middle)

    def moved(self, floats: Mapping[str, Array], moves: Mapping[str, Array]) -> dict[str, jax.Array]:
        """Decoded floats by name after moves in the cube, both shaped as the leaf: the same bits where nothing moves.

        What would leave the bounds stays on them.
        """
        found, log = {}, self._is_log()
        for slot in self.slots:
            if slot.name in floats:
                low, high, lower, upper = (
                    jnp.asarray(bound)[slot.offset : slot.offset + slot.size].reshape(slot.shape)
                    for bound in (self.low, self.high, self.lower, self.upper)
                )
                step = moves[slot.name] * (upper - lower)
                value = floats[slot.name]
                found[slot.name] = jnp.clip(value * jnp.exp(step) if log[slot.offset] else value + step, low, high)
        return found

    def static_of(self, cube: Array) -> jax.Array:
        """The indices of the static choices, ``f32[..., D] -> i32[..., number of static choices]``."""
        places = np.array([slot.offset for slot in self.static_slots], int)
        return self.spec.level_of(cube)[..., places]

    def static_among(self, arrays: Sequence[Any]) -> np.ndarray:
        """The same from the output of :meth:`decode_arrays`, on the host: ``i32[..., number of static choices]``."""
        return np.stack([np.asarray(array) for slot, array in zip(self.slots, arrays, strict=True) if slot.static], axis=-1)

    def to_host(self, hparams: Any) -> Any:
        """Decoded hyperparameters of one trial as plain Python values: numbers, lists of them, labels."""
        leaves = self._layout.treedef.flatten_up_to(hparams)
        return jax.tree_util.tree_unflatten(
            self._layout.treedef, [_to_host(slot, leaf) for slot, leaf in zip(self._layout.leaves, leaves, strict=True)]
        )

    def to_columns(self, arrays: Sequence[Any]) -> dict[str, list[Any]]:
        """Many trials from :meth:`decode_arrays`, leading size ``N``, as one list of plain values a leaf."""
        columns = {}
        for slot, leaf in zip(self.slots, arrays, strict=True):
            array = np.asarray(leaf)
            flat = _plain(slot, array.ravel())
            columns[slot.name] = _nested(flat, array.shape) if slot.shape else flat
        return columns

    def choices_at(self, cubes: Array) -> dict[str, list[Any]]:
        """The labels of all choices at many points, ``f32[N, D]``, one list a leaf."""
        levels = np.asarray(self.spec.level_of(cubes))
        columns = {}
        for slot in self.slots:
            if slot.run.kind == Kind.CHOICE:
                flat = _plain(slot, levels[:, slot.offset : slot.offset + slot.size].ravel())
                columns[slot.name] = _nested(flat, (len(levels), *slot.shape)) if slot.shape else flat
        return columns

    def from_host(self, values: Any) -> Any:
        """Plain Python values as the arrays that ``decode`` would give; the inverse of ``to_host``.

        Raises:
            ValueError: if a value lies outside its bounds or is none of the options; all are named at once.
        """
        try:
            leaves = self._layout.treedef.flatten_up_to(values)
        except (ValueError, TypeError) as error:
            raise ValueError(f"the values do not have the shape of the space: {error}") from None
        made, problems = [], []
        for slot, value in zip(self._layout.leaves, leaves, strict=True):
            try:
                made.append(self._from_host(slot, value))
            except (ValueError, TypeError) as error:
                problems.append(f"{slot.name}: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return jax.tree_util.tree_unflatten(self._layout.treedef, made)

    def _from_host(self, slot: Slot | Constant, value: Any) -> Any:
        if isinstance(slot, Constant):
            return slot.value
        if slot.run.kind == Kind.CHOICE:
            if slot.static:
                return slot.options[_index_of(slot, value)]
            flat = _labels(value, slot.shape)
            index = np.array([_index_of(slot, label) for label in flat], np.int32).reshape(slot.shape)
            return index.astype(bool) if slot.is_bool else index
        array = np.asarray(value, np.float64)
        if array.shape != slot.shape:
            raise ValueError(f"shape {array.shape} where {slot.shape} is due")
        dims = slice(slot.offset, slot.offset + slot.size)
        if slot.run.kind == Kind.FLOAT:
            low, high, dtype = np.asarray(self.low)[dims], np.asarray(self.high)[dims], np.float32
        else:
            low = np.asarray(self.first)[dims]
            high, dtype = low + slot.run.levels - 1, np.int32
            if (array != np.round(array)).any():
                raise ValueError(f"{value!r} must be a whole number")
        if not ((array.ravel().astype(dtype) >= low) & (array.ravel().astype(dtype) <= high)).all():
            raise ValueError(f"{value!r} must lie between {low.min().item()!r} and {high.max().item()!r}")
        return array.astype(dtype)

    def describe(self) -> list[dict[str, Any]]:
        """One plain dictionary a leaf that may vary, for records and reports."""
        rows = []
        for slot in self.slots:
            at, kind = slot.offset, Kind(slot.run.kind).name.lower()
            row: dict[str, Any] = {"name": slot.name, "type": kind, "offset": at, "shape": list(slot.shape)}
            if slot.run.kind == Kind.CHOICE:
                row |= {"options": [label_of(option) for option in slot.options], "static": slot.static}
            elif slot.run.kind == Kind.INT:
                low = int(np.asarray(self.first)[at])
                row |= {"low": low, "high": low + slot.run.levels - 1, "log": slot.log}
            else:
                row |= {"low": _short(np.asarray(self.low)[at]), "high": _short(np.asarray(self.high)[at]), "log": slot.log}
            rows.append(row)
        return rows

    def flat(self, hparams: Any) -> dict[str, Any]:
        """Leaves that may vary by dotted name, whatever the leaves of ``hparams`` are."""
        return {slot.name: leaf for slot, leaf in self._varying(hparams)}

    def _varying(self, hparams: Any) -> list[tuple[Slot, Any]]:
        leaves = self._layout.treedef.flatten_up_to(hparams)
        return [(slot, leaf) for slot, leaf in zip(self._layout.leaves, leaves, strict=True) if isinstance(slot, Slot)]

    def __repr__(self) -> str:
        return f"Space({', '.join(self.names[:8])}{', ...' if len(self.slots) > 8 else ''}; {self.num_dims} dimensions)"


def _as_dictionaries(tree: Any) -> Any:
    convert = lambda node: _as_dictionaries(node.to_dict()) if callable(getattr(node, "to_dict", None)) else node
    return jax.tree.map(convert, tree, is_leaf=lambda node: node is None)


@jax.custom_jvp
def _clipped(value: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Clipped, with the slope of the value: rounding may step over a bound, which is no reason for a slope of zero."""
    return jnp.clip(value, low, high)


@_clipped.defjvp
def _clipped_jvp(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _clipped(*primals), tangents[0]


def _short(number: Any) -> float:
    """The shortest decimal that is this float32, as a Python float: 0.1 rather than 0.10000000149."""
    return float(str(np.float32(number)))


def _index_of(slot: Slot, label: Any) -> int:
    for index, option in enumerate(slot.options):
        if option is label or (isinstance(option, bool) == isinstance(label, bool) and option == label):
            return index
    raise ValueError(f"{label!r} must be one of {', '.join(map(repr, slot.options))}")


def _labels(value: Any, shape: tuple[int, ...]) -> list[Any]:
    flat = [value]
    for size in shape:
        if any(isinstance(x, str) or not isinstance(x, (Sequence, np.ndarray)) or len(x) != size for x in flat):
            raise ValueError(f"labels of shape {shape} are due")
        flat = list(itertools.chain.from_iterable(flat))
    return flat


def _to_host(slot: Slot | Constant, leaf: Any) -> Any:
    if isinstance(slot, Constant):
        return slot.value
    if slot.static and not hasattr(leaf, "dtype"):
        return leaf
    array = np.asarray(leaf)
    if array.shape != slot.shape:
        raise ValueError(f"{slot.name}: shape {array.shape} where {slot.shape} is due; to_host takes one trial")
    flat = _plain(slot, array.ravel())
    return _nested(flat, slot.shape) if slot.shape else flat[0]


def _plain(slot: Slot, flat: np.ndarray) -> list[Any]:
    if slot.run.kind == Kind.CHOICE:
        return [slot.options[index] for index in flat.astype(int).tolist()]
    if slot.run.kind == Kind.INT:
        return flat.tolist()
    return [float(text) for text in flat.astype(np.float32).astype(str).tolist()]  # the shortest decimal of each


def _nested(flat: list[Any], shape: tuple[int, ...]) -> list[Any]:
    for size in reversed(shape[1:]):
        flat = [flat[i : i + size] for i in range(0, len(flat), size)]
    return flat


def as_space(space: Space | Mapping[str, Any] | Leaf | Sequence[Any]) -> Space:
    """A Space as it is, or the Space of a tree of leaves."""
    return space if isinstance(space, Space) else Space(space)
