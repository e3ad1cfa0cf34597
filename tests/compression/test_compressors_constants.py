"""The whole table of compressors: constants, packed bytes to the last bit, combinations, and what is refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import agree, assert_within, gamma, near
from running_error import LIKELY, assert_same_in_norm, response
from torch import Tensor

import fedsample.random.keys
from fedsample.compression import (
    QSGD,
    Bfloat16,
    Composed,
    Compressor,
    Identity,
    LinkKeys,
    LowRank,
    Natural,
    Packet,
    PacketKeys,
    PermK,
    RandBlock,
    RandK,
    Scaled,
    ScaledSign,
    TopK,
    bit_packing,
    build,
    cache_blocks,
    qsgd,
)
from fedsample.errors import ConfigError, DataError
from fedsample.estimators import Diana
from fedsample.estimators.base import Turn
from fedsample.random import Key, key

FLOAT64 = torch.float64
NAMES = [
    "identity",
    "randk",
    "randblock",
    "topk",
    "qsgd",
    "natural",
    "sign",
    "bf16",
    "permk",
    "lowrank",
    "randk+natural",
    "permk+qsgd",
    "randblock+bf16",
    "topk+natural",
    "topk+sign",
    "topk+scaled-qsgd",
    "scaled-randk",
    "scaled-randk+qsgd",
]


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal shapes, dtypes and bits: -0.0 is not 0.0 here."""
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


def same_packets(one: Packet, other: Packet) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and same_bits(a.contiguous(), b.contiguous()))
        for a, b in zip(one[:3], other[:3], strict=True)
    )


def device_keys(client: int = 0, chain: int = 0, round: int = 1, seed: int = 0) -> PacketKeys:
    common = key(seed, purpose="uplink/common")
    return PacketKeys(key(seed, round, client, chain, "uplink"), common, round, client, chain)


def many_keys(count: int) -> PacketKeys:
    """Keys of `count` chains."""
    return LinkKeys(3, 0, count, "uplink").at(1)


def blocks_of(d: int) -> list[Tensor]:
    """A matrix of four columns as far as d goes, and a vector of the rest."""
    whole = d - d % 4 if d >= 16 else 0
    parts = [torch.arange(whole).view(-1, 4)] if whole else []
    return parts + ([torch.arange(whole, d).view(-1, 1)] if d > whole else [])


def make(name: str, d: int, k: int | float = 0.4, levels: int = 5) -> Compressor:
    return build(name, k, levels=levels, rank=1, clients=3, blocks=blocks_of(d))


def gaussian(d: int, dtype: torch.dtype = FLOAT64, seed: int = 0) -> Tensor:
    return key(seed, purpose="vector").normal(d, dtype) + 0.3


# --- the wire -------------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> tuple[Compressor, Tensor, int]:
    d = draw(st.sampled_from([1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65, 200]))
    dtype = draw(st.sampled_from([torch.float32, FLOAT64]))
    levels = draw(st.sampled_from([1, 2, 3, 4, 7, 100, 127, 128, 1000, 32767]))
    k = draw(st.sampled_from([1, 0.1, 0.5, 1.0]))
    compressor = make(draw(st.sampled_from(NAMES)), d, k, levels)
    vector = gaussian(d, dtype, draw(st.integers(0, 1000)))
    vector = vector * 10.0 ** draw(st.sampled_from([-44, -38, -30, 0, 30]))
    vector[draw(st.integers(0, d - 1))] = draw(st.sampled_from([0.0, -0.0, 1.0]))
    return compressor, vector, draw(st.integers(1, 600))


