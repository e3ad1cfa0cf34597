r"""Measure curvature, and how clients mix coordinates, where the posterior lies.

Draws of the Laplace approximation are not the posterior's: on digits they lie where curvature is six times the mode's
and mixing twice the posterior's own. So each first takes a few exact underdamped steps (BAOAB, one exact gradient each)
in coordinates that the Hessian whitens, and everything is measured where that ends:

    curvature   largest eigenvalue of the Hessian of U, by Lanczos on summed Hessian-vector products; also at the mode
    spread      sum_i diag(H_i D H_i), the mean of summed squares of products with probes of covariance D
    saturation  the variance of clients' gradients over independent draws, relative to what single Hessians predict

Without the Hessian, and in the parameters themselves, nothing can be whitened: there the draws come from Lanczos
at the mode, H^{-1/2} z = |z| V f(T) e_1 with f(t) = t^{-1/2}, and are used as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsample.preparation.mode import Survey
from fedsample.protocol.exchange import Traffic
from fedsample.random import SERVER, Key, key
from fedsample.strategies.baoab import baoab_step
from fedsample.targets import Metric
from fedsample.targets.metric import Identity

_POINTS = 12
_POINTS_OF_MANY = 4  # for more than _MANY parameters: memory is n P d
_MANY = 1000
_LOOKS = 4  # points at which curvature is measured
_RELAXING = 8  # steps from a Laplace draw into the posterior's bulk: on digits U is at its mean after six
_RELAXING_STEP = 0.5
_PRODUCTS = 12  # Lanczos steps for an end of the spectrum
_PRODUCTS_FOR_DRAWS = 24
_SIGNS = 4  # probes per point
_PROBES = 16  # at the mode alone
_LAGS = 4


@dataclass(frozen=True)
class Geometry:
    """What was measured of the target before the first round, in the metric's coordinates.

    Attributes:
        metric: m and S.
        curvature: largest eigenvalue of the Hessian of U that was seen.
        flattest: smallest eigenvalue at the mode, or an upper estimate.
        stiffest: (d,) unit eigenvector of the largest eigenvalue at the mode; zeros where none stands out.
        mean_curvature: mean of the Hessian's diagonal.
        mixing: (d,) r_j = sum_i (H_i^2)_jj; where masks are shared, what they leave of it (see `GeometryProbe`).
        share: mean curvature that one client contributes to a coordinate.
        force: (d,) sum_i (grad U_i)^2 at the mode; where masks are shared, what they leave of it.
        gradient: (d,) summed over clients at the mode, prior not included.
        traffic: bits that the measurement cost, summed over clients.
        exchanges: round trips.
    """

    metric: Metric
    curvature: float
    flattest: float
    stiffest: Tensor
    mean_curvature: float
    mixing: Tensor
    share: float
    force: Tensor
    gradient: Tensor
    traffic: Traffic
    exchanges: int


@dataclass
class GeometryProbe:
    """The points at which a target is measured, and what is known there.

    Attributes:
        survey: asks the clients, who hold the metric.
        metric: m and S.
        keys: for probes and draws.
        temperature: of the posterior.
        points: (P, d) in the metric's coordinates, like the posterior's.
        tops: largest eigenvalues of the Hessian of U seen so far.
        flattest: smallest eigenvalue at the mode.
        stiffest: see `Geometry`.
        hessian: (d, d) float64, of U at the mode; None: not known.
        clients_hessian: (d, d) float64, of the clients' part of U; None: not known.
        shared: c, where the clients' joint masks give a coordinate noise of variance omega times (1 + c) sum_i a_i^2 -
            c (sum_i a_i)^2, in place of omega sum_i a_i^2; 0: masks are independent.
    """

    survey: Survey
    metric: Metric
    keys: Key
    temperature: float
    points: Tensor
    tops: list[float]
    flattest: float
    stiffest: Tensor
    hessian: Tensor | None = None
    clients_hessian: Tensor | None = None
    shared: float = 0.0

    def spread(self, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Measure sum_i diag(H_i D H_i) with D = root root^T; None: D is the identity, probed by random signs.

        Where masks are `shared`, it is (1 + c) times that less c diag(H_c D H_c), H_c = sum_i H_i, by the same probes:
        with c = 1 / (n - 1) this is zero for equal clients, whatever the probes.

        Returns:
            Its estimate (d,), and (d,) the diagonal of sum_i H_i (zeros, and not asked for, with a root), in float64.
        """
        squares, diagonals, d = [], [], self.points.shape[-1]
        for i, point in enumerate(self.points):
            count = torch.arange(_SIGNS if root is None else _LAGS, device=point.device)
            draws = self.keys.fold("signs" if root is None else "lags").fold(i).fold(count)
            signs = draws.rademacher(d, point.dtype)
            probes = signs if root is None else signs @ root.T
            wanted = root is None and self.hessian is None
            names = ("squared_hvp", "hvp") if wanted or self.shared else ("squared_hvp",)
            sums = self.survey.ask(point.expand(len(probes), d), *names, vector=probes)
            whole = sums["hvp"].to(torch.float64).square().mean(0) if self.shared else 0.0
            squares.append(self._common(sums["squared_hvp"].to(torch.float64), whole))
            if wanted:
                diagonals.append((sums["hvp"] * probes).to(torch.float64).mean(0))
        diagonal = torch.stack(diagonals).mean(0) if diagonals else torch.zeros_like(squares[0])
        return torch.stack(squares).mean(0), diagonal

    def _common(self, squares: Tensor, whole: Tensor | float) -> Tensor:
        """Variance of the clients' joint noise, from sums over clients of squares and the squared sum `whole`."""
        return squares if not self.shared else ((1 + self.shared) * squares - self.shared * whole).clamp(min=0)

    def concentration(self) -> Tensor:
        """Curvature of the clients that make a coordinate's noise: sum_i r_ij h_ij / sum_i r_ij over the mean h_ij.

        Here h_ij = (H_i)_jj and r_ij = (H_i^2)_jj at the mode, the latter by random signs. It is 1 where clients share
        every direction, and n where one client alone holds one.

        Returns:
            (d,) float64, in [0, n].
        """
        n, d = self.survey.fleet.n, self.points.shape[-1]
        signs = self.keys.fold("alone").fold(torch.arange(_PROBES, device=self.points.device))
        probes = signs.rademacher(d, self.points.dtype)
        sums = self.survey.ask(torch.zeros_like(probes), "squared_hvp", "cubed_hvp", "diagonal", vector=probes)
        square, cube, mean = (sums[name].to(torch.float64) for name in ("squared_hvp", "cubed_hvp", "diagonal"))
        known = (square > 0) & (mean > 0)
        ones = torch.ones_like(square)
        own = torch.where(known, cube, ones) / torch.where(known, square, ones)
        return torch.where(known, n * own / torch.where(known, mean, ones), ones).clamp(0, n)

    def saturation(self, expected: Tensor | None, root: Tensor) -> float:
        """Measure `spread` between independent draws, relative to what the Hessians at single draws predict.

        Args:
            expected: (d,) `spread` for root root^T; None: measured here.
            root: (d, d) of the covariance of a draw at temperature 1.
        """
        if len(self.points) < 2:
            return 1.0
        names = ("gradient_variance", "gradient") if self.shared else ("gradient_variance",)
        sums = self.survey.ask(self.points, *names)
        whole = sums["gradient"].to(torch.float64).var(0) if self.shared else 0.0
        measured = self._common(sums["gradient_variance"].to(torch.float64), whole)
        expected = self.spread(root)[0] if expected is None else expected.to(measured.device)
        ratio = float(measured.sum() / (self.temperature * expected.sum()))
        return min(ratio, 1.0) if math.isfinite(ratio) else 1.0


