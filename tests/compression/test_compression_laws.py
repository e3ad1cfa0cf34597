"""Compressors: laws by enumeration and by keyed draws, exact bytes, shared supports, and what is refused."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import agree, near
from torch import Tensor

from fedsample.compression import Compressor, Identity, LinkKeys, Packet, PacketKeys, RandBlock, RandK, build, table
from fedsample.errors import ConfigError, DataError
from fedsample.random import Key, key

FLOAT64 = torch.float64


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shapes, dtypes and bits: -0.0 is not 0.0 here."""
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}
    return one.dtype == other.dtype and torch.equal(one.view(whole[one.dtype]), other.view(whole[other.dtype]))


def device_keys(client: int = 0, chain: int = 0, round: int = 1, seed: int = 0) -> PacketKeys:
    """The keys of one client and chain alone, without a batch."""
    common = key(seed, purpose="uplink/common")
    return PacketKeys(key(seed, round, client, chain, "uplink"), common, round)


# --- enumeration: a key that returns every outcome of a draw in turn ------------------------------------------------


class EveryOffset(Key):
    """(d,) keys, the j-th of which draws the integer j."""

    def integers(self, high: int, n: int) -> Tensor:
        assert n == 1
        assert torch.equal(self.tensor(), torch.arange(high))
        return self.tensor().unsqueeze(-1)


class EverySubset(Key):
    """Keys, the j-th of which draws the j-th K-subset of d."""

    def subset(self, n: int, k: int) -> Tensor:
        return torch.tensor(list(itertools.combinations(range(n), k)))[self.tensor()]


class ThisPermutation(Key):
    """A key, whatever is folded in, that draws the permutation of this number."""

    def fold(self, value: int | str | Tensor) -> Key:
        return self

    def permutation(self, n: int) -> Tensor:
        return torch.tensor(next(itertools.islice(itertools.permutations(range(n)), int(self.words), None)))


def outcomes(compressor: Compressor, d: int, common: Key | None = None) -> PacketKeys:
    """Keys whose batch runs over every equally likely outcome of the compressor's draw."""
    if isinstance(compressor, RandK):
        own: Key = EverySubset(torch.arange(math.comb(d, compressor.count(d))))
    else:
        own = EveryOffset(torch.arange(d))
    return PacketKeys(own, common or key(0, purpose="uplink/common"), 1)


def assert_unbiased_by_enumeration(compressor: Compressor, vector: Tensor, common: Key | None = None) -> None:
    """E C(v) = v and E|C(v) - v|^2 = omega |v|^2, as sums over all outcomes."""
    d = len(vector)
    keys = outcomes(compressor, d, common)
    count = len(keys.own.tensor())
    decoded = compressor.decompress(compressor.compress(vector.expand(count, d), keys), d)
    agree(decoded.mean(0), vector, count + 3)  # a mean over all outcomes of what is scaled by d / k
    error = float((decoded - vector).square().sum(-1).mean())
    size = float((decoded.abs() + vector.abs()).square().sum(-1).mean())
    assert error == near(compressor.omega(d) * float(vector.square().sum()), count + 2 * d + 6, size)
    assert ((decoded != 0).sum(-1) <= compressor.count(d)).all()


def gaussian(d: int, seed: int = 0) -> Tensor:
    return key(seed, purpose="vector").normal(d) + 0.3


SPARSE: list[Callable[..., Compressor]] = [RandK, RandBlock]
SIZES = [(1, 1), (2, 1), (5, 1), (5, 2), (5, 3), (5, 5), (6, 4), (7, 3), (8, 2)]  # d = 1, K = d, K not dividing d


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(("d", "k"), SIZES)
def test_unbiased_with_its_constant_by_enumeration(kind: Callable[..., Compressor], d: int, k: int) -> None:
    assert_unbiased_by_enumeration(kind(k), gaussian(d))
    assert_unbiased_by_enumeration(kind(k), torch.eye(d, dtype=FLOAT64)[-1])
    assert kind(k).omega(d) == d / k - 1


@pytest.mark.parametrize("d", [1, 4])
def test_identity_loses_nothing(d: int) -> None:
    vector, keys = gaussian(d), device_keys()
    packet = Identity().compress(vector, keys)
    assert packet.indices is None
    assert same_bits(Identity().decompress(packet, d), vector)
    assert Identity().omega(d) == 0
    assert Identity().inclusion(d) == 1


