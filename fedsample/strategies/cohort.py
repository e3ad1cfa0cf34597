"""Client sampling: draws from keys which clients take part, per chain and round.

Every chain has its own cohort: a shared one would make the chains dependent, and diagnostics that compare chains count
on their independence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.random import SERVER, key


@dataclass(frozen=True)
class Cohort:
    """Draws the clients that take part in a round.

    Attributes:
        n: number of clients.
        chains: number of chains C.
        seed: the experiment's seed.
        size: a float in (0, 1], the probability with which each client takes part, independently; or an integer
            1..n, the size of a cohort drawn uniformly without replacement.

    Raises:
        ConfigError: if the size is out of range.
    """

    n: int
    chains: int
    seed: int
    size: float | int = 1.0

    def __post_init__(self) -> None:
        whole = isinstance(self.size, int)
        if not (1 <= self.size <= self.n if whole else 0 < self.size <= 1):
            raise ConfigError(
                f"fleet.participation = {self.size}: choose a probability in (0, 1] or a cohort of 1..{self.n} clients"
            )

    @property
    def probability(self) -> float:
        """Probability that a given client takes part for a given chain."""
        return self.size / self.n if isinstance(self.size, int) else self.size

    def active(self, round: int, sync: Tensor | None, everyone_syncs: bool) -> Tensor | None:
        """Draw the participants of a round: (n, C) bool per client and chain; None: all clients for all chains.

        Args:
            round: the round, 1, 2, ...
            sync: (C,) bool, the chains that synchronise; None: none.
            everyone_syncs: whether a synchronising chain needs every client.
        """
        if self.probability == 1.0:
            return None
        if isinstance(self.size, int):
            chosen = key(self.seed, round, SERVER, torch.arange(self.chains), "cohort").subset(self.n, self.size)
            active = torch.zeros(self.chains, self.n, dtype=torch.bool).scatter_(1, chosen, True).T.contiguous()
        else:
            clients, chains = torch.arange(self.n).unsqueeze(-1), torch.arange(self.chains)
            active = key(self.seed, round, clients, chains, "cohort").bernoulli(self.size)
        if sync is not None and everyone_syncs:
            active = active | sync.cpu()
        return active
