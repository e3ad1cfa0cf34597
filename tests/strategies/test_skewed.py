r"""A target without symmetry, whose mean a flipped sign would move: U(x) = 4 log(1 + e^x) - x in every coordinate.

Split over two clients that disagree, U_1 = log(1 + e^x) - 2.5 x and U_2 = 3 log(1 + e^x) + 1.5 x. At temperature T, x
is the logit of a Beta(1 / T, 3 / T) variable; the moments used here come from quadrature. The law of discretised
Langevin at a step is the fixed point of its transition density, found on the same grid.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from moment_maps import Array
from rounding import ELEMENTARY, assert_within, gamma, propagated
from simulation import Estimate, Setup, advance, federation
from torch import Tensor

from fedsample.random import Key
from fedsample.strategies.langevin import langevin_step
from fedsample.targets import Quadratic

pytestmark = pytest.mark.law

GRID = np.linspace(-36.0, 16.0, 521)
MODE = -math.log(3.0)


class Skewed(Quadratic):
    """Gradients w_i / (1 + e^-x) - b_i; nothing else is asked of clients in a round."""

    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        who = torch.arange(self.n) if clients is None else clients
        return self.curvature[who].unsqueeze(1) * theta.sigmoid() - self.center[who].unsqueeze(1)


def clients(d: int = 4) -> Skewed:
    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).unsqueeze(-1).expand(-1, d).clone()

    return Skewed(column(1.0, 3.0), column(2.5, -1.5))


def moments(density: Array) -> tuple[float, float]:
    weights = density / density.sum()
    mean = float(weights @ GRID)
    return mean, float(weights @ (GRID - mean) ** 2)


def target(temperature: float) -> Array:
    potential = (4 * np.logaddexp(0, GRID) - GRID) / temperature
    density: Array = np.exp(potential.min() - potential)
    return density


def truth(temperature: float) -> tuple[float, float]:
    """Mean and variance of the target."""
    return moments(target(temperature))


def discretised(step: float, temperature: float) -> tuple[float, float]:
    """Mean and variance of the stationary law of x <- x - h U'(x) + sqrt(2 h T) xi."""
    ahead = GRID - step * (4 / (1 + np.exp(-GRID)) - 1)
    kernel = np.exp(-((GRID[:, None] - ahead) ** 2) / (4 * step * temperature))
    kernel /= kernel.sum(0)
    density = target(temperature)
    for _ in range(12):  # the law after 2^12 rounds, by squaring
        kernel = kernel @ kernel
    return moments(kernel @ (density / density.sum()))


def sample(setup: Setup) -> dict[str, Estimate]:
    """Mean, and variance about it, over chains that begin at the target."""
    sampler, fleet = federation(setup, clients())
    weights = target(setup.temperature)
    places = np.random.default_rng(setup.seed).choice(GRID, (setup.chains, 4), p=weights / weights.sum())
    state = sampler.begin(torch.from_numpy(places))
    first = second = torch.zeros(setup.chains, dtype=torch.float64)
    for round in range(1, setup.warmup + setup.rounds + 1):
        state = advance(sampler, fleet, state)
        if round > setup.warmup:
            first = first + state.params.mean(-1) / setup.rounds
            second = second + state.params.square().mean(-1) / setup.rounds
    mean = float(first.mean())
    about = second - 2 * mean * first + mean**2  # (C,)
    root = math.sqrt(setup.chains)
    return {
        "mean": Estimate(mean, float(first.std()) / root),
        "variance": Estimate(float(about.mean()), float(about.std()) / root),
    }


