"""Potentials of clients: closed forms and networks against autograd on a loop, minibatches, chunks, chains, stacks."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rounding import SEES
from running_error import RunningError
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from fedsample.errors import ConfigError
from fedsample.models import parameter_layout
from fedsample.models.dense import Linear, Mlp
from fedsample.random import Key, key
from fedsample.targets import Clients, GaussianPrior, GeneralizedLinear, ModuleClients, Posterior, Quadratic
from fedsample.targets import glm as glm_module
from fedsample.targets import module as module_module
from fedsample.targets.glm import Likelihood
from fedsample.targets.minibatch import draw_rows

SIZES = (5, 0, 1, 9, 3)  # ragged, a client without rows and one with a single row
FEATURES, CLASSES, SIGMA, CHAINS = 4, 3, 0.7, 2
LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "bernoulli", "categorical")
F64 = torch.float64
Potential = Callable[[Tensor, Tensor, Tensor], Tensor]  # theta (d,), x (rows, ...), y (rows,) -> ()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.fixture(autouse=True)
def _analysis() -> Iterator[None]:
    """Every test of this file runs under a running error analysis, which says how far `close` lets two ways part."""
    global ANALYSIS
    with RunningError() as ANALYSIS:
        yield


def close(got: Tensor, want: Tensor, what: str = "", sees: float | None = None) -> None:
    ANALYSIS.close(got, want, what=what, sees=sees)


# --- data and reference ----------------------------------------------------------------------------------------------


def hessian(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By reverse mode twice: torch.func.hessian goes forward, which scripts with a deprecation warning."""
    return jacrev(jacrev(function))


def outputs_of(likelihood: Likelihood) -> int:
    return CLASSES if likelihood == "categorical" else 1


def data(likelihood: Likelihood, shape: tuple[int, ...] = (FEATURES,)) -> tuple[Tensor, Tensor, Tensor]:
    n = sum(SIZES)
    x = normal(n, *shape)
    y = normal(n, seed=2) if likelihood == "gaussian" else torch.arange(n) * 7 % 5 % max(2, outputs_of(likelihood))
    return x, y, torch.tensor([0, *itertools.accumulate(SIZES)])


def negative_log_likelihood(likelihood: Likelihood, outputs: Tensor, y: Tensor) -> Tensor:
    """PyTorch's own losses of (rows, K) outputs, summed over rows."""
    if likelihood == "categorical":
        return nn.functional.cross_entropy(outputs, y, reduction="sum")
    if likelihood == "bernoulli":
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], y.to(outputs.dtype), reduction="sum")
    return nn.functional.mse_loss(outputs[:, 0], y, reduction="sum") / (2 * SIGMA**2)


def linear_outputs(likelihood: Likelihood, intercept: bool) -> Callable[[Tensor, Tensor], Tensor]:
    k = outputs_of(likelihood)

    def outputs(theta: Tensor, x: Tensor) -> Tensor:
        bias = theta[k * FEATURES :] if intercept else None
        return nn.functional.linear(x, theta[: k * FEATURES].view(k, FEATURES), bias)

    return outputs


