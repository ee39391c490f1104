"""Trees of arrays of any kinds as bytes: to lie side by side whatever their structure, to travel together."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxhpo.core import Array
from jaxhpo.study.snapshot import is_key, key_impl_of


def _bare(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def to_bytes(state: Any, size: int | None = None) -> jax.Array:
    """The arrays of one lane as bytes, ``u8[size]``, zeros at the end; by default of the size that they need."""
    parts = [jnp.zeros(0, jnp.uint8)]
    for leaf in jax.tree.leaves(jax.tree.map(_bare, state)):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag])
        whole = leaf.astype(jnp.uint8) if leaf.dtype == bool else lax.bitcast_convert_type(leaf, jnp.uint8)
        parts.append(whole.reshape(-1))
    flat = jnp.concatenate(parts)
    return flat if size is None else jnp.pad(flat, (0, size - flat.size))


def from_bytes(like: Any, data: Array) -> Any:
    """The inverse of :func:`to_bytes`; ``like`` holds shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(like)
    found, at = [], 0
    for due in leaves:
        bare = jax.eval_shape(_bare, due)
        is_complex = jnp.issubdtype(bare.dtype, jnp.complexfloating)
        dtype = np.dtype(np.float64 if bare.dtype == np.complex128 else np.float32) if is_complex else bare.dtype
        shape = (2, *bare.shape) if is_complex else bare.shape
        width = jnp.dtype(dtype).itemsize
        piece = data[at : at + math.prod(shape) * width]
        at += math.prod(shape) * width
        if jnp.issubdtype(dtype, jnp.bool_):
            leaf = piece.reshape(shape).astype(bool)
        else:
            leaf = lax.bitcast_convert_type(piece.reshape((*shape, width) if width > 1 else shape), dtype)
        leaf = lax.complex(leaf[0], leaf[1]) if is_complex else leaf
        found.append(jax.random.wrap_key_data(jnp.asarray(leaf), impl=key_impl_of(due)) if is_key(due) else leaf)
    return jax.tree.unflatten(treedef, found)


def size_of(like: Any) -> int:
    bare = jax.eval_shape(lambda state: jax.tree.map(_bare, state), like)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(bare))