def explore(
    survey: Survey,
    metric: Metric,
    seed: int,
    temperature: float,
    clients_hessian: Tensor | None = None,
    shared: float = 0.0,
) -> GeometryProbe:
    """Find points like the posterior's, at which to measure; at temperature 0, the mode.

    Args:
        survey: asks the clients, who hold the metric.
        metric: m and S.
        seed: the experiment's seed.
        temperature: T >= 0 of the posterior.
        clients_hessian: (d, d) sum over clients of their Hessians at the mode, where it is known.
        shared: see `GeometryProbe`.
    """
    keys = key(seed, client=SERVER, purpose="geometry", device=survey.device)
    origin = torch.zeros(1, len(metric.mean), dtype=survey.dtype, device=survey.device)
    terrain = GeometryProbe(survey, metric, keys, temperature, origin, [], math.inf, torch.zeros_like(origin[0]))
    terrain.shared = shared
    normal = _normal(terrain, "draw", _POINTS if len(metric.mean) <= _MANY else _POINTS_OF_MANY)
    if clients_hessian is not None:
        white = _use_hessian(terrain, clients_hessian)
    elif isinstance(metric, Identity) and temperature > 0:
        normal = normal[:_LOOKS]
        runs = _lanczos(terrain, origin.expand(_LOOKS, -1), normal, _PRODUCTS_FOR_DRAWS)
        _see(terrain, runs)
        terrain.points = math.sqrt(temperature) * torch.stack([run.inverse_root() for run in runs])
        return _curvature_at_points(terrain)
    else:
        _see(terrain, _lanczos(terrain, origin, _normal(terrain, "start", 1), _PRODUCTS))
        white = None
    if temperature > 0:
        terrain.points = _relaxed(terrain, normal, white, temperature)
        _curvature_at_points(terrain)
    return terrain


