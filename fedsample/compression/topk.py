r"""TopK: the K entries of largest magnitude, with their coordinates.

    C(v)_j = v_j  if |v_j| is among the K largest, else 0;     |C(v) - v|^2 <= (1 - K / d) |v|^2.

Deterministic and biased: alpha = K / d, attained where all magnitudes are equal (Alistarh et al. 2018, arXiv
1809.10505; Stich, Cordonnier & Jaggi 2018, arXiv 1809.07599). Among equal magnitudes the lower coordinate goes first,
so that every device keeps the same ones. Coordinates travel in ascending order, as K numbers of ceil(log2 d) bits or
as a bitmap of d bits, whichever is shorter for d and K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.compression import bit_packing
from fedsample.compression.base import Independence, Packet, PacketKeys, contractive_only, float_bits, resolve_count
from fedsample.compression.select import Selector, required_indices
from fedsample.errors import DataError

_SAMPLED = 1 << 16  # entries from which the threshold is estimated
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass(frozen=True)
class TopK(Selector):
    """The K largest entries.

    Attributes:
        k: an integer number of coordinates in 1..d, or a fraction in (0, 1] of them.
    """

    k: int | float

    name: ClassVar[str] = "topk"
    kind: ClassVar[Literal["unbiased", "contractive"]] = "contractive"
    summary: ClassVar[str] = "the K largest values and their coordinates (packed numbers, or a bitmap if shorter)"
    constant: ClassVar[str] = "alpha = K/d"
    formula: ClassVar[str] = "32 K + min(K ceil(log2 d), d)"
    independence: ClassVar[Independence] = "deterministic"

    def count(self, d: int) -> int:
        """K, at least one.

        Raises:
            ConfigError: if `k` does not fit d.
        """
        return resolve_count(self.k, d, "compressor topk")

    def omega(self, d: int) -> float:
        """Raise `ConfigError`: it is biased."""
        raise contractive_only(self.name)

    def alpha(self, d: int) -> float:
        """The contraction K / d."""
        return self.count(d) / d

    def typical(self, d: int) -> float:
        """Predicted inclusion; errors above a threshold travel, so a memory lags at most a sixth of randk's lag."""
        share = self.count(d) / d
        return 1 / (1 + (1 - share) ** 2 / (6 * share))

    def lags(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Lags (d,) under one common threshold: an entry of small steps waits long, one that never moves has lag 0."""
        scales = np.sqrt(squares)
        if self.count(len(squares)) >= np.count_nonzero(scales):
            return np.zeros(len(squares))
        share = _shares(scales, self.count(len(squares)))
        return np.where(share > 0, np.square(1 - share) / (6 * np.where(share > 0, share, 1.0)), 0.0)

    def scale(self, d: int) -> float:
        """Kept values are not scaled."""
        return 1.0

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """The kept values with their coordinates."""
        return super().compress(vector, keys)._replace(length=vector.shape[-1])

    def gather(self, vector: Tensor, indices: Tensor) -> Tensor:
        """The values as they are."""
        return vector.gather(-1, indices)

    def select(self, vector: Tensor, keys: PacketKeys) -> Tensor:
        """(..., K) ascending: by bit patterns, which order magnitudes exactly, NaN and infinity above all numbers."""
        d = vector.shape[-1]
        k = self.count(d)
        whole = _INTEGERS[vector.dtype]
        magnitude = vector.contiguous().view(whole) & torch.iinfo(whole).max
        if vector.device.type == "cpu":
            ranked = torch.from_numpy(np.partition(magnitude.numpy(), d - k, axis=-1))
            least = ranked[..., d - k : d - k + 1]
        else:
            least = torch.topk(magnitude, k, dim=-1).values.amin(-1, keepdim=True)
        keep = magnitude >= least
        if torch.count_nonzero(keep) != k * (keep.numel() // d):  # several share the least magnitude: the first ones go
            above = magnitude > least
            tied = keep ^ above
            keep = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
        return _positions(keep, k)

    def index_bytes(self, d: int) -> int:
        """Bytes of the packed coordinates or of the bitmap."""
        return bit_packing.size_of(min(self._width(d) * self.count(d), d), 1)

    def pack_indices(self, packet: Packet) -> bytes:
        """Packed coordinates, or a bitmap."""
        indices, d = required_indices(packet).cpu().numpy(), packet.length
        if d is None:
            raise ValueError("a topk packet that does not say its length d: make it with compress() or empty()")
        if self._bitmap(d):
            present = np.zeros(d, dtype=np.uint8)
            present[indices] = 1
            return bit_packing.pack(present, 1)
        narrow = np.uint32 if d <= 1 << 32 else np.int64
        return bit_packing.pack(indices.astype(narrow), self._width(d))

    def parse_indices(self, data: bytes, d: int) -> Tensor:
        """(K,) ascending.

        Raises:
            DataError: if they are out of range, repeat, or are not K.
        """
        k = self.count(d)
        if self._bitmap(d):
            flags = bit_packing.unpack(data, d, 1, np.uint8)
            places = np.flatnonzero(flags)
            if len(places) != k:
                raise DataError(f"a topk bitmap of {len(places)} coordinates, expected K = {k}; the bytes are damaged")
            return torch.from_numpy(places)
        places = bit_packing.unpack(data, k, self._width(d), np.uint32 if d <= 1 << 32 else np.int64).astype(np.int64)
        if int(places[-1]) >= d or bool((places[1:] <= places[:-1]).any()):
            raise DataError(f"topk coordinates must ascend within 0..{d - 1} without repeating; the bytes are damaged")
        return torch.from_numpy(places)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Zeros at the first K coordinates."""
        return super().empty(shape, dtype, device)._replace(length=shape[-1])

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """Without padding: b K + min(K ceil(log2 d), d)."""
        return float(float_bits(dtype) * self.count(d) + min(self._width(d) * self.count(d), d))

    def _width(self, d: int) -> int:
        return bit_packing.width_of(d)

    def _bitmap(self, d: int) -> bool:
        return d < self._width(d) * self.count(d)


def _shares(scales: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Frequencies (d,) with which entries, with steps of these scales, exceed the threshold that k exceed per round.

    A random walk of steps s leaves (-t, t) after about 1 + 1.166 t / s + (t / s)^2 of them: 1.166 is twice the mean
    overshoot of a normal walk, 0.583.
    """
    inverse = np.where(scales > 0, 1 / np.where(scales > 0, scales, 1.0), np.inf)

    def leaving(threshold: float, inverse: NDArray[np.float64]) -> NDArray[np.float64]:
        far = threshold * inverse
        result: NDArray[np.float64] = 1 / (1 + 1.166 * far + np.square(far))
        return result

    some = inverse[:: max(1, len(scales) // _SAMPLED)]
    low, high = 0.0, float(scales.max()) * len(scales)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if leaving(middle, some).mean() > k / len(scales) else (low, middle)
    return leaving(high, inverse)


def _positions(keep: Tensor, k: int) -> Tensor:
    """Positions (..., k) int64 of the k marks in each row of (..., d)."""
    flat = keep.flatten()
    if keep.device.type == "cpu":
        marks = torch.from_numpy(np.flatnonzero(flat.numpy()))
    else:
        marks = flat.nonzero().squeeze(-1)
    rows = marks.view(*keep.shape[:-1], k)
    return rows if keep.dim() == 1 else rows % keep.shape[-1]
