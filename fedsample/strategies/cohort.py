"""Client sampling by the server: which clients are asked, for each chain and round, by key.

Every chain has a cohort of its own: one cohort for all chains would make them dependent, and no diagnostic could trust
their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.random import SERVER, key


@dataclass(frozen=True)
class Cohort:
    """Who is asked.

    Attributes:
        n: clients.
        chains: C.
        seed: the experiment's.
        size: a float in (0, 1], the probability with which each client is asked, independently; or an integer 1..n, the
            size of a cohort drawn uniformly without replacement.

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
        """The probability that a given client is asked for a given chain."""
        return self.size / self.n if isinstance(self.size, int) else self.size

    def active(self, round: int, sync: Tensor | None, everyone_syncs: bool) -> Tensor | None:
        """(n, C) bool, who is asked for which chain; None: everyone for all.

        Args:
            round: 1, 2, ...
            sync: (C,) chains that synchronise.
            everyone_syncs: whether those need every client.
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
