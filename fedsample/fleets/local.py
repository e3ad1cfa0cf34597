"""All clients in this process: vectorised over clients and chains, or one client after the other.

The batched engine, and those that only take another path to its gradients, have the clients on the first axis of every
array. The by-client engine asks one worker per client, exactly as a fleet of devices does: same code, same bits. They
agree to the rounding of their matrix products, which have different shapes; every draw, mask, coin and order of
summation over clients is the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from fedsample.clients.client_stack import ClientStack
from fedsample.errors import RunDirectoryError
from fedsample.estimators import DenseDownlink, Downlink, Uplink, Upload
from fedsample.fleets.engines import Engine
from fedsample.fleets.faults import Faults
from fedsample.numerics.tree_sum import TreeSum, tree_sum
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request, Traffic
from fedsample.protocol.quantities import exact_forms, per_block, point_bits, unsound_outputs
from fedsample.targets import Clients, Metric
from fedsample.targets.memory_limits import on_device


class LocalFleet:
    """A simulated federation in this process.

    Args:
        clients: their potentials.
        uplink: the estimator.
        seed: the experiment's seed.
        chains: C.
        batch_size: rows per gradient; None: all.
        engine: how gradients are computed; see `fleets.engines`.
        faults: the simulated faults.
        downlink: counts the bits of the points; None: they are sent in full.

    Raises:
        CompileError: if the engine is not available for these clients or on this machine.
        DeviceMemoryError: if its state does not fit the device's memory.
    """

    def __init__(
        self,
        clients: Clients,
        uplink: Uplink,
        seed: int,
        chains: int,
        *,
        batch_size: int | None = None,
        engine: Engine = "batched",
        faults: Faults | None = None,
        downlink: Downlink | None = None,
    ) -> None:
        self.n, self.d, self.dtype, self.device = clients.n, clients.d, clients.dtype, clients.device
        self.uplink, self.chains, self.downlink = uplink, chains, downlink or DenseDownlink()
        self.faults = faults or Faults(self.n, seed)
        indices = torch.arange(self.n, device=self.device)
        self.engine: Engine = engine
        with on_device(clients, chains, f"the engine {engine}"):
            stacks = (
                [(clients.client(i), indices[i : i + 1]) for i in range(self.n)]
                if engine == "by-client"
                else [(clients.on(engine), indices)]
            )
        self.workers = [ClientStack(stack, uplink, seed, chains, index, batch_size) for stack, index in stacks]
        self._present: Tensor | None = None
        self._informed = torch.zeros(self.n, dtype=torch.int64)  # the last round whose points each client holds
        self._reference = torch.zeros(self.n, dtype=torch.int64)  # the round of each client's reference
        self._everyone = torch.ones(self.n, dtype=torch.bool)
        self._once = torch.ones(self.n, dtype=torch.int64)
        self._together: int | None = 0  # the round whose points all clients hold; None: not all hold the same
        self._bills: dict[tuple[object, ...], Traffic] = {}  # traffic of rounds with full participation, cached

    # --- the Fleet protocol --------------------------------------------------------------------------------------

    def set_metric(self, metric: Metric) -> Traffic:
        """Send m and S to every client."""
        for worker in self.workers:
            worker.set_metric(metric)
        return Traffic(down=self.n * (metric.bits(self.dtype) + point_bits(metric.mean)))

    def exchange(self, request: Request) -> Aggregate:
        """Make one round trip; exact outputs come from all clients, estimates from those whose reply arrives."""
        if ESTIMATE not in request.outputs:
            sums, traffic = self._exact(request, 0)
            return Aggregate(None, sums, self._everyone, 1.0, traffic)
        asked, arrived, arrival, attempts = self._participation(request)
        everyone = asked is self._everyone or bool(asked.all())
        uploads = self._ask(request, None if everyone else asked.nonzero().squeeze(-1).to(self.device))
        sums, exact_traffic = self._exact(request, self.n if everyone else int(asked.sum()))
        total, norms = self._decode(uploads, request, asked, arrived)
        traffic = self._bill(request) if attempts is self._once else self._traffic(request, asked, attempts)
        self._remember(request, None if everyone or exact_traffic.up else asked)
        self._reference[slice(None) if everyone else asked] = request.reference_round
        return Aggregate(total, sums, arrived, arrival, traffic.plus(exact_traffic), norms)

    def blocks(self) -> list[Tensor]:
        """Flat positions of the model's parameter matrices."""
        return self.workers[0].base.blocks()

    def state(self) -> dict[str, Tensor]:
        """Return the clients' memories, stacked over clients, and which clients are present."""
        stacked = {
            f"memory.{name}": torch.cat([worker.memory[name] for worker in self.workers])
            for name in self.workers[0].memory
        }
        stacked["informed"], stacked["reference"] = self._informed.clone(), self._reference.clone()
        about = [worker.about for worker in self.workers]
        if all(each.gradient is not None for each in about):
            stacked["reference.gradient"] = torch.cat([each.gradient for each in about])  # type: ignore[misc]
            stacked["reference.round"] = torch.cat([each.round for each in about])
        return stacked if self._present is None else {**stacked, "present": self._present}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`, on this fleet's device.

        Raises:
            RunDirectoryError: if the clients' memories belong to another uplink or compressor, or have another shape.
        """
        for name, fresh in self.workers[0].memory.items():
            kept, want = state.get(f"memory.{name}"), (self.n, *fresh.shape[1:])
            if kept is None or tuple(kept.shape) != want or kept.dtype != fresh.dtype:
                found = "missing" if kept is None else f"{kept.dtype} {list(kept.shape)}"
                raise RunDirectoryError(
                    f"the clients' memory '{name}' in the checkpoint is {found}, expected {fresh.dtype} {list(want)}: "
                    "it is of another uplink, compressor or number of chains; restore config.toml, or start a new run "
                    "in another directory"
                )
        self._present = state.get("present")
        nobody = torch.zeros(self.n, dtype=torch.int64)
        self._informed = state.get("informed", nobody).cpu().clone()
        held = set(self._informed.tolist())
        self._together = held.pop() if len(held) == 1 else None
        self._reference = state.get("reference", nobody).cpu().clone()
        for worker in self.workers:
            if "reference.round" in state:
                mine = worker.indices.cpu()
                worker.about.gradient = state["reference.gradient"][mine].to(self.device)
                worker.about.round = state["reference.round"][mine].clone()
            for name in worker.memory:
                worker.memory[name] = state[f"memory.{name}"].to(self.device)[worker.indices].clone()

    # --- who is there ---------------------------------------------------------------------------------------------

    def _participation(self, request: Request) -> tuple[Tensor, Tensor, float, Tensor]:
        """Who computes (n,), whose reply arrives (n,), its probability, and how often each is sent (n,) int64."""
        if request.active is None and not self.faults.any:
            return self._everyone, self._everyone, 1.0, self._once
        wanted = self._everyone if request.active is None else request.active.any(-1).cpu()
        once = wanted.to(torch.int64)
        if not self.faults.any:
            return wanted, wanted, 1.0, once
        self._present = self.faults.present(request.round, self._present)
        if self.uplink.needs_everyone_to_sync and request.sync is not None:
            return wanted, wanted, 1.0, once * self.faults.attempts(request.round)
        asked = wanted & self._present
        arrival = self.faults.presence * (1.0 - self.faults.loss)
        return asked, asked & self.faults.delivered(request.round), arrival, once * asked

    def _ask(self, request: Request, who: Tensor | None) -> list[Upload]:
        if len(self.workers) == 1 and self.n > 1:
            return [self.workers[0].estimate(request, who)]
        wanted = range(self.n) if who is None else who.tolist()
        return [self.workers[i].estimate(request) for i in wanted]

    # --- sums over clients ----------------------------------------------------------------------------------------

    def _decode(
        self, uploads: Sequence[Upload], request: Request, asked: Tensor, arrived: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Sum the uploads that arrived, in client order -> (C, d), and their norms (n,) if asked for."""
        if asked is arrived is self._everyone and len(uploads) == 1 and not request.observe:
            return tree_sum(self.uplink.decompress(uploads[0], request.sync, None, self.d)), None
        parts = []
        position = torch.cumsum(asked, 0) - 1
        owners = asked.nonzero().squeeze(-1)
        at = 0
        for upload in uploads:
            m = len(upload.dense if upload.packet is None else upload.packet.values)  # type: ignore[arg-type]
            mine = owners[at : at + m].to(self.device)
            active = None if request.active is None else request.active[mine]
            parts.append(self.uplink.decompress(upload, request.sync, active, self.d))
            at += m
        if not parts:  # no client was asked
            parts.append(torch.zeros(0, self.chains, self.d, dtype=self.dtype, device=self.device))
        contributions = torch.cat(parts) if len(parts) > 1 else parts[0]
        norms = None
        if request.observe:
            norms = torch.full((self.n,), float("nan"), dtype=torch.float64)
            norms[owners] = contributions.to(torch.float64).square().sum(-1).mean(-1).sqrt().cpu()
        if not torch.equal(arrived, asked):
            contributions = contributions[position[arrived].to(self.device)]
        if len(contributions) == 0:
            return torch.zeros(self.chains, self.d, dtype=self.dtype, device=self.device), norms
        return tree_sum(contributions), norms

    def _exact(self, request: Request, told: int) -> tuple[dict[str, Tensor], Traffic]:
        """Sum exact outputs over all clients, in client order; `told` clients have the points already."""
        if request.outputs == {ESTIMATE}:
            return {}, Traffic()
        if fault := unsound_outputs(request.outputs):
            raise ValueError(f"a request {fault}")
        totals: dict[str, TreeSum] = defaultdict(TreeSum)
        for worker in self.workers:
            for found in worker.exact(request):
                for name, terms in found.items():
                    for term in terms:
                        totals[name].add(term)
        sums = {name: total.total() for name, total in totals.items()}
        forms = exact_forms(request, self.workers[0].clients.blocks() if per_block(request.outputs) else [])
        up = self.n * sum(form.bits for form in forms.values())
        down = point_bits(request.points) + (0 if request.vector is None else point_bits(request.vector))
        return sums, Traffic(up, (self.n - told) * down, up)

    def _remember(self, request: Request, told: Tensor | None) -> None:
        """Record which clients hold this round's points; None: all."""
        if told is None:
            self._informed.fill_(request.round)
            self._together = request.round
        else:
            self._informed[told] = request.round
            self._together = None

    def _bill(self, request: Request) -> Traffic:
        """`_traffic` of a round with full participation, cached over rounds of equal cost."""
        if self._together is None or request.reference is not None:
            return self._traffic(request, self._everyone, self._once)
        missed = request.round - self._together if self._together > 0 else 0
        syncing = 0 if request.sync is None else int(request.sync.sum())
        coins = self.uplink.sync_probability(request.round, self.d) == 0
        case = (missed, syncing, coins, request.previous is None)
        if case not in self._bills:
            if len(self._bills) > 256:
                self._bills.clear()
            self._bills[case] = self._traffic(request, self._everyone, self._once)
        return self._bills[case]

    def _traffic(self, request: Request, asked: Tensor, attempts: Tensor) -> Traffic:
        """Bits of the estimate: what each client that was reached receives and sends."""
        width = 8 * torch.empty((), dtype=self.dtype).element_size()
        reached, sends = int(asked.sum()), int(attempts.sum())
        coins = 0 if self.uplink.sync_probability(request.round, self.d) == 0 else self.chains
        last = self._informed[asked]
        missed_by = torch.where(last > 0, request.round - last, 0)
        down = self.downlink.bits(missed_by, self.chains, self.d, self.dtype) + reached * coins
        more = 0  # further points, always sent in full
        if request.previous is not None:  # always sent under sampling, else to clients that missed the round before
            missed = asked if request.active is not None else asked & (self._informed != request.round - 1)
            more += int(missed.sum())
        if request.reference is not None and request.reference_round < request.round:
            more += int((self._reference[asked] < request.reference_round).sum())  # who was away when it was the point
        down += more * width * self.chains * self.d
        syncing = 0 if request.sync is None else int(request.sync.sum())
        if request.active is None:
            up = sends * self.uplink.bits(self.chains, syncing, self.d, self.dtype)
            return Traffic(up, down, sends * width * self.chains * self.d)
        active = request.active.cpu()
        sync = torch.zeros(self.chains, dtype=torch.bool) if request.sync is None else request.sync.cpu()
        chains = int((active.sum(-1) * attempts).sum())
        dense = int(((active & sync).sum(-1) * attempts).sum())
        return Traffic(self.uplink.bits(chains, dense, self.d, self.dtype), down, chains * width * self.d)
