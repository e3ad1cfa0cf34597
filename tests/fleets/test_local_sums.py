"""The local fleet: the sum over what arrives, and who is asked."""

from __future__ import annotations

import math

import pytest
import torch
from local_fleets import (
    CHAINS,
    ENGINES,
    FLOAT64,
    ROUNDS,
    SEED,
    UPLINKS,
    Rig,
    asked_clients,
    make_uplink,
    quadratic,
    softmax,
)
from rounding import agree, assert_within
from running_error import RunningError
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import Engine, LocalFleet
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.strategies import Cohort
from fedsample.targets import Clients

# --- the sum over what arrives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("uplink", UPLINKS)
def test_the_total_is_the_sum_over_the_uploads_that_arrived(engine: Engine, uplink: str) -> None:
    rig = Rig(quadratic(), uplink, engine=engine, participation=0.6, loss=0.3, dropout=0.1)
    rig.run(30)
    partial = 0
    for at, (request, aggregate) in enumerate(zip(rig.requests, rig.aggregates, strict=True)):
        asked = asked_clients(rig, at)
        total = torch.zeros(CHAINS, rig.fleet.d, dtype=FLOAT64)
        size = torch.zeros_like(total)
        for i, upload in zip(asked, rig.uploads(at), strict=True):
            active = None if request.active is None else request.active[i]
            if aggregate.arrived[i]:
                each = rig.uplink.decompress(upload, request.sync, active, rig.fleet.d)
                total, size = total + each, size + each.abs()
        partial += int(aggregate.arrived.sum()) < len(asked)
        assert aggregate.total is not None
        agree(aggregate.total, total, rig.fleet.n, size)
        assert not (aggregate.arrived & ~torch.isin(torch.arange(5), torch.tensor(asked))).any()
    assert partial >= 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_total_is_gradients_summed_not_averaged(engine: Engine) -> None:
    clients = quadratic()
    rig = Rig(clients, "dense", engine=engine)
    aggregate = rig.exchange(rig.sampler.request(rig.state))
    assert aggregate.total is not None
    each = clients.gradient(rig.state.params)
    agree(aggregate.total, each.sum(0), clients.n, each.abs().sum(0))
    assert aggregate.arrival == 1
    assert aggregate.arrived.all()


class Nobody(Faults):
    """No client is ever present."""

    @property
    def any(self) -> bool:
        return True

    def present(self, round: int, before: Tensor | None) -> Tensor:
        return torch.zeros(self.n, dtype=torch.bool)


class Nothing(Faults):
    """Every reply is lost."""

    @property
    def any(self) -> bool:
        return True

    def delivered(self, round: int) -> Tensor:
        return torch.zeros(self.n, dtype=torch.bool)


@pytest.mark.parametrize("kind", [Nobody, Nothing])
@pytest.mark.parametrize(("engine", "n"), [("batched", 5), ("by-client", 5), ("batched", 1)])
@pytest.mark.parametrize("uplink", ["dense", "diana"])
def test_the_sum_over_no_arrivals_is_zero(kind: type[Faults], engine: Engine, n: int, uplink: str) -> None:
    clients = quadratic(n)
    fleet = LocalFleet(clients, make_uplink(uplink), SEED, CHAINS, engine=engine, faults=kind(n, SEED))
    before = fleet.state()
    points = torch.ones(CHAINS, clients.d, dtype=FLOAT64)
    for round in (1, 2):
        aggregate = fleet.exchange(Request(round, points, frozenset({ESTIMATE}), observe=True))
        assert aggregate.total is not None
        assert aggregate.total.shape == (CHAINS, clients.d)
        assert not aggregate.total.any()
        assert not aggregate.arrived.any()
        assert (aggregate.traffic.up == 0) == (kind is Nobody)  # a lost reply was sent
    if kind is Nobody:
        after = fleet.state()
        assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_nobody_may_be_asked_of_a_regression(batch_size: int | None) -> None:
    clients = softmax()
    fleet = LocalFleet(
        clients, make_uplink("diana"), SEED, CHAINS, batch_size=batch_size, faults=Nobody(clients.n, SEED)
    )
    points = torch.ones(CHAINS, clients.d, dtype=FLOAT64)
    aggregate = fleet.exchange(Request(1, points, frozenset({ESTIMATE})))
    assert aggregate.total is not None
    assert not aggregate.total.any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_client_without_rows_contributes_nothing(engine: Engine, batch_size: int | None) -> None:
    """With it or without it the others send the same; its own uploads are zeros."""
    clients = softmax()
    rig = Rig(clients, "diana", engine=engine, batch_size=batch_size, observe=True)
    rig.run(10)
    for at, aggregate in enumerate(rig.aggregates):
        packet = rig.uploads(at)[1].packet
        assert packet is not None
        assert not packet.values.any()
        assert aggregate.norms is not None
        assert float(aggregate.norms[1]) == 0
        assert bool((aggregate.norms[[0, 2, 3, 4]] > 0).all())
    assert not rig.fleet.state()["memory.shift"][1].any()
    points = rig.requests[-1].points
    with RunningError() as analysis:
        want = clients.potential(points).sum(0)
    assert_within(rig.aggregates[-1].sums["value"], want, 2 * analysis.error(want))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("clients", [quadratic(1), softmax((0, 20))], ids=["quadratic", "softmax"])
