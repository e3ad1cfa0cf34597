"""The whole table of compressors by name, keys and vectors for them, and what equal bits are."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.compression import Compressor, LinkKeys, Packet, PacketKeys, build
from fedsample.random import key

FLOAT64 = torch.float64
NAMES = [
    "identity",
    "randk",
    "randblock",
    "topk",
    "qsgd",
    "natural",
    "sign",
    "bf16",
    "permk",
    "lowrank",
    "randk+natural",
    "permk+qsgd",
    "randblock+bf16",
    "topk+natural",
    "topk+sign",
    "topk+scaled-qsgd",
    "scaled-randk",
    "scaled-randk+qsgd",
]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shapes, dtypes and bits: -0.0 is not 0.0 here."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def same_packets(one: Packet, other: Packet) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and same_bits(a.contiguous(), b.contiguous()))
        for a, b in zip(one[:3], other[:3], strict=True)
    )


def device_keys(client: int = 0, chain: int = 0, round: int = 1, seed: int = 0) -> PacketKeys:
    common = key(seed, purpose="uplink/common")
    return PacketKeys(key(seed, round, client, chain, "uplink"), common, round, client, chain)


def many_keys(count: int) -> PacketKeys:
    """Keys of `count` chains."""
    return LinkKeys(3, 0, count, "uplink").at(1)


def blocks_of(d: int) -> list[Tensor]:
    """A matrix of four columns as far as d goes, and a vector of the rest."""
    whole = d - d % 4 if d >= 16 else 0
    parts = [torch.arange(whole).view(-1, 4)] if whole else []
    return parts + ([torch.arange(whole, d).view(-1, 1)] if d > whole else [])


def make(name: str, d: int, k: int | float = 0.4, levels: int = 5) -> Compressor:
    return build(name, k, levels=levels, rank=1, clients=3, blocks=blocks_of(d))


def gaussian(d: int, dtype: torch.dtype = FLOAT64, seed: int = 0) -> Tensor:
    return key(seed, purpose="vector").normal(d, dtype) + 0.3


UNBIASED = ["randk", "randblock", "qsgd", "natural", "bf16", "permk", "randk+natural", "permk+qsgd", "randblock+bf16"]
