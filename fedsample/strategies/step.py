"""The step: what bias it leaves, how large it may be, and what `auto` chooses.

The stationary variance of a compressed chain is off for two reasons: discretisation, worst in the stiffest direction,
and heating by the estimator's noise, felt in every coordinate. `auto` is the largest step at which the first at the
largest curvature and the second at the mean coordinate together stay under the tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fedsample.diagnostics.moments import Coordinate
from fedsample.estimators import Direct, Downlink, Ef21P, Marina, Uplink

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.strategies.prepare import Geometry


@dataclass(frozen=True)
class StepRule:
    """Predictions for one run.

    Attributes:
        typical: a coordinate of mean curvature and mean mixing. stiff: the direction of largest curvature, without the
            estimator's noise. worst: largest curvature and largest mixing together.
    """

    typical: Coordinate
    stiff: Coordinate
    worst: Coordinate

    def bias(self, step_size: float) -> float:
        """Predicted relative excess of the stationary variance; infinite where the chain is unstable."""
        return self.stiff.bias(step_size) + self.typical.bias(step_size) - _calm(self.typical).bias(step_size)

    def worst_heating(self, step_size: float) -> float:
        """The heating of the coordinate that the clients' curvature mixes most."""
        hot = replace(self.typical, mixing=self.worst.mixing)
        return hot.bias(step_size) - _calm(hot).bias(step_size)

    def limit(self) -> float:
        """The largest stable step."""
        return min(self.worst.limit(), self.stiff.limit(), self.typical.limit())

    def choose(self, tolerance: float, temperature: float) -> float:
        """The automatic step; at temperature 0 nothing can be biased, and it is half the stability limit."""
        cautious = self.limit() / 2
        if temperature == 0:
            return cautious
        low, high = cautious * 1e-6, cautious
        if self.bias(high) <= tolerance:
            return high
        for _ in range(50):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.bias(middle) <= tolerance else (low, middle)
        return low


def _calm(coordinate: Coordinate) -> Coordinate:
    """The same without the estimator's noise; what lags behind the iterate still lags."""
    if coordinate.uplink == "ef21":
        return coordinate
    return replace(coordinate, uplink="dense", participation=1.0)


def step_rule(
    experiment: Experiment,
    uplink: Uplink,
    downlink: Downlink,
    geometry: Geometry,
    participation: float,
    clients: int,
) -> StepRule:
    """What the moments say of this experiment on this target; `participation` includes lost replies."""
    d = len(geometry.mixing)
    typical = Coordinate(
        sampler=experiment.sampler.name,
        uplink=experiment.uplink.name,
        curvature=max(geometry.mean_curvature, 1e-12 * geometry.curvature),
        mixing=float(geometry.mixing.mean()),
        share=geometry.share,
        clients=clients,
        downlink=downlink.compressor.alpha(d) if isinstance(downlink, Ef21P) else 1.0,
        friction=experiment.sampler.friction,
        inclusion=uplink.compressor.inclusion(d),
        participation=participation,
        sync=uplink.probability(d) if isinstance(uplink, Marina) else 0.0,
        force=0.0 if isinstance(uplink, Direct) and uplink.anchored else geometry.force,
    )
    prior = max(0.0, typical.curvature - clients * geometry.share)
    steep = max(0.0, geometry.curvature - prior) / clients
    stiff = _calm(replace(typical, curvature=geometry.curvature, share=steep))
    worst = replace(
        typical, curvature=geometry.curvature, share=steep, mixing=float(torch.quantile(geometry.mixing, 0.9))
    )
    return StepRule(typical, stiff, worst)
