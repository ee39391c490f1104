"""What the gauges of hypergradients say in words: which of them are not to be trusted, and what to do. No JAX here.

Estimators report gauges among the metrics of a trial, under names that begin with ``gauge/``:

    gauge/gradient         norm of the gradient by the cube
    gauge/growth           decades by which the adjoint or the tangent grows on its way through the training
    gauge/adjoint@STEP     log10 of the norm of the weights' adjoint (``Unrolled``, ``Truncated``)
    gauge/tangent@STEP     log10 of the norm of the weights' tangents (``Forward``)
    gauge/residual         relative residual of the linear system (``Implicit``)
    gauge/standard_error   of the estimate, relative to its norm (``Evolution``)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PREFIX = "gauge/"
GRADIENT, GROWTH, RESIDUAL, STANDARD_ERROR = (PREFIX + name for name in ("gradient", "growth", "residual", "standard_error"))

CHAOTIC = 4.0
"""Decades of growth from which on the training is chaotic and its hypergradient noise; single precision has seven."""

_SHARE = 0.05  # of the trials, from which on a finding is worth a word


def is_gauge(name: str) -> bool:
    return name.startswith(PREFIX)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def findings(trials: Iterable[tuple[Any, Mapping[str, Any]]]) -> list[str]:
    """One line for everything that the gauges of a study give reason to doubt.

    Args:
        trials: the loss, and the metrics by name, of each trial; None stands for NaN.
    """
    rows = [(_number(loss), metrics) for loss, metrics in trials if GRADIENT in metrics]
    finite = [metrics for loss, metrics in rows if math.isfinite(loss)]
    if not finite:
        return []
    found = []
    of = f"of {len(finite)} trials with a finite loss"
    chaotic = [m for m in finite if _is_chaotic(m)]
    broken = [m for m in finite if not math.isfinite(_number(m[GRADIENT])) and not _is_chaotic(m)]
    if len(chaotic) > _SHARE * len(finite):
        found.append(
            f"hypergradients: {len(chaotic)} {of} are chaotic (the adjoint grows by more than {CHAOTIC:g} decades): their "
            "gradients are noise. Lower the upper bounds of learning rates, or train fewer steps; where a smoothed landscape "
            "will do, use jaxhpo.hypergradients.Evolution"
        )
    if len(broken) > _SHARE * len(finite):
        found.append(
            f"hypergradients: {len(broken)} {of} have a gradient that is not finite. A square root at zero makes it so where a "
            "weight has had no gradient yet: Adam and its kin need eps_root=1e-16 (optax.radam has no cure)"
        )
    residuals = [_number(m[RESIDUAL]) for m in finite if RESIDUAL in m]
    if residuals and _median(residuals) > 0.1:
        found.append(
            f"Implicit: the median relative residual is {_median(residuals):.2g}: train until it has "
            "converged, raise damping, or take more iterations (they stop at negative curvature)"
        )
    errors = [_number(m[STANDARD_ERROR]) for m in finite if STANDARD_ERROR in m]
    if errors and _median(errors) > 1:
        found.append(
            f"Evolution: the median standard error is {_median(errors):.2g} of the gradient: raise num_pairs, or sigma"
        )
    return found


def _is_chaotic(metrics: Mapping[str, Any]) -> bool:
    """Whether the adjoint, or the tangent, grew beyond bounds; one that was never finite is broken instead."""
    if GROWTH not in metrics:
        return False
    growth = _number(metrics[GROWTH])
    if math.isfinite(growth):
        return growth > CHAOTIC
    readings = {int(name.partition("@")[2]): (name, value) for name, value in metrics.items() if is_gauge(name) and "@" in name}
    if not readings:
        return False
    backwards = any("adjoint@" in name for name, _ in readings.values())
    return math.isfinite(_number(readings[(max if backwards else min)(readings)][1]))


def _median(values: Sequence[float]) -> float:
    ordered = sorted(math.inf if math.isnan(x) else x for x in values)
    return ordered[len(ordered) // 2]


def profile(trials: Iterable[Mapping[str, Any]]) -> tuple[str, list[tuple[int, list[float]]]]:
    """``adjoint`` or ``tangent``, and its log10 norms over the trials by step; empty where there are none."""
    by_step: dict[int, list[float]] = {}
    kind = "adjoint"
    for metrics in trials:
        for name, value in metrics.items():
            if is_gauge(name) and "@" in name and value is not None and math.isfinite(value):
                kind, _, step = name.removeprefix(PREFIX).partition("@")
                by_step.setdefault(int(step), []).append(float(value))
    return kind, sorted(by_step.items())
