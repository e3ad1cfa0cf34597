r"""Direct compression: every client sends its compressed gradient, less the part that the server knows already.

    g = A + (1 / pi) sum_{i in S} Q_i( H_i(x_k) - a_i ),   A = sum_i a_i

With a_i = 0 this is QLSD: its noise grows with how much the clients disagree, at first order in the step. With
a_i = grad U_i(theta*) for a fixed reference theta*, whose sum A the server measured once (it is never exactly zero), it
is QLSD*: the disagreement is gone. H_i is the gradient or an unbiased estimate of it. Vono et al., AISTATS 2022 (arXiv
2106.00797). There is no memory to lose, but the probability of arriving must be known.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedsample.compression import Compressor
from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload, masked


class Direct(Uplink):
    """Compressed gradients without memory; needs an unbiased compressor.

    Args:
        compressor: an unbiased compressor.
        anchored: whether the clients subtract their gradients at the reference, which is the origin of the metric's
            coordinates (the mode).
    """

    name: ClassVar[str] = "direct"
    reference: ClassVar[str] = "Vono et al. 2022"
    summary: ClassVar[str] = "one packet per chain and round"

    def __init__(self, compressor: Compressor, anchored: bool = False) -> None:
        super().__init__(compressor)
        self.anchored = anchored

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
        """No memory is needed: the gradient at the reference follows from the data; a cache only saves work."""
        return {}

    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        """Compress the gradient, less the one at the reference if anchored."""
        gradient = oracle.gradient(turn.point)
        if self.anchored:
            gradient = gradient - oracle.anchor()
        return Upload(masked(self.compressor.compress(gradient, turn.keys), turn.active), None), memory

    def start(self, chains: int, d: int, device: torch.device) -> ServerState:
        """The sum of the gradients at the reference, zero until `anchor` sets it."""
        return {"anchor": torch.zeros(d, dtype=torch.float64, device=device)}

    def anchor(self, state: ServerState, total: Tensor) -> ServerState:
        """Set the summed gradient (d,) at the reference."""
        return {"anchor": total.to(torch.float64)} if self.anchored else state

    def decode(
        self, state: ServerState, total: Tensor, sync: Tensor | None, inclusion: float
    ) -> tuple[Tensor, ServerState]:
        """Add the scaled sum of what arrived to the gradient at the reference."""
        return state["anchor"] + total / inclusion, state
