"""Bit packing: n unsigned codes of w bits in exactly ceil(n w / 8) bytes, without a loop over codes.

Of the n - n % 8 first codes, each whole low byte is a plane of bytes; of the w % 8 bits above, four, two and one are a
plane in which code j shares its byte with codes j + m, j + 2 m, ..., so that packing is a shift and an or of whole
slices. The up to seven last codes follow as a string of bits, lowest first, padded with zeros to a byte.
"""

from __future__ import annotations

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


def pack(codes: Codes, width: int) -> bytes:
    """The bytes of integer codes (n,) in 0, ..., 2^width - 1."""
    whole = len(codes) - len(codes) % 8
    main, tail = codes[:whole], codes[whole:]
    parts: list[Codes] = []
    shift = 0
    while width - shift >= 8:
        parts.append(_low_bytes(main, shift))
        shift += 8
    for bits in (4, 2, 1):
        if (width - shift) & bits:
            plane = _low_bytes(main, shift).reshape(8 // bits, -1)
            low = (1 << bits) - 1
            shared = np.empty(plane.shape[1], dtype=np.uint8)
            for at in range(0, len(shared), _CHUNK):
                columns = plane[:, at : at + _CHUNK]
                byte = columns[0] & low
                for row in range(1, len(columns)):
                    byte |= (columns[row] & low) << (bits * row)
                shared[at : at + _CHUNK] = byte
            parts.append(shared)
            shift += bits
    if len(tail) and width:
        string = (tail.astype(np.int64)[:, None] >> np.arange(width)) & 1
        parts.append(np.packbits(string.astype(np.uint8).ravel(), bitorder="little"))
    return b"".join(part.data for part in parts)


def unpack(data: bytes, count: int, width: int, dtype: Any) -> Codes:
    """(count,) codes of `dtype` (wide enough) from the bytes that `pack` made.

    Raises:
        DataError: if the length is wrong or the padding is not zero.
    """
    if len(data) != size_of(count, width):
        raise DataError(f"{len(data)} bytes of codes, expected {size_of(count, width)} ({count} of {width} bits)")
    codes = np.zeros(count, dtype=dtype)
    raw = np.frombuffer(data, dtype=np.uint8)
    whole = count - count % 8
    main = codes[:whole]
    shift = at = 0
    while width - shift >= 8:
        _add_bytes(main, raw[at : at + whole], shift)
        at += whole
        shift += 8
    for bits in (4, 2, 1):
        if (width - shift) & bits:
            length = whole * bits // 8
            shared, low = raw[at : at + length], (1 << bits) - 1
            for row in range(8 // bits):
                plane = (shared >> (bits * row)) & low if row else shared & low
                _add_bytes(main[row * length : (row + 1) * length], plane, shift)
            at += length
            shift += bits
    tail = count - whole
    if tail and width:
        string = np.unpackbits(raw[at:], bitorder="little")
        if string[tail * width :].any():
            raise DataError("the padding of a packet's last byte is not zero; the bytes are damaged")
        weights = np.left_shift(1, np.arange(width, dtype=np.int64))
        codes[whole:] = string[: tail * width].reshape(tail, width).astype(np.int64) @ weights
    return codes


def _low_bytes(codes: Codes, shift: int) -> NDArray[np.uint8]:
    """Eight bits of each code from bit `shift` on."""
    if shift == 0 and codes.dtype.itemsize == 1:
        return codes.view(np.uint8)
    out = np.empty(len(codes), dtype=np.uint8)
    for at in range(0, len(codes), _CHUNK):
        piece = codes[at : at + _CHUNK]
        np.copyto(out[at : at + _CHUNK], piece >> shift if shift else piece, casting="unsafe")
    return out


def _add_bytes(codes: Codes, plane: Codes, shift: int) -> None:
    """Put the bytes of a plane at bit `shift` of codes that are still zero there."""
    if shift == 0:
        codes[...] = plane
        return
    for at in range(0, len(codes), _CHUNK):
        codes[at : at + _CHUNK] |= plane[at : at + _CHUNK].astype(codes.dtype) << shift
