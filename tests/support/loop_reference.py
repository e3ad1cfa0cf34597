"""Potentials of clients on a loop, by autograd: the reference for closed forms, networks and stacks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from running_error import RunningError
from torch import Tensor, nn
from torch.func import jacrev

from fedsample.models.dense import Mlp
from fedsample.random import Key, key
from fedsample.targets import Clients, GeneralizedLinear, ModuleClients, Quadratic
from fedsample.targets.glm import Likelihood

SIZES = (5, 0, 1, 9, 3)  # ragged, a client without rows and one with a single row
FEATURES, CLASSES, SIGMA, CHAINS = 4, 3, 0.7, 2
LIKELIHOODS: tuple[Likelihood, ...] = ("gaussian", "bernoulli", "categorical")
F64 = torch.float64
Potential = Callable[[Tensor, Tensor, Tensor], Tensor]  # theta (d,), x (rows, ...), y (rows,) -> ()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


_UNDER: list[RunningError] = []


@contextmanager
def analysed() -> Iterator[None]:
    """A running error analysis, which says how far `close` lets two ways part."""
    with RunningError() as analysis:
        _UNDER.append(analysis)
        try:
            yield
        finally:
            _UNDER.pop()


def close(got: Tensor, want: Tensor, what: str = "", sees: float | None = None) -> None:
    _UNDER[-1].close(got, want, what=what, sees=sees)


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


def potential_of(likelihood: Likelihood, outputs: Callable[[Tensor, Tensor], Tensor]) -> Potential:
    return lambda theta, x, y: negative_log_likelihood(likelihood, outputs(theta, x), y)


def on_a_loop(function: Callable[..., Tensor], theta: Tensor, x: Tensor, y: Tensor, offsets: Tensor) -> Tensor:
    """The function (theta, x, y) of every client and chain, one at a time: (n, C, ...)."""
    spans = list(itertools.pairwise(offsets.tolist()))
    return torch.stack([torch.stack([function(point, x[a:b], y[a:b]) for point in theta]) for a, b in spans])


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


def everything(clients: Clients, theta: Tensor, vector: Tensor) -> dict[str, Tensor]:
    """Every answer of a stack, with the clients on the first axis."""
    answers = {
        "potential": clients.potential(theta),
        "gradient": clients.gradient(theta),
        "hvp": clients.hvp(theta, vector),
        "hessian": clients.hessian(theta),
        "diagonal": clients.diagonal(theta),
        **dict(zip(("value", "its gradient"), clients.value_and_gradient(theta), strict=True)),
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


def batch_keys(n: int, chains: int = CHAINS, round: int = 0, first: int = 0) -> Key:
    clients = torch.arange(first, first + n).unsqueeze(-1)
    return key(7, client=clients, chain=torch.arange(chains), purpose="batch").fold(round)
