"""Compressors: laws by enumeration and by keyed draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from compression_draws import FLOAT64, SPARSE, EveryOffset, device_keys, same_bits
from rounding import agree, near
from torch import Tensor

from fedsample.compression import Compressor, Identity, LinkKeys, Packet, PacketKeys, RandBlock, RandK
from fedsample.random import Key, key

# --- enumeration: a key that returns every outcome of a draw in turn --------------------------------------------------


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


# --- keyed draws have the enumerated law ------------------------------------------------------------------------------


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
