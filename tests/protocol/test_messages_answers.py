"""The codec between requests, answers, metrics and parcels: there and back, and everything else refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedsample import compression, estimators, protocol
from fedsample.clients.client_stack import ClientStack
from fedsample.compression import LinkKeys
from fedsample.errors import DataError
from fedsample.estimators import DenseDownlink, Ef21P, Turn, Uplink
from fedsample.protocol import Missed, Recall
from fedsample.protocol.answers import Answer
from fedsample.protocol.exchange import ESTIMATE, EXACT, Request
from fedsample.protocol.flower_records import ARRAYS, HEADER, parcel_of, records_of
from fedsample.protocol.wire import BITS, DENSE, TRIANGLE, Array, Form, Parcel, bits, dense, header, read, triangle
from fedsample.targets import GeneralizedLinear, Quadratic
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, Metric

N, CHAINS, D, SEED = 3, 3, 7, 5
UPLINKS = [
    ("dense", "identity", 1.0),
    ("diana", "randk", 2),
    ("diana", "randblock", 0.5),
    ("marina", "randk", 3),
    ("marina", "identity", 1.0),
]


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uplink_of(name: str, compressor: str, k: float) -> Uplink:
    return estimators.build(name, compression.build(compressor, k))


def quadratic(dtype: torch.dtype = torch.float32) -> Quadratic:
    return Quadratic(normal(N, D, seed=2, dtype=dtype).square() + 0.5, normal(N, D, seed=3, dtype=dtype))


def request_of(
    outputs: tuple[str, ...] = (ESTIMATE,), dtype: torch.dtype = torch.float32, **changes: object
) -> Request:
    plain = Request(
        round=4,
        points=normal(CHAINS, D, dtype=dtype),
        outputs=frozenset(outputs),
        previous=normal(CHAINS, D, seed=8, dtype=dtype),
        sync=torch.tensor([True, False, True]),
        active=torch.tensor([[True, True, False], [False, True, True], [True, False, False]]),
        applied=torch.tensor([3, 0, 2]),
        epoch=2,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_dense_there_and_back(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (100 * normal(*shape, dtype=torch.float64)).to(dtype)
    array = dense(tensor)
    assert len(array.data) == tensor.numel() * tensor.element_size()
    found = read(array, Form(DENSE, shape, dtype), "it")
    assert torch.equal(found, tensor)
    assert found.dtype == dtype
    found += 1  # its memory is its own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_a_triangle_carries_a_symmetric_matrix(side: int, dtype: torch.dtype) -> None:
    matrix = normal(side, side, dtype=dtype)
    matrix = matrix + matrix.T
    array = triangle(matrix)
    assert 8 * len(array.data) == Form(TRIANGLE, (side, side), dtype).bits == 4 * dtype.itemsize * side * (side + 1)
    assert torch.equal(read(array, Form(TRIANGLE, (side, side), dtype), "it"), matrix)


@pytest.mark.parametrize("chains", [1, 3, 8, 9])
def test_a_mask_costs_a_bit_a_chain(chains: int) -> None:
    mask = torch.arange(chains) % 3 == 0
    array = bits(mask)
    assert torch.equal(read(array, Form(BITS, (chains,), torch.bool), "it"), mask)
    assert Parcel(header(), {"mask": array}).bits == chains
    assert len(array.data) == -(-chains // 8)


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (3,), DENSE, bytes(11)),
        Array("float32", (3,), DENSE, bytes(16)),
        Array("float32", (4,), DENSE, bytes(12)),
        Array("float64", (3,), DENSE, bytes(12)),
        Array("float32", (3,), "numpy.ndarray", bytes(12)),
        Array("float32", (3, 1), DENSE, bytes(12)),
    ],
)
def test_an_array_of_another_form_is_refused(array: Array) -> None:
    with pytest.raises(DataError, match="expected"):
        read(array, Form(DENSE, (3,), torch.float32), "it")


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_estimate_request_there_and_back(dtype: torch.dtype) -> None:
    request = request_of((ESTIMATE, "value"), dtype)
    outgoing = protocol.Outgoing(request, "tag", coins=True)
    like = torch.zeros(D, dtype=dtype)
    for client in range(N):
        parcel = outgoing.parcel(client, estimate=True)
        found = unpack(parcel, like)
        assert (found.round, found.epoch, found.outputs) == (request.round, request.epoch, request.outputs)
        for name in ("points", "previous", "sync"):
            assert torch.equal(getattr(found, name), getattr(request, name))
        assert found.active is not None
        assert found.applied is not None
        assert torch.equal(found.active[client], request.active[client])  # type: ignore[index]
        assert found.applied[client] == request.applied[client]  # type: ignore[index]
        assert parcel.bits == 2 * CHAINS * D * 8 * dtype.itemsize + CHAINS


def test_what_nobody_needs_does_not_travel() -> None:
    request = request_of((ESTIMATE, "value"), sync=None, active=None)
    bare = protocol.Outgoing(request, "", coins=False)
    found = unpack(bare.parcel(1, previous=False), torch.zeros(D))
    assert (found.previous, found.sync, found.active) == (None, None, None)
    with_coins = protocol.Outgoing(request, "", coins=True)
    assert unpack(with_coins.parcel(1), torch.zeros(D)).sync is None
    others = protocol.Outgoing(request_of((ESTIMATE, "value")), "", coins=True).parcel(1, estimate=False)
    found = unpack(others, torch.zeros(D))
    assert found.outputs == {"value"}
    assert others.bits == 32 * CHAINS * D


def test_an_exact_request_has_any_number_of_points() -> None:
    request = Request(0, normal(5, D), frozenset({"hvp", "squared_hvp"}), vector=normal(5, D, seed=2))
    parcel = protocol.Outgoing(request, "", coins=False).parcel(0, estimate=False)
    found = unpack(parcel, torch.zeros(D))
    assert torch.equal(found.points, request.points)
    assert torch.equal(found.vector, request.vector)  # type: ignore[arg-type]


def unpack(parcel: Parcel, like: Tensor) -> Request:
    return protocol.unpack_request(parcel, N, CHAINS, like, Recall(), DenseDownlink())


Spoil = Callable[[Parcel], Parcel]


def changed(kept: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**kept, **changes}.items() if value is not None}


def spoiled_header(**fields: object) -> Spoil:
    return lambda parcel: replace(parcel, header=changed(parcel.header, fields))


def spoiled_arrays(**arrays: Array | None) -> Spoil:
    return lambda parcel: replace(parcel, arrays=changed(parcel.arrays, arrays))


def without(part: str) -> Spoil:
    return lambda parcel: replace(parcel, **{part: {}})


@pytest.mark.parametrize(
    "spoil",
    [
        without("header"),
        without("arrays"),
        spoiled_header(version=2),
        spoiled_header(round=None),
        spoiled_header(round="4"),
        spoiled_header(epoch=True),
        spoiled_header(outputs=[]),
        spoiled_header(outputs=["estimate", "everything"]),
        spoiled_header(active=[True]),
        spoiled_header(active=[1, 1, 0]),
        spoiled_arrays(points=None),
        spoiled_arrays(extra=dense(normal(2))),
        spoiled_arrays(points=dense(normal(CHAINS, D + 1))),
        spoiled_arrays(points=dense(normal(CHAINS + 1, D))),
        spoiled_arrays(points=dense(normal(CHAINS, D, dtype=torch.float64))),
        spoiled_arrays(points=Array("float32", (CHAINS, D), DENSE, bytes(4 * CHAINS * D - 1))),
        spoiled_arrays(sync=bits(torch.ones(CHAINS + 1, dtype=torch.bool))),
        spoiled_arrays(sync=dense(normal(CHAINS))),
    ],
)
def test_a_spoiled_request_is_refused(spoil: Spoil) -> None:
    parcel = protocol.Outgoing(request_of(), "", coins=True).parcel(0, estimate=True)
    parcel = spoil(parcel)
    with pytest.raises(DataError):
        unpack(parcel, torch.zeros(D))


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_of(uplink: Uplink, request: Request, client: int, dtype: torch.dtype) -> Answer:
    worker = ClientStack(quadratic(dtype).client(client), uplink, SEED, CHAINS, torch.tensor([client]))
    return worker.answer(request)


def turn_of(request: Request, client: int) -> Turn:
    keys = LinkKeys(SEED, torch.arange(N), CHAINS, "uplink").at(request.round, torch.tensor(client))
    active = None if request.active is None else request.active[client]
    return Turn(request.round, request.points, None, request.sync, active, 0, request.epoch, keys)


@pytest.mark.parametrize("everyone", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "compressor", "k"), UPLINKS)
def test_an_answer_there_and_back(name: str, compressor: str, k: float, dtype: torch.dtype, everyone: bool) -> None:
    uplink = uplink_of(name, compressor, k)
    request = request_of((ESTIMATE, "value", "gradient"), dtype)
    if name != "marina":
        request = replace(request, sync=None)
    if everyone:
        request = replace(request, active=None)
    forms = protocol.exact_forms(request, [])
    for client in range(N):
        answer, turn = answer_of(uplink, request, client, dtype), turn_of(request, client)
        parcel = protocol.pack_answer(answer, request, client, uplink)
        upload, exact = protocol.unpack_answer(parcel, client, turn, request.round, forms, uplink)
        assert answer.upload is not None
        assert upload is not None
        got = uplink.decompress(upload, turn.sync, turn.active, D)
        want = uplink.decompress(answer.upload, request.sync, turn.active, D)[0]
        assert torch.equal(got, want)
        assert exact.keys() == {"value", "gradient"}
        assert all(torch.equal(exact[each], answer.exact[each][0]) for each in exact)
        active = torch.ones(CHAINS, dtype=torch.bool) if turn.active is None else turn.active
        syncing = 0 if turn.sync is None else int((turn.sync & active).sum())
        outputs = 64 * CHAINS + 8 * dtype.itemsize * CHAINS * D
        assert parcel.bits == uplink.bits(int(active.sum()), syncing, D, dtype) + outputs


def test_exact_outputs_there_and_back() -> None:
    x, y = normal(12, 2), torch.arange(12) % 3
    clients = GeneralizedLinear(x, y, torch.tensor([0, 5, 12]), "categorical", 3)
    points, vectors = normal(3, clients.d), normal(3, clients.d, seed=2)
    request = Request(0, points, frozenset(EXACT), vector=vectors)
    forms = protocol.exact_forms(request, clients.blocks())
    uplink = uplink_of("dense", "identity", 1.0)
    worker = ClientStack(clients.client(1), uplink, SEED, CHAINS, torch.tensor([1]))
    answer = worker.answer(request)
    parcel = protocol.pack_answer(answer, request, 1, uplink)
    upload, exact = protocol.unpack_answer(parcel, 1, None, 0, forms, uplink)
    assert upload is None
    assert exact.keys() == answer.exact.keys() == forms.keys()
    assert all(torch.equal(exact[name], answer.exact[name][0]) for name in exact)
    assert parcel.bits == sum(form.bits for form in forms.values())


@pytest.mark.parametrize(
    "spoil",
    [
        without("header"),
        without("arrays"),
        spoiled_header(version=0),
        spoiled_header(round=3),
        spoiled_header(client=2),
        spoiled_arrays(upload=None),
        spoiled_arrays(value=None),
        spoiled_arrays(more=dense(normal(2))),
        spoiled_arrays(value=dense(normal(CHAINS))),
        spoiled_arrays(upload=Array("float32", (6,), "fedsample.randk.v2", bytes(24))),
        spoiled_arrays(upload=Array("float32", (6,), "fedsample.randblock.v1", bytes(24))),
        spoiled_arrays(upload=Array("float64", (3,), "fedsample.randk.v1", bytes(24))),
        spoiled_arrays(upload=Array("float32", (5,), "fedsample.randk.v1", bytes(20))),
        spoiled_arrays(upload=Array("float32", (7,), "fedsample.randk.v1", bytes(28))),
        spoiled_arrays(upload=Array("float32", (6,), "fedsample.randk.v1", bytes(23))),
        spoiled_arrays(upload=Array("float32", (6,), "fedsample.randk.v1", bytes(20) + b"\x00\x00\xc0\x7f")),
    ],
)
def test_a_spoiled_answer_is_refused(spoil: Spoil) -> None:
    uplink = uplink_of("diana", "randk", 2)
    request = request_of((ESTIMATE, "value"), sync=None, active=None)
    parcel = protocol.pack_answer(answer_of(uplink, request, 1, torch.float32), request, 1, uplink)
    assert len(parcel.arrays["upload"].data) == 24
    parcel = spoil(parcel)
    forms = protocol.exact_forms(request, [])
    with pytest.raises(DataError):
        protocol.unpack_answer(parcel, 1, turn_of(request, 1), request.round, forms, uplink)


# --- metrics ----------------------------------------------------------------------------------------------------------

BLOCKS = [torch.tensor([[4, 0, 2], [1, 3, 5]]), torch.tensor([[6]])]


def metric_of(name: str, dtype: torch.dtype) -> Metric:
    mean = normal(D, seed=9, dtype=dtype)
    root = normal(D, D, seed=4, dtype=torch.float64)
    if name == "identity":
        return Identity(mean)
    if name == "diagonal":
        return Diagonal.of_precision(mean, root[0].square() + 0.1)
    if name == "hessian":
        return Dense.of_precision(mean, root @ root.T + torch.eye(D))
    pairs = [(root[:2, :2] @ root[:2, :2].T, root[:3, :3] @ root[:3, :3].T), (torch.ones(1, 1), torch.ones(1, 1))]
    return Kronecker.of_factors(mean, BLOCKS, pairs, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["identity", "diagonal", "hessian", "kronecker"])
def test_a_metric_there_and_back(name: str, dtype: torch.dtype) -> None:
    metric, z = metric_of(name, dtype), normal(2, D, dtype=dtype)
    parcel = protocol.pack_metric(metric)
    found = protocol.unpack_metric(parcel, torch.zeros(D, dtype=dtype), BLOCKS)
    assert found.name == name
    assert torch.equal(found.push(z), metric.push(z))
    assert torch.equal(found.pull(z), metric.pull(z))
    assert parcel.bits == metric.bits(dtype) + 8 * dtype.itemsize * D
    assert protocol.metric_tag(parcel) == protocol.metric_tag(protocol.pack_metric(metric))
    assert protocol.metric_tag(parcel) != protocol.metric_tag(protocol.pack_metric(metric.about(metric.mean + 1)))


@pytest.mark.parametrize(
    "spoil",
    [
        spoiled_header(metric="riemannian"),
        spoiled_header(metric="diagonal"),
        spoiled_arrays(root=None),
        spoiled_arrays(mean=dense(normal(D + 1))),
        spoiled_arrays(root=triangle(torch.eye(D + 1))),
        spoiled_arrays(root=dense(torch.eye(D))),
    ],
)
def test_a_spoiled_metric_is_refused(spoil: Spoil) -> None:
    parcel = protocol.pack_metric(metric_of("hessian", torch.float32))
    parcel = spoil(parcel)
    with pytest.raises(DataError):
        protocol.unpack_metric(parcel, torch.zeros(D), BLOCKS)


def test_a_failure_there_and_back() -> None:
    failure = protocol.Failure(2, 7, "estimate", 'Traceback:\n  "quoted"\n')
    assert protocol.Failure.of_reason(failure.reason(), 2, 7) == failure
    assert protocol.Failure.of_reason(failure.reason(), -1, 7).client == 2
    foreign = protocol.Failure.of_reason("<class 'RuntimeError'>: gone", 1, 3)
    assert (foreign.client, foreign.round, foreign.stage) == (1, 3, "answer")
    assert "gone" in foreign.detail
    assert "no reason" in protocol.Failure.of_reason(None, 1, 3).detail


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
