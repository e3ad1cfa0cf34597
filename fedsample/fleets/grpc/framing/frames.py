"""Parcels as pieces of at most 1 MiB, and back: whole and valid, or not at all.

A message's head holds its name, its kind, its header and the forms of its arrays; the arrays' bytes follow in their
order. A piece carries a checksum; a message that does not fit its head, or a piece out of order, is `Damaged`: the
stream is given up and the request asked again.
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

PIECE = 1 << 20  # bytes of data in a piece
HEAD = 1 << 21  # bytes of a head, at most
SMALL = 1 << 16  # below this, arrays are copied out of the message; above, they are views of it


class Message(NamedTuple):
    """A parcel with its name, ready to travel or whole on arrival.

    Attributes:
        sealed: what it shares with other messages of the same content; None: nothing.
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
    """The content of messages, ready to travel: what does not depend on their names is made once for all of them.

    Args:
        kind, parcel: the content.
        digests: where the arrays' checksums are kept; None: no digest is wanted.
    """

    def __init__(self, kind: str, parcel: Parcel, digests: Digests | None = None) -> None:
        """Make the head, but for the name."""
        self.parcel = parcel  # kept: `Digests` knows it by its id
        self._digests = digests
        self._head = write_content(kind, parcel)
        self._arrays: list[Data] = [each.data for each in parcel.arrays.values()]
        self._size = sum(map(len, self._arrays))
        self._later: dict[int, int] = {}  # checksums of the pieces after the first, by their offsets

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that stand for the content."""
        found = hashlib.blake2b(self._head, digest_size=16)
        for array in self.parcel.arrays.values():
            checksum = crc32(array.data) if self._digests is None else self._digests.checksum(array)
            found.update(checksum.to_bytes(4, "little"))
        return found.digest()

    def frames(self, name: Name) -> Iterator[bytes]:
        """The message of this name, in pieces."""
        head = write_name(name) + self._head
        first = self._arrays if self._size <= PIECE else self._cut(0)
        yield write(head, 0, first, checksum(head, first))
        for offset in range(PIECE, self._size, PIECE):
            parts = self._cut(offset)
            if offset not in self._later:
                self._later[offset] = checksum(b"", parts)
            yield write(b"", offset, parts, self._later[offset])

    def _cut(self, offset: int) -> list[Data]:
        """`PIECE` bytes of the arrays from an offset; the last may be fewer."""
        parts: list[Data] = []
        start, end = offset, offset + PIECE
        for array in self._arrays:
            if start < len(array) and end > 0:
                parts.append(memoryview(array)[max(0, start) : end])
            start, end = start - len(array), end - len(array)
        return parts


class Digests:
    """Contents of requests; what many requests share is computed once."""

    def __init__(self) -> None:
        """Nothing known."""
        self._known: dict[int, tuple[Array, int]] = {}  # the array itself is kept, or its id might be used again
        self._sealed: dict[tuple[str, int], Sealed] = {}

    def sealed(self, kind: str, parcel: Parcel) -> Sealed:
        """A content, ready to travel."""
        name = kind, id(parcel)
        if name not in self._sealed:
            self._sealed[name] = Sealed(kind, parcel, self)
        return self._sealed[name]

    def of(self, kind: str, parcel: Parcel) -> bytes:
        """16 bytes that name a request by its content."""
        return self.sealed(kind, parcel).digest

    def checksum(self, array: Array) -> int:
        """CRC-32 of an array's bytes."""
        kept = self._known.get(id(array.data))
        if kept is None:
            kept = self._known[id(array.data)] = array, crc32(array.data)
        return kept[1]


def frames(message: Message) -> Iterator[bytes]:
    """The message in parts as they travel in either direction, the first with the head."""
    return (message.sealed or Sealed(message.kind, message.parcel)).frames(message.name)


def pieces(message: Message) -> Iterator[pb.Piece]:
    """The same as messages of the generated code."""
    return (pb.ServerFrame.FromString(frame).piece for frame in frames(message))


class Assembler:
    """Puts one message at a time together.

    Args:
        limit: bytes of arrays that a message may have; checked before anything is stored.
    """

    def __init__(self, limit: int) -> None:
        """Nothing has arrived."""
        self.limit = limit
        self._head: Head | None = None
        self._data = memoryview(b"")
        self._have = self._size = 0

    @property
    def expected(self) -> tuple[Head, int] | None:
        """The head and the size in bytes of the message that is on its way."""
        return None if self._head is None else (self._head, self._size)

    def begin(self, piece: Piece | pb.Piece) -> int:
        """Look at the first piece of a message -> the size in bytes of its arrays.

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
        """One more piece, the first one after `begin` -> the message when it is whole.

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
