"""From a problem and a fleet to a chain's starting point: mode, metric, geometry, step, over-dispersed starts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.estimators import Links
from fedsample.preparation.checks import check_mode, check_separable, check_spacing
from fedsample.preparation.curvature import Geometry, explore, survey_geometry
from fedsample.preparation.mode import Survey, build_metric, find_mode, polish
from fedsample.preparation.prepared import Prepared
from fedsample.preparation.start import _start
from fedsample.preparation.step_rule import (
    MOST_MOMENTS,
    StepRule,
    concentrated,
    shared_masks,
    solvable,
    step_rule,
    with_moments,
)
from fedsample.protocol.exchange import Fleet
from fedsample.random import SERVER, key
from fedsample.targets import Clients
from fedsample.targets.metric import Dense, Identity, Metric

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.monitor.progress import Progress
    from fedsample.problem import Problem

_WORTH = 0.25  # largest share of the chains' planned uploads that the Hessian at the mode may cost


def prepare(experiment: Experiment, problem: Problem, links: Links, fleet: Fleet, progress: Progress) -> Prepared:
    """Find the mode, fix the metric, measure the geometry, choose the step, place the chains.

    Raises:
        DivergenceError: if U or its gradient is not finite where the search starts.
        ConfigError: if a check of `fedsample.preparation.checks` fails.
    """
    clients = problem.clients
    survey = Survey(fleet, problem.prior, clients.dtype, clients.device)
    metric, hessian = _metric(experiment, problem, survey, progress)
    survey.send(metric)
    uplink, downlink = links.uplink, links.downlink
    participation = _participation(experiment, fleet.n)
    with progress.stage("measuring the curvature"):
        whole = solvable(experiment, downlink, participation, clients.d)
        if hessian is not None:
            hessian = metric.scale(metric.scale(hessian).T)
        elif whole and _pays(experiment, links, clients):
            hessian = survey.ask(torch.zeros_like(metric.mean).unsqueeze(0), "hessian")["hessian"][0]
        shared = shared_masks(uplink, clients.d)
        terrain = explore(survey, metric, experiment.seed, experiment.temperature, hessian, shared)
        geometry = survey_geometry(terrain)
        check_mode(experiment, problem, geometry)
        check_spacing(experiment, problem, metric, geometry.curvature)
    with progress.stage("choosing the step"):
        rule = step_rule(experiment, uplink, downlink, geometry, participation, fleet.n)
        given = experiment.step_size if isinstance(experiment.step_size, float | str) else experiment.step_size.initial
        step = _chosen(given, rule, experiment)
        if whole and hessian is not None:
            rule = with_moments(rule, uplink, terrain, geometry, step, experiment.temperature)
        elif uplink.name == "diana" and experiment.temperature > 0 and clients.d <= MOST_MOMENTS:
            rule = concentrated(rule, terrain.concentration().cpu().numpy(), geometry.mixing.numpy())
        step = _chosen(given, rule, experiment)
        forecast = rule.forecast(step)
    geometry = replace(geometry, traffic=survey.traffic, exchanges=survey.exchanges)
    start = _start(experiment, metric, geometry, clients.dtype, clients.device)
    spread = float(start.abs().max()) + (1.0 if not isinstance(metric, Identity) else _far(geometry))
    return Prepared(geometry, forecast, start, 1e4 * spread)


def _chosen(given: float | str, rule: StepRule, experiment: Experiment) -> float:
    return rule.choose(experiment.bias_tolerance, experiment.temperature) if isinstance(given, str) else float(given)


def _participation(experiment: Experiment, n: int) -> float:
    """The probability that a client's upload is asked for and arrives."""
    section = experiment.fleet
    away = section.dropout * section.dropout_rounds
    asked = section.participation
    return (asked / n if isinstance(asked, int) else asked) * (1 - section.loss) / (1 + away)


def _pays(experiment: Experiment, links: Links, clients: Clients) -> bool:
    """Whether the Hessian at the mode costs little beside what the chains will send."""
    packet = links.packet_bits(experiment.chains, clients.d, clients.dtype)
    width = 8 * torch.empty((), dtype=clients.dtype).element_size()
    return width * clients.d * (clients.d + 1) / 2 <= _WORTH * experiment.rounds * packet


def _far(geometry: Geometry) -> float:
    """A length that no posterior with this mean curvature exceeds by much; for runs without a metric."""
    return 100.0 / math.sqrt(max(min(geometry.mean_curvature, geometry.curvature), 1e-12))


def _metric(
    experiment: Experiment, problem: Problem, survey: Survey, progress: Progress
) -> tuple[Metric, Tensor | None]:
    """Find the metric about the mode, and the clients' Hessian there in the model's parameters if it was asked.

    Gradient descent that starts elsewhere needs no mode, only the curvature where it starts: nothing else is measured.
    """
    clients = problem.clients
    origin = torch.zeros(clients.d, dtype=clients.dtype, device=clients.device)
    descent = experiment.temperature == 0 or experiment.step_size != "auto"
    if experiment.metric.name == Identity.name and experiment.start.at != "mode" and descent:
        return Identity(origin), None
    begin = problem.start_mean + problem.start_scale * key(experiment.seed, client=SERVER, purpose="mode").normal(
        clients.d
    )
    with progress.stage("finding the mode"):
        mode = find_mode(survey, begin.to(clients.dtype).to(clients.device))
        if experiment.temperature > 0:
            check_separable(survey, problem, mode)
    with progress.stage(f"fixing the metric ({experiment.metric.name})"):
        metric, hessian = build_metric(survey, experiment.metric.name, mode)
        polished = metric if isinstance(metric, Identity) else polish(survey, metric)
    if isinstance(metric, Dense) and (metric.unmeasured or metric.narrowed) and experiment.temperature > 0:
        _check_flat_directions(metric, experiment, progress)
    return polished, hessian


def _check_flat_directions(metric: Dense, experiment: Experiment, progress: Progress) -> None:
    """Warn that some directions are too flat, relative to others, for their curvature to be measured or kept.

    Raises:
        ConfigError: if the prior is flat too, so that nothing bounds the posterior in them.
    """
    flat = f"{metric.unmeasured or metric.narrowed} of {len(metric.mean)} directions of the parameters are flat"
    if experiment.model.prior_scale is None and metric.unmeasured:
        raise ConfigError(
            f"{flat} as far as {experiment.dtype} tells, and so is the prior: the posterior is improper, or too narrow "
            "in others to be seen. Set model.prior_scale, drop columns that others determine"
            + (", or try dtype = 'float64'" if experiment.dtype == "float32" else "")
        )
    advice = "; set dtype = 'float64'" if experiment.dtype == "float32" and metric.unmeasured else ""
    progress.note(f"note: {flat} beside the others, and chains mix slowly there: scale and centre the columns{advice}")
