r"""Any `nn.Module` as a likelihood, by automatic differentiation; agrees with the closed forms of `glm.py`.

With outputs f(theta, x) in R^K for a row x, and l the negative log-likelihood of its target,

    U_i = sum over rows of l(f(theta, x), y),     constants dropped.

Gradients and Hessian-vector products are exact, by reverse mode and by reverse over reverse. `hessian` and what is made
from it is the Fisher information, which is here the generalised Gauss-Newton matrix (Schraudolph 2002, Neural
Computation 14(7); equal for these likelihoods: Martens 2020, JMLR 21(146), section 9.2):

    F_i = sum over rows of J^T Lambda J = sum u u^T,   J = df / dtheta,  Lambda = d^2 l / df^2 = L L^T,

over the K columns u of J^T L of every row. It is never indefinite, and is the Hessian where f is linear in theta.

For a small network, dispatch of a call costs more than its arithmetic. So clients of similar size are padded to one
length and computed together, with weight 0 on the padding, until a call is large; larger ones are computed one by one,
in runs of rows that bound memory, and without `vmap`, whose convolutions take 1.7 times as long. Which of these happens
depends on shapes alone. On a GPU the engine `cuda-graph` replays such calls, with one recording per shape, bit for bit;
see `cuda_graphs.py`.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jacrev, vmap

from fedsample.errors import ConfigError
from fedsample.random import Key
from fedsample.targets.base import Clients, collapsed
from fedsample.targets.cuda_graphs import CudaRecorder, Replayed
from fedsample.targets.glm import Likelihood
from fedsample.targets.minibatch import draw_rows

_CHUNK = 1 << 25  # array entries that the rows of one call may take
_MERGE = 1 << 22  # below this many a call is mostly dispatch, and clients are computed together
_ALONE = 1 << 18  # from this many on a client is computed alone: its convolutions take longer among others
_PADDING = 1.5  # rows with padding against rows without, for clients computed together


_Choice = tuple[list[int], Tensor, Tensor]  # clients by position, their rows (g, b) or (g, C, b), and their weights


class _Rows(NamedTuple):
    """Rows of g clients, padded to b: shared by all chains, or (with a chain axis second) a minibatch for each."""

    x: Tensor  # (g, b, ...) or (g, C, b, ...)
    y: Tensor  # (g, b) or (g, C, b)
    weight: Tensor  # the same, float64


def skeleton(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters: a call swaps them, which no two threads may do in one module."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


class _Skeleton:
    """A copy of a module, called with given parameters: `functional_call` at a tenth of its cost.

    Args:
        module: the module; its structure is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = skeleton(module)
        places: dict[nn.Parameter, list[tuple[dict[str, nn.Parameter | None], str]]] = {}
        for name, own in self._module.named_parameters(remove_duplicate=False):  # a tied parameter has several places
            owner, _, leaf = name.rpartition(".")
            places.setdefault(own, []).append((self._module.get_submodule(owner)._parameters, leaf))
        self._places = list(places.items())

    def __call__(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """The outputs of rows x, with `parameters` in the order of `named_parameters`."""
        try:
            for (_, places), each in zip(self._places, parameters, strict=True):
                for held, leaf in places:
                    held[leaf] = each  # type: ignore[assignment]
            outputs: Tensor = self._module(x)
        finally:
            for own, places in self._places:
                for held, leaf in places:
                    held[leaf] = own
        return outputs


def _add(result: Tensor, run: list[int], gradients: Tensor) -> None:
    """Add (g, C, d) to the entries `run` of result (m, C, d), without copying an index to the device."""
    first, after = run[0], run[0] + len(run)
    if run == list(range(first, after)):
        result[first:after] += gradients
        return
    for at, gradient in zip(run, gradients, strict=True):
        result[at] += gradient


class ModuleClients(Clients):
    """Clients of one network over ragged data.

    Args:
        module: maps (B, ...) to (B, K), each row by itself, without buffers, as `fedsample.models.build` makes it. Its
            own parameter values do not matter: a copy of its structure is kept.
        x: (N, ...) rows sorted by client.
        y: (N,) integer labels below K (categorical), 0 / 1 (bernoulli), or targets (gaussian).
        offsets: (n + 1,) int64, client i owns rows offsets[i] : offsets[i + 1].
        likelihood: the law of a target given the outputs; K = 1 unless categorical.
        noise_scale: sigma of the Gaussian likelihood.

    Raises:
        ConfigError: if the module has buffers, or the wrong number or shape of outputs.
    """

    def __init__(
        self,
        module: nn.Module,
        x: Tensor,
        y: Tensor,
        offsets: Tensor,
        likelihood: Likelihood,
        *,
        noise_scale: float = 1.0,
    ) -> None:
        self.x, self.dtype, self.device = x, x.dtype, x.device
        self.likelihood: Likelihood = likelihood
        self.noise_scale = noise_scale
        self.labels = y.to(torch.int64 if likelihood == "categorical" else self.dtype)
        self._module = copy.deepcopy(module).to("meta")
        self._skeletons: dict[int, _Skeleton] = {}
        self._drawn: tuple[Key, list[int], int, list[_Choice]] | None = None  # the last minibatches, at two points
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._lengths = [shape.numel() for shape in self._shapes.values()]
        self.offsets = offsets.to(torch.int64)
        self._bounds: list[int] = self.offsets.tolist()
        self.rows = (self.offsets[1:] - self.offsets[:-1]).to(self.device)
        self.n, self.d = len(offsets) - 1, sum(self._lengths)
        self.outputs, self._cost = self._measure()
        self._replayed: Replayed | None = None
        self._whole: dict[int, list[_Choice]] = {}  # by number of chains, the pieces of all rows, where they are kept

    def on(self, engine: str) -> ModuleClients:
        """The same clients, with gradients computed by another engine.

        Raises:
            CompileError: if the engine cannot serve these clients or this machine.
        """
        if engine == "compiled":
            super().on(engine)
        twin = copy.copy(self)
        twin._replayed, twin._whole = None, {}
        if engine == "cuda-graph":
            recorder = CudaRecorder(self.device)
            row = torch.zeros(1, min(1, len(self.x)), dtype=torch.int64, device=self.device)
            example = (self.x.new_zeros(1, self.d), row, row.to(torch.float64))
            twin._replayed = Replayed(self._piece, example, recorder)
        return twin

    def _measure(self) -> tuple[int, int]:
        """Measure K, and the array entries that one row keeps alive in a backward pass."""
        buffers = [name for name, _ in self._module.named_buffers()]
        if buffers:
            raise ConfigError(
                f"the module has buffers ({', '.join(buffers)}), expected parameters only: batch statistics tie rows "
                "together; normalise each row by itself, as fedsample.models does"
            )
        theta = torch.zeros(self.d, dtype=self.dtype, device=self.device, requires_grad=True)
        saved = [0, 0]
        for rows in (1, 2):

            def count(tensor: Tensor, rows: int = rows) -> Tensor:
                saved[rows - 1] += tensor.numel()
                return tensor

            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                outputs = self._forward(theta, self.x.new_zeros(rows, *self.x.shape[1:]))
        wanted = "(2, K) with K >= 2" if self.likelihood == "categorical" else "(2, 1)"
        if outputs.ndim != 2 or len(outputs) != 2 or (outputs.shape[1] > 1) != (self.likelihood == "categorical"):
            raise ConfigError(
                f"the module maps 2 rows to shape {tuple(outputs.shape)}, expected {wanted} for a {self.likelihood} "
                "likelihood: change its last layer"
            )
        row = self.x.shape[1:].numel()
        return int(outputs.shape[1]), saved[1] - saved[0] + row + outputs.shape[1]

    # --- one client, one chain -----------------------------------------------------------------------------------

    def _forward(self, theta: Tensor, x: Tensor) -> Tensor:
        """(d,), (b, ...) -> (b, K)."""
        pieces = torch.split(theta, self._lengths)
        shaped = [piece.view(shape) for piece, shape in zip(pieces, self._shapes.values(), strict=True)]
        return self._skeleton()(shaped, x)

    def _skeleton(self) -> _Skeleton:
        """This thread's copy of the module: the chain's and the monitor's thread use the clients concurrently."""
        thread = threading.get_ident()
        if thread not in self._skeletons:
            self._skeletons[thread] = _Skeleton(self._module)
        return self._skeletons[thread]

    def _loss(self, theta: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum over b rows of l, float64."""
        outputs = self._forward(theta, x)  # (b, K)
        if self.likelihood == "categorical":
            values = torch.logsumexp(outputs, -1) - outputs.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        elif self.likelihood == "bernoulli":
            logit = outputs.squeeze(-1)
            values = -nn.functional.logsigmoid(-logit) - y * logit
        else:
            values = (outputs.squeeze(-1) - y).square() / (2 * self.noise_scale**2)
        return (values.to(torch.float64) * weight).sum()

    def _product(self, theta: Tensor, vector: Tensor, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The Hessian of `_loss` times a vector (d,)."""
        product: Tensor = grad(lambda point: torch.dot(grad(self._loss)(point, x, y, weight), vector))(theta)
        return product

    # --- many clients, many chains -------------------------------------------------------------------------------

    def _runs(self, sizes: list[int], burden: list[int], chains: int) -> Iterator[list[int]]:
        """Yield the positions of clients that are computed together; clients without rows are left out.

        Args:
            sizes: number of rows of each client.
            burden: array entries that each client takes per chain, besides those of its rows.
            chains: number of chains C.
        """
        run: list[int] = []
        rows = entries = 0
        for at in sorted((at for at, size in enumerate(sizes) if size), key=sizes.__getitem__):
            padded = sizes[at] * (len(run) + 1)
            full = chains * (padded * self._cost + entries + burden[at]) > _MERGE
            if run and (full or padded > _PADDING * (rows + sizes[at]) or self._is_large(sizes[at])):
                yield run
                run, rows, entries = [], 0, 0
            run.append(at)
            rows, entries = rows + sizes[at], entries + burden[at]
        if run:
            yield run

    def _is_large(self, rows: int) -> bool:
        """Whether this many rows of one client and chain get a call of their own."""
        return rows * self._cost >= _ALONE

    def _passes(self, clients: list[int], chains: int) -> Iterator[tuple[list[int], _Rows]]:
        """Yield all rows of the clients in pieces: positions in the list, and their rows."""
        for run, index, weight in self._pieces(clients, chains):
            yield run, self._take(index, weight)

    def _pieces(self, clients: list[int], chains: int) -> Iterator[_Choice]:
        """Yield the same pieces as row indices (g, b) and weights."""
        sizes = [self._bounds[i + 1] - self._bounds[i] for i in clients]
        for run in self._runs(sizes, [self.d] * len(sizes), chains):
            start = torch.tensor([self._bounds[clients[at]] for at in run], device=self.device).unsqueeze(-1)  # (g, 1)
            held = torch.tensor([sizes[at] for at in run], device=self.device).unsqueeze(-1)
            position = torch.arange(sizes[run[-1]], device=self.device)  # the last of a run is its largest
            for piece in torch.split(position, max(1, _CHUNK // (len(run) * chains * self._cost))):
                yield run, (start + piece).clamp_(max=len(self.x) - 1), (piece < held).to(torch.float64)

    def _take(self, index: Tensor, weight: Tensor) -> _Rows:
        """Take rows by index; padding takes any row, with weight 0."""
        return _Rows(self.x[index], self.labels[index], weight)

    def _each(self, function: Callable[..., Tensor], points: tuple[Tensor, ...], rows: _Rows) -> Tensor:
        """Apply a function of (d,) points and one client's rows to all clients and chains -> (g, C, ...).

        Points are (C, d), or (g, C, d) with each client's own.
        """
        values: Tensor = self._mapped(function, points, rows)
        return values.transpose(0, 1)

    def _both(
        self, function: Callable[..., tuple[Tensor, Tensor]], points: tuple[Tensor, ...], rows: _Rows
    ) -> tuple[Tensor, Tensor]:
        """The same for a function of two results."""
        one, other = self._mapped(function, points, rows)
        return one.transpose(0, 1), other.transpose(0, 1)

    def _mapped(self, function: Callable[..., Any], points: tuple[Tensor, ...], rows: _Rows) -> Any:
        """Results (C, g, ...) of a function, chains first."""
        chain = 1 if rows.y.ndim == 3 else None
        inner = vmap(function, in_dims=(*(None if point.ndim == 2 else 0 for point in points), 0, 0, 0))
        outer = vmap(inner, in_dims=(*(point.ndim - 2 for point in points), chain, chain, chain))
        return outer(*(point.detach() for point in points), *rows)

    def potential(self, theta: Tensor) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C) float64."""
        theta = collapsed(theta, self.n)
        result = torch.zeros(self.n, theta.shape[-2], dtype=torch.float64, device=self.device)
        with torch.no_grad():
            for run, rows in self._passes(list(range(self.n)), theta.shape[-2]):
                result[run] += self._each(self._loss, (_of(theta, run),), rows)
        return result

    def gradient(
        self, theta: Tensor, *, clients: Tensor | None = None, keys: Key | None = None, batch_size: int | None = None
    ) -> Tensor:
        """(C, d) or (n, C, d) -> (n, C, d), or (m, C, d) for some clients; minibatches by key."""
        theta = collapsed(theta, self.n if clients is None else len(clients))
        chains, shared = theta.shape[-2], theta.ndim == 2
        chosen = list(range(self.n)) if clients is None else clients.tolist()
        result = self.x.new_zeros(len(chosen), chains, self.d)
        if batch_size is not None and keys is not None:
            pieces: Iterable[_Choice] = self._minibatches(chosen, keys, batch_size, chains)
        elif clients is None and self._replayed is not None and shared:
            pieces = self._kept_pieces(chains)
        else:
            pieces = self._pieces(chosen, chains)
        for run, index, weight in pieces:
            if self._replayed is not None and shared:
                _add(result, run, self._replayed(theta, index, weight))
            elif self._is_alone(index):
                rows = self._take(index, weight)
                for c, point in enumerate(_of(theta, run[0])):
                    result[run[0], c] += self._alone(point, rows, c)[1]
            else:
                result[run] += self._each(grad(self._loss), (_of(theta, run),), self._take(index, weight))
        return result

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """(C, d) or (n, C, d) -> (n, C) float64 and (n, C, d); one forward pass for both."""
        theta = collapsed(theta, self.n)
        chains = theta.shape[-2]
        values = torch.zeros(self.n, chains, dtype=torch.float64, device=self.device)
        gradients = self.x.new_zeros(self.n, chains, self.d)
        for run, index, weight in self._pieces(list(range(self.n)), chains):
            rows = self._take(index, weight)
            if self._is_alone(index):
                for c, point in enumerate(_of(theta, run[0])):
                    value, gradient = self._alone(point, rows, c)
                    values[run[0], c] += value
                    gradients[run[0], c] += gradient
            else:
                gradient, value = self._both(grad_and_value(self._loss), (_of(theta, run),), rows)
                values[run] += value
                gradients[run] += gradient
        return values, gradients

    def _piece(self, theta: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """The gradients (g, C, d) of some clients' rows (g, b) or (g, C, b)."""
        rows = self._take(index, weight)
        if self._is_alone(index):
            return torch.stack([self._alone(theta[c], rows, c)[1] for c in range(len(theta))]).unsqueeze(0)
        return self._each(grad(self._loss), (theta,), rows)

    def _is_alone(self, index: Tensor) -> bool:
        return len(index) == 1 and self._is_large(index.shape[-1])

    def _alone(self, point: Tensor, rows: _Rows, chain: int) -> tuple[Tensor, Tensor]:
        """One client's loss and gradient (d,) for one chain by plain reverse mode; `vmap` is slower here."""
        mine = (each[0, chain] if rows.y.ndim == 3 else each[0] for each in rows)
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            value = self._loss(leaf, *mine)
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    def _kept_pieces(self, chains: int) -> list[_Choice]:
        if chains not in self._whole:
            self._whole[chains] = list(self._pieces(list(range(self.n)), chains))
        return self._whole[chains]

    def _minibatches(self, clients: list[int], keys: Key, size: int, chains: int) -> Iterator[_Choice]:
        """Yield the rows drawn for each client and chain, in pieces."""
        last = self._drawn
        if last is None or last[0] is not keys or last[1] != clients or last[2] != size:
            last = self._drawn = (keys, clients, size, list(self._choose(clients, keys, size, chains)))
        for run, index, weight in last[3]:
            step = max(1, _CHUNK // (len(run) * chains * self._cost))
            for piece, share in zip(torch.split(index, step, -1), torch.split(weight, step, -1), strict=True):
                yield run, piece, share

    def _choose(self, clients: list[int], keys: Key, size: int, chains: int) -> Iterator[_Choice]:
        """Draw the rows (g, C, b) of each client and chain, and their weights."""
        held = [self._bounds[i + 1] - self._bounds[i] for i in clients]
        words = keys.tensor()
        for run in self._runs([min(size, rows) for rows in held], [self.d + rows for rows in held], chains):
            rows = torch.tensor([held[at] for at in run], device=self.device)
            start = torch.tensor([self._bounds[clients[at]] for at in run], device=self.device)
            position, valid = draw_rows(Key(words[run], keys.device), rows, size)  # (g, C, b)
            weight = valid * (rows / rows.clamp(max=size).to(torch.float64))[:, None, None]
            yield run, (start[:, None, None] + position).clamp_(max=len(self.x) - 1), weight

    def hvp(self, theta: Tensor, vector: Tensor) -> Tensor:
        """The exact Hessian of U_i at (C, d) or (n, C, d) times a vector of either shape -> (n, C, d)."""
        theta, vector = collapsed(theta, self.n), collapsed(vector, self.n)
        chains = theta.shape[-2]
        result = self.x.new_zeros(self.n, chains, self.d)
        for run, rows in self._passes(list(range(self.n)), chains):
            result[run] += self._each(self._product, (_of(theta, run), _of(vector, run)), rows)
        return result

    # --- Fisher information --------------------------------------------------------------------------------------

    def _columns(self, theta: Tensor, client: int) -> Iterator[Tensor]:
        """The columns u of J^T L of a client's rows at (d,), in pieces (rows, K, d)."""
        row = jacrev(lambda point, x: self._forward(point, x.unsqueeze(0)).squeeze(0))
        step = max(1, _CHUNK // (self.outputs * (self._cost + 2 * self.d)))
        for x in torch.split(self.x[self._bounds[client] : self._bounds[client + 1]], step):
            if len(x) == 0:
                continue
            jacobian = vmap(row, in_dims=(None, 0))(theta.detach(), x)  # (rows, K, d)
            if self.likelihood == "gaussian":
                yield jacobian / self.noise_scale
                continue
            with torch.no_grad():
                outputs = self._forward(theta, x)  # (rows, K)
            if self.likelihood == "bernoulli":
                deviation = (torch.sigmoid(outputs) * torch.sigmoid(-outputs)).sqrt()
                yield jacobian * deviation.unsqueeze(-1)
                continue
            p = torch.softmax(outputs, -1).unsqueeze(-1)  # diag(p) - p p^T = L L^T with L = (I - p 1^T) diag(sqrt p)
            yield (jacobian - (p * jacobian).sum(1, keepdim=True)) * p.sqrt()

    def hessian(self, theta: Tensor) -> Tensor:
        """Fisher information at (C, d) or (n, C, d) -> (n, C, d, d)."""
        theta = collapsed(theta, self.n)
        result = self.x.new_zeros(self.n, theta.shape[-2], self.d, self.d)
        for i in range(self.n):
            for c, point in enumerate(_of(theta, i)):
                for columns in self._columns(point, i):
                    flat = columns.flatten(0, 1)
                    result[i, c].addmm_(flat.T, flat)
        return result

    def diagonal(self, theta: Tensor) -> Tensor:
        """Diagonal of the Fisher information at (C, d) or (n, C, d) -> (n, C, d)."""
        theta = collapsed(theta, self.n)
        result = self.x.new_zeros(self.n, theta.shape[-2], self.d)
        for i in range(self.n):
            for c, point in enumerate(_of(theta, i)):
                for columns in self._columns(point, i):
                    result[i, c] += columns.square().sum((0, 1))
        return result

    def blocks(self) -> list[Tensor]:
        """One block per parameter tensor: (out, rest) for weights, (length, 1) for vectors and scalars."""
        positions = torch.split(torch.arange(self.d, device=self.device), self._lengths)
        return [
            each.view(shape[0] if shape else 1, math.prod(shape[1:]))
            for each, shape in zip(positions, self._shapes.values(), strict=True)
        ]

    def factors(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Factors B (n, out, out) and A (n, rest, rest) of each block, at (d,)."""
        blocks = self.blocks()
        sums = [
            (self.x.new_zeros(self.n, len(block), len(block)), self.x.new_zeros(self.n, *(block.shape[1],) * 2))
            for block in blocks
        ]
        for i in range(self.n):
            for columns in self._columns(theta, i):
                parts = torch.split(columns, self._lengths, -1)
                for (outer, inner), block, part in zip(sums, blocks, parts, strict=True):
                    u = part.reshape(-1, *block.shape)  # (rows K, out, rest)
                    across, along = u.transpose(0, 1).flatten(1), u.flatten(0, 1)
                    outer[i].addmm_(across, across.T)
                    inner[i].addmm_(along.T, along)
        return sums

    def subset(self, clients: Tensor) -> ModuleClients:
        """Some of the clients, with their rows."""
        spans = [(self._bounds[i], self._bounds[i + 1]) for i in clients.tolist()]
        sizes = torch.tensor([0] + [high - low for low, high in spans])
        if len(spans) == 1:  # a view, no copy
            x, y = self.x[slice(*spans[0])], self.labels[slice(*spans[0])]
        else:
            x = torch.cat([self.x[:0], *(self.x[low:high] for low, high in spans)])
            y = torch.cat([self.labels[:0], *(self.labels[low:high] for low, high in spans)])
        return ModuleClients(self._module, x, y, torch.cumsum(sizes, 0), self.likelihood, noise_scale=self.noise_scale)


def _of(points: Tensor, run: int | list[int]) -> Tensor:
    """Points of one client (C, d) or of some (g, C, d): their own, or shared (C, d)."""
    return points if points.ndim == 2 else points[run]
