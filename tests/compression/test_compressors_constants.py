"""The whole table of compressors: their constants, and what contracts."""

from __future__ import annotations

import math

import pytest
import torch
from compressor_table import FLOAT64, UNBIASED, device_keys, gaussian, make, many_keys
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import assert_within, gamma, near
from running_error import LIKELY, response
from torch import Tensor

from fedsample.compression import (
    QSGD,
    Bfloat16,
    Composed,
    Compressor,
    LowRank,
    Natural,
    PacketKeys,
    PermK,
    RandBlock,
    RandK,
    Scaled,
    ScaledSign,
    TopK,
)
from fedsample.errors import DataError
from fedsample.random import Key, key

# --- constants: exact over every coin of a grid, then by keyed draws --------------------------------------------------


class EveryCoin(Key):
    """(256,) keys: the j-th has the top eight of its `low` coin bits equal to j, and zeros below."""

    low = 23

    def integers64(self, n: int, start: int = 0, out: Tensor | None = None) -> Tensor:
        half = torch.arange(256) << (self.low - 8)
        return ((half << 32) | half).unsqueeze(-1).expand(256, n).contiguous()


def every_coin(low: int) -> PacketKeys:
    own = EveryCoin(torch.arange(256))
    object.__setattr__(own, "low", low)
    return PacketKeys(own, key(0), 1)


@pytest.mark.parametrize(("compressor", "kept"), [(Natural(), 0), (Bfloat16(), 7)])
def test_rounding_is_unbiased_over_every_coin_and_its_omega_is_the_worst(compressor: Compressor, kept: int) -> None:
    low = 23 - kept
    steps = torch.arange(256, dtype=torch.float32)
    vector = torch.ldexp(1 + steps * 2.0 ** -(kept + 8), torch.arange(256) % 20 - 10)  # a multiple of the coins' grid
    vector = torch.cat([vector, -vector, torch.tensor([2.0**-149 * 2 ** (low - 1), -0.0, 2.0**127])])
    d = len(vector)
    keys = every_coin(low)
    decoded = compressor.decompress(compressor.compress(vector.expand(256, d), keys), d).double()
    assert torch.equal(decoded.mean(0), vector.double())
    worst = (decoded - vector).square().mean(0)[:512] / vector[:512].double().square()
    assert float(worst.max()) == pytest.approx(compressor.omega(d), rel=1e-3)
    assert float(worst.max()) <= compressor.omega(d)


@pytest.mark.parametrize("levels", [1, 2, 3, 7, 100, 127, 128, 255])
def test_qsgd_is_unbiased_over_every_coin(levels: int) -> None:
    vector = torch.tensor([7.0, -3.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0]) / 16  # norm 1/2: levels are multiples of 1/8
    compressor, d = QSGD(levels), 8
    keys = every_coin(30 - levels.bit_length())
    packet = compressor.compress(vector.expand(256, d), keys)
    assert packet.values.abs().max() <= levels
    decoded = compressor.decompress(packet, d).double()
    single = gamma(4, torch.float32)  # the norm's square, its root, a product and a division; all coins' mean is exact
    level = 0.5 / levels
    assert_within(decoded.mean(0), vector.double(), single * (vector.abs() + level), sees=1e-4)
    fraction = (vector.double() * 2 * levels).frac().abs()
    exact = (fraction * (1 - fraction)).sum() / levels**2 / 4
    assert float((decoded - vector).square().sum(-1).mean()) == pytest.approx(
        float(exact), rel=0, abs=d * 2 * level * single * 1.0
    )
    assert float(exact) <= compressor.omega(d) * 0.25


@pytest.mark.parametrize("name", UNBIASED)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
@pytest.mark.parametrize("d", [1, 5, 9])
def test_unbiased_within_its_omega_by_keyed_draws(name: str, dtype: torch.dtype, d: int) -> None:
    count, vector = 20_000, gaussian(d, dtype)
    compressor = make(name, d)
    keys = many_keys(count)
    decoded = compressor.decompress(compressor.compress(vector.expand(count, d), keys), d).double()
    offset = decoded - vector
    error = decoded.std(0) / math.sqrt(count) + 1e-7
    assert (offset.mean(0).abs() < 5 * error).all()
    square = offset.square().sum(-1)
    bound = compressor.omega(d) * float(vector.double().square().sum())
    assert float(square.mean()) <= bound + 5 * float(square.std()) / math.sqrt(count) + 2 * gamma(3 * d + 8) * bound


