"""The local fleet: two engines with the same draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain_rounding import alone, draws_bound
from local_fleets import (
    CHAINS,
    ENGINES,
    FAULTS,
    FLOAT64,
    PARTICIPATION,
    ROUNDS,
    SEED,
    UPLINKS,
    Rig,
    make_uplink,
    quadratic,
    softmax,
)
from rounding import assert_within
from running_error import RunningError
from torch import Tensor

from fedsample.clients import client_stack as workers
from fedsample.compression import RandBlock
from fedsample.fleets.local import Engine, LocalFleet
from fedsample.protocol.exchange import Request, Traffic
from fedsample.random import key
from fedsample.targets import Clients
from fedsample.targets.metric import Dense


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other is None or (one is not None and other is not None and torch.equal(one, other))


def assert_same_decisions(one: Rig, other: Rig) -> None:
    """Coins, cohorts, arrivals, acknowledgements and supports: everything discrete."""
    assert len(one.requests) == len(other.requests) > 0
    for at, (a, b) in enumerate(zip(one.requests, other.requests, strict=True)):
        assert a.round == b.round
        assert equal(a.sync, b.sync)
        assert equal(a.active, b.active)
        assert equal(a.applied, b.applied)
        x, y = one.aggregates[at], other.aggregates[at]
        assert torch.equal(x.arrived, y.arrived)
        assert x.arrival == y.arrival
        assert x.traffic == y.traffic
        uploads = one.uploads(at), other.uploads(at)
        assert len(uploads[0]) == len(uploads[1])
        for u, v in zip(*uploads, strict=True):
            assert (u.packet is None) == (v.packet is None)
            assert (u.dense is None) == (v.dense is None)
            if u.packet is not None and v.packet is not None:
                assert equal(u.packet.indices, v.packet.indices)


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("participation", PARTICIPATION)
@pytest.mark.parametrize("faults", FAULTS, ids=["calm", "loss", "away", "both"])
def test_engines_agree_to_the_bit_on_quadratics(uplink: str, participation: float, faults: dict[str, float]) -> None:
    """Elementwise arithmetic rounds alike in any shape, and both engines sum along one tree."""
    rigs = [Rig(quadratic(), uplink, engine=e, participation=participation, kernel="baoab", **faults) for e in ENGINES]
    states = [rig.run(ROUNDS) for rig in rigs]
    assert_same_decisions(*rigs)
    for one, other in zip(rigs[0].aggregates, rigs[1].aggregates, strict=True):
        assert equal(one.total, other.total)
    for name, tensor in states[0].tensors().items():
        assert torch.equal(tensor, states[1].tensors()[name]), name
    memories = [rig.fleet.state() for rig in rigs]
    assert memories[0].keys() == memories[1].keys()
    for name, tensor in memories[0].items():
        assert torch.equal(tensor, memories[1][name]), name
    assert bool(torch.isfinite(states[0].params).all())


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("participation", PARTICIPATION)
@pytest.mark.parametrize("faults", FAULTS, ids=["calm", "loss", "away", "both"])
def test_engines_agree_to_the_bit_on_softmax_where_each_client_is_computed_alone(
    uplink: str, participation: float, faults: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the shapes of their matrix products tells them apart."""
    alone(monkeypatch)
    rigs = [Rig(softmax(), uplink, engine=engine, participation=participation, **faults) for engine in ENGINES]
    assert torch.equal(*(positions_and_totals(rig) for rig in rigs))
    assert_same_decisions(*rigs)


def positions_and_totals(rig: Rig) -> Tensor:
    """(ROUNDS + 1, C, d): the sums of each round, and where the chains end."""
    end = rig.run(ROUNDS).params
    return torch.stack([*(each.total for each in rig.aggregates if each.total is not None), end])


