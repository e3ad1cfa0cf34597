"""The contract of engines: every preset on every path to the gradients is the chain of its clients one by one.

The clients one by one are the reference of everything: Flower's grid gives their bits for every preset
(`tests/fleets/flower/test_flower.py`), real devices do (`tests/fleets/grpc/test_devices.py`), and so do Flower's own
runtimes (`tests/soak/test_flower_runtimes.py`). Here all clients are computed together, which adds in other orders.
What is drawn or decided (masks, coins, cohorts, bytes) must be equal all the same, and the draws as far as arithmetic
goes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from chain_rounding import alone, draws_bound
from rounding import SEES, assert_within
from running_error import RunningError
from torch import Tensor

from fedsample.config import Experiment, load
from fedsample.config.presets import PRESETS
from fedsample.errors import CompileError
from fedsample.estimators import build_links
from fedsample.fleets.local import LocalFleet
from fedsample.monitor.progress import Progress
from fedsample.preparation.prepare import prepare
from fedsample.preparation.prepared import Prepared
from fedsample.problem import Problem, build_problem
from fedsample.random import key
from fedsample.runs.build import build_driver, build_fleet
from fedsample.runs.checks import check
from fedsample.strategies import Driver

ROUNDS, CHAINS = 14, 2
DATA = {"logistic": "breast_cancer", "linear": "diabetes", "softmax": "wine"}
TAKE_PART = {"logistic": "1.0", "linear": "0.5", "softmax": "2"}  # by model: everyone, by coins, cohorts of two
ENGINES = {  # by model: the paths that there are beside the clients one by one
    "logistic": ("batched", "stacked", "compiled"),
    "linear": ("batched", "stacked", "compiled"),
    "softmax": ("batched", "stacked"),
}
NOT_COMPILED = DATA.keys() - {model for model, engines in ENGINES.items() if "compiled" in engines}
BY_VALUE = {"qlsd", "qlsd-star", "qlsd-plus-plus", "d-elf", "p-elf", "b-elf"}  # QSGD's levels and TopK's choice
ONE_PATH = {"dsgld"}  # presets of minibatches alone, which all engines compute as "batched" does


class Chain(NamedTuple):
    """What a preset makes with one engine.

    Attributes:
        draws: (rounds, C, d). decided: coins, cohorts, arrivals and bytes of each round. masks: of each client in each
            round, (n, C, K); empty where there are none.
    """

    draws: Tensor
    decided: list[tuple[Any, ...]]
    masks: list[Tensor]


def experiment_of(preset: str, model: str, engine: str) -> Experiment:
    settings = [f"data.name={DATA[model]}", "data.clients=4", f"model.name={model}", f"chains={CHAINS}"]
    settings += ["dtype=float64", f"fleet.participation={TAKE_PART[model]}", f"fleet.engine={engine}"]
    settings += ["uplink.refresh=7"] if preset == "qlsd-plus-plus" else []
    experiment = load({"preset": preset}, settings, {})
    check(experiment)
    return experiment


@lru_cache(maxsize=1)
def prepared(preset: str, model: str) -> tuple[Problem, Prepared]:
    """One preparation for all engines, by the clients one by one."""
    experiment = experiment_of(preset, model, "by-client")
    problem = build_problem(experiment)
    links = build_links(experiment, problem.clients)
    fleet = build_fleet(experiment, problem, links)
    return problem, prepare(experiment, problem, links, fleet, Progress(1, mode="quiet"))


def chain(preset: str, model: str, engine: str) -> Chain:
    """All rounds with one engine."""
    problem, geometry = prepared(preset, model)
    experiment = experiment_of(preset, model, engine)
    links = build_links(experiment, problem.clients)
    fleet = build_fleet(experiment, problem, links)
    assert fleet.engine == engine
    fleet.set_metric(geometry.geometry.metric)
    return advanced(build_driver(experiment, problem, links, geometry, fleet.n), fleet, problem.d)


def advanced(sampler: Driver, fleet: LocalFleet, d: int) -> Chain:
    state = sampler.begin(0.1 * key(1, chain=torch.arange(CHAINS), purpose="start").normal(d))
    draws, decided, masks = [], [], []
    for round in range(1, ROUNDS + 1):
        request = sampler.request(state, observe=round % 7 == 0)
        aggregate = fleet.exchange(request)
        state = sampler.update(state, request, aggregate)
        draws.append(state.params)
        coins = None if request.sync is None else request.sync.tolist()
        cohort = None if request.active is None else request.active.tolist()
        decided.append((coins, cohort, aggregate.arrived.tolist(), aggregate.arrival, aggregate.traffic))
        support = [worker.memory.get("support") for worker in fleet.workers]
        masks.append(torch.cat([each.clone() for each in support if each is not None] or [torch.zeros(0)]))
    return Chain(torch.stack(draws), decided, masks)


def assert_same_decisions(got: Chain, want: Chain, engine: str) -> None:
    assert got.decided == want.decided, engine
    for one, other in zip(want.masks, got.masks, strict=True):
        assert torch.equal(one, other), engine


@pytest.mark.rounding
@pytest.mark.parametrize("model", DATA)
@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - BY_VALUE))
def test_every_engine_draws_as_the_clients_one_by_one(preset: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is drawn is equal, and draws are within what the chain makes of its gradients' roundings."""
    want = chain(preset, model, "by-client")
    assert want.draws.isfinite().all()
    found = {engine: chain(preset, model, engine) for engine in ENGINES[model]}
    bound = draws_bound(monkeypatch, lambda: chain(preset, model, "batched").draws)
    moved = float((want.draws - want.draws[0]).abs().max())
    for engine, got in found.items():
        assert_same_decisions(got, want, engine)
        assert_within(got.draws, want.draws, bound, what=engine)
    assert float(bound.max()) <= SEES[torch.float64] * moved
    if preset in ONE_PATH:
        assert all(torch.equal(each.draws, found["batched"].draws) for each in found.values())


@pytest.mark.parametrize("model", DATA)
@pytest.mark.parametrize("preset", sorted(BY_VALUE | {"underdamped-diana"}))
def test_engines_are_equal_to_the_bit_where_each_client_is_computed_alone(
    preset: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions by value included: nothing but the order of sums in a client's gradient tells engines apart."""
    alone(monkeypatch)
    want, got = (chain(preset, model, engine) for engine in ("by-client", "batched"))
    assert_same_decisions(got, want, "batched")
    assert torch.equal(got.draws, want.draws)


@pytest.mark.rounding
@pytest.mark.parametrize("model", DATA)
def test_gradients_along_a_chain_agree_to_rounding(model: str) -> None:
    """What engines may differ in, at the points of a chain with decisions by value."""
    problem, geometry = prepared("qlsd", model)
    clients, metric = problem.clients, geometry.geometry.metric
    for z in chain("qlsd", model, "by-client").draws[[0, 1, 7, 13]]:
        at = metric.push(z)
        with RunningError() as analysis:
            want = torch.cat([clients.client(i).gradient(at) for i in range(clients.n)])
        for engine in ENGINES[model]:
            assert_within(clients.on(engine).gradient(at), want, 2 * analysis.error(want), what=engine)


@pytest.mark.parametrize("model", sorted(NOT_COMPILED))
def test_what_is_not_compiled_is_refused(model: str) -> None:
    problem, _ = prepared("langevin-diana", model)
    with pytest.raises(CompileError, match="only linear and logistic"):
        problem.clients.on("compiled")