def test_qsgd_meets_its_bound_for_one_level() -> None:
    d, count = 16, 40_000
    vector = torch.ones(d)
    square = (QSGD(1).decompress(QSGD(1).compress(vector.expand(count, d), many_keys(count)), d) - 1).square().sum(-1)
    assert QSGD(1).omega(d) == 3.0
    assert float(square.mean()) == pytest.approx(3.0 * d, abs=5 * float(square.std()) / math.sqrt(count))


def test_rounding_of_float64_keeps_its_bits() -> None:
    count = 40_000
    for value in (1 + 2.0**-40, math.pi, 1e-40, -3.3e30):
        vector = torch.tensor([value], dtype=FLOAT64)
        for compressor in (Natural(), Bfloat16()):
            decoded = compressor.decompress(compressor.compress(vector.expand(count, 1), many_keys(count)), 1)
            error = float(decoded.std()) / math.sqrt(count) + abs(value) * 1e-12
            assert abs(float(decoded.mean()) - value) < 5 * error
            assert len(decoded.unique()) <= 2
    large = torch.tensor([1e300], dtype=FLOAT64)
    with pytest.raises(DataError, match="too large"):
        Bfloat16().to_bytes(Bfloat16().compress(large, device_keys()))
    assert torch.isfinite(Natural().decompress(Natural().compress(large, device_keys()), 1)).all()


def test_the_norm_of_qsgd_neither_overflows_nor_vanishes() -> None:
    for dtype, sizes in ((torch.float32, (1e-44, 1e-30, 1e30)), (FLOAT64, (1e-320, 1e-200, 1e200))):
        for size in sizes:
            vector = torch.full((4,), size, dtype=dtype)
            packet = QSGD(2).compress(vector, device_keys())
            assert packet.side is not None
            assert float(packet.side) == pytest.approx(2 * float(vector[0]), rel=0.5)
            assert (packet.values == 1).all()


# --- contractions -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.floats(0.01, 1.0), st.integers(0, 100), st.booleans())
@settings(max_examples=100, deadline=None)
def test_topk_keeps_the_largest_and_contracts(d: int, fraction: float, seed: int, coarse: bool) -> None:
    vector = gaussian(d, FLOAT64, seed)
    if coarse:
        vector = (vector * 2).round()  # many ties: the lower coordinate goes first
    k = TopK(fraction).count(d)
    packet = TopK(k).compress(vector, device_keys())
    want = sorted(sorted(range(d), key=lambda j: (-abs(float(vector[j])), j))[:k])
    assert packet.indices is not None
    assert packet.indices.tolist() == want
    error = float((TopK(k).decompress(packet, d) - vector).square().sum())
    assert error <= (1 - TopK(k).alpha(d)) * float(vector.square().sum()) * (1 + 2 * gamma(2 * d + 4))


def test_topk_attains_its_constant_and_breaks_ties_alike_in_a_batch() -> None:
    flat = torch.ones(3, 2, 10)
    packet = TopK(4).compress(flat, device_keys())
    assert packet.indices is not None
    assert (packet.indices == torch.arange(4)).all()
    assert float((TopK(4).decompress(packet, 10) - flat)[0, 0].square().sum()) == 6 == (1 - TopK(4).alpha(10)) * 10


