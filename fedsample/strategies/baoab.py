"""Underdamped Langevin dynamics over a federation, split as BAOAB."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsample.kernels import baoab_step
from fedsample.random import SERVER, key
from fedsample.strategies.base import Sampler
from fedsample.strategies.state import State


class Baoab(Sampler):
    """BAOAB with an estimated gradient; see `kernels.baoab`.

    Args:
        friction: gamma > 0, in units of one over time. **rest: as `Sampler`'s.
    """

    name: ClassVar[str] = "baoab"
    rule: ClassVar[str] = "underdamped Langevin, splitting B A O A B, one gradient a step"
    reference: ClassVar[str] = "Leimkuhler & Matthews 2013"

    def __init__(self, *args: Any, friction: float, **rest: Any) -> None:
        super().__init__(*args, **rest)
        self.friction = friction

    def kernel_start(self, params: Tensor) -> dict[str, Tensor]:
        """Momenta from their equilibrium N(0, T)."""
        chains, d = params.shape
        keys = key(self.seed, None, SERVER, torch.arange(chains, device=params.device), "momenta", params.device)
        return {"momenta": keys.normal(d, params.dtype) * math.sqrt(self.temperature)}

    def kernel_step(self, state: State, gradient: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One BAOAB step; the momenta of a state still lack their closing half kick."""
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
