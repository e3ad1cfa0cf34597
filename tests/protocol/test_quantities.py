"""The table of exact quantities: what it declares is what clients compute, what travels and what the documents say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_reference import normal, stack
from torch import Tensor

from fedsample import protocol
from fedsample.clients.client_stack import ClientStack
from fedsample.compression import Identity as Whole
from fedsample.errors import DataError
from fedsample.estimators import Dense, DenseDownlink
from fedsample.fleets.local import LocalFleet
from fedsample.numerics.tree_sum import TreeSum
from fedsample.protocol.answers import Answer
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.quantities import QUANTITIES, Output, Quantity, exact_forms, markdown, unsound_outputs
from fedsample.protocol.wire import TRIANGLE, Form, Parcel, read, triangle
from fedsample.targets import Clients, MetricClients
from fedsample.targets.metric import Dense as DenseMetric
from fedsample.targets.metric import Identity, Metric

PROTOCOL = Path(__file__).parents[2] / "docs" / "devices" / "protocol.md"
KINDS = ("glm", "glm gaussian", "module", "dense", "diagonal")
POINTS = 3


def metric_of(name: str, d: int) -> Metric:
    mean = 0.1 * normal(d, seed=6)
    if name == "identity":
        return Identity(mean)
    root = normal(d, d, seed=7)
    return DenseMetric(mean, root @ root.T / d + torch.eye(d, dtype=mean.dtype), None)


def request_for(name: str, d: int, points: int = POINTS) -> Request:
    vector = normal(points, d, seed=8) if QUANTITIES[name].needs_vector else None
    return Request(0, normal(points, d), frozenset({name}), vector=vector)


@pytest.mark.parametrize("metric", ["identity", "dense"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_arrays_have_the_forms_that_the_row_declares(name: str, kind: str, metric: str) -> None:
    base = stack(kind)
    clients = MetricClients(base, metric_of(metric, base.d))
    request = request_for(name, base.d)
    found = QUANTITIES[name].evaluate(clients, request.points, request.vector)
    forms = exact_forms(request, clients.blocks())
    assert found.keys() == forms.keys()
    for array, form in forms.items():
        assert found[array].shape == (base.n, *form.shape)
        assert found[array].dtype == form.dtype
        if form.stype == TRIANGLE:
            assert torch.equal(found[array], found[array].transpose(-1, -2))


@pytest.mark.parametrize("metric", ["identity", "dense"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_what_a_device_sends_is_what_the_fleet_sums_and_bills(name: str, kind: str, metric: str) -> None:
    clients, uplink = stack(kind), Dense(Whole())
    request = request_for(name, clients.d)
    fleet = LocalFleet(clients, uplink, 0, POINTS, engine="by-client")
    fleet.set_metric(metric_of(metric, clients.d))
    aggregate = fleet.exchange(request)
    forms, bits = exact_forms(request, fleet.workers[0].clients.blocks()), 0
    sums = {array: TreeSum() for array in forms}
    for i in range(clients.n):
        alone = ClientStack(clients.client(i), uplink, 0, POINTS, torch.tensor([i]))
        alone.set_metric(metric_of(metric, clients.d))
        parcel = protocol.pack_answer(alone.answer(request), request, i, uplink)
        _, outputs = protocol.unpack_answer(parcel, i, None, 0, forms, uplink)
        bits += parcel.bits
        for array, tensor in outputs.items():
            sums[array].add(tensor)
    assert aggregate.traffic.up == bits
    assert aggregate.sums.keys() == sums.keys()
    assert all(torch.equal(aggregate.sums[array], total.total()) for array, total in sums.items())


@pytest.mark.parametrize("kind", KINDS)
def test_hessians_are_those_of_every_point(kind: str) -> None:
    clients = stack(kind)
    request = request_for("hessian", clients.d)
    whole = QUANTITIES["hessian"].evaluate(clients, request.points, None)["hessian"]
    for at in range(POINTS):
        alone = QUANTITIES["hessian"].evaluate(clients, request.points[at : at + 1], None)["hessian"]
        assert torch.equal(whole[:, at], alone[:, 0])


@pytest.mark.parametrize("shape", [(4, 4), (1, 1), (3, 5, 5), (2, 3, 2, 2), (2, 0, 0)])
def test_triangles_of_many_matrices_there_and_back(shape: tuple[int, ...]) -> None:
    half = normal(*shape)
    whole = half + half.transpose(-1, -2)
    array = triangle(whole)
    form = Form(TRIANGLE, shape, torch.float64)
    assert torch.equal(read(array, form, "matrices"), whole)
    assert form.bits == 8 * len(array.data)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (set(), r"asks for \[\], expected some of"),
        ({"estimates"}, "expected some of .*'estimate'"),
        ({"value", "speed"}, "asks for .'speed', 'value'., expected some of"),
        ({"value", "value_and_gradient"}, "which hold value twice"),
        ({"value_and_gradient", "gradient", ESTIMATE}, "which hold gradient twice"),
    ],
)
def test_outputs_that_nobody_can_ask_for(outputs: set[str], said: str) -> None:
    assert re.search(said, unsound_outputs(outputs))
    request = Request(0, normal(2, 3), frozenset(outputs))
    with pytest.raises(ValueError, match=said):
        protocol.Outgoing(request, "", coins=False)
    clients = stack("glm")
    with pytest.raises(ValueError, match=said):
        LocalFleet(clients, Dense(Whole()), 0, 2).exchange(replace(request, points=normal(2, clients.d)))
    sound = protocol.Outgoing(replace(request, outputs=frozenset({"value"})), "", coins=False).parcel(0)
    asked = Parcel({**sound.header, "outputs": sorted(outputs)}, sound.arrays)
    with pytest.raises(DataError, match=said):
        protocol.unpack_request(asked, 1, 2, normal(3), protocol.Recall(), DenseDownlink())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["value", "gradient", "hessian", "factors"])
def test_what_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    clients, uplink = stack("glm"), Dense(Whole())
    request = replace(request_for(name, clients.d), round=3)
    exact = ClientStack(clients.client(0), uplink, 0, POINTS, torch.tensor([0])).answer(request).exact
    spoiled = {array: tensor.clone() for array, tensor in exact.items()}
    array = next(iter(spoiled))
    spoiled[array].view(-1)[0] = bad
    parcel = protocol.pack_answer(Answer(None, spoiled), request, 0, uplink)
    with pytest.raises(DataError, match=f"client 0 in round 3: {array} holds NaN or infinite values"):
        protocol.unpack_answer(parcel, 0, None, 3, exact_forms(request, clients.blocks()), uplink)


def test_a_vector_is_asked_for() -> None:
    clients = stack("glm")
    for name, row in QUANTITIES.items():
        if row.needs_vector:
            with pytest.raises(ValueError, match=f"{name} needs a vector"):
                row.evaluate(clients, normal(2, clients.d), None)


def test_a_new_quantity_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms, bits, sums and messages of one that the package does not know."""

    def cubes(clients: Clients, points: Tensor, _: Tensor) -> list[Any]:
        return [clients.gradient(points).pow(3), clients.hessian(points)[:, 0]]

    arrays = (Output("cubes", "P d"), Output("first", "d d", symmetric=True))
    monkeypatch.setitem(QUANTITIES, "cubes_and_first", Quantity("cubes_and_first", "a trial", arrays, cubes))  # type: ignore[arg-type]
    request = Request(0, normal(POINTS, 15), frozenset({"cubes_and_first"}))
    assert {name: form.shape for name, form in exact_forms(request).items()} == {"cubes": (3, 15), "first": (15, 15)}
    test_arrays_have_the_forms_that_the_row_declares("cubes_and_first", "glm", "dense")
    test_what_a_device_sends_is_what_the_fleet_sums_and_bills("cubes_and_first", "glm", "dense")


