"""Frames and heads written by hand are those of the generated code, in both directions."""

from __future__ import annotations

import zlib

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.headers import Damaged, Form, Name, read_head, write_content, write_name
from fedsample.fleets.grpc.framing.zero_copy import (
    Piece,
    checksum,
    cut,
    device_frame,
    read,
    server_frame,
    varint,
    write,
    written,
)
from fedsample.protocol.wire import Array, Parcel

offsets = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))
NAME = Name(b"r" * 16, 3, 41, 7, b"d" * 16, 1 << 40)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), offsets, st.lists(st.binary(max_size=200), max_size=3))
def test_a_frame_is_that_of_the_generated_code(head: bytes, offset: int, parts: list[bytes]) -> None:
    data = b"".join(parts)
    crc = zlib.crc32(data, zlib.crc32(head))
    assert checksum(head, parts) == crc
    frame = write(head, offset, parts, crc)
    piece = pb.Piece(head=head, offset=offset, data=data, crc=crc)
    # A piece without any field would still be written, and is: an empty one.
    assert frame == pb.ServerFrame(piece=piece).SerializeToString() == pb.DeviceFrame(piece=piece).SerializeToString()
    for read_frame in (read, device_frame, server_frame):
        found = read_frame(frame)
        assert isinstance(found, Piece)
        assert (found.head, found.offset, bytes(found.data), found.crc, found.size) == (
            head, offset, data, crc, len(frame),
        )  # fmt: skip


@given(st.binary(max_size=60))
def test_what_is_read_by_hand_is_what_the_generated_code_reads(octets: bytes) -> None:
    frame = b"\x1a" + varint(len(octets)) + octets
    found = read(frame)
    if found is not None:
        piece = pb.DeviceFrame.FromString(frame).piece
        assert (found.head, found.offset, bytes(found.data), found.crc) == (
            piece.head, piece.offset, piece.data, piece.crc,
        )  # fmt: skip


def test_unusual_frames_are_left_to_the_generated_code() -> None:
    plain = write(b"head", 5, [b"data"], 9)
    later = b"\x1a" + varint(len(plain[2:]) + 3) + plain[2:] + b"\xf8\x01\x07"  # a field that no version has yet
    twice = plain + plain
    for frame in (later, twice):
        assert read(frame) is None
        found = device_frame(frame)
        assert isinstance(found, Piece)
        assert (found.head, found.offset, bytes(found.data), found.crc) == (b"head", 5, b"data", 9)
    assert isinstance(device_frame(pb.DeviceFrame(pong=pb.Pong(number=1)).SerializeToString()), pb.DeviceFrame)
    assert isinstance(server_frame(b""), pb.ServerFrame)
    assert written(plain) is plain
    assert written(pb.ServerFrame(ping=pb.Ping(number=1))) == pb.ServerFrame(ping=pb.Ping(number=1)).SerializeToString()
    for end in range(1, len(plain)):
        with pytest.raises(DecodeError):
            device_frame(plain[:end])


def test_a_head_is_that_of_the_generated_code() -> None:
    header = {"version": 1, "yes": True, "x": 0.5, "t": "text", "l": ["a", "b"], "e": [], "f": [True], "o": b"\x00"}
    parcel = Parcel(header, {"x": Array("int8", (2, 3), "s", bytes(6))})
    octets = write_name(NAME) + write_content("train", parcel)
    generated = pb.Head.FromString(octets)
    assert generated.SerializeToString(deterministic=True) == octets
    found = read_head(octets)
    assert found == (NAME, "train", header, [Form("x", "int8", (2, 3), "s", 6)])
    later = octets + b"\x28\x07"  # a field that no version has yet: read by the generated code
    assert cut(later) is None
    assert read_head(later) == found


def test_what_is_remembered_of_a_head_is_nobody_elses() -> None:
    octets = write_content("train", Parcel({"l": ["a", "b"]}))
    first = read_head(octets).header["l"]
    assert isinstance(first, list)
    first.clear()
    assert read_head(octets).header["l"] == ["a", "b"]


@pytest.mark.parametrize("value", [True, 1, 1.0, -0.0, 0.0, False, 0])
def test_values_that_are_equal_keep_their_types(value: object) -> None:
    for each in (1, True, 1.0, 0.0, -0.0, value):
        found = read_head(write_content("x", Parcel({"k": each}))).header["k"]  # type: ignore[dict-item]
        assert (type(found), repr(found)) == (type(each), repr(each))


def test_a_head_that_is_none_is_refused() -> None:
    for octets in (b"\x1a\x02\x0a\x01", b"\x12\x01\xff", b"\xff"):
        with pytest.raises(Damaged):
            read_head(octets)
