"""Thousands of replicas of a production chain on quadratic clients, and the exact law that they must show.

The replicas are the chains of one `LocalFleet`; everything is built as an experiment builds it. Chains are independent
of each other (tested in `test_independence`), so the spread of the chains' own averages over rounds and coordinates is
an honest error, however heavy the tails that masks give the law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from dice import advance
from moment_maps import R4, Array, Chain, block_pairs, independent_pairs, subset_pairs
from torch import Tensor

from fedsample.compression import build as build_compressor
from fedsample.estimators import Links, build_downlink
from fedsample.estimators import build as build_uplink
from fedsample.fleets.engines import Engine
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import LocalFleet
from fedsample.protocol.exchange import Request
from fedsample.strategies import SAMPLERS, Cohort, Driver, Stability
from fedsample.targets import Clients, GaussianPrior, Quadratic
from fedsample.targets.metric import Identity


class Estimate(NamedTuple):
    """A mean over replicas and its Monte-Carlo error."""

    value: float
    error: float

    def errors_from(self, want: float) -> float:
        """How many errors away from `want`; infinite for a chain that has blown up, whose error is as large."""
        return abs(self.value - want) / self.error if abs(self.value) < 1e6 else math.inf


@dataclass(frozen=True)
class Setup:
    """An experiment on the reference clients R4, and its size.

    Coordinate j of d = 4 sees R4 rolled by j clients: all coordinates have the law of R4, and no two clients are alike.

    Attributes:
        sampler, uplink, step: as configured; friction: of baoab and sghmc. k: coordinates kept of 4. sync: marina's p.
        participation, loss, temperature: as configured. prior: precision of U_0. hessians: (n, d, d) instead of R4.
        curvatures: of four clients instead of R4's. spread: factor on how far R4's centres lie from their mean.
        anchored: whether direct subtracts the gradients at the mode. downlink: whether it is ef21-p, with the same k.
        chains: replicas. warmup, rounds: rounds before and after averages begin. seed: the experiment's. engine: see
            `fedsample.fleets.engines`.
    """

    sampler: str
    uplink: str
    step: float
    friction: float = 2.0
    compressor: str = "randk"
    k: int = 1
    sync: float = 0.3
    participation: float | int = 1.0
    loss: float = 0.0
    temperature: float = 1.0
    prior: float = 0.0
    hessians: tuple[tuple[tuple[float, ...], ...], ...] | None = None
    curvatures: tuple[float, ...] = tuple(R4[0])
    spread: float = 1.0
    anchored: bool = False
    downlink: bool = False
    chains: int = 2048
    warmup: int = 60
    rounds: int = 200
    seed: int = 1
    engine: Engine = "batched"

    @cached_property
    def clients(self) -> tuple[Array, Array]:
        """(n, d, d) Hessians and (n, d) centres."""
        if self.hessians is not None:
            hessians = np.array(self.hessians)
            n, d = hessians.shape[:2]
            return hessians, np.linspace(-1, 2, n * d).reshape(n, d)
        middle = np.average(R4[1], weights=self.curvatures)
        apart = middle + self.spread * (np.array(R4[1]) - middle)
        lam, a = (np.stack([np.roll(row, j) for j in range(4)], axis=1) for row in (self.curvatures, apart))
        return np.stack([np.diag(row) for row in lam]), a

    @cached_property
    def origin(self) -> Array:
        """(d,) where the chain's coordinates are zero: the mode if the uplink is anchored there."""
        hessians, centers = self.clients
        if not self.anchored:
            return np.zeros(centers.shape[1])
        precision = hessians.sum(0) + self.prior * np.eye(len(centers[0]))
        return np.linalg.solve(precision, np.einsum("ijk,ik->j", hessians, centers))

    @cached_property
    def exact(self) -> Chain:
        """The chain's exact law, of one coordinate where they are alike."""
        return self.law(slice(None) if self.hessians is not None else slice(1))

    def law(self, which: slice = slice(None)) -> Chain:
        """The exact law of some coordinates."""
        hessians, centers = self.clients
        n, d = centers.shape
        centers = centers - self.origin
        size = self.participation
        asked = subset_pairs(n, size) if isinstance(size, int) else independent_pairs(n, size)
        pairs = subset_pairs(d, self.k) if self.compressor == "randk" else block_pairs(list(range(d)), self.k)
        masks = pairs[which, which]
        hessians = hessians[:, which, which]
        return Chain(
            hessians,
            centers[:, which],
            self.sampler,
            self.uplink,
            self.step,
            self.friction,
            self.temperature,
            masks,
            asked * independent_pairs(n, 1 - self.loss),
            self.sync,
            self.prior * np.eye(hessians.shape[1]),
            -self.origin[which],
            anchored=self.anchored,
            downlink=masks if self.downlink else None,
        )

    @property
    def uncompressed(self) -> Chain:
        """The law of the same sampler at the same step with exact gradients."""
        return replace(self.exact, uplink="dense", clients=None, anchored=False, downlink=None)

    @property
    def compressed(self) -> bool:
        """Whether gradients are anything but exact."""
        return self.uplink != "dense" or self.downlink or self.participation != 1.0

    @property
    def variance(self) -> float:
        """Mean over coordinates of the exact stationary variance."""
        return float(self.exact.spread().mean())

    @property
    def truth(self) -> float:
        """Mean over coordinates of the target's own variance."""
        return float(np.diag(np.linalg.inv(self.exact.precision)).mean() * self.temperature)

    def start(self) -> Tensor:
        """(C, d) exact draws of the target."""
        root = np.linalg.cholesky(np.linalg.inv(self.exact.precision) * self.temperature)
        d = self.clients[1].shape[1]
        generator = torch.Generator().manual_seed(self.seed)
        white = torch.randn(self.chains, d, generator=generator, dtype=torch.float64)
        scale = torch.from_numpy(root if self.hessians is not None else root[0, 0] * np.eye(d))
        return white @ scale.T + torch.from_numpy(np.broadcast_to(self.exact.mode, (d,)).copy())


