r"""QSGD with levels of fixed width: every entry becomes a random multiple of |v| / s.

    C(v)_j = (|v| / s) floor(s v_j / |v| + u_j),   u_j uniform on [0, 1),  |v| the Euclidean norm
    omega = min(d / s^2, sqrt(d) / s);  s = 1:  sqrt(d) - 1.

Alistarh et al., NeurIPS 2017 (arXiv 1610.02132), Lemma 3.1; their sign and magnitude are the same law as the floor of
the signed entry. A level takes 1 + ceil(log2(s + 1)) bits, the norm one float. Independent between clients, chains,
rounds and coordinates.

Levels are drawn in fixed point: s v_j / |v| is rounded to a multiple of 2^-f of a level, where f is 30 (float32) or 62
(float64) less the bits of s, and the coin has f bits, so that a coordinate's mean is exact to |v| 2^-30 or 2^-62.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.compression import bit_packing
from fedsample.compression.base import (
    Compressor,
    Independence,
    Packet,
    PacketKeys,
    float_bits,
    require_length,
    values_from_bytes,
    values_to_bytes,
)
from fedsample.compression.cache_blocks import PIECE, empty, pieces, times, two_norm
from fedsample.compression.random_bits import Coins
from fedsample.errors import ConfigError, DataError

_MAX_LEVELS = (1 << 15) - 1
_SMALL, _TERMS = 0.02, 64  # exp(-2 pi^2 0.02^2 64^2) is 1e-14


@dataclass(frozen=True)
class QSGD(Compressor):
    """Random rounding to s levels of the norm.

    Attributes:
        levels: s in 1..32,767. 2^b - 1 levels fill their b + 1 bits: 1, 3, 7, 15, ..., 127.
    """

    levels: int

    name: ClassVar[str] = "qsgd"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"
    summary: ClassVar[str] = "the norm and d signed levels of fixed width"
    constant: ClassVar[str] = "omega = min(d/s^2, sqrt(d)/s)"
    formula: ClassVar[str] = "32 + d (1 + ceil(log2(s + 1)))"
    independence: ClassVar[Independence] = "independent"

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= _MAX_LEVELS:
            raise ConfigError(
                f"compressor qsgd: levels = {self.levels!r}; choose an integer in 1..{_MAX_LEVELS}, such as 127 (8 "
                "bits per entry) or 7 (4 bits)"
            )

    @property
    def width(self) -> int:
        """Bits of a level with its sign."""
        return 1 + bit_packing.width_of(self.levels + 1)

    def count(self, d: int) -> int:
        """All d levels travel."""
        return d

    def omega(self, d: int) -> float:
        """The bound of the paper; for one level the exact worst case."""
        s = self.levels
        return math.sqrt(d) - 1.0 if s == 1 else min(d / s**2, math.sqrt(d) / s)

    def typical(self, d: int) -> float:
        """For d normal entries of equal variance; with many levels, a sixth of the bound on omega."""
        mean = d / self.levels**2 * float(_rounding(np.array(self.levels / math.sqrt(d))))
        return 1 / (1 + min(mean, self.omega(d)))

    def noise(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """|v|^2 / s^2 times the mean of f (1 - f), f the fraction of an entry in units of |v| / s."""
        total = float(squares.sum())
        if total == 0:
            return np.zeros_like(squares)
        result: NDArray[np.float64] = total / self.levels**2 * _rounding(self.levels * np.sqrt(squares / total))
        return result

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """Levels in -s..s, and the norm."""
        norm = two_norm(vector)
        safe = torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
        whole, fraction = _fixed_point(vector.dtype, self.levels)
        unit = 1 << fraction
        levels = empty(tuple(vector.shape), self._dtype(), vector.device)
        coins = Coins(keys.own, vector.shape[-1], fraction, whole)
        top = self.levels * unit
        on_cpu = vector.dtype == torch.float32 and vector.device.type == "cpu"
        work = torch.empty_like(vector[..., :PIECE], memory_format=torch.contiguous_format) if on_cpu else None
        for start, end in pieces(vector.shape[-1], vector.device):
            values, random, out = vector[..., start:end], coins.take(start, end), levels[..., start:end]
            if work is not None:
                _draw_on_cpu(values, safe, top, fraction, random, out, work[..., : end - start])
            else:
                _draw(values, safe, top, fraction, random, out)
        return Packet(levels, None, norm.unsqueeze(-1))

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """Levels times |v| / s."""
        norm = _required(packet)
        return times(packet.values, norm / self.levels)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Zero levels and norm."""
        levels = torch.zeros(shape, dtype=self._dtype(), device=device)
        return Packet(levels, None, torch.zeros((*shape[:-1], 1), dtype=dtype, device=device))

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """The norm, and the packed levels padded to bytes."""
        return float_bits(dtype) + 8 * bit_packing.size_of(d, self.width)

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """The paper's count without padding."""
        return float(float_bits(dtype) + d * self.width)

    def to_bytes(self, packet: Packet) -> bytes:
        """The norm, then levels + s, packed.

        Raises:
            DataError: if the norm is not finite: an entry was NaN or infinite, or the norm overflows.
        """
        levels = packet.values.detach().cpu().contiguous().numpy()
        return bit_packing.pack(levels, self.width, values_to_bytes(_required(packet)), self.levels)

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """Levels and norm.

        Raises:
            DataError: if the length is wrong, a level is above s, or the norm is not finite or negative.
        """
        require_length(data, self.bits(d, dtype) // 8, f"a norm and {d} levels of {self.width} bits")
        size = float_bits(dtype) // 8
        norm = values_from_bytes(data[:size], 1, dtype)
        form = self._dtype().itemsize
        wrong = DataError(f"a qsgd packet with a level outside -{self.levels}..{self.levels} or a negative norm")
        if float(norm) < 0:
            raise wrong

        def check(codes: bit_packing.Codes) -> None:
            if int(codes.max()) > 2 * self.levels:
                raise wrong

        levels = bit_packing.unpack(memoryview(data)[size:], d, self.width, np.dtype(f"u{form}"), check, self.levels)
        return Packet(torch.from_numpy(levels.view(f"i{form}")), None, norm)

    def _dtype(self) -> torch.dtype:
        return torch.int8 if self.levels < 128 else torch.int16


def _rounding(scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """E f (1 - f), with f the fractional part of scale * z and z standard normal: 1 / 6 for large scales.

    Summed as a Fourier series; for small scales, where hardly any entry reaches a whole level, E|x| - E x^2.
    """
    k = np.arange(1, _TERMS + 1)
    series = 1 / 6 - (np.exp(-2 * np.square(np.pi * np.multiply.outer(scale, k))) / np.square(np.pi * k)).sum(-1)
    return np.where(scale < _SMALL, math.sqrt(2 / math.pi) * scale - np.square(scale), series)


def _fixed_point(dtype: torch.dtype, levels: int) -> tuple[torch.dtype, int]:
    """Integer type of fixed-point levels, and its number of fractional bits."""
    if dtype == torch.float32:
        return torch.int32, 30 - levels.bit_length()
    return torch.int64, 62 - levels.bit_length()


def _draw(values: Tensor, safe: Tensor, top: int, fraction: int, random: Tensor, out: Tensor) -> None:
    """Write the levels of some entries; overwrites their random bits."""
    scaled = (values / safe).mul_(float(top)).round_()
    out.copy_(random.add_(scaled.to(random.dtype).clamp_(-top, top)).bitwise_right_shift_(fraction))


def _draw_on_cpu(
    values: Tensor, safe: Tensor, top: int, fraction: int, random: Tensor, out: Tensor, work: Tensor | None = None
) -> None:
    """The same for float32 by numpy, whose shifts use vector instructions, in two arrays that stay in the cache.

    No clamp: a norm summed in float64 and rounded once is never below the magnitude of an entry, so that no quotient
    exceeds 1. Where an entry is not finite the norm is not either, whatever the levels.
    """
    with np.errstate(all="ignore"):
        scaled = np.divide(values.numpy(), safe.numpy(), out=None if work is None else work.numpy())
        np.multiply(scaled, np.float32(top), out=scaled)
        np.rint(scaled, out=scaled)
        fixed = scaled.view(np.int32)
        np.copyto(fixed, scaled, casting="unsafe")
    np.add(fixed, random.numpy(), out=fixed)
    np.right_shift(fixed, fraction, out=fixed)
    np.copyto(out.numpy(), fixed, casting="unsafe")


def _required(packet: Packet) -> Tensor:
    if packet.side is None:
        raise ValueError("a qsgd packet without its norm")
    return packet.side
