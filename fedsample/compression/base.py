"""The compressor interface: a random map of vectors, its error constant, exact wire bits and byte codec."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.errors import ConfigError, DataError
from fedsample.random import Key, key

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}
Independence = Literal["deterministic", "independent", "shared-permutation", "partition"]
_BLOCK = 16  # rounds whose keys are made together


class Packet(NamedTuple):
    """One compressed vector, or a batch of them.

    Attributes:
        values: (..., K), what travels: numbers, or the integer codes of a quantiser.
        indices: (..., K) int64 coordinates of the values: rebuilt by the receiver from the shared key, or sent along;
            None when the values are the whole vector.
        side: (..., m) the few numbers sent beside them, such as a norm; None: none.
        length: d, set if the wire form depends on it and the values do not tell it.
    """

    values: Tensor
    indices: Tensor | None
    side: Tensor | None = None
    length: int | None = None


@dataclass(frozen=True)
class PacketKeys:
    """The randomness that both ends of a link share in one round.

    Attributes:
        own: (...) keys of this client, chain and round: independent between clients.
        common: one key for all clients, chains and rounds of the run.
        round: the round, for compressors that refresh `common` with it.
        client: index of the client, an integer or an int64 tensor that broadcasts to the shape of `own`, for
            compressors whose packets depend on each other across clients; None if the link does not give it.
        chain: index of the chain, likewise.
    """

    own: Key
    common: Key
    round: int
    client: Tensor | int | None = None
    chain: Tensor | int | None = None

    def inner(self) -> PacketKeys:
        """Keys for a second compressor applied after the first, independent of its draws."""
        return replace(self, own=self.own.fold("inner"))


class LinkKeys:
    """Makes the `PacketKeys` of one link, round by round.

    Args:
        seed: the experiment's seed.
        clients: one index (a device), or (n,) indices (a fleet, for all at once).
        chains: number of chains C.
        purpose: name of the link, so that uplink and downlink never share a draw.
        device: where the keys are.
    """

    def __init__(
        self, seed: int, clients: int | Tensor, chains: int, purpose: str, device: torch.device | str = "cpu"
    ) -> None:
        client = clients.unsqueeze(-1) if isinstance(clients, Tensor) else clients
        chain = torch.arange(chains, device=device)
        self._client, self._chain = client, chain
        self._own = key(seed, client=client, chain=chain, purpose=purpose, device=device).fold("round")
        self._common = key(seed, purpose=f"{purpose}/common", device=device)
        self._block: tuple[int, Tensor] | None = None

    def at(self, round: int, clients: Tensor | int | None = None) -> PacketKeys:
        """Keys of one round: `own` is (n, C) or (C,); `clients` selects rows of a fleet's keys, or one."""
        own = self._round_words(round)
        client = self._client
        if clients is not None:
            own = own[clients]
            client = client[clients] if isinstance(client, Tensor) else client
        return PacketKeys(Key(own, self._own.device), self._common, round, client, self._chain)

    def _round_words(self, round: int) -> Tensor:
        """Folded keys of one round; made for `_BLOCK` rounds together, with one launch of each operation."""
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

    Attributes:
        name: as in a configuration.
        kind: which of the two bounds holds.
        summary: what travels.
        constant: omega or alpha as a formula, for printing.
        formula: the idealised bits of a float32 vector, for printing.
        independence: how the packets of different clients depend on each other: "deterministic" draws nothing;
            "independent" draws for each client, chain and round; "shared-permutation" is independent given a
            permutation that all share; "partition" splits the coordinates among the clients, so that every one of them
            must be heard.
        everyone: whether all clients must take part.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["unbiased", "contractive"]]
    summary: ClassVar[str]
    constant: ClassVar[str]
    formula: ClassVar[str]
    independence: ClassVar[Independence]
    everyone: ClassVar[bool] = False

    @abstractmethod
    def omega(self, d: int) -> float:
        """The constant omega for vectors of d entries.

        Raises:
            ConfigError: if the compressor is contractive, not unbiased; or if its settings do not fit d.
        """

    def alpha(self, d: int) -> float:
        """The constant alpha for vectors of d entries; for an unbiased compressor, that of `Scaled` around it.

        Raises:
            ConfigError: if its settings do not fit d.
        """
        return 1.0 / (1.0 + self.omega(d))

    @abstractmethod
    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        """Compress (..., d) with keys of the same leading shape; NaN passes through, to be found as divergence."""

    @abstractmethod
    def decompress(self, packet: Packet, d: int) -> Tensor:
        """The vectors (..., d) that the receiver sees."""

    def add_to(self, memory: Tensor, packet: Packet, scale: float) -> None:
        """Add scale * decompress(packet) to memory, in place; a selection makes no dense vector for it."""
        memory.add_(self.decompress(packet, memory.shape[-1]), alpha=scale)

    @abstractmethod
    def count(self, d: int) -> int:
        """Number of values that travel for a d-vector."""

    def support(self, keys: PacketKeys, d: int) -> Tensor | None:
        """Coordinates (..., K) that travel, if both ends derive them from the keys; None otherwise."""
        return None

    def inclusion(self, d: int) -> float:
        """Probability q that a given coordinate travels; for quantisers, the q whose 1/q - 1 is their constant."""
        return self.alpha(d)

    def typical(self, d: int) -> float:
        """The q that predictions use: `inclusion` or, if that is a worst case, its mean over normal entries.

        For a contractive compressor, a memory lags (1 - q) / q rounds behind a random walk of normal steps.
        """
        return self.inclusion(d)

    def lags(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rounds (d,) by which a memory lags behind a random walk whose steps have these mean squares (d,)."""
        return np.full(len(squares), 1 / self.typical(len(squares)) - 1)

    def noise(self, squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean variance (d,) that it adds to normal entries of these mean squares (d,)."""
        result: NDArray[np.float64] = (1 / self.typical(len(squares)) - 1) * squares
        return result

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Packet:
        """Packets of zero vectors (..., d), with the usual shapes and dtypes: the initial value of a memory."""
        values = torch.zeros((*shape[:-1], self.count(shape[-1])), dtype=dtype, device=device)
        return Packet(values, None)

    @abstractmethod
    def bits(self, d: int, dtype: torch.dtype) -> int:
        """Exact bits on the wire of one compressed d-vector, padding included: 8 * len(to_bytes(...))."""

    def idealised_bits(self, d: int, dtype: torch.dtype) -> float:
        """Bits as papers count them, without padding to bytes."""
        return float(self.bits(d, dtype))

    @abstractmethod
    def to_bytes(self, packet: Packet) -> bytes:
        """Encode one packet, little endian. Indices that follow from the keys never travel.

        Raises:
            DataError: if a value is NaN or infinite, which must not enter another party's sum.
        """

    @abstractmethod
    def parse(self, data: bytes, d: int, dtype: torch.dtype) -> Packet:
        """Decode what `to_bytes` wrote, without the indices that follow from keys.

        Raises:
            DataError: if the length is not that of a packet for d, a value is not finite, or a code or index is out of
                range.
        """

    def from_bytes(self, data: bytes, keys: PacketKeys, d: int, dtype: torch.dtype) -> Packet:
        """Decode what `to_bytes` wrote, with its indices rebuilt from the keys (of one client and chain).

        Raises:
            DataError: as `parse` does.
        """
        packet = self.parse(data, d, dtype)
        return packet if packet.indices is not None else packet._replace(indices=self.support(keys, d))


def float_bits(dtype: torch.dtype) -> int:
    """Bits of one number of the dtype, 32 or 64."""
    return 8 * _NUMPY[dtype].itemsize


def contractive_only(name: str) -> ConfigError:
    """Make the error that `omega` of a contractive compressor raises."""
    return ConfigError(
        f"compressor {name} is contractive, not unbiased: it has no omega; use it where alpha is asked for (ef21, "
        "ef21-p), or choose an unbiased one such as randk, qsgd or natural"
    )


def require_length(data: bytes, want: int, what: str) -> None:
    """Refuse a message of the wrong length.

    Raises:
        DataError: if it is not `want` bytes.
    """
    if len(data) != want:
        raise DataError(f"a packet of {len(data)} bytes, expected {want} ({what}); both ends need the same settings")


def finite(values: Tensor) -> bool:
    """Whether all values are finite; checks their sum first, which is finite only if they are."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def values_to_bytes(values: Tensor) -> bytes:
    """Encode a float32 or float64 tensor, little endian.

    Raises:
        DataError: if a value is not finite.
    """
    if not finite(values):
        raise DataError("a packet holds NaN or infinite values; the gradient that made it is not finite")
    plain: bytes = values.detach().cpu().contiguous().numpy().astype(_NUMPY[values.dtype], copy=False).tobytes()
    return plain


def values_from_bytes(data: bytes, count: int, dtype: torch.dtype) -> Tensor:
    """Decode (count,) values from little-endian bytes.

    Raises:
        DataError: if the length is wrong or a value is not finite.
    """
    form = _NUMPY[dtype]
    if len(data) != count * form.itemsize:
        raise DataError(f"a packet of {len(data)} bytes, expected {count * form.itemsize} ({count} values of {form})")
    array = np.frombuffer(data, dtype=form)
    if not array.flags.writeable or not form.isnative:  # bytes are read-only and shared; the receiver needs a copy
        array = array.astype(form.newbyteorder("="))
    values = torch.from_numpy(array)
    if not finite(values):
        raise DataError("a packet holds NaN or infinite values and is refused")
    return values


def resolve_count(k: int | float, d: int, what: str) -> int:
    """Convert `k` to a number of coordinates: an integer is a count, a float a fraction of d (at least one).

    Raises:
        ConfigError: if k is outside 1..d or (0, 1].
    """
    if isinstance(k, int) and not isinstance(k, bool):
        if not 1 <= k <= d:
            raise ConfigError(f"{what}: k = {k} coordinates of {d} parameters; choose 1 <= k <= {d}, or a fraction")
        return k
    if isinstance(k, bool) or not 0 < k <= 1:
        raise ConfigError(f"{what}: k = {k} is read as a fraction and must lie in (0, 1]; a count is an integer")
    return max(1, round(k * d))
