"""The step: its predicted bias, its largest stable value, and the choice of `auto`.

The stationary variance of a compressed chain is off for two reasons: discretisation, worst in the stiffest direction,
and heating by the estimator's noise, felt everywhere. Where the Hessian at the mode is known, both follow from all
d x d moments, and the predicted bias is the larger of two relative excesses of a variance over the target's: that along
the stiffest eigenvector of the Hessian, and the mean over the metric's coordinates. Where it is not, the predicted bias
is that of exact gradients at the largest curvature seen plus the heating of a coordinate of mean curvature and mixing.
`auto` is the largest step at which it stays under the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsample.compression import Compressor, Identity
from fedsample.estimators import DenseDownlink, Direct, Downlink, Ef21, Ef21P, Marina, Uplink
from fedsample.strategies import theory_of
from fedsample.theory.base import StepTheory
from fedsample.theory.covariance import UPLINKS, Array, Covariance, Spread, measured
from fedsample.theory.moments import Coordinate

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.preparation.curvature import Geometry, GeometryProbe

MOST_MOMENTS = 1000  # largest number of parameters for which all d x d moments are solved
_EVALUATIONS = 16
_CLOSE = 1e-3  # how close to the tolerance an automatic step's predicted bias comes, relatively


@dataclass(frozen=True)
class Forecast:
    """Predictions for a step; variances are relative to the target's, at stationarity.

    Attributes:
        step_size: h.
        bias: the larger of `stiff_bias` and `mean_bias`; infinite where unstable.
        stiff_bias: excess variance along the stiffest direction.
        mean_bias: mean excess variance over the metric's coordinates.
        mean_heating: mean over coordinates of the variance that the uplink adds; without d x d moments, that of a
            coordinate of mean mixing.
        worst_heating: its largest; without d x d moments, that of a coordinate at the 0.9 quantile of mixing.
        limit: largest stable step.
        relaxation: rounds in which the slowest direction forgets all but 1 / e of its start.
    """

    step_size: float
    bias: float
    stiff_bias: float
    mean_bias: float
    mean_heating: float
    worst_heating: float
    limit: float
    relaxation: float


@dataclass(frozen=True)
class StepRule:
    """Predictions for one run.

    Attributes:
        typical: a coordinate of mean curvature and mean mixing.
        stiff: the direction of largest curvature, without the estimator's noise.
        worst: a coordinate of largest curvature and much mixing together.
        slow: the direction of smallest curvature, without the estimator's noise.
        covariance: second moments of the chain, where the Hessian is known.
        spread: D -> sum_i diag(H_i D H_i), from which the estimator's noise follows; where the Hessian is known.
        sure: inclusions of both links that hold for every vector, for the limit; None: those of the coordinates.
    """

    typical: Coordinate
    stiff: Coordinate
    worst: Coordinate
    slow: Coordinate
    covariance: Covariance | None = None
    spread: Spread | None = None
    sure: tuple[float, float] | None = None

    def forecast(self, step_size: float) -> Forecast:
        """Predict bias, heating, stability and relaxation at this step."""
        limit, relaxation = self._limit, self.slow.relaxation(step_size)
        if self.covariance is None or self.spread is None:
            stiff = self.stiff.bias(step_size) + _above(self.typical, _calm(self.typical), step_size)
            mean = self.typical.bias(step_size)
            heating = [_above(each, each.exact(), step_size) for each in (self.typical, self._hot)]
        else:
            stiff, mean, *heating = self._moments(step_size, self.covariance, self.spread)
        return Forecast(step_size, max(stiff, mean), stiff, mean, heating[0], heating[1], limit, relaxation)

    def _moments(self, step_size: float, chain: Covariance, spread: Spread) -> tuple[float, float, float, float]:
        """Return the stiffest direction's bias, mean bias, mean heating and largest heating."""
        if not chain.stable(step_size):
            return (math.inf,) * 4
        added, along = chain.heating(step_size, spread)
        calm, heat = chain.calm(step_size), added / chain.target
        mean = float((chain.coordinates(calm) / chain.target - 1 + heat).mean())
        stiff = float((calm[-1] + along[-1]) * chain.curvatures[-1] - 1)
        return stiff, mean, float(heat.mean()), float(heat.max())

    def choose(self, tolerance: float, temperature: float) -> float:
        """Choose the automatic step; at temperature 0 there is no bias, and it is half the stability limit."""
        cautious = self._limit / 2
        if temperature == 0:
            return cautious
        return _largest(lambda h: self.forecast(h).bias, tolerance, cautious)

    @cached_property
    def _limit(self) -> float:
        each: tuple[Coordinate, ...] = (self.worst, self.stiff, self.typical)
        if self.sure is not None:
            each = tuple(replace(one, inclusion=self.sure[0], downlink=self.sure[1]) for one in each)
        return min(one.limit() for one in each)

    @property
    def _hot(self) -> Coordinate:
        """The typical coordinate, with the mixing of the worst."""
        return replace(self.typical, mixing=self.worst.mixing)


