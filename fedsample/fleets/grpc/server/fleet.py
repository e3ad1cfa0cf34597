"""A federation of devices over gRPC streams, as a `Fleet`: the same draws as in one process.

During preparation a newcomer is told what the others know and then asked what they are asked. Once the chain runs, a
device that comes back without its memory returns all to the last snapshot that all have (`Rollback`), and the rounds
since are replayed, which is exact because every draw is keyed. One that has lost its snapshots too forks the chain
(`Fork`): another path with the same law.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedsample import protocol
from fedsample.errors import QuorumError
from fedsample.fleets.grpc.server.dispatcher import SLACK, Dispatcher
from fedsample.fleets.grpc.server.hub import Hub
from fedsample.fleets.grpc.server.stream import Stream
from fedsample.fleets.remote import Federation, RemoteFleet
from fedsample.monitor.tensorboard import quantiles
from fedsample.numerics.tree_sum import TreeSum
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request, Traffic
from fedsample.protocol.names import REWIND, SCORE, SNAPSHOT
from fedsample.protocol.recovery import Fork, Rollback
from fedsample.protocol.wire import Header, Parcel, header, pack_tensors
from fedsample.targets import Metric

if TYPE_CHECKING:
    from fedsample.config import Experiment
    from fedsample.estimators import Links
    from fedsample.targets import Clients


class GrpcFleet(RemoteFleet):
    """The devices of a run.

    Args:
        dispatcher: asks the devices.
        federation: the clients and their links.
        deadline: seconds to wait for all clients before `quorum` answers suffice; None: none.
        quorum: number of answers after which a round goes on; None: all.
        snapshot_rounds: see `Recovers`.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        federation: Federation,
        *,
        deadline: float | None = None,
        quorum: int | None = None,
        snapshot_rounds: int = 500,
    ) -> None:
        """Start with devices that have been sent the setup."""
        super().__init__(federation)
        self.dispatcher, self.hub, self.deadline = dispatcher, dispatcher.hub, deadline
        self.quorum = self.n if quorum is None else quorum
        self._kept: Callable[[], list[int]] = list
        self.snapshot_rounds = snapshot_rounds
        self.scores: Callable[[Tensor], dict[str, float]] = lambda counts: {}
        self._round = self._mark = 0
        self._counting = False  # whether the counts of an earlier server have been added
        d, dtype = len(self.like), self.like.dtype
        uploads = [self.uplink.bits(self.chains, dense, d, dtype) for dense in (0, self.chains)]
        self._upload = max(uploads) // 8

    # --- the Fleet protocol --------------------------------------------------------------------------------------

    def exchange(self, request: Request) -> Aggregate:
        """Make one round trip.

        Raises:
            Rollback, Fork: if a device has come back without its memory.
            ClientError: if one failed.
        """
        parcels, dispatch = self.compose(request)
        kind = protocol.TRAIN if ESTIMATE in request.outputs else protocol.EXACT_QUERY
        allows_stragglers = self._allows_stragglers(request)
        answers = self.dispatcher.ask(
            kind, parcels, request.round, self._limit(request),
            deadline=self.deadline if allows_stragglers else None,
            quorum=self.quorum if allows_stragglers else None,
        )  # fmt: skip
        with closing(answers):
            aggregate = self.collect(dispatch, answers)
        self._round = request.round
        return aggregate

    def set_metric(self, metric: Metric) -> Traffic:
        """Send m and S to every device, which discards what it remembered in other coordinates."""
        parcel = protocol.pack_metric(metric)
        self.tag = protocol.metric_tag(parcel)
        self.forget()
        self.dispatcher.told = [each for each in self.dispatcher.told if each[0] != protocol.METRIC]
        self.dispatcher.tell(protocol.METRIC, parcel)
        return Traffic(down=self.n * parcel.bits)

    def state(self) -> dict[str, Tensor]:
        """Let every device take a snapshot of its memory; return which client holds which points.

        Both carry a random mark: a snapshot of the same round may be of a path that the run has abandoned.
        """
        self._mark = secrets.randbits(62)
        self.dispatcher.broadcast(SNAPSHOT, Parcel(header(mark=self._mark)), self._round)
        self._counting = True
        counts = torch.tensor([record.counts for record in self.hub.records])
        return self.links_state() | {"mark": torch.tensor(self._mark), "counts": counts}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state`, see `rewind`."""
        self.restore_links(state)
        self._mark = int(state["mark"])
        if not self._counting and "counts" in state:  # of the server before this one; replayed traffic is counted again
            self.hub.recount(state["counts"].tolist())
        self._counting = True

    # --- going back -----------------------------------------------------------------------------------------------

    def keep(self, rounds: Callable[[], list[int]]) -> None:
        """Call once sampling starts: clients now hold state. `rounds` lists the snapshots the server can restore."""
        self._kept = rounds
        self.dispatcher.welcome = self._welcome

    def common(self, kept: Sequence[int]) -> int | None:
        """The latest of the server's snapshots that all devices with any snapshot have; None: no device has one."""
        held = []
        for record in self.hub.records:
            ready = record.ready
            mine = set() if ready is None or ready.run != self.hub.invitation.run else set(ready.snapshots) & set(kept)
            held += [mine] if mine else []
        return max(set.intersection(*held), default=None) if held else None

    def rewind(self, round: int) -> list[int]:
        """Return all devices to a snapshot -> those that had none, and start with an empty memory."""
        self._round = round
        lost = self._regroup(round, live=False)
        for client in lost:
            self.lost(client)
        return lost

    def resume_without(self, lost: Sequence[int]) -> list[int]:
        """Continue without going back, `lost` and other newcomers with an empty memory -> all of these."""
        gone = sorted({*lost, *self._regroup(self._round, live=True)})
        self.forget()
        return gone

    def _regroup(self, round: int, *, live: bool) -> list[int]:
        """Start a new term, with all devices connected and at a round; return those that do not remember it."""
        parcel = Parcel(header(live=True) if live else header(live=False, mark=self._mark))
        fresh: set[int] = set()
        again = True

        def welcome(client: int) -> None:
            nonlocal again
            fresh.add(client)
            again = again or self.hub.records[client].asked is None  # its answer was of a process that has ended
            self.dispatcher.equip(client)

        while again:
            again = False
            self.hub.term += 1
            replies = self.dispatcher.broadcast(REWIND, parcel, round, welcome=welcome)
        lost = [i for i, reply in enumerate(replies) if Header(reply, "a rewind").value("held") is not True]
        return sorted({*lost, *fresh}) if live else lost

    # --- who comes ------------------------------------------------------------------------------------------------

    def _welcome(self, client: int) -> None:
        """Handle a newcomer while the chain runs.

        Raises:
            Rollback, Fork: always.
        """
        self.hub.newcomers.put(client)  # it is dealt with later
        ready = self.hub.records[client].ready
        mine = set(self._kept()) & set(ready.snapshots if ready and ready.run == self.hub.invitation.run else ())
        if mine:
            raise Rollback(max(mine), client)
        raise Fork([client])

    def _limit(self, request: Request) -> int:
        """Largest size in bytes of an answer to a request."""
        upload = self._upload if ESTIMATE in request.outputs else 0
        return sum(-(-form.bits // 8) for form in self._forms(request).values()) + upload + SLACK

    def _allows_stragglers(self, request: Request) -> bool:
        """Whether a round may go on without slow devices."""
        return ESTIMATE in request.outputs and self.quorum < self.n and not self._whole(request)

    def _allow_missing(self, missing: list[int], request: Request) -> None:
        if not self._allows_stragglers(request):
            raise QuorumError(
                f"round {request.round}: clients {missing} of {self.n} did not answer, and the round needs everyone"
            )

    # --- monitoring -----------------------------------------------------------------------------------------------

    def score(self, draws: Tensor, round: int) -> dict[str, float]:
        """Let every device add draws (S, d), in the model's parameters, to the predictions of its held-out rows."""
        counts = sums_of(
            self.dispatcher.broadcast(SCORE, Parcel(header(), pack_tensors({"draws": draws})), round), "counts"
        )
        return self.scores(counts)

    def scalars(self) -> dict[str, float]:
        """Bytes on the wire per device, latencies, and counts of late and failed answers."""
        records = self.hub.records
        times = torch.tensor([each for record in records for each in record.latencies], dtype=torch.float64)
        result = {
            "comm/wire_up_bytes/payload": sum(record.received[0] for record in records) / self.n,
            "comm/wire_up_bytes/framing": sum(record.received[1] - record.received[0] for record in records) / self.n,
            "comm/wire_down_bytes/payload": sum(record.sent[0] for record in records) / self.n,
            "comm/wire_down_bytes/framing": sum(record.sent[1] - record.sent[0] for record in records) / self.n,
            "fleet/late": float(sum(record.late for record in records)),
            "fleet/failed": float(sum(record.failed for record in records)),
            "fleet/reconnections": float(sum(max(0, record.connections - 1) for record in records)),
        }
        return result | (quantiles("time/latency", times) if len(times) else {})


def gather(hub: Hub) -> dict[int, str]:
    """Wait until every device is connected -> their schemas."""
    here: dict[int, tuple[Stream, str]] = {}

    def welcome(client: int) -> None:
        record = hub.records[client]
        if record.stream is not None and record.ready is not None:
            here[client] = record.stream, record.ready.schema

    def missing() -> list[int]:
        return [
            record.client
            for record in hub.records
            if record.client not in here or record.stream is not here[record.client][0]
        ]

    hub.gather(missing, welcome)
    hub.term = 1 + max([hub.term, *(record.ready.term for record in hub.records if record.ready is not None)])
    for client, (stream, _) in here.items():
        hub.accept(client, stream)
    return {client: here[client][1] for client in sorted(here)}


def sums_of(replies: Iterable[Parcel], name: str) -> Tensor:
    """Sum a vector over devices, in client order."""
    total = TreeSum()
    for reply in replies:
        total.add(protocol.unpack_vector(reply, name, "sums over clients"))
    return total.total()


def fleet_on(dispatcher: Dispatcher, experiment: Experiment, clients: Clients, links: Links) -> GrpcFleet:
    """Make the fleet of an experiment's devices, once the data are agreed on."""
    section = experiment.fleet
    share = section.quorum
    quorum = share if isinstance(share, int) else math.ceil(share * clients.n)
    federation = Federation.of(experiment, clients, links, arrival=1 - section.loss)
    return GrpcFleet(
        dispatcher, federation, deadline=section.deadline, quorum=quorum, snapshot_rounds=section.snapshot_rounds
    )
