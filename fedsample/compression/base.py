"""What every compressor is: a random map of vectors, its constant, its exact wire bits and its byte codec."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsample.errors import ConfigError, DataError
from fedsample.random import Key, key

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}
_BLOCK = 16  # rounds whose keys are made at once


class Packet(NamedTuple):
    """One compressed vector, or a batch of them.

    Attributes:
        values: (..., K), what travels.
        indices: (..., K) int64 coordinates of the values, which the receiver rebuilds from the shared key; None when
            the values are the whole vector.
    """

    values: Tensor
    indices: Tensor | None


@dataclass(frozen=True)
class PacketKeys:
    """The randomness that both ends of a link share in one round.

    Attributes:
        own: (...) keys of this client, chain and round: independent between clients.
        common: one key for all clients, chains and rounds of the run.
        round: the round, from which `common` is refreshed where a compressor wants that.
    """

    own: Key
    common: Key
    round: int


class LinkKeys:
    """Makes the `PacketKeys` of a link, round after round.

    Args:
        seed: the experiment's seed. clients: one index (a device), or (n,) indices (a fleet, for all at once). chains:
            how many chains. purpose: the link, so that uplink and downlink never share a draw.
    """

    def __init__(
        self, seed: int, clients: int | Tensor, chains: int, purpose: str, device: torch.device | str = "cpu"
    ) -> None:
        client = clients.unsqueeze(-1) if isinstance(clients, Tensor) else clients
        chain = torch.arange(chains, device=device)
        self._own = key(seed, client=client, chain=chain, purpose=purpose, device=device).fold("round")
        self._common = key(seed, purpose=f"{purpose}/common", device=device)
        self._block: tuple[int, Tensor] | None = None

    def at(self, round: int, clients: Tensor | None = None) -> PacketKeys:
        """The keys of one round: own (n, C) or (C,); `clients` picks rows of a fleet's keys."""
        own = self._round_words(round)
        return PacketKeys(Key(own if clients is None else own[clients], self._own.device), self._common, round)

    def _round_words(self, round: int) -> Tensor:
        """The folded keys of one round; those of `_BLOCK` rounds are made at once, for one launch of each operation."""
        index = round // _BLOCK
        if self._block is None or self._block[0] != index:
            rounds = torch.arange(index * _BLOCK, (index + 1) * _BLOCK, device=self._own.device)
            shape = (_BLOCK, *(1 for _ in self._own.shape))
            self._block = (index, self._own.fold(rounds.view(shape)).tensor())
        return self._block[1][round - index * _BLOCK]


class Compressor(ABC):
    """A random map C of vectors.

    Unbiased with constant omega: E C(v) = v and E|C(v) - v|^2 <= omega |v|^2.
    Contractive with constant alpha: E|C(v) - v|^2 <= (1 - alpha) |v|^2.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["unbiased", "contractive"]]
    summary: ClassVar[str]

    @abstractmethod
    def omega(self, d: int) -> float:
        """The constant of unbiasedness for vectors of d entries."""

    @abstractmethod
    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """Compress (..., d) with keys of the same leading shape; NaN passes through and is caught by the chain."""

    @abstractmethod
    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The vectors (..., d) that the receiver sees."""

    @abstractmethod
    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Memory += scale * decompress(packet), in place, without making the dense vector."""

    @abstractmethod
    def count(self, d: int) -> int:
        """How many values of a d-vector travel."""

    @abstractmethod
    def support(self, keys: PacketKeys, d: int) -> Tensor | None:
        """(..., K) the coordinates that travel, which both ends derive from the keys; None: all of them."""

    def inclusion(self, d: int) -> float:
        """The probability that a given coordinate travels."""
        return self.count(d) / d

    def bits(self, d: int, dtype: torch.dtype) -> int:
        """Exact bits on the wire of one compressed d-vector: 8 * len(to_bytes(...))."""
        return 8 * _NUMPY[dtype].itemsize * self.count(d)

    def to_bytes(self, packet: Packet) -> bytes:
        """The wire form of one packet: its values, little endian. Indices never travel.

        Raises:
            DataError: if a value is NaN or infinite: nothing of the kind may enter another party's sum.
        """
        return values_to_bytes(packet.values)

    def from_bytes(self, data: bytes, keys: PacketKeys, d: int, dtype: torch.dtype) -> Packet:
        """The packet that `to_bytes` wrote, its indices rebuilt from the keys (of one client and chain).

        Raises:
            DataError: if the length is not that of a packet for d, or a value is not finite.
        """
        return Packet(values_from_bytes(data, self.count(d), dtype), self.support(keys, d))


def values_to_bytes(values: Tensor) -> bytes:
    """Little-endian bytes of a float32 or float64 tensor; refuses values that are not finite."""
    if not bool(torch.isfinite(values).all()):
        raise DataError("a packet holds NaN or infinite values; the gradient that made it is not finite")
    plain: bytes = values.detach().cpu().contiguous().numpy().astype(_NUMPY[values.dtype], copy=False).tobytes()
    return plain


def values_from_bytes(data: bytes, count: int, dtype: torch.dtype) -> Tensor:
    """(count,) values from little-endian bytes; refuses a wrong length and values that are not finite."""
    form = _NUMPY[dtype]
    if len(data) != count * form.itemsize:
        raise DataError(f"a packet of {len(data)} bytes, expected {count * form.itemsize} ({count} values of {form})")
    values = torch.from_numpy(np.frombuffer(data, dtype=form).astype(form.newbyteorder("="), copy=True))
    if not bool(torch.isfinite(values).all()):
        raise DataError("a packet holds NaN or infinite values and is refused")
    return values


def resolve_count(k: int | float, d: int, what: str) -> int:
    """How many coordinates `k` means: an integer counts them, a float is a fraction of d (at least one).

    Raises:
        ConfigError: if k is outside 1..d or (0, 1].
    """
    if isinstance(k, int):
        if not 1 <= k <= d:
            raise ConfigError(f"{what}: k = {k} coordinates of {d} parameters; choose 1 <= k <= {d}, or a fraction")
        return k
    if not 0 < k <= 1:
        raise ConfigError(f"{what}: k = {k} is read as a fraction and must lie in (0, 1]; a count is an integer")
    return max(1, round(k * d))
