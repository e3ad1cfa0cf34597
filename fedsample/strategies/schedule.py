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
    """Build the schedule that the setting `step_size = section` asks for, with step `initial` in round 1."""
    from fedsample.config import ScheduleConfig  # needs pydantic, which a machine with torch alone lacks

    if isinstance(section, ScheduleConfig) and section.schedule == "polynomial":
        return Polynomial(initial, section.power, section.offset)
    if isinstance(section, ScheduleConfig) and section.schedule == "cyclical":
        return Cyclical(initial, section.period)
    return Constant(initial)


@dataclass(frozen=True)
class Schedule(ABC):
    """Step size as a function of the round.

    Attributes:
        initial: h > 0, the step of round 1.
    """

    initial: float

    @abstractmethod
    def at(self, round: int) -> float:
        """Step size of a round 1, 2, ..."""

    def largest(self, first: int, last: int) -> float:
        """Largest step size in rounds `first` to `last`: the first one, for schedules that never rise."""
        return self.at(first)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same step in every round."""

    def at(self, round: int) -> float:
        """Step size of any round."""
        return self.initial


@dataclass(frozen=True)
class Polynomial(Schedule):
    """Polynomial decay.

    Attributes:
        power: exponent of the decay, > 0.
        offset: rounds after which the step is 2^-power of the initial one.
    """

    power: float = 0.55
    offset: float = 1000.0

    def at(self, round: int) -> float:
        """Step size of a round 1, 2, ..."""
        return float(self.initial * (1.0 + (round - 1) / self.offset) ** -self.power)


@dataclass(frozen=True)
class Cyclical(Schedule):
    """Cosine decay from the initial step to near zero, restarted every `period` rounds.

    Attributes:
        period: rounds per cycle.
    """

    period: int = 1000

    def at(self, round: int) -> float:
        """Step size of a round 1, 2, ...; small but not zero in the last round of a cycle."""
        return 0.5 * self.initial * (1.0 + math.cos(math.pi * ((round - 1) % self.period) / self.period))

    def largest(self, first: int, last: int) -> float:
        """The initial step if a cycle begins in these rounds, else the step of round `first`."""
        begins = first + (1 - first) % self.period
        return self.initial if begins <= last else self.at(first)
