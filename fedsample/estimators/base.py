"""The uplink interface: how the sum of the clients' gradients reaches the server, client half beside server half.

The client half maps (oracle, memory, turn) to (upload, memory); the server half maps (state, sum of decoded uploads)
to (estimate, state). Arrays are (..., C, d): (C, d) on a device, (n, C, d) where one process plays n clients, with the
same code. The server sees sums of decoded uploads only, never one client's.

Memories commit in two steps: what an upload would change is kept pending, and the next request says in which round
the server last applied an upload of this client. If that is the pending one it is committed, otherwise dropped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from fedsample.compression import Compressor, Packet, PacketKeys, values_from_bytes, values_to_bytes
from fedsample.errors import DataError
from fedsample.estimators.packets import chain_of, fill_chain


class Oracle(Protocol):
    """Gradients on request, in the coordinates in which the chain moves.

    Attributes:
        full: whether every gradient uses all rows, so that one computed in the last round is still valid.
    """

    @property
    def full(self) -> bool:
        """Whether every gradient uses all rows."""
        ...

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        """Compute the gradient of U_i at `point` (C, d) -> (..., C, d), on this round's minibatch unless `full`.

        All calls in a round use the same minibatch.
        """
        ...

    def anchor(self) -> Tensor:
        """Compute the gradient of U_i at the origin of the metric's coordinates, on all rows -> (..., 1, d)."""
        ...


@dataclass(frozen=True)
class Turn:
    """One round's request to a client.

    Attributes:
        round: the round, 1, 2, ...
        point: (C, d) where the gradient is wanted.
        previous: (C, d) the point of the previous round; None where the uplink does not need it.
        sync: (C,) bool, chains for which a dense upload is wanted; None: none.
        active: (..., C) bool, chains that ask this client; None: all. For the others it sends nothing and leaves
            memories untouched.
        applied: (...) int64, or int: the last round in which the server applied an upload of this client (0: never).
        epoch: the server's memory epoch; a client whose memory belongs to another one starts from zero.
        keys: the random keys that this client shares with the server.
    """

    round: int
    point: Tensor
    previous: Tensor | None
    sync: Tensor | None
    active: Tensor | None
    applied: Tensor | int
    epoch: int
    keys: PacketKeys


class Upload(NamedTuple):
    """What a client sends: for each chain a compressed packet or, where `sync` was set, a dense vector.

    Attributes:
        packet: (..., C, K); None if all chains synchronise.
        dense: (..., C, d), meaningful for the synchronising chains; None if there are none.
    """

    packet: Packet | None
    dense: Tensor | None


Memory = dict[str, Tensor]  # a client's memory by name; leading axes as the arrays have, so that a fleet can stack it
ServerState = dict[str, Tensor]  # the server's state by name, O(C d)


