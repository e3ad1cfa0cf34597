"""The identity: every value travels as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsample.compression.base import (
    Compressor,
    Independence,
    Packet,
    PacketKeys,
    float_bits,
    values_from_bytes,
    values_to_bytes,
)


class Identity(Compressor):
    """C(v) = v; omega = 0, alpha = 1."""

    name: ClassVar[str] = "identity"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"
    summary: ClassVar[str] = "all d values"
    constant: ClassVar[str] = "omega = 0"
    formula: ClassVar[str] = "32 d"
    independence: ClassVar[Independence] = "deterministic"

    def omega(self, d: int) -> float:
        """Zero: nothing is lost."""
        return 0.0

    def count(self, d: int) -> int:
        """All d values travel."""
        return d

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """The vector itself."""
        return Packet(vector, None)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The vector itself."""
        return packet.values

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Add scale * vector to memory, in place."""
        memory.add_(packet.values * scale)

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """32 d or 64 d."""
        return float_bits(dtype) * d

    def to_bytes(self, packet: Packet) -> bytes:
        """The values."""
        return values_to_bytes(packet.values)

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """The values."""
        return Packet(values_from_bytes(data, d, dtype), None)
