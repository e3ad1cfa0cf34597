"""Potentials of clients: closed forms against autograd on a loop, and the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from loop_reference import (
    CHAINS,
    F64,
    FEATURES,
    LIKELIHOODS,
    SIZES,
    check_factors,
    close,
    data,
    glm,
    hessian,
    normal,
    on_a_loop,
    outputs_of,
    potential_of,
    stack,
)
from torch import Tensor, nn
from torch.func import grad

from fedsample.models.dense import Linear
from fedsample.targets import GaussianPrior, GeneralizedLinear, ModuleClients, Posterior, Quadratic
from fedsample.targets.glm import Likelihood

pytestmark = pytest.mark.usefixtures("analysis")


# --- data and reference -----------------------------------------------------------------------------------------------


def linear_outputs(likelihood: Likelihood, intercept: bool) -> Callable[[Tensor, Tensor], Tensor]:
    k = outputs_of(likelihood)

    def outputs(theta: Tensor, x: Tensor) -> Tensor:
        bias = theta[k * FEATURES :] if intercept else None
        return nn.functional.linear(x, theta[: k * FEATURES].view(k, FEATURES), bias)

    return outputs


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.rounding
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_generalised_linear_models_equal_autograd_on_a_loop(likelihood: Likelihood, intercept: bool) -> None:
    clients, arrays = glm(likelihood, intercept), data(likelihood)
    potential = potential_of(likelihood, linear_outputs(likelihood, intercept))
    assert clients.d == outputs_of(likelihood) * (FEATURES + intercept)
    assert clients.rows.tolist() == list(SIZES)
    theta, vector = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5)
    curvature = on_a_loop(hessian(potential), theta, *arrays)
    close(clients.potential(theta), on_a_loop(potential, theta, *arrays))
    gradient = on_a_loop(grad(potential), theta, *arrays)
    close(clients.gradient(theta), gradient)
    for got, want in zip(
        clients.value_and_gradient(theta), (on_a_loop(potential, theta, *arrays), gradient), strict=True
    ):
        close(got, want)
    close(clients.gradient(theta, clients=torch.tensor([3, 1, 0])), gradient[[3, 1, 0]])
    close(clients.hessian(theta), curvature)
    close(clients.hvp(theta, vector), torch.einsum("ncde,ce->ncd", curvature, vector))
    close(clients.diagonal(theta), curvature.diagonal(dim1=-2, dim2=-1))
    check_factors(clients, theta[0])


@pytest.mark.parametrize("kind", ["dense", "diagonal"])
def test_quadratics_equal_autograd(kind: str) -> None:
    clients = stack(kind)
    assert isinstance(clients, Quadratic)
    theta, vector = normal(3, clients.d), normal(3, clients.d, seed=5)
    for i in range(clients.n):
        matrix = clients.curvature[i] if kind == "dense" else torch.diag(clients.curvature[i])

        def potential(point: Tensor, i: int = i, matrix: Tensor = matrix) -> Tensor:
            offset = point - clients.center[i]
            return offset @ matrix @ offset / 2

        close(clients.potential(theta)[i], torch.stack([potential(point) for point in theta]))
        close(clients.gradient(theta)[i], torch.stack([grad(potential)(point) for point in theta]))
        value, gradient = clients.value_and_gradient(theta)
        close(value[i], torch.stack([potential(point) for point in theta]))
        close(gradient[i], torch.stack([grad(potential)(point) for point in theta]))
        close(clients.hessian(theta)[i], torch.stack([hessian(potential)(point) for point in theta]))
        close(clients.hvp(theta, vector)[i], vector @ matrix)
        close(clients.diagonal(theta)[i], matrix.diagonal().expand(3, -1))
    some = torch.tensor([2, 0])
    assert torch.equal(clients.gradient(theta, clients=some), clients.gradient(theta)[some])
    check_factors(clients, theta[0])


@pytest.mark.rounding
@pytest.mark.parametrize("logit", [25.0, -25.0, 700.0, -700.0])
def test_a_certain_logistic_regression_stays_exact(logit: float) -> None:
    x, y, offsets = torch.ones(1, 1, dtype=F64), torch.zeros(1), torch.tensor([0, 1])
    theta = torch.tensor([[logit]], dtype=F64)
    want = max(logit, 0.0) + torch.log1p(torch.exp(-torch.tensor(abs(logit), dtype=F64)))
    linear = GeneralizedLinear(x, y, offsets, "bernoulli", intercept=False)
    module = ModuleClients(Linear((1,), 1, False), x, y, offsets, "bernoulli")
    for clients in (linear, module):
        close(clients.potential(theta), want.reshape(1, 1), sees=1e-3)  # exp(-700) is near the smallest number
        close(clients.gradient(theta), torch.sigmoid(theta).unsqueeze(0), sees=1e-3)
        curvature = (torch.sigmoid(theta) * torch.sigmoid(-theta)).unsqueeze(0)
        # s (1 - s) of an s that was rounded beside 1: what is left is small, and that is all
        close(clients.hvp(theta, torch.ones_like(theta)), curvature, sees=math.inf)


# --- the posterior ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (2,), (3, 2)])
def test_the_posterior_takes_any_leading_dimensions(leading: tuple[int, ...]) -> None:
    clients, prior = stack("glm"), GaussianPrior.of_scale(0.5)
    posterior = Posterior(clients, prior)
    n, d = clients.n, clients.d
    assert posterior.d == d
    theta, vector = normal(*leading, d), normal(*leading, d, seed=5)
    points, directions = theta.reshape(-1, d), vector.reshape(-1, d)
    assert torch.equal(posterior.client_potential(theta), clients.potential(points).view(n, *leading))
    assert torch.equal(posterior.client_gradient(theta), clients.gradient(points).view(n, *leading, d))
    assert torch.equal(posterior.client_hvp(theta, vector), clients.hvp(points, directions).view(n, *leading, d))
    assert torch.equal(posterior.client_hessian(theta), clients.hessian(points).view(n, *leading, d, d))
    close(posterior.prior_potential(theta), 2 * theta.square().sum(-1))
    close(posterior.potential(theta), clients.potential(points).sum(0).view(leading) + 2 * theta.square().sum(-1))
    close(posterior.gradient(theta), clients.gradient(points).sum(0).view(*leading, d) + 4 * theta)


def test_the_posterior_takes_any_precision_and_computes_in_its_own() -> None:
    posterior = Posterior(stack("glm", torch.float32), GaussianPrior.of_scale(None))
    theta = normal(posterior.d)
    assert posterior.client_gradient(theta).dtype == torch.float32
    assert posterior.gradient(theta).dtype == torch.float32
    assert posterior.potential(theta).dtype == F64
    assert float(posterior.prior_potential(theta)) == 0.0
