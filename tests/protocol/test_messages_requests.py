"""The codec of arrays and requests: there and back, and everything else refused."""

from __future__ import annotations

import pytest
import torch
from small_requests import CHAINS, D, N, Spoil, normal, request_of, spoiled_arrays, spoiled_header, without
from torch import Tensor

from fedsample import protocol
from fedsample.errors import DataError
from fedsample.estimators import DenseDownlink
from fedsample.protocol import Recall
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.wire import BITS, DENSE, TRIANGLE, Array, Form, Parcel, bits, dense, header, read, triangle

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
