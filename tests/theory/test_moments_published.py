"""Second-moment maps written apart, and `theory.moments`, against published numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from moment_maps import R4, Array, doubt
from rounding import gamma, solved
from scalar_pairs import SAMPLERS, doubt_of, excess, pair, run_warnings, seen, theory

ELF = ([0.25] * 4, [-1.0, 0.5, 2.0, -0.5])  # curvature 1 in mean form, four clients

# Where a step is the largest stable one an eigenvalue may be double: it moves by the root of what the matrix does.
LIMIT = math.sqrt(2 * gamma(3 * 36**2))


# --- the map itself against published numbers -------------------------------------------------------------------------


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
    stationary = np.linalg.solve(matrix, [2 * h, 0, (1 - p) * s * 2 * h])
    assert exact.spread()[0] == pytest.approx(stationary[0], abs=seen(doubt(exact)))
    if step == 0.1:
        assert stationary[1:] == pytest.approx([-0.070758, 0.374007], abs=5e-7)


@pytest.mark.parametrize(("step", "want"), [(0.1, 1.002639), (0.2, 1.011236)])
def test_sghmc_reference(step: float, want: float) -> None:
    """At curvature 1 and friction 1; in closed form 1 / (1 - h^2 lambda / (4 - 2 h C))."""
    exact, described = pair(([1.0], [0.0]), "sghmc", "dense", step, friction=1.0)
    assert exact.spread()[0] == pytest.approx(want, abs=5e-7)
    assert exact.spread()[0] == pytest.approx(1 / (1 - step**2 / (4 - 2 * step)), abs=seen(doubt(exact)))
    assert 1 + described.bias(step) == pytest.approx(want, abs=5e-7)


@pytest.mark.parametrize("friction", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_stated_limit_is_where_the_map_becomes_unstable(sampler: str, friction: float) -> None:
    for curvature in (0.2, 1.0, 30.0):
        limit = theory(sampler, friction).limit(curvature)
        for step, stable in ((0.99 * limit, True), (1.01 * limit, False)):
            exact, _ = pair(([curvature], [0.0]), sampler, "dense", step, friction=friction)
            assert (exact.radius < 1) == stable


@pytest.mark.parametrize(("step", "want"), [(0.005, 0.202983), (0.01, 0.206949), (0.02, 0.218053)])
def test_diana_reference(step: float, want: float) -> None:
    exact, described = pair(R4, "langevin", "diana", step)
    assert exact.spread()[0] == pytest.approx(want, abs=5e-7)
    assert exact.mean()[0] == pytest.approx(0.4, abs=seen(doubt(exact)))
    assert (1 + described.bias(step)) / 5 == pytest.approx(want, rel=0.002)


@pytest.mark.parametrize(
    ("uplink", "arrive", "want"), [("marina", 1.0, 0.2037), ("marina", 0.6, 0.2052), ("diana", 0.6, 0.2038)]
)
def test_client_sampling_reference(uplink: str, arrive: float, want: float) -> None:
    """The published values were simulated, to a Monte-Carlo error of some units of their last digit."""
    exact, _ = pair(R4, "langevin", uplink, 0.005, arrive=arrive)
    assert exact.spread()[0] == pytest.approx(want, abs=3e-4)


@pytest.mark.rounding
@pytest.mark.parametrize("step", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("curvature", [1.0, 1.3])
def test_dense_closed_forms(step: float, curvature: float) -> None:
    """ULA: 1 / (lam (1 - h lam / 2)); BAOAB: 1 / lam exactly, whole momenta 1 - h^2 lam / 4."""
    langevin, described = pair(([curvature], [0.5]), "langevin", "dense", step)
    assert langevin.spread()[0] == pytest.approx(
        1 / (curvature * (1 - step * curvature / 2)), abs=seen(doubt(langevin))
    )
    assert described.bias(step) == pytest.approx(excess(langevin), abs=seen(run_warnings(langevin, described, step)))
    baoab, described = pair(([curvature], [0.5]), "baoab", "dense", step)
    assert baoab.spread()[0] == pytest.approx(1 / curvature, abs=seen(doubt(baoab)))
    assert baoab.whole_momenta()[0] == pytest.approx(1 - step**2 * curvature / 4, abs=seen(4 * doubt(baoab)))
    assert abs(described.bias(step)) <= seen(doubt_of(described, step))


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
    assert described.limit() == pytest.approx(exact.limit(), rel=LIMIT)
    assert math.isinf(described.bias(described.limit() * (1 + 1e-6)))
    assert math.isfinite(described.bias(described.limit() * (1 - 1e-6)))


# --- QLSD: no memory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.005, 0.01, 0.02])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_direct_closed_form(step: float, spread: float) -> None:
    """V = (2 + h w zeta) / (2 L - h L^2 - h w sum lam^2) with zeta = sum lam^2 (x* - a)^2; zeta = 0 about the mode."""
    lam, a = np.array(R4[0]), 0.4 + spread * (np.array(R4[1]) - 0.4)
    exact, described = pair((R4[0], a.tolist()), "langevin", "direct", step)
    zeta = float((lam**2 * (0.4 - a) ** 2).sum())
    want = (2 + step * 3 * zeta) / (2 * 5 - step * 25 - step * 3 * 7.5)
    assert exact.mean()[0] == pytest.approx(0.4, abs=seen(doubt(exact)))
    assert exact.spread()[0] == pytest.approx(want, abs=seen(doubt(exact)))
    assert (1 + described.bias(step)) / 5 == pytest.approx(want, abs=seen(doubt_of(described, step)))


@pytest.mark.parametrize(("step", "want"), [(0.005, 0.204866), (0.01, 0.209974), (0.02, 0.220994)])
def test_anchored_direct_reference(step: float, want: float) -> None:
    """Exact about the mode, where the chain's origin is; and without the anchor QLSD at h = 0.02 has 0.283978."""
    about = [a - 0.4 for a in R4[1]]
    exact, described = pair((R4[0], about), "langevin", "direct", step)
    anchored = replace(exact, anchored=True)
    assert anchored.spread()[0] == pytest.approx(want, abs=5e-7)
    assert abs(anchored.mean()[0]) <= seen(doubt(anchored))
    assert (1 + replace(described, force=0.0).bias(step)) / 5 == pytest.approx(want, abs=5e-7)
    if step == 0.02:
        assert exact.spread()[0] == pytest.approx(0.283978, abs=5e-7)
        assert (1 + described.bias(step)) / 5 == pytest.approx(0.283978, abs=5e-7)