def test_rows_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match="either all arrays are of a parameter matrix, or none"):
        Quantity("mixed", "", (Output("one", "d"), Output("each{b}", "out")), lambda *_: [])
    short = Quantity("short", "", (Output("one", "d"), Output("two", "d")), lambda clients, points, _: [points])
    with pytest.raises(ValueError, match="short computes 1 arrays, but declares 2"):
        short.evaluate(stack("glm"), normal(2, 15), None)


def test_what_overflows_while_a_run_is_prepared_reaches_who_asked() -> None:
    """Locally it would: U or a Hessian that is not finite is explained there."""
    clients, uplink = stack("glm"), Dense(Whole())
    request = request_for("value", clients.d)
    spoiled = Answer(None, {"value": torch.full((1, POINTS), float("inf"), dtype=torch.float64)})
    parcel = protocol.pack_answer(spoiled, request, 0, uplink)
    _, found = protocol.unpack_answer(parcel, 0, None, 0, exact_forms(request), uplink)
    assert found["value"].isinf().all()


def test_the_protocols_page_shows_the_table() -> None:
    text = PROTOCOL.read_text()
    between = text.split("<!-- quantities -->\n")[1].split("<!-- end of quantities -->")[0]
    assert between == markdown(), "write fedsample.protocol.quantities.markdown() there"


def test_a_request_with_an_estimate_lists_exact_outputs_alone() -> None:
    request = Request(1, normal(2, 5), frozenset({ESTIMATE, "value"}))
    assert list(exact_forms(request)) == ["value"]
    assert list(exact_forms(replace(request, outputs=frozenset({ESTIMATE})))) == []
