"""What a sampler says of itself on a quadratic, from which its step, its bias and its stability are predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Linear(NamedTuple):
    """One step on a quadratic: (u, v) <- moved (u, v) + kick g + noise xi, with the gradient g at u.

    Attributes:
        moved: (2, 2).
        kick: (2,).
        noise: (2,), at temperature 1.
    """

    moved: Array
    kick: Array
    noise: Array


class StepTheory(ABC):
    """A sampler whose step is linear on a quadratic.

    Attributes:
        momenta: whether it has momenta v beside the positions u.
        persistence: lags of a `topk` memory over those under Langevin dynamics; momentum makes a direction persist.
    """

    momenta: ClassVar[bool] = False
    persistence: ClassVar[float] = 1.0

    @abstractmethod
    def linear(self, step_size: float) -> Linear:
        """Write a step of size h > 0 as a linear map; entries of v are 0 without momenta."""

    @abstractmethod
    def limit(self, curvature: float) -> float:
        """The largest stable step with exact gradients on curvature lambda > 0."""
