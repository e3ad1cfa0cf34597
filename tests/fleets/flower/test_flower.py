"""Every sampler over Flower's messages: the draws of LocalFleet bit for bit, the bytes that were counted, clear errors.

Real ClientApps behind a grid in this process; Flower's own runtimes are in tests/walk and tests/soak.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flower_commands import environment
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from loopback import LoopbackGrid
from rounding import ELEMENTARY, assert_within, gamma
from torch import Tensor

import fedsample
from fedsample import protocol
from fedsample.clients import app as client_module
from fedsample.clients.app import client_app
from fedsample.clients.client_stack import ClientStack
from fedsample.compression import Packet
from fedsample.config import Experiment, dump_toml, load
from fedsample.config.loading import of_run_config
from fedsample.config.presets import PRESETS
from fedsample.errors import ClientError, ConfigError, DataError, DivergenceError, QuorumError
from fedsample.estimators import Diana, Ef21, Links, Marina, build_links
from fedsample.fleets.flower import simulation
from fedsample.fleets.flower.fleet import FlowerFleet, fleet_on
from fedsample.fleets.flower_grid.adapter import identity
from fedsample.fleets.local import LocalFleet
from fedsample.fleets.remote import Federation
from fedsample.monitor.progress import Progress
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared
from fedsample.problem import Problem, build_problem
from fedsample.protocol.exchange import Fleet, Request, Traffic
from fedsample.runs.build import build_driver
from fedsample.strategies import Driver, State
from fedsample.strategies.flower import FlowerStrategy
from fedsample.targets.metric import Dense, Identity

pytestmark = pytest.mark.slow

ROUNDS, CLIENTS = 10, 4
SMALL = ["data.name=diabetes", "model.name=linear", f"data.clients={CLIENTS}", f"rounds={ROUNDS}", "warmup=0", "thin=1"]
SMALL += ["chains=3", "monitor.every=4"]


@pytest.fixture(autouse=True)
def _identity() -> Iterator[None]:
    with identity(1):
        yield


def experiment_of(*settings: str, preset: str = "underdamped-diana") -> Experiment:
    return load({"preset": preset}, [*SMALL, *settings], {})


def prepared_on(experiment: Experiment, problem: Problem, links: Links, fleet: Fleet) -> tuple[Driver, Prepared]:
    prepared = prepare(experiment, problem, links, fleet, Progress(experiment.rounds, mode="quiet"))
    return build_driver(experiment, problem, links, prepared, fleet.n), prepared


def advance(sampler: Driver, state: State, fleet: Fleet, rounds: int, every: int = 4) -> tuple[Tensor, State, Traffic]:
    """Draws (rounds, C, d) of the next rounds, the state after them, and what they cost."""
    draws, traffic = [], Traffic()
    for _ in range(rounds):
        request = sampler.request(state, observe=(state.round + 1) % every == 0)
        aggregate = fleet.exchange(request)
        state = sampler.update(state, request, aggregate)
        traffic = traffic.plus(aggregate.traffic)
        draws.append(sampler.draw(state))
    return torch.stack(draws), state, traffic


class Reference:
    """A chain on LocalFleet, client by client; with what was prepared for another experiment, if that is given."""

    def __init__(self, experiment: Experiment, rounds: int = ROUNDS, prepared: Prepared | None = None) -> None:
        self.experiment, self.problem, self.rounds = experiment, build_problem(experiment), rounds
        clients, size = self.problem.clients, experiment.batch_size
        self.links = build_links(experiment, clients)
        self.fleet = LocalFleet(
            clients,
            self.links.uplink,
            experiment.seed,
            experiment.chains,
            batch_size=size,
            engine="by-client",
            downlink=self.links.downlink,
        )
        if prepared is None:
            self.sampler, self.prepared = prepared_on(experiment, self.problem, self.links, self.fleet)
        else:
            self.fleet.set_metric(prepared.geometry.metric)
            self.prepared = prepared
            self.sampler = build_driver(experiment, self.problem, self.links, prepared, CLIENTS)
        self.draws, self.state, self.traffic = advance(
            self.sampler, self.sampler.begin(self.prepared.start), self.fleet, rounds
        )

    def grid(self, **parts: Any) -> LoopbackGrid:
        return LoopbackGrid(client_app(self.experiment), CLIENTS, **parts)

    def driver(self) -> Driver:
        """Another driver like this one, which has asked nothing yet."""
        return build_driver(self.experiment, self.problem, self.links, self.prepared, CLIENTS)

    def strategy(self) -> FlowerStrategy:
        """The same as a Flower strategy, which has not met a grid."""
        return FlowerStrategy(self.driver())

    def fleet_on(self, grid: Grid) -> FlowerFleet:
        """The clients behind a grid."""
        return fleet_on(grid, self.experiment, self.problem.clients, self.links)


@functools.cache
def reference_of(preset: str) -> Reference:
    """The chain that the tests of a preset share: they read it, and make what they change with its methods."""
    return Reference(experiment_of(preset=preset))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the same chain ---------------------------------------------------------------------------------------------------

CASES = [(preset, share) for preset in PRESETS for share in ("1.0", "0.5", "2")]
SETTINGS = {
    "float64": ("dtype=float64",),
    "minibatches": ("batch_size=16",),
    "kronecker": ("metric.name=kronecker",),
    "diagonal": ("metric.name=diagonal",),
}


@pytest.mark.parametrize(("preset", "participation"), CASES)
def test_every_preset_draws_as_on_local_fleet_and_sends_the_bytes_it_counts(preset: str, participation: str) -> None:
    """The preparation asks all clients whatever share takes part in a round: it is proven once for a preset."""
    whole = reference_of(preset)
    if participation == "1.0":
        check_equality(whole)
    else:
        experiment = experiment_of(f"fleet.participation={participation}", preset=preset)
        check_rounds(reference := Reference(experiment, 8, whole.prepared), *held(reference))


KINDS = list(zip(["langevin-marina", "underdamped-diana"] * 2, SETTINGS.values(), strict=True))


@pytest.mark.parametrize(("preset", "settings"), KINDS, ids=SETTINGS)
def test_so_does_every_kind_of_experiment(preset: str, settings: tuple[str, ...]) -> None:
    check_equality(Reference(experiment_of(*settings, preset=preset)))


def check_equality(reference: Reference) -> None:
    grid = reference.grid()
    fleet = reference.fleet_on(grid)
    sampler, prepared = prepared_on(reference.experiment, reference.problem, reference.links, fleet)
    setup = prepared.geometry.traffic
    assert prepared.step_size == reference.prepared.step_size
    assert setup == reference.prepared.geometry.traffic
    assert sum(down for _, down, _ in grid.log) == setup.down
    assert sum(up for _, _, up in grid.log) == setup.up
    grid.log.clear()
    assert torch.equal(prepared.start, reference.prepared.start)
    check_rounds(reference, grid, fleet, sampler)


def held(reference: Reference) -> tuple[LoopbackGrid, FlowerFleet, Driver]:
    """A grid whose clients hold the metric."""
    grid = reference.grid()
    fleet = reference.fleet_on(grid)
    fleet.set_metric(reference.prepared.geometry.metric)
    grid.log.clear()
    return grid, fleet, reference.driver()


def check_rounds(reference: Reference, grid: LoopbackGrid, fleet: FlowerFleet, sampler: Driver) -> None:
    draws, state, traffic = advance(sampler, sampler.begin(reference.prepared.start), fleet, reference.rounds)
    assert torch.equal(draws, reference.draws)
    assert same(state.tensors(), reference.state.tensors())
    assert traffic == reference.traffic
    assert (sum(down for _, down, _ in grid.log), sum(up for _, _, up in grid.log)) == (traffic.down, traffic.up)
    assert {kind for kind, _, _ in grid.log} == {"train"}
    remembered = {name: each for name, each in reference.fleet.state().items() if name.startswith("memory.")}
    assert same(fleet.state(), remembered)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_flowers_own_start_drives_every_sampler(preset: str) -> None:
    reference = reference_of(preset)
    strategy, grid, draws = reference.strategy(), reference.grid(), []
    assert isinstance(strategy, Strategy)

    def keep(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round:
            draws.append(torch.from_numpy(arrays["params"].numpy()))
        return None

    start = strategy.begin(reference.prepared.start)
    result = strategy.start(
        grid,
        strategy.arrays(start),
        num_rounds=ROUNDS,
        train_config=ConfigRecord({"observe-every": 4}),
        evaluate_config=ConfigRecord({"every": 4}),
        evaluate_fn=keep,
    )
    assert torch.equal(torch.stack(draws), reference.draws)
    assert same(strategy.state_of(result.arrays).tensors(), reference.state.tensors())
    metric = reference.prepared.geometry.metric
    sent = CLIENTS * (metric.bits(torch.float32) + 32 * len(metric.mean))
    assert strategy.traffic == reference.traffic.plus(Traffic(down=sent))
    assert list(result.train_metrics_clientapp) == list(result.evaluate_metrics_clientapp) == [4, 8]
    posterior = reference.problem.posterior
    lags = strategy.driver.downlink.name == "ef21-p"  # then clients see other points than the draws
    for round in (4, 8):  # evaluated where the round ended, observed where it began
        for metrics, theta in (
            (result.evaluate_metrics_clientapp[round], reference.draws[round - 1]),
            *([] if lags else [(result.train_metrics_clientapp[round], reference.draws[round - 2])]),
        ):
            want = -float(posterior.potential(theta).mean())
            # float32 outputs of at most d terms, and a logarithm, in other batches; rows add up in float64
            roundings = theta.shape[-1] + 2 * ELEMENTARY + 4
            assert metrics["log-posterior"] == pytest.approx(want, rel=4 * gamma(roundings, torch.float32))


def test_a_client_may_be_another_process_at_every_message() -> None:
    reference = Reference(experiment_of(preset="langevin-marina"), 3, reference_of("langevin-marina").prepared)

    def fresh() -> None:
        for cache in (client_module._device, client_module._problem, client_module._text_of):
            cache.cache_clear()

    grid = reference.grid(fresh=fresh)
    fleet = reference.fleet_on(grid)
    fleet.set_metric(reference.prepared.geometry.metric)
    draws, _, _ = advance(reference.driver(), reference.sampler.begin(reference.prepared.start), fleet, 3)
    assert torch.equal(draws, reference.draws)


def test_the_experiment_may_come_with_the_run() -> None:
    reference = Reference(experiment_of(), 3, reference_of("underdamped-diana").prepared)
    grid = LoopbackGrid(client_app(), CLIENTS, {"config": dump_toml(reference.experiment), "app.out": "somewhere"})
    fleet = reference.fleet_on(grid)
    fleet.set_metric(reference.prepared.geometry.metric)
    draws, _, _ = advance(reference.driver(), reference.sampler.begin(reference.prepared.start), fleet, 3)
    assert torch.equal(draws, reference.draws)


def test_mods_see_every_message_and_the_bytes_that_are_counted() -> None:
    """With eight chains a mask of coins fills its byte, so that nothing travels that is not counted."""
    reference, seen = Reference(experiment_of("chains=8", preset="langevin-marina"), rounds=3), []

    def octets(message: Message) -> int:
        return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())

    def measured(message: Message, context: Context, call_next: Any) -> Message:
        down = octets(message)
        reply = call_next(message, context)
        seen.append((message.metadata.message_type, down, octets(reply)))
        return reply

    grid = LoopbackGrid(client_app(reference.experiment, mods=[measured]), CLIENTS)
    fleet = reference.fleet_on(grid)
    setup = fleet.set_metric(reference.prepared.geometry.metric)
    advance(reference.driver(), reference.sampler.begin(reference.prepared.start), fleet, 3)
    assert [kind for kind, _, _ in seen] == ["query.hello"] * 4 + ["query.metric"] * 4 + ["train"] * 12
    assert 8 * sum(down for _, down, _ in seen) == setup.down + reference.traffic.down
    assert 8 * sum(up for _, _, up in seen) == reference.traffic.up


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_second_start_goes_on_where_the_first_ended(preset: str) -> None:
    reference = reference_of(preset)
    grid, first, second = reference.grid(), reference.strategy(), reference.strategy()
    arrays = first.start(grid, first.arrays(first.begin(reference.prepared.start)), num_rounds=6).arrays
    arrays = second.start(grid, arrays, num_rounds=ROUNDS - 6).arrays
    assert same(second.state_of(arrays).tensors(), reference.state.tensors())


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_second_start_may_meet_clients_that_remember_nothing(preset: str) -> None:
    """Where clients have a memory that counts (diana, ef21), a new epoch keeps the two sums of memories equal."""
    reference = reference_of(preset)
    first, second, grid = reference.strategy(), reference.strategy(), reference.grid()
    arrays = first.start(reference.grid(), first.arrays(first.begin(reference.prepared.start)), num_rounds=6).arrays
    state = second.state_of(second.start(grid, arrays, num_rounds=ROUNDS - 6).arrays)
    assert (state.round, state.epoch) == (ROUNDS, 1)
    uplink = second.driver.uplink
    if not isinstance(uplink, Diana | Ef21):
        assert torch.equal(state.params, reference.state.params)
        return
    fleet = reference.fleet_on(grid)
    memory = fleet.state()
    committed, side = memory["memory.shift"].clone(), memory.get("memory.side")
    packet = Packet(memory["memory.pending"], memory.get("memory.support"), side)
    rate, kept = (1.0, "estimate") if isinstance(uplink, Ef21) else (uplink.rate(committed.shape[-1]), "shift")
    uplink.compressor.add_to(committed, packet, rate)
    # Both ends add packets in float32, the server after a sum over clients. A packet is a difference of two gradients,
    # and none of these was much larger than what a memory holds of it.
    size = 2 * (ROUNDS + 1) * CLIENTS * float(committed.abs().max())
    bound = 2 * gamma(ROUNDS + CLIENTS + 4, torch.float32) * size
    assert_within(committed.sum(0).to(torch.float64), state.uplink[kept], bound, sees=1e-3)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_checkpoint_holds_what_clients_remember(preset: str) -> None:
    reference = reference_of(preset)
    fleet = reference.fleet_on(reference.grid())
    metric = reference.prepared.geometry.metric
    fleet.set_metric(metric)
    sampler = reference.driver()
    draws, state, _ = advance(sampler, sampler.begin(reference.prepared.start), fleet, 6)
    saved = fleet.state()
    again = reference.fleet_on(reference.grid())
    again.set_metric(metric)
    again.restore(saved)
    rest, _, _ = advance(reference.driver(), state, again, ROUNDS - 6)
    assert torch.equal(torch.cat([draws, rest]), reference.draws)


def test_a_second_chain_on_the_same_clients_starts_afresh() -> None:
    reference = reference_of("underdamped-diana")
    grid, strategy = reference.grid(), reference.strategy()
    begin = strategy.arrays(strategy.begin(reference.prepared.start))
    for _ in range(2):
        arrays = strategy.start(grid, begin, num_rounds=ROUNDS).arrays
        assert same(strategy.state_of(arrays).tensors(), reference.state.tensors())


def test_chains_begin_at_parameters_too() -> None:
    strategy = reference_of("underdamped-diana").strategy()
    begun = strategy.begin(torch.zeros(3, 11) + 0.5)
    params = ArrayRecord({"params": strategy.arrays(begun)["params"]})
    metric = strategy.driver.metric
    assert isinstance(metric, Dense)
    assert metric.inverse is not None
    z, (root, inverse) = begun.params.double(), (each.double().abs() for each in (metric.root, metric.inverse))
    # theta = m + S z and back: two products and two sums, and S S^-1 is the identity to the rounding of their entries
    theta = metric.mean.double().abs() + z.abs() @ root
    bound = 2 * gamma(2 * z.shape[-1] + 6, torch.float32) * (2 * theta @ inverse)
    assert_within(strategy.state_of(params).params, begun.params, bound)
    for wrong in (ArrayRecord(), ArrayRecord([torch.zeros(3, 11).numpy()])):
        with pytest.raises(DataError, match="params"):
            strategy.state_of(wrong)
    partial = strategy.arrays(begun)
    del partial["state.previous"]
    with pytest.raises(DataError, match="previous"):
        strategy.state_of(partial)


# --- replies that do not come -----------------------------------------------------------------------------------------


def started(preset: str = "underdamped-diana", **parts: Any) -> tuple[Reference, FlowerFleet]:
    """A fleet whose clients hold the metric."""
    reference = Reference(experiment_of(preset=preset), 1, reference_of(preset).prepared)
    fleet = reference.fleet_on(reference.grid(**parts))
    fleet.set_metric(reference.prepared.geometry.metric)
    fleet.timeout = fleet.roster.timeout = 0.5
    return reference, fleet


def deaf_in(rounds: set[int], clients: set[int]) -> Any:
    return lambda message, client: message.metadata.group_id in map(str, rounds) and client in clients


def test_a_round_waits_for_everyone_and_says_who_is_missing() -> None:
    reference, fleet = started(deaf=deaf_in({3}, {1, 2}))
    with pytest.raises(QuorumError, match=r"round 3: clients 1, 2 of 4 did not answer within 0.5 s") as caught:
        advance(reference.sampler, reference.sampler.begin(reference.prepared.start), fleet, 5)
    assert caught.value.exit_code == 3


def test_preparation_waits_for_everyone() -> None:
    reference, _ = started()
    grid = reference.grid(deaf=deaf_in({0}, {3}))
    fleet = reference.fleet_on(grid)
    with pytest.raises(QuorumError, match="preparation: client 3 of 4"):
        fleet.exchange(Request(0, torch.zeros(1, 11), frozenset({"value"})))


def test_with_a_known_probability_who_is_silent_is_absent() -> None:
    reference, fleet = started(deaf=deaf_in({3, 7}, {1}))
    fleet.arrival = 0.9
    sampler = reference.driver()
    state = sampler.begin(reference.prepared.start)
    for round in range(1, 9):
        request = sampler.request(state, observe=round == 7)
        aggregate = fleet.exchange(request)
        assert aggregate.arrived.tolist() == [True, round not in (3, 7), True, True]
        assert aggregate.arrival == 0.9
        assert not aggregate.sums  # a sum over some clients is no sum
        state = sampler.update(state, request, aggregate)
    assert state.applied.tolist() == [8, 8, 8, 8]


def test_a_synchronising_round_needs_everyone_all_the_same() -> None:
    reference, fleet = started("langevin-marina", deaf=deaf_in({1}, {0}))
    fleet.arrival = 0.9
    with pytest.raises(QuorumError, match="client 0"):
        advance(reference.sampler, reference.sampler.begin(reference.prepared.start), fleet, 1)


def test_a_silent_client_of_marina_is_told_the_points_it_missed() -> None:
    reference, fleet = started("langevin-marina", deaf=deaf_in({2, 3}, {1}))
    fleet.arrival = 0.9
    sampler = reference.driver()
    sampler.uplink = Marina(reference.links.uplink.compressor, 1e-9)  # no coin falls
    _, state, _ = advance(sampler, sampler.begin(reference.prepared.start), fleet, 6)
    assert state.applied.tolist() == [6, 6, 6, 6]


def test_an_arrival_is_a_probability() -> None:
    _, fleet = started()
    with pytest.raises(ConfigError, match=r"arrival = 1\.5"):
        Federation(4, fleet.uplink, 0, 3, fleet.like, arrival=1.5)


# --- clients that fail ------------------------------------------------------------------------------------------------


def test_a_failure_names_client_round_and_stage_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, fleet = started()
    original = ClientStack.answer

    def failing(self: ClientStack, request: Request) -> Any:
        if self.indices.tolist() == [2] and request.round == 2:
            raise ValueError("the battery is empty")
        return original(self, request)

    monkeypatch.setattr(ClientStack, "answer", failing)
    state = reference.sampler.begin(reference.prepared.start)
    _, state, _ = advance(reference.sampler, state, fleet, 1)
    assert isinstance(fleet.grid, LoopbackGrid)
    before = [context.state for context in fleet.grid.contexts.values()]
    with pytest.raises(ClientError, match="client 2 failed in round 2 while computing its estimate") as caught:
        fleet.exchange(reference.sampler.request(state))
    assert (caught.value.client, caught.value.round, caught.value.stage) == (2, 2, "estimate")
    assert "the battery is empty" in caught.value.detail
    assert "Traceback" in caught.value.detail
    after = [context.state for context in fleet.grid.contexts.values()]
    assert [one == other for one, other in zip(before, after, strict=True)].count(True) == 1


def test_a_client_that_lost_its_state_says_so() -> None:
    reference, fleet = started()
    assert isinstance(fleet.grid, LoopbackGrid)
    next(iter(fleet.grid.contexts.values())).state = RecordDict()
    with pytest.raises(ClientError, match="its state was lost") as caught:
        advance(reference.sampler, reference.sampler.begin(reference.prepared.start), fleet, 1)
    assert caught.value.stage == "metric"


def test_a_chain_that_diverged_is_not_sent() -> None:
    reference, fleet = started()
    state = reference.sampler.begin(reference.prepared.start * float("nan"))
    with pytest.raises(DivergenceError, match="points of round 1"):
        advance(reference.sampler, state, fleet, 1)


def test_a_strategy_checks_for_divergence_in_every_round() -> None:
    reference, _ = started()
    strategy = reference.strategy()
    strategy.driver.stability = replace(strategy.driver.stability, radius=1e-6)
    with pytest.raises(DivergenceError, match="diverged in round 1"):
        strategy.start(reference.grid(), strategy.arrays(strategy.begin(reference.prepared.start)), num_rounds=2)


def greeted(grid: LoopbackGrid, experiment: Experiment, timeout: float = 0.5) -> None:
    clients = build_problem(experiment).clients
    fleet = fleet_on(grid, experiment, clients, build_links(experiment, clients))
    fleet.roster.timeout = timeout
    assert len(fleet.roster.nodes) == experiment.data.clients


def test_both_sides_run_one_configuration() -> None:
    experiment = experiment_of()
    other = client_app(experiment_of("seed=7", "uplink.k=3"))
    with pytest.raises(ConfigError, match=r"another configuration: .*3 values.*seed = 7, expected 0"):
        greeted(LoopbackGrid(other, CLIENTS), experiment)


def test_there_must_be_a_node_a_client() -> None:
    experiment = experiment_of()
    app = client_app(experiment)
    with pytest.raises(QuorumError, match=r"3 of 4 clients connected .* 'num-supernodes=4'"):
        greeted(LoopbackGrid(app, 3), experiment)
    with pytest.raises(ClientError, match=r"partition \d of 5, but the configuration has 4 clients"):
        greeted(LoopbackGrid(app, 5), experiment)
    silent = LoopbackGrid(app, CLIENTS, deaf=lambda message, client: client == 1)
    with pytest.raises(QuorumError, match="client 1 of 4 did not answer the greeting"):
        greeted(silent, experiment)
    twins = LoopbackGrid(app, CLIENTS)
    for context in twins.contexts.values():
        context.node_config["partition-id"] = min(int(context.node_config["partition-id"]), 2)
    with pytest.raises(ConfigError, match="both have partition-id 2"):
        greeted(twins, experiment)


def test_a_node_without_a_partition_is_told_how_to_get_one() -> None:
    experiment = experiment_of()
    grid = LoopbackGrid(client_app(experiment), CLIENTS)
    for context in grid.contexts.values():
        context.node_config.clear()
    with pytest.raises(ClientError, match="--node-config 'partition-id=0 num-partitions=10'"):
        greeted(grid, experiment)


def test_what_is_no_message_of_ours_is_answered_with_an_error() -> None:
    app = client_app(experiment_of())
    context = Context(1, 1, {"partition-id": 0, "num-partitions": CLIENTS}, RecordDict(), {})
    reply = app(Message(RecordDict(), 1, protocol.TRAIN), context)
    assert reply.has_error()
    assert "not made by fedsample" in str(reply.error.reason)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_a_run_configuration_is_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSAMPLE_SEED", "5")  # of one machine, and no business of the others
    got = of_run_config({"preset": "langevin-diana", "uplink.k": 3, "data.clients": 4, "chains": 2, "app.out": "x"})
    assert got == load({"preset": "langevin-diana", "uplink": {"k": 3}, "data": {"clients": 4}, "chains": 2}, [], {})
    (tmp_path / "a.toml").write_text("seed = 3\nchains = 2\n")
    assert of_run_config({"config-file": str(tmp_path / "a.toml"), "chains": 5}).seed == 3
    assert of_run_config({"config": "seed = 3\nchains = 2", "chains": 5}).chains == 5
    with pytest.raises(ConfigError, match=r"nearest known key is uplink\.k"):
        of_run_config({"uplink.kk": 3})
    with pytest.raises(ConfigError, match="not both"):
        of_run_config({"config": "seed = 3", "config-file": "a.toml"})
    with pytest.raises(ConfigError, match="not TOML"):
        of_run_config({"config": "seed ="})


def test_without_ray_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"pip install 'fedsample\[ray\]'"),
        simulation.simulation(client_app(experiment_of()), 1),
    ):
        pass


def test_one_simulation_at_a_time() -> None:
    with (
        identity(None),
        pytest.raises(ConfigError, match="a Flower simulation is running in this process"),
        simulation.simulation(client_app(experiment_of()), 1),
    ):
        pass


def test_simulated_faults_are_for_the_local_fleet() -> None:
    with pytest.raises(ConfigError, match=r"fleet\.loss"):
        fedsample.run({"fleet": {"name": "flower", "loss": 0.1}}, out="unused")


def test_samplers_are_strategies_and_import_no_runtime() -> None:
    assert issubclass(FlowerStrategy, Strategy)
    heavy = ("ray", "fastapi", "uvicorn", "sqlalchemy", "sklearn", "flwr.simulation", "flwr.superlink")
    assert said(f"import sys, fedsample.strategies.flower; print([m for m in {heavy} if m in sys.modules])") == "[]"
    lighter = ("flwr", "pydantic")  # what a sampler by itself does not need
    assert said(f"import sys, fedsample.strategies; print([m for m in {lighter} if m in sys.modules])") == "[]"


def test_a_run_from_python_sends_nothing_home() -> None:
    code = "import fedsample\ntry:\n    fedsample.run({'rounds': 0})\nexcept fedsample.ConfigError:\n    pass\n"
    code += "import fedsample.strategies\nfrom flwr.supercore import telemetry\nprint(telemetry.FLWR_TELEMETRY_ENABLED)"
    assert said(code, FLWR_TELEMETRY_ENABLED=None) == "0"


def said(code: str, **settings: str | None) -> str:
    """What a new Python process prints."""
    env = {name: value for name, value in {**environment(), **settings}.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_metric_of_the_model_itself_travels_as_its_centre() -> None:
    _, fleet = started()
    traffic = fleet.set_metric(Identity(torch.zeros(11)))
    assert traffic == Traffic(down=CLIENTS * 11 * 32)
    assert fleet.holds(Identity(torch.zeros(11)))
    assert not fleet.holds(Identity(torch.ones(11)))
