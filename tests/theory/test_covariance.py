"""`theory.covariance` against the second-moment map of `moment_maps`, on dense Hessians that do not commute."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from moment_maps import Array, Chain, independent_pairs, subset_pairs
from rounding import near, solved
from scalar_pairs import theory

from fedsample.theory.covariance import Covariance, Spread, measured
from fedsample.theory.moments import Coordinate

SAMPLERS, UPLINKS = ("langevin", "baoab", "sghmc"), ("dense", "direct", "marina", "diana")
KEEP, SYNC, FRICTION = 0.4, 0.3, 0.7


def positive(generator: np.random.Generator, d: int, scale: float) -> Array:
    factor = generator.normal(size=(d, d))
    return scale * (factor @ factor.T / d + 0.1 * np.eye(d))


def pair(
    sampler: str, uplink: str, step: float, *, equal: bool = True, d: int = 2, n: int = 2, masks: Array | None = None
) -> tuple[Chain, Covariance, Spread]:
    """The same chain as an exact map and as the package describes it, with what probes would measure."""
    generator = np.random.default_rng(1)
    first = positive(generator, d, 1.0)
    hessians = np.stack([first] * n if equal else [first, *(positive(generator, d, 1.0) for _ in range(n - 1))])
    centers, prior = generator.normal(size=(n, d)), positive(generator, d, 0.3)
    sync = SYNC if uplink == "marina" else 0.0
    masks = independent_pairs(d, KEEP) if masks is None else masks
    exact = Chain(hessians, centers, sampler, uplink, step, FRICTION, masks=masks, sync=sync, prior=prior)
    force = np.square(np.einsum("ijk,ik->ij", hessians, exact.mode - centers)).sum(0)
    described = Covariance(exact.precision, hessians.sum(0), n, theory(sampler, FRICTION), uplink, KEEP, sync, force)
    return exact, described, lambda lag: np.einsum("ijk,kl,ilj->j", hessians, lag, hessians)


def variances(described: Covariance, step: float, spread: Spread) -> Array:
    return described.coordinates(described.calm(step)) + described.heating(step, spread)[0]


@pytest.mark.parametrize("step", [0.02, 0.1])
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_clients_are_exact(sampler: str, uplink: str, step: float) -> None:
    exact, described, spread = pair(sampler, uplink, step)
    assert variances(described, step, spread) == pytest.approx(exact.spread(), rel=1e-4)
    vectors = np.linalg.eigh(exact.precision)[1]
    where = exact.layout["x"]
    full = exact.stationary[where, where] - np.outer(exact.mean(), exact.mean())
    along = described.calm(step) + described.heating(step, spread)[1]
    assert along == pytest.approx(np.einsum("jk,jl,lk->k", vectors, full, vectors), rel=1e-4)
    assert described.target == near(np.diag(np.linalg.inv(exact.precision)), 2 * solved(exact.precision))


@pytest.mark.parametrize("uplink", ["direct", "marina"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unequal_clients_without_memories_are_exact(sampler: str, uplink: str) -> None:
    exact, described, spread = pair(sampler, uplink, 0.02, equal=False, d=3)
    assert variances(described, 0.02, spread) == pytest.approx(exact.spread(), rel=1e-4)


@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.02), ("baoab", 0.1)])
def test_unequal_clients_with_memories_are_close(sampler: str, step: float) -> None:
    """Only the memory's own lag is the mean client's: percents of the heating, and on the low side."""
    exact, described, spread = pair(sampler, "diana", step, equal=False, n=3)
    heat = exact.spread() - described.coordinates(described.calm(step))
    added = described.heating(step, spread)[0]
    assert added == pytest.approx(heat, rel=0.1)
    assert np.all(added < heat)


@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.05), ("baoab", 0.15)])
def test_a_client_that_holds_a_coordinate_alone_is_exact(sampler: str, step: float) -> None:
    """The mean client's curvature is a third of what the noise has: a tenth of the heating would be missed."""
    hessians = np.stack([np.diag(row) for row in np.diag([1.0, 2.0, 1.5])])
    exact = Chain(
        hessians, np.zeros((3, 3)), sampler, "diana", step, FRICTION, masks=independent_pairs(3, KEEP), sync=0.0,
        prior=0.1 * np.eye(3),
    )  # fmt: skip
    described = Covariance(exact.precision, hessians.sum(0), 3, theory(sampler, FRICTION), "diana", KEEP)
    alone = replace(described, concentration=np.full(3, 3.0))

    def spread(lag: Array) -> Array:
        result: Array = np.einsum("ijk,kl,ilj->j", hessians, lag, hessians)
        return result

    heat = exact.spread() - described.coordinates(described.calm(step))
    assert alone.heating(step, spread)[0] == pytest.approx(heat, rel=1e-4)
    assert np.all(described.heating(step, spread)[0] < 0.95 * heat)


