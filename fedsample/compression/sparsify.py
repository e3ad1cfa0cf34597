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

import numpy as np
import torch
from torch import Tensor

from fedsample.compression.base import Independence, PacketKeys, resolve_count
from fedsample.compression.select import Selector
from fedsample.random import Key

_ASCENDING = 1 << 16  # from this d on a block is sorted, so that memory is accessed in order


@dataclass(frozen=True)
class _Sparsifier(Selector):
    k: int | float

    kind: ClassVar[Literal["unbiased", "contractive"]] = "unbiased"
    constant: ClassVar[str] = "omega = d/K - 1"
    formula: ClassVar[str] = "32 K"

    @abstractmethod
    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """(..., K) coordinates in the order in which they travel."""

    def select(self, vector: Tensor, keys: PacketKeys) -> Tensor:
        """The support; it does not depend on the vector."""
        indices = self.support(keys, vector.shape[-1])
        return indices.expand(*vector.shape[:-1], indices.shape[-1])

    def count(self, d: int) -> int:
        """K, at least one.

        Raises:
            ConfigError: if `k` does not fit d.
        """
        return resolve_count(self.k, d, f"compressor {self.name}")

    def omega(self, d: int) -> float:
        """The variance constant d / K - 1."""
        return d / self.count(d) - 1.0

    def scale(self, d: int) -> float:
        """The factor d / K that makes it unbiased."""
        return d / self.count(d)


@dataclass(frozen=True)
class RandK(_Sparsifier):
    """A uniform K-subset for each vector, independent between clients, chains and rounds.

    Attributes:
        k: an integer number of coordinates in 1..d, or a fraction in (0, 1] of them.
    """

    name: ClassVar[str] = "randk"
    summary: ClassVar[str] = "K values of a uniform subset; indices from the shared key"
    independence: ClassVar[Independence] = "independent"

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """(..., K) coordinates in the order in which they travel."""
        return keys.own.subset(d, self.count(d))


@dataclass(frozen=True)
class RandBlock(_Sparsifier):
    """K successive coordinates, cyclically, in a permutation that all clients share for `refresh` rounds.

    Given the permutation, the blocks of different clients, chains and rounds are independent.

    Attributes:
        k: an integer number of coordinates in 1..d, or a fraction in (0, 1] of them.
        refresh: rounds after which the permutation is drawn anew.
    """

    refresh: int = 256

    name: ClassVar[str] = "randblock"
    summary: ClassVar[str] = "K values of a random block of a keyed permutation; indices from the shared key"
    independence: ClassVar[Independence] = "shared-permutation"

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        """(..., K) coordinates in the order in which they travel: ascending from 65,536 coordinates on."""
        k = self.count(d)
        order = _permutation(keys.common.fold(keys.round // self.refresh), d)
        start = keys.own.integers(d, 1)  # (..., 1)
        if d < _ASCENDING:
            return order[start + _offsets(k, start.device)]
        rows = [order[at : at + k] for at in start.flatten().tolist()]
        return _ascending(torch.stack(rows)).view(*start.shape[:-1], k).to(torch.int64)


@lru_cache(maxsize=8)
def _permutation(key: Key, d: int) -> Tensor:
    """The permutation twice over, (2 d,), so that a block may run past the end; int32 if it is long."""
    order = key.permutation(d)
    if _ASCENDING <= d < 1 << 31:
        order = order.to(torch.int32)
    return torch.cat([order, order])


@lru_cache(maxsize=8)
def _offsets(k: int, device: torch.device) -> Tensor:
    return torch.arange(k, device=device)


def _ascending(rows: Tensor) -> Tensor:
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=-1))
    return torch.sort(rows, dim=-1).values
