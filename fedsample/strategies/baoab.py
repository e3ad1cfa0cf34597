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
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsample.random import SERVER, key
from fedsample.strategies.base import Sampler
from fedsample.strategies.state import State


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


class Baoab(Sampler):
    """BAOAB with an estimated gradient.

    Args:
        friction: gamma > 0, per unit of time.
        **rest: as for `Sampler`.
    """

    name: ClassVar[str] = "baoab"
    rule: ClassVar[str] = "underdamped Langevin, splitting B A O A B, one gradient per step"
    reference: ClassVar[str] = "Leimkuhler & Matthews 2013"

    def __init__(self, *, friction: float, **rest: Any) -> None:
        super().__init__(**rest)
        self.friction = friction

    def start(self, params: Tensor) -> dict[str, Tensor]:
        """Draw momenta from their equilibrium N(0, T)."""
        chains, d = params.shape
        keys = key(self.seed, None, SERVER, torch.arange(chains, device=params.device), "momenta", params.device)
        return {"momenta": keys.normal(d, params.dtype) * math.sqrt(self.temperature)}

    def step(self, state: State, gradient: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Take one BAOAB step; the momenta in a state still lack their closing B."""
        params, momenta = baoab_step(
            state.params,
            state.kernel["momenta"],
            gradient,
            noise,
            self.step_at(state.round + 1),
            self.friction,
            self.temperature,
            first=state.round == 0,
        )
        return params, {"momenta": momenta}

    def noise_scale(self, step_size: float) -> float:
        """(h / 2) sqrt(T (1 - exp(-2 gamma h))): what O adds to the momenta, carried by the A that follows it."""
        return step_size / 2 * math.sqrt(-self.temperature * math.expm1(-2 * self.friction * step_size))