@pytest.mark.parametrize("uplink", ["direct", "marina", "diana"])
def test_masks_of_exactly_k_coordinates_are_close(uplink: str) -> None:
    """Their correlation, -1 / (d - 1) of the variance, is left out: at d = 5 up to a seventh of the heating."""
    exact, described, spread = pair("langevin", uplink, 0.02, d=5, n=1, masks=subset_pairs(5, 2))
    heat = exact.spread() - described.coordinates(described.calm(0.02))
    assert described.heating(0.02, spread)[0] == pytest.approx(heat, rel=1 / 7)


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_curvature_everywhere_is_a_coordinate(sampler: str, uplink: str) -> None:
    """H = lambda I takes no eigenvectors, and says what the solver of one coordinate does."""
    d, n, lam, step = 4, 3, 1.2, 0.2
    eye = np.eye(d)
    described = Covariance(lam * eye, 0.9 * eye, n, theory(sampler, FRICTION), uplink, KEEP, SYNC, 0.5)
    assert described.isotropic
    spread = measured(np.full(d, 0.27), eye, 0.9 * eye)
    one = Coordinate(theory(sampler, FRICTION), uplink, lam, 0.27, 0.3, n, KEEP, sync=SYNC, force=0.5)  # type: ignore[arg-type]
    assert lam * variances(described, step, spread) - 1 == pytest.approx(one.bias(step), rel=1e-4, abs=1e-9)


def test_what_probes_measured_at_one_step_serves_at_another() -> None:
    """For equal clients exactly: between covariances it changes as the mean client's does."""
    exact, described, spread = pair("langevin", "diana", 0.02, n=3)
    probed = described.lag(0.3)
    served = measured(spread(probed), probed, exact.hessians.sum(0))
    assert served(described.lag(0.02)) == near(spread(described.lag(0.02)), 4 * solved(exact.precision, 40))
    root, lag = described.root_of(described.lagging(0.02)), described.lag(0.02)
    assert root @ root.T == near(lag, 60, float(np.linalg.norm(lag)))


def test_saturation_takes_all_of_its_share_between_independent_draws_only() -> None:
    full, hessian = 2 * np.eye(3), np.diag([1.0, 2.0, 3.0])
    plain = measured(np.ones(3), np.eye(3), hessian)
    spread = measured(np.ones(3), np.eye(3), hessian, full, 0.7)
    assert spread(full) == near(0.7 * plain(full), 60)
    assert spread(full / 2) == near(0.85 * plain(full / 2), 60)
    assert spread(1e-9 * full) == pytest.approx(plain(1e-9 * full), rel=1e-9)  # so little saturates nothing


@pytest.mark.parametrize("uplink", ["direct", "marina", "diana"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_heating_is_infinite_beyond_the_stable_steps(sampler: str, uplink: str) -> None:
    exact, described, spread = pair(sampler, uplink, 0.1)
    limit = exact.limit()
    assert np.isfinite(described.heating(0.9 * limit, spread)[0]).all()
    assert np.isinf(described.heating(1.02 * limit, spread)[0]).all()
    assert not described.stable(100.0)
    assert np.isinf(described.heating(100.0, spread)[0]).all()


@pytest.mark.parametrize("uplink", ["marina", "diana"])
def test_heating_is_second_order(uplink: str) -> None:
    steps = np.array([2e-3, 1e-3, 5e-4])
    heats = np.array(
        [pair("langevin", uplink, h)[1].heating(h, pair("langevin", uplink, h)[2])[0].sum() for h in steps]
    )
    assert np.diff(np.log(heats)) / np.diff(np.log(steps)) == pytest.approx(2.0, abs=0.05)


def test_what_is_sent_whole_heats_nothing() -> None:
    _, described, spread = pair("baoab", "diana", 0.1)
    for calm in (replace(described, uplink="dense"), replace(described, inclusion=1.0)):
        assert not calm.heating(0.1, spread)[0].any()
    assert math.isclose(float(described.calm(0.1)[-1] * described.curvatures[-1]), 1.0, rel_tol=1e-6)
