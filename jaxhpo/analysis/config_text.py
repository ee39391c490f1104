"""A resolved config as TOML, so that a report says all that a rerun needs."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def _key(name: Any) -> str:
    return str(name) if _BARE.fullmatch(str(name)) else json.dumps(str(name), ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
        text = repr(value)
        return text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_scalar(element) for element in value if element is not None) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {_scalar(v)}" for k, v in value.items() if v is not None) + "}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def to_toml(config: dict[str, Any], prefix: str = "") -> str:
    """TOML that reads back as ``config``; None, which TOML lacks, is left out."""
    lines = [f"{_key(k)} = {_scalar(v)}" for k, v in config.items() if v is not None and not isinstance(v, dict)]
    parts = ["\n".join(lines)] if lines else []
    for name, table in config.items():
        if isinstance(table, dict):
            path = f"{prefix}{_key(name)}"
            inside = to_toml(table, path + ".")
            own = not table or any(not isinstance(v, dict) for v in table.values())
            parts.append((f"[{path}]\n" if own else "") + inside)
    return "\n\n".join(part.rstrip("\n") for part in parts if part)