def module_outputs(module: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    layout = parameter_layout(module)

    def outputs(theta: Tensor, x: Tensor) -> Tensor:
        named = {name: theta[at : at + torch.Size(shape).numel()].view(shape) for name, shape, at in layout}
        result: Tensor = functional_call(module, named, (x,))
        return result

    return outputs


def potential_of(likelihood: Likelihood, outputs: Callable[[Tensor, Tensor], Tensor]) -> Potential:
    return lambda theta, x, y: negative_log_likelihood(likelihood, outputs(theta, x), y)


def on_a_loop(function: Callable[..., Tensor], theta: Tensor, x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """The function (theta, x, y) of every client and chain, one at a time: (n, C, ...)."""
    spans = list(itertools.pairwise(offsets.tolist()))
    return torch.stack([torch.stack([function(point, x[a:b], y[a:b]) for point in theta]) for a, b in spans])


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


def glm(likelihood: Likelihood, intercept: bool = True, dtype: torch.dtype = F64) -> GeneralizedLinear:
    x, y, offsets = data(likelihood)
    y = y.to(dtype) if likelihood == "gaussian" else y
    return GeneralizedLinear(
        x.to(dtype),
        y,
        offsets,
        likelihood,
        outputs_of(likelihood),
        intercept=intercept,
        noise_scale=SIGMA,
    )


def stack(kind: str, dtype: torch.dtype = F64) -> Clients:
    """One stack of each class of target."""
    likelihood: Likelihood = "gaussian" if kind.endswith("gaussian") else "categorical"
    if kind.startswith("glm"):
        return glm(likelihood, dtype=dtype)
    if kind.startswith("module"):
        x, y, offsets = data(likelihood)
        module = Mlp((FEATURES,), [3], outputs_of(likelihood))
        return ModuleClients(module, x.to(dtype), y, offsets, likelihood, noise_scale=SIGMA)
    root = normal(4, 6, 6, seed=3)
    curvature = root @ root.transpose(-1, -2) if kind == "dense" else root[:, 0].square()
    return Quadratic(curvature.to(dtype), normal(4, 6, seed=4).to(dtype))


STACKS = ("glm", "glm-gaussian", "module", "module-gaussian", "dense", "diagonal")


def everything(clients: Clients, theta: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """Every answer of a stack, with the clients on the first axis."""
    answers = {
        "potential": clients.potential(theta),
        "gradient": clients.gradient(theta),
        "hvp": clients.hvp(theta, vector),
        "hessian": clients.hessian(theta),
        "diagonal": clients.diagonal(theta),
    }
    for b, pair in enumerate(clients.factors(theta[0])):
        answers |= {f"{side}{b}": factor for side, factor in zip(("outer", "inner"), pair, strict=True)}
    return answers


def check_factors(clients: Clients, theta: Tensor) -> None:
    """B and A are the partial traces of the Hessian's blocks, since F = sum vec(u) vec(u)^T."""
    full = clients.hessian(theta.unsqueeze(0))[:, 0]
    blocks = clients.blocks()
    assert torch.equal(torch.cat([block.flatten() for block in blocks]).sort().values, torch.arange(clients.d))
    for block, (outer, inner) in zip(blocks, clients.factors(theta), strict=True):
        flat = block.flatten()
        part = full[:, flat][:, :, flat].reshape(-1, *block.shape, *block.shape)  # (n, out, in, out, in)
        close(outer, torch.einsum("naibi->nab", part))
        close(inner, torch.einsum("naiaj->nij", part))
        close(torch.einsum("naa->n", outer), torch.einsum("nii->n", inner))


# --- closed forms ----------------------------------------------------------------------------------------------------


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


# --- networks --------------------------------------------------------------------------------------------------------


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


# --- stacks, chains, chunks, dtypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["glm", "module"])
def test_clients_without_rows_contribute_zero(kind: str) -> None:
    clients = stack(kind)
    theta = normal(CHAINS, clients.d)
    answers = everything(clients, theta, normal(CHAINS, clients.d, seed=5))
    answers["minibatch"] = clients.gradient(theta, keys=batch_keys(clients.n), batch_size=2)
    empty = clients.client(1)
    alone = everything(empty, theta, theta)
    alone["minibatch"] = empty.gradient(theta, keys=batch_keys(1), batch_size=2)
    for name in answers:
        assert not bool(answers[name][1].any()), name
        assert alone[name].shape == answers[name][1:2].shape
        assert not bool(alone[name].any()), name


@pytest.mark.parametrize("kind", STACKS)
def test_a_client_alone_answers_as_in_its_stack(kind: str) -> None:
    clients = stack(kind)
    theta, vector = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5)
    whole = everything(clients, theta, vector)
    chosen = torch.tensor([3, 0])
    for part, which in [(clients.client(i), torch.tensor([i])) for i in range(clients.n)] + [
        (clients.subset(chosen), chosen)
    ]:
        assert torch.equal(part.rows, clients.rows[which])
        for name, answer in everything(part, theta, vector).items():
            close(answer, whole[name][which])  # products of other shapes round differently


@pytest.mark.parametrize("kind", STACKS)
def test_chains_do_not_see_each_other(kind: str) -> None:
    clients = stack(kind)
    theta, vector = normal(3, clients.d), normal(3, clients.d, seed=5)
    together = everything(clients, theta, vector)
    for c in range(3):
        for name, answer in everything(clients, theta[c : c + 1], vector[c : c + 1]).items():
            if not name.startswith(("outer", "inner")):
                close(answer[:, 0], together[name][:, c])


@pytest.mark.parametrize(("chunk", "merge"), [(1, 1), (60, 60), (1, 1 << 22), (1 << 22, 1)])
@pytest.mark.parametrize("kind", ["glm", "module"])
def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch, kind: str, chunk: int, merge: int) -> None:
    clients = stack(kind)
    theta, vector, keys = normal(CHAINS, clients.d), normal(CHAINS, clients.d, seed=5), batch_keys(clients.n)
    whole = everything(clients, theta, vector)
    whole["minibatch"] = clients.gradient(theta, keys=keys, batch_size=3)
    monkeypatch.setattr(glm_module, "_CHUNK", chunk)
    monkeypatch.setattr(module_module, "_CHUNK", chunk)
    monkeypatch.setattr(module_module, "_MERGE", merge)
    parts = everything(clients, theta, vector)
    parts["minibatch"] = clients.gradient(theta, keys=keys, batch_size=3)
    for name, answer in parts.items():
        close(answer, whole[name])


def test_chunks_bound_what_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = stack("module")
    assert isinstance(clients, ModuleClients)
    # Saved by a row: input 4, hidden 3 after the first layer, 3 outputs and their likelihood; counted from outside.
    assert FEATURES + 3 + CLASSES <= clients._cost <= 4 * (FEATURES + 3 + CLASSES)
    calls: list[int] = []
    forward = ModuleClients._forward

    def spy(self: ModuleClients, theta: Tensor, x: Tensor) -> Tensor:
        calls.append(x.shape[0])
        return forward(self, theta, x)

    monkeypatch.setattr(ModuleClients, "_forward", spy)
    monkeypatch.setattr(module_module, "_CHUNK", 2 * CHAINS * clients._cost)
    monkeypatch.setattr(module_module, "_MERGE", 1)
    clients.gradient(normal(CHAINS, clients.d))
    assert max(calls) == 2
    assert sum(calls) == sum(SIZES)
    calls.clear()
    monkeypatch.setattr(module_module, "_CHUNK", 1 << 25)
    monkeypatch.setattr(module_module, "_MERGE", 1 << 22)
    clients.gradient(normal(CHAINS, clients.d))
    assert len(calls) < sum(size > 0 for size in SIZES)  # small clients share a call


@pytest.mark.rounding
@pytest.mark.parametrize("kind", STACKS)
def test_single_precision_is_close_to_double(kind: str) -> None:
    double, single = stack(kind), stack(kind, torch.float32)
    theta, vector = normal(CHAINS, double.d), normal(CHAINS, double.d, seed=5)
    want, got = everything(double, theta, vector), everything(single, theta.float(), vector.float())
    keys = batch_keys(double.n)
    want["minibatch"] = double.gradient(theta, keys=keys, batch_size=2)
    got["minibatch"] = single.gradient(theta.float(), keys=keys, batch_size=2)
    for name, answer in got.items():
        assert answer.dtype == (F64 if name == "potential" else torch.float32), name
        close(answer, want[name], name, SEES[torch.float32])
        if name == "gradient":
            assert not torch.equal(answer.double(), want[name])


# --- minibatches -----------------------------------------------------------------------------------------------------


def batch_keys(n: int, chains: int = CHAINS, round: int = 0, first: int = 0) -> Key:
    clients = torch.arange(first, first + n).unsqueeze(-1)
    return key(7, client=clients, chain=torch.arange(chains), purpose="batch").fold(round)


def keys_of_all_batches(rows: int, size: int) -> Key:
    """(1, binomial(rows, size)) keys, one for each set of rows that a client may draw."""
    many = key(3, purpose="enumerate").fold(torch.arange(40 * len(list(itertools.combinations(range(rows), size)))))
    positions, valid = draw_rows(Key(many.tensor().unsqueeze(0)), torch.tensor([rows]), size)
    assert bool(valid.all())
    found = {tuple(sorted(drawn)): at for at, drawn in enumerate(positions[0].tolist())}
    assert sorted(found) == list(itertools.combinations(range(rows), size))
    return Key(many.tensor()[list(found.values())].unsqueeze(0))


def assert_unbiased(gradient: Callable[..., Tensor], clients: Clients, keys: Key, size: int) -> None:
    """The mean over all batches, each as likely as the next, is the full gradient."""
    theta = normal(1, clients.d)
    estimates = gradient(theta.expand(keys.shape[1], -1), keys=keys, batch_size=size)
    close(estimates.mean(1), clients.gradient(theta)[:, 0])
    assert float(estimates.std(1).max()) > 1e-3


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["glm", "module"])
def test_minibatches_are_unbiased(kind: str, size: int) -> None:
    client = stack(kind).client(0)
    keys = keys_of_all_batches(SIZES[0], size)
    assert_unbiased(client.gradient, client, keys, size)

    def unscaled(theta: Tensor, **given: Any) -> Tensor:
        return client.gradient(theta, **given) * size / SIZES[0]

    def fixed(theta: Tensor, keys: Key, batch_size: int) -> Tensor:
        return client.gradient(theta, keys=Key(keys.tensor()[:, :1].expand(-1, len(theta))), batch_size=batch_size)

    for mutant in (unscaled, fixed):
        with pytest.raises(AssertionError):
            assert_unbiased(mutant, client, keys, size)


