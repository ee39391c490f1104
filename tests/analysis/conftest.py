"""Small made-up studies for the analysis tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxhpo.study.record import StudyRecord, TrialRow

SPACE = [
    {"name": "optimizer.rate", "type": "float", "offset": 0, "shape": [], "low": 1e-4, "high": 1.0, "log": True},
    {"name": "momentum", "type": "float", "offset": 1, "shape": [], "low": 0.0, "high": 0.99, "log": False},
    {"name": "width", "type": "int", "offset": 2, "shape": [], "low": 16, "high": 256, "log": True},
    {"name": "activation", "type": "choice", "offset": 3, "shape": [], "options": ["relu", "gelu"], "static": True},
    {"name": "nesterov", "type": "choice", "offset": 4, "shape": [], "options": [False, True], "static": False},
    {"name": "decay", "type": "float", "offset": 5, "shape": [2], "low": 1e-6, "high": 1e-1, "log": True},
]


def draw_hparams(space, rng):
    """One random trial's plain values by dotted name."""

    def scalar(leaf):
        if leaf["type"] == "choice":
            return leaf["options"][rng.integers(len(leaf["options"]))]
        low, high = leaf["low"], leaf["high"]
        x = np.exp(rng.uniform(np.log(low), np.log(high))) if leaf["log"] else rng.uniform(low, high)
        return int(min(max(round(x), low), high)) if leaf["type"] == "int" else float(x)

    return {leaf["name"]: [scalar(leaf) for _ in range(leaf["shape"][0])] if leaf["shape"] else scalar(leaf) for leaf in space}


@pytest.fixture
def make_record(tmp_path):
    """``make(losses, ...)``: a record with these losses in order, None where a trial diverged."""

    def make(losses, *, space=SPACE, direction="minimize", metric="loss", name="study", seed=0, folder=None, **other):
        rng = np.random.default_rng(12)
        sign = -1.0 if direction == "maximize" else 1.0
        rows = [
            TrialRow(
                number=i,
                round=i // 4,
                lane=i % 4,
                loss=loss,
                value=None if loss is None else sign * loss,
                diverged=loss is None,
                steps=3 if loss is None else 100,
                metrics={} if loss is None else {metric: sign * loss, "extra": 0.5},
                hparams=draw_hparams(space, rng),
                seconds=2.0 + i // 4,
                error=None,
            )
            for i, loss in enumerate(losses)
        ]
        config = {"study": {"name": name, "seed": seed, "num_trials": len(rows)}, "optimizer": {"name": "PSO", "num_lanes": 4}}
        fields: dict[str, Any] = {
            "folder": Path(folder or tmp_path / f"{name}-{seed}"), "name": name, "config": config, "space": space,
            "env": {"python": "3.11", "versions": {"jax": "0.10"}}, "metric": metric, "direction": direction,
            "num_trials": max(len(rows), 8), "status": "finished", "created": 1.7e9, "trials": rows, "notes": {},
        }  # fmt: skip
        return StudyRecord(**(fields | other))

    return make
