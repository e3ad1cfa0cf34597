"""Uplink estimators: uploads as bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from uplink_turns import FLOAT64, C, D, N, Springs, fresh, never, points, row, turn

from fedsample.compression import Identity, LinkKeys, RandBlock, RandK
from fedsample.errors import DataError
from fedsample.estimators import Marina, Turn, Uplink, build


@st.composite
def uploads(draw: st.DrawFn) -> tuple[Uplink, torch.dtype, list[bool] | None, Tensor | None, int]:
    compressor = draw(st.sampled_from([RandK(3), RandBlock(2), Identity(), RandK(D), RandK(0.2)]))
    name = draw(st.sampled_from(["dense", "diana", "marina"]))
    uplink = build(name, Identity() if name == "dense" else compressor)
    bools = st.lists(st.booleans(), min_size=C, max_size=C)
    sync = draw(st.none() | bools) if name == "marina" else None
    if sync is not None and not any(sync):
        sync = None  # as a server sends it
    active = draw(st.none() | st.lists(bools, min_size=N, max_size=N))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return uplink, dtype, sync, None if active is None else torch.tensor(active), draw(st.integers(2, 500))


@given(uploads())
@settings(max_examples=120, deadline=None)
def test_an_upload_is_its_bits_and_comes_back_to_the_bit(
    case: tuple[Uplink, torch.dtype, list[bool] | None, Tensor | None, int],
) -> None:
    uplink, dtype, sync, active, round = case
    whole = turn(round, sync=sync, active=active, applied=never(), dtype=dtype)
    upload, _ = uplink.encode(Springs(dtype=dtype), fresh(uplink, dtype=dtype), whole)
    decoded = uplink.decompress(upload, whole.sync, active, D)
    assert decoded.dtype == dtype
    for i in range(N):
        mine = None if active is None else active[i]
        data = uplink.to_bytes(row(upload, i), whole.sync, mine)
        asked = [c for c in range(C) if mine is None or bool(mine[c])]
        syncing = sum(sync is not None and sync[c] for c in asked)
        assert 8 * len(data) == uplink.bits(len(asked), syncing, D, dtype)
        device = Turn(**{**vars(whole), "active": mine, "keys": LinkKeys(0, i, C, "uplink").at(round)})
        again = uplink.from_bytes(data, device, D, dtype)
        assert torch.equal(uplink.decompress(again, whole.sync, mine, D), decoded[i])
        assert torch.equal(uplink.decompress(row(upload, i), whole.sync, mine, D), decoded[i])
        for wrong in (data + b"\0", data + data, data[:-1]):
            if len(wrong) != len(data):
                with pytest.raises(DataError, match="bytes, expected"):
                    uplink.from_bytes(wrong, device, D, dtype)


def test_the_first_round_of_marina_travels_dense() -> None:
    uplink = Marina(RandK(2), None)
    here = turn(1, sync=[True] * C)
    upload, _ = uplink.encode(Springs(), fresh(uplink), here)
    data = uplink.to_bytes(row(upload, 0), here.sync, None)
    assert len(data) == C * D * 8
    device = Turn(**{**vars(here), "keys": LinkKeys(0, 0, C, "uplink").at(1)})
    again = uplink.decompress(uplink.from_bytes(data, device, D, FLOAT64), here.sync, None, D)
    assert torch.equal(again, Springs().gradient(points(1))[0])


@pytest.mark.parametrize("sync", [None, [True, False], [True, True]])
def test_uploads_that_are_not_finite_are_refused_both_ways(sync: list[bool] | None) -> None:
    uplink = Marina(RandK(2), None)
    here = turn(2, sync=sync)
    oracle = Springs()
    oracle.center[0] = math.inf
    upload, _ = uplink.encode(oracle, fresh(uplink), here)
    with pytest.raises(DataError, match="not finite"):
        uplink.to_bytes(row(upload, 0), here.sync, None)
    data = uplink.to_bytes(row(upload, 1), here.sync, None)
    device = Turn(**{**vars(here), "keys": LinkKeys(0, 1, C, "uplink").at(2)})
    nan = torch.tensor([math.nan], dtype=FLOAT64).numpy().tobytes()
    with pytest.raises(DataError, match="NaN or infinite"):
        uplink.from_bytes(data[:-8] + nan, device, D, FLOAT64)


def test_a_dense_part_that_is_missing_is_an_error() -> None:
    uplink = Marina(RandK(2), None)
    upload, _ = uplink.encode(Springs(), fresh(uplink), turn(2))
    with pytest.raises(ValueError, match="without its dense part"):
        uplink.to_bytes(row(upload, 0), torch.tensor([True, False]), None)
