r"""Scaled sign: one bit per entry, and the mean magnitude.

    C(v) = (|v|_1 / d) sgn(v),     |C(v) - v|^2 = (1 - alpha(v)) |v|^2,   alpha(v) = |v|_1^2 / (d |v|_2^2) >= 1 / d

Karimireddy et al., ICML 2019 (arXiv 1901.09847), Lemma 8. Deterministic and biased. A zero entry counts by its sign
bit, which leaves the equation above exact. The constant is the worst case 1 / d, of a vector with one nonzero entry;
for Gaussian entries alpha is near 2 / pi.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsample.compression import bit_packing
from fedsample.compression.base import (
    Compressor,
    Independence,
    Packet,
    PacketKeys,
    contractive_only,
    float_bits,
    require_length,
    values_from_bytes,
    values_to_bytes,
)
from fedsample.compression.cache_blocks import empty, one_norm, pieces, times
from fedsample.errors import DataError

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class ScaledSign(Compressor):
    """Signs times the mean magnitude."""

    name: ClassVar[str] = "sign"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "contractive"
    summary: ClassVar[str] = "the mean magnitude and d signs"
    constant: ClassVar[str] = "alpha = |v|_1^2/(d |v|^2) >= 1/d"
    formula: ClassVar[str] = "32 + d"
    independence: ClassVar[Independence] = "deterministic"

    def count(self, d: int) -> int:
        """All d signs travel."""
        return d

    def omega(self, d: int) -> float:
        """Raise `ConfigError`: it is biased."""
        raise contractive_only(self.name)

    def alpha(self, d: int) -> float:
        """The worst case over vectors, 1 / d."""
        return 1.0 / d

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """+1 or -1 for each entry by its sign bit, and |v|_1 / d."""
        d = vector.shape[-1]
        signs = empty(tuple(vector.shape), torch.int8, vector.device)
        for start, end in pieces(d, vector.device):
            piece = vector[..., start:end].contiguous()
            signs[..., start:end] = piece.view(_INTEGERS[vector.dtype]) >> 8 * vector.dtype.itemsize - 1  # 0, or -1
            signs[..., start:end].bitwise_or_(1)
        return Packet(signs, None, (one_norm(vector) / d).to(vector.dtype).unsqueeze(-1))

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """Signs times the scale."""
        return times(packet.values, _required(packet))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Positive signs and scale zero."""
        signs = torch.ones(shape, dtype=torch.int8, device=device)
        return Packet(signs, None, torch.zeros((*shape[:-1], 1), dtype=dtype, device=device))

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """The scale, and the signs padded to bytes."""
        return float_bits(dtype) + 8 * bit_packing.size_of(d, 1)

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """Without padding."""
        return float(float_bits(dtype) + d)

    def to_bytes(self, packet: Packet) -> bytes:
        """Encode the scale, then one bit per entry, set if it is negative.

        Raises:
            DataError: if the scale is not finite, because an entry was not.
        """
        negative = packet.values.detach().cpu().contiguous().numpy() < 0
        return values_to_bytes(_required(packet)) + np.packbits(negative, bitorder="little").tobytes()

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """Signs and scale.

        Raises:
            DataError: if the length is wrong, the scale is negative or not finite, or the padding is not zero.
        """
        require_length(data, self.bits(d, dtype) // 8, f"a scale and {d} bits")
        size = float_bits(dtype) // 8
        scale = values_from_bytes(data[:size], 1, dtype)
        if float(scale) < 0:
            raise DataError(f"a sign packet with scale {float(scale)}: a mean magnitude is not negative")
        string = np.unpackbits(np.frombuffer(data, dtype=np.uint8, offset=size), bitorder="little")
        if string[d:].any():
            raise DataError("the padding of a packet's last byte is not zero; the bytes are damaged")
        negative = torch.from_numpy(string[:d].view(np.int8))
        return Packet(negative.mul_(-2).add_(1), None, scale)


def _required(packet: Packet) -> Tensor:
    if packet.side is None:
        raise ValueError("a sign packet without its scale")
    return packet.side
