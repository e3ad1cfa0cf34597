"""The local fleet: two engines with the same draws, exact traffic, states that resume, and faults with their laws."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from chain_rounding import alone, draws_bound
from rounding import agree, assert_within, near
from running_error import RunningError
from torch import Tensor

from fedsample.clients import client_stack as workers
from fedsample.clients.client_stack import ClientStack
from fedsample.compression import Identity as NoCompression
from fedsample.compression import RandBlock, RandK
from fedsample.errors import ConfigError
from fedsample.estimators import Links, Uplink, Upload, build
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import Engine, LocalFleet
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request, Traffic
from fedsample.random import key
from fedsample.strategies import Baoab, Cohort, Driver, Langevin, Stability, State
from fedsample.targets import Clients, GaussianPrior, GeneralizedLinear, Quadratic
from fedsample.targets.metric import Dense, Identity

FLOAT64 = torch.float64
SEED, CHAINS, ROUNDS = 11, 3, 20
UPLINKS = ["dense", "marina", "diana"]
ENGINES: list[Engine] = ["batched", "by-client"]
PARTICIPATION: list[float | int] = [1.0, 0.5, 2]
AWAY = {"dropout": 0.1, "dropout_rounds": 3.0}
FAULTS = [{}, {"loss": 0.2}, AWAY, {"loss": 0.2, **AWAY}]


# --- small problems -------------------------------------------------------------------------------------------------


def quadratic(n: int = 5, d: int = 6, dtype: torch.dtype = FLOAT64, *, dense: bool = False) -> Quadratic:
    draws = key(1, purpose="quadratic").normal(2 * n * d, dtype).view(2, n, d)
    if not dense:
        return Quadratic(draws[0].abs() + 0.2, draws[1])
    root = key(2, purpose="root").normal(n * d * d, dtype).view(n, d, d)
    return Quadratic(root @ root.transpose(-1, -2) / d, draws[1])


def softmax(offsets: tuple[int, ...] = (0, 7, 7, 30, 55, 60), dtype: torch.dtype = FLOAT64) -> GeneralizedLinear:
    """Five clients with 7, 0, 23, 25 and 5 rows; three classes."""
    keys = key(3, purpose="softmax")
    x, y = keys.normal(offsets[-1] * 4, dtype).view(-1, 4), keys.fold("labels").integers(3, offsets[-1])
    return GeneralizedLinear(x, y, torch.tensor(offsets), "categorical", 3)


def make_uplink(name: str, compressor: Any = None, p: float | None = None) -> Uplink:
    if name == "dense":
        return build(name, NoCompression())
    return build(name, compressor or RandK(0.34), (0.3 if p is None else p) if name == "marina" else None)


class Rig:
    """A sampler over a local fleet, with every request, aggregate and answer written down."""

    def __init__(
        self,
        clients: Clients,
        uplink: str | Uplink,
        *,
        engine: Engine = "batched",
        participation: float | int = 1.0,
        batch_size: int | None = None,
        kernel: Literal["langevin", "baoab"] = "langevin",
        step_size: float = 0.02,
        observe: bool = False,
        **faults: float,
    ) -> None:
        self.uplink = make_uplink(uplink) if isinstance(uplink, str) else uplink
        self.faults = Faults(clients.n, SEED, **faults)
        self.fleet = LocalFleet(
            clients, self.uplink, SEED, CHAINS, batch_size=batch_size, engine=engine, faults=self.faults
        )
        self.observe = observe
        common: dict[str, Any] = {"step_size": step_size, "temperature": 1.0, "seed": SEED}
        self.sampler = Driver(
            Langevin(**common) if kernel == "langevin" else Baoab(friction=1.0, **common),
            Links(self.uplink),
            GaussianPrior(1.0),
            Identity(torch.zeros(clients.d, dtype=clients.dtype)),
            cohort=Cohort(clients.n, CHAINS, SEED, participation),
            stability=Stability(1.0, 1.0, 1e6),
        )
        self.state = self.sampler.begin(torch.ones(CHAINS, clients.d, dtype=clients.dtype))
        self.requests: list[Request] = []
        self.aggregates: list[Aggregate] = []
        self.answers: list[list[Upload]] = []
        for worker in self.fleet.workers:
            self._tap(worker)

    def _tap(self, worker: ClientStack) -> None:
        original = worker.estimate

        def estimate(request: Request, who: Tensor | None = None) -> Upload:
            upload = original(request, who)
            if self.answers:
                self.answers[-1].append(clone(upload))  # the memory may keep and change the same tensors
            return upload

        worker.estimate = estimate  # type: ignore[method-assign]

    def exchange(self, request: Request) -> Aggregate:
        self.answers.append([])
        self.requests.append(request)
        self.aggregates.append(self.fleet.exchange(request))
        return self.aggregates[-1]

    def run(self, rounds: int) -> State:
        for _ in range(rounds):
            request = self.sampler.request(self.state, observe=self.observe)
            self.state = self.sampler.update(self.state, request, self.exchange(request))
        return self.state

    def uploads(self, at: int) -> list[Upload]:
        """One upload for each client that answered in exchange `at`, in client order."""
        return [single(stack, i) for stack in self.answers[at] for i in range(clients_of(stack))]


def clients_of(upload: Upload) -> int:
    values = upload.dense if upload.packet is None else upload.packet.values
    assert values is not None
    return len(values)


def clone(upload: Upload) -> Upload:
    packet = upload.packet
    if packet is not None:
        packet = packet._replace(
            values=packet.values.clone(), indices=None if packet.indices is None else packet.indices.clone()
        )
    return Upload(packet, None if upload.dense is None else upload.dense.clone())


def single(upload: Upload, i: int) -> Upload:
    packet = upload.packet
    if packet is not None:
        packet = packet._replace(values=packet.values[i], indices=None if packet.indices is None else packet.indices[i])
    return Upload(packet, None if upload.dense is None else upload.dense[i])


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


# --- two engines ----------------------------------------------------------------------------------------------------


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
    evaluate = workers.evaluate

    def counted(part: Clients, *arguments: Any) -> dict[str, Tensor]:
        held.append(part.n)
        return evaluate(part, *arguments)

    monkeypatch.setattr(workers, "evaluate", counted)
    monkeypatch.setattr(workers, "_ENTRIES", 2 * clients.d**2)
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


# --- the sum over what arrives --------------------------------------------------------------------------------------


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


def asked_clients(rig: Rig, at: int) -> list[int]:
    """Who was reached in exchange `at`: wanted for some chain, and present unless everyone is waited for."""
    request = rig.requests[at]
    wanted = torch.ones(rig.fleet.n, dtype=torch.bool) if request.active is None else request.active.any(-1)
    waits = rig.uplink.needs_everyone_to_sync and request.sync is not None
    present: Tensor | None = None
    for earlier in rig.requests[: at + 1]:
        present = rig.faults.present(earlier.round, present)
    assert present is not None
    return (wanted if waits else wanted & present).nonzero().squeeze(-1).tolist()


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


# --- who is asked ---------------------------------------------------------------------------------------------------


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


# --- traffic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("participation", PARTICIPATION)
@pytest.mark.parametrize("faults", FAULTS, ids=["calm", "loss", "away", "both"])
@pytest.mark.parametrize(("dtype", "engine"), [(FLOAT64, "by-client"), (torch.float32, "batched")])
def test_traffic_is_the_bytes_of_the_uploads(
    uplink: str, participation: float, faults: dict[str, float], dtype: torch.dtype, engine: Engine
) -> None:
    rig = Rig(quadratic(dtype=dtype), uplink, engine=engine, participation=participation, **faults)
    rig.run(ROUNDS)
    d, width = rig.fleet.d, torch.finfo(dtype).bits
    for at, (request, aggregate) in enumerate(zip(rig.requests, rig.aggregates, strict=True)):
        asked, uploads = asked_clients(rig, at), rig.uploads(at)
        waits = rig.uplink.needs_everyone_to_sync and request.sync is not None
        sends = rig.faults.attempts(request.round) if waits else torch.ones(5, dtype=torch.int64)
        up = dense = 0
        for i, upload in zip(asked, uploads, strict=True):
            active = None if request.active is None else request.active[i]
            times = int(sends[i])  # where the round waits, a lost reply is sent again
            up += times * 8 * len(rig.uplink.to_bytes(upload, request.sync, active))
            dense += times * width * d * (CHAINS if active is None else int(active.sum()))
        assert aggregate.traffic.up == up
        assert aggregate.traffic.up_dense == dense
        if uplink == "marina" and request.active is None and "dropout" in faults:
            continue  # see the next test
        points = CHAINS * d * width * (2 if uplink == "marina" and request.active is not None and at > 0 else 1)
        coins = CHAINS if uplink == "marina" else 0
        assert aggregate.traffic.down == len(asked) * (points + coins)


def test_a_client_that_comes_back_to_marina_is_sent_both_points() -> None:
    """It missed the round before, so it does not hold the point that its difference starts from."""
    rig = Rig(quadratic(), "marina", **AWAY)
    rig.run(30)
    before = list(range(5))
    for at, aggregate in enumerate(rig.aggregates):
        asked = asked_clients(rig, at)
        points = len(asked) + len(set(asked) - set(before))
        assert aggregate.traffic.down == points * CHAINS * rig.fleet.d * 64 + len(asked) * CHAINS
        before = asked


@pytest.mark.parametrize("engine", ENGINES)
def test_observing_costs_one_value_a_client_and_points_for_those_not_asked(engine: Engine) -> None:
    watched, plain = (Rig(quadratic(), "diana", engine=engine, participation=2, observe=o) for o in (True, False))
    assert torch.equal(watched.run(8).params, plain.run(8).params)
    for at, (one, other) in enumerate(zip(watched.aggregates, plain.aggregates, strict=True)):
        assert one.traffic.up - other.traffic.up == one.traffic.up_dense - other.traffic.up_dense == 5 * CHAINS * 64
        others = 5 - len(asked_clients(plain, at))
        assert one.traffic.down - other.traffic.down == others * CHAINS * plain.fleet.d * 64
        assert one.norms is not None
        assert other.norms is None
        assert torch.equal(
            one.norms.isnan().logical_not().nonzero().squeeze(-1), torch.tensor(asked_clients(plain, at))
        )


def test_compression_pays() -> None:
    dense, marina, diana = (Rig(quadratic(d=50), make_uplink(name, RandK(0.1), 0.1)) for name in UPLINKS)
    for rig in (dense, marina, diana):
        rig.run(200)
    totals = [sum(a.traffic.up for a in rig.aggregates) for rig in (dense, marina, diana)]
    assert totals[0] == sum(a.traffic.up_dense for a in diana.aggregates) == 200 * 5 * CHAINS * 50 * 64
    assert totals[2] * 10 == totals[0]
    assert totals[0] / totals[1] == pytest.approx(1 / (0.1 + 0.9 * 0.1), rel=0.2)


def test_traffic_adds_up() -> None:
    assert Traffic(1, 2, 3).plus(Traffic(10, 20, 30)) == Traffic(11, 22, 33)


# --- state and restore ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("participation", [1.0, 2])
@pytest.mark.parametrize(
    ("first", "second"), [("batched", "batched"), ("by-client", "by-client"), ("batched", "by-client")]
)
def test_a_restored_fleet_continues_to_the_bit(
    uplink: str, participation: float, first: Engine, second: Engine
) -> None:
    """From tensors alone, in a new process's place: also in the other engine, where arithmetic is elementwise."""
    options: dict[str, Any] = {"participation": participation, "loss": 0.2, "dropout": 0.1, "kernel": "baoab"}
    whole = Rig(quadratic(), uplink, engine=first, **options)
    want = whole.run(ROUNDS)

    before = Rig(quadratic(), uplink, engine=first, **options)
    before.run(9)
    saved = {name: tensor.clone() for name, tensor in before.fleet.state().items()}
    held = before.fleet.state()
    chain = before.state.tensors()
    before.run(3)
    for name, tensor in saved.items():
        assert torch.equal(held[name], tensor), f"{name} is not a snapshot"

    after = Rig(quadratic(), uplink, engine=second, **options)
    after.fleet.restore(held)
    after.state = State.of_tensors(chain, torch.device("cpu"))
    got = after.run(ROUNDS - 9)
    for name, tensor in saved.items():
        assert torch.equal(held[name], tensor), f"continuing from {name} changes the checkpoint"
    for name, tensor in want.tensors().items():
        assert torch.equal(got.tensors()[name], tensor), name
    final = after.fleet.state()
    assert all(torch.equal(tensor, final[name]) for name, tensor in whole.fleet.state().items())


