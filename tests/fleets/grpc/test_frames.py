"""Messages in pieces: whole and valid, or refused."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsample.fleets.grpc import fedsample_pb2 as pb
from fedsample.fleets.grpc.framing.frames import (
    HEAD,
    PIECE,
    SMALL,
    Assembler,
    Damaged,
    Digests,
    Message,
    Name,
    pieces,
)
from fedsample.protocol.wire import Array, Parcel

NAME = Name(b"r" * 16, 3, 41, 7, b"d" * 16, 1 << 40)

integers = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False)
headers = st.dictionaries(
    st.text(max_size=8),
    st.one_of(
        st.booleans(),
        integers,
        numbers,
        st.text(max_size=20),
        st.binary(max_size=20),
        st.lists(st.booleans(), max_size=5),
        st.lists(integers, max_size=5),
        st.lists(numbers, max_size=5),
        st.lists(st.text(max_size=5), max_size=5),
    ),
    max_size=6,
)
arrays = st.dictionaries(
    st.text(max_size=8),
    st.builds(
        lambda size, shape: Array("int8", tuple(shape), "fedsample.dense.v1", bytes(i % 251 for i in range(size))),
        st.one_of(st.integers(0, 40), st.integers(SMALL - 2, SMALL + 2)),
        st.lists(st.integers(0, 2**40), max_size=3),
    ),
    max_size=4,
)


def message(*sizes: int, **header: Any) -> Message:
    found = {}
    for number, size in enumerate(sizes):
        data = (bytes(range(1, 252)) * (size // 251 + 1))[:size]
        found[f"array{number}"] = Array("int8", (size,), "fedsample.dense.v1", data)
    return Message(NAME, "train", Parcel(header, found))


def sent(what: Message) -> list[pb.Piece]:
    """As they come out of the other end's decoder."""
    return [pb.Piece.FromString(piece.SerializeToString()) for piece in pieces(what)]


def assembled(parts: list[pb.Piece], limit: int = 1 << 30) -> Message | None:
    """What becomes of pieces on one stream; fails if something is left over."""
    assembler = Assembler(limit)
    whole = None
    for part in parts:
        assert whole is None
        if assembler.expected is None:
            assembler.begin(part)
        whole = assembler.add(part)
    return whole


def typed(value: object) -> object:
    """Equal only to a value of the same types: True is 1, and -0.0 is 0.0."""
    if isinstance(value, list):
        return [typed(each) for each in value]
    return type(value), struct.pack("<d", value) if isinstance(value, float) else value


@settings(max_examples=150, deadline=None)
@given(headers, arrays)
def test_what_is_sent_arrives(header: dict[str, Any], content: dict[str, Array]) -> None:
    before = Message(NAME, "query.exact", Parcel(header, content))
    after = assembled(sent(before))
    assert after is not None
    assert after.name == NAME
    assert after.kind == "query.exact"
    assert {name: typed(value) for name, value in after.parcel.header.items()} == {
        name: typed(value) for name, value in header.items()
    }
    assert list(after.parcel.arrays) == list(content)
    for name, array in content.items():
        found = after.parcel.arrays[name]
        assert found[:3] == array[:3]
        assert bytes(found.data) == array.data


