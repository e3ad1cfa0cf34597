"""What the preparation measures of a target, on quadratics where everything is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from moment_maps import Chain, independent_pairs
from rounding import near
from torch import Tensor

from fedsample.compression import build as compressor_of
from fedsample.config import Experiment
from fedsample.estimators import DenseDownlink, build
from fedsample.fleets.local import LocalFleet
from fedsample.preparation.curvature import GeometryProbe, explore, survey_geometry
from fedsample.preparation.mode import Survey
from fedsample.preparation.step_rule import solvable, step_rule, with_moments
from fedsample.targets import GaussianPrior, Quadratic
from fedsample.targets.metric import Identity

N, D, PRECISION = 3, 4, 0.5


def hessians(seed: int = 3) -> Tensor:
    """(n, d, d) that do not commute; the clients' sum has condition 300 or so."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(N, D, D)) * np.geomspace(0.3, 4, D)
    return torch.from_numpy(np.einsum("ijk,ilk->ijl", factors, factors) / D)


def terrain(known: bool, temperature: float = 1.0, seed: int = 0) -> tuple[Tensor, GeometryProbe]:
    each = hessians()
    clients = Quadratic(each, torch.zeros(N, D, dtype=torch.float64))
    fleet = LocalFleet(clients, build("dense", compressor_of("identity")), seed, 1)
    survey = Survey(fleet, GaussianPrior(PRECISION), clients.dtype, clients.device)
    metric = Identity(torch.zeros(D, dtype=torch.float64))
    survey.send(metric)
    return each, explore(survey, metric, seed, temperature, each.sum(0) if known else None)


@pytest.mark.parametrize("known", [True, False])
def test_ends_of_the_spectrum(known: bool) -> None:
    each, seen = terrain(known)
    geometry = survey_geometry(seen)
    values, vectors = torch.linalg.eigh(each.sum(0) + PRECISION * torch.eye(D, dtype=torch.float64))
    largest = float(
        values[-1]
    )  # eigenvalues move by no more than their matrix; Lanczos ends after D steps of D products
    assert geometry.curvature == near(largest, 20 * D**2, largest)
    assert geometry.flattest == near(float(values[0]), 20 * D**2, largest)
    assert abs(float(geometry.stiffest @ vectors[:, -1])) == near(1.0, 20 * D**2)
    trace = float(each.sum(0).diagonal().mean())
    assert geometry.mean_curvature == (
        near(trace + PRECISION, 20) if known else pytest.approx(trace + PRECISION, rel=0.3)
    )
    assert N * geometry.share == (near(trace, 20) if known else pytest.approx(trace, rel=0.3))


@pytest.mark.parametrize("known", [True, False])
def test_points_follow_the_posterior(known: bool) -> None:
    """On a quadratic the Laplace draws are the posterior's, and exact steps of BAOAB leave it as it is."""
    points = torch.cat([terrain(known, 2.0, seed)[1].points for seed in range(60)])
    each = hessians()
    precision = each.sum(0) + PRECISION * torch.eye(D, dtype=torch.float64)
    square = torch.einsum("pj,jk,pk->p", points, precision, points) / 2.0  # chi-squared, d degrees of freedom
    assert abs(float(square.mean()) - D) < 5 * math.sqrt(2 * D / len(points))
    white = points @ torch.linalg.cholesky(precision) / math.sqrt(2.0)
    assert torch.all((white.square().mean(0) - 1).abs() < 5 * math.sqrt(2 / len(points)))


def test_at_temperature_zero_the_mode_is_all_there_is() -> None:
    _, seen = terrain(known=False, temperature=0.0)
    assert not seen.points.any()
    assert len(seen.points) == 1


def test_spread_is_that_of_its_probes() -> None:
    each, seen = terrain(known=True)
    root = torch.from_numpy(np.random.default_rng(0).normal(size=(D, D)))
    seen_by = [terrain(True, seed=seed)[1] for seed in range(60)]
    many = torch.stack([one.spread(root)[0] for one in seen_by])
    want = torch.einsum("ijk,kl,ilj->j", each, root @ root.T, each)
    assert torch.all((many.mean(0) - want).abs() < 5 * many.std(0) / 60**0.5)
    plain, want = torch.stack([one.spread()[0] for one in seen_by]), (each @ each).diagonal(dim1=1, dim2=2).sum(0)
    assert torch.all((plain.mean(0) - want).abs() < 5 * plain.std(0) / 60**0.5)
    assert seen.saturation(None, root) <= 1.0


