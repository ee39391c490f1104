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
from jaxhpo.study.room import sizes_of
from jaxhpo.study.rows import answer_row, database_row
from jaxhpo.study.snapshot import LARGE, WeightStore, pack, size_of, to_numpy, unpack_any

INSIDE = "inside"  # the training states are part of the snapshot


class Keeper:
    """Writes chunks to the record; holds large training states back until they are final on disk."""

    def __init__(self, record: Record, optimizer: Optimizer):
        self._record = record
        self._optimizer = optimizer
        self._afresh = getattr(optimizer, "starts_afresh", False)
        self._weights = WeightStore(record.folder)

    def restore(self, engine: Engine) -> Carry:
        """The carry of the newest sound snapshot, or the first one."""
        snapshots = self._record.snapshots()
        if not snapshots:
            return engine.place(engine.first())
        _, data, weights = snapshots[0]
        like = jax.eval_shape(engine.first)
        sizes = sizes_of(self._optimizer, like)
        if weights == INSIDE:
            return engine.place(unpack_any(sizes, data))
        carry = unpack_any((dataclasses.replace(size, train_state=()) for size in sizes), data)
        state = engine.first().train_state if weights is None else self._weights.load(weights, like.train_state)
        return engine.place(dataclasses.replace(carry, train_state=state))

    def keep(self, carry: Carry, rows: list[dict[str, Any]], last: bool) -> None:
        """One transaction: the rows and, unless its weights are still being written, the state after them.

        After the ``last`` trial of a study no training state is needed any more.
        """
        ready = self._weights.finish()
        round = int(carry.round)
        trials = [database_row(row) for row in rows]
        answers = () if self._afresh else [answer_row(row) for row in rows]
        light = dataclasses.replace(carry, train_state=())
        if last:
            self._record.commit(trials, (round, pack(light), None), keep=1, answers=answers)
            self._weights.keep_only(set())
        elif self._afresh and bool(np.asarray(carry.over).all()):
            self._record.commit(trials, (round, pack(light), None))
        elif size_of(carry.train_state) <= LARGE:
            self._record.commit(trials, (round, pack(carry), INSIDE), answers=answers)
        else:
            self._record.commit(trials, ready, answers=answers)
            self._weights.keep_only({name for _, _, name in self._record.snapshots() if name})
            self._weights.begin(round, to_numpy(carry.train_state), (round, pack(light), str(round)))

    def close(self) -> None:
        """Refer to what is still being written."""
        try:
            ready = self._weights.finish()
            if ready is not None:
                self._record.commit((), ready)
        finally:
            self._weights.close()
