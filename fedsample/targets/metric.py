r"""Metrics: changes of coordinates theta = m + S z; chains, gradients and compression work in z.

With S S^T near the inverse Hessian at the mode m, the target in z has curvature near one in every direction, and a
step that is stable in the stiffest direction is not tiny in the flattest. S is fixed before sampling from one sum over
clients, so kernels, estimators, compressors and their exact laws apply in z unchanged: U(m + S z) is just another
target. S is symmetric here, S = P^{-1/2} for the chosen approximation P of the Hessian of U.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from fedsample.errors import DivergenceError
from fedsample.random import Key
from fedsample.targets.base import Clients, GaussianPrior, collapsed
from fedsample.targets.memory_limits import Portions


class Metric(ABC):
    """The map theta = m + S z with a symmetric S; all methods act on (..., d)."""

    name: ClassVar[str]

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    @abstractmethod
    def scale(self, z: Tensor) -> Tensor:
        """S z."""

    @abstractmethod
    def unscale(self, theta: Tensor) -> Tensor:
        """S^{-1} theta."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors that define S, without the mean, for storing a run."""

    def wire(self) -> dict[str, Tensor]:
        """Tensors that the server sends once, without the mean; clients need S, but not its inverse."""
        return self.tensors()

    def about(self, mean: Tensor) -> Metric:
        """The same S with another mean."""
        moved = copy(self)
        moved.mean = mean
        return moved

    def push(self, z: Tensor) -> Tensor:
        """theta = m + S z."""
        return self.mean + self.scale(z)

    def pull(self, gradient: Tensor) -> Tensor:
        """Convert a gradient in theta into one in z: S^T g."""
        return self.scale(gradient)

    def invert(self, theta: Tensor) -> Tensor:
        """z = S^{-1} (theta - m)."""
        return self.unscale(theta - self.mean)

    @abstractmethod
    def bits(self, dtype: torch.dtype) -> int:
        """Bits on the wire of S."""


def _width(dtype: torch.dtype) -> int:
    return 8 * torch.empty((), dtype=dtype).element_size()


class Identity(Metric):
    """S = I: the coordinates are the parameters, relative to the mean."""

    name: ClassVar[str] = "identity"

    def scale(self, z: Tensor) -> Tensor:
        """z itself."""
        return z

    def unscale(self, theta: Tensor) -> Tensor:
        """theta itself."""
        return theta

    def tensors(self) -> dict[str, Tensor]:
        """No tensors."""
        return {}

    def bits(self, dtype: torch.dtype) -> int:
        """Nothing travels."""
        return 0


class Diagonal(Metric):
    """S = diag(s)."""

    name: ClassVar[str] = "diagonal"

    def __init__(self, mean: Tensor, scales: Tensor) -> None:
        super().__init__(mean)
        self.scales = scales

    @classmethod
    def of_precision(cls, mean: Tensor, precision: Tensor) -> Diagonal:
        """From the diagonal (d,) of the Hessian of U."""
        measured = precision > _floor(precision, torch.float64)  # each entry by itself: scales may differ widely
        return cls(mean, torch.where(measured, precision, _floor(precision, precision.dtype)).rsqrt().to(mean.dtype))

    def scale(self, z: Tensor) -> Tensor:
        """S z, elementwise."""
        return z * self.scales

    def unscale(self, theta: Tensor) -> Tensor:
        """Division by s."""
        return theta / self.scales

    def tensors(self) -> dict[str, Tensor]:
        """The scales (d,)."""
        return {"scales": self.scales}

    def bits(self, dtype: torch.dtype) -> int:
        """The d diagonal entries."""
        return _width(dtype) * len(self.scales)


MOST_DENSE = 5000  # largest number of parameters for the full Hessian metric