@pytest.mark.rounding
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("faults", [FAULTS[0], {"participation": 0.5, **FAULTS[3]}], ids=["calm", "all"])
def test_engines_agree_to_rounding_on_softmax(
    uplink: str, faults: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their matrix products have other shapes: some last bits a gradient, and what the chain makes of them."""
    rigs = [Rig(softmax(), uplink, engine=engine, **faults) for engine in ENGINES]
    one, other = (positions_and_totals(rig) for rig in rigs)
    assert_same_decisions(*rigs)
    assert_within(one, other, draws_bound(monkeypatch, lambda: positions_and_totals(Rig(softmax(), uplink, **faults))))


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("outputs", [("hessian",), ("factors", "value"), ("diagonal", "gradient")])
@pytest.mark.parametrize("engine", ENGINES)
def test_matrices_of_many_clients_are_never_held_at_once(
    engine: Engine, outputs: tuple[str, ...], whitened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = softmax()
    fleet = LocalFleet(clients, make_uplink("dense"), SEED, CHAINS, engine=engine)
    mean = torch.zeros(clients.d, dtype=FLOAT64)
    if whitened:
        hessian = clients.hessian(mean.unsqueeze(0))[:, 0].sum(0)
        fleet.set_metric(Dense.of_precision(mean, hessian + torch.eye(clients.d, dtype=FLOAT64)))
    request = Request(1, torch.full((CHAINS, clients.d), 0.1, dtype=FLOAT64), frozenset(outputs))
    with RunningError() as analysis:
        whole = fleet.exchange(request)
    held: list[int] = []
    evaluate = workers.ClientStack._evaluate

    def counted(self: workers.ClientStack, part: Clients, *arguments: Any) -> dict[str, Tensor]:
        held.append(part.n)
        return evaluate(self, part, *arguments)

    monkeypatch.setattr(workers.ClientStack, "_evaluate", counted)
    points = CHAINS if outputs == ("hessian",) else 1  # Hessians are those of every point
    monkeypatch.setattr(workers, "_ENTRIES", 2 * points * clients.d**2)
    with analysis:
        runs = fleet.exchange(request)
    assert runs.traffic == whole.traffic
    for name, each in whole.sums.items():
        analysis.close(runs.sums[name], each)
    assert max(held) == (1 if engine == "by-client" else 2 if whitened or outputs == ("hessian",) else 5)


@pytest.mark.rounding
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("clients", [quadratic(dense=True), softmax()], ids=["dense quadratic", "softmax in batches"])
def test_engines_agree_to_rounding_with_dense_hessians_and_minibatches(
    uplink: str, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rig(engine: Engine) -> Rig:
        return Rig(clients, uplink, engine=engine, participation=0.5, batch_size=6, loss=0.2)

    rigs = [rig(engine) for engine in ENGINES]
    one, other = (positions_and_totals(each) for each in rigs)
    assert_same_decisions(*rigs)
    assert_within(one, other, draws_bound(monkeypatch, lambda: positions_and_totals(rig("batched"))))
    alone(monkeypatch)
    assert torch.equal(*(positions_and_totals(rig(engine)) for engine in ENGINES))


@pytest.mark.rounding
@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64])
def test_engines_agree_with_blocks_and_a_metric(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Points in the coordinates of a metric, given once; a diagonal metric would be exact, a dense one rounds."""
    clients = quadratic(dtype=dtype)
    hessian = torch.diag(clients.curvature.sum(0)) + 0.1
    metric = Dense.of_precision(torch.full((clients.d,), 0.3, dtype=dtype), hessian)

    def run(engine: Engine) -> Tensor:
        rig = Rig(clients, make_uplink("diana", RandBlock(2)), engine=engine, loss=0.1)
        sent = rig.fleet.set_metric(metric)
        width = torch.finfo(dtype).bits
        assert sent == Traffic(0, clients.n * width * (clients.d * (clients.d + 1) // 2 + clients.d), 0)
        return rig.run(ROUNDS).params.unsqueeze(0)

    one, other = (run(engine) for engine in ENGINES)
    assert_within(one, other, draws_bound(monkeypatch, lambda: run("batched")))
    alone(monkeypatch)
    assert torch.equal(*(run(engine) for engine in ENGINES))


def test_a_decision_that_differs_is_caught() -> None:
    """The comparison fails where one engine draws other masks, or loses another reply."""
    rigs = [Rig(quadratic(), "diana"), Rig(quadratic(), make_uplink("diana", RandBlock(0.34)))]
    for rig in rigs:
        rig.run(3)
    with pytest.raises(AssertionError):
        assert_same_decisions(*rigs)
    rigs = [Rig(quadratic(), "diana", loss=0.2), Rig(quadratic(), "diana", loss=0.3)]
    for rig in rigs:
        rig.run(8)
    with pytest.raises(AssertionError):
        assert_same_decisions(*rigs)


def test_exact_sums_are_the_same_in_both_engines_and_counted() -> None:
    clients = softmax()
    fleets = [Rig(clients, "diana", engine=engine).fleet for engine in ENGINES]
    point = key(4, purpose="points").normal(clients.d).unsqueeze(0)
    names = frozenset({"value", "gradient", "hessian", "squared_hvp"})
    with RunningError() as analysis:
        one, other = (fleet.exchange(Request(0, point, names, vector=point)) for fleet in fleets)
        gradient, squares = clients.gradient(point).sum(0), clients.hvp(point, point).square().sum(0)[0]
    assert one.total is None
    assert one.traffic == other.traffic
    d = clients.d
    assert one.traffic.up == one.traffic.up_dense == 5 * 64 * (1 + d + d + d * (d + 1) // 2)
    assert one.traffic.down == 5 * 64 * 2 * d
    for name in names:
        analysis.close(one.sums[name], other.sums[name])
    analysis.close(one.sums["gradient"], gradient)
    analysis.close(one.sums["squared_hvp"], squares)


def test_probes_and_points_are_averaged_where_the_data_are() -> None:
    """The mean over vectors and the variance over points travel as d values, however many there are."""
    clients = softmax()
    fleet = Rig(clients, "diana").fleet
    points = key(4, purpose="points").fold(torch.arange(6)).normal(clients.d)
    names = frozenset({"squared_hvp", "gradient_variance"})
    with RunningError() as analysis:
        answer = fleet.exchange(Request(0, points, names, vector=points.roll(1, 0)))
        squares = clients.hvp(points, points.roll(1, 0)).square().mean(1).sum(0)
        variance = clients.gradient(points).var(1).sum(0)
    assert answer.traffic.up == 5 * 64 * 2 * clients.d
    analysis.close(answer.sums["squared_hvp"], squares)
    analysis.close(answer.sums["gradient_variance"], variance)
