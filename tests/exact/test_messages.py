"""The codec between requests, answers, metrics and Flower's records: there and back, and everything else refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedsample import compression, estimators, messages
from fedsample.clients.worker import Answer, Worker
from fedsample.compression import LinkKeys
from fedsample.errors import DataError
from fedsample.estimators import Turn, Uplink
from fedsample.exchange import ESTIMATE, EXACT, Request
from fedsample.targets import GeneralizedLinear, Quadratic
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, Metric
from fedsample.wire import ARRAYS, BITS, DENSE, HEADER, TRIANGLE, Form, bits, dense, read, triangle, wire_bits

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
    assert wire_bits(RecordDict({ARRAYS: ArrayRecord({"mask": array})})) == chains
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
    outgoing = messages.Outgoing(request, "tag", coins=True)
    like = torch.zeros(D, dtype=dtype)
    for client in range(N):
        records = outgoing.records(client, estimate=True)
        found = messages.unpack_request(records, N, CHAINS, like)
        assert (found.round, found.epoch, found.outputs) == (request.round, request.epoch, request.outputs)
        for name in ("points", "previous", "sync"):
            assert torch.equal(getattr(found, name), getattr(request, name))
        assert found.active is not None
        assert found.applied is not None
        assert torch.equal(found.active[client], request.active[client])  # type: ignore[index]
        assert found.applied[client] == request.applied[client]  # type: ignore[index]
        assert wire_bits(records) == 2 * CHAINS * D * 8 * dtype.itemsize + CHAINS


def test_what_nobody_needs_does_not_travel() -> None:
    request = request_of((ESTIMATE, "value"), sync=None, active=None)
    bare = messages.Outgoing(request, "", coins=False)
    found = messages.unpack_request(bare.records(1, previous=False), N, CHAINS, torch.zeros(D))
    assert (found.previous, found.sync, found.active) == (None, None, None)
    with_coins = messages.Outgoing(request, "", coins=True)
    assert messages.unpack_request(with_coins.records(1), N, CHAINS, torch.zeros(D)).sync is None
    others = messages.Outgoing(request_of((ESTIMATE, "value")), "", coins=True).records(1, estimate=False)
    found = messages.unpack_request(others, N, CHAINS, torch.zeros(D))
    assert found.outputs == {"value"}
    assert wire_bits(others) == 32 * CHAINS * D


def test_an_exact_request_has_any_number_of_points() -> None:
    request = Request(0, normal(5, D), frozenset({"hvp", "squared_hvp"}), vector=normal(5, D, seed=2))
    records = messages.Outgoing(request, "", coins=False).records(0, estimate=False)
    found = messages.unpack_request(records, N, CHAINS, torch.zeros(D))
    assert torch.equal(found.points, request.points)
    assert torch.equal(found.vector, request.vector)  # type: ignore[arg-type]


def spoiled_header(**fields: object) -> Callable[[RecordDict], None]:
    def spoil(records: RecordDict) -> None:
        for name, value in fields.items():
            if value is None:
                del records[HEADER][name]
            else:
                records[HEADER][name] = value  # type: ignore[index]

    return spoil


def spoiled_arrays(**arrays: Array | None) -> Callable[[RecordDict], None]:
    def spoil(records: RecordDict) -> None:
        for name, value in arrays.items():
            if value is None:
                del records[ARRAYS][name]
            else:
                records[ARRAYS][name] = value  # type: ignore[index]

    return spoil


def without(name: str) -> Callable[[RecordDict], None]:
    def spoil(records: RecordDict) -> None:
        del records[name]

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        without(HEADER),
        without(ARRAYS),
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
def test_a_spoiled_request_is_refused(spoil: Callable[[RecordDict], None]) -> None:
    records = messages.Outgoing(request_of(), "", coins=True).records(0, estimate=True)
    spoil(records)
    with pytest.raises(DataError):
        messages.unpack_request(records, N, CHAINS, torch.zeros(D))


# --- answers ----------------------------------------------------------------------------------------------------------


def answer_of(uplink: Uplink, request: Request, client: int, dtype: torch.dtype) -> Answer:
    worker = Worker(quadratic(dtype).client(client), uplink, SEED, CHAINS, torch.tensor([client]))
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
    forms = messages.exact_forms(request, [])
    for client in range(N):
        answer, turn = answer_of(uplink, request, client, dtype), turn_of(request, client)
        records = messages.pack_answer(answer, request, client, uplink)
        upload, exact = messages.unpack_answer(records, client, turn, request.round, forms, uplink)
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
        assert wire_bits(records) == uplink.bits(int(active.sum()), syncing, D, dtype) + outputs


def test_exact_outputs_there_and_back() -> None:
    x, y = normal(12, 2), torch.arange(12) % 3
    clients = GeneralizedLinear(x, y, torch.tensor([0, 5, 12]), "categorical", 3)
    points, vectors = normal(3, clients.d), normal(3, clients.d, seed=2)
    request = Request(0, points, frozenset(EXACT), vector=vectors)
    forms = messages.exact_forms(request, clients.blocks())
    uplink = uplink_of("dense", "identity", 1.0)
    worker = Worker(clients.client(1), uplink, SEED, CHAINS, torch.tensor([1]))
    answer = worker.answer(request)
    records = messages.pack_answer(answer, request, 1, uplink)
    upload, exact = messages.unpack_answer(records, 1, None, 0, forms, uplink)
    assert upload is None
    assert exact.keys() == answer.exact.keys() == forms.keys()
    assert all(torch.equal(exact[name], answer.exact[name][0]) for name in exact)
    assert wire_bits(records) == sum(form.bits for form in forms.values())


@pytest.mark.parametrize(
    "spoil",
    [
        without(HEADER),
        without(ARRAYS),
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
def test_a_spoiled_answer_is_refused(spoil: Callable[[RecordDict], None]) -> None:
    uplink = uplink_of("diana", "randk", 2)
    request = request_of((ESTIMATE, "value"), sync=None, active=None)
    records = messages.pack_answer(answer_of(uplink, request, 1, torch.float32), request, 1, uplink)
    assert len(records[ARRAYS]["upload"].data) == 24  # type: ignore[index, union-attr]
    spoil(records)
    forms = messages.exact_forms(request, [])
    with pytest.raises(DataError):
        messages.unpack_answer(records, 1, turn_of(request, 1), request.round, forms, uplink)


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
    records = messages.pack_metric(metric)
    found = messages.unpack_metric(records, torch.zeros(D, dtype=dtype), BLOCKS)
    assert found.name == name
    assert torch.equal(found.push(z), metric.push(z))
    assert torch.equal(found.pull(z), metric.pull(z))
    assert wire_bits(records) == metric.bits(dtype) + 8 * dtype.itemsize * D
    assert messages.metric_tag(records) == messages.metric_tag(messages.pack_metric(metric))
    assert messages.metric_tag(records) != messages.metric_tag(messages.pack_metric(metric.about(metric.mean + 1)))


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
def test_a_spoiled_metric_is_refused(spoil: Callable[[RecordDict], None]) -> None:
    records = messages.pack_metric(metric_of("hessian", torch.float32))
    spoil(records)
    with pytest.raises(DataError):
        messages.unpack_metric(records, torch.zeros(D), BLOCKS)


def test_a_failure_there_and_back() -> None:
    failure = messages.Failure(2, 7, "estimate", 'Traceback:\n  "quoted"\n')
    assert messages.Failure.of_reason(failure.reason(), 2, 7) == failure
    assert messages.Failure.of_reason(failure.reason(), -1, 7).client == 2
    foreign = messages.Failure.of_reason("<class 'RuntimeError'>: gone", 1, 3)
    assert (foreign.client, foreign.round, foreign.stage) == (1, 3, "answer")
    assert "gone" in foreign.detail
    assert "no reason" in messages.Failure.of_reason(None, 1, 3).detail


def test_a_record_of_the_wrong_kind_is_no_header() -> None:
    records = RecordDict({HEADER: ArrayRecord(), ARRAYS: ConfigRecord()})
    with pytest.raises(DataError, match="not made by fedsample"):
        messages.unpack_request(records, N, CHAINS, torch.zeros(D))
