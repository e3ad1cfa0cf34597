"""Where chains start: zeros, draws of the prior, or spread about the mode."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample.errors import ConfigError
from fedsample.preparation.curvature import Geometry
from fedsample.random import SERVER, key
from fedsample.targets.metric import Identity, Metric

if TYPE_CHECKING:
    from fedsample.config import Experiment


def _start(
    experiment: Experiment, metric: Metric, geometry: Geometry, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Place the chains -> (C, d) in the metric's coordinates: zeros, draws of the prior, or spread about the mode."""
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
