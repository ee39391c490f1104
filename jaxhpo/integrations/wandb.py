"""Sweeps of W&B: their YAML as a space, an optimizer and the limits of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxhpo.errors import JaxhpoError
from jaxhpo.integrations.sweep import FACTORY, NUM_LANES, PLAIN, Sweep, fit_name, is_leaf, leaves_of, read_text

_METHODS = {"grid": "GridSearch", "random": "RandomSearch", "bayes": "BayesOpt"}
_READ = {"program", "method", "metric", "parameters", "early_terminate", "run_cap", "name", "description"}
_ENDLESS = 100  # trials of a sweep that W&B would never end
_MOST_OPTIONS = 1000
_SIGMAS = 2.0


class _Unfit(ValueError):
    """A parameter that has no counterpart here."""


def read_sweep(path: str | Path) -> Sweep:
    """A sweep in W&B's YAML (or JSON) format.

    Ranges become ranges: bounds in exponents are exponentiated, and a normal distribution, which a search does not need as a
    prior, becomes the interval of two deviations around its mean, which holds 95 % of it. Values stay values. Quantised
    parameters are integers where they are whole, else floats; in a grid they are a choice of their multiples. Hyperband is
    ASHA, the variant without waiting, as W&B's is.

    Raises:
        JaxhpoError: where there is no sweep in the file, or nothing of it that can be searched.
    """
    path = Path(path)
    config, notes = _parsed(path), []
    method = config.get("method")
    if method not in _METHODS:
        notes.append(f"method: {method!r} is none of {', '.join(_METHODS)}; random search takes its place")
    notes += [f"{name}: has no counterpart" for name in config if name not in _READ]
    space = _space(config["parameters"], (), "grid" if method == "grid" else "search", notes)
    if not any(True for _ in leaves_of(space)):
        raise JaxhpoError("\n".join([f"{path}: nothing may vary in its parameters", *(f"{path}: {note}" for note in notes)]))
    study: dict[str, Any] = {"name": fit_name(path, config.get("name"))}
    study |= _metric(config.get("metric"), notes)
    optimizer = {"name": _METHODS.get(str(method), "RandomSearch"), "num_lanes": NUM_LANES}
    size = None
    if method == "grid":
        size = _fit_grid(space, optimizer, notes)
    study["num_trials"] = _num_trials(config, size, notes)
    optimizer = _stopped_early(config.get("early_terminate"), optimizer, notes)
    tables = {"study": study, "task": {"factory": FACTORY}, "space": space, "optimizer": optimizer}
    program = config.get("program")
    return Sweep(str(path), tables, tuple(notes), None if program is None else str(program))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise JaxhpoError("reading a sweep of W&B needs PyYAML: pip install 'jaxhpo[yaml]'") from None
    try:
        config = _with_numbers(yaml.safe_load(read_text(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise JaxhpoError(f"{path}: {where}not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(config, dict):
        raise JaxhpoError(f"{path}: a sweep of W&B is due, a table with method and parameters")
    if not isinstance(config.get("parameters"), dict) or not config["parameters"]:
        raise JaxhpoError(f"{path}: parameters: missing; a sweep of W&B has a table of them")
    return config


def _with_numbers(node: Any) -> Any:
    """YAML 1.1 reads 1e-4, which lacks a dot, as text; nobody means that."""
    if isinstance(node, dict):
        return {key: _with_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_numbers(value) for value in node]
    return float(node) if isinstance(node, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", node) else node


def _space(parameters: Mapping[Any, Any], path: tuple[str, ...], how: str, notes: list[str]) -> dict[str, Any]:
    """The tables of the parameters that can be carried over."""
    space: dict[str, Any] = {}
    for key, one in parameters.items():
        name, at = str(key), (*path, str(key))
        dotted = ".".join(at)
        if not isinstance(one, Mapping):
            notes.append(f"parameters.{dotted}: left out: a table with values, min and max, or value is due, not {one!r}")
        elif isinstance(one.get("parameters"), Mapping):
            inside = _space(one["parameters"], at, how, notes)
            if inside:
                space[name] = inside
        else:
            try:
                found = _leaf(one, how, dotted, notes)
            except _Unfit as error:
                notes.append(f"parameters.{dotted}: left out: {error}")
                continue
            if name == "type" and not is_leaf(found):
                notes.append(f"parameters.{dotted}: left out: a constant cannot be called type in a config; rename it")
                continue
            space[name] = found
    return space


def _distribution_of(one: Mapping[str, Any]) -> str:
    if "distribution" in one:
        return str(one["distribution"])
    if "values" in one:
        return "categorical"
    if "value" in one:
        return "constant"
    if {"min", "max"} <= set(one):
        return "int_uniform" if _is_whole(one["min"]) and _is_whole(one["max"]) else "uniform"
    if {"mu", "sigma"} & set(one):
        return "normal"
    raise _Unfit("a distribution, values, a value, or min and max are due")


def _leaf(one: Mapping[str, Any], how: str, dotted: str, notes: list[str]) -> Any:
    """A leaf's table, or a constant."""
    kind = _distribution_of(one)
    note = lambda text: notes.append(f"parameters.{dotted}: {text}")
    if kind == "constant":
        if not isinstance(one.get("value"), PLAIN):
            raise _Unfit(f"the constant {one.get('value')!r} cannot stand in a config; build it into the task")
        return one["value"]
    if kind in ("categorical", "categorical_w_probabilities"):
        return _choice(one, note)
    quantised, base = kind.startswith("q_"), kind.removeprefix("q_")
    if base in ("normal", "log_normal"):
        mu, sigma = _number(one, "mu", 0.0), _number(one, "sigma", 1.0)
        if sigma <= 0:
            raise _Unfit(f"sigma must be above 0, not {sigma}")
        low, high, log = mu - _SIGMAS * sigma, mu + _SIGMAS * sigma, base == "log_normal"
        low, high = (_exp(low), _exp(high)) if log else (low, high)
        note(f"the {kind.replace('_', ' ')} distribution became its interval of two deviations, which holds 95 % of it")
    elif base == "beta":
        low, high, log = 0.0, 1.0, False
        note("the beta distribution became its interval, 0 to 1")
    elif base in ("uniform", "int_uniform", "log_uniform", "log_uniform_values", "inv_log_uniform", "inv_log_uniform_values"):
        low, high, log = _number(one, "min"), _number(one, "max"), "log" in base
        if base == "log_uniform":
            low, high = _exp(low), _exp(high)
        elif base == "inv_log_uniform":
            low, high = _exp(-high), _exp(-low)
    else:
        raise _Unfit(f"distribution {kind!r} has no counterpart")
    if low > high or (log and low <= 0):
        raise _Unfit(f"{low} to {high} is no range{' with a logarithm' if log and low <= 0 else ''}")
    if base == "int_uniform":
        return _range("int", round(low), round(high), log)
    return _quantised(one, low, high, log, how, note) if quantised else _range("float", low, high, log)


