"""Checks that refuse a bad posterior before sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.random import SERVER, key
from fedsample.targets.metric import Identity, Metric

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.preparation.curvature import Geometry
    from fedsample.preparation.mode import Survey
    from fedsample.problem import Problem

_FINE = 4  # spacings of the dtype that a posterior standard deviation must span: rounding then adds half a percent
_AWAY = 100.0  # standard deviations from which a warm-up can still reach the bulk
_SIGNS = 32  # probes for standard deviations: relative error about an eighth


def check_separable(survey: Survey, problem: Problem, mode: Tensor) -> None:
    """Refuse separable classes under a flat prior: a hyperplane puts every row into its class.

    Every row adds log(1 + exp(-margin)) to U, so U < log 2 means that all margins are positive; multiplying the
    parameters then lowers U for ever, and exp(-U) has no finite mass.

    Raises:
        ConfigError: the classes are separable.
    """
    if problem.likelihood != "bernoulli" or problem.prior.precision > 0:
        return
    if survey.value_and_gradient(mode)[0] < math.log(2):
        raise ConfigError(
            'model.prior_scale = "flat": some weights put all training rows into their class, and larger ones do so '
            "better for ever: the posterior has no finite mass. Set model.prior_scale to a number"
        )


def check_mode(experiment: Experiment, problem: Problem, geometry: Geometry) -> None:
    """Refuse to start where the search for the mode ended far from it.

    The search compares values of U; where U is huge, rounding can hide every decrease.

    Raises:
        ConfigError: the gradient there is too large for the posterior's bulk.
    """
    if experiment.temperature == 0 or experiment.start.at != "mode":
        return
    metric = geometry.metric
    gradient = geometry.gradient + metric.pull(problem.prior.gradient(metric.mean))
    square = float(gradient.to(torch.float64).square().mean()) / experiment.temperature
    away = math.sqrt(square / max(geometry.curvature, 1e-30))
    if not away < _AWAY:
        advice = ", or set dtype = 'float64'" if experiment.dtype == "float32" else ""
        raise ConfigError(
            f"the mode was not found: where the search for it ended, a coordinate is still some {away:.2g} standard "
            f"deviations away, expected less than {_AWAY:g}. Centre and scale the data{advice}"
        )


def check_spacing(experiment: Experiment, problem: Problem, metric: Metric, curvature: float) -> None:
    """Refuse a posterior so narrow that its deviations come near the spacing of the dtype's numbers at its mode.

    Args:
        experiment: gives dtype and temperature.
        problem: names the parameters.
        metric: holds the mode and, by S, the standard deviations.
        curvature: in the metric's coordinates; with the identity metric it gives the smallest deviation.

    Raises:
        ConfigError: names the parameter with the fewest spacings per deviation.
    """
    if experiment.temperature == 0:
        return
    mean = metric.mean
    if isinstance(metric, Identity):
        widths = torch.full_like(mean, 1 / math.sqrt(max(curvature, 1e-30)))
    else:
        probes = key(experiment.seed, client=SERVER, chain=torch.arange(_SIGNS, device=mean.device), purpose="spacing",
                     device=mean.device).rademacher(len(mean), mean.dtype)  # fmt: skip
        widths = metric.scale(probes).square().mean(0).sqrt()
    widths = widths.to(torch.float64) * math.sqrt(experiment.temperature)
    spacing = torch.finfo(mean.dtype).eps * mean.abs().to(torch.float64)
    worst = int((spacing / widths).argmax())
    if float(spacing[worst]) * _FINE <= float(widths[worst]):
        return
    name, offset = next((name, at) for name, _, at in reversed(problem.layout) if at <= worst)
    advice = "set dtype = 'float64', or " if experiment.dtype == "float32" else ""
    raise ConfigError(
        f"entry {worst - offset} of {name} is {float(mean[worst]):.4g} at the mode, where {experiment.dtype} has "
        f"numbers {float(spacing[worst]):.2g} apart, but its posterior standard deviation is about "
        f"{float(widths[worst]):.2g}, expected at least {_FINE} times that spacing: {advice}centre and scale the data"
    )
