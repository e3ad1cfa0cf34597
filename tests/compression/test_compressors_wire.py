"""The whole table of compressors: packed bytes to the last bit, there and back."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from compressor_table import FLOAT64, NAMES, device_keys, gaussian, make, many_keys, same_bits, same_packets
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import agree, near
from running_error import assert_same_in_norm
from torch import Tensor

from fedsample.compression import (
    QSGD,
    Bfloat16,
    Composed,
    Compressor,
    LinkKeys,
    LowRank,
    Natural,
    Packet,
    PermK,
    RandK,
    ScaledSign,
    TopK,
    bit_packing,
)
from fedsample.errors import DataError
from fedsample.random import key


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


@pytest.mark.rounding
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
