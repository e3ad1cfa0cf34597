r"""BAOAB: a splitting of underdamped Langevin dynamics with one gradient a step.

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

from torch import Tensor


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
    """From a gradient at `params` to the next position: (B of the step before,) B A O A.

    Args:
        params: (..., d) position. momenta: same shape, before the last B of the step before.
        gradient: grad U(params), same shape. noise: standard normal, same shape.
        step_size: h > 0. friction: gamma > 0. temperature: T >= 0.
        first: whether there is no step before, so that the momenta are whole.

    Returns:
        The next position, and the momenta before their closing B.
    """
    decay = math.exp(-friction * step_size)
    momenta = momenta - (step_size / 2 if first else step_size) * gradient
    params = params + (step_size / 2) * momenta
    momenta = decay * momenta + math.sqrt(temperature * (1 - decay * decay)) * noise
    return params + (step_size / 2) * momenta, momenta
