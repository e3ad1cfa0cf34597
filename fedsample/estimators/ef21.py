r"""EF21: error feedback by a memory that tracks the gradient through a contractive compressor.

    client  c_i = C( grad U_i(x_k) - g_i ),   g_i <- g_i + c_i
    server  g   <- g + sum_{i in S} c_i,      the estimate is g = sum_i g_i

Richtarik, Sokolov & Fatkhullin, NeurIPS 2021 (arXiv 2106.05203); under Langevin noise D-ELF and B-ELF: Karagulyan &
Richtarik 2023 (arXiv 2303.04622). The compressor may be biased (TopK). The estimate lags behind the gradient, which
widens the stationary law at first order in the step. Round 1 is dense and waits for everyone; later the memory of an
absent client stands for its gradient. Packets commit in two steps, as diana's do.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload, masked
from fedsample.estimators.committed_memory import empty_shift, pend, settle


class Ef21(Uplink):
    """EF21 estimator: compressed differences to a memory that is the estimate; needs a contractive compressor."""

    name: ClassVar[str] = "ef21"
    needs_everyone_to_sync: ClassVar[bool] = True
    resyncs: ClassVar[bool] = True
    reference: ClassVar[str] = "Richtarik, Sokolov & Fatkhullin 2021; Karagulyan & Richtarik 2023"
    summary: ClassVar[str] = "one packet per chain and round; d values in round 1"

    def sync_probability(self, round: int, d: int) -> float:
        """Round 1 is dense for every chain."""
        return 1.0 if round == 1 else 0.0

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
        """The memory g_i and the packet that is pending for it."""
        return empty_shift(self.compressor, shape, dtype, device)

    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        """Commit or drop the pending packet, then compress the difference to the memory; round 1 sends the gradient."""
        shape, dtype, device = memory["shift"].shape, memory["shift"].dtype, memory["shift"].device
        if turn.sync is not None:  # all chains synchronise, and the round waits for all clients: it is applied
            gradient = oracle.gradient(turn.point, full=True)
            nothing = self.compressor.empty(tuple(shape), dtype, device)
            return Upload(None, gradient), pend(gradient.clone(), nothing, memory, turn)
        shift = settle(self.compressor, memory, turn, 1.0)
        packet = masked(self.compressor.compress(oracle.gradient(turn.point) - shift, turn.keys), turn.active)
        return Upload(packet, None), pend(shift, packet, memory, turn)

    def start(self, chains: int, d: int, device: torch.device) -> ServerState:
        """The sum of the memories, set in round 1."""
        return {"estimate": torch.zeros(chains, d, dtype=torch.float64, device=device)}

    def forget(self, state: ServerState) -> ServerState:
        """The sum of memories is zero again; the estimate grows back as packets arrive."""
        return {"estimate": torch.zeros_like(state["estimate"])}

    def decode(
        self, state: ServerState, total: Tensor, sync: Tensor | None, inclusion: float
    ) -> tuple[Tensor, ServerState]:
        """Add the packets that arrived, unscaled, to the sum of memories: absent clients keep theirs."""
        estimate = total.to(torch.float64) if sync is not None else state["estimate"] + total
        return estimate, {"estimate": estimate}