@pytest.mark.parametrize("uplink", ["marina", "diana"])
@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_restored_regression_continues_to_the_bit(uplink: str, batch_size: int | None) -> None:
    options: dict[str, Any] = {"batch_size": batch_size, "loss": 0.2}
    want = Rig(softmax(), uplink, **options).run(ROUNDS)
    before, after = Rig(softmax(), uplink, **options), Rig(softmax(), uplink, **options)
    before.run(11)
    after.fleet.restore(before.fleet.state())
    after.state = State.of_tensors(before.state.tensors(), torch.device("cpu"))
    assert torch.equal(after.run(ROUNDS - 11).params, want.params)


def test_a_fleet_that_forgets_its_memories_does_not_continue_alike() -> None:
    want = Rig(quadratic(), "diana").run(ROUNDS)
    before, after = Rig(quadratic(), "diana"), Rig(quadratic(), "diana")
    before.run(9)
    after.state = State.of_tensors(before.state.tensors(), torch.device("cpu"))
    assert not torch.allclose(after.run(ROUNDS - 9).params, want.params, rtol=1e-3)


# --- faults ---------------------------------------------------------------------------------------------------------


def binomial_z(successes: int, trials: int, p: float) -> float:
    return abs(successes - trials * p) / math.sqrt(trials * p * (1 - p))


