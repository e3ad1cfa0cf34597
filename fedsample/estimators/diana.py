r"""DIANA: compress the difference between the gradient and a memory that both ends keep.

    client  m_i = Q_i( grad U_i(x_k) - h_i ),                     h_i <- h_i + alpha m_i
    server  g_k = sum_i h_i + (1 / pi) sum_{i in S} m_i,          sum_i h_i <- sum_i h_i + alpha sum_{i in S} m_i

with alpha = 1 / (1 + omega). Mishchenko, Gorbunov, Takac & Richtarik 2019 (arXiv 1901.09269); as QLSD's memory under
Langevin noise: Vono et al., AISTATS 2022 (arXiv 2106.00797). Absent clients enter through their memories, so the
estimate stays unbiased under client sampling and the compression noise vanishes with the gradient's motion.

Two-step commit: m_i waits as pending until the server says that it applied it. Without that, one lost reply in a
hundred lets the two sums of memories drift apart for good.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload, masked
from fedsample.estimators.committed_memory import empty_shift, pend, settle


class Diana(Uplink):
    """DIANA estimator: compressed differences to a memory; needs an unbiased compressor."""

    name: ClassVar[str] = "diana"
    reference: ClassVar[str] = "Mishchenko et al. 2019; Vono et al. 2022"
    summary: ClassVar[str] = "one packet per chain and round"

    def rate(self, d: int) -> float:
        """The memory's learning rate alpha = 1 / (1 + omega)."""
        return 1.0 / (1.0 + self.compressor.omega(d))

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
        """The shift h_i and the packet that is pending for it."""
        return empty_shift(self.compressor, shape, dtype, device)

    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        """Commit or drop the pending packet, then compress the difference to the memory."""
        shift = settle(self.compressor, memory, turn, self.rate(memory["shift"].shape[-1]))
        packet = masked(self.compressor.compress(oracle.gradient(turn.point) - shift, turn.keys), turn.active)
        return Upload(packet, None), pend(shift, packet, memory, turn)

    def start(self, chains: int, d: int, device: torch.device) -> ServerState:
        """The sum of the clients' memories, zero."""
        return {"shift": torch.zeros(chains, d, dtype=torch.float64, device=device)}

    def forget(self, state: ServerState) -> ServerState:
        """The sum of memories is zero again."""
        return {"shift": torch.zeros_like(state["shift"])}

    def decode(
        self, state: ServerState, total: Tensor, sync: Tensor | None, inclusion: float
    ) -> tuple[Tensor, ServerState]:
        """Add the scaled sum of differences to the memories; the memories change by alpha times the unscaled sum."""
        shift = state["shift"]
        return shift + total / inclusion, {"shift": shift + total.to(shift.dtype) * self.rate(shift.shape[-1])}