def covariance(compressor: Compressor, vector: Tensor, common: Key | None = None) -> Tensor:
    """Of C(v), over all outcomes of the own draw."""
    d = len(vector)
    keys = outcomes(compressor, d, common)
    decoded = compressor.decompress(compressor.compress(vector.expand(len(keys.own.tensor()), d), keys), d)
    offset = decoded - vector
    return offset.T @ offset / len(offset)


def covariance_size(vector: Tensor, k: int) -> Tensor:
    """Of what the covariance is a mean of: products of entries of |C(v)| + |v|, the first d / k |v| or 0."""
    largest = (len(vector) / k + 1) * vector.abs()
    return torch.outer(largest, largest)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_the_covariance_of_randk_is_that_of_uniform_subsets(k: int) -> None:
    d, vector = 4, gaussian(4)
    pair = k * (k - 1) / (d * (d - 1))
    outer = torch.outer(vector, vector)
    want = ((d / k) ** 2 * pair - 1) * outer
    want.diagonal().copy_((d / k - 1) * vector.square())
    agree(covariance(RandK(k), vector), want, math.comb(d, k) + 6, covariance_size(vector, k))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_block_of_an_average_permutation_has_the_covariance_of_a_subset(k: int) -> None:
    vector = gaussian(4)
    each = [covariance(RandBlock(k), vector, ThisPermutation(number)) for number in range(math.factorial(4))]
    size = covariance_size(vector, k)
    agree(torch.stack(each).mean(0), covariance(RandK(k), vector), math.factorial(4) + 4 + 6, size)
    assert k == 1 or k == 3 or not torch.allclose(each[0], each[1])  # given the permutation, neighbours go together


def test_blocks_are_unbiased_given_any_permutation() -> None:
    for number in range(math.factorial(4)):
        assert_unbiased_by_enumeration(RandBlock(3), gaussian(4), ThisPermutation(number))


# --- keyed draws have the enumerated law ----------------------------------------------------------------------------


def decoded_draws(compressor: Compressor, vector: Tensor, clients: int, chains: int, rounds: int) -> Tensor:
    """(rounds, clients, chains, d) decoded vectors, as a fleet makes them."""
    link = LinkKeys(5, torch.arange(clients), chains, "uplink")
    every = vector.expand(clients, chains, -1)
    return torch.stack(
        [compressor.decompress(compressor.compress(every, link.at(r)), len(vector)) for r in range(1, rounds + 1)]
    )


def assert_unbiased_by_draws(compressor: Compressor, d: int) -> None:
    """The mean of each coordinate and the mean squared error, within 5 standard errors."""
    vector = gaussian(d, 3)
    draws = decoded_draws(compressor, vector, 500, 4, 10).flatten(0, 2)  # (20,000, d)
    count = len(draws)
    deviation = vector.abs() * math.sqrt(compressor.omega(d))
    z = (draws.mean(0) - vector).abs() / (deviation / math.sqrt(count)).clamp_min(1e-15)
    assert float(z.max()) < 5
    error = (draws - vector).square().sum(-1)
    want = compressor.omega(d) * float(vector.square().sum())
    assert abs(float(error.mean()) - want) <= 5 * float(error.std()) / math.sqrt(count) + 1e-12
    assert float(((draws != 0).sum(-1) - compressor.count(d)).abs().max()) == 0


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(("d", "k"), [(1, 1), (6, 1), (7, 3), (10, 0.25), (5, 1.0)])
def test_unbiased_by_keyed_draws(kind: Callable[..., Compressor], d: int, k: int | float) -> None:
    assert_unbiased_by_draws(kind(k), d)


class Unscaled(RandK):
    """A mutant: no factor d / K."""

    def compress(self, vector: Tensor, keys: PacketKeys) -> Packet:
        packet = super().compress(vector, keys)
        return packet._replace(values=packet.values * (self.count(vector.shape[-1]) / vector.shape[-1]))


class Front(RandBlock):
    """A mutant: a block that may not run past the end, so that the last coordinates travel less often."""

    def support(self, keys: PacketKeys, d: int) -> Tensor:
        k = self.count(d)
        return super().support(keys, d).sort(dim=-1).values.clamp(max=d - 1) * 0 + torch.arange(k)


@pytest.mark.parametrize("mutant", [Unscaled(2), Front(2)])
def test_a_biased_compressor_is_caught(mutant: Compressor) -> None:
    with pytest.raises(AssertionError):
        assert_unbiased_by_enumeration(mutant, gaussian(5))
    with pytest.raises(AssertionError):
        assert_unbiased_by_draws(mutant, 5)


