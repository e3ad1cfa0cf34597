"""Langevin dynamics over a federation: Langevin-MARINA, QLSD with memory, and gradient descent at temperature 0."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedsample.kernels import langevin_step
from fedsample.strategies.base import Sampler
from fedsample.strategies.state import State


class Langevin(Sampler):
    """The unadjusted Langevin algorithm with an estimated gradient; see `kernels.langevin`."""

    name: ClassVar[str] = "langevin"
    rule: ClassVar[str] = "x <- x - h g + sqrt(2 h T) xi"
    reference: ClassVar[str] = "Roberts & Tweedie 1996; Sun, Salim & Richtarik 2022"

    def kernel_start(self, params: Tensor) -> dict[str, Tensor]:
        """No variables beside the positions."""
        return {}

    def kernel_step(self, state: State, gradient: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """One Euler-Maruyama step."""
        return langevin_step(state.params, gradient, noise, self.step_at(state.round + 1), self.temperature), {}
