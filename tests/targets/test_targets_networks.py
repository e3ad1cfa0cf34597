"""Potentials of clients: networks against autograd on a loop."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from loop_reference import (
    CHAINS,
    CLASSES,
    F64,
    FEATURES,
    LIKELIHOODS,
    SIGMA,
    Potential,
    batch_keys,
    check_factors,
    close,
    data,
    everything,
    glm,
    hessian,
    negative_log_likelihood,
    normal,
    on_a_loop,
    outputs_of,
    potential_of,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from fedsample.errors import ConfigError
from fedsample.models import parameter_layout
from fedsample.models.dense import Linear, Mlp
from fedsample.targets import ModuleClients
from fedsample.targets.glm import Likelihood

pytestmark = pytest.mark.usefixtures("analysis")


def module_outputs(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    layout = parameter_layout(module)

    def outputs(theta: Tensor, x: Tensor) -> Tensor:
        named = {name: theta[at : at + torch.Size(shape).numel()].view(shape) for name, shape, at in layout}
        result: Tensor = functional_call(module, named, (x,))
        return result

    return outputs


class Convolutional(nn.Module):
    """A small network with weights of four axes, and a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.conv = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(2 * 2 * 2, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        state = torch.tanh(self.gain * self.conv(input.unsqueeze(-3)))
        result: Tensor = self.head(state.flatten(-3))
        return result


NETWORKS: list[tuple[Likelihood, str]] = [
    ("gaussian", "mlp"),
    ("bernoulli", "mlp"),
    ("categorical", "mlp"),
    ("categorical", "conv"),
]


def network(
    likelihood: Likelihood, name: str
) -> tuple[ModuleClients, Potential, nn.Module, tuple[Tensor, Tensor, Tensor]]:
    module = Convolutional() if name == "conv" else Mlp((FEATURES,), [3], outputs_of(likelihood))
    arrays = data(likelihood, (4, 4) if name == "conv" else (FEATURES,))
    clients = ModuleClients(module, *arrays, likelihood, noise_scale=SIGMA)
    return clients, potential_of(likelihood, module_outputs(module)), module, arrays


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_linear_module_is_a_generalised_linear_model(likelihood: Likelihood, intercept: bool) -> None:
    closed, (x, y, offsets) = glm(likelihood, intercept), data(likelihood)
    module = Linear((FEATURES,), outputs_of(likelihood), intercept)
    clients = ModuleClients(module, x, y, offsets, likelihood, noise_scale=SIGMA)
    assert (clients.n, clients.d) == (closed.n, closed.d)
    assert torch.equal(clients.rows, closed.rows)
    theta, vector = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5)
    want, got = everything(closed, theta, vector), everything(clients, theta, vector)
    names = set(want) - {"outer0", "inner0"} if intercept else set(want)  # a bias is a block of its own in a module
    for name in names:
        close(got[name], want[name])
    keys = batch_keys(clients.n)
    close(clients.gradient(theta, keys=keys, batch_size=2), closed.gradient(theta, keys=keys, batch_size=2))


@pytest.mark.rounding
@pytest.mark.parametrize(("likelihood", "name"), NETWORKS)
def test_networks_equal_autograd_on_a_loop(likelihood: Likelihood, name: str) -> None:
    clients, potential, _, arrays = network(likelihood, name)
    theta, vector = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5)
    close(clients.potential(theta), on_a_loop(potential, theta, *arrays))
    assert clients.potential(theta).dtype == F64
    gradient = on_a_loop(grad(potential), theta, *arrays)
    close(clients.gradient(theta), gradient)
    close(clients.gradient(theta, clients=torch.tensor([4, 1, 0])), gradient[[4, 1, 0]])
    curvature = on_a_loop(hessian(potential), theta, *arrays)
    close(clients.hvp(theta, vector), torch.einsum("ncde,ce->ncd", curvature, vector))


@pytest.mark.parametrize(("likelihood", "name"), NETWORKS)
def test_the_hessian_of_a_network_is_its_fisher_information(likelihood: Likelihood, name: str) -> None:
    clients, potential, module, arrays = network(likelihood, name)
    outputs = module_outputs(module)

    def gauss_newton(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        total = theta.new_zeros(len(theta), len(theta))
        for r in range(len(x)):
            row, label = x[r : r + 1], y[r : r + 1]
            jacobian = jacrev(outputs)(theta, row)[0]  # (K, d)
            middle = hessian(lambda f, label=label: negative_log_likelihood(likelihood, f.unsqueeze(0), label))
            total += jacobian.T @ middle(outputs(theta, row)[0]) @ jacobian
        return total

    theta = normal(CHAINS, clients.d)
    want = on_a_loop(gauss_newton, theta, *arrays)
    close(clients.hessian(theta), want)
    close(clients.diagonal(theta), want.diagonal(dim1=-2, dim2=-1))
    check_factors(clients, theta[0])
    assert float(torch.linalg.eigvalsh(clients.hessian(theta)).min()) > -1e-12
    true = on_a_loop(hessian(potential), theta, *arrays)
    assert float(torch.linalg.eigvalsh(true).min()) < -1e-3  # which the Hessian itself is not


def test_blocks_are_the_parameter_tensors() -> None:
    module = Convolutional()
    clients = network("categorical", "conv")[0]
    layout = parameter_layout(module)
    for block, (_, shape, offset) in zip(clients.blocks(), layout, strict=True):
        size = torch.Size(shape).numel()
        assert torch.equal(block.flatten(), torch.arange(offset, offset + size))
        assert block.shape == (shape[0] if shape else 1, size // (shape[0] if shape else 1))
    assert [tuple(block.shape) for block in clients.blocks()] == [(1, 1), (2, 9), (2, 1), (3, 8), (3, 1)]


def test_a_module_serves_as_a_shape_only() -> None:
    x, y, offsets = data("categorical")
    module = Mlp((FEATURES,), [3], CLASSES)
    theta = normal(CHAINS, sum(p.numel() for p in module.parameters()))
    before = copy.deepcopy(module.state_dict())
    clients = ModuleClients(module, x, y, offsets, "categorical")
    answer = clients.gradient(theta)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(ModuleClients(module, x, y, offsets, "categorical").gradient(theta), answer)
    assert (
        clients.subset(torch.tensor([0]))._module is not clients._module
    )  # two threads must not swap parameters in one module
    assert not answer.requires_grad
    assert not clients.gradient(theta.requires_grad_()).requires_grad


def test_modules_that_cannot_be_sampled_are_refused() -> None:
    x, y, offsets = data("categorical")
    tied = nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.BatchNorm1d(CLASSES))
    with pytest.raises(ConfigError, match=r"buffers.*running_mean"):
        ModuleClients(tied, x, y, offsets, "categorical")
    with pytest.raises(ConfigError, match=r"\(2, 1\), expected \(2, K\)"):
        ModuleClients(Linear((FEATURES,), 1), x, y, offsets, "categorical")
    with pytest.raises(ConfigError, match=r"\(2, 3\), expected \(2, 1\)"):
        ModuleClients(Linear((FEATURES,), 3), x, y, offsets, "bernoulli")