# --- supports: shared by the two ends, independent of everyone else's -----------------------------------------------


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


# --- RandBlock's permutation ----------------------------------------------------------------------------------------


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


# --- properties over shapes, sizes and dtypes -----------------------------------------------------------------------

KINDS = st.sampled_from(["identity", "randk", "randblock"])
DTYPES = st.sampled_from([torch.float32, torch.float64])
FINITE = st.floats(-(2.0**100), 2.0**100, allow_subnormal=True, width=32)


@st.composite
def compressions(draw: st.DrawFn) -> tuple[Compressor, Tensor, int]:
    d = draw(st.integers(1, 33))
    k: int | float = draw(st.integers(1, d) | st.floats(1e-6, 1.0))
    values = draw(st.lists(FINITE, min_size=d, max_size=d))
    vector = torch.tensor(values, dtype=draw(DTYPES))
    return build(draw(KINDS), k), vector, draw(st.integers(0, 1000))


@given(compressions())
@settings(max_examples=150, deadline=None)
def test_what_travels_is_counted_and_comes_back_to_the_bit(case: tuple[Compressor, Tensor, int]) -> None:
    compressor, vector, round = case
    d, dtype = len(vector), vector.dtype
    keys = device_keys(client=3, chain=1, round=round)
    packet = compressor.compress(vector, keys)
    data = compressor.to_bytes(packet)
    count = compressor.count(d)
    assert packet.values.shape == (count,)
    assert packet.values.dtype == dtype
    assert 1 <= count <= d
    assert compressor.bits(d, dtype) == 8 * len(data) == count * torch.finfo(dtype).bits
    assert compressor.inclusion(d) == count / d
    assert compressor.omega(d) == near(d / count - 1, 2, d / count)

    again = compressor.from_bytes(data, device_keys(client=3, chain=1, round=round), d, dtype)
    assert same_bits(again.values, packet.values)
    if packet.indices is None:
        assert again.indices is None
        assert count == d
    else:
        assert again.indices is not None
        assert torch.equal(again.indices, packet.indices)
        assert len(packet.indices.unique()) == count
        assert 0 <= int(packet.indices.min()) <= int(packet.indices.max()) < d
        assert same_bits(packet.values, vector[packet.indices] * (d / count))
    assert same_bits(compressor.decompress(again, d), compressor.decompress(packet, d))


