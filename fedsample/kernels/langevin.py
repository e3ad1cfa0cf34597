r"""One Euler-Maruyama step of overdamped Langevin dynamics, dX = -grad U dt + sqrt(2 T) dB.

    x <- x - h g + sqrt(2 h T) xi

On N(mu, 1 / lambda) with exact gradients the stationary variance is T / (lambda (1 - h lambda / 2)); the step is
stable for h lambda < 2. T = 0 is gradient descent.
"""

from __future__ import annotations

import math

from torch import Tensor


def langevin_step(params: Tensor, gradient: Tensor, noise: Tensor, step_size: float, temperature: float) -> Tensor:
    """The next position.

    Args:
        params: (..., d). gradient: grad U(params), same shape. noise: standard normal, same shape.
        step_size: h > 0. temperature: T >= 0.
    """
    return params - step_size * gradient + math.sqrt(2 * step_size * temperature) * noise
