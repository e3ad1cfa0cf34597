"""Base class of compressors that keep K of d coordinates: RandK, RandBlock, PermK and TopK."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fedsample.compression.base import (
    Compressor,
    Packet,
    PacketKeys,
    float_bits,
    require_length,
    values_from_bytes,
    values_to_bytes,
)
from fedsample.compression.cache_blocks import zeros


class Selector(Compressor):
    """C(v)_j = scale * v_j on the selected coordinates, zero elsewhere.

    The wire holds the K values, then the selected coordinates unless both ends derive them from the keys. Taking
    the K values and placing them are separate methods (`gather`, `place`), so that `compose.Composed` can put another
    compressor between them.
    """

    @abstractmethod
    def select(self, vector: Tensor, keys: PacketKeys) -> Tensor:
        """Select the coordinates (..., K) int64 of (..., d) that travel, in their order on the wire."""

    @abstractmethod
    def scale(self, d: int) -> float:
        """The factor on kept values."""

    def index_bytes(self, d: int) -> int:
        """Bytes that the coordinates take; 0 if they follow from the keys."""
        return 0

    def pack_indices(self, packet: Packet) -> bytes:
        """Encode the coordinates."""
        return b""

    def parse_indices(self, data: bytes, d: int) -> Tensor | None:
        """Decode the coordinates (K,) that `pack_indices` wrote; None if they follow from the keys."""
        return None

    def inclusion(self, d: int) -> float:
        """K / d, the probability that a given coordinate travels."""
        return self.count(d) / d

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """The kept values, scaled, with their coordinates."""
        indices = self.select(vector, keys)
        return Packet(self.gather(vector, indices), indices)

    def gather(self, vector: Tensor, indices: Tensor) -> Tensor:
        """(..., K) the scaled values at `indices`."""
        return vector.gather(-1, indices) * self.scale(vector.shape[-1])

    def place(self, values: Tensor, indices: Tensor, d: int) -> Tensor:
        """(..., d) with `values` at `indices` and zeros elsewhere."""
        dense = zeros((*values.shape[:-1], d), values.dtype, values.device)
        return dense.scatter_(-1, indices, values)

    def accumulate(self, memory: Tensor, values: Tensor, indices: Tensor) -> None:
        """Add `values` to the entries of memory (..., d) at `indices`, in place."""
        memory.scatter_add_(-1, indices, values)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The kept values at their coordinates, zero elsewhere."""
        return self.place(packet.values, required_indices(packet), d)

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Add at the kept coordinates only."""
        self.accumulate(memory, packet.values * scale, required_indices(packet))

    def empty_indices(self, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """(..., K) coordinates for packets of zeros."""
        k = self.count(shape[-1])
        return torch.arange(k, device=device).expand(*shape[:-1], k).clone()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Zeros at the first K coordinates."""
        return super().empty(shape, dtype, device)._replace(indices=self.empty_indices(shape, device))

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """Bits of the values and, if they travel, the coordinates."""
        return float_bits(dtype) * self.count(d) + 8 * self.index_bytes(d)

    def to_bytes(self, packet: Packet) -> bytes:
        """Encode the values, then the coordinates if they travel."""
        return values_to_bytes(packet.values) + self.pack_indices(packet)

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """Decode the values, and the coordinates if they travel."""
        size = float_bits(dtype) // 8 * self.count(d)
        if self.index_bytes(d):
            require_length(data, size + self.index_bytes(d), f"{self.count(d)} values and their coordinates")
            values = values_from_bytes(data[:size], self.count(d), dtype)
        else:
            values = values_from_bytes(data, self.count(d), dtype)
        indices = self.parse_indices(data[size:], d)
        return Packet(values, indices, length=None if indices is None else d)


def required_indices(packet: Packet) -> Tensor:
    """The packet's coordinates.

    Raises:
        ValueError: if they were never rebuilt.
    """
    if packet.indices is None:
        raise ValueError("a sparse packet without indices: rebuild them with support()")
    return packet.indices