@pytest.mark.parametrize(
    "sizes",
    [(), (0,), (0, 0), (1,), (PIECE,), (PIECE, 0), (0, PIECE + 1), (PIECE - 1, 2, PIECE), (3 * PIECE,), (5, 2 * PIECE)],
)
def test_large_messages_come_in_pieces(sizes: tuple[int, ...]) -> None:
    before = message(*sizes, round=4)
    parts = sent(before)
    assert len(parts) == max(1, -(-sum(sizes) // PIECE))
    assert all(len(part.data) <= PIECE for part in parts)
    assert [bool(part.head) for part in parts] == [True] + [False] * (len(parts) - 1)
    after = assembled(parts)
    assert after is not None
    assert [bytes(each.data) for each in after.parcel.arrays.values()] == [
        each.data for each in before.parcel.arrays.values()
    ]


def test_messages_follow_one_another() -> None:
    assembler = Assembler(1 << 30)
    for size in (0, 3 * PIECE, 5, PIECE):
        parts = sent(message(size))
        assert assembler.expected is None
        assert assembler.begin(parts[0]) == size
        assert assembler.expected is not None
        *first, last = [assembler.add(part) for part in parts]
        assert first == [None] * (len(parts) - 1)
        assert last is not None
        assert last.size == size


# --- what is refused ------------------------------------------------------------------------------------------------


def signed(head: pb.Head | bytes, data: bytes = b"", offset: int = 0) -> pb.Piece:
    text = head if isinstance(head, bytes) else head.SerializeToString()
    return pb.Piece(head=text, offset=offset, data=data, crc=zlib.crc32(data, zlib.crc32(text)))


def head(*sizes: int) -> pb.Head:
    return pb.Head(kind="train", arrays=[pb.Array(name=str(number), size=size) for number, size in enumerate(sizes)])


def hostile() -> Iterator[tuple[str, list[pb.Piece]]]:
    parts = sent(message(3 * PIECE))
    yield "a message that begins without its head", parts[1:]
    yield "two pieces that changed places", [parts[0], parts[2], parts[1]]
    yield "a piece that came twice", [parts[0], parts[1], parts[1]]
    yield "a piece that is missing", [parts[0], parts[2]]
    yield "another message before the end of one", [parts[0], *sent(message(5))]
    yield "the same message before its end", [parts[0], parts[0]]
    yield "no head", [signed(b"", b"abc")]
    yield "nothing at all", [signed(b"", b"")]
    yield "an offset at the start", [signed(head(4), b"abcd", offset=1)]
    yield "a head that is none", [signed(b"\xff\xff\xff", b"")]
    yield "a head without end", [signed(head(0).SerializeToString() + b"x" * HEAD)]
    yield "more than was said", [signed(head(3), b"abcd")]
    yield "a size beyond the limit", [signed(head((1 << 30) + 1), b"a")]
    yield "sizes that only together are beyond the limit", [signed(head(1 << 29, 1 << 29, 1), b"a")]
    yield "the largest sizes", [signed(head(*[(1 << 64) - 1] * 3), b"a")]
    yield "nothing where something was said", [signed(head(4), b"")]
    yield "no bytes after some", [signed(head(4), b"ab"), signed(b"", b"", offset=2)]
    yield "a field without a value", [signed(pb.Head(header=[pb.Field(name="x")]))]
    data = pb.Piece.FromString(parts[1].SerializeToString())
    data.data = data.data[:-1] + b"\xff"
    yield "another byte in a later piece", [parts[0], data]
    small = sent(message(5, round=3))[0]
    small.head = small.head.replace(b"train", b"trair")
    yield "another byte in the head", [small]


@pytest.mark.parametrize(("what", "parts"), [pytest.param(*case, id=case[0]) for case in hostile()])
def test_what_is_not_whole_or_valid_is_refused(what: str, parts: list[pb.Piece]) -> None:
    with pytest.raises(Damaged):
        assembled(parts)


def test_every_single_bit_is_watched() -> None:
    raw = sent(message(6, round=1))[0]
    for place in ("head", "data"):
        octets = getattr(raw, place)
        for bit in range(8 * len(octets)):
            changed = bytearray(octets)
            changed[bit // 8] ^= 1 << bit % 8
            part = pb.Piece(head=raw.head, data=raw.data, crc=raw.crc)
            setattr(part, place, bytes(changed))
            with pytest.raises(Damaged, match="checksum"):
                assembled([part])


def test_nothing_is_stored_of_what_is_too_large() -> None:
    assembler = Assembler(10)
    with pytest.raises(Damaged, match="a message of 11 bytes, expected at most 10"):
        assembler.begin(signed(head(11), b"a"))
    assert assembler.expected is None
    assert assembler.begin(signed(head(10), b"a")) == 10


# --- digests ----------------------------------------------------------------------------------------------------------


def test_a_digest_stands_for_kind_header_and_content() -> None:
    one = message(3, round=1)
    changes = [
        ("query.exact", one.parcel),
        ("train", message(3, round=2).parcel),
        ("train", message(3, round=True).parcel),
        ("train", message(4, round=1).parcel),
        ("train", Parcel(one.parcel.header, {"array0": one.parcel.arrays["array0"]._replace(data=b"abc")})),
        ("train", Parcel(one.parcel.header, {"array1": one.parcel.arrays["array0"]})),
    ]
    digests = Digests()
    found = [digests.of("train", one.parcel), *(digests.of(kind, parcel) for kind, parcel in changes)]
    assert len(set(found)) == len(found)
    assert all(len(each) == 16 for each in found)
    assert Digests().of("train", message(3, round=1).parcel) == found[0]
    assert digests.of("train", one.parcel) == found[0]
