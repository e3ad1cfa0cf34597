"""Compressors: what is refused, and the table."""

from __future__ import annotations

import math
import struct
from typing import Any

import pytest
import torch
from compression_draws import SPARSE, device_keys

from fedsample.compression import Compressor, Identity, Packet, RandBlock, RandK, build, table
from fedsample.errors import ConfigError, DataError

# --- what is refused --------------------------------------------------------------------------------------------------


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


# --- the table --------------------------------------------------------------------------------------------------------


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
