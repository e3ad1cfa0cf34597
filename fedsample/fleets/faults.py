"""Simulated faults: clients that leave for a while and replies that are lost, drawn by key.

A present client leaves with probability `dropout` per round and stays away a geometric number of rounds with mean
`dropout_rounds`; a reply is lost with probability `loss` after the client has computed it. The server knows these
probabilities and scales by them. Presence in the first round is drawn from its stationary law.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedsample.random import key


@dataclass(frozen=True)
class Faults:
    """The faults between a server and n clients.

    Attributes:
        n: number of clients.
        seed: the experiment's seed.
        loss: probability in [0, 1) that a reply is lost.
        dropout: probability in [0, 1) that a present client leaves.
        dropout_rounds: mean number of rounds away, >= 1.
    """

    n: int
    seed: int
    loss: float = 0.0
    dropout: float = 0.0
    dropout_rounds: float = 10.0

    @property
    def any(self) -> bool:
        """Whether any fault can occur."""
        return self.loss > 0 or self.dropout > 0

    @property
    def presence(self) -> float:
        """Stationary probability that a client is present."""
        back = 1.0 / self.dropout_rounds
        return back / (back + self.dropout)

    def present(self, round: int, before: Tensor | None) -> Tensor:
        """(n,) bool, clients present in a round, given those present in the round before."""
        if self.dropout == 0:
            return torch.ones(self.n, dtype=torch.bool)
        coin = self._uniform(round, "presence")
        if before is None:
            return coin < self.presence
        return torch.where(before, coin >= self.dropout, coin < 1.0 / self.dropout_rounds)

    def delivered(self, round: int) -> Tensor:
        """(n,) bool, clients whose reply arrives."""
        if self.loss == 0:
            return torch.ones(self.n, dtype=torch.bool)
        return self._uniform(round, "loss") >= self.loss

    def attempts(self, round: int) -> Tensor:
        """(n,) int64, how often each reply is sent until it arrives, if the round must wait for it."""
        if self.loss == 0:
            return torch.ones(self.n, dtype=torch.int64)
        coin = 1.0 - self._uniform(round, "attempts")  # in (0, 1]
        return 1 + torch.floor(torch.log(coin) / torch.log(torch.tensor(self.loss))).to(torch.int64)

    def _uniform(self, round: int, purpose: str) -> Tensor:
        return key(self.seed, round, torch.arange(self.n), purpose=f"faults/{purpose}").uniform(1).squeeze(-1)


@dataclass(frozen=True)
class Recorded(Faults):
    """The faults of another run, replayed.

    Every client is asked, and replies of clients that did not take part are lost: memories evolve as they did.

    Attributes:
        arrivals: by round, the clients whose uploads were applied, if these were not all that were asked.
    """

    arrivals: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether any fault occurred, or could have."""
        return True

    def present(self, round: int, before: Tensor | None) -> Tensor:
        """(n,) bool: all clients."""
        return torch.ones(self.n, dtype=torch.bool)

    def delivered(self, round: int) -> Tensor:
        """(n,) bool, clients whose upload was applied."""
        mask = torch.ones(self.n, dtype=torch.bool)
        if round in self.arrivals:
            mask[:] = False
            mask[list(self.arrivals[round])] = True
        return mask

    def attempts(self, round: int) -> Tensor:
        """(n,) int64: each reply is sent once."""
        return torch.ones(self.n, dtype=torch.int64)
