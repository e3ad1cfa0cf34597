"""The server's random numbers, keyed by chain and round: a sampler's draws, and coin flips for synchronising rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.random import SERVER, Key, key

_NOISE_BLOCK = 16  # rounds of noise drawn together; a round's values do not depend on it
_COIN_BLOCK = 64  # the same for the coin flips


class Noise:
    """Standard normals keyed by round and chain.

    Args:
        seed: the experiment's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block: tuple[object, Tensor] | None = None

    def at(self, round: int, like: Tensor) -> Tensor:
        """(C, d) standard normals of a round, in the shape and dtype of the positions."""
        block = max(1, min(_NOISE_BLOCK, (1 << 20) // max(1, like.numel())))
        index = (round - 1) // block
        case = index, like.shape, like.dtype, like.device
        if self._block is None or self._block[0] != case:
            chains, d = like.shape
            keys = key(
                self._seed,
                client=SERVER,
                chain=torch.arange(chains, device=like.device),
                purpose="noise",
                device=like.device,
            )
            rounds = torch.arange(index * block + 1, (index + 1) * block + 1, device=like.device).unsqueeze(-1)
            self._block = (case, keys.fold("round").fold(rounds).normal(d, like.dtype))
        return self._block[1][round - 1 - index * block]


class Keys:
    """A sampler's randomness in one step of its chains.

    Args:
        seed: the experiment's seed.
        step: 1, 2, ...; 0 before the first step.
        noise: draws the purpose "noise", many rounds at a time; None: it is drawn like any other purpose.
    """

    def __init__(self, seed: int, step: int, noise: Noise | None = None) -> None:
        self.step, self._seed, self._noise = step, seed, noise

    def normal(self, purpose: str, like: Tensor) -> Tensor:
        """(C, d) standard normals in the shape and dtype of the positions `like`."""
        if purpose == "noise" and self._noise is not None and self.step:
            return self._noise.at(self.step, like)
        return self._key(purpose, like).normal(like.shape[1], like.dtype)

    def uniform(self, purpose: str, like: Tensor) -> Tensor:
        """(C,) float64, uniform in [0, 1), one for each chain of the positions `like`."""
        return self._key(purpose, like).uniform(1)[:, 0]

    def _key(self, purpose: str, like: Tensor) -> Key:
        chains = torch.arange(len(like), device=like.device)
        made = key(self._seed, client=SERVER, chain=chains, purpose=purpose, device=like.device)
        return made.fold("round").fold(self.step) if self.step else made


class SyncCoins:
    """Decides by a coin flip per round and chain which chains synchronise.

    Args:
        seed: the experiment's seed.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._block: tuple[tuple[int, float], Tensor, list[bool]] | None = None

    def at(self, round: int, probability: float, chains: int, device: torch.device) -> Tensor | None:
        """(C,) bool, the chains that synchronise in this round; None: none."""
        if probability == 0:
            return None
        if probability == 1:
            return torch.ones(chains, dtype=torch.bool, device=device)
        case = (round // _COIN_BLOCK, probability)
        if self._block is None or self._block[0] != case:
            rounds = torch.arange(case[0] * _COIN_BLOCK, (case[0] + 1) * _COIN_BLOCK).unsqueeze(-1)
            coins = key(self._seed, rounds, SERVER, torch.arange(chains), "sync").bernoulli(probability)  # (rounds, C)
            self._block = (case, coins.to(device), coins.any(-1).tolist())
        at = round % _COIN_BLOCK
        return self._block[1][at] if self._block[2][at] else None
