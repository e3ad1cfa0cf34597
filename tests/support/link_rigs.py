"""Links in the loop: an experiment with its fleet, driven round by round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsample.config import Experiment, load
from fedsample.estimators import build_links
from fedsample.monitor.progress import Progress
from fedsample.preparation.prepare import prepare
from fedsample.problem import build_problem
from fedsample.protocol.exchange import Aggregate, Request
from fedsample.runs.build import build_driver, build_fleet
from fedsample.strategies import State

CLIENTS, D, CHAINS = 5, 12, 2
ABSENCES: list[dict[str, Any]] = [
    {"participation": 0.5},
    {"participation": 2},
    {"loss": 0.3},
    {"participation": 0.6, "loss": 0.2, "dropout": 0.1, "dropout_rounds": 3.0},
]


class Rig:
    """A prepared chain on the local fleet, with what was asked and what came back."""

    def __init__(self, settings: Mapping[str, Any], *, like: Rig | None = None, **more: Any) -> None:
        common = {"rounds": 100, "warmup": 0, "chains": CHAINS, "dtype": "float64", "step_size": 0.02}
        self.experiment: Experiment = load({**common, **settings, **more}, environment={})
        self.problem = build_problem(self.experiment)
        self.links = build_links(self.experiment, self.problem.clients)
        self.fleet = build_fleet(self.experiment, self.problem, self.links)
        progress = Progress(self.experiment.rounds, mode="quiet")
        if like is None:
            self.prepared = prepare(self.experiment, self.problem, self.links, self.fleet, progress)
        else:  # one preparation for two engines, as a run and its devices have
            self.prepared = like.prepared
            self.fleet.set_metric(self.prepared.geometry.metric)
        self.sampler = build_driver(self.experiment, self.problem, self.links, self.prepared, self.fleet.n)
        self.state: State = self.sampler.begin(self.prepared.start)

    def step(self, *, observe: bool = False) -> tuple[State, Request, Aggregate]:
        """One round; the state before it, and what was said."""
        before = self.state
        request = self.sampler.request(before, observe=observe)
        aggregate = self.fleet.exchange(request)
        self.state = self.sampler.update(before, request, aggregate)
        return before, request, aggregate

    def draws(self, rounds: int) -> Tensor:
        found = []
        for _ in range(rounds):
            self.step()
            found.append(self.sampler.draw(self.state))
        return torch.stack(found)

    def asked(self, request: Request) -> Tensor:
        everyone = torch.ones(self.fleet.n, dtype=torch.bool)
        return everyone if request.active is None else request.active.any(-1)