def test_concentration_is_what_the_clients_with_the_noise_hold() -> None:
    """By many probes the ratio that it says; equal clients have 1, one that holds a coordinate alone has n."""
    each, seen = terrain(known=True)
    several = torch.stack([terrain(True, seed=seed)[1].concentration() for seed in range(60)])
    square, own = (each @ each).diagonal(dim1=1, dim2=2), each.diagonal(dim1=1, dim2=2)
    want = N * (square * own).sum(0) / square.sum(0) / own.sum(0)
    assert torch.all((several.mean(0) - want).abs() < 5 * several.std(0) / 60**0.5 + 0.02)
    for hessian, whole in ((torch.eye(D).expand(N, D, D), 1.0), (torch.diag_embed(torch.eye(N, D)), float(N))):
        clients = Quadratic(hessian.double().contiguous(), torch.zeros(N, D, dtype=torch.float64))
        seen.survey.fleet = LocalFleet(clients, build("dense", compressor_of("identity")), 0, 1)
        found = seen.concentration()
        assert found[:N].tolist() == near([whole] * N, 100)
        assert found[N:].tolist() == [1.0] * (D - N)  # nobody holds it, or all do


def test_gradients_of_a_quadratic_saturate_nothing() -> None:
    each, seen = terrain(known=True)
    root = torch.linalg.inv(torch.linalg.cholesky(each.sum(0) + PRECISION * torch.eye(D, dtype=torch.float64))).T
    expected = torch.einsum("ijk,kl,ilj->j", each, root @ root.T, each)
    points = torch.cat([terrain(True, seed=seed)[1].points for seed in range(40)])
    seen.points = points  # 480 of them: the variance of gradients over points is what the Hessians say
    assert seen.survey.ask(points, "gradient_variance")["gradient_variance"].sum() / expected.sum() == pytest.approx(
        1.0, abs=0.1
    )


SETTINGS: dict[str, Any] = {"data": {"kind": "quadratic", "file": "unused.npz"}, "metric": {"name": "identity"}}


@pytest.mark.parametrize("uplink", ["diana", "marina"])
@pytest.mark.parametrize("sampler", ["langevin", "baoab"])
def test_forecast_is_the_exact_chains(sampler: str, uplink: str) -> None:
    """From probes of the clients alone, on Hessians that do not commute: mean and stiffest bias of the exact map."""
    each, seen = terrain(known=True)
    geometry = survey_geometry(seen)
    link = build(uplink, compressor_of("randk", k=2), 1 / 2 if uplink == "marina" else None)
    experiment = Experiment(sampler={"name": sampler}, uplink={"name": uplink, "k": 2}, **SETTINGS)
    assert solvable(experiment, DenseDownlink(), 1.0, D)
    rule = step_rule(experiment, link, DenseDownlink(), geometry, 1.0, N)
    rule = with_moments(rule, link, seen, geometry, rule.choose(0.1, 1.0), 1.0)
    step = rule.choose(0.1, 1.0)
    forecast = rule.forecast(step)
    assert 0.0999 < forecast.bias <= 0.1
    exact = Chain(
        each.numpy(), np.zeros((N, D)), sampler, uplink, step,
        masks=independent_pairs(D, 1 / 2), sync=1 / 2 if uplink == "marina" else 0.0, prior=PRECISION * np.eye(D),
    )  # fmt: skip
    where, (values, vectors) = exact.layout["x"], np.linalg.eigh(exact.precision)
    mean = float((exact.spread() / np.diag(np.linalg.inv(exact.precision)) - 1).mean())
    stiff = float(vectors[:, -1] @ exact.stationary[where, where] @ vectors[:, -1] * values[-1] - 1)
    assert forecast.mean_bias == pytest.approx(mean, rel=1 / 3)
    assert forecast.stiff_bias == pytest.approx(stiff, rel=1 / 3)
    assert 0 < forecast.mean_heating < forecast.worst_heating
    assert step < forecast.limit < exact.limit() * 1.1
    slowest = 1 - step * values[0] if sampler == "langevin" else math.nan
    if sampler == "langevin":  # the logarithm of 1 - h lambda knows h lambda to u, and lambda is known to the largest's
        far = 1 / (step * values[0]) + values[-1] / values[0]
        assert forecast.relaxation == near(-1 / math.log(slowest), 20 * D**2 * far)