def presence(faults: Faults, rounds: int) -> Tensor:
    """(rounds, n) bool."""
    history: list[Tensor] = []
    for round in range(1, rounds + 1):
        history.append(faults.present(round, history[-1] if history else None))
    return torch.stack(history)


@pytest.mark.parametrize(("dropout", "away"), [(0.1, 10.0), (0.02, 4.0), (0.5, 1.0), (0.9, 3.0)])
def test_presence_is_stationary_with_the_stated_rates(dropout: float, away: float) -> None:
    n, rounds = 4000, 40
    faults = Faults(n, SEED, dropout=dropout, dropout_rounds=away)
    assert faults.any
    there = presence(faults, rounds)
    want = (1 / away) / (1 / away + dropout)
    assert faults.presence == near(want, 4)
    for round in (0, 1, 5, rounds - 1):  # from the first round on: clients are independent, so a binomial each
        assert binomial_z(int(there[round].sum()), n, want) < 5
    left = there[:-1] & ~there[1:]
    assert binomial_z(int(left.sum()), int(there[:-1].sum()), dropout) < 5
    back = ~there[:-1] & there[1:]
    if away == 1:
        assert int(back.sum()) == int((~there[:-1]).sum())  # away for exactly one round
    else:
        assert binomial_z(int(back.sum()), int((~there[:-1]).sum()), 1 / away) < 5
    pair = (there[:, :-1].double() - want) * (there[:, 1:].double() - want)  # neighbours leave independently
    blocks = pair.mean(0)
    assert abs(float(blocks.mean())) < 5 * float(blocks.std()) / math.sqrt(len(blocks))


