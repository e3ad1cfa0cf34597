r"""Before the first round: find the mode, fix the metric, measure the curvature, choose the step.

Everything is made from sums over clients of exact quantities, and every bit of it is counted:

    mode        L-BFGS on summed potentials and gradients (Liu & Nocedal 1989, SciPy's implementation), then chord
                Newton steps m <- m - S S^T grad U(m) with the metric at hand
    metric      one summed Hessian, diagonal or pair of Kronecker factors at the mode
    curvature   largest eigenvalue of the Hessian in the metric's coordinates, by Lanczos on summed Hessian-vector
                products, at the mode and at draws of its Laplace approximation
    mixing      r_j = sum_i (H_i^2)_jj from summed squares of products with random signs: how compression heats
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.errors import DivergenceError
from fedsample.exchange import Fleet, Request, Traffic
from fedsample.random import SERVER, key
from fedsample.targets import GaussianPrior, Metric
from fedsample.targets.metric import Dense, Diagonal, Identity, Kronecker

_LANCZOS_STEPS = 16
_LAPLACE_DRAWS = 4
_PROBES = 4
_CHORD_STEPS = 8


@dataclass
class Survey:
    """Asks a fleet for exact sums and counts what that costs.

    Attributes:
        fleet: the clients. prior: U_0 in the model's parameters. traffic: bits so far.
    """

    fleet: Fleet
    prior: GaussianPrior
    dtype: torch.dtype
    device: torch.device
    traffic: Traffic = field(default_factory=Traffic)
    exchanges: int = 0

    def ask(self, points: Tensor, *names: str, vector: Tensor | None = None) -> dict[str, Tensor]:
        """Sums over clients at (C, d) points."""
        aggregate = self.fleet.exchange(Request(0, points, frozenset(names), vector=vector))
        self.traffic = self.traffic.plus(aggregate.traffic)
        self.exchanges += 1
        return aggregate.sums

    def send(self, metric: Metric) -> None:
        """Give the clients their coordinates."""
        self.traffic = self.traffic.plus(self.fleet.set_metric(metric))

    def value_and_gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """U and its gradient (d,) at theta (d,), in the model's parameters."""
        sums = self.ask(theta.unsqueeze(0), "value", "gradient")
        value = float(sums["value"][0]) + float(self.prior.potential(theta))
        return value, sums["gradient"][0] + self.prior.gradient(theta)


@dataclass(frozen=True)
class Geometry:
    """What a run knows of its target before the first round, in the metric's coordinates.

    Attributes:
        metric: m and S. curvature: largest eigenvalue of the Hessian of U seen. mixing: (d,) r_j. share: mean curvature
            that one client contributes to a coordinate. force: mean over coordinates of sum_i (grad U_i)^2 at the mode.
        gradient: (d,) summed over clients at the mode, prior not included.
        traffic: bits that it cost, all clients together. exchanges: round trips.
    """

    metric: Metric
    curvature: float
    mean_curvature: float
    mixing: Tensor
    share: float
    force: float
    gradient: Tensor
    traffic: Traffic
    exchanges: int


def find_mode(survey: Survey, start: Tensor, *, evaluations: int = 200) -> Tensor:
    """A minimiser (d,) of U near `start`, to the accuracy that the dtype and the evaluations allow.

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


def build_metric(survey: Survey, name: str, mode: Tensor) -> Metric:
    """The metric of this name at the mode, from one sum over clients."""
    point = mode.unsqueeze(0)
    precision = survey.prior.precision
    if name == Identity.name:
        return Identity(mode)
    if name == Diagonal.name:
        return Diagonal.of_precision(mode, survey.ask(point, "diagonal")["diagonal"] + precision)
    if name == Dense.name:
        hessian = survey.ask(point, "hessian")["hessian"]
        return Dense.of_precision(
            mode, hessian + precision * torch.eye(len(mode), dtype=mode.dtype, device=mode.device)
        )
    sums = survey.ask(point, "factors")
    pairs = [(sums[f"outer{b}"], sums[f"inner{b}"]) for b in range(len(sums) // 2)]
    return Kronecker.of_factors(mode, survey.fleet.blocks(), pairs, precision)


def polish(survey: Survey, metric: Metric) -> Metric:
    """The same S about a better mode: chord Newton steps while they shorten the gradient in the metric."""
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


def survey_geometry(survey: Survey, metric: Metric, seed: int) -> Geometry:
    """Curvature and mixing in the coordinates of a metric that the clients hold.

    With a metric made from the Hessian, S z with z normal is a draw of the Laplace approximation: curvature is then the
    largest seen, and mixing the mean, over the mode and a few such draws.
    """
    d = len(metric.mean)
    keys = key(seed, client=SERVER, purpose="geometry", device=survey.device)
    points = [torch.zeros(d, dtype=survey.dtype, device=survey.device)]
    if not isinstance(metric, Identity):
        points += [keys.fold("draw").fold(i).normal(d, survey.dtype) for i in range(_LAPLACE_DRAWS)]
    curvatures, squares, crosses = [], [], []
    for i, point in enumerate(points):
        curvatures.append(_lanczos(survey, metric, point, keys.fold("start").fold(i).normal(d, survey.dtype)))
        probes = keys.fold("signs").fold(i).fold(torch.arange(_PROBES, device=survey.device))
        signs = probes.rademacher(d, survey.dtype)
        products = survey.ask(point.expand(_PROBES, d), "hvp", "squared_hvp", vector=signs)
        squares.append(products["squared_hvp"].to(torch.float64).mean(0))
        crosses.append((products["hvp"] * signs).to(torch.float64).mean(0))
    clients = torch.stack(crosses).mean(0)
    scaled_prior = survey.prior.precision * metric.scale(metric.scale(signs)) * signs
    at_mode = survey.ask(points[0].unsqueeze(0), "gradient", "squared_gradient")
    return Geometry(
        metric=metric,
        curvature=max(curvatures),
        mean_curvature=float(crosses[0].mean() + scaled_prior.to(torch.float64).mean()),
        mixing=torch.stack(squares).mean(0).cpu(),
        share=float(clients.mean()) / survey.fleet.n,
        force=float(at_mode["squared_gradient"].to(torch.float64).mean()),
        gradient=at_mode["gradient"][0],
        traffic=survey.traffic,
        exchanges=survey.exchanges,
    )


def _lanczos(survey: Survey, metric: Metric, point: Tensor, start: Tensor) -> float:
    """The largest eigenvalue of the Hessian of U in the metric's coordinates at `point`, from below."""
    d = len(start)
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(_LANCZOS_STEPS, d)):
        v = basis[-1]
        product = survey.ask(point.unsqueeze(0), "hvp", vector=v.unsqueeze(0))["hvp"][0]
        w = product + metric.pull(survey.prior.precision * metric.scale(v))
        diagonal.append(float(w @ v))
        for u in basis:  # full orthogonalisation: few vectors, and no ghosts
            w = w - (w @ u) * u
        norm = float(w.norm())
        if not norm > 1e-6 * max(abs(diagonal[0]), 1e-30):
            break
        beside.append(norm)
        basis.append(w / norm)
    size = len(diagonal)
    matrix = np.diag(diagonal) + np.diag(beside[: size - 1], 1) + np.diag(beside[: size - 1], -1)
    values, vectors = np.linalg.eigh(matrix)
    residual = beside[size - 1] * abs(float(vectors[-1, -1])) if len(beside) == size else 0.0
    return float(values[-1] + residual)  # an upper estimate: the Ritz value plus its residual
