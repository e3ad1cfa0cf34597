"""The codec of answers and metrics: there and back, and everything else refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_requests import CHAINS, SEED, D, N, Spoil, normal, request_of, spoiled_arrays, spoiled_header, without

from fedsample import compression, estimators, protocol
from fedsample.clients.client_stack import ClientStack
from fedsample.compression import LinkKeys
from fedsample.errors import DataError
from fedsample.estimators import Turn, Uplink
from fedsample.protocol.answers import Answer
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.quantities import QUANTITIES
from fedsample.protocol.wire import Array, dense, triangle
from fedsample.targets import GeneralizedLinear, Quadratic
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker, Metric

UPLINKS = [
    ("dense", "identity", 1.0),
    ("diana", "randk", 2),
    ("diana", "randblock", 0.5),
    ("marina", "randk", 3),
    ("marina", "identity", 1.0),
]


def uplink_of(name: str, compressor: str, k: float) -> Uplink:
    return estimators.build(name, compression.build(compressor, k))


def quadratic(dtype: torch.dtype = torch.float32) -> Quadratic:
    return Quadratic(normal(N, D, seed=2, dtype=dtype).square() + 0.5, normal(N, D, seed=3, dtype=dtype))


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
    request = Request(0, points, frozenset(QUANTITIES.keys() - {"value_and_gradient"}), vector=vectors)
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
