r"""Quadratic clients, U_i(x) = (x - a_i)^T H_i (x - a_i) / 2: every linear sampler has exact moments on them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsample.random import Key
from fedsample.targets.base import Clients, collapsed


class Quadratic(Clients):
    """Quadratic clients, the potentials of Gaussian laws.

    Args:
        curvature: (n, d) diagonal curvatures lambda_i >= 0, or (n, d, d) symmetric Hessians H_i.
        center: (n, d) the centres a_i, whose dtype and device the stack takes.
    """

    def __init__(self, curvature: Tensor, center: Tensor) -> None:
        self.curvature, self.center = curvature, center
        self.n, self.d = center.shape
        self.dtype, self.device = center.dtype, center.device
        self.rows = torch.ones(self.n, dtype=torch.int64, device=self.device)
        self._dense = curvature.dim() == 3

    def _apply(self, vector: Tensor, clients: Tensor | None = None) -> Tensor:
        """H_i times (n, C, d)."""
        curvature = self.curvature if clients is None else self.curvature[clients]
        if self._dense:
            return torch.matmul(vector, curvature)
        return curvature.unsqueeze(1) * vector

    def _offset(self, theta: Tensor, clients: Tensor | None = None) -> Tensor:
        center = self.center if clients is None else self.center[clients]
        return collapsed(theta, len(center)) - center.unsqueeze(1)  # (n, C, d)

    def potential(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C) float64."""
        offset = self._offset(theta)
        return 0.5 * (offset * self._apply(offset)).sum(-1, dtype=torch.float64)

    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d); a quadratic client counts as one row, so every minibatch is all of it."""
        offset = self._offset(theta, clients)
        if self._dense:
            return self._apply(offset, clients)
        curvature = self.curvature if clients is None else self.curvature[clients]
        return offset.mul_(curvature.unsqueeze(1))  # in place: for a large vector, memory costs more than arithmetic

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(C, d) or (n, C, d) -> (n, C) float64 and (n, C, d)."""
        offset = self._offset(theta)
        gradient = self._apply(offset)
        return 0.5 * (offset * gradient).sum(-1, dtype=torch.float64), gradient

    def hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """Two of (C, d) or (n, C, d) -> (n, C, d)."""
        return self._apply(collapsed(vector, self.n).expand(self.n, *vector.shape[-2:]))

    def hessian(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d, d), the same at every point."""
        dense = self.curvature if self._dense else torch.diag_embed(self.curvature)
        return dense.unsqueeze(1).expand(self.n, theta.shape[-2], self.d, self.d)

    def diagonal(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d)."""
        diagonal = self.curvature.diagonal(dim1=-2, dim2=-1) if self._dense else self.curvature
        return diagonal.unsqueeze(1).expand(self.n, theta.shape[-2], self.d)

    def blocks(self) -> list[Tensor]:
        """One block (d, 1): a quadratic has no parameter matrices, so its Kronecker factor is the Hessian."""
        return [torch.arange(self.d, device=self.device).unsqueeze(1)]

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """H_i and its trace."""
        full = self.hessian(theta.unsqueeze(0))[:, 0]
        return [(full, full.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None])]

    def subset(self, clients: Tensor) -> Quadratic:
        """Some of the clients."""
        return Quadratic(self.curvature[clients], self.center[clients])