def _above(hot: Coordinate, calm: Coordinate, step_size: float) -> float:
    """The bias of one coordinate less that of another; infinite where the first is unstable."""
    bias = hot.bias(step_size)
    return bias - calm.bias(step_size) if math.isfinite(bias) else math.inf


def _largest(bias: Callable[[float], float], tolerance: float, high: float) -> float:
    """Find the largest step up to `high` with a bias under the tolerance; the bias grows as a power of the step."""
    found = bias(high)
    if found <= tolerance:
        return high
    low, least = high * 1e-8, math.nan  # the bias at `low` is not computed yet
    for _ in range(4 * _EVALUATIONS):
        if least >= tolerance * (1 - _CLOSE) or high <= low * (1 + 1e-9):
            break
        share = 0.5
        if math.isfinite(found) and least > 0:  # both ends known: interpolate linearly between their logarithms
            share = math.log(tolerance / least) / math.log(found / least)
        elif math.isfinite(found):  # the bias is at least of first order
            share = 1 - math.log(2 * found / tolerance) / math.log(high / low)
        middle = low * (high / low) ** min(max(share - 1e-4, 0.02), 0.98)
        value = bias(middle)
        if value <= tolerance:
            low, least = middle, value
        else:
            high, found = middle, value
    return low


def _calm(coordinate: Coordinate) -> Coordinate:
    """The same coordinate without the estimator's noise; under ef21, whose memory lags, it is unchanged."""
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
    """Build the rule from the moments of single coordinates; `participation` includes lost replies."""
    d, mixing, sampler = len(geometry.mixing), geometry.mixing.numpy(), theory_of(experiment.sampler)
    up, down = uplink.compressor, downlink.compressor if isinstance(downlink, Ef21P) else Identity()
    lagging = isinstance(uplink, Ef21)  # a gradient's lag matters as its curvature does, the root of mixing
    anchored = isinstance(uplink, Direct) and uplink.anchored
    typical = Coordinate(
        sampler=sampler,
        uplink=experiment.uplink.name,
        curvature=max(geometry.mean_curvature, 1e-12 * geometry.curvature),
        mixing=float(geometry.mixing.mean()),
        share=geometry.share,
        clients=clients,
        downlink=_followed(1 / down.typical(d) - 1, down.inclusion(d), sampler),
        inclusion=_weighted(up, sampler, mixing, np.sqrt(mixing)) if lagging else up.typical(d),
        participation=participation,
        sync=uplink.probability(d) if isinstance(uplink, Marina) else 0.0,
        force=0.0 if anchored else float(geometry.force.mean()) / (experiment.temperature or 1.0),
    )
    prior = max(0.0, typical.curvature - clients * geometry.share)
    steep = max(0.0, geometry.curvature - prior) / clients
    stiff = _calm(replace(typical, curvature=geometry.curvature, share=steep))
    if lagging:
        alike = _followed(1 / up.typical(d) - 1, up.inclusion(d), sampler)  # errors along one direction move together
        stiff = replace(stiff, inclusion=min(alike, _weighted(up, sampler, mixing, mixing)))
    worst = replace(
        typical, curvature=geometry.curvature, share=steep, mixing=float(torch.quantile(geometry.mixing, 0.9))
    )
    flattest = min(max(geometry.flattest, 1e-12 * geometry.curvature), geometry.curvature)
    slow = replace(typical, uplink="dense", participation=1.0, downlink=1.0, curvature=flattest, share=0.0)
    return StepRule(typical, stiff, worst, slow, sure=(up.inclusion(d), down.alpha(d)))