def _choice(one: Mapping[str, Any], note: Any) -> Any:
    values = one.get("values")
    if not isinstance(values, list) or not values:
        raise _Unfit(f"values must be a list of at least one, not {values!r}")
    odd = [value for value in values if not isinstance(value, PLAIN)]
    if odd:
        raise _Unfit(f"the value {odd[0]!r} cannot stand in a config; use a label, and look it up in the task")
    distinct: list[Any] = []
    for value in values:
        if not any(type(value) is type(other) and value == other for other in distinct):
            distinct.append(value)
    if len(distinct) < len(values):
        note("values that stand there twice became one")
    if one.get("probabilities") is not None:
        note("the probabilities are left out: all values are as likely")
    return {"type": "choice", "options": distinct} if len(distinct) > 1 else distinct[0]


def _quantised(one: Mapping[str, Any], low: float, high: float, log: bool, how: str, note: Any) -> Any:
    """Multiples of q."""
    q = _number(one, "q", 1.0)
    if q <= 0:
        raise _Unfit(f"q must be above 0, not {q}")
    first, last = round(low / q), round(high / q)
    whole = q == int(q)
    count = last - first + 1
    if how == "grid" and count <= _MOST_OPTIONS:
        multiples = [(place * int(q)) if whole else float(f"{place * q:.12g}") for place in range(first, last + 1)]
        return {"type": "choice", "options": multiples} if count > 1 else multiples[0]
    if not whole or (log and first < 1):
        note(f"is a float here, not a multiple of q: round it in the task, round(x / {q:g}) * {q:g}")
        return _range("float", low, high, log)
    if q != 1:
        note(f"is any whole number here, not a multiple of q: round it in the task, round(x / {q:g}) * {q:g}")
    return _range("int", first * int(q), last * int(q), log)


