"""Targets: the clients' potentials, the prior, and the metric that gives a chain its coordinates."""

from fedsample.targets.base import Clients, GaussianPrior
from fedsample.targets.glm import GeneralizedLinear
from fedsample.targets.metric import Metric, MetricClients, MetricPrior
from fedsample.targets.module import ModuleClients
from fedsample.targets.posterior import Posterior
from fedsample.targets.quadratic import Quadratic

__all__ = [
    "Clients",
    "GaussianPrior",
    "GeneralizedLinear",
    "Metric",
    "MetricClients",
    "MetricPrior",
    "ModuleClients",
    "Posterior",
    "Quadratic",
]
