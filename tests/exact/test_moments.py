"""`diagnostics.moments` against second-moment maps written apart from it, and both against published numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from moment_maps import R4, Chain, coordinate

from fedsample.diagnostics.moments import Coordinate

SAMPLERS, UPLINKS = ("langevin", "baoab"), ("dense", "marina", "diana")
EQUAL = ([0.3] * 4, [-1.0, 0.5, 2.0, -0.5])


def pair(
    clients: tuple[list[float], list[float]],
    sampler: str,
    uplink: str,
    step: float,
    *,
    keep: float = 0.25,
    arrive: float = 1.0,
    sync: float = 0.3,
    prior: float = 0.0,
    friction: float = 0.7,
) -> tuple[Chain, Coordinate]:
    """The same coordinate as an exact map and as the package describes it."""
    lam, a = np.array(clients[0]), np.array(clients[1])
    exact = coordinate(
        lam, a, sampler, uplink, step, keep=keep, arrive=arrive, sync=sync, friction=friction, prior=np.array([[prior]])
    )
    described = Coordinate(
        sampler,  # type: ignore[arg-type]
        uplink,  # type: ignore[arg-type]
        curvature=float(exact.precision[0, 0]),
        mixing=float((lam**2).sum()),
        share=float(lam.mean()),
        friction=friction,
        inclusion=1.0 if uplink == "dense" else keep,
        participation=arrive,
        sync=sync,
        force=float(((lam * (exact.mode[0] - a)) ** 2).sum()),
    )
    return exact, described


def excess(exact: Chain) -> float:
    """Relative excess of the exact stationary variance over the truth."""
    return float(exact.spread()[0] * exact.precision[0, 0] - 1)


# --- the map itself against published numbers ---------------------------------------------------------------------


@pytest.mark.parametrize(("step", "want"), [(0.05, 1.048607), (0.1, 1.139350), (0.2, 1.434667)])
def test_langevin_marina_reference(step: float, want: float) -> None:
    clients = ([0.25] * 4, [-1.0, 0.5, 2.0, -0.5])
    exact, described = pair(clients, "langevin", "marina", step)
    assert exact.spread()[0] == pytest.approx(want, abs=5e-7)
    assert 1 + described.bias(step) == pytest.approx(want, abs=5e-7)
    # the three equations for A = E u^2, B = E u e, C = E e^2 (algorithms of Langevin-MARINA, mean form)
    h, q, p, s = step, 1 - step, 0.3, 3 / 4
    matrix = np.array(
        [
            [1 - q * q, 2 * h * q, -h * h],
            [0, 1 - (1 - p) * q, (1 - p) * h],
            [-(1 - p) * s * h * h, -2 * (1 - p) * s * h * h, 1 - (1 - p) * (1 + s * h * h)],
        ]
    )
    solved = np.linalg.solve(matrix, [2 * h, 0, (1 - p) * s * 2 * h])
    assert exact.spread()[0] == pytest.approx(solved[0], rel=1e-12)
    if step == 0.1:
        assert solved[1:] == pytest.approx([-0.070758, 0.374007], abs=5e-7)


@pytest.mark.parametrize(("step", "want"), [(0.005, 0.202983), (0.01, 0.206949), (0.02, 0.218053)])
def test_diana_reference(step: float, want: float) -> None:
    exact, described = pair(R4, "langevin", "diana", step)
    assert exact.spread()[0] == pytest.approx(want, abs=5e-7)
    assert exact.mean()[0] == pytest.approx(0.4, rel=1e-12)
    assert (1 + described.bias(step)) / 5 == pytest.approx(want, rel=0.002)


@pytest.mark.parametrize(
    ("uplink", "arrive", "want"), [("marina", 1.0, 0.2037), ("marina", 0.6, 0.2052), ("diana", 0.6, 0.2038)]
)
def test_client_sampling_reference(uplink: str, arrive: float, want: float) -> None:
    """The published values were simulated, to a Monte-Carlo error of some units of their last digit."""
    exact, _ = pair(R4, "langevin", uplink, 0.005, arrive=arrive)
    assert exact.spread()[0] == pytest.approx(want, abs=3e-4)


@pytest.mark.parametrize("step", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("curvature", [1.0, 1.3])
def test_dense_closed_forms(step: float, curvature: float) -> None:
    """ULA: 1 / (lam (1 - h lam / 2)); BAOAB: 1 / lam exactly, whole momenta 1 - h^2 lam / 4."""
    langevin, described = pair(([curvature], [0.5]), "langevin", "dense", step)
    assert langevin.spread()[0] == pytest.approx(1 / (curvature * (1 - step * curvature / 2)), rel=1e-12)
    assert described.bias(step) == pytest.approx(excess(langevin), rel=1e-9)
    baoab, described = pair(([curvature], [0.5]), "baoab", "dense", step)
    assert baoab.spread()[0] == pytest.approx(1 / curvature, rel=1e-12)
    assert baoab.whole_momenta()[0] == pytest.approx(1 - step**2 * curvature / 4, rel=1e-12)
    assert abs(described.bias(step)) < 1e-12


def test_absent_clients_without_memory() -> None:
    """Dense uplinks of one client in four are QLSD's law: V = (2 + h w zeta) / (2 L - h L^2 - h w sum lam^2), w = 3."""
    exact, described = pair(R4, "langevin", "dense", 0.02, arrive=0.25)
    assert exact.spread()[0] == pytest.approx(0.283978, abs=5e-7)
    assert (1 + described.bias(0.02)) / 5 == pytest.approx(0.283978, abs=5e-7)
    assert (1 + replace(described, force=0.0).bias(0.02)) / 5 == pytest.approx(0.220994, abs=5e-7)


