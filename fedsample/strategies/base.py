"""The sampler interface: where it wants the gradient of U, and what it makes of that.

A sampler knows neither clients nor messages nor Flower. `strategies.driver.Driver` asks the clients on its behalf; all
randomness comes from keys, so that the same state, gradient and keys give the same next state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from fedsample.strategies.noise import Keys
from fedsample.strategies.schedule import Constant, Schedule
from fedsample.theory.base import StepTheory


class Sampler(ABC):
    """Advance C chains by steps of an equation, each given one gradient of U.

    A state is a NamedTuple of tensors, the positions (C, d) first; it is stored and restored by its fields.

    Args:
        step_size: h > 0, or a schedule.
        temperature: T >= 0.
        seed: the experiment's seed.
    """

    name: ClassVar[str]
    rule: ClassVar[str]
    reference: ClassVar[str]
    theory: ClassVar[type[StepTheory]]  # what it does on a quadratic, made from its own settings
    state: ClassVar[type[Any]]  # made from its fields
    options: ClassVar[tuple[str, ...]] = ()  # settings of its own, by their names in [sampler]

    def __init__(self, *, step_size: float | Schedule, temperature: float, seed: int) -> None:
        self.schedule = step_size if isinstance(step_size, Schedule) else Constant(step_size)
        self.temperature, self.seed = temperature, seed

    @property
    def step_size(self) -> float:
        """Step size h of step 1."""
        return self.schedule.initial

    def step_at(self, step: int) -> float:
        """Step size h of step 1, 2, ..."""
        return self.schedule.at(step)

    @abstractmethod
    def begin(self, start: Tensor, keys: Keys) -> Any:
        """Create the state before step 1, at positions (C, d) in the metric's coordinates."""

    def ask(self, state: Any) -> Tensor:
        """Points (C, d) at which the next step needs the gradient; by default the positions."""
        positions: Tensor = state[0]
        return positions

    @abstractmethod
    def tell(self, state: Any, gradient: Tensor, keys: Keys) -> Any:
        """Take a step, and return the state after it.

        Args:
            state: the state before it.
            gradient: (C, d) of U at the points that were asked for; it may be an estimate.
            keys: randomness of this step.
        """

    def draw(self, state: Any) -> Tensor:
        """The chains' draws (C, d) in the metric's coordinates; by default the positions, the state's first field.

        The positions are what is checked for divergence.
        """
        positions: Tensor = state[0]
        return positions

    @abstractmethod
    def noise_scale(self, step_size: float) -> float:
        """Standard deviation of the noise that one step adds to a coordinate of the positions."""