@given(st.integers(1, 50), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_scaled_sign_loses_exactly_what_its_alpha_says(d: int, seed: int) -> None:
    vector = gaussian(d, FLOAT64, seed)
    vector[0] = 0.0 if d > 1 else 1.0
    compressor = ScaledSign()
    decoded = compressor.decompress(compressor.compress(vector, device_keys()), d)
    square = float(vector.square().sum())
    alpha = float(vector.abs().sum()) ** 2 / (d * square)
    assert float((decoded - vector).square().sum()) == near((1 - alpha) * square, 4 * d + 8, square)
    assert alpha >= compressor.alpha(d) * (1 - 2 * gamma(2 * d + 4))
    single = torch.eye(d, dtype=FLOAT64)[0]
    worst = compressor.decompress(compressor.compress(single, device_keys()), d)
    assert float((worst - single).square().sum()) == near(1 - compressor.alpha(d), 4 * d + 8, 1.0)


@pytest.mark.parametrize(("m", "n", "rank"), [(6, 6, 1), (6, 6, 2), (3, 9, 1), (9, 4, 2)])
@pytest.mark.parametrize("spectrum", [0.0, 1.0, 3.0])
def test_lowrank_contracts_in_the_mean_and_attains_it_for_orthogonal_matrices(
    m: int, n: int, rank: int, spectrum: float
) -> None:
    count, small = 4000, min(m, n)
    left, right = (torch.linalg.qr(gaussian(s * s, seed=s).view(s, s)).Q[:, :small] for s in (m, n))
    matrix = left @ torch.diag(torch.arange(1.0, small + 1, dtype=FLOAT64) ** -spectrum) @ right.T
    compressor = LowRank(rank, [torch.arange(m * n).view(m, n)])
    vector = matrix.flatten()
    decoded = compressor.decompress(compressor.compress(vector.expand(count, m * n), many_keys(count)), m * n)
    square = (decoded - vector).square().sum(-1) / vector.square().sum()
    error = 5 * float(square.std()) / math.sqrt(count) + 2 * gamma(20 * m * n)  # two products, a basis and squares
    loss = 1 - compressor.alpha(m * n)
    assert compressor.alpha(m * n) == rank / small
    assert float(square.mean()) <= loss + error
    if spectrum == 0:
        assert float(square.mean()) == pytest.approx(loss, abs=error)


def test_lowrank_is_exact_on_matrices_of_its_rank_and_sends_small_ones_whole() -> None:
    matrix = torch.outer(gaussian(8), gaussian(5, seed=1)) + torch.outer(gaussian(8, seed=2), gaussian(5, seed=3))
    bias = gaussian(3, seed=4)
    positions = torch.randperm(43, generator=torch.Generator().manual_seed(0))
    compressor = LowRank(2, [positions[:40].view(8, 5), positions[40:].view(3, 1)])
    vector = torch.empty(43, dtype=FLOAT64)
    vector[positions] = torch.cat([matrix.flatten(), bias])
    packet = compressor.compress(vector, device_keys())
    assert packet.values.shape[-1] == compressor.count(43) == 2 * 13 + 3
    error = LIKELY * response(
        lambda: compressor.decompress(compressor.compress(vector, device_keys()), 43).unsqueeze(0), responses=8
    )
    assert float((compressor.decompress(packet, 43) - vector).norm()) <= float(error) <= 1e-10 * float(vector.norm())
    assert LowRank(1, [torch.arange(2).view(2, 1)]).alpha(2) == 1  # a vector is not factored


@pytest.mark.parametrize("name", ["topk+natural", "topk+sign", "topk+scaled-qsgd", "scaled-randk", "scaled-randk+qsgd"])
@pytest.mark.parametrize("shape", ["gaussian", "flat", "single"])
def test_combinations_contract_as_they_say(name: str, shape: str) -> None:
    d, count = 10, 20_000
    vector = {"gaussian": gaussian(d), "flat": torch.ones(d, dtype=FLOAT64), "single": torch.eye(d, dtype=FLOAT64)[3]}[
        shape
    ]
    compressor = make(name, d)
    decoded = compressor.decompress(compressor.compress(vector.expand(count, d), many_keys(count)), d)
    square = (decoded - vector).square().sum(-1)
    bound = (1 - compressor.alpha(d)) * float(vector.square().sum())
    assert float(square.mean()) <= bound + 5 * float(square.std()) / math.sqrt(count) + 2 * gamma(3 * d + 8) * bound


def test_constants_of_combinations() -> None:
    d = 40
    both = Composed(RandK(10), QSGD(7))
    assert both.omega(d) == near(4 * (1 + min(10 / 49, math.sqrt(10) / 7)) - 1, 8)
    assert both.alpha(d) == 1 / (1 + both.omega(d)) == Scaled(both).alpha(d) == both.inclusion(d)
    assert Composed(TopK(10), ScaledSign()).alpha(d) == 0.25 / 10
    assert Composed(TopK(10), Natural()).alpha(d) == 0.25 * 0.875
    assert Composed(TopK(10), Scaled(QSGD(1))).alpha(d) == near(0.25 / math.sqrt(10), 4)
    assert Scaled(RandK(10)).alpha(d) == 0.25
    assert (Composed(PermK(4), Natural()).everyone, Composed(PermK(4), Natural()).independence) == (True, "partition")
    assert (Scaled(RandBlock(2)).everyone, Scaled(RandBlock(2)).independence) == (False, "shared-permutation")


def test_the_inner_coins_are_not_those_of_the_selection() -> None:
    keys = device_keys()
    assert keys.inner().own.words != keys.own.words
    vector = gaussian(8)
    packet = Composed(RandK(8), Natural()).compress(vector, keys)
    assert packet.indices is not None
    own = Natural().compress(vector.gather(0, packet.indices), keys)
    assert not torch.equal(packet.values, own.values)
