"""Encode and decode packets of C chains: one chain after the other, each as its compressor writes it."""

from __future__ import annotations

from torch import Tensor

from fedsample.compression import Compressor, Packet, PacketKeys
from fedsample.errors import DataError


def chain_of(packet: Packet, chain: int) -> Packet:
    """The packet of one chain in a stack (C, ...)."""
    indices = None if packet.indices is None else packet.indices[chain]
    side = None if packet.side is None else packet.side[chain]
    return packet._replace(values=packet.values[chain], indices=indices, side=side)


def fill_chain(packet: Packet, chain: int, one: Packet) -> None:
    """Put one chain's packet into a stack (C, ...)."""
    for stack, part in zip(packet[:3], one[:3], strict=True):
        if isinstance(stack, Tensor) and isinstance(part, Tensor):
            stack[chain] = part


def packet_bytes(compressor: Compressor, packet: Packet) -> bytes:
    """Encode all chains of a packet (C, ...)."""
    return b"".join(compressor.to_bytes(chain_of(packet, chain)) for chain in range(len(packet.values)))


def packet_of_bytes(compressor: Compressor, data: bytes, like: Tensor, keys: PacketKeys) -> Packet:
    """Decode what `packet_bytes` wrote, for vectors of the shape, dtype and device of `like` (C, d).

    Raises:
        DataError: if the length is wrong or a value is not finite.
    """
    chains, d = like.shape
    size = compressor.bits(d, like.dtype) // 8
    if len(data) != chains * size:
        raise DataError(
            f"a packet of {len(data)} bytes, expected {chains * size} for {chains} chains of {d} parameters"
        )
    packet = compressor.empty((chains, d), like.dtype)
    for chain in range(chains):
        fill_chain(packet, chain, compressor.parse(data[chain * size : (chain + 1) * size], d, like.dtype))
    indices, side = (None if part is None else part.to(like.device) for part in (packet.indices, packet.side))
    packet = packet._replace(values=packet.values.to(like.device), indices=indices, side=side)
    support = compressor.support(keys, d)  # of all chains at once, if the keys determine it
    return packet if support is None else packet._replace(indices=support)