@pytest.mark.parametrize("kind", ["glm", "module"])
def test_minibatches_of_a_ragged_stack(kind: str) -> None:
    clients = stack(kind)
    theta = normal(1, clients.d).expand(CHAINS, -1)
    keys, full = batch_keys(clients.n), clients.gradient(theta)
    estimate = clients.gradient(theta, keys=keys, batch_size=3)
    assert torch.equal(clients.gradient(theta, keys=keys, batch_size=3), estimate)  # the same twice in a round
    rows = clients.rows
    close(estimate[rows <= 3], full[rows <= 3])  # a client with no more rows uses them all
    larger = rows > 3
    for other in (full, clients.gradient(theta, keys=batch_keys(clients.n, round=1), batch_size=3), estimate.flip(1)):
        assert not bool(torch.isclose(estimate[larger], other[larger]).all(-1).any())  # by round, and by chain
    close(clients.gradient(theta, keys=keys, batch_size=max(SIZES)), full)
    close(clients.gradient(theta, keys=keys, batch_size=100), full)
    assert torch.equal(clients.gradient(theta, keys=keys), full)
    for i in range(clients.n):
        alone = clients.client(i).gradient(theta, keys=batch_keys(1, first=i), batch_size=3)
        close(alone[0], estimate[i])
    some = torch.tensor([3, 1, 0])
    drawn = clients.gradient(theta, clients=some, keys=Key(keys.tensor()[some]), batch_size=3)
    close(drawn, estimate[some])


