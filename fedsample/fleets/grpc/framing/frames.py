"""Split parcels into pieces of at most 1 MiB and join them again: whole and valid, or not at all.

A message's head holds its name, its kind, its header and the forms of its arrays; the arrays' bytes follow in order.
A piece carries a checksum; a message that does not fit its head, or a piece out of order, raises `Damaged`: the stream
is closed and the request asked again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
from zlib_ng.zlib_ng import crc32

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.headers import Damaged as Damaged
from fedsample.fleets.grpc.framing.headers import Head, read_head, write_content, write_name
from fedsample.fleets.grpc.framing.headers import Name as Name
from fedsample.fleets.grpc.framing.zero_copy import Data, Piece, checksum, write
from fedsample.protocol.wire import Array, Parcel

PIECE = 1 << 20  # bytes of data per piece
HEAD = 1 << 21  # largest head in bytes
SMALL = 1 << 16  # bytes from which arrays are views of the message; smaller ones are copied


class Message(NamedTuple):
    """A parcel with its name, ready to be sent or received whole.

    Attributes:
        sealed: the part shared with other messages of the same content; None: nothing is shared.
    """

    name: Name
    kind: str
    parcel: Parcel
    sealed: Sealed | None = None

    @property
    def size(self) -> int:
        """Bytes of the arrays."""
        return sum(len(each.data) for each in self.parcel.arrays.values())


class Sealed:
    """The content of messages, serialised once for all names.

    Args:
        kind: the type of message.
        parcel: its content.
        digests: caches the arrays' checksums; None: no digest is needed.
    """

    def __init__(self, kind: str, parcel: Parcel, digests: Digests | None = None) -> None:
        self.parcel = parcel  # keeps the arrays alive: `Digests` knows them by id
        self._digests = digests
        self._head = write_content(kind, parcel)
        self._arrays: list[Data] = [each.data for each in parcel.arrays.values()]
        self._size = sum(map(len, self._arrays))
        self._later: dict[int, int] = {}  # checksums of the pieces after the first, by their offsets

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identify the content."""
        found = hashlib.blake2b(self._head, digest_size=16)
        for array in self.parcel.arrays.values():
            checksum = crc32(array.data) if self._digests is None else self._digests.checksum(array)
            found.update(checksum.to_bytes(4, "little"))
        return found.digest()

    def frames(self, name: Name) -> Iterator[bytes]:
        """Yield the message with this name, in pieces."""
        head = write_name(name) + self._head
        first = self._arrays if self._size <= PIECE else self._cut(0)
        yield write(head, 0, first, checksum(head, first))
        for offset in range(PIECE, self._size, PIECE):
            parts = self._cut(offset)
            if offset not in self._later:
                self._later[offset] = checksum(b"", parts)
            yield write(b"", offset, parts, self._later[offset])

    def _cut(self, offset: int) -> list[Data]:
        """Cut `PIECE` bytes of the arrays from an offset; the last piece may be shorter."""
        parts: list[Data] = []
        start, end = offset, offset + PIECE
        for array in self._arrays:
            if start < len(array) and end > 0:
                parts.append(memoryview(array)[max(0, start) : end])
            start, end = start - len(array), end - len(array)
        return parts


class Digests:
    """Digests of contents; checksums of arrays that many requests share are computed once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Array, int]] = {}  # the array is kept alive, or its id might be reused
        self._sealed: dict[tuple[str, int], Sealed] = {}

    def sealed(self, kind: str, parcel: Parcel) -> Sealed:
        """Serialise a content."""
        name = kind, id(parcel)
        if name not in self._sealed:
            self._sealed[name] = Sealed(kind, parcel, self)
        return self._sealed[name]

    def of(self, kind: str, parcel: Parcel) -> bytes:
        """Identify a request by 16 bytes of digest of its content."""
        return self.sealed(kind, parcel).digest

    def checksum(self, array: Array) -> int:
        """CRC-32 of an array's bytes."""
        kept = self._known.get(id(array.data))
        if kept is None:
            kept = self._known[id(array.data)] = array, crc32(array.data)
        return kept[1]


def frames(message: Message) -> Iterator[bytes]:
    """Yield the message in frames, in either direction, the first with the head."""
    return (message.sealed or Sealed(message.kind, message.parcel)).frames(message.name)


def pieces(message: Message) -> Iterator[pb.Piece]:
    """Yield the same pieces as messages of the generated code."""
    return (pb.ServerFrame.FromString(frame).piece for frame in frames(message))


class Assembler:
    """Joins the pieces of one message at a time.

    Args:
        limit: largest size of a message's arrays in bytes; checked before anything is stored.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._head: Head | None = None
        self._data = memoryview(b"")
        self._have = self._size = 0

    @property
    def expected(self) -> tuple[Head, int] | None:
        """The head, and the size in bytes, of the message being received; None: none is."""
        return None if self._head is None else (self._head, self._size)

    def begin(self, piece: Piece | pb.Piece) -> int:
        """Read the first piece of a message -> the size of its arrays in bytes.

        Raises:
            Damaged: if it is no valid first piece, or the message is larger than allowed.
        """
        if self._head is not None or piece.offset or not piece.head or len(piece.head) > HEAD:
            raise Damaged("a message began before the last one was whole, or without a head")
        self._check(piece)
        head = read_head(piece.head)
        size = sum([array.size for array in head.arrays])
        if size > self.limit:
            raise Damaged(f"a message of {size} bytes, expected at most {self.limit}: it belongs to another run")
        self._head, self._size, self._have, self._data = head, size, 0, memoryview(b"")
        return size

    def add(self, piece: Piece | pb.Piece) -> Message | None:
        """Add a piece, the first one after `begin` too -> the message when it is whole.

        Raises:
            Damaged: if it is not the next one.
        """
        head = self._head
        if head is None or piece.offset != self._have:
            raise Damaged(f"a piece at byte {piece.offset}, expected {self._have}: a piece is missing or came twice")
        if self._have:
            self._check(piece)
        data: Data = piece.data
        if self._have + len(data) > self._size or (not data and self._size > self._have):
            raise Damaged(f"{self._have + len(data)} bytes of a message of {self._size}")
        if len(data) == self._size:
            whole = data
        else:
            if not self._data:
                self._data = memoryview(np.empty(self._size, dtype=np.uint8))  # type: ignore[arg-type]
            self._data[self._have : self._have + len(data)] = data
            whole = self._data
        self._have += len(data)
        if self._have < self._size:
            return None
        self._head, self._data = None, memoryview(b"")
        return _whole(head, whole)

    def _check(self, piece: Piece | pb.Piece) -> None:
        if crc32(piece.data, crc32(piece.head)) != piece.crc:
            raise Damaged("the checksum of a piece does not match")


def _whole(head: Head, data: Data) -> Message:
    view, arrays, at = memoryview(data), {}, 0
    for name, dtype, shape, stype, size in head.arrays:
        part = view[at : at + size]
        content = bytes(part) if size <= SMALL else part
        arrays[name] = Array(dtype, shape, stype, content)  # type: ignore[arg-type]
        at += size
    return Message(head.name, head.kind, Parcel(head.header, arrays))
