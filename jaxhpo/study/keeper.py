"""Keeping a study on disk: one transaction a chunk, and the way back to the carry."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from jaxhpo.core import Optimizer
from jaxhpo.study.engines import Engine
from jaxhpo.study.loop import Carry
from jaxhpo.study.record import Record
from jaxhpo.study.snapshot import LARGE, WeightStore, pack, size_of, to_numpy, unpack


class Keeper:
    """Writes chunks to the record; holds large training states back until they are final on disk."""

    def __init__(self, record: Record | None, optimizer: Optimizer):
        self._record = record
        self._afresh = getattr(optimizer, "starts_afresh", False)
        self._weights = WeightStore(record.folder) if record else None

    def restore(self, engine: Engine) -> Carry:
        """The carry of the newest sound snapshot, or the first one."""
        snapshots = self._record.snapshots() if self._record else []
        if not snapshots:
            return engine.place(engine.first())
        _, data, weights = snapshots[0]
        like = jax.eval_shape(engine.first)
        without = dataclasses.replace(like, train_state=())
        if weights == "inside":
            carry = unpack(like, data)
        elif weights is None:
            zeros = jax.device_get(engine.first()).train_state
            carry = dataclasses.replace(unpack(without, data), train_state=zeros)
        else:
            state = self._weights.load(weights, like.train_state)
            carry = dataclasses.replace(unpack(without, data), train_state=state)
        return engine.place(carry)

    def keep(self, carry: Carry, rows: list[tuple[Any, ...]], last: bool) -> None:
        """One transaction: the rows and, unless its weights are still being written, the state after them."""
        if self._record is None:
            return
        ready = self._weights.finish()
        round = int(carry.round)
        without = dataclasses.replace(carry, train_state=())
        needless = last or (self._afresh and bool(np.asarray(carry.over).all()))
        if needless:
            snapshot = (round, pack(without), None)
        elif size_of(carry.train_state) <= LARGE:
            snapshot = (round, pack(carry), "inside")
        else:
            snapshot = ready
            self._record.commit(rows, snapshot)
            self._weights.keep_only({s[2] for s in self._record.snapshots() if s[2]})
            self._weights.begin(round, to_numpy(carry.train_state), (round, pack(without), str(round)))
            return
        self._record.commit(rows, snapshot)

    def close(self) -> None:
        if self._weights is not None:
            ready = self._weights.finish()
            if ready is not None:
                self._record.commit((), ready)
            self._weights.close()