@given(cases())
@settings(max_examples=400, deadline=None)
def test_bytes_bring_back_the_packet_to_the_last_bit(case: tuple[Compressor, Tensor, int]) -> None:
    compressor, vector, round = case
    d, keys = len(vector), device_keys(round=round)
    packet = compressor.compress(vector, keys)
    data = compressor.to_bytes(packet)
    assert 8 * len(data) == compressor.bits(d, vector.dtype)
    assert 0 <= compressor.bits(d, vector.dtype) - compressor.idealised_bits(d, vector.dtype) < 16 + 64  # permk's slot
    back = compressor.from_bytes(data, keys, d, vector.dtype)
    assert same_packets(packet, back)
    before = packet.values.clone()
    assert same_bits(compressor.decompress(packet, d), compressor.decompress(back, d))
    assert same_bits(packet.values, before)  # reading it changes nothing
    assert compressor.decompress(packet, d).dtype == vector.dtype


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("d", [1, 5, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_a_batch_is_its_packets_and_a_memory_their_sum(name: str, d: int, dtype: torch.dtype) -> None:
    compressor = make(name, d, k=1 if d == 1 else 0.4)
    keys = LinkKeys(2, torch.arange(3), 2, "uplink").at(5)
    batch = gaussian(6 * d, dtype).view(3, 2, d)
    packet = compressor.compress(batch, keys)
    dense = compressor.decompress(packet, d)
    for i, c in itertools.product(range(3), range(2)):
        alone = compressor.compress(batch[i, c], device_keys(i, c, 5, seed=2))
        part = Packet(*(None if each is None else each[i, c] for each in packet[:3]))  # type: ignore[arg-type]
        if name == "lowrank":  # whose products round differently in a batch
            assert_same_in_norm(
                lambda i=i, c=c: compressor.decompress(
                    compressor.compress(batch[i, c], device_keys(i, c, 5, seed=2)), d
                ).unsqueeze(0),
                lambda i=i, c=c: compressor.decompress(compressor.compress(batch, keys), d)[i, c].unsqueeze(0),
            )
        else:
            assert same_packets(alone, part)
            assert same_bits(compressor.decompress(alone, d), dense[i, c])
    memory = torch.ones_like(batch)
    compressor.add_to(memory, packet, -0.5)
    agree(memory, 1 - 0.5 * dense, 3, 1 + 0.5 * dense.abs())
    some = LinkKeys(2, torch.arange(3), 2, "uplink").at(5, torch.tensor([2, 0]))
    if name == "lowrank":
        assert_same_in_norm(
            lambda: compressor.decompress(compressor.compress(batch[[2, 0]], some), d),
            lambda: compressor.decompress(compressor.compress(batch, keys), d)[[2, 0]],
            leading=2,
        )
    else:
        assert same_bits(compressor.decompress(compressor.compress(batch[[2, 0]], some), d), dense[[2, 0]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_zero_stays_zero_and_an_empty_packet_is_one_of_zeros(name: str, dtype: torch.dtype) -> None:
    for d in (1, 17):
        compressor = make(name, d, k=1)
        packet = compressor.compress(torch.zeros(2, d, dtype=dtype), many_keys(2))
        assert (compressor.decompress(packet, d) == 0).all()
        empty = compressor.empty((2, d), dtype)
        for one, other in zip(empty[:3], packet[:3], strict=True):
            assert (one is None) == (other is None)
            assert one is None or other is None or (one.shape, one.dtype) == (other.shape, other.dtype)
        assert (compressor.decompress(empty, d) == 0).all()
        memory = torch.ones(2, d, dtype=dtype)
        compressor.add_to(memory, empty, 3.0)
        assert (memory == 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_a_vector_that_is_not_finite_is_never_sent(name: str, bad: float, dtype: torch.dtype) -> None:
    d = 17
    compressor = make(name, d, k=1.0)
    vector = gaussian(d, dtype)
    vector[:] = bad  # in all entries, so that every selection meets one
    packet = compressor.compress(vector, device_keys())
    assert not torch.isfinite(compressor.decompress(packet, d)).all()
    with pytest.raises(DataError, match="NaN or infinite"):
        compressor.to_bytes(packet)


@pytest.mark.parametrize("name", NAMES)
def test_messages_of_the_wrong_length_are_refused(name: str) -> None:
    compressor = make(name, 17)
    data = compressor.to_bytes(compressor.compress(gaussian(17), device_keys()))
    for wrong in (b"", data[:-1], data + b"\0", data + data):
        with pytest.raises(DataError, match=f"{len(wrong)} bytes, expected"):
            compressor.from_bytes(wrong, device_keys(), 17, FLOAT64)


def test_damaged_bytes_are_refused() -> None:
    keys, nan, one = device_keys(), np.float32(np.nan).tobytes(), np.float32(1).tobytes()
    for compressor, data, message in (
        (QSGD(1), one + b"\xff\xff", "outside -1..1"),
        (QSGD(1), np.float32(-1).tobytes() + b"\0\0", "negative norm"),
        (QSGD(1), nan + b"\0\0", "NaN"),
        (ScaledSign(), np.float32(-1).tobytes() + b"\0", "not negative"),
        (ScaledSign(), nan + b"\0", "NaN"),
        (Natural(), b"\xff" * 9, "NaN or infinite"),
        (Bfloat16(), b"\x80" * 8 + b"\x7f" * 8, "NaN or infinite"),
        (TopK(1), one + b"\xff", "padding"),
        (TopK(2), one * 2 + bit_packing.pack(np.array([3, 3]), 3), "without repeating"),
        (TopK(2), one * 2 + bit_packing.pack(np.array([4, 2]), 3), "must ascend"),
        (TopK(5), one * 5 + b"\x07", "3 coordinates, expected K = 5"),
    ):
        with pytest.raises(DataError, match=message):
            compressor.from_bytes(data, keys, 8, torch.float32)
    with pytest.raises(DataError, match=r"within 0\.\.4"):
        TopK(1).from_bytes(one + bit_packing.pack(np.array([7]), 3), keys, 5, torch.float32)
    with pytest.raises(DataError, match="padding"):
        ScaledSign().from_bytes(one + b"\xe0", keys, 5, torch.float32)


@given(st.integers(0, 70), st.integers(0, 32), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_packing_fills_exactly_the_bits_it_needs(count: int, width: int, seed: int) -> None:
    codes = (key(seed).integers64(count).numpy().view(np.uint64) >> np.uint64(32)) & np.uint64((1 << width) - 1)
    data = bit_packing.pack(codes.astype(np.uint32), width)
    assert len(data) == -(-count * width // 8)
    assert np.array_equal(bit_packing.unpack(data, count, width, np.uint32), codes)
    with pytest.raises(DataError, match="expected"):
        bit_packing.unpack(data + b"\0", count, width, np.uint32)


@pytest.mark.parametrize("width", range(1, 18))
def test_a_last_piece_that_is_no_multiple_of_eight_bytes(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of 64 bits are shifted, and beyond the piece lie the bytes of a longer one."""
    monkeypatch.setattr(bit_packing, "_CHUNK", 64)
    generator = np.random.default_rng(width)
    for columns in (63, 64, 65, 68, 71, 127, 129, 200):
        for count in (8 * columns, 8 * columns + 5):
            codes = generator.integers(0, 2**width, count, dtype=np.uint32)
            assert np.array_equal(bit_packing.unpack(bit_packing.pack(codes, width), count, width, np.uint32), codes)


def test_bits_are_those_of_the_papers() -> None:
    d = 1000
    for compressor, single, double in (
        (QSGD(1), 32 + 2 * d, 64 + 2 * d),
        (QSGD(4), 32 + 4 * d, 64 + 4 * d),
        (QSGD(127), 32 + 8 * d, 64 + 8 * d),
        (Natural(), 9 * d, 12 * d),
        (ScaledSign(), 32 + d, 64 + d),
        (Bfloat16(), 16 * d, 16 * d),
        (TopK(50), 50 * 42 + 4, 50 * 74 + 4),  # 500 bits of coordinates fill 63 bytes
        (TopK(200), 200 * 32 + d, 200 * 64 + d),  # a bitmap
        (PermK(10), 3200, 6400),
        (LowRank(2, [torch.arange(d).view(20, 50)]), 32 * 2 * 70, 64 * 2 * 70),
        (Composed(RandK(50), QSGD(7)), 32 + 50 * 4, 64 + 50 * 4),
        (Composed(TopK(50), Natural()), 456 + 504, 600 + 504),
    ):
        assert compressor.bits(d, torch.float32) == single, compressor.name
        assert compressor.bits(d, FLOAT64) == double, compressor.name
    assert TopK(50).idealised_bits(d, torch.float32) == 50 * 42
    assert Composed(TopK(50), Natural()).idealised_bits(d, torch.float32) == 50 * 19
    assert PermK(3).idealised_bits(d, torch.float32) == near(32 * d / 3, 2)
    assert PermK(3).bits(d, torch.float32) == 32 * 334


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


UNBIASED = ["randk", "randblock", "qsgd", "natural", "bf16", "permk", "randk+natural", "permk+qsgd", "randblock+bf16"]


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


# --- PermK ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d"), [(1, 5), (3, 6), (3, 7), (4, 2), (5, 1)])
def test_permk_gives_every_coordinate_to_one_client(n: int, d: int) -> None:
    compressor = PermK(n)
    keys = LinkKeys(0, torch.arange(n), 50, "uplink").at(3)
    shares = compressor.support(keys, d)  # (n, C, K)
    for chain in range(50):
        held = shares[:, chain].flatten()
        assert sorted(held[held < d].tolist()) == list(range(d))
    assert n == 1 or d == 1 or len({str(shares[:, c].tolist()) for c in range(50)}) > 1  # chains draw their own
    vector = gaussian(d)
    decoded = compressor.decompress(compressor.compress(vector.expand(n, 50, d), keys), d)
    agree(decoded.mean(0), vector.expand(50, d), n + 2)  # equal vectors: exact
    assert compressor.omega(d) == n - 1


def test_permk_needs_to_know_the_client() -> None:
    keys = PacketKeys(key(0), key(1), 1)
    with pytest.raises(ConfigError, match="must name client and chain"):
        PermK(3).compress(torch.ones(4), keys)
    with pytest.raises(ConfigError, match="client 3 of 3"):
        PermK(3).compress(torch.ones(4), device_keys(client=3))


# --- large subsets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 700, 30_000, 50_000, 69_999, 70_000])
def test_a_large_subset_is_ascending_distinct_and_the_same_alone_and_in_a_batch(k: int) -> None:
    n, keys = 70_000, key(0, chain=torch.arange(2))
    rows = keys.subset(n, k)
    assert rows.shape == (2, k)
    assert rows.dtype == torch.int64
    assert (rows[:, 1:] > rows[:, :-1]).all()
    assert int(rows.min()) >= 0
    assert int(rows.max()) < n
    assert torch.equal(key(0, chain=1).subset(n, k), rows[1])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_large_subset_is_equally_likely(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsample.random.keys, "_ALONE", 2)
    n, count = 5, 6000
    rows = key(7, chain=torch.arange(count)).subset(n, k)
    codes, seen = (2**rows).sum(-1).unique(return_counts=True)
    cells = math.comb(n, k)
    assert len(codes) == cells
    statistic = float(((seen - count / cells) ** 2).sum() / (count / cells))
    assert statistic < cells - 1 + 5 * math.sqrt(2 * cells)


def test_the_first_distinct_of_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedsample.random.keys, "_ALONE", 2)
    for seed in range(200):
        n, k = 20, 1 + seed % 10
        sequence = key(seed).integers(n, 400).tolist()
        assert key(seed).subset(n, k).tolist() == sorted(
            dict.fromkeys(sequence).keys() & set(list(dict.fromkeys(sequence))[:k])
        )


@pytest.mark.parametrize("kind", [RandK, RandBlock])
def test_long_vectors_are_compressed_alike(kind: Any) -> None:
    d, keys = 100_003, device_keys()
    vector = gaussian(d, torch.float32)
    compressor = kind(0.03)
    packet = compressor.compress(vector, keys)
    assert packet.indices is not None
    assert len(packet.indices.unique()) == compressor.count(d)
    back = compressor.from_bytes(compressor.to_bytes(packet), keys, d, torch.float32)
    assert same_packets(packet, back)
    block = compressor.decompress(packet, d)
    assert torch.equal(block[packet.indices], packet.values)


@pytest.mark.parametrize("name", ["qsgd", "natural", "bf16", "sign", "topk"])
def test_pieces_of_a_long_vector_draw_their_own_coins(name: str) -> None:
    d = (1 << 16) + 5
    vector = torch.full((d,), 0.7)
    compressor = build(name, 0.1, levels=300)
    packet = compressor.compress(vector, device_keys())
    tail = compressor.compress(vector.expand(2, d), many_keys(2))
    assert same_packets(
        packet,
        Packet(
            *(
                None if p is None else p[0]
                for p in compressor.compress(vector.expand(1, d), LinkKeys(0, 0, 1, "uplink").at(1))[:3]
            )
        ),
    )  # type: ignore[arg-type]
    if name in ("qsgd", "natural", "bf16"):
        assert not torch.equal(packet.values[:4096], packet.values[32768 : 32768 + 4096])
        assert not torch.equal(tail.values[0], tail.values[1])
    back = compressor.from_bytes(compressor.to_bytes(packet), device_keys(), d, torch.float32)
    assert same_packets(packet, back)


# --- in an estimator --------------------------------------------------------------------------------------------------


class Line:
    """An oracle of one client: gradient of |x - a|^2 / 2."""

    full = True

    def gradient(self, point: Tensor, *, full: bool = False) -> Tensor:
        return point - 1.5


@pytest.mark.parametrize("name", [*UNBIASED, "identity"])
@pytest.mark.parametrize("active", [None, (True, False)])
def test_diana_keeps_any_packet_until_it_is_acknowledged(name: str, active: tuple[bool, ...] | None) -> None:
    d, chains = 9, 2
    uplink = Diana(make(name, d))
    memory = uplink.memory((chains, d), FLOAT64, torch.device("cpu"))
    link = LinkKeys(0, 1, chains, "uplink")
    mask = None if active is None else torch.tensor(active)
    want = torch.zeros(chains, d, dtype=FLOAT64)
    size = torch.zeros_like(want)
    applied = 0
    for round in range(1, 6):
        turn = Turn(
            round, gaussian(chains * d, seed=round).view(chains, d), None, None, mask, applied, 0, link.at(round)
        )
        upload, memory = uplink.encode(Line(), memory, turn)
        agree(memory["shift"], want, 2 * round + 2, size)
        data = uplink.to_bytes(upload, None, mask)
        assert 8 * len(data) == uplink.bits(chains if mask is None else 1, 0, d, FLOAT64)
        back = uplink.from_bytes(data, turn, d, FLOAT64)
        dense = uplink.decompress(upload, None, mask, d)
        assert torch.equal(uplink.decompress(back, None, mask, d), dense)
        if round != 3:  # whose reply is lost
            want = want + dense * uplink.rate(d)
            size = size + dense.abs() * uplink.rate(d)
            applied = round


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: QSGD(0), r"levels = 0; choose an integer in 1\.\.32767"),
        (lambda: QSGD(-3), r"levels = -3"),
        (lambda: QSGD(40_000), r"levels = 40000"),
        (lambda: QSGD(2.0), r"levels = 2.0"),  # type: ignore[arg-type]
        (lambda: QSGD(True), r"levels = True"),
        (lambda: TopK(9).count(8), r"topk: k = 9 coordinates of 8 parameters; choose 1 <= k <= 8"),
        (lambda: TopK(0.0).alpha(8), r"topk: k = 0.0 is read as a fraction and must lie in \(0, 1\]"),
        (lambda: TopK(1.5).bits(8, torch.float32), r"k = 1.5"),
        (lambda: TopK(True).count(8), r"k = True is read as a fraction"),
        (lambda: PermK(0), r"clients = 0; give the number of clients, at least 1"),
        (lambda: LowRank(0, blocks_of(16)), r"rank = 0 of matrices \(4, 4\); choose an integer in 1\.\.4"),
        (lambda: LowRank(5, blocks_of(16)), r"rank = 5 of matrices \(4, 4\); choose an integer in 1\.\.4"),
        (lambda: LowRank(1, []), r"matrices none"),
        (lambda: LowRank(1, [torch.zeros(2, 2, dtype=torch.int64)]), r"hold each position once"),
        (lambda: LowRank(1, blocks_of(16)).count(17), r"hold 16 parameters, the vector 17; give the model's blocks"),
        (lambda: build("randk"), r"randk needs k"),
        (lambda: build("permk"), r"permk needs the number of clients"),
        (lambda: build("lowrank"), r"lowrank needs the parameter matrices"),
        (lambda: build("qsgd", levels=0), r"levels = 0"),
        (lambda: build("natural+randk", 1), r"a selection \(randk.*\) and then a quantiser.*randk\+natural"),
        (lambda: build("randk+topk", 1), r"a selection"),
        (lambda: build("randk+sign", 1), r"randk\+sign: no constant is known.*randk\+natural, or topk\+sign"),
        (lambda: build("randk+scaled-qsgd", 1), r"no constant is known"),
        (lambda: build("scaled-topk", 1), r"topk is contractive already: leave out"),
        (lambda: build("topk+qsgd", 9, levels=1).alpha(20), r"omega = 2 of qsgd at K = 9.*topk\+scaled-qsgd"),
        (lambda: TopK(1).omega(4), r"topk is contractive, not unbiased.*choose an unbiased one"),
        (lambda: ScaledSign().omega(4), r"sign is contractive"),
        (lambda: LowRank(1, blocks_of(16)).omega(16), r"lowrank is contractive"),
        (lambda: Scaled(RandK(1)).omega(4), r"scaled-randk is contractive"),
        (lambda: build("topk+natural", 1).omega(4), r"topk\+natural is contractive"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()


def test_independence_is_stated() -> None:
    assert {name: make(name, 16).independence for name in NAMES[:10]} == {
        "identity": "deterministic",
        "randk": "independent",
        "randblock": "shared-permutation",
        "topk": "deterministic",
        "qsgd": "independent",
        "natural": "independent",
        "sign": "deterministic",
        "bf16": "independent",
        "permk": "partition",
        "lowrank": "independent",
    }
    assert [name for name in NAMES[:10] if make(name, 16).everyone] == ["permk"]
    assert Identity().alpha(3) == 1


@pytest.mark.parametrize("levels", [1, 7, 127, 32_767])
def test_fixed_point_by_numpy_is_that_of_torch_and_never_passes_the_top(levels: int) -> None:
    """Vectors with one large entry reach the top exactly; numpy leaves out the clamp that torch applies."""
    whole, fraction = qsgd._fixed_point(torch.float32, levels)
    top = levels << fraction
    for seed in range(200):
        scale = 10.0 ** (seed % 75 - 37)
        vector = gaussian(5, torch.float32, seed) * torch.tensor([1.0, 1e-3, 1e-5, 1e-9, 0.0]) * scale
        norm = cache_blocks.two_norm(vector).unsqueeze(-1)
        if float(norm) > 0:
            drawn = []
            for draw in (qsgd._draw_on_cpu, qsgd._draw):
                for coin in (0, 1 << fraction - 1, (1 << fraction) - 1):
                    drawn.append(torch.empty(5, dtype=torch.int32))
                    draw(vector, norm, top, fraction, torch.full((5,), coin, dtype=whole), drawn[-1])
            assert torch.equal(torch.stack(drawn[:3]), torch.stack(drawn[3:]))
            assert int(torch.stack(drawn).abs().max()) <= levels


@pytest.mark.parametrize("width", [3, 5, 8, 9, 12, 16])
def test_what_is_taken_off_codes_and_what_checks_see(width: int) -> None:
    """`minus` after the check, of the last codes too; `low` shows every lowest byte once."""
    codes = np.random.default_rng(width).integers(0, 1 << width, 3 * 8 * 1000 + 5, dtype=np.uint16)
    seen: list[np.ndarray] = []
    data = bit_packing.pack(codes, width, check=lambda piece: seen.append(piece.copy()), low=width >= 8)
    read: list[np.ndarray] = []
    again = bit_packing.unpack(
        data, len(codes), width, np.uint16, lambda piece: read.append(piece.copy()), 3, width >= 8
    )
    assert np.array_equal(again, codes - np.uint16(3))
    for found in (np.concatenate(seen), np.concatenate(read)):
        assert np.array_equal(found, codes.astype(np.uint8) if width >= 8 else codes)
