"""Bit packing: n unsigned codes of w bits in exactly ceil(n w / 8) bytes, without a loop over codes.

Of the n - n % 8 first codes, each whole low byte is a plane of bytes; of the w % 8 bits above, four, two and one are a
plane in which code j shares its byte with codes j + m, j + 2 m, ..., so that packing is a shift and an or of whole
slices: with row r of eight rows of m codes, (r % 4) m, (r % 2) m and 0 are where its part of the three planes begins.
All planes of a piece are made while it is in the cache. The up to seven last codes follow as a string of bits, lowest first, padded with zeros to a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsample.errors import DataError

Codes = NDArray[Any]
_CHUNK = 1 << 16


def width_of(values: int) -> int:
    """Bits that tell `values` codes apart, ceil(log2 values); 0 for one."""
    return (values - 1).bit_length()


def size_of(count: int, width: int) -> int:
    """Bytes of `count` codes of `width` bits."""
    return (count * width + 7) // 8


def pack(codes: Codes, width: int, check: Callable[[Codes], None] | None = None) -> bytes:
    """The bytes of integer codes (n,) in 0, ..., 2^width - 1; `check` sees them, piece by piece in the cache."""
    whole = len(codes) - len(codes) % 8
    main, tail = codes[:whole], codes[whole:]
    parts: list[Codes] = []
    if width == 8 * codes.dtype.itemsize == 8:
        parts.append(main.view(np.uint8))
    else:
        planes = [(shift, size, np.empty(whole * size // 8, dtype=np.uint8)) for shift, size in _planes(width)]
        for row, start, end in _rows(whole):
            piece = main[start:end]
            for shift, size, plane in planes:
                part = plane[_columns(row, start, end, size, whole)]
                if size == 8:
                    np.copyto(part, piece >> shift if shift else piece, casting="unsafe")
                    continue
                field = (piece >> shift).astype(np.uint8) if shift else piece.astype(np.uint8)
                if shift + size < width:
                    field &= (1 << size) - 1
                turn = row // size
                if turn == 0:
                    part[...] = field
                else:
                    part |= field << turn * size
        parts.extend(plane for _, _, plane in planes)
    if len(tail) and width:
        string = (tail.astype(np.int64)[:, None] >> np.arange(width)) & 1
        parts.append(np.packbits(string.astype(np.uint8).ravel(), bitorder="little"))
    return b"".join(part.data for part in parts)


def unpack(
    data: bytes, count: int, width: int, dtype: Any, check: Callable[[Codes], None] | None = None
) -> Codes:
    """(count,) codes of `dtype` (wide enough) from the bytes that `pack` made; `check` sees them, piece by piece.

    Raises:
        DataError: if the length is wrong or the padding is not zero.
    """
    if len(data) != size_of(count, width):
        raise DataError(f"{len(data)} bytes of codes, expected {size_of(count, width)} ({count} of {width} bits)")
    codes = np.empty(count, dtype=dtype)
    raw = np.frombuffer(data, dtype=np.uint8)
    whole = count - count % 8
    planes = []
    at = 0
    for shift, size in _planes(width):
        planes.append((shift, size, raw[at : at + whole * size // 8]))
        at += whole * size // 8
    if width == 0:
        codes[...] = 0
    for row, start, end in _rows(whole):
        piece = codes[start:end]
        for number, (shift, size, plane) in enumerate(planes):
            part = plane[_columns(row, start, end, size, whole)]
            turn = row // size
            field = part if size == 8 else (part >> turn * size) & ((1 << size) - 1)
            if number == 0:
                piece[...] = field
            else:
                piece |= field.astype(piece.dtype) << shift
    tail = count - whole
    if tail and width:
        string = np.unpackbits(raw[at:], bitorder="little")
        if string[tail * width :].any():
            raise DataError("the padding of a packet's last byte is not zero; the bytes are damaged")
        weights = np.left_shift(1, np.arange(width, dtype=np.int64))
        codes[whole:] = string[: tail * width].reshape(tail, width).astype(np.int64) @ weights
    return codes


def _planes(width: int) -> list[tuple[int, int]]:
    """(first bit of a code, bits) of each plane, in their order on the wire."""
    planes = [(shift, 8) for shift in range(0, width - 7, 8)]
    at = 8 * len(planes)
    for size in (4, 2, 1):
        if (width - at) & size:
            planes.append((at, size))
            at += size
    return planes


def _rows(whole: int) -> Iterator[tuple[int, int, int]]:
    """(row, from, to): pieces of the eight rows, those of the same columns one after the other."""
    length = whole // 8
    for column in range(0, length, _CHUNK):
        for row in range(8):
            yield row, row * length + column, row * length + min(length, column + _CHUNK)


def _columns(row: int, start: int, end: int, size: int, whole: int) -> slice:
    """Where codes `start` to `end` of a row lie in the plane of `size` bits: 8 / size codes share a byte."""
    before = row // size * (whole * size // 8)
    return slice(start - before, end - before)
