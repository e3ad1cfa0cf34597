"""Settings as nested tables, before validation: convert, merge and flatten them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

TABLES = {"step_size"}  # settings whose value may be a table but count as one setting


def plain(value: Any) -> Any:
    """Copy in TOML's types: sections to dicts, tuples to lists, paths to text, numpy scalars to numbers."""
    if isinstance(value, BaseModel):
        return plain({name: getattr(value, name) for name in value.model_fields_set})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Override `base` by `top`, table by table."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return merged


def flatten(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every leaf, in order."""
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{path}{key}" not in TABLES:
            yield from flatten(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def nest(path: str, value: Any) -> dict[str, Any]:
    """{"uplink": {"k": value}} for "uplink.k"."""
    first, _, rest = path.partition(".")
    return {first: nest(rest, value) if rest else value}


def same(one: Any, other: Any) -> bool:
    """Whether two values mean the same setting: 1 (one of them) and 1.0 (all of them) do not."""
    return bool(one == other) and type(one) is type(other)
