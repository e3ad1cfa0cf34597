r"""Random rounding to floats of a shorter mantissa: natural compression (no mantissa) and bfloat16 (7 bits).

With a < |v| < b the neighbouring numbers of the short format,

    C(v) = sign(v) b  with probability (|v| - a) / (b - a),  else sign(v) a,      omega = (b - a)^2 / (4 a b),

which is 1/8 where b = 2 a (natural compression: Horvath et al. 2022, arXiv 1905.10988) and 2^-16 / (1 + 2^-7) where
b = a (1 + 2^-7) (bfloat16). Rounding to nearest would be contractive with alpha = 1 - 2^-16; the random one is chosen
because it is unbiased, so that marina, diana and direct may use it, at the same bits. Adding random bits below the kept
mantissa and cutting them off draws exactly that coin: the probability is a multiple of the last bit of v.

Below the least normal number of the format (2^-126; of natural compression in float64 2^-1022) the grid is even: still
unbiased, but only |C(v) - v|^2 <= b^2 / 4 holds. A number beyond the largest of the format rounds to infinity, which
no receiver accepts. Independent between clients, chains, rounds and coordinates.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedsample.compression import bit_packing
from fedsample.compression.base import Compressor, Independence, Packet, PacketKeys, require_length
from fedsample.compression.bit_packing import Codes
from fedsample.compression.cache_blocks import empty, pieces
from fedsample.compression.random_bits import Coins
from fedsample.errors import DataError
from fedsample.random import Key

_CODES = {torch.float32: torch.int16, torch.float64: torch.int32}  # the code's dtype tells the vector's
_LOW = 0xFF  # an exponent that is the whole lowest byte of a code
_FLOATS = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True)
class _Rounding(Compressor):
    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"
    independence: ClassVar[Independence] = "independent"

    @abstractmethod
    def _width(self, dtype: torch.dtype) -> int:
        """Bits per code."""

    @abstractmethod
    def _exponent(self, dtype: torch.dtype) -> int:
        """Mask of the exponent bits of a code, which are all ones if it is not finite."""

    @abstractmethod
    def _coins(self, key: Key, d: int, dtype: torch.dtype) -> Coins:
        """Random bits that decide the rounding of each entry."""

    @abstractmethod
    def _encode(self, values: Tensor, random: Tensor, out: Tensor) -> None:
        """Write the integer codes of some entries; overwrites their random bits."""

    @abstractmethod
    def _decode(self, codes: Tensor, out: Tensor) -> None:
        """Write the floats of codes."""

    def count(self, d: int) -> int:
        """All d codes travel."""
        return d

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """The code of each entry."""
        codes = empty(tuple(vector.shape), _CODES[vector.dtype], vector.device)
        coins = self._coins(keys.own, vector.shape[-1], vector.dtype)
        for start, end in pieces(vector.shape[-1], vector.device):
            self._encode(vector[..., start:end].contiguous(), coins.take(start, end), codes[..., start:end])
        return Packet(codes, None)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The rounded entries."""
        codes = packet.values
        out = empty(tuple(codes.shape), _FLOATS[codes.dtype], codes.device)
        for start, end in pieces(d, codes.device):
            self._decode(codes[..., start:end], out[..., start:end])
        return out

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Codes of zero."""
        return Packet(torch.zeros(shape, dtype=_CODES[dtype], device=device), None)

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """Bits of the packed codes, padded to bytes."""
        return 8 * bit_packing.size_of(d, self._width(dtype))

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """Without padding."""
        return float(d * self._width(dtype))

    def to_bytes(self, packet: Packet) -> bytes:
        """The codes, packed.

        Raises:
            DataError: if one of them is not finite: NaN, infinite, or too large for the format.
        """
        dtype = _FLOATS[packet.values.dtype]
        check = self._refuse(dtype, "the gradient that made it is not finite, or is too large for its format")
        return bit_packing.pack(
            packet.values.detach().cpu().contiguous().numpy(),
            self._width(dtype),
            check=check,
            low=self._exponent(dtype) == _LOW,
        )

    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """The codes.

        Raises:
            DataError: if the length is wrong or a code is not finite.
        """
        require_length(data, self.bits(d, dtype) // 8, f"{d} codes of {self._width(dtype)} bits")
        check = self._refuse(dtype, "it is refused")
        form = _CODES[dtype].itemsize
        codes = bit_packing.unpack(
            data, d, self._width(dtype), np.dtype(f"u{form}"), check, low=self._exponent(dtype) == _LOW
        )
        return Packet(torch.from_numpy(codes.view(f"i{form}")), None)

    def _refuse(self, dtype: torch.dtype, why: str) -> Callable[[Codes], None]:
        """Make a check that raises if a code is not finite; given lowest bytes if the exponent fills them."""
        exponent = self._exponent(dtype)

        def check(codes: Codes) -> None:
            kept = codes if exponent == _LOW else codes & codes.dtype.type(exponent)
            if len(codes) and int(kept.max()) == exponent:
                raise DataError(f"a {self.name} packet holds NaN or infinite values; {why}")

        return check


@dataclass(frozen=True)
class Natural(_Rounding):
    """Random rounding to powers of two: sign and exponent travel, 9 bits of float32 and 12 of float64."""

    name: ClassVar[str] = "natural"
    summary: ClassVar[str] = "sign and exponent of each entry"
    constant: ClassVar[str] = "omega = 1/8"
    formula: ClassVar[str] = "9 d"

    def omega(self, d: int) -> float:
        """One eighth."""
        return 0.125

    def typical(self, d: int) -> float:
        """1 / q - 1 = 3 / (4 ln 2) - 1, about 0.082: the mean over magnitudes of a uniform logarithm."""
        return 4 * math.log(2.0) / 3

    def _width(self, dtype: torch.dtype) -> int:
        return 9 if dtype == torch.float32 else 12

    def _exponent(self, dtype: torch.dtype) -> int:
        return 0xFF if dtype == torch.float32 else 0x7FF

    def _coins(self, key: Key, d: int, dtype: torch.dtype) -> Coins:
        return Coins(key, d, 23, torch.int32) if dtype == torch.float32 else Coins(key, d, 52, torch.int64)

    def _encode(self, values: Tensor, random: Tensor, out: Tensor) -> None:
        _cut(values, random, 23 if values.dtype == torch.float32 else 52, out)

    def _decode(self, codes: Tensor, out: Tensor) -> None:
        double = out.dtype == torch.float64
        _shift_up(codes, 52 if double else 23, out.view(torch.int64 if double else torch.int32))


@dataclass(frozen=True)
class Bfloat16(_Rounding):
    """Random rounding to bfloat16: 16 bits per entry; float64 is limited to the range of float32."""

    name: ClassVar[str] = "bf16"
    summary: ClassVar[str] = "each entry rounded at random to bfloat16"
    constant: ClassVar[str] = "omega = 2^-16/(1 + 2^-7)"
    formula: ClassVar[str] = "16 d"

    def omega(self, d: int) -> float:
        """(b - a)^2 / (4 a b) at b = a (1 + 2^-7)."""
        return 2.0**-16 / (1 + 2.0**-7)

    def typical(self, d: int) -> float:
        """1 / q - 1 = 2^-14 / (16 ln 2): a sixth of a squared spacing, over magnitudes of a uniform logarithm."""
        return 1 / (1 + 2.0**-18 / math.log(2.0))

    def _width(self, dtype: torch.dtype) -> int:
        return 16

    def _exponent(self, dtype: torch.dtype) -> int:
        return 0x7F80

    def _coins(self, key: Key, d: int, dtype: torch.dtype) -> Coins:
        return Coins(key, d, 16, torch.int32) if dtype == torch.float32 else Coins(key, d, 45, torch.int64)

    def _encode(self, values: Tensor, random: Tensor, out: Tensor) -> None:
        if values.dtype == torch.float32:
            _cut(values, random, 16, out)
        else:
            out.copy_(_cut_double(values, random))

    def _decode(self, codes: Tensor, out: Tensor) -> None:
        if out.dtype == torch.float32:
            out.copy_(codes.view(torch.bfloat16))
        else:
            out.copy_((codes << 16).view(torch.float32))


def _shift_up(codes: Tensor, by: int, out: Tensor) -> None:
    """Write codes, shifted left, into `out`; by numpy on a CPU, whose shifts use vector instructions."""
    out.copy_(codes)
    if codes.device.type == "cpu":
        np.left_shift(out.numpy(), by, out=out.numpy())
    else:
        out.bitwise_left_shift_(by)


def _cut(values: Tensor, random: Tensor, low: int, out: Tensor) -> None:
    """Write floats as integers with their `low` last bits rounded away at random; NaN and infinity stay."""
    whole = torch.int32 if values.dtype == torch.float32 else torch.int64
    infinite = 0x7F800000 if whole == torch.int32 else 0x7FF0000000000000
    on_cpu = values.device.type == "cpu"
    if not on_cpu or not math.isfinite(values.sum().item()):  # finite values may have an infinite sum
        random.masked_fill_((values.view(whole) & infinite) == infinite, 0)
    if on_cpu:  # numpy's shifts use vector instructions and, unsigned, do not extend the sign
        unsigned = np.uint32 if whole == torch.int32 else np.uint64
        bits = random.numpy().view(unsigned)
        np.add(bits, values.numpy().view(unsigned), out=bits)
        np.right_shift(bits, low, out=bits)
        np.copyto(out.numpy(), bits, casting="unsafe")
    else:
        random.add_(values.view(whole))
        out.copy_((random >> low) & ((1 << (8 * whole.itemsize - low)) - 1))


def _cut_double(values: Tensor, random: Tensor) -> Tensor:
    """Bit patterns (int32) of bfloat16 from float64: |v| in units of the format's spacing, plus a coin of 45 bits.

    The spacing is 2^-7 of the leading power of two and at least 2^-133; below 2^-178 the coin loses the last bits.
    """
    exponent = ((values.view(torch.int64) >> 52) & 0x7FF).clamp_(min=1023 - 126, max=1023 + 128)
    spacing = ((exponent - 7) << 52).view(torch.float64)
    fixed = (values.abs() / spacing * 2.0**45).nan_to_num(0.0, 0.0, 0.0).clamp_(max=2.0**53).to(torch.int64)
    units = (fixed + random) >> 45  # 0..256
    rounded = (units.double() * spacing).to(torch.float32).copysign(values.float())
    rounded = torch.where(torch.isfinite(values), rounded, values.float())
    return (rounded.view(torch.int32) >> 16) & 0xFFFF
