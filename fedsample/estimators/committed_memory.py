"""A memory that tracks a vector by compressed differences, and commits them in two steps.

Both ends add the same packets: the client to its own memory, the server to the sum over clients. What an upload would
add stays pending until the next request says that the server applied it; otherwise it is dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.compression import Compressor, Packet
from fedsample.estimators.base import Memory, Turn, masked


def empty_shift(compressor: Compressor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
    """Create a memory: shift 0 (..., C, d), a pending packet of zeros, its round (0: none), and the memory's epoch."""
    return {
        "shift": torch.zeros(shape, dtype=dtype, device=device),
        **_parts(compressor.empty(shape, dtype, device)),
        "round": torch.zeros(shape[:-2], dtype=torch.int64, device=device),
        "epoch": torch.zeros(shape[:-2], dtype=torch.int64, device=device),
    }


def settle(compressor: Compressor, memory: Memory, turn: Turn, rate: float) -> Tensor:
    """Add the pending packet, times `rate`, to the shift (..., C, d), or drop it; a new epoch starts at zero."""
    shift = memory["shift"]
    pending = Packet(memory["pending"], memory.get("support"), memory.get("side"), shift.shape[-1])
    current = memory["epoch"] == turn.epoch
    if not bool(current.all()):
        shift = torch.where(current[..., None, None], shift, 0.0)
    applied = current & (memory["round"] == turn.applied)  # before round 1 both are 0, and the packet is empty
    if not bool(applied.all()):
        pending = masked(pending, applied.unsqueeze(-1))
    compressor.add_to(shift, pending, rate)
    return shift


def pend(shift: Tensor, packet: Packet, memory: Memory, turn: Turn) -> Memory:
    """Hold a packet in memory until the server says whether it was applied."""
    return {
        "shift": shift,
        **_parts(packet),
        "round": torch.full_like(memory["round"], turn.round),
        "epoch": torch.full_like(memory["epoch"], turn.epoch),
    }


def _parts(packet: Packet) -> Memory:
    parts = {"pending": packet.values, "support": packet.indices, "side": packet.side}
    return {name: part for name, part in parts.items() if part is not None}
