r"""The target: pi(theta) ∝ exp(-U(theta) / T) with U = U_0 + sum_i U_i.

U_i is client i's negative log-likelihood summed over its rows, up to constants; U_0, the negative log-prior, is the
server's. `Clients` is a stack of n clients that computes for all of them together; a device holds the same class with
n = 1. A client without rows contributes zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsample.errors import CompileError
from fedsample.random import Key


def collapsed(points: Tensor, clients: int) -> Tensor:
    """Return (C, d) where all clients have the same points (n, C, d), so that shared points are computed as such.

    Raises:
        ValueError: if there are points for another number of clients.
    """
    if points.ndim <= 2:
        return points
    if points.ndim != 3 or len(points) != clients:
        raise ValueError(f"points of shape {tuple(points.shape)} for {clients} clients, expected (C, d) or (n, C, d)")
    if clients and (points.stride(0) == 0 or bool((points[1:] == points[:1]).all())):
        return points[0]
    return points


class Clients(ABC):
    """Potentials U_i of n clients and their derivatives at C points, shared (C, d) or each client's own (n, C, d).

    At shared points both give equal bits. A client alone has n = 1.

    Attributes:
        n: number of clients.
        d: number of parameters.
        rows: (n,) number of rows of each client.
        dtype: dtype of all arrays.
        device: device of all arrays.
    """

    n: int
    d: int
    rows: Tensor
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def potential(self, theta: Tensor) -> Tensor:
        """U_i at (C, d) or (n, C, d) -> (n, C) float64."""

    @abstractmethod
    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Gradient of U_i at (C, d) or (n, C, d) -> (n, C, d); n is m where m clients are given by index.

        Points of their own are those of the given clients, in that order. With a batch size, an unbiased estimate from
        that many rows without replacement, drawn by `keys` (m, C) and scaled by N_i / min(batch, N_i).
        """

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """U_i (n, C) float64 and its gradient (n, C, d) at (C, d) or (n, C, d), in one pass where a model can."""
        return self.potential(theta), self.gradient(theta)

    @abstractmethod
    def hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """Hessian of U_i at (C, d) or (n, C, d) times vectors of either shape -> (n, C, d)."""

    @abstractmethod
    def hessian(self, theta: Tensor) -> Tensor:
        """Hessian of U_i at (C, d) or (n, C, d) -> (n, C, d, d); of networks the Fisher, which is never indefinite."""

    @abstractmethod
    def diagonal(self, theta: Tensor) -> Tensor:
        """Diagonal of `hessian` at (C, d) or (n, C, d) -> (n, C, d)."""

    @abstractmethod
    def blocks(self) -> list[Tensor]:
        """Parameter matrices for Kronecker factors: flat positions, int64 (out, in) each, together all d."""

    @abstractmethod
    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute for each block the factors B (n, out, out), A (n, in, in) of the Fisher at (d,), with tr B = tr A.

        F restricted to the block is approximated by B x A / tr A: with F = sum u u^T over matrices u, B = sum u u^T and
        A = sum u^T u.
        """

    def on(self, engine: str) -> Clients:
        """The same clients with gradients computed by another engine, sharing their data; names in `fleets.engines`.

        Raises:
            CompileError: if the engine cannot serve these clients or this machine.
        """
        if engine == "compiled":
            raise CompileError("only linear and logistic clients on a CPU are compiled, not these")
        if engine == "cuda-graph":
            raise CompileError("only regressions and networks on a GPU are recorded as a CUDA graph, not these")
        return self

    @abstractmethod
    def subset(self, clients: Tensor) -> Clients:
        """A stack of some of the clients, in the given order."""

    def client(self, i: int) -> Clients:
        """A stack of client i alone, as its device holds it."""
        return self.subset(torch.tensor([i], device=self.device))


@dataclass(frozen=True)
class GaussianPrior:
    """U_0(theta) = precision |theta|^2 / 2, up to a constant; precision 0 is the flat prior.

    Attributes:
        precision: 1 / scale^2 >= 0, the same for all parameters.
    """

    precision: float

    @classmethod
    def of_scale(cls, scale: float | None) -> GaussianPrior:
        """Prior N(0, scale^2) on every parameter; None: flat."""
        return cls(0.0 if scale is None else 1.0 / scale**2)

    def potential(self, theta: Tensor) -> Tensor:
        """U_0 at (..., d) -> (...) float64."""
        return 0.5 * self.precision * theta.to(torch.float64).square().sum(-1)

    def gradient(self, theta: Tensor) -> Tensor:
        """Gradient of U_0 at (..., d) -> (..., d)."""
        return self.precision * theta
