"""From a problem and a fleet to a chain's starting point: mode, metric, geometry, step, over-dispersed starts."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.errors import ConfigError, RunDirectoryError
from fedsample.exchange import Fleet, Traffic
from fedsample.links import links
from fedsample.random import SERVER, key
from fedsample.strategies.prepare import Geometry, Survey, build_metric, find_mode, polish, survey_geometry
from fedsample.strategies.step import step_rule
from fedsample.targets.metric import Identity, Metric, restore

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.monitor.progress import Progress
    from fedsample.problem import Problem

_TENSORS, _NUMBERS = "geometry.safetensors", "geometry.json"


@dataclass(frozen=True)
class Prepared:
    """What is fixed before the first round.

    Attributes:
        geometry: metric and curvature. step_size: h. bias: predicted relative excess of the stationary variance;
            infinite where unstable. worst: predicted heating of the coordinate that is heated most. limit: largest
            stable step. start: (C, d) starting points in the metric's coordinates. radius: see `Stability`.
    """

    geometry: Geometry
    step_size: float
    bias: float
    worst: float
    limit: float
    start: Tensor
    radius: float

    def save(self, path: Path) -> None:
        """Store it beside the run's configuration."""
        from safetensors.torch import save

        from fedsample.monitor.atomic import write_atomic

        metric = self.geometry.metric
        tensors = {
            "mean": metric.mean,
            "mixing": self.geometry.mixing,
            "gradient": self.geometry.gradient,
            "start": self.start,
            **metric.tensors(),
        }
        data = save({name: each.cpu().contiguous() for name, each in tensors.items()})
        write_atomic(path / _TENSORS, data)
        numbers: dict[str, Any] = {
            "metric": metric.name,
            **{name: getattr(self, name) for name in ("step_size", "bias", "worst", "limit", "radius")},
            **{
                name: getattr(self.geometry, name)
                for name in ("curvature", "mean_curvature", "share", "force", "exchanges")
            },
            "traffic": list(self.geometry.traffic),
        }
        numbers["sha256"] = _checksum(numbers, data)
        write_atomic(path / _NUMBERS, json.dumps(numbers, indent=1).encode())


def _checksum(numbers: dict[str, Any], tensors: bytes) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode() + tensors).hexdigest()


def restore_prepared(path: Path, experiment: Experiment) -> Prepared:
    """What `Prepared.save` stored in a run directory.

    Raises:
        RunDirectoryError: if it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    device = torch.device(experiment.fleet.device)
    try:
        data, n = (path / _TENSORS).read_bytes(), json.loads((path / _NUMBERS).read_bytes())
        if n.pop("sha256", None) != _checksum(n, data):
            raise ValueError("the checksum does not match")
        tensors = {name: each.to(device) for name, each in load(data).items()}
        mean, mixing, start = tensors.pop("mean"), tensors.pop("mixing").cpu(), tensors.pop("start")
        gradient = tensors.pop("gradient")
        metric = restore(n["metric"], mean, tensors)
        geometry = Geometry(
            metric, n["curvature"], n["mean_curvature"], mixing, n["share"], n["force"], gradient,
            Traffic(*n["traffic"]), n["exchanges"],
        )  # fmt: skip
        return Prepared(geometry, n["step_size"], n["bias"], n["worst"], n["limit"], start, n["radius"])
    except (OSError, KeyError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{path}: the run's geometry ({_TENSORS}, {_NUMBERS}) is missing or damaged, and it cannot be resumed: "
            f"{error}. Start a new run in another directory"
        ) from error


def prepare(experiment: Experiment, problem: Problem, fleet: Fleet, progress: Progress) -> Prepared:
    """Find the mode, fix the metric, measure the geometry, choose the step, place the chains.

    Raises:
        DivergenceError: if U is not finite where it must be.
    """
    clients = problem.clients
    survey = Survey(fleet, problem.prior, clients.dtype, clients.device)
    metric = _metric(experiment, problem, survey, progress)
    survey.send(metric)
    with progress.stage("measuring the curvature"):
        geometry = survey_geometry(survey, metric, experiment.seed)
    fleet_section = experiment.fleet
    away = fleet_section.dropout * fleet_section.dropout_rounds
    asked = fleet_section.participation
    participation = (asked / fleet.n if isinstance(asked, int) else asked) * (1 - fleet_section.loss) / (1 + away)
    rule = step_rule(experiment, *links(experiment, problem), geometry, participation, fleet.n)
    step = experiment.step_size if isinstance(experiment.step_size, float | str) else experiment.step_size.initial
    if step == "auto":
        step = rule.choose(experiment.bias_tolerance, experiment.temperature)
    start = _start(experiment, metric, geometry, clients.dtype, clients.device)
    spread = float(start.abs().max()) + (1.0 if not isinstance(metric, Identity) else _far(geometry))
    return Prepared(geometry, float(step), rule.bias(step), rule.worst_heating(step), rule.limit(), start, 1e4 * spread)


def _far(geometry: Geometry) -> float:
    """A length that no posterior with the mean curvature seen exceeds by much, without a metric."""
    return 100.0 / math.sqrt(max(min(geometry.mean_curvature, geometry.curvature), 1e-12))


def _metric(experiment: Experiment, problem: Problem, survey: Survey, progress: Progress) -> Metric:
    clients = problem.clients
    origin = torch.zeros(clients.d, dtype=clients.dtype, device=clients.device)
    if experiment.metric.name == Identity.name and experiment.start.at != "mode":
        return Identity(origin)
    begin = problem.start_mean + problem.start_scale * key(experiment.seed, client=SERVER, purpose="mode").normal(
        clients.d
    )
    with progress.stage("finding the mode"):
        mode = find_mode(survey, begin.to(clients.dtype).to(clients.device))
    with progress.stage(f"fixing the metric ({experiment.metric.name})"):
        metric = build_metric(survey, experiment.metric.name, mode)
        return metric if isinstance(metric, Identity) else polish(survey, metric)


def _start(
    experiment: Experiment, metric: Metric, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """(C, d) starting points in the metric's coordinates: zeros, draws of the prior, or spread about the mode."""
    d, chains = len(metric.mean), torch.arange(experiment.chains, device=device)
    section = experiment.start
    if section.at == "zeros":
        return metric.invert(torch.zeros(experiment.chains, d, dtype=dtype, device=device))
    normal = key(experiment.seed, client=SERVER, chain=chains, purpose="start", device=device).normal(d, dtype)
    if section.at == "prior":
        if experiment.model.prior_scale is None:
            raise ConfigError("start.at = 'prior' needs a proper prior; start at 'mode' or 'zeros'")
        return metric.invert(experiment.model.prior_scale * normal)
    scale = section.scale * math.sqrt(experiment.temperature)
    if isinstance(metric, Identity):  # one length for all directions: that of the stiffest
        scale /= math.sqrt(max(geometry.curvature, 1e-30))
    return scale * normal
