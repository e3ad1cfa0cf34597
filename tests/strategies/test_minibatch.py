r"""Gradients from minibatches, and what a reference takes away of their noise.

Exactly, by enumeration: one chain for every combination of the clients' minibatches, through `ClientStack`. By
simulation, where the law is known: on y = theta x + noise with one coefficient a client's minibatch gradient is affine
in theta, so that second moments close. With s(f) = sum_i (N_i^2 / b) (N_i - b) / (N_i - 1) var_j(f_ij) and u = theta -
mode,

    no reference        noise s(grad U_ij at the mode) + s(x^2) u^2
    mode                noise s(x^2) u^2
    svrg                noise s(x^2) (u - r)^2,   r <- u every l rounds
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from moment_maps import Array
from rounding import ELEMENTARY, gamma, near
from simulation import Estimate, advance
from torch import Tensor

from fedsample.clients.client_stack import ClientStack, _TurnOracle
from fedsample.clients.oracle import Reference
from fedsample.compression import Identity as Whole
from fedsample.estimators import Dense, Diana, Direct, Ef21, Links, Marina, Uplink
from fedsample.fleets.local import LocalFleet
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.random import Key
from fedsample.strategies import Cohort, Driver, Langevin, Stability
from fedsample.targets import GaussianPrior, GeneralizedLinear
from fedsample.targets.metric import Identity

pytestmark = pytest.mark.law

Patch = pytest.MonkeyPatch
ROWS, BATCH = (3, 4), 2
POINT, NEAR, FAR = (0.4, -0.3), (0.5, -0.2), (-1.5, 2.0)
UPLINKS: dict[str, Callable[[], Uplink]] = {
    "dense": Dense,
    "direct": lambda: Direct(Whole()),
    "diana": lambda: Diana(Whole()),
    "ef21": lambda: Ef21(Whole()),
}


# --- every minibatch ----------------------------------------------------------------------------------------------


def logistic() -> GeneralizedLinear:
    """Two clients with three and four rows, two parameters; gradients are not affine."""
    rng = np.random.default_rng(4)
    x = torch.from_numpy(rng.normal(size=(sum(ROWS), 1)))
    y = torch.tensor([0, 1, 1, 0, 0, 1, 0])
    return GeneralizedLinear(x, y, torch.tensor([0, 3, 7]), "bernoulli")


BATCHES = list(itertools.product(*(list(itertools.combinations(range(rows), BATCH)) for rows in ROWS)))  # 3 * 6


def enumerated(patch: Patch, *, one_batch: bool = True) -> None:
    """Chain c draws the c-th combination of minibatches; or, as a mutant, another one every second time."""
    calls = itertools.count()

    def draw(keys: Key, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        assert size == BATCH
        batches = torch.tensor(BATCHES).movedim(0, 1)  # (n, C, b)
        if not one_batch and next(calls) % 2:
            batches = batches.roll(5, dims=1)
        return batches, torch.ones_like(batches, dtype=torch.bool)

    patch.setattr("fedsample.targets.glm.draw_rows", draw)


Place = tuple[float, ...]


def asked(reference: Place | None = None, since: int = 0, previous: Place | None = None) -> Request:
    def spread(place: Place) -> Tensor:
        return torch.tensor(place, dtype=torch.float64).expand(len(BATCHES), 2)

    about = None if reference is None else spread(reference)
    before = None if previous is None else spread(previous)
    return Request(9, spread(POINT), frozenset({ESTIMATE}), before, reference=about, reference_round=since)


def uploads(uplink: Uplink, request: Request) -> Tensor:
    """(n, C, d) what a server reads, for every combination of minibatches."""
    worker = ClientStack(logistic(), uplink, 0, len(BATCHES), torch.arange(2), batch_size=BATCH)
    upload = worker.answer(request).upload
    assert upload is not None
    return uplink.decompress(upload, request.sync, request.active, 2)


def rows_of(place: Place) -> list[Array]:
    """For each client the gradients (N_i, d) of its rows at a point, written out."""
    clients = logistic()
    design, y = clients.design.numpy(), clients.labels.numpy()
    each = (1 / (1 + np.exp(-design @ np.array(place))) - y)[:, None] * design
    return [each[:3], each[3:]]


def scatter(each: list[Array]) -> Array:
    """(n, d) variance of N / b times the sum over a minibatch without replacement."""
    return np.stack([len(g) ** 2 / BATCH * (len(g) - BATCH) / (len(g) - 1) * g.var(0) for g in each])


def full(place: Place) -> Array:
    return np.stack([each.sum(0) for each in rows_of(place)])


# A mean over all minibatches of sums of rows' gradients, of at most four gradients added or subtracted: residuals are
# below 1, so that each is no larger than N / b times the rows' sizes. A sigmoid's logit is a product of two terms, of
# at most four times its own size; the squares of a variance are as many again.
MANY = len(BATCHES) + 4 * (ELEMENTARY + 2 * 4 + sum(ROWS))
SIZE = 4 * max(ROWS) / BATCH * float(logistic().design.abs().sum(0).max())
MEAN, VARIANCE = 2 * gamma(MANY) * SIZE, 2 * gamma(2 * MANY) * SIZE**2
assert VARIANCE < 1e-9


REFERENCES: dict[str, tuple[Place | None, int]] = {
    "none": (None, 0),
    "mode": ((0.0, 0.0), 0),
    "svrg": (NEAR, 7),
    "svrg-far": (FAR, 7),
    "svrg-here": (POINT, 9),
}


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("uplink", UPLINKS)
def test_every_minibatch(monkeypatch: Patch, uplink: str, reference: str) -> None:
    """The mean over minibatches is the whole gradient; the variance is that of differences to the reference."""
    enumerated(monkeypatch)
    place, since = REFERENCES[reference]
    sent = uploads(UPLINKS[uplink](), asked(place, since)).numpy()
    taken = [np.zeros_like(each) for each in rows_of(POINT)] if place is None else rows_of(place)
    differences = [here - there for here, there in zip(rows_of(POINT), taken, strict=True)]
    assert np.abs(sent.mean(1) - full(POINT)).max() <= MEAN
    assert np.abs(sent.var(1) - scatter(differences)).max() <= VARIANCE


def test_a_near_reference_takes_the_noise_away() -> None:
    def noise(reference: Place) -> float:
        return float(scatter([a - b for a, b in zip(rows_of(POINT), rows_of(reference), strict=True)]).sum())

    plain = float(scatter(rows_of(POINT)).sum())
    assert noise(POINT) == 0
    assert noise(NEAR) < 0.01 * plain
    assert noise((0.0, 0.0)) < 0.1 * plain < noise(FAR)


def test_an_anchored_client_sends_minibatch_differences(monkeypatch: Patch) -> None:
    """QLSD*: at a fixed reference the kept gradient and the anchor cancel."""
    enumerated(monkeypatch)
    sent = uploads(Direct(Whole(), anchored=True), asked((0.0, 0.0))).numpy()
    differences = [here - there for here, there in zip(rows_of(POINT), rows_of((0.0, 0.0)), strict=True)]
    assert np.abs(sent.mean(1) - full(POINT) + full((0.0, 0.0))).max() <= MEAN
    assert np.abs(sent.var(1) - scatter(differences)).max() <= VARIANCE


@pytest.mark.parametrize("reference", REFERENCES)
def test_marina_takes_one_minibatch_at_both_points(monkeypatch: Patch, reference: str) -> None:
    """The noise of a difference is that of differences of rows, whatever the reference."""
    enumerated(monkeypatch)
    place, since = REFERENCES[reference]
    sent = uploads(Marina(Whole(), 0.3), asked(place, since, previous=NEAR)).numpy()
    differences = [here - there for here, there in zip(rows_of(POINT), rows_of(NEAR), strict=True)]
    assert np.abs(sent.mean(1) - full(POINT) + full(NEAR)).max() <= MEAN
    assert np.abs(sent.var(1) - scatter(differences)).max() <= VARIANCE


def test_two_minibatches_are_seen(monkeypatch: Patch) -> None:
    enumerated(monkeypatch, one_batch=False)
    for uplink in UPLINKS:
        with pytest.raises(AssertionError):
            again(monkeypatch, lambda patch, name=uplink: test_every_minibatch(patch, name, "svrg"))
    with pytest.raises(AssertionError):
        again(monkeypatch, lambda patch: test_marina_takes_one_minibatch_at_both_points(patch, "none"))


def again(patch: Patch, test: Callable[[Patch], None]) -> None:
    """A test that would undo the mutant, kept from it."""
    with patch.context() as inner:
        inner.setattr(f"{__name__}.enumerated", lambda patch: None)
        test(inner)


def test_a_full_gradient_is_not_a_minibatch() -> None:
    """Dense rounds of marina and ef21 use all rows."""
    request = asked()
    everyone = torch.ones(len(BATCHES), dtype=torch.bool)
    for uplink in (Marina(Whole(), 0.3), Ef21(Whole())):
        first = Request(1, request.points, request.outputs, sync=everyone)
        sent = uploads(uplink, first).numpy()
        assert np.abs(sent - full(POINT)[:, None]).max() <= MEAN


# --- the law ------------------------------------------------------------------------------------------------------

PRIOR, CHAINS, WARMUP, ROUNDS = 0.5, 1024, 40, 200


@dataclass(frozen=True)
class Regression:
    """Three clients of six rows, y = theta x + noise."""

    x: Array
    y: Array
    step: float
    refresh: int | None

    @property
    def precision(self) -> float:
        return float((self.x**2).sum() + PRIOR)

    @property
    def mode(self) -> float:
        return float((self.x * self.y).sum() / self.precision)

    def noise(self) -> tuple[float, float]:
        """Variance of the estimate at the mode, and of its slope."""
        weight = self.x.shape[1] ** 2  # batches of one row
        slope = self.x**2
        force = slope * self.mode - self.x * self.y
        return weight * float(force.var(1).sum()), weight * float(slope.var(1).sum())

    def variance(self) -> float:
        """E u^2 of the stationary law, averaged over a cycle of references."""
        h, lam = self.step, self.precision
        force, slope = self.noise()
        if self.refresh is None or self.refresh == 0:
            added = h * force if self.refresh is None else 0.0
            return (2 + added) / (2 * lam - h * lam**2 - h * slope)
        q, heat = 1 - h * lam, h * h * slope

        def cycle(start: float) -> list[float]:
            u, ur, r = start, start, start
            places = []
            for _ in range(self.refresh or 0):
                u, ur = q * q * u + heat * (u - 2 * ur + r) + 2 * h, q * ur
                places.append(u)
            return places

        zero, one = cycle(0.0)[-1], cycle(1.0)[-1]
        return float(np.mean(cycle(zero / (1 - (one - zero)))))

    def exact_gradients(self) -> float:
        return 1 / (self.precision * (1 - self.step * self.precision / 2))


def regression(step: float, refresh: int | None) -> Regression:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(3, 6))
    return Regression(x, x * np.array([[-1.0], [0.5], [2.0]]) + rng.normal(size=(3, 6)), step, refresh)


def sample(problem: Regression, seed: int) -> dict[str, Estimate]:
    flat = torch.from_numpy(problem.x.reshape(-1, 1))
    targets = torch.from_numpy(problem.y.reshape(-1))
    clients = GeneralizedLinear(flat, targets, torch.tensor([0, 6, 12, 18]), "gaussian", intercept=False)
    metric = Identity(torch.tensor([problem.mode], dtype=torch.float64))
    fleet = LocalFleet(clients, Dense(), seed, CHAINS, batch_size=1)
    fleet.set_metric(metric)
    sampler = Driver(
        Langevin(step_size=problem.step, temperature=1.0, seed=seed),
        Links(fleet.uplink),
        GaussianPrior(PRIOR),
        metric,
        cohort=Cohort(3, CHAINS, seed),
        stability=Stability(1.0, 1.0, math.inf),
        refresh=problem.refresh,
    )
    start = torch.randn(CHAINS, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    state = sampler.begin(start * math.sqrt(problem.exact_gradients()))
    first = second = torch.zeros(CHAINS, dtype=torch.float64)
    for round in range(1, WARMUP + ROUNDS + 1):
        state = advance(sampler, fleet, state)
        if round > WARMUP:
            first = first + state.params[:, 0] / ROUNDS
            second = second + state.params[:, 0].square() / ROUNDS
    root = math.sqrt(CHAINS)
    return {
        "mean": Estimate(float(first.mean()), float(first.std()) / root),
        "variance": Estimate(float(second.mean()), float(second.std()) / root),
    }


LAWS = [(refresh, step) for refresh in (None, 0, 10) for step in (0.008, 0.014)]


@pytest.mark.parametrize(("refresh", "step"), LAWS)
def test_law(refresh: int | None, step: float) -> None:
    problem = regression(step, refresh)
    result = sample(problem, 300)
    variance, want = result["variance"], problem.variance()
    assert result["mean"].errors_from(0.0) < 4
    assert variance.errors_from(want) < 4
    assert abs(want - 1 / problem.precision) > 5 * variance.error
    assert abs(want - problem.exact_gradients()) > 5 * variance.error


def test_references_cool() -> None:
    """Less noise the nearer the reference; a reference that moves every round leaves exact gradients."""
    plain, mode, often = (regression(0.014, refresh).variance() for refresh in (None, 0, 2))
    always = regression(0.014, 1)
    assert plain > mode > often > always.variance() == near(always.exact_gradients(), 1000)


# --- mutants ------------------------------------------------------------------------------------------------------


def another_row(patch: Patch) -> None:
    """A row more than asked for."""
    batch = _TurnOracle._batch
    patch.setattr(_TurnOracle, "_batch", lambda self, point: batch(replace(self, batch_size=2), point))


def two_minibatches(patch: Patch) -> None:
    """The reference's minibatch is another one than the point's."""
    batch = _TurnOracle._batch

    def other(self: _TurnOracle, point: Tensor) -> Tensor:
        at_reference = point is self.request.reference
        return batch(replace(self, keys=self.keys.fold("other")) if at_reference else self, point)

    patch.setattr(_TurnOracle, "_batch", other)


def reference_not_added(patch: Patch) -> None:
    """The whole gradient at the reference is not added back."""
    patch.setattr(Reference, "at", lambda self, clients, who, point, since: 0.0)


def reference_kept(patch: Patch) -> None:
    """A client keeps its whole gradient though the reference has moved."""
    at = Reference.at
    patch.setattr(Reference, "at", lambda self, clients, who, point, since: at(self, clients, who, point, 1))


def reference_ignored(patch: Patch) -> None:
    request = Driver.request
    patch.setattr(Driver, "request", lambda self, state: replace(request(self, state), reference=None))


MUTANTS: list[tuple[Callable[[Patch], None], int | None]] = [
    (another_row, None),
    (another_row, 0),
    (another_row, 10),
    (two_minibatches, 0),
    (two_minibatches, 10),
    (reference_not_added, 10),
    (reference_kept, 10),
    (reference_ignored, 0),
    (reference_ignored, 10),
]


@pytest.mark.parametrize(("mutate", "refresh"), MUTANTS)
def test_a_mutant_misses_the_law(monkeypatch: Patch, mutate: Callable[[Patch], None], refresh: int | None) -> None:
    problem = regression(0.014, refresh)
    mutate(monkeypatch)
    assert sample(problem, 300)["variance"].errors_from(problem.variance()) > 8
