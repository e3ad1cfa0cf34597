r"""MARINA: compressed gradient differences, and dense rounds at random.

    c_k ~ Bernoulli(p), for each chain
    c_k = 1 :  g_k = sum_i grad U_i(x_k)
    c_k = 0 :  g_k = g_{k-1} + (1 / pi) sum_{i in S} Q_i( grad U_i(x_k) - grad U_i(x_{k-1}) )

Gorbunov, Burlachenko, Li & Richtarik, ICML 2021 (arXiv 2102.07845); with Langevin noise: Sun, Salim & Richtarik 2022
(arXiv 2206.00920). Both gradients of a difference use one minibatch, or its noise would be O(1). Under client
sampling the difference is recomputed at the two points of the request, so no client memory can be stale; a
synchronising round needs every client. The last gradient is kept only to save recomputing it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedsample.compression import Compressor
from fedsample.errors import ConfigError
from fedsample.estimators.base import Memory, Oracle, ServerState, Turn, Uplink, Upload, masked


class Marina(Uplink):
    """MARINA estimator; needs an unbiased compressor.

    Args:
        compressor: an unbiased compressor.
        p: probability of a dense round, 0 < p <= 1; None: bits of a compressed over those of a dense float32 vector
            (K / d for randk), for which dense and compressed rounds cost the same on average.

    Raises:
        ConfigError: if p is out of range.
    """

    name: ClassVar[str] = "marina"
    needs_previous: ClassVar[bool] = True
    needs_everyone_to_sync: ClassVar[bool] = True
    resyncs: ClassVar[bool] = True
    reference: ClassVar[str] = "Gorbunov et al. 2021; Sun, Salim & Richtarik 2022"
    summary: ClassVar[str] = "p d + (1 - p) K values per chain and round"

    def __init__(self, compressor: Compressor, p: float | None) -> None:
        super().__init__(compressor)
        if p is not None and not 0 < p <= 1:
            raise ConfigError(f"uplink.p = {p}: the probability of a synchronising round must lie in (0, 1]")
        self._p = p
        self._shares: dict[int, float] = {}  # by d: it is needed several times per round

    def probability(self, d: int) -> float:
        """The probability p of a dense round for vectors of d entries."""
        if self._p is not None:
            return self._p
        if d not in self._shares:
            self._shares[d] = min(1.0, self.compressor.bits(d, torch.float32) / (32 * d))
        return self._shares[d]

    def sync_probability(self, round: int, d: int) -> float:
        """1 in round 1, then p."""
        return 1.0 if round == 1 else self.probability(d)

    def memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Memory:
        """The gradient at the last point and the round in which it was computed (0: never)."""
        return {
            "gradient": torch.zeros(shape, dtype=dtype, device=device),
            "round": torch.zeros(shape[:-2], dtype=torch.int64, device=device),
        }

    def encode(self, oracle: Oracle, memory: Memory, turn: Turn) -> tuple[Upload, Memory]:
        """Send a compressed difference or, if the chain synchronises, the dense gradient."""
        here = oracle.gradient(turn.point)
        dense = packet = None
        if turn.sync is not None:
            dense = here if oracle.full else oracle.gradient(turn.point, full=True)
        if turn.previous is not None:
            fresh = oracle.full and bool((memory["round"] == turn.round - 1).all())
            before = memory["gradient"] if fresh else oracle.gradient(turn.previous)
            packet = masked(self.compressor.compress(here - before, turn.keys), turn.active)
        elif turn.sync is None or not bool(turn.sync.all()):
            raise ValueError(f"marina in round {turn.round}: no previous point, and not every chain synchronises")
        return Upload(packet, dense), {"gradient": here, "round": memory["round"].fill_(turn.round)}

    def start(self, chains: int, d: int, device: torch.device) -> ServerState:
        """The estimate; round 1, which is dense, sets it."""
        return {"estimate": torch.zeros(chains, d, dtype=torch.float64, device=device)}

    def decode(
        self, state: ServerState, total: Tensor, sync: Tensor | None, inclusion: float
    ) -> tuple[Tensor, ServerState]:
        """Add the scaled sum of differences to the last estimate, or take the sum of dense gradients."""
        estimate = state["estimate"] + (total if inclusion == 1 else total / inclusion)
        if sync is not None:
            estimate = torch.where(sync.unsqueeze(-1), total.to(estimate.dtype), estimate)
        return estimate, {"estimate": estimate}
