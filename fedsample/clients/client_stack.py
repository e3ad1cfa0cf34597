"""A stack of clients computed together: all clients of a simulation, or the one client of a device.

Each client owns its data, its estimator memory and its keyed draws. The same code serves n = 1 and n = 10,000: every
array has the clients on its first axis.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedsample.clients.oracle import Reference, _TurnOracle
from fedsample.compression import LinkKeys
from fedsample.estimators import Memory, Turn, Uplink, Upload
from fedsample.protocol.answers import Answer
from fedsample.protocol.exchange import ESTIMATE, Request
from fedsample.protocol.quantities import QUANTITIES, exact_names, widest
from fedsample.random import key
from fedsample.targets import Clients, Metric, MetricClients
from fedsample.targets.memory_limits import on_device
from fedsample.targets.metric import Identity

_ENTRIES = 1 << 20  # entries of clients' matrices that are held at a time


class ClientStack:
    """Computes the answers of a stack of clients to `Request`s, and keeps their memories.

    Args:
        clients: their potentials, in the model's own parameters.
        uplink: the estimator.
        seed: the experiment's seed.
        chains: C.
        indices: (n,) int64, indices of these clients in the federation.
        batch_size: rows per gradient; None: all.

    Raises:
        DeviceMemoryError: if the clients' memories do not fit the device's memory.
    """

    def __init__(
        self, clients: Clients, uplink: Uplink, seed: int, chains: int, indices: Tensor, batch_size: int | None = None
    ) -> None:
        self.base, self.uplink, self.chains = clients, uplink, chains
        self.batch_size = batch_size
        self.indices = indices
        device = clients.device
        self._link = LinkKeys(seed, indices, chains, "uplink", device)
        chain = torch.arange(chains, device=device)
        batches = key(seed, client=indices.unsqueeze(-1), chain=chain, purpose="batch", device=device)
        self._batches = batches.fold("round")
        self.clients = MetricClients(clients, Identity(torch.zeros(clients.d, dtype=clients.dtype, device=device)))
        with on_device(clients, chains, "the clients' memories"):
            self.memory: Memory = uplink.memory((clients.n, chains, clients.d), clients.dtype, device)
        self.about = Reference(clients.n)
        self._whole = torch.equal(indices, torch.arange(len(indices), device=device))

    def set_metric(self, metric: Metric) -> None:
        """Set the metric in whose coordinates points arrive from now on."""
        self.clients = MetricClients(self.base, metric)
        self.about = Reference(self.base.n)

    def forget_reference(self) -> None:
        """Discard the gradients kept at the reference of variance reduction; they are computed again."""
        self.about = Reference(self.base.n)

    def answer(self, request: Request) -> Answer:
        """Answer everything that the request asks for, for all clients.

        Raises:
            DeviceMemoryError: if it does not fit the device's memory.
        """
        exact = self._evaluate(self.clients, request)
        return Answer(self.estimate(request) if ESTIMATE in request.outputs else None, exact)

    def exact(self, request: Request) -> Iterator[dict[str, Tensor]]:
        """Yield the exact outputs (m, ...) by name, for m clients at a time whose matrices fit a few MiB.

        Raises:
            DeviceMemoryError: if m clients' outputs do not fit the device's memory.
        """
        most = max(1, _ENTRIES // widest(self.clients, request))
        if most >= self.base.n:
            yield self._evaluate(self.clients, request)
            return
        for run in torch.arange(self.base.n, device=self.indices.device).split(most):
            yield self._evaluate(self.clients.subset(run), request)

    def _evaluate(self, clients: MetricClients, request: Request) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in exact_names(request):
            with on_device(self.base, self.chains, f"the {name}"):
                found |= QUANTITIES[name].evaluate(clients, request.points, request.vector)
        return found

    def turn(self, request: Request, who: Tensor | None = None) -> Turn:
        """Return the part of a request that the estimator uses, for the clients at positions `who`."""
        mine = self.indices if who is None else self.indices[who]
        if request.applied is None:
            applied = torch.zeros_like(mine)
        elif self._whole and who is None and len(request.applied) == len(mine):
            applied = request.applied  # indexing by all clients in order costs as much as some gradients
        else:
            applied = request.applied[mine]
        return Turn(
            round=request.round,
            point=request.points,
            previous=request.previous,
            sync=request.sync,
            active=None if request.active is None else request.active[mine],
            applied=applied,
            epoch=request.epoch,
            keys=self._link.at(request.round, who),
        )

    def estimate(self, request: Request, who: Tensor | None = None) -> Upload:
        """Compute the uploads of the clients at positions `who` (None: all), and update their memories.

        Raises:
            DeviceMemoryError: if it does not fit the device's memory.
        """
        oracle = _TurnOracle(self.clients, who, self._batches, self.batch_size, request, self.about)
        memory = self.memory if who is None else {name: tensor[who] for name, tensor in self.memory.items()}
        with on_device(self.base, self.chains, f"the {ESTIMATE}"):
            upload, memory = self.uplink.encode(oracle, memory, self.turn(request, who))
        if who is None:
            self.memory = memory
        else:
            for name, tensor in memory.items():
                self.memory[name][who] = tensor
        return upload
