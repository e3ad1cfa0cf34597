"""Randomness by script: a chain of production code stands for one outcome of all the random bits of a round.

Only sources of randomness are replaced: the keys of masks, coins, cohorts and faults, and the noise. The weighted mean
over chains of anything quadratic in the state is then its exact expectation, and nothing is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import pytest
import torch
from moment_maps import Array
from rounding import agree
from torch import Tensor

from fedsample.compression import PacketKeys
from fedsample.fleets.local import LocalFleet
from fedsample.strategies import Driver, State

SUM = {"diana": "shift", "ef21": "estimate"}  # what the server calls its sum of the clients' memories


class Outcomes(NamedTuple):
    """All random bits of a round, an entry a chain; which replies are lost is shared: a message is lost whole."""

    weight: Tensor  # (C,)
    masks: Tensor  # (C, n): for each client, the number of its mask
    down: Tensor  # (C,): the number of the downlink's mask, at the end of the round
    coin: Tensor  # (C,) bool
    asked: Tensor  # (C, n) bool
    noise: Tensor  # (C, d)

    def __getitem__(self, chains: Any) -> Self:  # type: ignore[override]
        return type(self)(*(part[chains] for part in tuple(self)))


class Dice:
    """Stands for `fedsample.random.key` and `LinkKeys`: what a key would draw is looked up in a script.

    Args:
        rounds: for each round the outcomes, one per chain. masks: what the number of a mask means: coordinates of a
            subset, or the start of a block. order: the permutation of RandBlock. first: the first scripted round.
        lost: for each round whose reply is lost.
    """

    def __init__(
        self,
        rounds: Sequence[Outcomes],
        masks: Tensor,
        order: Sequence[int],
        first: int,
        lost: Sequence[tuple[bool, ...]],
    ) -> None:
        self.rounds = dict(enumerate(rounds, first))
        self.lost = dict(enumerate(lost, first))
        self.masks, self.order = masks, torch.tensor(order)

    def rule(self, patch: pytest.MonkeyPatch) -> None:
        """Put the script in the place of every key."""
        for module in ("fedsample.strategies.noise", "fedsample.strategies.cohort", "fedsample.fleets.faults"):
            patch.setattr(f"{module}.key", self.key)
        for module in ("fedsample.clients.client_stack", "fedsample.estimators.downlink"):
            patch.setattr(f"{module}.LinkKeys", self.link)

    def key(
        self, seed: int, round: int = -1, client: Any = None, chain: Any = None, purpose: str = "", device: Any = "cpu"
    ) -> Draws:
        if purpose == "momenta":  # of the start, which is overwritten
            return Draws(normal=lambda d, dtype: torch.zeros(len(chain), d, dtype=dtype))
        if purpose == "sync":  # coins are tossed for many rounds at once
            nothing = torch.zeros_like(next(iter(self.rounds.values())).coin)
            coins = torch.stack(
                [
                    self.rounds[int(at)].coin if int(at) in self.rounds else nothing
                    for at in torch.as_tensor(round).flatten()
                ]
            )
            return Draws(bernoulli=lambda p: coins | (p >= 1))
        if purpose == "cohort":
            asked = self.rounds[round].asked  # (C, n)
            return Draws(
                bernoulli=lambda p: asked.T.contiguous(),
                subset=lambda n, k: asked.nonzero()[:, 1].reshape(len(asked), k),
            )
        if purpose == "faults/loss":
            lost = torch.tensor(self.lost[round], dtype=torch.float64)
            return Draws(uniform=lambda n: (1 - lost).unsqueeze(-1) * (1 - 2.0**-53))
        assert purpose == "faults/attempts"
        return Draws(uniform=lambda n: torch.zeros(len(client), 1, dtype=torch.float64))

    def link(self, seed: int, clients: Any, chains: int, purpose: str, device: Any = "cpu") -> Dice.Link | Dice.Down:
        return Dice.Link(self, clients) if purpose == "uplink" else Dice.Down(self)

    @dataclass
    class Link:
        dice: Dice
        clients: Tensor

        def at(self, round: int, clients: Tensor | None = None) -> PacketKeys:
            mine = self.clients if clients is None else self.clients[clients]
            drawn = self.dice.rounds[round].masks.T[mine]  # (m, C)
            return self.dice.packet(self.dice.masks[drawn], round)

    @dataclass
    class Down:
        dice: Dice

        def at(self, round: int) -> PacketKeys:
            drawn = self.dice.rounds[round - 1].down  # (C,)
            return self.dice.packet(self.dice.masks[drawn], round)

    def packet(self, masks: Tensor, round: int) -> PacketKeys:
        own = Draws(subset=lambda d, k: masks, integers=lambda d, n: masks)
        return PacketKeys(own, Draws(permutation=lambda d: self.order), round)  # type: ignore[arg-type]

    def noise(self, round: int, like: Tensor) -> Tensor:
        return self.rounds[round].noise.to(like.dtype)


class Draws:
    """A key that draws what it was told to."""

    def __init__(self, **draws: Callable[..., Tensor]) -> None:
        self.__dict__.update(draws)

    def fold(self, value: object) -> Draws:
        return self


def combinations(*factors: Sequence[Any] | Tensor) -> list[Tensor]:
    """For each factor the positions (C,) in it, over every combination."""
    return [at.flatten() for at in torch.meshgrid(*(torch.arange(len(factor)) for factor in factors), indexing="ij")]


def signs(d: int) -> Tensor:
    """(2 d, d) +-sqrt(d) e_j, which together have mean zero and covariance I."""
    root = math.sqrt(d) * torch.eye(d, dtype=torch.float64)
    return torch.cat([root, -root])


def advance(sampler: Driver, fleet: LocalFleet, state: State) -> State:
    """One round."""
    request = sampler.request(state)
    return sampler.update(state, request, fleet.exchange(request))


def read(state: State, fleet: LocalFleet, uplink: str, rate: float, *, downlink: bool) -> Array:
    """(C, size) the state in the layout of `moment_maps`, momenta and both ends' memories included.

    Args:
        uplink: its name. rate: the share of a pending packet that enters a memory. downlink: whether it compresses.
    """
    parts = [torch.ones(len(state.params), 1, dtype=torch.float64), state.params, *state.kernel.values()]
    if downlink:
        parts.append(state.seen)
    if uplink == "marina":
        parts += [state.previous, state.uplink["estimate"]]
    if uplink in SUM:
        memory = fleet.state()
        shift, support = memory["memory.shift"].clone(), memory["memory.support"]
        applied = (memory["memory.round"] == state.applied) & (state.applied > 0)
        shift.scatter_add_(-1, support, memory["memory.pending"] * applied[:, None, None] * rate)
        agree(shift.sum(0), state.uplink[SUM[uplink]], 4 * len(shift) + 8, 2 * shift.abs().sum(0) + 1)
        parts += list(shift)
    return torch.cat(parts, dim=1).numpy()