class Uplink(ABC):
    """An estimator of the sum of gradients, around a compressor."""

    name: ClassVar[str]
    needs_previous: ClassVar[bool] = False
    needs_everyone_to_sync: ClassVar[bool] = False
    resyncs: ClassVar[bool] = False  # whether a dense round of all clients restores it after a client lost its memory
    reference: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    @abstractmethod
    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
        """Create a client's memory before round 1; shape is (..., C, d)."""

    @abstractmethod
    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        """Do the client's half of a round; may change the memory passed in, which must not be used again."""

    @abstractmethod
    def start(self, chains: int, d: int, device: torch.device) -> ServerState:
        """Create the server's state before round 1."""

    @abstractmethod
    def decode(
        self, state: ServerState, total: Tensor, sync: Tensor | None, inclusion: float
    ) -> tuple[Tensor, ServerState]:
        """Do the server's half of a round: estimate the summed gradient (C, d).

        Args:
            state: from `start` or the round before.
            total: (C, d) sum of the decoded uploads that arrived.
            sync: (C,) bool, chains whose uploads were dense; None: none.
            inclusion: probability that a client's upload arrives.
        """

    def forget(self, state: ServerState) -> ServerState:
        """The server's state after every client has lost its memory and starts a new one, in a new epoch."""
        return state

    def sync_probability(self, round: int, d: int) -> float:
        """Probability that a chain synchronises (dense uploads) in this round, independently of the others."""
        return 0.0

    def decompress(self, upload: Upload, sync: Tensor | None, active: Tensor | None, d: int) -> Tensor:
        """Decode uploads into the vectors (..., C, d) that the server adds."""
        if upload.packet is None:
            dense = _required(upload.dense)
        else:
            dense = self.compressor.decompress(upload.packet, d)
            if upload.dense is not None and sync is not None:
                dense = torch.where(sync.unsqueeze(-1), upload.dense, dense)
        return dense if active is None else torch.where(active.unsqueeze(-1), dense, 0.0)

    def bits(self, chains: int, syncing: int, d: int, dtype: torch.dtype) -> int:
        """Bits on the wire for one client, `syncing` of whose `chains` active chains send dense vectors."""
        dense = 8 * d * torch.empty((), dtype=dtype).element_size()
        return (chains - syncing) * self.compressor.bits(d, dtype) + syncing * dense

    def to_bytes(self, upload: Upload, sync: Tensor | None, active: Tensor | None) -> bytes:
        """Encode one client's upload (C chains): the active chains' packets or dense vectors, in order."""
        parts = []
        for chain in range(_chains(upload)):
            if active is not None and not bool(active[chain]):
                continue
            if upload.packet is None or (sync is not None and bool(sync[chain])):
                parts.append(values_to_bytes(_required(upload.dense)[chain]))
            else:
                parts.append(self.compressor.to_bytes(chain_of(upload.packet, chain)))
        return b"".join(parts)

    def from_bytes(self, data: bytes, turn: Turn, d: int, dtype: torch.dtype) -> Upload:
        """Decode one client's upload that `to_bytes` wrote; inactive chains come back as zeros.

        Raises:
            DataError: if the length is wrong or a value is not finite.
        """
        chains = turn.point.shape[0]
        width = dtype.itemsize
        dense = torch.zeros(chains, d, dtype=dtype) if turn.sync is not None and bool(turn.sync.any()) else None
        if chains == 1 and dense is None and turn.active is None and len(data) == self.compressor.bits(d, dtype) // 8:
            one = self.compressor.parse(data, d, dtype)
            if one.indices is None and one.side is None and one.length is None and one.values.dtype == dtype:
                # Plain values of a single chain, perhaps a whole large model: do not copy them into a stack.
                return Upload(Packet(one.values.unsqueeze(0), self.compressor.support(turn.keys, d)), None)
        packet = self.compressor.empty((chains, d), dtype)
        at = 0
        for chain in range(chains):
            if turn.active is not None and not bool(turn.active[chain]):
                continue
            syncing = dense is not None and turn.sync is not None and bool(turn.sync[chain])
            size = d * width if syncing else self.compressor.bits(d, dtype) // 8
            piece = data[at : at + size]
            at += size
            if syncing:
                _required(dense)[chain] = values_from_bytes(piece, d, dtype)
            else:
                fill_chain(packet, chain, self.compressor.parse(piece, d, dtype))
        if at != len(data):
            raise DataError(f"an upload of {len(data)} bytes, expected {at} for {chains} chains of {d} parameters")
        support = self.compressor.support(turn.keys, d)  # of all chains at once, if the keys determine it
        return Upload(packet if support is None else packet._replace(indices=support), dense)


def masked(packet: Packet, active: Tensor | None) -> Packet:
    """Set the chains of a packet that are not active (..., C) to zero."""
    if active is None:
        return packet
    keep = active.unsqueeze(-1)
    side = None if packet.side is None else torch.where(keep, packet.side, 0.0)
    return packet._replace(values=torch.where(keep, packet.values, 0), side=side)


def _chains(upload: Upload) -> int:
    return (upload.dense if upload.packet is None else upload.packet.values).shape[-2]  # type: ignore[union-attr]


def _required(dense: Tensor | None) -> Tensor:
    if dense is None:
        raise ValueError("an upload without its dense part: the request asked a chain to synchronise")
    return dense
