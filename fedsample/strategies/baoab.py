r"""Underdamped Langevin dynamics, split as BAOAB with one gradient per step.

    dx = v dt,   dv = -grad U dt - gamma v dt + sqrt(2 gamma T) dB        (unit mass)

    B  v <- v - (h / 2) grad U(x)          A  x <- x + (h / 2) v
    O  v <- e v + sqrt(T (1 - e^2)) xi,    e = exp(-gamma h)
    A  x <- x + (h / 2) v                  B  v <- v - (h / 2) grad U(x)

Leimkuhler & Matthews 2013 (doi 10.1093/amrx/abs010). On a Gaussian target the positions have the exact variance for
every stable step, h^2 lambda < 4, and Var v = T (1 - h^2 lambda / 4). The last B of a step and the first of the next
use the gradient at the same position, which in a federation arrives between them: `baoab_step` does both.
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


def baoab_step(
    params: Tensor,
    momenta: Tensor,
    gradient: Tensor,
    noise: Tensor,
    step_size: float,
    friction: float,
    temperature: float,
    *,
    first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advance from the gradient at `params` to the next position: (closing B of the previous step,) B A O A.

    Args:
        params: (..., d) positions.
        momenta: same shape, before the closing B of the previous step.
        gradient: grad U(params), same shape.
        noise: standard normal, same shape.
        step_size: h > 0.
        friction: gamma > 0.
        temperature: T >= 0.
        first: whether this is the first step, so that no closing B is due.

    Returns:
        The next positions, and the momenta before their closing B.
    """
    decay = math.exp(-friction * step_size)
    momenta = momenta - (step_size / 2 if first else step_size) * gradient
    params = params + (step_size / 2) * momenta
    momenta = decay * momenta + math.sqrt(temperature * (1 - decay * decay)) * noise
    return params + (step_size / 2) * momenta, momenta


@dataclass(frozen=True)
class BaoabTheory(StepTheory):
    """BAOAB on a quadratic; v are the momenta before their closing B.

    Attributes:
        friction: gamma > 0.
    """

    friction: float
    momenta: ClassVar[bool] = True
    persistence: ClassVar[float] = 1.5  # measured 1.4 to 1.8 at K / d of 5 to 25 %

    def linear(self, step_size: float) -> Linear:
        """B A O A of a full kick."""
        h = step_size
        e = math.exp(-self.friction * h)
        s = math.sqrt(1 - e * e)
        drifted = np.array([[1.0, (h / 2) * (1 + e)], [0.0, e]])
        return Linear(drifted, drifted @ np.array([0.0, -h]), np.array([(h / 2) * s, s]))

    def limit(self, curvature: float) -> float:
        """2 / sqrt(lambda)."""
        return 2.0 / math.sqrt(curvature)


class PhaseSpace(NamedTuple):
    """Positions and momenta.

    Attributes:
        params: (C, d).
        momenta: (C, d), before the closing B of the last step.
    """

    params: Tensor
    momenta: Tensor


class Baoab(Underdamped):
    """BAOAB with an estimated gradient.

    Args:
        friction: gamma > 0, per unit of time.
        **rest: as for `Sampler`.
    """

    name: ClassVar[str] = "baoab"
    rule: ClassVar[str] = "underdamped Langevin, splitting B A O A B, one gradient per step"
    reference: ClassVar[str] = "Leimkuhler & Matthews 2013"
    state: ClassVar[type[PhaseSpace]] = PhaseSpace
    theory: ClassVar[type[BaoabTheory]] = BaoabTheory

    def tell(self, state: PhaseSpace, gradient: Tensor, keys: Keys) -> PhaseSpace:
        """Take one BAOAB step; the momenta in a state still lack their closing B."""
        moved = baoab_step(
            state.params,
            state.momenta,
            gradient,
            keys.normal("noise", state.params),
            self.step_at(keys.step),
            self.friction,
            self.temperature,
            first=keys.step == 1,
        )
        return PhaseSpace(*moved)

    def noise_scale(self, step_size: float) -> float:
        """(h / 2) sqrt(T (1 - exp(-2 gamma h))): what O adds to the momenta, carried by the A that follows it."""
        return step_size / 2 * math.sqrt(-self.temperature * math.expm1(-2 * self.friction * step_size))
