"""From a problem and a fleet to a chain's starting point: mode, metric, geometry, step, over-dispersed starts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsample.doubts import check_mode, check_separable, check_spacing
from fedsample.errors import ConfigError, RunDirectoryError
from fedsample.estimators import Uplink
from fedsample.estimators.links import links
from fedsample.protocol.exchange import Fleet, Traffic
from fedsample.random import SERVER, key
from fedsample.strategies.curvature import Geometry, explore, survey_geometry
from fedsample.strategies.prepare import Survey, build_metric, find_mode, polish
from fedsample.strategies.step import (
    MOST_MOMENTS,
    Forecast,
    StepRule,
    concentrated,
    shared_masks,
    solvable,
    step_rule,
    with_moments,
)
from fedsample.targets import Clients
from fedsample.targets.metric import Dense, Identity, Metric, restore

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.monitor.progress import Progress
    from fedsample.problem import Problem

_TENSORS, _NUMBERS = "geometry.safetensors", "geometry.json"
_MEASURED = ("curvature", "flattest", "mean_curvature", "share", "exchanges")
_WORTH = 0.25  # share of the chains' planned uploads that the Hessian at the mode may cost


@dataclass(frozen=True)
class Prepared:
    """What is fixed before the first round.

    Attributes:
        geometry: metric and curvature. forecast: the step, and what it will do. start: (C, d) starting points in the
            metric's coordinates. radius: see `Stability`.
    """

    geometry: Geometry
    forecast: Forecast
    start: Tensor
    radius: float

    @property
    def step_size(self) -> float:
        """The first step."""
        return self.forecast.step_size

    def save(self, path: Path, configurations: Sequence[str] = ()) -> None:
        """Store it beside the run's configuration.

        Args:
            path: of the run. configurations: digests of those that it was made from, see `prepared_for`.
        """
        from safetensors.torch import save

        from fedsample.monitor.atomic_files import write_atomic

        metric = self.geometry.metric
        tensors = {
            "mean": metric.mean,
            "mixing": self.geometry.mixing,
            "gradient": self.geometry.gradient,
            "force": self.geometry.force,
            "stiffest": self.geometry.stiffest,
            "start": self.start,
            **metric.tensors(),
        }
        data = save({name: each.cpu().contiguous() for name, each in tensors.items()})
        (path / _NUMBERS).unlink(missing_ok=True)  # of an earlier attempt: the two files belong together
        write_atomic(path / _TENSORS, data)
        numbers: dict[str, Any] = {
            "metric": metric.name,
            "radius": self.radius,
            **asdict(self.forecast),
            **{name: getattr(self.geometry, name) for name in _MEASURED},
            "traffic": list(self.geometry.traffic),
            "configurations": list(configurations),
        }
        numbers["sha256"] = _checksum(numbers, data)
        write_atomic(path / _NUMBERS, json.dumps(numbers, indent=1).encode())


def _checksum(numbers: dict[str, Any], tensors: bytes) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode() + tensors).hexdigest()


def prepared_for(path: Path, configuration: str) -> bool:
    """Whether a run directory holds what was prepared from a configuration (its digest), whole or damaged."""
    try:
        return configuration in json.loads((path / _NUMBERS).read_bytes())["configurations"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


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
        mean, start, gradient, stiffest = (tensors.pop(name) for name in ("mean", "start", "gradient", "stiffest"))
        mixing, force = tensors.pop("mixing").cpu(), tensors.pop("force").cpu()
        geometry = Geometry(
            metric=restore(n["metric"], mean, tensors),
            mixing=mixing,
            force=force,
            stiffest=stiffest,
            gradient=gradient,
            traffic=Traffic(*n["traffic"]),
            **{name: n[name] for name in _MEASURED},
        )
        return Prepared(geometry, Forecast(**{f.name: n[f.name] for f in fields(Forecast)}), start, n["radius"])
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
    metric, hessian = _metric(experiment, problem, survey, progress)
    survey.send(metric)
    uplink, downlink = links(experiment, problem)
    participation = _participation(experiment, fleet.n)
    with progress.stage("measuring the curvature"):
        whole = solvable(experiment, downlink, participation, clients.d)
        if hessian is not None:
            hessian = metric.scale(metric.scale(hessian).T)
        elif whole and _pays(experiment, uplink, clients):
            hessian = survey.ask(torch.zeros_like(metric.mean).unsqueeze(0), "hessian")["hessian"]
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
    """The probability that a client's upload arrives."""
    section = experiment.fleet
    away = section.dropout * section.dropout_rounds
    asked = section.participation
    return (asked / n if isinstance(asked, int) else asked) * (1 - section.loss) / (1 + away)


def _pays(experiment: Experiment, uplink: Uplink, clients: Clients) -> bool:
    """Whether the Hessian at the mode is small beside what the chains will send."""
    p = uplink.sync_probability(2, clients.d)
    packet = (1 - p) * uplink.bits(experiment.chains, 0, clients.d, clients.dtype)
    packet += p * uplink.bits(experiment.chains, experiment.chains, clients.d, clients.dtype)
    width = 8 * torch.empty((), dtype=clients.dtype).element_size()
    return width * clients.d * (clients.d + 1) / 2 <= _WORTH * experiment.rounds * packet


def _far(geometry: Geometry) -> float:
    """A length that no posterior with the mean curvature seen exceeds by much, without a metric."""
    return 100.0 / math.sqrt(max(min(geometry.mean_curvature, geometry.curvature), 1e-12))


def _metric(
    experiment: Experiment, problem: Problem, survey: Survey, progress: Progress
) -> tuple[Metric, Tensor | None]:
    """The metric about the mode, and the clients' Hessian there in the model's parameters, where it was asked for.

    Gradient descent from elsewhere needs no mode, and the curvature where it begins; nothing else is measured there.
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
        _doubt(metric, experiment, progress)
    return polished, hessian


def _doubt(metric: Dense, experiment: Experiment, progress: Progress) -> None:
    """Some directions are so flat beside others that their curvature was not measured.

    Raises:
        ConfigError: if nothing else says where the posterior ends in them.
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
