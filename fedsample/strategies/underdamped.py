"""What samplers of underdamped Langevin dynamics share: a friction, and momenta that begin in equilibrium."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

from fedsample.strategies.base import Sampler
from fedsample.strategies.noise import Keys


class Underdamped(Sampler):
    """A sampler whose state is (positions, momenta) at unit mass, under names of its own.

    Args:
        friction: per unit of time, > 0.
        **rest: as for `Sampler`.
    """

    options: ClassVar[tuple[str, ...]] = ("friction",)

    def __init__(self, *, friction: float, **rest: Any) -> None:
        super().__init__(**rest)
        self.friction = friction

    def begin(self, start: Tensor, keys: Keys) -> Any:
        """Draw momenta from their equilibrium N(0, T)."""
        return self.state(start, keys.normal("momenta", start) * math.sqrt(self.temperature))
