"""`theory.moments` against second-moment maps written apart from it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from moment_maps import R4
from scalar_pairs import SAMPLERS, UPLINKS, excess, pair, run_warnings, seen

EQUAL = ([0.3] * 4, [-1.0, 0.5, 2.0, -0.5])


@pytest.mark.parametrize("step", [0.05, 0.4])
@pytest.mark.parametrize("prior", [0.0, 0.5])
@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("see", [None, 0.6])
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_clients_are_exact(
    sampler: str, uplink: str, see: float | None, arrive: float, prior: float, step: float
) -> None:
    exact, described = pair(EQUAL, sampler, uplink, step, arrive=arrive, prior=prior, see=see)
    want = excess(exact) if exact.radius < 1 else math.inf
    assert described.bias(step) == pytest.approx(want, abs=seen(run_warnings(exact, described, step), 1 + want))


@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("uplink", ["dense", "direct", "marina"])
@pytest.mark.parametrize("see", [None, 0.6])
@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.02), ("baoab", 0.04)])
def test_unequal_clients_without_memories_are_exact(
    sampler: str, step: float, see: float | None, uplink: str, arrive: float
) -> None:
    """Their noise depends on the clients through sum lam_i^2 and the force alone."""
    exact, described = pair(R4, sampler, uplink, step, arrive=arrive, prior=0.4, see=see)
    assert described.bias(step) == pytest.approx(excess(exact), abs=seen(run_warnings(exact, described, step)))


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


@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("see", [None, 0.25])
@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.005), ("langevin", 0.02), ("baoab", 0.01)])
def test_unequal_clients_with_error_feedback_are_close(
    sampler: str, step: float, see: float | None, arrive: float
) -> None:
    """The mean memory lags alike for all clients; only how their masks scatter it depends on which client is stiff."""
    exact, described = pair(R4, sampler, "ef21", step, arrive=arrive, see=see)
    assert described.bias(step) == pytest.approx(excess(exact), rel=0.005)


FIRST_ORDER = {
    "direct": ("direct", None, 1.0),
    "qlsd-star": ("direct", None, 0.0),
    "d-elf": ("ef21", None, 1.0),
    "p-elf": ("dense", 0.25, 1.0),
    "b-elf": ("ef21", 0.25, 1.0),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_bias_without_a_memory_or_with_a_lag_is_first_order(sampler: str, name: str) -> None:
    """The excess over exact gradients falls as h, for BAOAB as for Langevin."""
    uplink, see, force = FIRST_ORDER[name]
    steps = np.array([4e-4, 2e-4, 1e-4, 5e-5])
    described = [pair(R4, sampler, uplink, h, see=see)[1] for h in steps]
    described = [replace(each, force=force * each.force) for each in described]
    excesses = np.array([each.bias(h) - each.exact().bias(h) for each, h in zip(described, steps, strict=True)])
    slopes = np.diff(np.log(excesses)) / np.diff(np.log(steps))
    assert slopes == pytest.approx(1.0, abs=0.02)
    assert np.all(np.diff(np.abs(slopes - 1)) < 0)


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


@pytest.mark.parametrize("uplink", ["marina", "diana"])
def test_bias_of_compression_is_third_order_under_momenta(uplink: str) -> None:
    """A BAOAB step moves h v where a Langevin step moves sqrt(2 h) xi: the noise of differences is smaller by h."""
    steps = np.array([1.6e-2, 8e-3, 4e-3, 2e-3])
    excesses = np.array([pair(R4, "baoab", uplink, h)[1].bias(h) for h in steps])
    slopes = np.diff(np.log(excesses)) / np.diff(np.log(steps))
    assert slopes == pytest.approx(3.0, abs=0.1)
    assert np.all(np.diff(np.abs(slopes - 3)) < 0)


@pytest.mark.parametrize("arrive", [1.0, 0.6])
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_disagreement_of_clients(sampler: str, uplink: str, arrive: float) -> None:
    """Moving the a_i apart changes nothing with a memory; it heats direct, and dense under client sampling."""
    near, described_near = pair(R4, sampler, uplink, 0.01, arrive=arrive)
    far, described_far = pair((R4[0], [10 * a for a in R4[1]]), sampler, uplink, 0.01, arrive=arrive)
    heated = excess(far) - excess(near)
    own = run_warnings(near, described_near, 0.01) + run_warnings(far, described_far, 0.01)
    assert described_far.bias(0.01) - described_near.bias(0.01) == pytest.approx(heated, abs=seen(own, 100.0))
    if uplink == "direct" or (uplink == "dense" and arrive < 1):
        assert heated > 0.1
    else:
        assert abs(heated) <= own
