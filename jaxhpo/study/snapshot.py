"""The carry of a study as bytes and back, bit for bit; large training states apart, through Orbax."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxhpo.errors import JaxhpoError

LARGE = 8 * 2**20  # bytes of training state above which it goes to Orbax instead of into the record


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl_of(shape: Any) -> Any:
    """The generator of random keys, by their shape and dtype alone."""
    return jax.random.key_impl(jnp.empty((), shape.dtype))


def to_numpy(tree: Any) -> Any:
    """Every leaf as a numpy array, random keys as their ``uint32`` data."""
    bare = jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
    return jax.tree.map(np.asarray, jax.device_get(bare))


def from_numpy(like: Any, arrays: Any) -> Any:
    """The inverse of :func:`to_numpy`; ``like`` holds the shapes and dtypes that are due."""

    def one(shape: Any, array: Any) -> Any:
        if not is_key(shape):
            return array
        return jax.random.wrap_key_data(array, impl=key_impl_of(shape))

    return jax.tree.map(one, like, arrays)


def _layout(leaves: list[Any]) -> str:
    return json.dumps([[list(leaf.shape), str(leaf.dtype)] for leaf in leaves])


def pack(tree: Any) -> bytes:
    """A tree of arrays as bytes."""
    leaves = jax.tree.leaves(to_numpy(tree))
    # Raw bytes beside a layout of their own: npz has no name for types such as bfloat16.
    arrays: dict[str, Any] = {
        f"a{i}": np.frombuffer(np.ascontiguousarray(leaf).tobytes(), np.uint8) for i, leaf in enumerate(leaves)
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, layout=np.frombuffer(_layout(leaves).encode(), np.uint8), **arrays)
    return buffer.getvalue()


def _bare(tree: Any) -> Any:
    """The shapes of a tree with random keys as their data."""
    return jax.eval_shape(lambda tree: jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree), tree)


def unpack(like: Any, data: bytes) -> Any:
    """Bytes as a tree of the structure, shapes and dtypes of ``like``.

    Raises:
        JaxhpoError: if the bytes hold other shapes: they come from other code or another study.
    """
    return unpack_any([like], data)


def unpack_any(likes: Iterable[Any], data: bytes) -> Any:
    """Bytes as a tree like the first of ``likes`` whose shapes and dtypes they have; see :func:`unpack`."""
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        layout = stored["layout"].tobytes().decode()
        for like in likes:
            due, treedef = jax.tree.flatten(_bare(like))
            if layout == _layout(due):
                leaves = [np.frombuffer(stored[f"a{i}"].tobytes(), x.dtype).reshape(x.shape) for i, x in enumerate(due)]
                return from_numpy(like, jax.tree.unflatten(treedef, leaves))
    raise JaxhpoError("the recorded state has another layout: it was written by another version of the optimizer or task")


def size_of(tree: Any) -> int:
    """Bytes that the arrays of a tree take."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if not is_key(leaf))


@contextlib.contextmanager
def _told(folder: Path) -> Generator[None]:
    """Failures of the checkpoint library as one line; what it raises depends on what it was doing."""
    try:
        yield
    except Exception as error:
        raise JaxhpoError(f"{folder}: training states cannot be kept there: {' '.join(str(error).split())[:300]}") from error


class WeightStore:
    """Large training states beside the record, written in the background.

    A state is referred to by the record only once it is final, so a kill at any moment leaves a snapshot whose
    weights are whole. :meth:`begin` starts a write; :meth:`finish` waits for it and gives what was begun with it.
    """

    def __init__(self, folder: Path):
        self._folder = folder / "lanes"
        self._checkpointer: Any = None
        self._pending: Any = None

    def begin(self, round: int, tree: Any, ticket: Any) -> None:
        """Write ``tree`` in the background; ``ticket`` comes back from :meth:`finish`."""
        import orbax.checkpoint as ocp

        if self._checkpointer is None:
            self._checkpointer = ocp.StandardCheckpointer()
        path = (self._folder / str(round)).resolve()
        leaves = jax.tree.leaves(to_numpy(tree))
        with _told(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)  # before Orbax's threads begin to wait for it
            if path.exists():  # left by a run that was killed after writing it and before referring to it
                shutil.rmtree(path)
            self._checkpointer.save(path, {f"a{i}": leaf for i, leaf in enumerate(leaves)})
        self._pending = ticket

    def finish(self) -> Any:
        """Wait for the write that is under way; its ticket, or None if there is none."""
        if self._pending is None:
            return None
        ticket, self._pending = self._pending, None
        with _told(self._folder):
            self._checkpointer.wait_until_finished()
        return ticket

    def load(self, name: str, like: Any) -> Any:
        """The state written under ``name``."""
        import orbax.checkpoint as ocp

        due, treedef = jax.tree.flatten(_bare(like))
        targets = {f"a{i}": np.zeros(x.shape, x.dtype) for i, x in enumerate(due)}
        with _told(self._folder):
            stored = ocp.StandardCheckpointer().restore((self._folder / name).resolve(), targets)
        return from_numpy(like, jax.tree.unflatten(treedef, [stored[f"a{i}"] for i in range(len(due))]))

    def keep_only(self, names: set[str]) -> None:
        """Remove the states that no snapshot refers to."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
            if not names:
                shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()