def test_a_federation_of_one(engine: Engine, uplink: str, clients: Clients) -> None:
    rig = Rig(clients, uplink, engine=engine, loss=0.2)
    state = rig.run(ROUNDS)
    assert torch.equal(state.params, Rig(clients, uplink, loss=0.2).run(ROUNDS).params)
    assert bool(torch.isfinite(state.params).all())


def test_a_diana_fleet_and_its_server_agree_on_the_sum_of_memories() -> None:
    """Over the whole stack, with cohorts, losses and drop-outs: the server's sum is what acknowledged packets made."""
    rig = Rig(quadratic(), "diana", participation=0.5, loss=0.2, dropout=0.1)
    rate = rig.uplink.rate(rig.fleet.d)  # type: ignore[attr-defined]
    for _ in range(5):
        state = rig.run(10)
        # each end adds one scaled packet per round, the server after summing clients: no partial sum exceeds the sizes
        sent = [
            rig.uplink.decompress(upload, rig.requests[at].sync, None, rig.fleet.d).abs() * rate
            for at in range(len(rig.requests))
            for upload in rig.uploads(at)
        ]
        size = torch.stack(sent).sum(0)
        memory = rig.fleet.state()
        pending = memory["memory.pending"] * (memory["memory.round"] == state.applied)[:, None, None]
        shifts = memory["memory.shift"].scatter_add(
            -1,
            memory["memory.support"],
            pending * rate,
        )
        agree(state.uplink["shift"], shifts.sum(0), len(rig.requests) + rig.fleet.n + 2, size)


# --- who is asked -----------------------------------------------------------------------------------------------------


def test_full_participation_needs_no_mask() -> None:
    for size in (1.0, 5):
        assert Cohort(5, CHAINS, SEED, size).active(3, None, False) is None
    for uplink in UPLINKS:
        rig = Rig(quadratic(), uplink, participation=5, loss=0.2)
        rig.run(5)
        assert all(request.active is None for request in rig.requests)
    calm = Rig(quadratic(), "diana")
    calm.run(3)
    assert all(aggregate.arrived.all() and aggregate.arrival == 1 for aggregate in calm.aggregates)


@pytest.mark.parametrize("size", [0, -1, 6, 0.0, -0.5, 1.5, math.nan])
def test_an_impossible_cohort_is_refused(size: float) -> None:
    with pytest.raises(ConfigError, match=rf"participation = {size}: choose a probability in \(0, 1\] or .* 1..5"):
        Cohort(5, CHAINS, SEED, size)


def test_cohorts_have_their_size_their_probability_and_one_a_chain() -> None:
    n, chains, rounds = 8, 4, 2000
    fixed, free = Cohort(n, chains, SEED, 3), Cohort(n, chains, SEED, 0.3)
    assert fixed.probability == 3 / 8
    assert free.probability == 0.3
    for cohort, q in ((fixed, 3 / 8), (free, 0.3)):
        masks = [cohort.active(r, None, False) for r in range(1, rounds + 1)]
        active = torch.stack([m for m in masks if m is not None]).double()  # (rounds, n, C)
        assert active.shape == (rounds, n, chains)
        deviation = math.sqrt(q * (1 - q) / rounds)
        assert float((active.mean(0) - q).abs().max()) < 5 * deviation
        if cohort is fixed:
            assert (active.sum(1) == 3).all()
        # Chains choose independently, and so do rounds: otherwise no diagnostic across chains could be trusted.
        centred = active - q
        for a, b in ((centred[..., :-1], centred[..., 1:]), (centred[:-1], centred[1:])):
            z = float((a * b).mean()) / (q * (1 - q)) * math.sqrt(a[:, 0].numel())
            assert abs(z) < 5
    assert not torch.equal(fixed.active(1, None, False), fixed.active(2, None, False))  # type: ignore[arg-type]


def test_a_synchronising_chain_asks_everyone_and_only_that_chain() -> None:
    cohort, sync = Cohort(8, 3, SEED, 2), torch.tensor([False, True, False])
    plain, synced = cohort.active(4, sync, False), cohort.active(4, sync, True)
    assert plain is not None
    assert synced is not None
    assert (plain.sum(0) == 2).all()
    assert synced[:, 1].all()
    assert torch.equal(synced[:, [0, 2]], plain[:, [0, 2]])


def test_marina_tosses_a_coin_for_each_chain() -> None:
    rig = Rig(quadratic(), "marina")
    rig.run(60)
    coins = torch.stack([r.sync if r.sync is not None else torch.zeros(CHAINS, dtype=torch.bool) for r in rig.requests])
    assert coins[0].all()
    assert abs(float(coins[1:].double().mean()) - 0.3) < 5 * math.sqrt(0.21 / (59 * CHAINS))
    assert 0 < int((coins.sum(1) == 1).sum())
    assert all(request.sync is None or request.sync.any() for request in rig.requests)
