"""One round of production code that begins at a stationary law must leave it as it is: nothing is sampled.

A law enters by its second moments, which a round maps affinely: points y = mean + root z, with z and the round's noise
together on +-sqrt(m) e_j, have exactly those moments. Clients' masks enter second moments by pairs, so an orthogonal
array of strength two, in which every two clients meet every pair of masks equally often, stands for all combinations.
Masks of the downlink, coins, cohorts and lost replies run over all of theirs. `test_enumeration` proves the same map
from a generic point, with all combinations of masks; here it is the very case whose law is published or sampled.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dice import SUM, Dice, Outcomes, combinations, read, signs
from moment_maps import Array, Chain, difference, tolerance
from rounding import gamma
from simulation import Setup, advance, federation, quadratic
from torch import Tensor

from fedsample.fleets.local import LocalFleet
from fedsample.strategies import SAMPLERS, Driver, State

BEFORE, PENDING = 7, 0.7  # the round before the scripted one, and what it left pending of a memory's first coordinates
FLAT = 1e-13  # share of the largest eigenvalue below which a direction of the stationary law is left out


class After(NamedTuple):
    """A round from the stationary law.

    Attributes:
        law: the exact law at which it began. moments: E y y^T afterwards. states: of every chain, for each pattern of
            lost replies.
    """

    law: Chain
    moments: Array
    states: list[dict[str, Tensor]]


def stationary(law: Chain) -> Array:
    """(size, size) the fixed point; that the chain is stable is for `law.radius` to say, of one coordinate."""
    operator, constant = law._linear
    resolvent = np.linalg.inv(np.eye(len(constant)) - operator)
    unknown = resolvent @ constant
    unknown += resolvent @ (constant + operator @ unknown - unknown)  # what rounding left, where means are large
    return np.concatenate([[1.0], unknown]).reshape(law.size, law.size)


def points(moments: Array, d: int) -> tuple[Tensor, Tensor]:
    """(m, size) points and (m, d) noise, uncorrelated with them, of these second moments."""
    mean = moments[0]
    values, vectors = np.linalg.eigh(moments - np.outer(mean, mean))
    keep = values > FLAT * values.max()
    assert values.min() > -1e-11 * values.max(), "no law has these moments: the chain is unstable"
    root = vectors[:, keep] * np.sqrt(values[keep])
    z = signs(root.shape[1] + d)
    return torch.from_numpy(mean + z[:, d:].numpy() @ root.T), z[:, :d]


def array(levels: int, factors: int) -> Tensor:
    """(rows, factors) levels such that every two factors meet every pair of levels equally often: lines of a plane over
    a field of `levels` elements (Bush 1952)."""
    if levels == 1:
        return torch.zeros(1, factors, dtype=torch.int64)
    assert levels in (2, 3, 4)
    assert factors <= levels + 1
    times = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [0, 2, 3, 1], [0, 3, 1, 2]])  # of GF(4), whose sum is xor
    rows = []
    for a, b in itertools.product(range(levels), repeat=2):
        line = [a ^ int(times[b, c]) if levels == 4 else (a + b * c) % levels for c in range(levels)]
        rows.append([*line, b][:factors])
    return torch.tensor(rows)


def masks_of(setup: Setup, d: int) -> Tensor:
    """Row m: the coordinates of mask m (RandK), or the start of block m."""
    if setup.compressor == "randblock":
        return torch.arange(d).unsqueeze(-1)
    return torch.tensor(list(itertools.combinations(range(d), setup.k)))


def cohorts(setup: Setup, n: int) -> list[tuple[float, tuple[bool, ...]]]:
    """Who may be asked, and the chances."""
    q = setup.participation
    if q == 1.0:
        return [(1.0, (True,) * n)]
    subsets = list(itertools.product((False, True), repeat=n))
    if isinstance(q, int):
        return [(1 / math.comb(n, q), asked) for asked in subsets if sum(asked) == q]
    return [(math.prod(q if one else 1 - q for one in asked), asked) for asked in subsets]


def outcomes(setup: Setup, noise: Tensor, n: int, d: int) -> tuple[Outcomes, Tensor]:
    """All random bits of a round, a noise for each point; and at which point each chain begins."""
    number = len(masks_of(setup, d))
    faces = [(setup.sync, True), (1 - setup.sync, False)] if setup.uplink == "marina" else [(1.0, False)]
    (tossed, coins), (chances, asked) = (
        (torch.tensor([chance for chance, _ in part], dtype=torch.float64), torch.tensor([bits for _, bits in part]))
        for part in (faces, cohorts(setup, n))
    )
    masks, below = array(number, n), range(number if setup.downlink else 1)
    coin, who, mask, down, point = combinations(coins, asked, masks, below, noise)
    weight = tossed[coin] * chances[who] / (len(masks) * len(below) * len(noise))
    return Outcomes(weight, masks[mask], down, coins[coin], asked[who], noise[point]), point


def began(setup: Setup, law: Chain, y: Tensor, sampler: Driver, fleet: LocalFleet) -> State:
    """The production state whose second moments are those of y (C, size); clients' memories are put into the fleet.

    Of two clients the first was applied in the round before. Where clients are sampled the other was applied a round
    earlier, and marina's kept gradient is of no use there; where replies are lost its last packet must not enter.
    """
    part = {name: y[:, where] for name, where in law.layout.items()}
    x, uplink, memory = part["x"], sampler.begin(part["x"]).uplink, fleet.state()
    second = torch.arange(law.n) % 2
    sent = BEFORE - second * (setup.participation != 1.0)
    applied = sent - second * (setup.loss > 0)
    if setup.uplink == "marina":
        uplink = {"estimate": part["g"]}
        kept = sampler.metric.pull(quadratic(setup).gradient(sampler.metric.push(part["before"])))
        memory["memory.gradient"] = torch.where((sent == BEFORE)[:, None, None], kept, torch.nan)
        memory["memory.round"] = sent
    if setup.uplink in SUM:
        shifts = torch.stack([part[f"h{i}"] for i in range(law.n)])
        uplink = {SUM[setup.uplink]: shifts.sum(0)}
        waits = (applied == sent)[:, None, None] * torch.tensor(PENDING * setup.k / law.d, dtype=torch.float64)
        memory["memory.support"] = torch.arange(setup.k).expand_as(memory["memory.support"])
        memory["memory.pending"] = torch.full_like(memory["memory.pending"], PENDING)
        memory["memory.shift"] = torch.cat([shifts[..., : setup.k] - waits, shifts[..., setup.k :]], dim=-1)
        memory["memory.round"] = sent
    fleet.restore(memory)
    kernel = {name: part["v"] for name in SAMPLERS[setup.sampler].state._fields[1:]}
    previous, seen = part.get("before", x), part.get("w", x)
    return State(BEFORE, x, previous, kernel, uplink, applied, 0, seen, torch.zeros_like(x))


def after_a_round(setup: Setup) -> After:
    """What production code makes of the stationary law of a set-up."""
    law = setup.law()
    y, noise = points(stationary(law), law.d)
    chances, at = outcomes(setup, noise, law.n, law.d)
    masks, weights = masks_of(setup, law.d), chances.weight.numpy()
    moments, states = np.zeros((law.size, law.size)), []
    for chance, lost in losses(setup, law.n):
        dice = Dice([chances], masks, range(law.d), BEFORE + 1, [lost])
        with pytest.MonkeyPatch.context() as patch:
            dice.rule(patch)
            sampler, fleet = federation(replace(setup, chains=len(weights)), quadratic(setup))
            patch.setattr(sampler.noise, "at", dice.noise)
            state = advance(sampler, fleet, began(setup, law, y[at], sampler, fleet))
            after = read(state, fleet, setup.uplink, setup.k / law.d, downlink=setup.downlink)
        moments += chance * (after.T * weights) @ after
        states.append({**state.tensors(), **fleet.state()})
    return After(law, moments, states)


def losses(setup: Setup, n: int) -> list[tuple[float, tuple[bool, ...]]]:
    """Which replies may be lost, and the chances."""
    if setup.loss == 0:
        return [(1.0, (False,) * n)]
    patterns = itertools.product((False, True), repeat=n)
    return [(math.prod(setup.loss if one else 1 - setup.loss for one in lost), lost) for lost in patterns]


def check(after: After) -> None:
    """Production's round does to the law what the map does, and that leaves the law as it is.

    The chains begin at moments of their own: an eigenproblem is solved exactly for a matrix that is off by some
    roundings of its norm, and flat directions are left out. A round magnifies that as `moment_maps.tolerance` says.
    """
    law = after.law
    want = stationary(law)
    mapped = law.after(want, None)
    covariance = want - np.outer(want[0], want[0])
    begun = (2 * gamma(10 * law.size) + FLAT * law.size) * float(np.linalg.norm(covariance, 2) / np.diag(want).min())
    bound = tolerance(want, mapped, [law], begun)
    assert difference(after.moments, mapped) <= bound
    assert difference(mapped, want) <= bound


def variance(after: After) -> float:
    """Of positions, mean over coordinates."""
    x = after.law.layout["x"]
    return float((np.diag(after.moments)[x] - after.moments[0, x] ** 2).mean())