def survey_geometry(terrain: GeometryProbe) -> Geometry:
    """Measure curvature and mixing in the coordinates of the metric."""
    survey, metric = terrain.survey, terrain.metric
    mixing, clients = terrain.spread()
    at_mode = survey.ask(torch.zeros_like(terrain.points[:1]), "gradient", "squared_gradient")
    if terrain.hessian is not None and terrain.clients_hessian is not None:
        clients, whole = terrain.clients_hessian.diagonal(), terrain.hessian.diagonal()
    else:
        signs = terrain.keys.fold("prior").fold(torch.arange(_SIGNS, device=survey.device))
        probes = signs.rademacher(len(mixing), survey.dtype)
        whole = clients + (_prior(terrain, probes) * probes).to(torch.float64).mean(0)
    forces = (at_mode["squared_gradient"][0].to(torch.float64), at_mode["gradient"][0].to(torch.float64).square())
    return Geometry(
        metric=metric,
        curvature=max(terrain.tops),
        flattest=terrain.flattest,
        stiffest=terrain.stiffest,
        mean_curvature=float(whole.mean()),
        mixing=mixing.cpu(),
        share=float(clients.mean()) / survey.fleet.n,
        force=terrain._common(*forces).cpu(),
        gradient=at_mode["gradient"][0],
        traffic=survey.traffic,
        exchanges=survey.exchanges,
    )


def _normal(terrain: GeometryProbe, name: str, count: int) -> Tensor:
    index = torch.arange(count, device=terrain.survey.device)
    return terrain.keys.fold(name).fold(index).normal(len(terrain.metric.mean), terrain.survey.dtype)


def _prior(terrain: GeometryProbe, vectors: Tensor) -> Tensor:
    """The Hessian of the prior times vectors (P, d)."""
    return terrain.metric.pull(terrain.survey.prior.precision * terrain.metric.scale(vectors))


# --- points like the posterior's ----------------------------------------------------------------------------------


def _use_hessian(terrain: GeometryProbe, clients_hessian: Tensor) -> Tensor:
    """Store the Hessian at the mode -> H^{-1/2} (d, d); flat and concave directions count as nearly flat."""
    survey = terrain.survey
    clients = clients_hessian.to(torch.float64)
    eye = torch.eye(len(clients), dtype=survey.dtype, device=survey.device)
    hessian = clients + _prior(terrain, eye).to(torch.float64)
    terrain.clients_hessian, terrain.hessian = (clients + clients.T) / 2, (hessian + hessian.T) / 2
    values, vectors = torch.linalg.eigh(terrain.hessian)
    terrain.tops.append(float(values[-1]))
    terrain.flattest = float(values[0])
    if terrain.tops[0] > 1.01 * terrain.flattest:
        terrain.stiffest = vectors[:, -1].to(survey.dtype)
    values = values.clamp(min=max(1e-7 * float(values[-1]), 1e-30))
    root: Tensor = (vectors * values.rsqrt()) @ vectors.T
    return root.to(survey.dtype)


