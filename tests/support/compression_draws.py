"""Draws of a compressor: the keys of one device, keys of which each draws another number, and what equal bits are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedsample.compression import Compressor, PacketKeys, RandBlock, RandK
from fedsample.random import Key, key

FLOAT64 = torch.float64


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shapes, dtypes and bits: -0.0 is not 0.0 here."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}
    return one.dtype == other.dtype and torch.equal(one.view(whole[one.dtype]), other.view(whole[other.dtype]))


def device_keys(client: int = 0, chain: int = 0, round: int = 1, seed: int = 0) -> PacketKeys:
    """The keys of one client and chain alone, without a batch."""
    common = key(seed, purpose="uplink/common")
    return PacketKeys(key(seed, round, client, chain, "uplink"), common, round)


class EveryOffset(Key):
    """(d,) keys, the j-th of which draws the integer j."""

    def integers(self, high: int, n: int) -> Tensor:
        assert n == 1
        assert torch.equal(self.tensor(), torch.arange(high))
        return self.tensor().unsqueeze(-1)


SPARSE: list[Callable[..., Compressor]] = [RandK, RandBlock]
