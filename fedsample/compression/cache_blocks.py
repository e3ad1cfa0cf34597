"""Work on long vectors in pieces that fit the cache, allocate large arrays cheaply, and sum in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

PIECE = 1 << 16  # entries worked on at once on a CPU
_LARGE = 1 << 20  # bytes from which numpy allocates an array


def pieces(d: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Bounds (from, to) of the pieces of d entries: 65,536 each on a CPU, all at once on an accelerator."""
    length = PIECE if device.type == "cpu" else max(1, d)
    for at in range(0, d, length):
        yield at, min(d, at + length)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, but large arrays on a CPU come from numpy.

    Numpy asks the system for huge pages. Without them the first touch of 40 MB takes four times the time of a copy.
    """
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(shape, dtype=torch.empty((), dtype=dtype).numpy().dtype))


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`, allocated as `empty` does."""
    if device.type != "cpu" or math.prod(shape) * dtype.itemsize < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return empty(shape, dtype, device).zero_()


def times(codes: Tensor, unit: Tensor) -> Tensor:
    """Multiply integers (..., d) by unit (..., 1) into a new array of unit's dtype, without a temporary one."""
    out = empty(tuple(codes.shape), unit.dtype, unit.device)
    for start, end in pieces(codes.shape[-1], unit.device):
        out[..., start:end].copy_(codes[..., start:end]).mul_(unit)
    return out


def total(
    vector: Tensor, term: Callable[[Tensor], Tensor], add: Callable[[Tensor, Tensor], object] | None = None
) -> Tensor:
    """Float64 sum of term(vector) (..., d) over its last axis -> (...), in an order that d and the device type fix.

    `term` gets entries in float64, to be overwritten; `add` adds the term of its second argument to its first, in one
    pass where the rounding allows it. Pieces are added onto the first one, which is then folded in
    halves: additions of whole slices, so that one vector alone and the same one within a batch give the same bits.
    """
    d = vector.shape[-1]
    length = min(d, PIECE // 2) if vector.device.type == "cpu" else d
    if length == 0:
        raise ValueError("a vector of no entries has nothing to compress")
    sums = term(vector[..., :length].to(torch.float64, copy=True))
    wide = torch.empty_like(sums)
    for start in range(length, d, length):
        piece = wide[..., : min(d - start, length)]
        piece.copy_(vector[..., start : start + length])
        if add is None:
            sums[..., : piece.shape[-1]] += term(piece)
        else:
            add(sums[..., : piece.shape[-1]], piece)
    width = length
    while width > 1:
        half = (width + 1) // 2
        sums[..., : width - half] += sums[..., half:width]
        width = half
    return sums[..., 0]


def one_norm(vector: Tensor) -> Tensor:
    """sum_j |v_j| of (..., d) -> (...) float64."""
    return total(vector, Tensor.abs_)


def two_norm(vector: Tensor) -> Tensor:
    """Euclidean norm of (..., d) -> (...) of its dtype; squares neither overflow nor underflow."""
    if vector.dtype == torch.float64:
        size = vector.abs().amax(-1, keepdim=True)
        safe = torch.where(size > 0, size, 1.0)
        return total(vector, lambda piece: piece.div_(safe).square_()).sqrt() * size.squeeze(-1)
    # Squares of float32 are exact in float64, so that a fused multiply-add gives the same sum as two operations.
    return total(vector, Tensor.square_, lambda sums, piece: sums.addcmul_(piece, piece)).sqrt().to(vector.dtype)