def _relaxed(terrain: GeometryProbe, normal: Tensor, white: Tensor | None, temperature: float) -> Tensor:
    """Take exact steps in y from draws of the Laplace approximation -> (P, d) in coordinates x = white y."""
    survey, metric = terrain.survey, terrain.metric

    def unwhiten(y: Tensor) -> Tensor:
        return y if white is None else y @ white

    y = math.sqrt(temperature) * normal
    moving, momenta = y, math.sqrt(temperature) * _normal(terrain, "momenta", len(y))
    for step in range(_RELAXING):
        point = unwhiten(moving)
        gradient = survey.ask(point, "gradient")["gradient"] + metric.pull(survey.prior.gradient(metric.push(point)))
        noise = _normal(terrain, f"relax{step}", len(y))
        moving, momenta = baoab_step(moving, momenta, unwhiten(gradient), noise, _RELAXING_STEP, 1.0, temperature)
    length = moving.norm(dim=-1, keepdim=True)
    sound = torch.isfinite(length) & (length < 4 * y.norm(dim=-1, keepdim=True))
    return unwhiten(torch.where(sound, moving, y))  # where such steps are unstable, use the draw itself


# --- Lanczos ------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Lanczos from one start: orthonormal basis (m, d), Ritz values, their coefficients, residual of the largest."""

    basis: Tensor
    values: NDArray[np.float64]
    vectors: NDArray[np.float64]
    length: float
    residual: float

    def inverse_root(self) -> Tensor:
        """H^{-1/2} times the start, approximately; directions without curvature are left out."""
        floor = 1e-7 * max(float(self.values[-1]), 1e-30)
        roots = np.where(self.values > floor, 1 / np.sqrt(np.maximum(self.values, floor)), 0.0)
        weights = self.length * (self.vectors * roots) @ self.vectors[0]
        result: Tensor = torch.from_numpy(weights).to(self.basis) @ self.basis
        return result


def _curvature_at_points(terrain: GeometryProbe) -> GeometryProbe:
    """Add the largest curvature at each point to `tops`."""
    runs = _lanczos(terrain, terrain.points[:_LOOKS], _normal(terrain, "look", _LOOKS), _PRODUCTS)
    terrain.tops += [float(run.values[-1]) + run.residual for run in runs]
    return terrain


def _see(terrain: GeometryProbe, runs: Sequence[_Run]) -> None:
    """Store the ends of the spectrum at the mode."""
    terrain.tops += [float(run.values[-1]) + run.residual for run in runs]
    terrain.flattest = min(float(run.values[0]) for run in runs)
    top = max(runs, key=lambda run: float(run.values[-1]))
    if float(top.values[-1]) > 1.01 * terrain.flattest:
        terrain.stiffest = torch.from_numpy(top.vectors[:, -1]).to(top.basis) @ top.basis


def _lanczos(terrain: GeometryProbe, points: Tensor, starts: Tensor, products: int) -> list[_Run]:
    """Run Lanczos on the Hessian of U at points (P, d), from one start each; an exchange serves all points."""
    count, d = starts.shape
    lengths = starts.norm(dim=-1, keepdim=True)
    bases = [starts / lengths]
    diagonal, beside = np.zeros((count, products)), np.zeros((count, products))
    sizes = np.full(count, min(products, d))
    for step in range(min(products, d)):
        v = bases[-1]
        w = terrain.survey.ask(points, "hvp", vector=v)["hvp"] + _prior(terrain, v)
        diagonal[:, step] = (w * v).sum(-1).cpu().numpy()
        for u in bases:  # full orthogonalisation: few vectors, and no spurious copies of eigenvalues
            w = w - (w * u).sum(-1, keepdim=True) * u
        norms = w.norm(dim=-1, keepdim=True)
        beside[:, step] = norms.squeeze(-1).cpu().numpy()
        ended = ~(beside[:, step] > 1e-6 * np.maximum(np.abs(diagonal[:, 0]), 1e-30))
        sizes = np.where(ended & (sizes > step), step + 1, sizes)
        bases.append(torch.where(norms > 0, w / norms.clamp(min=1e-30), w))
        if bool((sizes <= step + 1).all()):
            break
    stacked = torch.stack(bases, dim=1)  # (P, products + 1, d)
    runs = []
    for i, m in enumerate(sizes.tolist()):
        matrix = np.diag(diagonal[i, :m]) + np.diag(beside[i, : m - 1], 1) + np.diag(beside[i, : m - 1], -1)
        values, vectors = np.linalg.eigh(matrix)
        exhausted = m == d or not beside[i, m - 1] > 1e-6 * abs(diagonal[i, 0])
        residual = 0.0 if exhausted else float(beside[i, m - 1] * abs(vectors[-1, -1]))
        runs.append(_Run(stacked[i, :m], values, vectors, float(lengths[i]), residual))
    return runs
