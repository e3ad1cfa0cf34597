r"""Downlinks: how clients get the iterate, in full or as compressed increments.

    dense     w_k = x_k
    ef21-p    q = C( x_k - w_{k-1} ),   w_k = w_{k-1} + q    on both ends

Gruntkowska, Tyurin & Richtarik, ICML 2023 (arXiv 2209.15218); under Langevin noise P-ELF and B-ELF: Karagulyan &
Richtarik 2023 (arXiv 2303.04622). Clients compute gradients at w while the server moves x: w lags, which widens the
stationary law at first order in the step. A client that missed rounds gets the increments that it missed or the dense
point, whichever is smaller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fedsample.compression import Compressor, LinkKeys, Packet
from fedsample.estimators.packets import packet_bytes, packet_of_bytes
from fedsample.random import SERVER


class Downlink(ABC):
    """What clients see of the iterate, and how many bits that takes."""

    name: ClassVar[str]
    reference: ClassVar[str]
    summary: ClassVar[str]
    compresses: ClassVar[bool] = False

    @abstractmethod
    def see(self, seen: Tensor, params: Tensor, round: int) -> tuple[Tensor, Packet | None]:
        """Compute what clients see (C, d) in `round`, from what they saw before and the iterate; and the increment."""

    @abstractmethod
    def bits(self, missed: Tensor, chains: int, d: int, dtype: torch.dtype) -> int:
        """Bits for clients that last heard `missed` rounds ago, (m,) int64 (1: the round before; 0: never)."""


class DenseDownlink(Downlink):
    """The iterate in full."""

    name: ClassVar[str] = "dense"
    reference: ClassVar[str] = "-"
    summary: ClassVar[str] = "d values per chain and round"

    def see(self, seen: Tensor, params: Tensor, round: int) -> tuple[Tensor, Packet | None]:
        """The iterate."""
        return params, None

    def bits(self, missed: Tensor, chains: int, d: int, dtype: torch.dtype) -> int:
        """d values per chain, whatever was missed."""
        return len(missed) * _dense(chains, d, dtype)


class Ef21P(Downlink):
    """Compressed increments; needs a contractive compressor.

    Args:
        compressor: a contractive compressor.
        seed: the experiment's seed.
        chains: number of chains C.
        device: device of the iterate.
    """

    name: ClassVar[str] = "ef21-p"
    reference: ClassVar[str] = "Gruntkowska, Tyurin & Richtarik 2023; Karagulyan & Richtarik 2023"
    summary: ClassVar[str] = "one packet per chain and round; d values in round 1 and where that is less"
    compresses: ClassVar[bool] = True

    def __init__(self, compressor: Compressor, seed: int, chains: int, device: torch.device | str = "cpu") -> None:
        self.compressor = compressor
        self._link = LinkKeys(seed, SERVER, chains, "downlink", device)

    def see(self, seen: Tensor, params: Tensor, round: int) -> tuple[Tensor, Packet | None]:
        """Add the compressed difference to what was seen; round 1 is dense."""
        if round == 1:
            return params, None
        packet = self.compressor.compress(params - seen, self._link.at(round))
        return seen + self.compressor.decompress(packet, params.shape[-1]), packet

    def pack(self, packet: Packet) -> bytes:
        """Encode an increment of C chains."""
        return packet_bytes(self.compressor, packet)

    def advance(self, seen: Tensor, data: bytes, round: int) -> Tensor:
        """Compute what a client sees in `round`, from what it saw in the previous round and the bytes of `pack`.

        Raises:
            DataError: if the length is wrong or a value is not finite.
        """
        packet = packet_of_bytes(self.compressor, data, seen, self._link.at(round))
        return seen + self.compressor.decompress(packet, seen.shape[-1])

    def bits(self, missed: Tensor, chains: int, d: int, dtype: torch.dtype) -> int:
        """Bits of the missed increments or of the dense point, whichever is smaller per client."""
        whole = _dense(chains, d, dtype)
        increments = (missed * chains * self.compressor.bits(d, dtype)).clamp(max=whole)
        return int(torch.where(missed > 0, increments, whole).sum())


def _dense(chains: int, d: int, dtype: torch.dtype) -> int:
    return 8 * torch.empty((), dtype=dtype).element_size() * chains * d
