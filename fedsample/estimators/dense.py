"""Every client sends its whole gradient.

    g = (1 / pi) sum_{i in S} grad U_i(x),   pi = P(i in S),

exact when all take part, unbiased otherwise (Welling & Teh 2011 with clients for minibatches).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedsample.compression import Compressor, Identity
from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload, masked


class Dense(Uplink):
    """Uncompressed gradients; no memory on either side."""

    name: ClassVar[str] = "dense"
    reference: ClassVar[str] = "Welling & Teh 2011"
    summary: ClassVar[str] = "d values per chain and round"

    def __init__(self, compressor: Compressor | None = None) -> None:
        super().__init__(compressor or Identity())

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
        """No memory is needed."""
        return {}

    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        """Send the gradient at the point."""
        packet = self.compressor.compress(oracle.gradient(turn.point), turn.keys)
        return Upload(masked(packet, turn.active), None), memory

    def start(self, chains: int, d: int, device: torch.device) -> ServerState:
        """No state is needed."""
        return {}

    def decode(
        self, state: ServerState, total: Tensor, sync: Tensor | None, inclusion: float
    ) -> tuple[Tensor, ServerState]:
        """Divide the sum by the probability of arriving."""
        return total / inclusion, state
