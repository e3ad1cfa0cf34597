"""Bit packing: n unsigned codes of w bits in exactly ceil(n w / 8) bytes, without a loop over codes.

Of the n - n % 8 first codes, each whole low byte is a plane of bytes; of the w % 8 bits above, four, two and one are a
plane in which code j shares its byte with codes j + m, j + 2 m, ..., so that packing is a shift and an or of whole
slices; all planes of a piece are made while it is in the cache. The up to seven last codes follow as a string of bits,
lowest first, padded with zeros to a byte.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsample.errors import DataError

Codes = NDArray[Any]
_CHUNK = 1 << 16


def width_of(values: int) -> int:
    """Bits that distinguish `values` codes: ceil(log2 values), 0 for one."""
    return (values - 1).bit_length()


def size_of(count: int, width: int) -> int:
    """Bytes that `count` codes of `width` bits take."""
    return (count * width + 7) // 8


def pack(
    codes: Codes,
    width: int,
    head: bytes = b"",
    plus: int = 0,
    check: Callable[[Codes], None] | None = None,
    low: bool = False,
) -> bytes:
    """Write `head`, then integer codes (n,), where codes + plus lie in 0, ..., 2^width - 1.

    Args:
        codes: (n,) integers, signed or unsigned.
        width: bits per code.
        head: bytes in front.
        plus: what is added to every code.
        check: called with the codes, piece by piece while they are in the cache; raises if one is not allowed.
        low: whether `check` gets only the lowest byte of each code, in half the time; for codes of at least 8 bits.
    """
    # The stream's own buffer is filled in place and returned: a second copy would cost more than the packing.
    stream = io.BytesIO(bytes(len(head) + size_of(len(codes), width)))
    _fill(stream.getbuffer(), codes, width, head, plus, check, low)
    return stream.getvalue()


def _fill(
    view: memoryview,
    codes: Codes,
    width: int,
    head: bytes,
    plus: int,
    check: Callable[[Codes], None] | None,
    low: bool,
) -> None:
    view[: len(head)] = head
    raw = np.frombuffer(view, dtype=np.uint8, offset=len(head))
    whole = len(codes) - len(codes) % 8
    planes, used = _planes(raw, whole, width)
    unsigned = np.dtype(f"u{codes.itemsize}")
    add = unsigned.type(plus)
    # Scratch for every piece: allocating it anew for each would cost more than the arithmetic.
    length = min(whole // 8, _CHUNK)
    sums, fields = np.empty(length, unsigned), np.empty(length, unsigned)
    eights, narrow = _bytes(length)
    for row, start, end in _rows(whole):
        piece, n = codes[start:end], end - start
        if check and not low:
            check(piece)
        piece = piece.view(unsigned)
        if plus:
            piece = np.add(piece, add, out=sums[:n])
        for shift, size, plane in planes:
            part = plane[_columns(row, start, end, size, whole)]
            field = np.right_shift(piece, shift, out=fields[:n]) if shift else piece
            if size == 8:
                np.copyto(part, field, casting="unsafe")
                if check and low and not shift:
                    check(part)
                continue
            turn = row // size
            few = narrow[:n] if turn else part
            np.copyto(few, field, casting="unsafe")
            if shift + size < width:
                np.bitwise_and(few, (1 << size) - 1, out=few)
            if turn:
                np.left_shift(eights, turn * size, out=eights)
                np.bitwise_or(part, few, out=part)
    tail = codes[whole:]
    if len(tail) and width:
        if check:
            check(tail.astype(np.uint8) if low else tail)
        string = ((tail.astype(np.int64) + plus)[:, None] >> np.arange(width)) & 1
        raw[used:] = np.packbits(string.astype(np.uint8).ravel(), bitorder="little")


def unpack(
    data: bytes | memoryview,
    count: int,
    width: int,
    dtype: Any,
    check: Callable[[Codes], None] | None = None,
    minus: int = 0,
    low: bool = False,
) -> Codes:
    """Read (count,) codes of `dtype` (unsigned, wide enough) from the bytes that `pack` wrote.

    Args:
        data: what `pack` wrote, without the head.
        count: number of codes n.
        width: bits per code.
        dtype: of the result.
        check: as for `pack`.
        minus: what is subtracted from every code after the check, modulo the dtype's range.
        low: as for `pack`.

    Raises:
        DataError: if the length is wrong or the padding is not zero.
    """
    if len(data) != size_of(count, width):
        raise DataError(f"{len(data)} bytes of codes, expected {size_of(count, width)} ({count} of {width} bits)")
    codes = np.empty(count, dtype=dtype)
    raw = np.frombuffer(data, dtype=np.uint8)
    whole = count - count % 8
    planes, used = _planes(raw, whole, width)
    if width == 0:
        codes[...] = 0
    length = min(whole // 8, _CHUNK)
    wide = np.empty(length, codes.dtype)
    eights, narrow = _bytes(length)
    less = codes.dtype.type(minus)
    for row, start, end in _rows(whole):
        piece, n = codes[start:end], end - start
        for number, (shift, size, plane) in enumerate(planes):
            part = plane[_columns(row, start, end, size, whole)]
            if size < 8:
                turn = row // size * size
                part = np.bitwise_and(part, ((1 << size) - 1) << turn, out=narrow[:n])
                if turn:
                    narrow[n:] = 0  # of a longer piece: a word's shift would carry it into this one
                    np.right_shift(eights, turn, out=eights)
            if number == 0:
                piece[...] = part
                if check and low:
                    check(part)
            else:
                np.copyto(wide[:n], part)
                np.left_shift(wide[:n], shift, out=wide[:n])
                np.bitwise_or(piece, wide[:n], out=piece)
        if check and not low:
            check(piece)
        if minus:
            np.subtract(piece, less, out=piece)
    if count > whole and width:
        tail = codes[whole:]
        tail[...] = _last(raw[used:], len(tail), width)
        if check:
            check(tail.astype(np.uint8) if low else tail)
        tail -= less
    return codes


def _last(octets: Codes, count: int, width: int) -> Codes:
    """Read the last codes (count,) int64, fewer than eight, which are stored bit by bit."""
    string = np.unpackbits(octets, bitorder="little")
    if string[count * width :].any():
        raise DataError("the padding of a packet's last byte is not zero; the bytes are damaged")
    weights = np.left_shift(1, np.arange(width, dtype=np.int64))
    codes: Codes = string[: count * width].reshape(count, width).astype(np.int64) @ weights
    return codes


def _bytes(count: int) -> tuple[Codes, Codes]:
    """Allocate `count` bytes or a few more, as 64-bit words and as bytes: numpy shifts words ten times as fast.

    As long as no bit leaves its byte, both shifts give the same.
    """
    words = np.zeros((count + 7) // 8, dtype=np.uint64)
    return words, words.view(np.uint8)


def _planes(raw: Codes, whole: int, width: int) -> tuple[list[tuple[int, int, Codes]], int]:
    """(first bit of a code, bits, bytes) of each plane, in their order on the wire; and their total bytes."""
    sizes = [8] * (width // 8) + [size for size in (4, 2, 1) if width & size]
    planes = []
    shift = 0
    for size in sizes:
        planes.append((shift, size, raw[whole * shift // 8 : whole * (shift + size) // 8]))
        shift += size
    return planes, whole * width // 8


def _rows(whole: int) -> Iterator[tuple[int, int, int]]:
    """Yield (row, from, to), the pieces of the eight rows; pieces of the same columns follow one another."""
    length = whole // 8
    for column in range(0, length, _CHUNK):
        for row in range(8):
            yield row, row * length + column, row * length + min(length, column + _CHUNK)


def _columns(row: int, start: int, end: int, size: int, whole: int) -> slice:
    """Slice of the plane of `size` bits that holds codes `start` to `end` of a row; 8 / size codes share a byte."""
    before = row // size * (whole * size // 8)
    return slice(start - before, end - before)