@given(compressions(), st.floats(-2, 2), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_batches_are_their_rows_and_add_to_is_a_scaled_sum(
    case: tuple[Compressor, Tensor, int], scale: float, n: int, chains: int
) -> None:
    compressor, vector, round = case
    d = len(vector)
    link = LinkKeys(2, torch.arange(n), chains, "uplink")
    batch = vector * torch.arange(1, n * chains + 1, dtype=vector.dtype).view(n, chains, 1)
    packet = compressor.compress(batch, link.at(round))
    dense = compressor.decompress(packet, d)
    for i in range(n):
        for c in range(chains):
            alone = compressor.compress(batch[i, c], device_keys(i, c, round, seed=2))
            assert same_bits(alone.values, packet.values[i, c])
            assert same_bits(compressor.decompress(alone, d), dense[i, c])
    memory = torch.ones_like(batch)
    want = memory + dense * scale
    compressor.add_to(memory, packet, scale)
    agree(memory, want, 3, 1 + (dense * scale).abs(), sees=math.inf)  # a sum may cancel
    if packet.indices is not None:  # the other coordinates are not touched
        kept = torch.zeros_like(batch, dtype=torch.bool).scatter_(-1, packet.indices, True)
        assert same_bits(memory[~kept], torch.ones_like(memory[~kept]))


@given(st.integers(1, 10_000), st.floats(1e-6, 1.0))
@settings(max_examples=100, deadline=None)
def test_a_fraction_is_the_nearest_count_and_at_least_one(d: int, fraction: float) -> None:
    count = RandK(fraction).count(d)
    assert 1 <= count <= d
    assert count == 1 or abs(count - fraction * d) <= 0.5
    assert RandBlock(fraction).count(d) == count
    assert RandK(1.0).count(d) == d  # 1.0 is a fraction, 1 a count
    assert RandK(1).count(d) == 1


def test_bytes_are_little_endian_values_and_nothing_else() -> None:
    vector = torch.tensor([1.0, -2.5, 3.0])
    assert Identity().to_bytes(Packet(vector, None)) == struct.pack("<3f", 1.0, -2.5, 3.0)
    assert Identity().to_bytes(Packet(vector.double(), None)) == struct.pack("<3d", 1.0, -2.5, 3.0)
    strided = torch.arange(6.0).view(3, 2)[:, 0]
    assert Identity().to_bytes(Packet(strided, None)) == struct.pack("<3f", 0, 2, 4)
    packet = RandK(2).from_bytes(struct.pack("<2f", 7, 8), device_keys(), 5, torch.float32)
    assert packet.values.tolist() == [7, 8]
    packet.values.add_(1)  # the values are the receiver's own, not a view of the message


# --- what is refused ------------------------------------------------------------------------------------------------

EACH = [Identity(), RandK(2), RandBlock(2)]


@pytest.mark.parametrize("compressor", EACH, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_both_ways(compressor: Compressor, dtype: Any, bad: float) -> None:
    d, keys = 4, device_keys()
    packet = compressor.compress(torch.ones(d, dtype=dtype), keys)
    packet.values[-1] = bad
    with pytest.raises(DataError, match=r"NaN or infinite.*gradient"):
        compressor.to_bytes(packet)
    values = [1.0] * (compressor.count(d) - 1) + [bad]
    data = struct.pack(f"<{len(values)}{'f' if dtype == torch.float32 else 'd'}", *values)
    with pytest.raises(DataError, match=r"NaN or infinite.*refused"):
        compressor.from_bytes(data, keys, d, dtype)


@pytest.mark.parametrize("compressor", EACH, ids=lambda c: c.name)
def test_a_packet_of_the_wrong_length_is_refused(compressor: Compressor) -> None:
    d, keys = 4, device_keys()
    data = compressor.to_bytes(compressor.compress(torch.ones(d), keys))
    count = compressor.count(d)
    for wrong in (b"", data[:-1], data[:-4], data + b"\0", data + data[:4]):
        with pytest.raises(DataError, match=rf"{len(wrong)} bytes, expected {4 * count} \({count} values"):
            compressor.from_bytes(wrong, keys, d, torch.float32)
    with pytest.raises(DataError, match=f"expected {8 * count}"):  # sent in float32, read as float64
        compressor.from_bytes(data, keys, d, torch.float64)


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, r"k = 0 coordinates of 8 parameters; choose 1 <= k <= 8"),
        (9, r"k = 9 coordinates of 8 parameters; choose 1 <= k <= 8"),
        (-1, r"k = -1 coordinates"),
        (0.0, r"k = 0.0 is read as a fraction and must lie in \(0, 1\]"),
        (1.5, r"k = 1.5 is read as a fraction.*a count is an integer"),
        (32.0, r"k = 32.0 is read as a fraction.*a count is an integer"),
        (-0.1, r"k = -0.1 is read as a fraction"),
        (math.nan, r"k = nan is read as a fraction"),
    ],
)
def test_an_impossible_k_is_refused(kind: Any, k: float, message: str) -> None:
    for call in (lambda c: c.count(8), lambda c: c.compress(torch.ones(8), device_keys()), lambda c: c.omega(8)):
        with pytest.raises(ConfigError, match=f"compressor {kind.name}: {message}"):
            call(kind(k))


def test_a_sparse_packet_without_indices_is_an_error() -> None:
    for call in (
        lambda: RandK(2).decompress(Packet(torch.ones(2), None), 4),
        lambda: RandK(2).add_to(torch.ones(4), Packet(torch.ones(2), None), 1.0),
    ):
        with pytest.raises(ValueError, match=r"support\(\)"):
            call()


# --- the table ------------------------------------------------------------------------------------------------------


def test_build_and_table_name_the_same_compressors() -> None:
    names = [row["name"] for row in table()]
    assert names[:3] == ["identity", "randk", "randblock"]
    for row in table()[:-2]:  # the last two say how compressors combine
        blocks = [torch.arange(12).view(3, 4)]
        compressor = build(row["name"], 3, clients=3, blocks=blocks)
        assert (compressor.name, compressor.kind) == (row["name"], row["kind"])
    assert build("randblock", 0.05) == RandBlock(0.05)
    with pytest.raises(ConfigError, match="'top' is not known; choose one of identity, randk, randblock, topk"):
        build("top", 3)
