r"""Overdamped Langevin dynamics, dX = -grad U dt + sqrt(2 T) dB, by Euler-Maruyama steps.

    x <- x - h g + sqrt(2 h T) xi

On N(mu, 1 / lambda) with exact gradients the stationary variance is T / (lambda (1 - h lambda / 2)); the step is
stable for h lambda < 2. T = 0 is gradient descent. Roberts & Tweedie 1996; over compressed links Sun, Salim & Richtarik
2022 (arXiv 2206.00920).
"""

from __future__ import annotations

import math
from typing import ClassVar

from torch import Tensor

from fedsample.strategies.base import Sampler
from fedsample.strategies.state import State


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


class Langevin(Sampler):
    """The unadjusted Langevin algorithm with an estimated gradient."""

    name: ClassVar[str] = "langevin"
    rule: ClassVar[str] = "x <- x - h g + sqrt(2 h T) xi"
    reference: ClassVar[str] = "Roberts & Tweedie 1996; Sun, Salim & Richtarik 2022"

    def start(self, params: Tensor) -> dict[str, Tensor]:
        """Return no variables: the positions are all."""
        return {}

    def step(self, state: State, gradient: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One Euler-Maruyama step."""
        return langevin_step(state.params, gradient, noise, self.step_at(state.round + 1), self.temperature), {}

    def noise_scale(self, step_size: float) -> float:
        """sqrt(2 h T)."""
        return math.sqrt(2 * step_size * self.temperature)
