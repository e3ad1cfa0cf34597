r"""Overdamped Langevin dynamics, dX = -grad U dt + sqrt(2 T) dB, by Euler-Maruyama steps.

    x <- x - h g + sqrt(2 h T) xi

On N(mu, 1 / lambda) with exact gradients the stationary variance is T / (lambda (1 - h lambda / 2)); the step is
stable for h lambda < 2. T = 0 is gradient descent. Roberts & Tweedie 1996; over compressed links Sun, Salim & Richtarik
2022 (arXiv 2206.00920).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from fedsample.strategies.base import Sampler
from fedsample.strategies.noise import Keys
from fedsample.theory.base import Linear, StepTheory


def langevin_step(params: Tensor, gradient: Tensor, noise: Tensor, step_size: float, temperature: float) -> Tensor:
    """Take one Euler-Maruyama step from (..., d) positions.

    Args:
        params: (..., d) positions.
        gradient: grad U(params), same shape.
        noise: standard normal, same shape.
        step_size: h > 0.
        temperature: T >= 0.
    """
    return params - step_size * gradient + math.sqrt(2 * step_size * temperature) * noise


@dataclass(frozen=True)
class LangevinTheory(StepTheory):
    """Langevin dynamics on a quadratic."""

    def linear(self, step_size: float) -> Linear:
        """A step of the positions: -h g, and noise of variance 2 h."""
        h = step_size
        return Linear(np.diag([1.0, 0.0]), np.array([-h, 0.0]), np.array([math.sqrt(2 * h), 0.0]))

    def limit(self, curvature: float) -> float:
        """2 / lambda."""
        return 2.0 / curvature


class Positions(NamedTuple):
    """All that Langevin dynamics has.

    Attributes:
        params: (C, d).
    """

    params: Tensor


class Langevin(Sampler):
    """The unadjusted Langevin algorithm with an estimated gradient."""

    name: ClassVar[str] = "langevin"
    rule: ClassVar[str] = "x <- x - h g + sqrt(2 h T) xi"
    reference: ClassVar[str] = "Roberts & Tweedie 1996; Sun, Salim & Richtarik 2022"
    state: ClassVar[type[Positions]] = Positions
    theory: ClassVar[type[LangevinTheory]] = LangevinTheory

    def begin(self, start: Tensor, keys: Keys) -> Positions:
        """The positions are all."""
        return Positions(start)

    def tell(self, state: Positions, gradient: Tensor, keys: Keys) -> Positions:
        """One Euler-Maruyama step."""
        noise = keys.normal("noise", state.params)
        moved = langevin_step(state.params, gradient, noise, self.step_at(keys.step), self.temperature)
        return Positions(moved)

    def noise_scale(self, step_size: float) -> float:
        """sqrt(2 h T)."""
        return math.sqrt(2 * step_size * self.temperature)