def test_quadrature() -> None:
    """Against the Beta law's own: psi(1) - psi(3) = -3 / 2, psi'(1) + psi'(3) = pi^2 / 3 - 5 / 4."""
    assert truth(1.0) == pytest.approx((-1.5, math.pi**2 / 3 - 1.25), rel=1e-9)
    assert discretised(0.2, 1.0)[1] > discretised(0.1, 1.0)[1] > truth(1.0)[1]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_langevin(temperature: float) -> None:
    """The law at this step to four errors, a fifth of which separate it from the target; the mirror image is far."""
    setup = Setup("langevin", "dense", 0.3, temperature=temperature)
    mean, variance = discretised(setup.step, temperature)
    result = sample(setup)
    assert result["mean"].errors_from(mean) < 4
    assert result["variance"].errors_from(variance) < 4
    for got, exact, aim in zip(result.values(), (mean, variance), truth(temperature), strict=True):
        assert got.error < abs(exact - aim) / 5


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_baoab(temperature: float) -> None:
    """The target itself: at this step the splitting's own error, of order h^2, hides below the Monte-Carlo error."""
    result = sample(Setup("baoab", "dense", 0.3, temperature=temperature))
    mean, variance = truth(temperature)
    assert result["mean"].errors_from(mean) < 4
    assert result["variance"].errors_from(variance) < 4
    assert result["mean"].error < abs(mean - discretised(0.3, temperature)[0]) / 4


@pytest.mark.parametrize("uplink", ["marina", "diana"])
@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.1), ("baoab", 0.2)])
def test_compressed(sampler: str, step: float, uplink: str) -> None:
    """Compression heats: the variance grows by some percent, and the mean moves on down the flatter side."""
    result = sample(Setup(sampler, uplink, step))
    mean, variance = discretised(step, 1.0) if sampler == "langevin" else truth(1.0)
    assert mean - 0.06 < result["mean"].value < mean + 4 * result["mean"].error
    assert variance - 4 * result["variance"].error < result["variance"].value < 1.15 * variance


@pytest.mark.parametrize("sampler", ["langevin", "baoab"])
def test_a_mirrored_gradient_is_seen(monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    """The gradient of U(-x), a sign error that no symmetric target can show: the variance is right, the mean is not."""
    gradient = Skewed.gradient
    monkeypatch.setattr(Skewed, "gradient", lambda self, theta, **rest: -gradient(self, -theta, **rest))
    result = sample(Setup(sampler, "dense", 0.3))
    mean, variance = discretised(0.3, 1.0) if sampler == "langevin" else truth(1.0)
    assert result["mean"].errors_from(mean) > 8
    assert result["variance"].errors_from(variance) < 4


# --- temperature zero ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("participation", [1.0, 0.5])
@pytest.mark.parametrize("uplink", ["dense", "marina", "diana", "ef21", "b-elf"])
@pytest.mark.parametrize(("sampler", "step"), [("langevin", 0.1), ("baoab", 0.15)])
def test_temperature_zero_finds_the_mode(sampler: str, step: float, uplink: str, participation: float) -> None:
    """Memories make compression noise vanish with the motion, so the chains converge, and to the mode itself."""
    both = uplink == "b-elf"
    setup = Setup(
        sampler,
        "ef21" if both else uplink,
        step,
        temperature=0.0,
        participation=participation,
        chains=4,
        downlink=both,
    )
    machine, fleet = federation(setup, clients())
    state = machine.begin(torch.linspace(-1, 2, 16, dtype=torch.float64).reshape(4, 4))
    distance = math.inf
    for round in range(700):
        if round % 20 == 0 and distance < 1e-9:
            break
        state = advance(machine, fleet, state)
        distance = float((state.params - MODE).abs().max())
    if uplink == "dense" and participation < 1:  # no memory: the disagreement of absent clients stays
        assert distance > 1e-3
    else:
        assert distance < 1e-9


def test_temperature_zero_is_gradient_descent() -> None:
    """Every step, not only the limit."""
    setup = Setup("langevin", "dense", 0.05, temperature=0.0, chains=3)
    machine, fleet = federation(setup, clients())
    state = machine.begin(torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4))
    by_hand = state.params
    for round in range(1, 51):
        state = advance(machine, fleet, state)
        by_hand = by_hand - 0.05 * (4 * by_hand.sigmoid() - 1)
        # |x| <= 2, a gradient of at most 5: a round's roundings, carried on by rounds that move no two points apart
        size = float(by_hand.abs().max()) + 0.05 * 5
        bound = propagated(2 * gamma(ELEMENTARY + 10) * size, 1.0, round)
        assert_within(state.params, by_hand, bound)


def test_noise_at_temperature_zero_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fedsample.strategies.langevin.langevin_step", lambda x, g, xi, h, t: langevin_step(x, g, xi, h, t + 1e-12)
    )
    with pytest.raises(AssertionError):
        test_temperature_zero_is_gradient_descent()
