"""Parcels as pieces of at most 1 MiB, and back: whole and valid, or not at all.

A message's head holds its name, its kind, its header and the forms of its arrays; the arrays' bytes follow in their
order. A piece carries a checksum; a message that does not fit its head, or a piece out of order, is `Damaged`: the
stream is given up and the request asked again.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from google.protobuf.message import DecodeError

from fedsample.errors import FedSampleError
from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.wire import Array, Field, Parcel

PIECE = 1 << 20  # bytes of data in a piece
HEAD = 1 << 21  # bytes of a head, at most
SMALL = 1 << 16  # below this, arrays are copied out of the message; above, they are views of it


class Damaged(FedSampleError):
    """A message that arrived in another shape than it was sent."""


class Name(NamedTuple):
    """Which request, or the answer to which.

    Attributes:
        run: 16 bytes. term: rises when the run goes back or forks. round: 0 while the run is prepared. client: index.
        digest: 16 bytes that stand for the request's content. sequence: rises from request to request within a term.
    """

    run: bytes
    term: int
    round: int
    client: int
    digest: bytes
    sequence: int


class Message(NamedTuple):
    """A parcel with its name, ready to travel or whole on arrival."""

    name: Name
    kind: str
    parcel: Parcel

    @property
    def size(self) -> int:
        """Bytes of the arrays."""
        return sum(len(each.data) for each in self.parcel.arrays.values())


class Digests:
    """Digests of requests; the checksums of arrays that many requests share are computed once."""

    def __init__(self) -> None:
        """Nothing known."""
        self._known: dict[int, tuple[Array, int]] = {}  # the array itself is kept, or its id might be used again

    def of(self, kind: str, parcel: Parcel) -> bytes:
        """16 bytes that name a request by its content."""
        found = hashlib.blake2b(_head(None, kind, parcel).SerializeToString(deterministic=True), digest_size=16)
        for array in parcel.arrays.values():
            kept = self._known.get(id(array.data))
            if kept is None:
                kept = self._known[id(array.data)] = array, zlib.crc32(array.data)
            found.update(kept[1].to_bytes(4, "little"))
        return found.digest()


def _head(name: Name | None, kind: str, parcel: Parcel) -> pb.Head:
    head = pb.Head(kind=kind)
    if name is not None:
        for field, part in name._asdict().items():
            setattr(head.name, field, part)
    for key, value in parcel.header.items():
        _put(head.header.add(name=key), value)
    for key, array in parcel.arrays.items():
        head.arrays.add(name=key, dtype=array.dtype, shape=array.shape, stype=array.stype, size=len(array.data))
    return head


def _put(field: pb.Field, value: Field) -> None:
    """Write a value; a truth value is an integer too, so it is asked for first."""
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


def _value(field: pb.Field) -> Field:
    which = field.WhichOneof("value")
    if which is None:
        raise Damaged(f"field {field.name!r} of a header has no value that this version knows")
    value = getattr(field, which)
    return list(value.values) if which in ("flags", "integers", "numbers", "texts") else value


def pieces(message: Message) -> Iterator[pb.Piece]:
    """The message in parts, the first with the head."""
    head = _head(*message).SerializeToString()
    arrays = [memoryview(each.data) for each in message.parcel.arrays.values()]
    if message.size <= PIECE:
        yield _piece(head, 0, b"".join(arrays))
        return
    offset = 0
    for part in _cut(arrays):
        yield _piece(head, offset, part)
        head = b""
        offset += len(part)


def _piece(head: bytes, offset: int, data: bytes) -> pb.Piece:
    return pb.Piece(head=head, offset=offset, data=data, crc=zlib.crc32(data, zlib.crc32(head)))


def _cut(arrays: list[memoryview]) -> Iterator[bytes]:
    """The bytes of all arrays, in parts of `PIECE` bytes; the last may be shorter."""
    held, size = [], 0
    for array in arrays:
        at = 0
        while at < len(array):
            part = array[at : at + PIECE - size]
            held.append(part)
            at += len(part)
            size += len(part)
            if size == PIECE:
                yield b"".join(held)
                held, size = [], 0
    if held:
        yield b"".join(held)


class Assembler:
    """Puts one message at a time together.

    Args:
        limit: bytes of arrays that a message may have; checked before anything is stored.
    """

    def __init__(self, limit: int) -> None:
        """Nothing has arrived."""
        self.limit = limit
        self._head: pb.Head | None = None
        self._data = bytearray()
        self._have = self._size = 0

    @property
    def expected(self) -> tuple[pb.Head, int] | None:
        """The head and the size in bytes of the message that is on its way."""
        return None if self._head is None else (self._head, self._size)

    def begin(self, piece: pb.Piece) -> int:
        """Look at the first piece of a message -> the size in bytes of its arrays.

        Raises:
            Damaged: if it is no valid first piece, or the message is larger than allowed.
        """
        if self._head is not None or piece.offset or not piece.head or len(piece.head) > HEAD:
            raise Damaged("a message began before the last one was whole, or without a head")
        self._check(piece)
        try:
            head = pb.Head.FromString(piece.head)
        except DecodeError as error:
            raise Damaged(f"the head of a message cannot be read: {error}") from None
        size: int = sum(array.size for array in head.arrays)
        if size > self.limit:
            raise Damaged(f"a message of {size} bytes, expected at most {self.limit}: it belongs to another run")
        self._head, self._size, self._have, self._data = head, size, 0, bytearray()
        return size

    def add(self, piece: pb.Piece) -> Message | None:
        """One more piece, the first one after `begin` -> the message when it is whole.

        Raises:
            Damaged: if it is not the next one.
        """
        head = self._head
        if head is None or piece.offset != self._have:
            raise Damaged(f"a piece at byte {piece.offset}, expected {self._have}: a piece is missing or came twice")
        if self._have:
            self._check(piece)
        data = piece.data
        if self._have + len(data) > self._size or (not data and self._size > self._have):
            raise Damaged(f"{self._have + len(data)} bytes of a message of {self._size}")
        if len(data) == self._size:
            whole: bytes | bytearray = data
        else:
            if not self._data:
                self._data = bytearray(self._size)
            self._data[self._have : self._have + len(data)] = data
            whole = self._data
        self._have += len(data)
        if self._have < self._size:
            return None
        self._head, self._data = None, bytearray()
        return _whole(head, whole)

    def _check(self, piece: pb.Piece) -> None:
        if zlib.crc32(piece.data, zlib.crc32(piece.head)) != piece.crc:
            raise Damaged("the checksum of a piece does not match")


def _whole(head: pb.Head, data: bytes | bytearray) -> Message:
    name = Name(*(getattr(head.name, field) for field in Name._fields))
    view, arrays, at = memoryview(data), {}, 0
    for each in head.arrays:
        part = view[at : at + each.size]
        content = bytes(part) if len(part) <= SMALL else part
        arrays[each.name] = Array(each.dtype, tuple(each.shape), each.stype, content)  # type: ignore[arg-type]
        at += each.size
    header: Mapping[str, Field] = {field.name: _value(field) for field in head.header}
    return Message(name, head.kind, Parcel(header, arrays))
