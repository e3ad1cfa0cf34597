"""The sampler interface: its own variables besides the positions, and one step of its equation.

A sampler knows neither clients nor messages. `strategies.driver.Driver` asks the clients for gradients and gives them
to `step`; all randomness is passed in, or keyed by the experiment's seed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from fedsample.strategies.schedule import Constant, Schedule
from fedsample.strategies.state import State


class Sampler(ABC):
    """Advance C chains by one step, given gradients of U and standard normals.

    Args:
        step_size: h > 0, or a schedule.
        temperature: T >= 0.
        seed: the experiment's seed.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    reference: ClassVar[str]

    def __init__(self, *, step_size: float | Schedule, temperature: float, seed: int) -> None:
        self.schedule = step_size if isinstance(step_size, Schedule) else Constant(step_size)
        self.temperature, self.seed = temperature, seed

    @property
    def step_size(self) -> float:
        """Step size h of round 1."""
        return self.schedule.initial

    def step_at(self, round: int) -> float:
        """Step size h of a round 1, 2, ..."""
        return self.schedule.at(round)

    @abstractmethod
    def start(self, params: Tensor) -> dict[str, Tensor]:
        """Create the sampler's own variables before round 1, at positions (C, d) in the metric's coordinates."""

    @abstractmethod
    def step(self, state: State, gradient: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the positions (C, d) and the sampler's own variables after one round.

        Args:
            state: the state before the round.
            gradient: (C, d) gradient of U at the state's positions.
            noise: (C, d) standard normals.
        """

    @abstractmethod
    def noise_scale(self, step_size: float) -> float:
        """Standard deviation of the noise that one step adds to a coordinate of the positions."""