def test_an_anchor_anywhere_is_unbiased() -> None:
    """Away from the mode the anchor heats, by sum lam^2 (x* - x0)^2, but moves no mean."""
    exact, _ = pair((R4[0], R4[1]), "langevin", "direct", 0.02)
    anchored = replace(exact, anchored=True)
    assert anchored.mean()[0] == pytest.approx(0.4, abs=seen(doubt(anchored)))
    want = (2 + 0.02 * 3 * 7.5 * 0.4**2) / (2 * 5 - 0.02 * 25 - 0.02 * 3 * 7.5)
    assert anchored.spread()[0] == pytest.approx(want, abs=seen(doubt(anchored)))


# --- D-ELF, P-ELF, B-ELF: error feedback ------------------------------------------------------------------------------


ELVES = {"d-elf": ("ef21", None), "p-elf": ("dense", 0.25), "b-elf": ("ef21", 0.25)}
TABLE = {
    ("d-elf", 0.025): 1.089580,
    ("d-elf", 0.05): 1.183521,
    ("d-elf", 0.1): 1.385827,
    ("p-elf", 0.025): 1.095890,
    ("p-elf", 0.05): 1.212121,
    ("p-elf", 0.1): 1.538462,
    ("b-elf", 0.0125): 1.085224,
    ("b-elf", 0.025): 1.179210,
    ("b-elf", 0.05): 1.399479,
}


@pytest.mark.parametrize(("name", "step"), TABLE)
def test_elf_reference(name: str, step: float) -> None:
    uplink, see = ELVES[name]
    exact, described = pair(ELF, "langevin", uplink, step, see=see)
    assert exact.spread()[0] == pytest.approx(TABLE[name, step], abs=5.1e-7)
    assert 1 + described.bias(step) == pytest.approx(TABLE[name, step], abs=5.1e-7)


