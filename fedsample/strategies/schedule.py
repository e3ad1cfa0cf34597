"""Step-size schedules: constant, polynomial decay, cyclical.

    polynomial  h_k = h (1 + k / offset)^(-power)                     Welling & Teh 2011; its bias vanishes
    cyclical    h_k = (h / 2) (1 + cos(pi (k mod period) / period))   Zhang et al., ICLR 2020 (arXiv 1902.03932)

with k = 0 in round 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsample.config import ScheduleConfig


def schedule_of(section: float | str | ScheduleConfig, initial: float) -> Schedule:
    """The steps of a run whose setting is `step_size = section` and which begins with `initial`."""
    from fedsample.config import ScheduleConfig  # needs pydantic, which a bare machine with torch lacks

    if isinstance(section, ScheduleConfig) and section.schedule == "polynomial":
        return Polynomial(initial, section.power, section.offset)
    if isinstance(section, ScheduleConfig) and section.schedule == "cyclical":
        return Cyclical(initial, section.period)
    return Constant(initial)


@dataclass(frozen=True)
class Schedule(ABC):
    """A step for every round.

    Attributes:
        initial: h > 0, the step of round 1.
    """

    initial: float

    @abstractmethod
    def at(self, round: int) -> float:
        """The step of a round, 1, 2, ..."""

    def largest(self, first: int, last: int) -> float:
        """The largest step of the rounds from `first` to `last`; steps fall, unless a schedule says otherwise."""
        return self.at(first)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same step in every round."""

    def at(self, round: int) -> float:
        """The step."""
        return self.initial


@dataclass(frozen=True)
class Polynomial(Schedule):
    """Decay with a power of the round.

    Attributes:
        power: > 0.
        offset: rounds in which the step falls to 2^-power of itself.
    """

    power: float = 0.55
    offset: float = 1000.0

    def at(self, round: int) -> float:
        """The step of a round."""
        return float(self.initial * (1.0 + (round - 1) / self.offset) ** -self.power)


@dataclass(frozen=True)
class Cyclical(Schedule):
    """Cosine from the initial step to near zero, again and again.

    Attributes:
        period: rounds of a cycle.
    """

    period: int = 1000

    def at(self, round: int) -> float:
        """The step of a round; the last of a cycle is small but not zero."""
        return 0.5 * self.initial * (1.0 + math.cos(math.pi * ((round - 1) % self.period) / self.period))

    def largest(self, first: int, last: int) -> float:
        """That of a cycle's first round, if one is among them."""
        begins = first + (1 - first) % self.period
        return self.initial if begins <= last else self.at(first)