def _weighted(compressor: Compressor, sampler: StepTheory, mixing: Array, weights: Array) -> float:
    """The K / d that represents ef21: that of the mean lag over coordinates, weighted, since their lags differ.

    A coordinate that hardly moves waits very long for a threshold that others set, and has then hardly moved. Its lag
    is capped at that of random masks; otherwise one constant column would dominate the mean.
    """
    inclusion = compressor.inclusion(len(mixing))
    lags = np.minimum(compressor.lags(mixing), 1 / inclusion - 1)
    lag = float(np.average(lags, weights=weights if weights.any() else None))
    return _followed(lag, inclusion, sampler)


def _followed(lag: float, inclusion: float, sampler: StepTheory) -> float:
    """The K / d of random masks with this lag of the memory, which is larger where momentum persists."""
    lag = max(lag, min(sampler.persistence * lag, 1 / inclusion - 1))
    return 1 / (1 + lag)


def shared_masks(uplink: Uplink, d: int) -> float:
    """`GeometryProbe.shared`: 1 / omega, half that for diana, if clients partition the coordinates among them; else 0.

    With masks m_i of which one at a time is 1, the noise sum_i (n m_i - 1) a_i has variance n sum_i a_i^2 -
    (sum_i a_i)^2. Under diana a_i has an age of client i's own. No two are renewed at once, so the difference of their
    ages has the law of an age, and E a_i a_l is half of what it is at equal ages.
    """
    compressor = uplink.compressor
    if compressor.independence != "partition" or compressor.kind != "unbiased" or compressor.omega(d) == 0:
        return 0.0
    return (0.5 if uplink.name == "diana" else 1.0) / compressor.omega(d)


def solvable(experiment: Experiment, downlink: Downlink, participation: float, d: int) -> bool:
    """Whether all d x d moments can be solved: few parameters, full participation, memories on the uplink only."""
    return (
        d <= MOST_MOMENTS
        and experiment.uplink.name in UPLINKS
        and isinstance(downlink, DenseDownlink)
        and participation == 1.0
        and experiment.temperature > 0
    )


def concentrated(rule: StepRule, concentration: Array, mixing: Array) -> StepRule:
    """The rule for diana, whose memories lag with the curvature of the noisy clients (`GeometryProbe`)."""
    mean = float(np.average(concentration, weights=mixing if mixing.any() else None))
    return replace(
        rule, typical=replace(rule.typical, concentration=mean), worst=replace(rule.worst, concentration=mean)
    )


def with_moments(
    rule: StepRule, uplink: Uplink, terrain: GeometryProbe, geometry: Geometry, step_size: float, temperature: float
) -> StepRule:
    """Add all d x d moments to the rule, probed with the covariance that matters at `step_size`."""
    if terrain.hessian is None or terrain.clients_hessian is None:
        raise ValueError("the moments of all coordinates need the Hessian at the mode")
    typical, concentration = rule.typical, np.ones(1)
    if typical.uplink == "diana":
        concentration = terrain.concentration().cpu().numpy()
        rule = concentrated(rule, concentration, geometry.mixing.numpy())
    covariance = Covariance(
        hessian=terrain.hessian.cpu().numpy(),
        clients_hessian=terrain.clients_hessian.cpu().numpy(),
        clients=typical.clients,
        sampler=typical.sampler,
        uplink=typical.uplink,
        inclusion=typical.inclusion,
        sync=typical.sync,
        force=geometry.force.numpy() / temperature if typical.force > 0 else 0.0,
        noise=None if typical.uplink == "dense" else uplink.compressor.noise,
        concentration=concentration,
    )
    if typical.uplink == "dense" or covariance.isotropic:
        probed, squares = covariance.identity, geometry.mixing
    else:
        root = covariance.root_of(covariance.lagging(step_size))
        probed = root @ root.T
        squares = terrain.spread(torch.from_numpy(root).to(terrain.points))[0].cpu()
    full, saturation = None, 1.0
    if typical.uplink in ("marina", "diana"):
        root = covariance.root_of(1 / covariance.curvatures)
        alone = geometry.mixing / covariance.curvatures[-1] if covariance.isotropic else None
        full, saturation = 2 * root @ root.T, terrain.saturation(alone, torch.from_numpy(root).to(terrain.points))
    spread = measured(squares.numpy(), probed, covariance.clients_hessian, full, saturation)
    return replace(rule, covariance=covariance, spread=spread)
