r"""Linear, logistic and softmax regression in closed form, batched over clients and chains.

With design rows x (a one appended for the intercept), W (k, q) and eta = W x:

    linear     U = sum (y - eta)^2 / (2 sigma^2)        residual r = (eta - y) / sigma^2      Lambda = 1 / sigma^2
    logistic   U = sum log(1 + e^eta) - y eta           r = s(eta) - y                        Lambda = s (1 - s)
    softmax    U = sum logsumexp(eta) - eta_y           r = softmax(eta) - e_y                Lambda = diag(p) - p p^T

    grad U = sum r x^T,      Hessian U = sum Lambda (x) x x^T.

The rows of all clients are stacked: one product with the design serves all clients and chains, and one product per
client gathers its gradient. The outputs are on a leading axis, since a softmax over a short last axis is ten times
slower. Parameters are flat as in `torch.nn.Linear`: weight (k, p) row-major, then bias (k,).

Full gradients have other engines, which agree up to rounding: `stacked` works through runs of clients that stay in the
cache between the two products, `compiled` reads each row once (see `fused.py`), `cuda-graph` replays what `stacked`
does on a GPU (see `cuda_graphs.py`), bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from fedsample.errors import CompileError
from fedsample.random import Key
from fedsample.targets.base import Clients, collapsed
from fedsample.targets.cuda_graphs import CudaRecorder, Replayed
from fedsample.targets.fused import FusedGradient
from fedsample.targets.minibatch import draw_rows

Likelihood = Literal["gaussian", "bernoulli", "categorical"]

_CHUNK = 1 << 24  # entries of the largest intermediate array
_CACHED = 1 << 20  # bytes of design that stay in a second-level cache from one product to the next


class GeneralizedLinear(Clients):
    """Regression clients over ragged data.

    Args:
        x: (N, p) rows sorted by client.
        y: (N,) integer labels below `outputs` (categorical), 0 / 1 (bernoulli), or targets (gaussian).
        offsets: (n + 1,) int64, client i owns rows offsets[i] : offsets[i + 1].
        likelihood: "gaussian" (linear), "bernoulli" (logistic) or "categorical" (softmax).
        outputs: k, the number of classes; 1 unless categorical.
        intercept: whether the parameters end with a bias.
        noise_scale: sigma of the Gaussian likelihood.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        offsets: Tensor,
        likelihood: Likelihood,
        outputs: int = 1,
        *,
        intercept: bool = True,
        noise_scale: float = 1.0,
    ) -> None:
        self.dtype, self.device = x.dtype, x.device
        self.features, self.outputs, self.intercept = x.shape[1], outputs, intercept
        self.likelihood: Likelihood = likelihood
        self.noise_scale = noise_scale
        self.design = torch.cat([x, x.new_ones(len(x), 1)], dim=1) if intercept else x.contiguous()  # (N, q)
        self.labels = y
        self._targets = self._one_hot(y)  # (k, N)
        self.offsets = offsets.to(torch.int64)
        self._bounds: list[int] = self.offsets.tolist()
        self.rows = (self.offsets[1:] - self.offsets[:-1]).to(self.device)
        self.n, self.d = len(offsets) - 1, outputs * self.design.shape[1]
        self._runs: list[tuple[int, int, bool]] | None = None
        self._fused: FusedGradient | None = None
        self._replayed: Replayed | None = None

    def on(self, engine: str) -> GeneralizedLinear:
        """The same clients, with full gradients computed by another engine.

        Raises:
            CompileError: if the engine cannot serve these clients or this machine.
        """
        twin = copy.copy(self)
        twin._runs = self._cached_runs() if engine == "stacked" else None
        twin._fused = self._fuse() if engine == "compiled" else None
        twin._replayed = self._replay() if engine == "cuda-graph" else None
        return twin

    def _cached_runs(self) -> list[tuple[int, int, bool]]:
        """Runs (first, last) of clients whose design fits the cache, and whether all have equally many rows, > 0."""
        at_once = _CACHED // self.dtype.itemsize if self.device.type == "cpu" else _CHUNK  # a GPU wants few launches
        budget = max(1, at_once // self.design.shape[1])
        sizes = [high - low for low, high in zip(self._bounds, self._bounds[1:], strict=False)]
        runs, first = [], 0
        for last in range(1, self.n + 1):
            rows = self._bounds[last] - self._bounds[first]
            if last == self.n or rows + sizes[last] > budget:
                runs.append((first, last, sizes[first] > 0 and len(set(sizes[first:last])) == 1))
                first = last
        return runs

    def _fuse(self) -> FusedGradient:
        if self.likelihood == "categorical" or self.device.type != "cpu":
            what = "softmax clients" if self.likelihood == "categorical" else f"clients on {self.device}"
            raise CompileError(f"only linear and logistic clients on a CPU are compiled, not {what}")
        logistic = self.likelihood == "bernoulli"
        return FusedGradient(self.design, self._targets[0], self.offsets, logistic, 1.0 / self.noise_scale**2)

    def _replay(self) -> Replayed:
        origin = self.design.new_zeros(1, self.d)
        return Replayed(self.on("stacked").gradient, (origin,), CudaRecorder(self.device))

    def _one_hot(self, y: Tensor) -> Tensor:
        if self.likelihood != "categorical":
            return y.to(self.dtype).unsqueeze(0)
        return torch.nn.functional.one_hot(y.to(torch.int64), self.outputs).T.to(self.dtype).contiguous()

    # --- parameters: flat <-> (k, q) -----------------------------------------------------------------------------

    def matrix(self, theta: Tensor) -> Tensor:
        """(..., d) -> (..., k, q)."""
        k, p = self.outputs, self.features
        weight = theta[..., : k * p].reshape(*theta.shape[:-1], k, p)
        return torch.cat([weight, theta[..., k * p :].unsqueeze(-1)], dim=-1) if self.intercept else weight

    def flat(self, matrix: Tensor) -> Tensor:
        """(..., k, q) -> (..., d)."""
        if not self.intercept:
            return matrix.flatten(-2)
        p = self.features
        return torch.cat([matrix[..., :p].flatten(-2), matrix[..., p]], dim=-1)

    def _positions(self) -> Tensor:
        """(k, q) flat position of every matrix entry."""
        return self.matrix(torch.arange(self.d, device=self.device))

    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """Outputs for given rows: theta (S, d), x (M, p) -> (S, k, M)."""
        rows = torch.cat([x.flatten(1), x.new_ones(len(x), 1)], dim=1) if self.intercept else x.flatten(1)
        return torch.matmul(self.matrix(theta), rows.T)

    # --- likelihood: outputs (C, k, N) ---------------------------------------------------------------------------

    def _outputs(self, matrix: Tensor, rows: slice) -> Tensor:
        """(C, k, q) -> (C, k, rows)."""
        c, k, q = matrix.shape
        return torch.mm(matrix.reshape(c * k, q), self.design[rows].T).view(c, k, -1)

    def _residual(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """dU / d eta, of the shape of the outputs; targets (k, rows) or (..., k, rows)."""
        if self.likelihood == "categorical":
            return torch.softmax(outputs, dim=-2).sub_(targets)
        if self.likelihood == "bernoulli":
            return torch.sigmoid(outputs).sub_(targets)
        return (outputs - targets) / self.noise_scale**2

    def _row_potential(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(C, k, rows) -> (C, rows)."""
        if self.likelihood == "categorical":
            return torch.logsumexp(outputs, dim=-2) - (outputs * targets).sum(-2)
        if self.likelihood == "bernoulli":
            # not softplus: PyTorch's is linear above 20, and off by 2e-9 there
            return -(torch.nn.functional.logsigmoid(-outputs) + outputs * targets).squeeze(-2)
        return ((outputs - targets).square() / (2 * self.noise_scale**2)).squeeze(-2)

    def _curve(self, outputs: Tensor, directions: Tensor) -> Tensor:
        """Lambda times directions, (C, k, rows) both."""
        if self.likelihood == "categorical":
            p = torch.softmax(outputs, dim=-2)
            weighted = p * directions
            return weighted - p * weighted.sum(-2, keepdim=True)
        if self.likelihood == "bernoulli":
            s = torch.sigmoid(outputs)
            return s * (1 - s) * directions
        return directions / self.noise_scale**2

    # --- Clients -------------------------------------------------------------------------------------------------

    def _groups(self, matrix: Tensor) -> Iterator[tuple[int, int]]:
        """Runs of successive clients whose outputs fit in a chunk; of one client each at points of their own."""
        if matrix.ndim == 4:
            yield from ((i, i + 1) for i in range(self.n))
            return
        chains = len(matrix)
        budget = max(1, _CHUNK // (chains * self.outputs))
        first = 0
        while first < self.n:
            last = first + 1
            while last < self.n and self._bounds[last + 1] - self._bounds[first] <= budget:
                last += 1
            yield first, last
            first = last

    def potential(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C) float64."""
        result = torch.zeros(self.n, theta.shape[-2], dtype=torch.float64, device=self.device)
        matrix = self.matrix(collapsed(theta, self.n))
        for first, last in self._groups(matrix):
            rows = slice(self._bounds[first], self._bounds[last])
            outputs = self._outputs(_of(matrix, first), rows)
            values = self._row_potential(outputs, self._targets[:, rows]).to(torch.float64)
            for i in range(first, last):
                result[i] = values[:, self._bounds[i] - rows.start : self._bounds[i + 1] - rows.start].sum(-1)
        return result

    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d), or (m, C, d) for some clients; minibatches by key."""
        theta = collapsed(theta, self.n if clients is None else len(clients))
        matrix = self.matrix(theta)
        if batch_size is not None and keys is not None:
            return self._batch_gradient(matrix, clients, keys, batch_size)
        shared = matrix.ndim == 3
        if self._fused is not None and shared:
            return self._fused(matrix[:, 0], clients)
        if self._replayed is not None and clients is None and shared:
            return self._replayed(theta)
        if self._runs is not None and clients is None and shared:
            return self._stacked_gradient(matrix, self._runs)
        if clients is not None:
            spans = [(i, i + 1) for i in clients.tolist()]
        else:
            spans = list(self._groups(matrix))
        parts = (
            (span, self._residual(self._outputs(_of(matrix, at), rows), self._targets[:, rows]))
            for at, (span, rows) in enumerate(self._rows(spans))
        )
        return self._gather(theta.shape[-2], self.n if clients is None else len(clients), parts)

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(C, d) or (n, C, d) -> (n, C) float64 and (n, C, d); outputs of the model are computed once for both."""
        values = torch.zeros(self.n, theta.shape[-2], dtype=torch.float64, device=self.device)
        matrix = self.matrix(collapsed(theta, self.n))

        def residuals() -> Iterator[tuple[tuple[int, int], Tensor]]:
            for (first, last), rows in self._rows(list(self._groups(matrix))):
                outputs, targets = self._outputs(_of(matrix, first), rows), self._targets[:, rows]
                each = self._row_potential(outputs, targets).to(torch.float64)
                for i in range(first, last):
                    values[i] = each[:, self._bounds[i] - rows.start : self._bounds[i + 1] - rows.start].sum(-1)
                yield (first, last), self._residual(outputs, targets)

        gradients = self._gather(theta.shape[-2], self.n, residuals())
        return values, gradients

    def _rows(self, spans: list[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], slice]]:
        for first, last in spans:
            yield (first, last), slice(self._bounds[first], self._bounds[last])

    def _gather(self, chains: int, m: int, parts: Iterator[tuple[tuple[int, int], Tensor]]) -> Tensor:
        """Sum of r x^T over each client's rows: (C, k, rows) for runs of clients -> (m, C, d)."""
        q = self.design.shape[1]
        result = self.design.new_empty(m, chains * self.outputs, q)
        at = 0
        for (first, last), residual in parts:
            flat = residual.reshape(chains * self.outputs, -1)
            start = self._bounds[first]
            for i in range(first, last):
                low, high = self._bounds[i], self._bounds[i + 1]
                torch.mm(flat[:, low - start : high - start], self.design[low:high], out=result[at])
                at += 1
        return self.flat(result.view(m, chains, self.outputs, q))

    def _stacked_gradient(self, matrix: Tensor, runs: list[tuple[int, int, bool]]) -> Tensor:
        """(C, k, q) -> (n, C, d), run by run; clients with equally many rows in one batched product."""
        chains, k, q = matrix.shape
        points = matrix.reshape(chains * k, q)
        result = self.design.new_empty(self.n, chains * k, q)
        for first, last, even in runs:
            start, end = self._bounds[first], self._bounds[last]
            design = self.design[start:end]
            outputs = design.mv(points[0]) if len(points) == 1 else torch.mm(points, design.T)
            outputs = outputs.view(chains, k, end - start)
            residual = self._residual(outputs, self._targets[:, start:end]).view(chains * k, end - start)
            if even:
                rows = residual.view(chains * k, last - first, -1).transpose(0, 1)
                torch.bmm(rows, design.view(last - first, -1, q), out=result[first:last])
                continue
            for i in range(first, last):
                low, high = self._bounds[i] - start, self._bounds[i + 1] - start
                torch.mm(residual[:, low:high], design[low:high], out=result[i])
        return self.flat(result.view(self.n, chains, k, q))

    def _batch_gradient(self, matrix: Tensor, clients: Tensor | None, keys: Key, size: int) -> Tensor:
        """Minibatch gradients (m, C, d), drawn per client and chain, in runs of clients that bound memory."""
        rows = self.rows if clients is None else self.rows[clients]
        start = (self.offsets[:-1] if clients is None else self.offsets[:-1][clients.cpu()]).to(self.device)
        chains = matrix.shape[-3]
        if len(self.design) == 0 or len(rows) == 0:
            return matrix.new_zeros(len(rows), chains, self.d)
        most, words = int(rows.max()), keys.tensor()
        step = max(1, _CHUNK // (chains * max(1, most, min(size, most) * self.design.shape[1])))
        parts = []
        for at in range(0, len(rows), step):
            run = slice(at, at + step)
            position, valid = draw_rows(Key(words[run], keys.device), rows[run], size)  # (g, C, b)
            index = (start[run, None, None] + position).clamp_(max=len(self.design) - 1)
            design = self.design[index]  # (g, C, b, q)
            mine = matrix if matrix.ndim == 3 else matrix[run]
            outputs = torch.matmul(mine, design.transpose(-1, -2))  # (g, C, k, b)
            residual = self._residual(outputs, self._targets[:, index].movedim(0, -2))
            weight = rows[run].to(self.dtype) / rows[run].clamp(min=1, max=size).to(self.dtype)
            parts.append(torch.matmul(residual * (valid * weight[:, None, None]).unsqueeze(-2), design))
        return self.flat(torch.cat(parts))

    def hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """Two of (C, d) or (n, C, d) -> (n, C, d)."""
        theta, vector = collapsed(theta, self.n), collapsed(vector, self.n)
        if theta.ndim != vector.ndim:
            theta, vector = (each.expand(self.n, *each.shape[-2:]) for each in (theta, vector))
        matrix, direction = self.matrix(theta), self.matrix(vector)
        parts = (
            (span, self._curve(self._outputs(_of(matrix, at), rows), self._outputs(_of(direction, at), rows)))
            for at, (span, rows) in enumerate(self._rows(list(self._groups(matrix))))
        )
        return self._gather(theta.shape[-2], self.n, parts)

    def _weights(self, matrix: Tensor, rows: slice) -> Tensor:
        """Lambda at one point (k, q) for some rows: (k, k, rows)."""
        outputs = self._outputs(matrix.unsqueeze(0), rows)  # (1, k, rows)
        unit = torch.eye(self.outputs, dtype=self.dtype, device=self.device).unsqueeze(-1)  # (k, k, 1)
        return self._curve(outputs.expand(self.outputs, -1, -1), unit.expand(-1, -1, outputs.shape[-1]))

    def hessian(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d, d)."""
        k, q = self.outputs, self.design.shape[1]
        result = self.design.new_empty(self.n, theta.shape[-2], self.d, self.d)
        points = self.matrix(collapsed(theta, self.n))
        order = torch.argsort(self._positions().flatten())
        for i, low, high in zip(range(self.n), self._bounds, self._bounds[1:], strict=False):
            design = self.design[low:high]
            for c, matrix in enumerate(_of(points, i)):
                weights = self._weights(matrix, slice(low, high))
                blocks = self.design.new_empty(k, q, k, q)
                for a in range(k):
                    for b in range(a, k):
                        product = (design * weights[a, b].unsqueeze(-1)).T @ design  # symmetric
                        blocks[a, :, b] = product
                        blocks[b, :, a] = product
                result[i, c] = blocks.reshape(self.d, self.d)[order][:, order]
        return result

    def diagonal(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d)."""
        result = self.design.new_empty(self.n, theta.shape[-2], self.d)
        square, points = self.design.square(), self.matrix(collapsed(theta, self.n))
        for i, low, high in zip(range(self.n), self._bounds, self._bounds[1:], strict=False):
            for c, matrix in enumerate(_of(points, i)):
                weights = self._weights(matrix, slice(low, high)).diagonal(dim1=0, dim2=1).T  # (k, rows)
                result[i, c] = self.flat(weights @ square[low:high])
        return result

    def blocks(self) -> list[Tensor]:
        """One block (k, q): the weight with its bias as a last column."""
        return [self._positions()]

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """B = sum |x|^2 Lambda (n, k, k) and A = sum tr(Lambda) x x^T (n, q, q) at (d,)."""
        matrix = self.matrix(theta)
        outer, inner = [], []
        for low, high in zip(self._bounds, self._bounds[1:], strict=False):
            design, weights = self.design[low:high], self._weights(matrix, slice(low, high))
            outer.append((weights * design.square().sum(-1)).sum(-1))
            inner.append((design * weights.diagonal(dim1=0, dim2=1).sum(-1).unsqueeze(-1)).T @ design)
        return [(torch.stack(outer), torch.stack(inner))]

    def subset(self, clients: Tensor) -> GeneralizedLinear:
        """Some of the clients, with their rows."""
        who = clients.tolist()
        sizes = torch.tensor([0] + [self._bounds[i + 1] - self._bounds[i] for i in who])
        if who and who == list(range(who[0], who[0] + len(who))):  # a view, no copy
            first, last = self._bounds[who[0]], self._bounds[who[-1] + 1]
            design, labels = self.design[first:last], self.labels[first:last]
        else:
            index = torch.cat([torch.arange(0), *(torch.arange(self._bounds[i], self._bounds[i + 1]) for i in who)])
            design, labels = self.design[index.to(self.device)], self.labels[index.to(self.device)]
        return GeneralizedLinear(
            design[:, : self.features],
            labels,
            torch.cumsum(sizes, 0),
            self.likelihood,
            self.outputs,
            intercept=self.intercept,
            noise_scale=self.noise_scale,
        )


def _of(matrix: Tensor, i: int) -> Tensor:
    """Points (C, k, q) of the client at position i: its own, or shared."""
    return matrix if matrix.ndim == 3 else matrix[i]