@pytest.mark.parametrize("loss", [0.01, 0.2, 0.9])
def test_replies_are_lost_at_the_stated_rate_independently(loss: float) -> None:
    n, rounds = 500, 200
    faults = Faults(n, SEED, loss=loss)
    lost = torch.stack([~faults.delivered(round) for round in range(1, rounds + 1)])
    assert binomial_z(int(lost.sum()), n * rounds, loss) < 5
    for a, b in ((lost[1:], lost[:-1]), (lost[:, 1:], lost[:, :-1])):
        assert binomial_z(int((a & b).sum()), a.numel(), loss**2) < 6  # pairs overlap, hence the wider bound
    other = Faults(n, SEED + 1, loss=loss)
    assert not torch.equal(other.delivered(1), faults.delivered(1)) or loss < 0.05


@pytest.mark.parametrize("loss", [0.05, 0.2, 0.7])
def test_attempts_are_geometric(loss: float) -> None:
    n, rounds = 2000, 20
    faults = Faults(n, SEED, loss=loss)
    attempts = torch.stack([faults.attempts(round) for round in range(1, rounds + 1)])
    assert int(attempts.min()) == 1
    for k in (1, 2, 3):
        assert binomial_z(int((attempts > k).sum()), n * rounds, loss**k) < 5
    mean, deviation = 1 / (1 - loss), math.sqrt(loss) / (1 - loss)
    assert abs(float(attempts.double().mean()) - mean) < 5 * deviation / math.sqrt(n * rounds)