def federation(setup: Setup, clients: Clients) -> tuple[Driver, LocalFleet]:
    """The production objects of a set-up, over any potentials."""
    contraction = f"scaled-{setup.compressor}"
    name = {"dense": "identity", "ef21": contraction}.get(setup.uplink, setup.compressor)
    p = setup.sync if setup.uplink == "marina" else None
    uplink = build_uplink(setup.uplink, build_compressor(name, setup.k), p, anchored=setup.anchored)
    faults = Faults(clients.n, setup.seed, loss=setup.loss)
    fleet = LocalFleet(clients, uplink, setup.seed, setup.chains, engine=setup.engine, faults=faults)
    metric = Identity(torch.from_numpy(setup.origin) if setup.anchored else torch.zeros(clients.d, dtype=torch.float64))
    fleet.set_metric(metric)
    friction = {"friction": setup.friction} if "friction" in SAMPLERS[setup.sampler].options else {}
    extra: dict[str, Any] = {}
    if setup.anchored:
        asked = Request(0, torch.zeros(1, clients.d, dtype=torch.float64), frozenset({"gradient"}))
        extra["anchor"] = fleet.exchange(asked).sums["gradient"][0]
    links = Links(uplink)
    if setup.downlink:
        downlink = build_downlink("ef21-p", build_compressor(contraction, setup.k), setup.seed, setup.chains)
        links = Links(uplink, downlink)
    equation = SAMPLERS[setup.sampler](step_size=setup.step, temperature=setup.temperature, seed=setup.seed, **friction)
    sampler = Driver(
        equation,
        links,
        GaussianPrior(setup.prior),
        metric,
        cohort=Cohort(clients.n, setup.chains, setup.seed, setup.participation),
        stability=Stability(1.0, 1.0, math.inf),
        **extra,
    )
    return sampler, fleet


def quadratic(setup: Setup) -> Quadratic:
    """The set-up's clients, with diagonal Hessians as vectors."""
    hessians, centers = setup.clients
    if setup.hessians is None:
        hessians = np.stack([np.diag(matrix) for matrix in hessians])
    return Quadratic(torch.from_numpy(hessians), torch.from_numpy(centers.copy()))


def simulate(setup: Setup) -> dict[str, Estimate]:
    """`mean`, the offset of positions from the mode; `variance` about the mode; `momenta`, E v^2 before the half kick;
    `whole`, E v^2 after it."""
    clients = quadratic(setup)
    sampler, fleet = federation(setup, clients)
    state = sampler.begin(setup.start())
    mode = torch.from_numpy(np.broadcast_to(setup.exact.mode, (clients.d,)).copy())
    hessian = torch.from_numpy(setup.clients[0].sum(0) + setup.prior * np.eye(clients.d))
    names = ["mean", "variance"] + (["momenta", "whole"] if setup.sampler == "baoab" else [])
    totals = dict.fromkeys(names, torch.zeros(setup.chains, dtype=torch.float64))  # (C,)
    series = []  # means over chains, a round
    for round in range(1, setup.warmup + setup.rounds + 1):
        state = advance(sampler, fleet, state)
        if round <= setup.warmup:
            continue
        offset = state.params - mode
        now = {"mean": offset.mean(-1), "variance": offset.square().mean(-1)}
        if setup.sampler == "baoab":
            momenta = state.kernel["momenta"]
            now["momenta"] = momenta.square().mean(-1)
            now["whole"] = (momenta - setup.step / 2 * offset @ hessian).square().mean(-1)
        totals = {name: totals[name] + value for name, value in now.items()}
        series.append(now["variance"].mean())
    averages = {name: total / setup.rounds for name, total in totals.items()}
    result = {
        name: Estimate(float(each.mean()), float(each.std()) / math.sqrt(setup.chains))
        for name, each in averages.items()
    }
    if setup.loss > 0:  # a lost message is lost to all its chains: they share that luck, rounds do not
        blocks = torch.stack(series).reshape(20, -1).mean(-1)
        shared = float(blocks.std()) / math.sqrt(len(blocks))
        result["variance"] = result["variance"]._replace(error=max(result["variance"].error, shared))
    return result