def _range(kind: str, low: float, high: float, log: bool) -> Any:
    if low == high:
        return low
    from jaxhpo.space import Float, Int

    table: dict[str, Any] = {"type": kind, "low": low, "high": high} | ({"log": True} if log else {})
    try:
        (Int(int(low), int(high), log) if kind == "int" else Float(low, high, log))
    except ValueError as error:
        raise _Unfit(str(error)) from None
    return table


def _metric(metric: Any, notes: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"direction": "minimize"}
    if not isinstance(metric, Mapping):
        notes.append("metric: none is given; the loss is minimised")
        return found
    if metric.get("name"):
        found["metric"] = str(metric["name"])
    goal = metric.get("goal", "minimize")
    if goal in ("minimize", "maximize"):
        found["direction"] = goal
    else:
        notes.append(f"metric.goal: {goal!r} is neither minimize nor maximize; minimize is taken")
    if _is_number(metric.get("target")):
        found["target"] = metric["target"]
    notes += [f"metric.{name}: has no counterpart" for name in metric if name not in ("name", "goal", "target")]
    return found


def _fit_grid(space: dict[str, Any], optimizer: dict[str, Any], notes: list[str]) -> int:
    """Takes every integer, as W&B does; the number of points."""
    size, most = 1, 1
    for leaf in leaves_of(space):
        if leaf["type"] == "float":
            size *= 5
        elif leaf["type"] == "int":
            size *= leaf["high"] - leaf["low"] + 1
            most = max(most, leaf["high"] - leaf["low"] + 1)
        else:
            size *= len(leaf["options"])
    if most > 10:
        optimizer["points_per_int"] = most
    if any(leaf["type"] == "float" for leaf in leaves_of(space)):
        notes.append("method: W&B's grid has no end over floats; here it takes 5 values of each (optimizer.points_per_float)")
    return size


def _num_trials(config: Mapping[str, Any], size: int | None, notes: list[str]) -> int:
    cap = config.get("run_cap")
    if cap is not None and not (_is_whole(cap) and cap >= 1):
        notes.append(f"run_cap: must be a whole number of at least 1, not {cap!r}")
        cap = None
    if size is not None:
        return min(size, cap or size, 2**30 - 1)
    if cap is None:
        notes.append(f"run_cap: not given, so that the sweep would never end; {_ENDLESS} trials are a guess")
    return cap or _ENDLESS


def _stopped_early(rule: Any, optimizer: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """The optimizer within ASHA where the sweep stops runs early."""
    if rule is None:
        return optimizer
    if not isinstance(rule, Mapping) or rule.get("type") != "hyperband":
        notes.append("early_terminate: left out: only the type hyperband is known")
        return optimizer
    eta, min_iter, max_iter, brackets = (rule.get(name) for name in ("eta", "min_iter", "max_iter", "s"))
    wrapped: dict[str, Any] = {"name": "ASHA"}
    reduction = float(eta) if _is_number(eta) else 3.0
    if reduction < 1.1:
        notes.append(f"early_terminate.eta: must be at least 1.1, not {eta!r}; 3 is taken")
        reduction = 3.0
    wrapped["reduction"] = reduction
    if _is_whole(min_iter) and min_iter >= 1:
        wrapped["grace"] = min_iter
        notes.append("early_terminate.min_iter: counts logged values in W&B; optimizer.grace counts training steps")
    elif _is_whole(max_iter) and max_iter >= 1:
        wrapped["num_rungs"] = brackets if _is_whole(brackets) and brackets >= 1 else 3
        notes.append("early_terminate.max_iter: rungs are parts of the whole training here, however many steps it has")
    else:
        notes.append("early_terminate: neither min_iter nor max_iter is given; rungs at a third, a ninth, ... are taken")
    notes.append("early_terminate: needs a factory that returns a Training, which can be stopped on its way")
    return wrapped | {"inner": optimizer}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(one: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = one.get(name, default)
    if not _is_number(value):
        raise _Unfit(f"{name} must be a number, not {value!r}" if value is not None else f"{name} is missing")
    return float(value)


def _exp(x: float) -> float:
    try:
        return float(f"{math.exp(x):.12g}")
    except OverflowError:
        raise _Unfit(
            f"exp({x:g}) is no number; log_uniform takes exponents, log_uniform_values the values themselves"
        ) from None
