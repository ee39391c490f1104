"""What a study is, told as plain data: for its record, and for knowing it again."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import jax
import numpy as np

from jaxhpo.space import label_of
from jaxhpo.study.problem import Problem
from jaxhpo.study.snapshot import to_numpy


def _settings(optimizer: Any) -> dict[str, Any]:
    """An optimizer as plain data: its name and fields."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return _settings(value)
        if isinstance(value, functools.partial):
            bound = {"args": [plain(x) for x in value.args]} if value.args else {}
            return {"function": plain(value.func), **bound, **{name: plain(x) for name, x in value.keywords.items()}}
        return value.tolist() if hasattr(value, "tolist") else label_of(value)

    fields = {field.name: plain(getattr(optimizer, field.name)) for field in dataclasses.fields(optimizer)}
    return {"name": type(optimizer).__name__, **fields}


def _estimator_settings(estimator: Any) -> dict[str, Any]:
    """The same of an estimator, whose task is told by its data and its factory."""
    blank = {name: None for name in ("task", "loss") if hasattr(estimator, name)}
    settings = _settings(dataclasses.replace(estimator, **blank))
    return {name: value for name, value in settings.items() if name not in blank}


def described(study: Any) -> dict[str, Any]:
    """A study made in Python, told as a config would."""
    seed = study.seed if isinstance(study.seed, (int, np.integer)) else np.asarray(jax.random.key_data(study.key)).tolist()
    told = {"name": study.name, "seed": seed, "num_trials": study.num_trials, "metric": study.metric}
    more = ("max_steps", "max_seconds", "target", "seeds", "seed_quantile", "race", "shard_width")
    defaults = {field.name: field.default for field in dataclasses.fields(study)}
    told |= {name: getattr(study, name) for name in more if getattr(study, name) != defaults[name]}
    space = {
        row["name"]: {key: value for key, value in row.items() if key not in ("name", "offset")}
        for row in study.space.describe()
    }
    return {"study": {**told, "direction": study.direction}, "space": space, "optimizer": _settings(study.optimizer)}


def _digest(task: Any) -> str:
    """SHA-256 of all data that a task holds."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(to_numpy(task)):
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def identity_of(study: Any, problem: Problem, width: int) -> dict[str, Any]:
    """What makes the trials of a study what they are; a resumed study must have the same."""
    estimator = {"estimator": _estimator_settings(problem.task)} if problem.has_gradient else {}
    seeding = dataclasses.asdict(study.seeding) if study.seeds != 1 else {}
    return {
        **estimator,
        **({"seeds": seeding} if seeding else {}),
        "space": study.space.describe(),
        "optimizer": _settings(study.optimizer),
        "num_trials": study.num_trials,
        "metric": problem.metric,
        "direction": study.direction,
        "key": np.asarray(jax.random.key_data(study.key)).tolist(),
        "num_steps": problem.num_steps,
        "round_steps": problem.round_steps,
        "shard_width": width,
        "task": study.config.get("task"),
        "data": _digest(problem.task),
    }
