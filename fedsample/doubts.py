"""What speaks against a posterior before the first round, and against its draws after the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.random import SERVER, key
from fedsample.targets.metric import MOST_DENSE, Identity, Metric

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.problem import Problem
    from fedsample.strategies.curvature import Geometry
    from fedsample.strategies.prepare import Survey

MIXED = 1.1  # R-hat beyond which chains tell their starting points apart
_FEW = 50  # effective draws, below which a single chain tells little
_FINE = 4  # spacings of the dtype that a posterior standard deviation must span: rounding then adds half a percent
_AWAY = 100.0  # standard deviations that a warm-up can still bridge
_SIGNS = 32  # probes for standard deviations: to an eighth, relatively
_OVER = 1.05  # times the tolerance: what an automatic step may predict by rounding


def check_separable(survey: Survey, problem: Problem, mode: Tensor) -> None:
    """Refuse two classes that a hyperplane separates, where the prior is flat.

    Every row adds log(1 + exp(-margin)) to U, so U < log 2 means that all margins are positive; multiplying the
    parameters then lowers U for ever, and exp(-U) has no finite mass.

    Raises:
        ConfigError: they are separable.
    """
    if problem.likelihood != "bernoulli" or problem.prior.precision > 0:
        return
    if survey.value_and_gradient(mode)[0] < math.log(2):
        raise ConfigError(
            'model.prior_scale = "flat": some weights put all training rows into their class, and larger ones do so '
            "better for ever: the posterior has no finite mass. Set model.prior_scale to a number"
        )


def check_mode(experiment: Experiment, problem: Problem, geometry: Geometry) -> None:
    """Refuse to start from where the search for the mode has ended far from it.

    A search compares values of U, and beside a huge one no step may seem to lower it.

    Raises:
        ConfigError: the gradient there is not one of the posterior's bulk.
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
    """Refuse a posterior that is too narrow, beside where it lies, for the numbers of the dtype.

    Args:
        experiment: gives dtype and temperature. problem: names the parameters. metric: mode, and with S the standard
            deviations; curvature: in its coordinates, by which the identity metric tells the smallest one.

    Raises:
        ConfigError: with the parameter that is worst off.
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


def doubts(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    """Why the draws of a run are not to be trusted yet, each with what to do; empty where nothing says so.

    Args:
        experiment: what was run. summary: of it, see `fedsample.watch.summarise`.
    """
    if experiment.temperature == 0:
        return []
    return [*_of_mixing(experiment, summary), *_of_bias(experiment, summary)]


def _of_mixing(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    rhat, ess, relaxation = (summary[name] for name in ("rhat_max", "ess_bulk_min", "relaxation_rounds"))
    kept = experiment.rounds - experiment.warmup
    slow = "; the slowest direction forgets where it was only in "
    slow = f"{slow}{relaxation:,.0f} rounds, and {kept:,} were kept" if relaxation and relaxation > kept else ""
    denser = experiment.metric.name != "hessian" and summary.get("params", 0) <= MOST_DENSE
    metric = ", set metric.name = 'hessian'" if denser else ""
    advice = "raise rounds and warmup" + (f"{metric}, or scale the data" if slow else "")
    if rhat is not None and math.isfinite(rhat) and rhat > MIXED:
        return [f"the chains have not mixed: worst R-hat {rhat:.2f}, expected at most {MIXED}{slow}: {advice}"]
    if summary["draws"] < 4:
        return [f"{summary['draws']} draws a chain tell nothing of their mixing, expected at least 4: {advice}"]
    if ess is None or not math.isfinite(ess) or (summary["chains"] > 1 and not _finite(rhat)):
        finer = ", or set dtype = 'float64'" if experiment.dtype == "float32" else ""
        return [f"the chains did not move as far as {experiment.dtype} tells: raise step_size, or rounds{finer}"]
    if summary["chains"] == 1 and ess < _FEW:
        return [f"the smallest bulk ESS of the one chain is {ess:.0f}, expected at least {_FEW}{slow}: {advice}"]
    return []


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _of_bias(experiment: Experiment, summary: Mapping[str, Any]) -> list[str]:
    from fedsample.strategies.schedule import Constant, schedule_of

    bias, step, limit = (summary[name] for name in ("predicted_variance_bias", "step_size", "largest_stable_step"))
    schedule = schedule_of(experiment, step)
    constant = isinstance(schedule, Constant)
    if not constant:  # the prediction is of the first step: what counts is the largest while draws are kept
        step, bias = schedule.largest(experiment.warmup + 1, experiment.rounds), None
    foreseen = constant and experiment.batch_size is None and experiment.fleet.dropout == 0
    if step > limit or (foreseen and bias is None):
        return [
            f"at step {step:.4g} no stationary variance is predicted (the largest stable step is {limit:.4g}): lower "
            "step_size, or set it to 'auto'"
        ]
    if bias is not None and bias > experiment.bias_tolerance * _OVER:
        memory = experiment.uplink.name in ("diana", "ef21", "dense")
        advice = "lower step_size" + ("" if memory else ", or take an uplink with a memory, such as diana")
        return [
            f"the step predicts a variance bias of {bias:+.2%}, expected at most bias_tolerance = "
            f"{experiment.bias_tolerance:.2%}: {advice}"
        ]
    return []
