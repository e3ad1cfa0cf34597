"""The contract of engines: every preset on every path to the gradients is the chain of its clients one by one.

The clients one by one are the reference of everything: Flower's grid gives their bits for every preset
(`tests/system/test_flower.py`), real devices do (`tests/system/test_devices.py`), and so do Flower's own runtimes
(`tests/soak/test_flower_runtimes.py`). Here all clients are computed together, which adds in other orders. What is
drawn or decided (masks, coins, cohorts, bytes) must be equal all the same, and the draws as far as arithmetic goes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fedsample.assembly import build_fleet, build_sampler
from fedsample.config import Experiment, load
from fedsample.errors import CompileError
from fedsample.experiment import check
from fedsample.fleets.local import LocalFleet
from fedsample.links import links
from fedsample.monitor.progress import Progress
from fedsample.preparation import Prepared, prepare
from fedsample.presets import PRESETS
from fedsample.problem import Problem, build_problem
from fedsample.random import key
from fedsample.strategies import Sampler

ROUNDS, CHAINS = 20, 2
DATA = {"logistic": "breast_cancer", "linear": "diabetes", "softmax": "wine"}
TAKE_PART = {"logistic": "1.0", "linear": "0.5", "softmax": "2"}  # by model: everyone, by coins, cohorts of two
ENGINES = {  # by model: the paths that there are beside the clients one by one
    "logistic": ("batched", "stacked", "compiled"),
    "linear": ("batched", "stacked", "compiled"),
    "softmax": ("batched", "stacked"),
}
NOT_COMPILED = DATA.keys() - {model for model, engines in ENGINES.items() if "compiled" in engines}
ONE_PATH = {"dsgld"}  # presets of minibatches alone, which all engines compute as "batched" does


class Chain(NamedTuple):
    """What a preset makes with one engine in twenty rounds.

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
    return problem, prepare(experiment, problem, build_fleet(experiment, problem), Progress(1, mode="quiet"))


def chain(preset: str, model: str, engine: str) -> Chain:
    """Twenty rounds."""
    problem, geometry = prepared(preset, model)
    experiment = experiment_of(preset, model, engine)
    fleet = build_fleet(experiment, problem)
    assert fleet.engine == engine
    fleet.set_metric(geometry.geometry.metric)
    return advanced(build_sampler(experiment, problem, geometry, fleet.n), fleet, problem.d)


def advanced(sampler: Sampler, fleet: LocalFleet, d: int) -> Chain:
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


def tolerance(preset: str, model: str) -> float:
    """How far float64 lets two orders of summation part in twenty rounds, relative to how far chains move in them.

    A sum of N products in another order differs by at most N eps times the sum of their sizes. A compressor that sends
    a coordinate with probability q scales that by 1 / q, and marina adds every round's to all later ones: at most half
    the square of the rounds. Together up to 3e-10; 1e-15 is seen, because rounding errors have signs.
    """
    problem, _ = prepared(preset, model)
    uplink, _ = links(experiment_of(preset, model, "by-client"), problem)
    scaled = 1 / uplink.compressor.inclusion(problem.d)
    return ROUNDS**2 / 2 * scaled * int(problem.clients.rows.sum()) * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("model", DATA)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_engine_draws_as_the_clients_one_by_one(preset: str, model: str) -> None:
    want = chain(preset, model, "by-client")
    assert want.draws.isfinite().all()
    found = {engine: chain(preset, model, engine) for engine in ENGINES[model]}
    moved = float((want.draws - want.draws[0]).abs().max())
    atol = tolerance(preset, model) * moved
    for engine, got in found.items():
        assert got.decided == want.decided, engine
        for one, other in zip(want.masks, got.masks, strict=True):
            assert torch.equal(one, other), engine
        assert float((got.draws - want.draws).abs().max()) <= atol, engine
    if preset in ONE_PATH:
        assert all(torch.equal(each.draws, found["batched"].draws) for each in found.values())


@pytest.mark.parametrize("model", sorted(NOT_COMPILED))
def test_what_is_not_compiled_is_refused(model: str) -> None:
    problem, _ = prepared("langevin-diana", model)
    with pytest.raises(CompileError, match="only linear and logistic"):
        problem.clients.on("compiled")
