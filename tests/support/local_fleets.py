"""Local fleets on small problems: two with the same keys, step by step, and what must agree."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fedsample.clients.client_stack import ClientStack
from fedsample.compression import Identity as NoCompression
from fedsample.compression import RandK
from fedsample.estimators import Links, Uplink, Upload, build
from fedsample.fleets.faults import Faults
from fedsample.fleets.local import Engine, LocalFleet
from fedsample.protocol.exchange import Aggregate, Request
from fedsample.random import key
from fedsample.strategies import Baoab, Cohort, Driver, Langevin, Stability, State
from fedsample.targets import Clients, GaussianPrior, GeneralizedLinear, Quadratic
from fedsample.targets.metric import Identity

FLOAT64 = torch.float64
SEED, CHAINS, ROUNDS = 11, 3, 20
UPLINKS = ["dense", "marina", "diana"]
ENGINES: list[Engine] = ["batched", "by-client"]
PARTICIPATION: list[float | int] = [1.0, 0.5, 2]
AWAY = {"dropout": 0.1, "dropout_rounds": 3.0}
FAULTS = [{}, {"loss": 0.2}, AWAY, {"loss": 0.2, **AWAY}]


def quadratic(n: int = 5, d: int = 6, dtype: torch.dtype = FLOAT64, *, dense: bool = False) -> Quadratic:
    draws = key(1, purpose="quadratic").normal(2 * n * d, dtype).view(2, n, d)
    if not dense:
        return Quadratic(draws[0].abs() + 0.2, draws[1])
    root = key(2, purpose="root").normal(n * d * d, dtype).view(n, d, d)
    return Quadratic(root @ root.transpose(-1, -2) / d, draws[1])


def softmax(offsets: tuple[int, ...] = (0, 7, 7, 30, 55, 60), dtype: torch.dtype = FLOAT64) -> GeneralizedLinear:
    """Five clients with 7, 0, 23, 25 and 5 rows; three classes."""
    keys = key(3, purpose="softmax")
    x, y = keys.normal(offsets[-1] * 4, dtype).view(-1, 4), keys.fold("labels").integers(3, offsets[-1])
    return GeneralizedLinear(x, y, torch.tensor(offsets), "categorical", 3)


def make_uplink(name: str, compressor: Any = None, p: float | None = None) -> Uplink:
    if name == "dense":
        return build(name, NoCompression())
    return build(name, compressor or RandK(0.34), (0.3 if p is None else p) if name == "marina" else None)


class Rig:
    """A sampler over a local fleet, with every request, aggregate and answer written down."""

    def __init__(
        self,
        clients: Clients,
        uplink: str | Uplink,
        *,
        engine: Engine = "batched",
        participation: float | int = 1.0,
        batch_size: int | None = None,
        kernel: Literal["langevin", "baoab"] = "langevin",
        step_size: float = 0.02,
        observe: bool = False,
        **faults: float,
    ) -> None:
        self.uplink = make_uplink(uplink) if isinstance(uplink, str) else uplink
        self.faults = Faults(clients.n, SEED, **faults)
        self.fleet = LocalFleet(
            clients, self.uplink, SEED, CHAINS, batch_size=batch_size, engine=engine, faults=self.faults
        )
        self.observe = observe
        common: dict[str, Any] = {"step_size": step_size, "temperature": 1.0, "seed": SEED}
        self.sampler = Driver(
            Langevin(**common) if kernel == "langevin" else Baoab(friction=1.0, **common),
            Links(self.uplink),
            GaussianPrior(1.0),
            Identity(torch.zeros(clients.d, dtype=clients.dtype)),
            cohort=Cohort(clients.n, CHAINS, SEED, participation),
            stability=Stability(1.0, 1.0, 1e6),
        )
        self.state = self.sampler.begin(torch.ones(CHAINS, clients.d, dtype=clients.dtype))
        self.requests: list[Request] = []
        self.aggregates: list[Aggregate] = []
        self.answers: list[list[Upload]] = []
        for worker in self.fleet.workers:
            self._tap(worker)

    def _tap(self, worker: ClientStack) -> None:
        original = worker.estimate

        def estimate(request: Request, who: Tensor | None = None) -> Upload:
            upload = original(request, who)
            if self.answers:
                self.answers[-1].append(clone(upload))  # the memory may keep and change the same tensors
            return upload

        worker.estimate = estimate  # type: ignore[method-assign]

    def exchange(self, request: Request) -> Aggregate:
        self.answers.append([])
        self.requests.append(request)
        self.aggregates.append(self.fleet.exchange(request))
        return self.aggregates[-1]

    def run(self, rounds: int) -> State:
        for _ in range(rounds):
            request = self.sampler.request(self.state, observe=self.observe)
            self.state = self.sampler.update(self.state, request, self.exchange(request))
        return self.state

    def uploads(self, at: int) -> list[Upload]:
        """One upload for each client that answered in exchange `at`, in client order."""
        return [single(stack, i) for stack in self.answers[at] for i in range(clients_of(stack))]


def clients_of(upload: Upload) -> int:
    values = upload.dense if upload.packet is None else upload.packet.values
    assert values is not None
    return len(values)


def clone(upload: Upload) -> Upload:
    packet = upload.packet
    if packet is not None:
        packet = packet._replace(
            values=packet.values.clone(), indices=None if packet.indices is None else packet.indices.clone()
        )
    return Upload(packet, None if upload.dense is None else upload.dense.clone())


def single(upload: Upload, i: int) -> Upload:
    packet = upload.packet
    if packet is not None:
        packet = packet._replace(values=packet.values[i], indices=None if packet.indices is None else packet.indices[i])
    return Upload(packet, None if upload.dense is None else upload.dense[i])


def asked_clients(rig: Rig, at: int) -> list[int]:
    """Who was reached in exchange `at`: wanted for some chain, and present unless everyone is waited for."""
    request = rig.requests[at]
    wanted = torch.ones(rig.fleet.n, dtype=torch.bool) if request.active is None else request.active.any(-1)
    waits = rig.uplink.needs_everyone_to_sync and request.sync is not None
    present: Tensor | None = None
    for earlier in rig.requests[: at + 1]:
        present = rig.faults.present(earlier.round, present)
    assert present is not None
    return (wanted if waits else wanted & present).nonzero().squeeze(-1).tolist()