@pytest.mark.parametrize(
    ("n", "p", "omega", "want"), [(4, 0.3, 3, 0.979), (10, 0.05, 19, 0.454), (5, 0.9, 3, 1.682), (20, 0.5, 1, 1.878)]
)
def test_largest_stable_step(n: int, p: float, omega: int, want: float) -> None:
    clients = ([1 / n] * n, [0.0] * n)
    exact, described = pair(clients, "langevin", "marina", 0.1, keep=1 / (1 + omega), sync=p)
    assert exact.limit() == pytest.approx(want, abs=6e-4)  # printed to three digits
    assert described.limit() == pytest.approx(exact.limit(), rel=1e-6)
    assert math.isinf(described.bias(described.limit() * (1 + 1e-6)))
    assert math.isfinite(described.bias(described.limit() * (1 - 1e-6)))


# --- the package against the map ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.05, 0.4])
@pytest.mark.parametrize("prior", [0.0, 0.5])
@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_clients_are_exact(sampler: str, uplink: str, arrive: float, prior: float, step: float) -> None:
    exact, described = pair(EQUAL, sampler, uplink, step, arrive=arrive, prior=prior)
    want = excess(exact) if exact.radius < 1 else math.inf
    assert described.bias(step) == pytest.approx(want, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("uplink", ["dense", "marina"])
@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.02), ("baoab", 0.08)])
def test_unequal_clients_without_memories_are_exact(sampler: str, step: float, uplink: str, arrive: float) -> None:
    """Their noise depends on the clients through sum lam_i^2 and the force alone."""
    exact, described = pair(R4, sampler, uplink, step, arrive=arrive, prior=0.4)
    assert described.bias(step) == pytest.approx(excess(exact), rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize(
    ("sampler", "step"), [("langevin", 0.01), ("langevin", 0.02), ("baoab", 0.02), ("baoab", 0.04)]
)
def test_unequal_clients_with_memories_are_close(sampler: str, step: float, arrive: float) -> None:
    """A memory lags with its own client's curvature. One share stands for all: weighted by what each adds to the noise
    it is right to first order; the plain mean misses some percent of the bias, and always on the low side."""
    exact, described = pair(R4, sampler, "diana", step, arrive=arrive)
    lam = np.array(R4[0])
    weighted = replace(described, share=float((lam**3).sum() / (lam**2).sum()))
    assert weighted.bias(step) == pytest.approx(excess(exact), rel=0.006)
    assert 0.92 * excess(exact) < described.bias(step) < excess(exact)


@pytest.mark.parametrize("uplink", ["marina", "diana"])
def test_bias_of_compression_is_second_order(uplink: str) -> None:
    """The excess over uncompressed Langevin falls as h^2; its rate is the masks' noise, summed over rounds."""
    steps = np.array([4e-3, 2e-3, 1e-3, 5e-4])
    compressed = np.array([pair(R4, "langevin", uplink, h)[1].bias(h) for h in steps])
    dense = np.array([pair(R4, "langevin", "dense", h)[1].bias(h) for h in steps])
    slopes = np.diff(np.log(compressed - dense)) / np.diff(np.log(steps))
    assert slopes == pytest.approx(2.0, abs=0.06)
    assert np.all(np.diff(np.abs(slopes - 2)) < 0)
    omega, p, r = 3.0, 0.3, 7.5
    rate = omega * (1 - p) * (2 - p) / p**2 * r if uplink == "marina" else omega * 4 * r
    assert (compressed - dense)[-1] / steps[-1] ** 2 == pytest.approx(rate, rel=0.01)
    exact = excess(pair(R4, "langevin", uplink, steps[-1])[0]) - excess(pair(R4, "langevin", "dense", steps[-1])[0])
    assert (compressed - dense)[-1] == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_disagreement_of_clients(sampler: str, uplink: str, arrive: float) -> None:
    """Moving the a_i apart changes nothing with marina or diana; it heats a dense uplink under client sampling only."""
    near, described_near = pair(R4, sampler, uplink, 0.01, arrive=arrive)
    far, described_far = pair((R4[0], [10 * a for a in R4[1]]), sampler, uplink, 0.01, arrive=arrive)
    heated = excess(far) - excess(near)
    assert described_far.bias(0.01) - described_near.bias(0.01) == pytest.approx(heated, rel=1e-9, abs=1e-10)
    if uplink == "dense" and arrive < 1:
        assert heated > 0.1
    else:
        assert abs(heated) < 1e-10


@pytest.mark.parametrize("uplink", ["marina", "diana"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_largest_step_within_a_tolerance(sampler: str, uplink: str) -> None:
    exact, described = pair(EQUAL, sampler, uplink, 0.1)
    step = described.largest_step(0.05)
    assert step < described.limit()
    assert excess(replace(exact, step=step)) == pytest.approx(0.05, rel=1e-6)