class Dense(Metric):
    """S = P^{-1/2}, a full symmetric matrix.

    Attributes:
        unmeasured: number of directions too flat, relative to the others, to be resolved at P's precision; they get the
            scale of the smallest curvature that is inverted.
        narrowed: number of directions that were resolved, but are so flat that they get that scale too.
    """

    name: ClassVar[str] = "hessian"
    unmeasured = narrowed = 0

    def __init__(self, mean: Tensor, root: Tensor, inverse: Tensor | None) -> None:
        super().__init__(mean)
        self.root, self.inverse = root, inverse

    @classmethod
    def of_precision(cls, mean: Tensor, precision: Tensor) -> Dense:
        """From the Hessian (d, d) of U at the mode; concave directions count as flat.

        Raises:
            DivergenceError: if the Hessian is not finite.
        """
        values, vectors, unmeasured = _eigen(precision)
        floor = _floor(values, torch.float64)
        narrowed, values = int((values < floor).sum()), values.clamp(min=floor)
        root = (vectors * values.rsqrt()) @ vectors.T
        inverse = (vectors * values.sqrt()) @ vectors.T
        metric = cls(mean, mirrored(root.to(mean.dtype)), inverse.to(mean.dtype))
        metric.unmeasured, metric.narrowed = unmeasured, max(0, narrowed - unmeasured)
        return metric

    def scale(self, z: Tensor) -> Tensor:
        """S z: one matrix product."""
        return (z.reshape(-1, z.shape[-1]) @ self.root).view(z.shape)

    def unscale(self, theta: Tensor) -> Tensor:
        """P^{1/2} theta; only on the server, since only S travels.

        Raises:
            ValueError: if this metric came over the wire, without its inverse.
        """
        if self.inverse is None:
            raise ValueError("this metric came over the wire, without its inverse")
        return (theta.reshape(-1, theta.shape[-1]) @ self.inverse).view(theta.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The symmetric root (d, d) and its inverse."""
        return {"root": self.root} if self.inverse is None else {"root": self.root, "inverse": self.inverse}

    def wire(self) -> dict[str, Tensor]:
        """The symmetric root."""
        return {"root": self.root}

    def bits(self, dtype: torch.dtype) -> int:
        """A symmetric matrix: d (d + 1) / 2 entries."""
        d = len(self.mean)
        return _width(dtype) * (d * (d + 1) // 2)


class Kronecker(Metric):
    """Blockwise S = (V_B x V_A) diag(s) (V_B x V_A)^T over parameter matrices, from Kronecker factors."""

    name: ClassVar[str] = "kronecker"

    def __init__(self, mean: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        super().__init__(mean)
        self.parts = list(parts)  # positions (o, i), V_B (o, o), V_A (i, i), s (o, i)

    @classmethod
    def of_factors(
        cls, mean: Tensor, blocks: list[Tensor], factors: list[tuple[Tensor, Tensor]], precision: float
    ) -> Kronecker:
        """From summed factors B (o, o), A (i, i) for each block (see `Clients.factors`) and the prior's precision."""
        parts = []
        for positions, (outer, inner) in zip(blocks, factors, strict=True):
            b, v_b = torch.linalg.eigh(outer.to(torch.float64))
            a, v_a = torch.linalg.eigh(inner.to(torch.float64))
            trace = inner.diagonal().sum(dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
            curvature = b.clamp(min=0)[:, None] * a.clamp(min=0)[None, :] / trace + precision
            scales = curvature.clamp(min=_floor(curvature, outer.dtype)).rsqrt()
            # Stored row-major, as a restored metric has them: a product of the transposed layout rounds differently.
            v_b, v_a = v_b.to(mean.dtype).contiguous(), v_a.to(mean.dtype).contiguous()
            parts.append((positions, v_b, v_a, scales.to(mean.dtype)))
        return cls(mean, parts)

    def _apply(self, x: Tensor, act: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        result = torch.empty_like(x)
        for positions, v_b, v_a, scales in self.parts:
            flat = positions.flatten()
            block = v_b.T @ x[..., flat].reshape(*x.shape[:-1], *positions.shape) @ v_a
            result[..., flat] = (v_b @ act(block, scales) @ v_a.T).flatten(-2)
        return result

    def scale(self, z: Tensor) -> Tensor:
        """S z, by small matrix products per block."""
        return self._apply(z, torch.mul)

    def unscale(self, theta: Tensor) -> Tensor:
        """S^{-1} theta."""
        return self._apply(theta, torch.div)

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvectors and scales of every block."""
        return {
            f"{name}{b}": tensor
            for b, part in enumerate(self.parts)
            for name, tensor in zip(("positions", "outer", "inner", "scales"), part, strict=True)
        }

    def wire(self) -> dict[str, Tensor]:
        """The tensors without the positions, which clients know from their model."""
        return {name: tensor for name, tensor in self.tensors().items() if not name.startswith("positions")}

    def bits(self, dtype: torch.dtype) -> int:
        """Two bases and the scales of every block."""
        return _width(dtype) * sum(tensor.numel() for tensor in self.wire().values())


def restore(name: str, mean: Tensor, tensors: dict[str, Tensor]) -> Metric:
    """Rebuild a metric from its `tensors`, on a client or in a resumed run."""
    if name == Identity.name:
        return Identity(mean)
    if name == Diagonal.name:
        return Diagonal(mean, tensors["scales"])
    if name == Dense.name:
        return Dense(mean, tensors["root"], tensors.get("inverse"))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    while f"positions{len(parts)}" in tensors:
        b = len(parts)
        parts.append((tensors[f"positions{b}"], tensors[f"outer{b}"], tensors[f"inner{b}"], tensors[f"scales{b}"]))
    return Kronecker(mean, parts)


def mirrored(matrix: Tensor) -> Tensor:
    """Make a nearly symmetric (..., d, d) exactly symmetric from its upper triangle, which is what travels."""
    upper = torch.triu(matrix)
    return upper + torch.triu(matrix, 1).transpose(-1, -2)


def _floor(curvature: Tensor, measured: torch.dtype) -> float:
    """Smallest curvature that a metric inverts; a direction below it counts as flat at the measured precision."""
    if not bool(torch.isfinite(curvature).all()):
        raise DivergenceError("the Hessian at the mode is not finite: is the data scaled, and the mode found?")
    top = float(curvature.max())
    if top <= 0:
        return 1.0  # without any curvature there is no scale
    return max(top * max(1e-12, 8 * torch.finfo(measured).eps), torch.finfo(torch.float32).tiny)


def _eigen(precision: Tensor) -> tuple[Tensor, Tensor, int]:
    """Eigenvalues (d,) and eigenvectors (d, d) in float64, and the number of directions too flat to be resolved.

    Entry P_jk was measured to a precision relative to sqrt(P_jj P_kk), however much the coordinates' scales differ. So
    a direction counts as unresolved by its curvature in coordinates scaled to unit diagonal.
    """
    measured, precision = precision.dtype, precision.to(torch.float64)
    if not bool(torch.isfinite(precision).all()):
        raise DivergenceError("the Hessian at the mode is not finite: is the data scaled, and the mode found?")
    precision = (precision + precision.T) / 2
    diagonal = precision.diagonal()
    most = float(diagonal.max())
    units = torch.where(diagonal > 0, diagonal, most if most > 0 else 1.0).sqrt()
    alike = precision / torch.outer(units, units)
    values = torch.linalg.eigvalsh(alike)
    floor = _floor(values, measured)
    if unmeasured := int((values < floor).sum()):
        values, vectors = torch.linalg.eigh(alike)
        known = (vectors * values.clamp(min=floor)) @ vectors.T
        precision = known * torch.outer(units, units)
    values, vectors = torch.linalg.eigh(precision)
    return values, vectors, unmeasured


class MetricClients(Clients):
    """Clients in the coordinates of a metric: gradients, and so compression, are in z."""

    def __init__(self, clients: Clients, metric: Metric) -> None:
        self.base, self.metric = clients, metric
        self.n, self.d, self.rows = clients.n, clients.d, clients.rows
        self.dtype, self.device = clients.dtype, clients.device
        self._portions = Portions(clients)
        self._same = isinstance(metric, Identity) and not bool(metric.mean.any())

    def _theta(self, z: Tensor, clients: int | None = None) -> Tensor:
        """The parameters at z; without a copy if they are z itself, since the model may be large."""
        z = collapsed(z, self.n if clients is None else clients)
        return z if self._same else self.metric.push(z)

    def potential(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C) float64."""
        return self.base.potential(self._theta(theta))

    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d): S^T times the gradient at m + S z.

        Raises:
            DeviceMemoryError: if it does not fit the device's memory, even in portions.
        """
        point = self._theta(theta, None if clients is None else len(clients))
        return self.metric.pull(self._portions.gradient(point, clients=clients, keys=keys, batch_size=batch_size))

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(C, d) or (n, C, d) -> (n, C) float64 and (n, C, d)."""
        values, gradients = self._portions.value_and_gradient(self._theta(theta))
        return values, self.metric.pull(gradients)

    def hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """S^T H S v."""
        return self.metric.pull(self.base.hvp(self._theta(theta), self.metric.scale(collapsed(vector, self.n))))

    def hessian(self, theta: Tensor) -> Tensor:
        """S^T H S -> (n, C, d, d)."""
        half = self.metric.scale(self.base.hessian(self._theta(theta)))
        return self.metric.scale(half.transpose(-1, -2)).transpose(-1, -2)

    def diagonal(self, theta: Tensor) -> Tensor:
        """Diagonal of S^T H S."""
        if isinstance(self.metric, Identity):
            return self.base.diagonal(self._theta(theta))
        return self.hessian(theta).diagonal(dim1=-2, dim2=-1)

    def blocks(self) -> list[Tensor]:
        """The model's parameter matrices if S = I; other coordinates mix them, so there is a single block."""
        if isinstance(self.metric, Identity):
            return self.base.blocks()
        return [torch.arange(self.d, device=self.device).unsqueeze(1)]

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The model's factors if S = I, else S^T H S and its trace."""
        if isinstance(self.metric, Identity):
            return self.base.factors(self._theta(theta))
        full = self.hessian(theta.unsqueeze(0))[:, 0]
        return [(full, full.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None])]

    def subset(self, clients: Tensor) -> MetricClients:
        """Some of the clients, in the same coordinates."""
        return MetricClients(self.base.subset(clients), self.metric)


class MetricPrior:
    """The prior in the coordinates of a metric; exact, computed by the server, never compressed."""

    def __init__(self, prior: GaussianPrior, metric: Metric) -> None:
        self.base, self.metric = prior, metric
        pulled = metric.pull(prior.gradient(metric.mean))
        self._at_mean = pulled  # (d,)
        self._square = prior.precision * metric.root @ metric.root if isinstance(metric, Dense) else None

    def potential(self, z: Tensor) -> Tensor:
        """(..., d) -> (...) float64."""
        return self.base.potential(self.metric.push(z))

    def gradient(self, z: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if self.base.precision == 0:
            return torch.zeros_like(z)
        if self._square is not None:  # one product with precision S^2 in place of two with S
            return self._at_mean + (z.reshape(-1, z.shape[-1]) @ self._square).view(z.shape)
        return self._at_mean + self.metric.pull(self.base.gradient(self.metric.scale(z)))
