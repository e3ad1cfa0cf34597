"""The codec of points that come as increments, and of Flower's records."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from small_requests import CHAINS, SEED, D, N, Spoil, normal, request_of, spoiled_arrays, spoiled_header
from torch import Tensor

from fedsample import compression, protocol
from fedsample.errors import DataError
from fedsample.estimators import DenseDownlink, Ef21P
from fedsample.protocol import Missed, Recall
from fedsample.protocol.flower_records import ARRAYS, HEADER, parcel_of, records_of
from fedsample.protocol.wire import DENSE, Array, Form, Parcel, dense, header, read

# --- points that come as increments, references that are remembered ---------------------------------------------------


def increments(rounds: int, dtype: torch.dtype = torch.float32) -> tuple[Ef21P, list[Tensor], list[bytes]]:
    """A compressed downlink, what clients see in rounds 1, 2, ..., and the packets that lead from one to the next."""
    downlink = Ef21P(compression.build("topk", 2), SEED, CHAINS)
    seen, packets = [normal(CHAINS, D, seed=20, dtype=dtype)], []
    for round in range(2, rounds + 1):
        points, packet = downlink.see(seen[-1], normal(CHAINS, D, seed=20 + round, dtype=dtype), round)
        assert packet is not None
        seen.append(points)
        packets.append(downlink.pack(packet))
    return downlink, seen, packets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("held", [1, 2, 3])
def test_increments_lead_to_the_points_from_whatever_round_is_held(held: int, dtype: torch.dtype) -> None:
    downlink, seen, packets = increments(4, dtype)
    request = request_of(dtype=dtype, points=seen[3])
    missed = Missed.of(1, packets, downlink, dtype)
    parcel = protocol.Outgoing(request, "", coins=True).parcel(1, missed=missed)
    assert parcel.bits == 3 * CHAINS * downlink.compressor.bits(D, dtype) + CHAINS * D * 8 * dtype.itemsize + CHAINS
    recall = Recall(held, seen[held - 1])
    found = protocol.unpack_request(parcel, N, CHAINS, torch.zeros(D, dtype=dtype), recall, downlink)
    assert torch.equal(found.points, seen[3])


@pytest.mark.parametrize("recall", [Recall(), Recall(4, normal(CHAINS, D)), Recall(1, normal(CHAINS, D))])
def test_increments_to_points_that_are_not_held_are_refused(recall: Recall) -> None:
    downlink, seen, packets = increments(4)
    missed = Missed.of(2, packets[1:], downlink, torch.float32)
    parcel = protocol.Outgoing(request_of(points=seen[3]), "", coins=True).parcel(1, missed=missed)
    with pytest.raises(DataError, match="its state was lost"):
        protocol.unpack_request(parcel, N, CHAINS, torch.zeros(D), recall, downlink)


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled_header(since=None),
        spoiled_header(since=4),
        spoiled_header(round=6),
        spoiled_arrays(increments=Array("float32", (0,), "fedsample.topk.v1", b"")),
        spoiled_arrays(increments=Array("float32", (6,), "fedsample.randk.v1", bytes(24))),
        spoiled_arrays(points=dense(normal(CHAINS, D))),
    ],
)
def test_spoiled_increments_are_refused(spoil: Spoil) -> None:
    downlink, seen, packets = increments(4)
    parcel = protocol.Outgoing(request_of(points=seen[3]), "", coins=True).parcel(
        1, missed=Missed.of(1, packets, downlink, torch.float32)
    )
    with pytest.raises(DataError):
        protocol.unpack_request(spoil(parcel), N, CHAINS, torch.zeros(D), Recall(1, seen[0]), downlink)


def test_a_reference_is_the_origin_the_points_told_or_remembered() -> None:
    point = normal(CHAINS, D, seed=30)
    for since, told, recall, want in (
        (0, True, Recall(), torch.zeros(CHAINS, D)),
        (4, True, Recall(), request_of().points),
        (2, True, Recall(), point),
        (2, False, Recall(reference_round=2, reference=point), point),
    ):
        request = request_of(reference=point, reference_round=since)
        parcel = protocol.Outgoing(request, "", coins=True).parcel(1, reference=told)
        found = protocol.unpack_request(parcel, N, CHAINS, torch.zeros(D), recall, DenseDownlink())
        assert found.reference is not None
        assert torch.equal(found.reference, want)
        assert ("reference" in parcel.arrays) == (since == 2 and told)
    parcel = protocol.Outgoing(request_of(reference=point, reference_round=2), "", coins=True).parcel(
        1, reference=False
    )
    with pytest.raises(DataError, match="that of round 1"):
        protocol.unpack_request(parcel, N, CHAINS, torch.zeros(D), Recall(0, None, 1, point), DenseDownlink())


# --- as Flower's records ----------------------------------------------------------------------------------------------


def test_a_parcel_as_records_there_and_back() -> None:
    parcel = protocol.Outgoing(request_of(), "tag", coins=True).parcel(1)
    assert parcel_of(records_of(parcel, "x/"), "it", "x/") == parcel
    bare = Parcel(header(client=3))
    assert parcel_of(records_of(bare), "it") == bare


def test_a_record_of_the_wrong_kind_is_no_parcel() -> None:
    for records in (RecordDict({HEADER: ArrayRecord(), ARRAYS: ConfigRecord()}), RecordDict()):
        with pytest.raises(DataError, match="not made by fedsample"):
            parcel_of(records, "it")


@pytest.mark.parametrize(("offset", "own"), [(0, True), (1, False)], ids=["aligned", "unaligned"])
def test_a_large_array_is_used_where_the_message_was_read_into_if_it_can_be(offset: int, own: bool) -> None:
    values = torch.arange(5, dtype=torch.float64)
    buffer = np.zeros(48, dtype=np.uint8)
    buffer[offset : offset + 40] = np.frombuffer(dense(values).data, dtype=np.uint8)
    form = Form(DENSE, (5,), torch.float64)
    found = read(Array("float64", (5,), DENSE, memoryview(buffer)[offset : offset + 40]), form, "it")  # type: ignore[arg-type]
    assert torch.equal(found, values)
    assert (found.data_ptr() == buffer.ctypes.data) is own
    assert found.data_ptr() % 8 == 0


def test_bytes_that_others_may_hold_are_copied() -> None:
    array = dense(torch.ones(3))
    read(array, Form(DENSE, (3,), torch.float32), "it").zero_()
    assert torch.equal(read(array, Form(DENSE, (3,), torch.float32), "it"), torch.ones(3))