@pytest.mark.rounding
@pytest.mark.parametrize("alpha", [0.25, 0.6])
@pytest.mark.parametrize("step", [0.025, 0.1])
def test_elf_equations(step: float, alpha: float) -> None:
    """The published recursions, in mean form: A = E u^2 and for D-ELF B = E u e_i, C1 = E e_i^2, C2 = E e_i e_j."""
    h, lam, q, n = step, 1.0, 1 - step, 4

    def d_elf(m: Array, two: float) -> Array:
        a, b, c1, c2 = m
        e2 = c1 / n + (1 - 1 / n) * c2
        moved, cross = h * h * (lam**2 * a + 2 * lam * b + e2) + two, -h * (lam * b + e2)
        mixed = q * b - h * e2 + lam * h * (q * (lam * a + b) - h * (lam * b + e2)) - lam * two
        each = [c - 2 * lam * cross + lam**2 * moved for c in (c1, c2)]
        now = q * q * a - 2 * q * h * b + h * h * e2 + two
        return np.array([now, (1 - alpha) * mixed, (1 - alpha) * each[0], (1 - alpha) ** 2 * each[1]])

    def p_elf(m: Array, two: float) -> Array:
        a, b, c = m
        mixed = q * (b + h * lam * (a + b)) - h * lam * (c + h * lam * (b + c)) - two
        square = c + 2 * h * lam * (b + c) + (h * lam) ** 2 * (a + 2 * b + c) + two
        now = q * q * a - 2 * q * h * lam * b + (h * lam) ** 2 * c + two
        return np.array([now, (1 - alpha) * mixed, (1 - alpha) * square])

    for equations, size, uplink, see in ((d_elf, 4, "ef21", None), (p_elf, 3, "dense", alpha)):
        matrix = np.stack([equations(row, 0.0) for row in np.eye(size)], axis=1)
        if np.abs(np.linalg.eigvals(matrix)).max() >= 1:
            continue
        stationary = np.linalg.solve(np.eye(size) - matrix, equations(np.zeros(size), 2 * h))
        exact, described = pair(ELF, "langevin", uplink, step, keep=alpha, see=see)
        own = 2 * gamma(solved(np.eye(size) - matrix, 40)) * float(np.abs(stationary).max())
        assert exact.spread()[0] == pytest.approx(stationary[0], abs=seen(own + doubt(exact)))
        assert 1 + described.bias(step) == pytest.approx(stationary[0], abs=seen(own + doubt_of(described, step)))


@pytest.mark.parametrize(("name", "want"), [("d-elf", 1.077), ("p-elf", 0.286), ("b-elf", 0.269)])
def test_largest_stable_step_of_elf(name: str, want: float) -> None:
    uplink, see = ELVES[name]
    exact, described = pair(ELF, "langevin", uplink, 0.1, see=see)
    assert exact.limit() == pytest.approx(want, abs=5e-4)
    assert described.limit() == pytest.approx(exact.limit(), rel=LIMIT)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("clients", [ELF, R4])
def test_b_elf_reduces(clients: tuple[list[float], list[float]], sampler: str) -> None:
    """To D-ELF where the downlink is dense, to P-ELF where the uplink is; to exact gradients where both are."""
    step = 0.01
    for keep, see, alone in ((0.25, 1.0, ("ef21", None)), (1.0, 0.25, ("dense", 0.25)), (1.0, 1.0, ("dense", None))):
        both, described = pair(clients, sampler, "ef21", step, keep=keep, see=see)
        one, described_one = pair(clients, sampler, alone[0], step, keep=keep, see=alone[1])
        assert both.spread()[0] == pytest.approx(one.spread()[0], abs=seen(doubt(both) + doubt(one)))
        own = doubt_of(described, step) + doubt_of(described_one, step)
        assert described.bias(step) == pytest.approx(described_one.bias(step), abs=seen(own))
    both, described = pair(clients, sampler, "ef21", step, see=0.25)
    for uplink, see in (("ef21", None), ("dense", 0.25)):
        one, described_one = pair(clients, sampler, uplink, step, see=see)
        assert excess(both) > excess(one)
        assert described.bias(step) > described_one.bias(step)


@pytest.mark.parametrize("alphas", [(0.25, 1.0), (1.0, 0.25), (0.25, 0.5), (0.6, 0.3)])
def test_lags_add(alphas: tuple[float, float]) -> None:
    """To first order the excess is h lam (1/2 + (1 - aD) / aD + (1 - aP) / aP)."""
    up, down = alphas
    _, described = pair(ELF, "langevin", "ef21", 1e-5, keep=up, see=down)
    assert described.bias(1e-5) / 1e-5 == pytest.approx(0.5 + (1 - up) / up + (1 - down) / down, rel=1e-3)
