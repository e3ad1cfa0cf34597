"""Compressors: supports that both ends share, independent of everyone else's, and RandBlock's permutation."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compression_draws import FLOAT64, EveryOffset
from torch import Tensor

from fedsample.compression import Compressor, LinkKeys, PacketKeys, RandBlock, RandK
from fedsample.random import key

# --- supports: shared by the two ends, independent of everyone else's -------------------------------------------------


def assert_independent_supports(compressor: Compressor) -> None:
    """Two supports of different clients, chains or rounds overlap as independent ones do: K^2 / d on average."""
    d, n, chains, rounds = 12, 6, 3, 200
    k = compressor.count(d)
    link = LinkKeys(1, torch.arange(n), chains, "uplink")
    member = torch.zeros(rounds, n, chains, d, dtype=FLOAT64)
    for r in range(rounds):
        support = compressor.support(link.at(r + 1), d)
        assert support is not None
        member[r] = torch.zeros(n, chains, d, dtype=FLOAT64).scatter_(-1, support.expand(n, chains, k), 1.0)
    pairs = {
        "client": member[:, :-1] * member[:, 1:],
        "distant client": member[:, 0] * member[:, -1],
        "chain": member[:, :, :-1] * member[:, :, 1:],
        "round": member[:-1] * member[1:],
        "distant round": member[:-10] * member[10:],
    }
    wrong = {}
    for name, both in pairs.items():
        overlap = both.sum(-1).flatten()
        z = (float(overlap.mean()) - k * k / d) / (float(overlap.std()) / math.sqrt(len(overlap)) + 1e-12)
        if abs(z) >= 5:
            wrong[name] = float(overlap.mean())
    assert wrong == {}, f"expected supports to overlap in {k * k / d:.2f} coordinates"


@pytest.mark.parametrize("compressor", [RandK(4), RandBlock(4)])
def test_supports_are_independent_between_clients_chains_and_rounds(compressor: Compressor) -> None:
    assert_independent_supports(compressor)


class OneMask(RandK):
    """A mutant: one mask for all clients and chains, new in each round."""

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        return keys.common.fold(keys.round).subset(d, self.count(d))


class Stuck(RandK):
    """A mutant: each client and chain keeps its first mask for ever."""

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        return LinkKeys(1, torch.arange(6), 3, "uplink").at(1).own.subset(d, self.count(d))


@pytest.mark.parametrize(("mutant", "name"), [(OneMask(4), "client"), (Stuck(4), "round")])
def test_dependent_supports_are_caught(mutant: Compressor, name: str) -> None:
    with pytest.raises(AssertionError, match=rf"'{name}': 4\.0"):
        assert_independent_supports(mutant)


@pytest.mark.parametrize("compressor", [RandK(4), RandBlock(4)])
def test_links_and_seeds_have_supports_of_their_own(compressor: Compressor) -> None:
    def supports(seed: int, purpose: str) -> Tensor:
        found = compressor.support(LinkKeys(seed, torch.arange(50), 2, purpose).at(3), 30)
        assert found is not None
        return found

    here = supports(0, "uplink")
    assert torch.equal(here, supports(0, "uplink"))
    for other in (supports(1, "uplink"), supports(0, "downlink")):
        assert float((here == other).double().mean()) < 0.2


def test_a_device_has_the_keys_that_a_fleet_has_for_it() -> None:
    n, chains = 5, 3
    fleet = LinkKeys(9, torch.arange(n), chains, "uplink")
    some = torch.tensor([4, 1])
    for round in (1, 2, 4000):
        whole, part = fleet.at(round), fleet.at(round, some)
        assert whole.own.shape == (n, chains)
        assert torch.equal(part.own.tensor(), whole.own.tensor()[some])
        for client in range(n):
            alone = LinkKeys(9, client, chains, "uplink").at(round)
            assert torch.equal(alone.own.tensor(), whole.own.tensor()[client])
            assert (alone.common, alone.round) == (whole.common, whole.round)
            for chain in range(chains):
                assert torch.equal(alone.own.tensor()[chain], key(9, round, client, chain, "uplink").tensor())
    for compressor in (RandK(3), RandBlock(3)):
        batched = compressor.support(fleet.at(7), 10)
        alone_support = compressor.support(LinkKeys(9, 2, chains, "uplink").at(7), 10)
        assert batched is not None
        assert alone_support is not None
        assert torch.equal(batched[2], alone_support)


# --- RandBlock's permutation ------------------------------------------------------------------------------------------


def cycle(compressor: RandBlock, round: int, d: int, client_seed: int = 0) -> list[int]:
    """The permutation behind a round's blocks, started at coordinate 0 so that offsets do not matter."""
    common = key(0, purpose="uplink/common")
    first = compressor.support(PacketKeys(EveryOffset(torch.arange(d)), common, round), d)[:, 0].tolist()
    at = first.index(0)
    return first[at:] + first[:at]


@pytest.mark.parametrize("refresh", [1, 3, 256])
def test_a_block_redraws_its_permutation_after_refresh_rounds_and_not_before(refresh: int) -> None:
    compressor, d = RandBlock(2, refresh=refresh), 40
    rounds = range(3 * refresh) if refresh < 10 else (0, 1, 255, 256, 257, 511, 512)
    cycles = {round: cycle(compressor, round, d) for round in rounds}
    for one, other in itertools.combinations(cycles, 2):
        assert (cycles[one] == cycles[other]) == (one // refresh == other // refresh)
    assert RandBlock(2).refresh == 256


def test_a_block_is_k_neighbours_in_a_cycle_that_all_clients_share() -> None:
    compressor, d, k = RandBlock(5), 12, 5
    order = cycle(compressor, 9, d)
    assert sorted(order) == list(range(d))
    assert order != list(range(d))
    starts = set()
    for support in compressor.support(LinkKeys(0, torch.arange(40), 2, "uplink").at(9), d).flatten(0, 1).tolist():
        start = order.index(support[0])
        starts.add(start)
        assert support == [order[(start + j) % d] for j in range(k)]
    assert starts == set(range(d))  # also those that run past the end
