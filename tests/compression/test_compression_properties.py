"""Compressors: exact bytes and more, over shapes, sizes and dtypes."""

from __future__ import annotations

import math
import struct

import torch
from compression_draws import device_keys, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import agree, near
from torch import Tensor

from fedsample.compression import Compressor, Identity, LinkKeys, Packet, RandBlock, RandK, build

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
