"""Build the problem of an experiment from its configuration: data, model, clients, prior."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedsample.errors import ConfigError
from fedsample.numerics.dtypes import DTYPES
from fedsample.targets import Clients, GaussianPrior, GeneralizedLinear, Quadratic

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.data import FederatedData
from fedsample.problem.problem import Problem


def build_problem(experiment: Experiment) -> Problem:
    """Read the data and build the problem of an experiment.

    Raises:
        DataError: if the data cannot be used.
        ConfigError: if the model or another setting cannot be used.
    """
    from fedsample.data import load, load_quadratic
    from fedsample.models import task_of

    if experiment.data.kind == "quadratic":
        precision = GaussianPrior.of_scale(experiment.model.prior_scale).precision
        quadratics = load_quadratic(experiment.data, precision)
        return quadratic_problem(experiment, quadratics.lam, quadratics.a)
    return rows_problem(experiment, load(experiment.data, experiment.seed, task_of(experiment.model.name)))


def rows_problem(experiment: Experiment, data: FederatedData) -> Problem:
    """Build the problem of an experiment on these rows, of all clients, of one, or of none.

    Raises:
        ConfigError: if the model does not fit the data, or a flat prior makes the posterior improper.
    """
    from fedsample.models import build, likelihood_of, parameter_layout, starting_law

    dtype, device = DTYPES[experiment.dtype], device_of(experiment.fleet.device)
    prior = GaussianPrior.of_scale(experiment.model.prior_scale)
    likelihood = likelihood_of(experiment.model.name, data)
    if likelihood == "categorical" and prior.precision == 0 and experiment.temperature > 0:
        raise ConfigError(
            f'model.prior_scale = "flat": {experiment.model.name} has an output for each class, and adding one number '
            "to all of them changes no probability, so the posterior has no finite mass; set model.prior_scale to a "
            'number, or choose model.name = "logistic" for two classes'
        )
    module = build(experiment.model, data)
    x = torch.from_numpy(np.ascontiguousarray(data.x)).to(dtype).to(device)
    y = torch.from_numpy(np.ascontiguousarray(data.y)).to(device)
    offsets = torch.from_numpy(data.offsets)
    noise = experiment.model.noise_scale
    clients: Clients
    if experiment.model.name in ("linear", "logistic", "softmax"):
        clients = GeneralizedLinear(
            x.flatten(1),
            y,
            offsets,
            likelihood,
            data.classes if likelihood == "categorical" and data.classes is not None else 1,
            intercept=experiment.model.intercept,
            noise_scale=noise,
        )
        mean = scale = torch.zeros(clients.d, dtype=torch.float64)
    else:
        from fedsample.targets.module import ModuleClients

        clients = ModuleClients(module, x, y, offsets, likelihood, noise_scale=noise)
        mean, scale = starting_law(module)
    return Problem(
        clients, prior, mean, scale, parameter_layout(module), data, module, likelihood, noise, data.client_names
    )


def device_of(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        ConfigError: if the name is not valid or this machine lacks the device.
    """
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise ConfigError(f'device "{name}", expected cpu, cuda or cuda:N')
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU that PyTorch can use"
        raise ConfigError(f'fleet.device = "{name}", but this machine has {found}; choose another, such as "cpu"')
    return device


def quadratic_problem(experiment: Experiment, lam: np.ndarray, a: np.ndarray) -> Problem:
    """Build the problem of an experiment on these potentials: lam (n, d) or (n, d, d), a (n, d)."""
    dtype, device = DTYPES[experiment.dtype], device_of(experiment.fleet.device)
    prior = GaussianPrior.of_scale(experiment.model.prior_scale)
    curvature = torch.from_numpy(np.ascontiguousarray(lam)).to(dtype).to(device)
    center = torch.from_numpy(np.ascontiguousarray(a)).to(dtype).to(device)
    clients = Quadratic(curvature, center)
    zeros = torch.zeros(clients.d, dtype=torch.float64)
    names = tuple(str(i) for i in range(clients.n))
    return Problem(clients, prior, zeros, zeros, [("params", (clients.d,), 0)], client_names=names)
