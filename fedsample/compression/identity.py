"""The identity: every value travels as it is."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fedsample.compression.base import Compressor, Packet, PacketKeys


class Identity(Compressor):
    """C(v) = v; omega = 0, alpha = 1."""

    name: ClassVar[str] = "identity"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"
    summary: ClassVar[str] = "all d values"

    def omega(self, d: int) -> float:
        """Zero: nothing is lost."""
        return 0.0

    def count(self, d: int) -> int:
        """All d values travel."""
        return d

    def support(self, keys: PacketKeys, d: int) -> None:
        """All coordinates."""
        return None

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """The vector itself."""
        return Packet(vector, None)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The vector itself."""
        return packet.values

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Memory += scale * vector."""
        memory.add_(packet.values * scale)
