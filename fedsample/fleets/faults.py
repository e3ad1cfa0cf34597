"""Simulated faults: clients that leave for a while, replies that get lost, all by key.

A present client leaves with probability `dropout` a round and stays away a geometric number of rounds with mean
`dropout_rounds`; a reply gets lost with probability `loss` after the client has computed it. The probabilities are
known to the server, which scales by them. The first round is drawn from the stationary law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsample.random import key


@dataclass(frozen=True)
class Faults:
    """What goes wrong between a server and n clients.

    Attributes:
        n: clients.
        seed: the experiment's.
        loss: probability in [0, 1) that a reply is lost.
        dropout: probability in [0, 1) that a present client leaves.
        dropout_rounds: mean rounds away, >= 1.
    """

    n: int
    seed: int
    loss: float = 0.0
    dropout: float = 0.0
    dropout_rounds: float = 10.0

    @property
    def any(self) -> bool:
        """Whether anything can go wrong."""
        return self.loss > 0 or self.dropout > 0

    @property
    def presence(self) -> float:
        """Stationary probability that a client is present."""
        back = 1.0 / self.dropout_rounds
        return back / (back + self.dropout)

    def present(self, round: int, before: Tensor | None) -> Tensor:
        """(n,) bool, who is present in a round, given who was in the round before."""
        if self.dropout == 0:
            return torch.ones(self.n, dtype=torch.bool)
        coin = self._uniform(round, "presence")
        if before is None:
            return coin < self.presence
        return torch.where(before, coin >= self.dropout, coin < 1.0 / self.dropout_rounds)

    def delivered(self, round: int) -> Tensor:
        """(n,) bool, whose reply gets through."""
        if self.loss == 0:
            return torch.ones(self.n, dtype=torch.bool)
        return self._uniform(round, "loss") >= self.loss

    def attempts(self, round: int) -> Tensor:
        """(n,) int64, how often each reply is sent until it gets through, where the round must wait for it."""
        if self.loss == 0:
            return torch.ones(self.n, dtype=torch.int64)
        coin = 1.0 - self._uniform(round, "attempts")  # in (0, 1]
        return 1 + torch.floor(torch.log(coin) / torch.log(torch.tensor(self.loss))).to(torch.int64)

    def _uniform(self, round: int, purpose: str) -> Tensor:
        return key(self.seed, round, torch.arange(self.n), purpose=f"faults/{purpose}").uniform(1).squeeze(-1)


@dataclass(frozen=True)
class Recorded(Faults):
    """What went wrong in another run.

    Everyone is asked, and what comes from who did not take part then is lost: memories go the same way.

    Attributes:
        arrivals: the clients whose uploads were applied, by round, where these were not all that were asked.
    """

    arrivals: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether anything went wrong, or could have."""
        return True

    def present(self, round: int, before: Tensor | None) -> Tensor:
        """(n,) bool: everyone."""
        return torch.ones(self.n, dtype=torch.bool)

    def delivered(self, round: int) -> Tensor:
        """(n,) bool, whose upload was applied."""
        mask = torch.ones(self.n, dtype=torch.bool)
        if round in self.arrivals:
            mask[:] = False
            mask[list(self.arrivals[round])] = True
        return mask

    def attempts(self, round: int) -> Tensor:
        """(n,) int64: each reply is sent once."""
        return torch.ones(self.n, dtype=torch.int64)
