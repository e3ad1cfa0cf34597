"""What a server and its devices say to each other, read from the bytes of their frames.

Field numbers are those of docs/devices/protocol.md, which are frozen: no class of fedsample is needed to read them. A
field that is not known here is kept under its number, so nothing that travels is left out of a comparison but what
`ignored.FRAMES` and `ignored.CLOCKED_FRAMES` list.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from comparator import ignored

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Known(NamedTuple):
    """What is known of a message: names of fields by number, and which of them are messages themselves."""

    fields: Mapping[int, str]
    inner: Mapping[str, str] = MappingProxyType({})


_MESSAGES = {
    "up": Known({1: "hello", 2: "ready", 3: "piece", 4: "failure", 5: "pong"}),
    "down": Known({1: "welcome", 2: "refusal", 3: "piece", 4: "ping", 5: "farewell"}),
    "hello": Known({1: "protocol", 2: "software", 3: "instance", 4: "client"}),
    "welcome": Known({1: "protocol", 2: "software", 3: "run", 4: "nonce", 5: "config", 6: "client", 7: "clients"}),
    "ready": Known({1: "run", 2: "term", 3: "live", 4: "snapshots", 5: "schema"}),
    "refusal": Known({1: "reason", 2: "retry"}),
    "farewell": Known({1: "reason", 2: "finished"}),
    "failure": Known({1: "digest", 2: "stage", 3: "detail", 4: "round"}),
    "piece": Known({1: "head", 2: "offset", 3: "data", 4: "crc"}, {"head": "head"}),
    "head": Known(
        {1: "name", 2: "kind", 3: "header", 4: "arrays"}, {"name": "name", "header": "field", "arrays": "array"}
    ),
    "name": Known({1: "run", 2: "term", 3: "round", 4: "client", 5: "digest", 6: "sequence"}),
    "array": Known({1: "name", 2: "dtype", 3: "shape", 4: "stype", 5: "size"}),
    "field": Known({1: "name"}),
}


def read_frame(raw: bytes, *, up: bool) -> dict[str, Any] | None:
    """The fields of one frame that must be the same, by dotted names; None: a frame that a clock sends.

    Args:
        raw: the frame as it was on the stream.
        up: whether it comes from a device.
    """
    (number, content), *_ = _fields(raw)
    kind = _MESSAGES["up" if up else "down"].fields.get(number, f"frame{number}")
    if kind in ignored.CLOCKED_FRAMES:
        return None
    read: dict[str, Any] = {}
    _read(kind, content if isinstance(content, bytes) else b"", "", read)
    if any(name.startswith("head.") for name in read):
        read.pop("crc", None)  # of the head's bytes too, in which the run's name is
    what = " ".join(str(read[name]) for name in ("head.kind", "head.name.round") if name in read)
    return {"title": f"{'up' if up else 'down'} {kind} {what}".strip(), **read}


def _read(kind: str, raw: bytes, path: str, into: dict[str, Any]) -> None:
    known = _MESSAGES.get(kind, Known({}, {}))
    fields = list(_fields(raw))
    field_name = next((_plain(value) for number, value in fields if number == 1), "") if kind == "field" else ""
    for number, value in fields:
        name = known.fields.get(number, str(number))
        if (kind, name) in ignored.FRAMES or (kind, field_name) in ignored.FRAMES:
            continue
        where = f"{path}{name}"
        while where in into or f"{where}." in into:  # repeated
            where += "'"
        if name in known.inner and isinstance(value, bytes):
            into[f"{where}."] = ""
            _read(known.inner[name], value, f"{where}.", into)
        else:
            into[where] = _plain(value)


def _plain(value: int | bytes) -> Any:
    """A value that JSON can hold: text where the bytes are some."""
    if isinstance(value, int):
        return value
    try:
        text = value.decode("ascii")
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text else {"base64": base64.b64encode(value).decode()}


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field numbers and values in the order in which they stand; fixed numbers as bytes."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(raw, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire} in a frame of {len(raw)} bytes")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
