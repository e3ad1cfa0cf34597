r"""Unbiased sparsification: keep K of d coordinates, scaled by d / K.

    C(v)_j = (d / K) m_j v_j,   P(m_j = 1) = K / d,   omega = d / K - 1.

RandK draws a uniform K-subset (Stich, Cordonnier & Jaggi 2018, arXiv 1809.07599). RandBlock keeps K coordinates that
follow each other, around the end, in a keyed permutation of all coordinates: one integer is drawn instead of a
subset, for the same first and second moments of each coordinate. Its noise is correlated between neighbours in the
permutation, so the permutation is redrawn every few hundred rounds. The receiver derives the coordinates from the
shared key, so only values travel: K floats.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fedsample.compression.base import Compressor, Packet, PacketKeys, resolve_count
from fedsample.random import Key


@dataclass(frozen=True)
class _Sparsifier(Compressor):
    k: int | float

    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"

    @abstractmethod
    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """(..., K) coordinates in the order in which they travel."""

    def count(self, d: int) -> int:
        """K, at least one.

        Raises:
            ConfigError: if `k` does not fit d.
        """
        return resolve_count(self.k, d, f"compressor {self.name}")

    def omega(self, d: int) -> float:
        """The variance constant d / K - 1."""
        return d / self.count(d) - 1.0

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """The kept values, scaled by d / K, with their coordinates."""
        d = vector.shape[-1]
        indices = self.support(keys, d)
        indices = indices.expand(*vector.shape[:-1], indices.shape[-1])
        return Packet(vector.gather(-1, indices) * (d / self.count(d)), indices)

    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The kept values in place, zero elsewhere."""
        dense = packet.values.new_zeros((*packet.values.shape[:-1], d))
        return dense.scatter_(-1, _indices(packet), packet.values)

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Touch the kept coordinates only."""
        memory.scatter_add_(-1, _indices(packet), packet.values * scale)


def _indices(packet: Packet) -> Tensor:
    if packet.indices is None:
        raise ValueError("a sparse packet without indices: rebuild them with support()")
    return packet.indices


@dataclass(frozen=True)
class RandK(_Sparsifier):
    """A uniform K-subset for each vector, independent between clients, chains and rounds.

    Attributes:
        k: an integer number of coordinates in 1..d, or a fraction in (0, 1] of them.
    """

    name: ClassVar[str] = "randk"
    summary: ClassVar[str] = "K values of a uniform subset; indices from the shared key"

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """(..., K) coordinates in the order in which they travel."""
        return keys.own.subset(d, self.count(d))


@dataclass(frozen=True)
class RandBlock(_Sparsifier):
    """K successive coordinates, cyclically, of a permutation that all clients share for `refresh` rounds.

    Given the permutation, the blocks of different clients, chains and rounds are independent.

    Attributes:
        k: an integer number of coordinates in 1..d, or a fraction in (0, 1] of them.
        refresh: rounds after which the permutation is drawn anew.
    """

    refresh: int = 256

    name: ClassVar[str] = "randblock"
    summary: ClassVar[str] = "K values of a random block of a keyed permutation; indices from the shared key"

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """(..., K) coordinates in the order in which they travel."""
        k = self.count(d)
        order = _permutation(keys.common.fold(keys.round // self.refresh), d)
        start = keys.own.integers(d, 1)  # (..., 1)
        return order[start + torch.arange(k, device=start.device)]


@lru_cache(maxsize=8)
def _permutation(key: Key, d: int) -> Tensor:
    """(2 d,) the permutation twice over, so that a block may run past the end."""
    order = key.permutation(d)
    return torch.cat([order, order])
