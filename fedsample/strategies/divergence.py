"""When a chain has diverged, and what to say of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stability:
    """What is known about the step, for the message when a chain diverges.

    Attributes:
        curvature: largest curvature seen, in the metric's coordinates. limit: largest stable step at that curvature.
        radius: a distance from the mode that no chain reaches unless it diverges.
    """

    curvature: float
    limit: float
    radius: float