def test_presence_loss_and_attempts_do_not_share_draws() -> None:
    n, rounds = 400, 100
    faults = Faults(n, SEED, loss=0.3, dropout=0.3, dropout_rounds=2.0)
    there = presence(faults, rounds)
    lost = torch.stack([~faults.delivered(r) for r in range(1, rounds + 1)])
    again = torch.stack([faults.attempts(r) > 1 for r in range(1, rounds + 1)])
    for a, p, b, q in (
        (there, faults.presence, lost, 0.3),
        (there, faults.presence, again, 0.3),
        (lost, 0.3, again, 0.3),
    ):
        assert binomial_z(int((a & b).sum()), n * rounds, p * q) < 6


def test_calm_weather_draws_nothing() -> None:
    faults = Faults(7, SEED)
    assert not faults.any
    assert faults.presence == 1
    assert faults.present(1, None).all()
    assert faults.delivered(1).all()
    assert faults.attempts(1).tolist() == [1] * 7


@pytest.mark.parametrize("uplink", ["dense", "diana"])
def test_replies_arrive_as_often_as_the_server_believes(uplink: str) -> None:
    """The server scales by this probability, so it must be the frequency."""
    rig = Rig(quadratic(200, 1), uplink, participation=0.4, step_size=1e-4, loss=0.25, dropout=0.2, dropout_rounds=3.0)
    rig.run(40)
    presence_probability = (1 / 3) / (1 / 3 + 0.2)
    wanted = arrived = 0
    for request, aggregate in zip(rig.requests, rig.aggregates, strict=True):
        assert aggregate.arrival == near(presence_probability * 0.75, 4)
        assert request.active is not None
        wanted += int(request.active.any(-1).sum())
        arrived += int(aggregate.arrived.sum())
    # DeviceOptions persists for about 2 rounds, so 40 rounds of 200 clients count as some 4,000 independent trials.
    assert abs(arrived / wanted - presence_probability * 0.75) < 5 * math.sqrt(0.25 / 3000)


def test_a_synchronising_round_of_marina_waits_for_everyone() -> None:
    rig = Rig(quadratic(), "marina", participation=2, loss=0.5, dropout=0.3)
    rig.run(40)
    syncs = 0
    for request, aggregate in zip(rig.requests, rig.aggregates, strict=True):
        if request.sync is not None:
            syncs += 1
            assert aggregate.arrived.all()
            assert aggregate.arrival == 1
        else:
            assert aggregate.arrival == near(rig.faults.presence * 0.5, 4)
    assert syncs > 5
    assert any(not aggregate.arrived.all() for aggregate in rig.aggregates)