def assert_every_set_equally_likely(positions: Tensor, rows: int, size: int) -> None:
    """Counts of each set of rows within 5 standard errors; positions (draws, size)."""
    draws = len(positions)
    sets = list(itertools.combinations(range(rows), size))
    seen = [tuple(sorted(each)) for each in positions.tolist()]
    p = 1 / len(sets)
    for each in sets:
        assert abs(seen.count(each) - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5, each


def test_every_minibatch_is_equally_likely() -> None:
    rows, size, draws = 5, 2, 4000
    keys = Key(key(11, purpose="batch").fold(torch.arange(draws)).tensor().unsqueeze(0))
    positions, valid = draw_rows(keys, torch.tensor([rows]), size)
    assert bool(valid.all())
    assert_every_set_equally_likely(positions[0], rows, size)
    with_replacement = keys.integers(rows, size)[0]
    first_rows = torch.arange(size).expand(draws, -1)
    neighbours = (keys.integers(rows, 1)[0] + torch.arange(size)) % rows
    for mutant in (with_replacement, first_rows, neighbours):
        with pytest.raises(AssertionError):
            assert_every_set_equally_likely(mutant, rows, size)


def test_what_a_client_draws_does_not_depend_on_the_others() -> None:
    rows = torch.tensor([5, 0, 300, 1])
    keys = batch_keys(4)
    positions, valid = draw_rows(keys, rows, 4)
    assert valid.sum(-1).tolist() == [[4, 4], [0, 0], [4, 4], [1, 1]]
    for i in range(4):
        alone, counted = draw_rows(Key(keys.tensor()[i : i + 1]), rows[i : i + 1], 4)
        assert torch.equal(alone[counted], positions[i : i + 1][valid[i : i + 1]])


# --- the posterior ---------------------------------------------------------------------------------------------------


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
