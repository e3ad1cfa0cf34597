r"""Stochastic gradient Hamiltonian Monte Carlo: underdamped Langevin dynamics by symplectic Euler steps.

    v <- (1 - h C) v - h g + sqrt(2 C h T) xi
    x <- x + h v

Chen, Fox & Guestrin 2014 (arXiv 1402.4102), eq. 13, without their estimate of the gradient's own noise. In the terms
of momentum methods the learning rate is h^2, the momentum 1 - h C. On N(mu, 1 / lambda) with exact gradients the
variance exceeds the target's by O(h^2), where `baoab` has none; the step is stable for h^2 lambda + 2 h C < 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from fedsample.strategies.noise import Keys
from fedsample.strategies.underdamped import Underdamped
from fedsample.theory.base import Linear, StepTheory


def sghmc_step(
    params: Tensor,
    velocities: Tensor,
    gradient: Tensor,
    noise: Tensor,
    step_size: float,
    friction: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Take one step.

    Args:
        params: (..., d) positions.
        velocities: same shape.
        gradient: grad U(params), same shape.
        noise: standard normal, same shape.
        step_size: h > 0.
        friction: C > 0.
        temperature: T >= 0.

    Returns:
        The next positions and velocities.
    """
    kept = (1 - step_size * friction) * velocities - step_size * gradient
    velocities = kept + math.sqrt(2 * friction * step_size * temperature) * noise
    return params + step_size * velocities, velocities


@dataclass(frozen=True)
class SghmcTheory(StepTheory):
    """SGHMC on a quadratic.

    Attributes:
        friction: C > 0.
    """

    friction: float
    momenta: ClassVar[bool] = True
    persistence: ClassVar[float] = 1.5  # BAOAB's, whose momenta persist alike; not measured here

    def linear(self, step_size: float) -> Linear:
        """A step of the velocities, and of the positions by the new ones."""
        h, kept = step_size, 1 - step_size * self.friction
        s = math.sqrt(2 * self.friction * h)
        return Linear(np.array([[1.0, h * kept], [0.0, kept]]), np.array([-h * h, -h]), np.array([h * s, s]))

    def limit(self, curvature: float) -> float:
        """The root of h^2 lambda + 2 h C = 4."""
        return 4.0 / (self.friction + math.sqrt(self.friction**2 + 4 * curvature))


class Moving(NamedTuple):
    """Positions and velocities, which are the momenta at unit mass.

    Attributes:
        params: (C, d).
        velocities: (C, d).
    """

    params: Tensor
    velocities: Tensor


class Sghmc(Underdamped):
    """SGHMC with an estimated gradient.

    Args:
        friction: C > 0, per unit of time.
        **rest: as for `Sampler`.
    """

    name: ClassVar[str] = "sghmc"
    rule: ClassVar[str] = "v <- (1 - h C) v - h g + sqrt(2 C h T) xi, x <- x + h v"
    reference: ClassVar[str] = "Chen, Fox & Guestrin 2014"
    state: ClassVar[type[Moving]] = Moving
    theory: ClassVar[type[SghmcTheory]] = SghmcTheory

    def tell(self, state: Moving, gradient: Tensor, keys: Keys) -> Moving:
        """Take one step."""
        noise, h = keys.normal("noise", state.params), self.step_at(keys.step)
        moved = sghmc_step(*state, gradient, noise, h, self.friction, self.temperature)
        return Moving(*moved)

    def noise_scale(self, step_size: float) -> float:
        """h sqrt(2 C h T): what a step adds to the velocities, carried by the move that follows it."""
        return step_size * math.sqrt(2 * self.friction * step_size * self.temperature)
