"""Messages as they were written down on the way, and the first byte in which two lists of them differ."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparator.findings import Finding, broken, difference

Fields = Mapping[str, Any]  # plain values by name; bytes as {"base64": text}


def read_messages(file: Path) -> list[Fields]:
    """Messages of a file, one per line; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def compare_messages(old: Sequence[Fields], new: Sequence[Fields]) -> list[Finding]:
    """All fields of all messages, in the order of sending; none at all is an error, never a success."""
    if not old or not new:
        return [
            broken(f"messages: {len(old)} written down in the old run, {len(new)} in the new one: nothing compared")
        ]
    for at, (one, other) in enumerate(zip(old, new, strict=False)):
        for name in [*one, *(name for name in other if name not in one)]:
            if name not in one or name not in other:
                where = "new" if name not in one else "old"
                return [difference(f"messages: number {at} ({_title(one)}) has {name} in the {where} run only")]
            if one[name] != other[name]:
                return [difference(f"messages: number {at} ({_title(one)}), {name}: {_both(one[name], other[name])}")]
    if len(old) != len(new):
        return [difference(f"messages: {len(old)} -> {len(new)}, of which the first {min(len(old), len(new))} agree")]
    return []


def _title(message: Fields) -> str:
    return str(message.get("title", "?"))


def _both(one: Any, other: Any) -> str:
    here, there = (_bytes(each) for each in (one, other))
    if here is None or there is None:
        return f"{one!r} -> {other!r}"
    if len(here) != len(there):
        return f"{len(here)} -> {len(there)} bytes"
    at = next(i for i, (a, b) in enumerate(zip(here, there, strict=True)) if a != b)
    return f"byte {at} of {len(here)}: 0x{here[at]:02x} -> 0x{there[at]:02x}"


def _bytes(value: Any) -> bytes | None:
    return base64.b64decode(value["base64"]) if isinstance(value, dict) and set(value) == {"base64"} else None
