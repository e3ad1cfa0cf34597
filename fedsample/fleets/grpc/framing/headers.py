"""Heads of messages: name, kind, header and the forms of arrays, to bytes and back.

From round to round little of a head changes. So its fields are written and read one by one by the generated code, and
short ones are cached; their concatenation is written by hand.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import NamedTuple

from google.protobuf.message import DecodeError

from fedsample.errors import FedSampleError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.zero_copy import cut, varint
from fedsample.protocol.wire import Field, Parcel

_SHORT = 96  # longest field that is cached, in bytes
_NAME, _KIND, _HEADER, _ARRAY = (number << 3 | 2 for number in (1, 2, 3, 4))
_NAME_TAG, _KIND_TAG, _HEADER_TAG, _ARRAY_TAG = (bytes((tag,)) for tag in (_NAME, _KIND, _HEADER, _ARRAY))
_LISTS = ("flags", "integers", "numbers", "texts")


class Damaged(FedSampleError):
    """A message that did not arrive as it was sent."""


class Name(NamedTuple):
    """Identifies a request, and the answer to it.

    Attributes:
        run: the run's id, 16 bytes.
        term: increases when the run goes back or forks.
        round: 0 while the run is prepared.
        client: the client's index.
        digest: 16 bytes that identify the request's content.
        sequence: increases from request to request within a term.
    """

    run: bytes
    term: int
    round: int
    client: int
    digest: bytes
    sequence: int


class Form(NamedTuple):
    """The declared form of an array; its bytes follow the head."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stype: str
    size: int


class Head(NamedTuple):
    """A head, as read."""

    name: Name
    kind: str
    header: dict[str, Field]
    arrays: list[Form]


# --- writing ----------------------------------------------------------------------------------------------------------


def write_content(kind: str, parcel: Parcel) -> bytes:
    """Serialise a head without its name, which may be put before it."""
    parts = [_part(_KIND_TAG, kind.encode())]
    for key, value in parcel.header.items():
        # True, 1 and 1.0 are equal and 0.0 is -0.0, so the cache key includes the type, and floats are not cached.
        plain = isinstance(value, bool | int) or (isinstance(value, str) and len(value) <= _SHORT)
        parts.append(_kept_field(key, type(value), value) if plain else _field(key, value))  # type: ignore[arg-type]
    for key, array in parcel.arrays.items():
        parts.append(_form(key, array.dtype, tuple(array.shape), array.stype, len(array.data)))
    return b"".join(parts)


def write_name(name: Name) -> bytes:
    """Serialise a name, to be put before the rest of a head."""
    run, term, round, client, digest, sequence = name
    written = pb.Name(run=run, term=term, round=round, client=client, digest=digest, sequence=sequence)
    return _part(_NAME_TAG, written.SerializeToString())


def _part(tag: bytes, octets: bytes) -> bytes:
    return b"".join((tag, varint(len(octets)), octets))


@lru_cache(maxsize=1024)
def _kept_field(key: str, kind: type, value: bool | int | str) -> bytes:
    return _field(key, value)


def _field(key: str, value: Field) -> bytes:
    """Serialise a value; bool is tested first, because it is an int too."""
    field = pb.Field(name=key)
    if isinstance(value, bool):
        field.flag = value
    elif isinstance(value, int):
        field.integer = value
    elif isinstance(value, float):
        field.number = value
    elif isinstance(value, str):
        field.text = value
    elif isinstance(value, bytes):
        field.octets = value
    else:
        first = value[0] if value else ""
        if isinstance(first, bool):
            field.flags.values.extend(value)
        elif isinstance(first, int):
            field.integers.values.extend(value)
        elif isinstance(first, float):
            field.numbers.values.extend(value)
        else:
            field.texts.values.extend(value)
            field.texts.SetInParent()
    return _part(_HEADER_TAG, field.SerializeToString())


@lru_cache(maxsize=256)
def _form(key: str, dtype: str, shape: tuple[int, ...], stype: str, size: int) -> bytes:
    array = pb.Array(name=key, dtype=dtype, shape=shape, stype=stype, size=size)
    return _part(_ARRAY_TAG, array.SerializeToString())


# --- reading ----------------------------------------------------------------------------------------------------------


def read_head(octets: bytes) -> Head:
    """Read a head from its bytes.

    Raises:
        Damaged: if it is no head, or a field has no value that this version knows.
    """
    try:
        parts = cut(octets)
        if parts is None:  # written differently, or by a later version
            head = pb.Head.FromString(octets)
            named, kind = head.name, head.kind
            header = dict(map(_valued, head.header))
            arrays = list(map(_formed, head.arrays))
        else:
            named, kind, header, arrays = pb.Name(), "", {}, []
            for tag, part in parts:
                if tag == _HEADER:
                    key, value = (_kept_value if len(part) <= _SHORT else _value)(part)
                    header[key] = copy(value) if isinstance(value, list) else value  # the receiver may change lists
                elif tag == _ARRAY:
                    arrays.append((_kept_array if len(part) <= _SHORT else _array)(part))
                elif tag == _NAME:
                    named = pb.Name.FromString(part)
                elif tag == _KIND:
                    kind = part.decode()
    except (DecodeError, UnicodeDecodeError) as error:
        raise Damaged(f"the head of a message cannot be read: {error}") from None
    name = Name(named.run, named.term, named.round, named.client, named.digest, named.sequence)
    return Head(name, kind, header, arrays)


def _value(octets: bytes) -> tuple[str, Field]:
    return _valued(pb.Field.FromString(octets))


_kept_value = lru_cache(maxsize=1024)(_value)


def _valued(field: pb.Field) -> tuple[str, Field]:
    which = field.WhichOneof("value")
    if which is None:
        raise Damaged(f"field {field.name!r} of a header has no value that this version knows")
    value = getattr(field, which)
    return field.name, list(value.values) if which in _LISTS else value


def _array(octets: bytes) -> Form:
    return _formed(pb.Array.FromString(octets))


_kept_array = lru_cache(maxsize=256)(_array)


def _formed(array: pb.Array) -> Form:
    return Form(array.name, array.dtype, tuple(array.shape), array.stype, array.size)
