"""Find the mode and fix the metric there.

Everything is computed from exact sums over clients, and every bit of traffic is counted:

    mode        L-BFGS on summed potentials and gradients (Liu & Nocedal 1989, SciPy's implementation), then chord
                Newton steps m <- m - S S^T grad U(m) with the metric at hand
    metric      one summed Hessian, diagonal or pair of Kronecker factors at the mode
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.errors import DivergenceError
from fedsample.protocol.exchange import Fleet, Request, Traffic
from fedsample.targets import GaussianPrior, Metric
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker

_CHORD_STEPS = 8


@dataclass
class Survey:
    """Asks a fleet for exact sums and counts what that costs.

    Attributes:
        fleet: the clients.
        prior: U_0 in the model's parameters.
        traffic: bits so far.
    """

    fleet: Fleet
    prior: GaussianPrior
    dtype: torch.dtype
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic)
    exchanges: int = 0

    def ask(self, points: Tensor, *names: str, vector: Tensor | None = None) -> dict[str, Tensor]:
        """Return sums over clients at points (C, d)."""
        aggregate = self.fleet.exchange(Request(0, points, frozenset(names), vector=vector))
        self.traffic = self.traffic.plus(aggregate.traffic)
        self.exchanges += 1
        return aggregate.sums

    def send(self, metric: Metric) -> None:
        """Send the clients the metric."""
        self.traffic = self.traffic.plus(self.fleet.set_metric(metric))

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Return U and its gradient (d,) at theta (d,), in the model's parameters."""
        sums = self.ask(theta.unsqueeze(0), "value", "gradient")
        value = float(sums["value"][0]) + float(self.prior.potential(theta))
        return value, sums["gradient"][0] + self.prior.gradient(theta)


def find_mode(survey: Survey, start: Tensor, *, evaluations: int = 200) -> Tensor:
    """Minimise U from `start` -> (d,), to the accuracy that the dtype and the evaluations allow.

    Raises:
        DivergenceError: if U or its gradient is not finite at the start.
    """
    from scipy.optimize import minimize

    def objective(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        theta = torch.from_numpy(x).to(survey.dtype).to(survey.device)
        value, gradient = survey.value_and_gradient(theta)
        return value, gradient.to(torch.float64).cpu().numpy()

    first, gradient = objective(start.to(torch.float64).cpu().numpy())
    if not (math.isfinite(first) and bool(np.isfinite(gradient).all())):
        raise DivergenceError("U or its gradient is not finite at the starting point: is the data scaled?")
    precise = survey.dtype == torch.float64
    result = minimize(
        objective,
        start.to(torch.float64).cpu().numpy(),
        jac=True,
        method="L-BFGS-B",
        options={
            "maxfun": evaluations,
            "maxcor": 20,
            "ftol": 1e-15 if precise else 1e-7,
            "gtol": 1e-8 if precise else 1e-4,
        },
    )
    return torch.from_numpy(result.x).to(survey.dtype).to(survey.device)


def build_metric(survey: Survey, name: str, mode: Tensor) -> tuple[Metric, Tensor | None]:
    """Build the metric of this name at the mode -> it, and the clients' Hessian (d, d) if it was asked for."""
    point = mode.unsqueeze(0)
    precision = survey.prior.precision
    if name == Identity.name:
        return Identity(mode), None
    if name == Diagonal.name:
        return Diagonal.of_precision(mode, survey.ask(point, "diagonal")["diagonal"] + precision), None
    if name == Dense.name:
        hessian = survey.ask(point, "hessian")["hessian"][0]
        eye = torch.eye(len(mode), dtype=mode.dtype, device=mode.device)
        return Dense.of_precision(mode, hessian + precision * eye), hessian
    sums = survey.ask(point, "factors")
    pairs = [(sums[f"outer{b}"], sums[f"inner{b}"]) for b in range(len(sums) // 2)]
    return Kronecker.of_factors(mode, survey.fleet.blocks(), pairs, precision), None


def polish(survey: Survey, metric: Metric) -> Metric:
    """Improve the mode by chord Newton steps, S unchanged, while they shorten the gradient in the metric."""
    best, gradient = metric, _scaled_gradient(survey, metric)
    for _ in range(_CHORD_STEPS):
        if float(gradient.norm()) < 0.02 * math.sqrt(len(gradient)):
            break
        trial = best.about(best.mean - best.scale(gradient))
        renewed = _scaled_gradient(survey, trial)
        if not float(renewed.norm()) < 0.9 * float(gradient.norm()):
            break
        best, gradient = trial, renewed
    return best


def _scaled_gradient(survey: Survey, metric: Metric) -> Tensor:
    return metric.pull(survey.value_and_gradient(metric.mean)[1])
