"""Frames that hold a piece, written and read by hand: the bytes of `fedsample.proto`, with one copy of the data.

Generated code copies the data of a piece four times when sending and three times when receiving, and its handling of
fields takes longer than a small request on the wire. Frames not written as here are left to the generated code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from zlib_ng.zlib_ng import crc32

from fedsample.fleets.grpc import fedsample_pb2 as pb

Data = bytes | memoryview
Frame = TypeVar("Frame", pb.DeviceFrame, pb.ServerFrame)

# Tags: a field's number, then its wire type: 0 a varint, 2 a length and that many bytes, 5 four bytes.
_FRAME = 3 << 3 | 2  # `piece`, in a frame of either direction
_HEAD, _OFFSET, _DATA, _CRC = 1 << 3 | 2, 2 << 3 | 0, 3 << 3 | 2, 4 << 3 | 5
_FRAME_TAG, _HEAD_TAG, _OFFSET_TAG, _DATA_TAG, _CRC_TAG = (
    bytes((tag,)) for tag in (_FRAME, _HEAD, _OFFSET, _DATA, _CRC)
)


class Piece(NamedTuple):
    """A part of a message; see the message of this name in `fedsample.proto`.

    Attributes:
        head: see `fedsample.proto`.
        offset: see `fedsample.proto`.
        data: see `fedsample.proto`.
        crc: see `fedsample.proto`.
        size: bytes of the whole frame.
    """

    head: bytes
    offset: int
    data: Data
    crc: int
    size: int


def varint(value: int) -> bytes:
    """Encode an unsigned integer, seven bits per byte, the lowest first."""
    if value < 0x80:
        return bytes((value,))
    octets = bytearray()
    while value >= 0x80:
        octets.append(value & 0x7F | 0x80)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def checksum(head: bytes, parts: Sequence[Data]) -> int:
    """CRC-32 of a head followed by data."""
    crc = crc32(head)
    for part in parts:
        crc = crc32(part, crc)
    return crc


def write(head: bytes, offset: int, parts: Sequence[Data], crc: int) -> bytes:
    """Write a frame with a piece whose data are the concatenated parts."""
    size = sum(map(len, parts))
    fields: list[Data] = []
    if head:
        fields += (_HEAD_TAG, varint(len(head)), head)
    if offset:
        fields += (_OFFSET_TAG, varint(offset))
    if size:
        fields += (_DATA_TAG, varint(size), *parts)
    if crc:
        fields += (_CRC_TAG, crc.to_bytes(4, "little"))
    return b"".join((_FRAME_TAG, varint(sum(map(len, fields))), *fields))


def read(frame: bytes) -> Piece | None:
    """Read the piece in a frame, its data a view of the frame; None: something else, or encoded differently."""
    try:
        if frame[0] != _FRAME:
            return None
        size, at = _varint(frame, 1)
        end, whole = at + size, len(frame)
        if end != whole:
            return None
        head, offset, data, crc = b"", 0, memoryview(b""), 0
        while at < end:
            tag = frame[at]
            at += 1
            if tag == _CRC:
                crc = int.from_bytes(frame[at : at + 4], "little")
                at += 4
            elif tag in (_HEAD, _DATA):
                size, start = _varint(frame, at)
                at = start + size
                if tag == _HEAD:
                    head = frame[start:at]
                else:
                    data = memoryview(frame)[start:at]
            elif tag == _OFFSET:
                offset, at = _varint(frame, at)
            else:
                return None
    except IndexError:
        return None
    return Piece(head, offset, data, crc, whole) if at == end else None


def cut(message: bytes) -> list[tuple[int, bytes]] | None:
    """Split a message whose fields all have lengths into (tag, bytes); None: it has another field."""
    parts, at, end = [], 0, len(message)
    try:
        while at < end:
            tag = message[at]
            size, start = _varint(message, at + 1)
            at = start + size
            if tag & 0x87 != 2:
                return None
            parts.append((tag, message[start:at]))
    except IndexError:
        return None
    return parts if at == end else None


def device_frame(frame: bytes) -> Piece | pb.DeviceFrame:
    """Read a frame that a device has sent.

    Raises:
        DecodeError: if it is not a frame.
    """
    return read(frame) or _plain(pb.DeviceFrame.FromString(frame), len(frame))


def server_frame(frame: bytes) -> Piece | pb.ServerFrame:
    """Read a frame that the server has sent.

    Raises:
        DecodeError: if it is not a frame.
    """
    return read(frame) or _plain(pb.ServerFrame.FromString(frame), len(frame))


def written(frame: bytes | pb.DeviceFrame | pb.ServerFrame) -> bytes:
    """Serialise a frame."""
    return frame if isinstance(frame, bytes) else frame.SerializeToString()


def _plain(frame: Frame, size: int) -> Piece | Frame:
    """Convert a piece read by generated code, such as one with fields of a later version; return other frames as is."""
    if frame.WhichOneof("frame") != "piece":
        return frame
    piece = frame.piece
    return Piece(piece.head, piece.offset, memoryview(piece.data), piece.crc, size)


def _varint(octets: bytes, at: int) -> tuple[int, int]:
    """Read a varint -> (value, where it ends); at most 64 bits."""
    value = octets[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    for shift in range(7, 64, 7):
        octet = octets[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80:
            return value & (1 << 64) - 1, at
    raise IndexError("an integer of more than 64 bits")
