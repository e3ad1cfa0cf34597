"""Clients behind a Flower Grid: one message to each client that is asked, one reply from each.

Clients are identified by their partition, whatever node they run on: the first exchange asks every node for its
partition. Replies arrive in any order and are summed in client order, by the same tree as in every fleet, so the draws
are those of `LocalFleet` with its by-client engine, bit for bit.

If a reply does not come in time, the probability that one comes is unknown, and an estimate scaled by a wrong one
targets another posterior. So a round waits for all clients it asked and then stops with the names of those missing,
unless the caller states the probability; then a client that does not answer is absent, if the estimator allows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from flwr.app import Message
from torch import Tensor

from fedsample import protocol
from fedsample.errors import RunDirectoryError
from fedsample.fleets.flower.roster import Roster
from fedsample.fleets.remote import Dispatch, Federation, RemoteFleet
from fedsample.protocol.exchange import ESTIMATE, Aggregate, Request, Traffic
from fedsample.protocol.wire import Parcel, header, pack_tensors, unpack_tensors
from fedsample.targets import Metric

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fedsample.config import Experiment
    from fedsample.estimators import Links
    from fedsample.targets import Clients

TIMEOUT = 3600.0


class FlowerFleet(RemoteFleet):
    """A federation of Flower ClientApps made by `fedsample.clients.app.client_app`.

    Args:
        grid: the grid of a running ServerApp.
        federation: the clients and their links.
        timeout: seconds to wait for replies.
    """

    def __init__(self, grid: Grid, federation: Federation, *, timeout: float = TIMEOUT) -> None:
        super().__init__(federation)
        self.grid, self.timeout = grid, timeout
        like = self.like
        terms = protocol.terms(self.uplink, federation.seed, self.n, self.chains, len(like), like.dtype)
        self.roster = Roster(grid, self.n, terms, timeout)
        self.fresh = False  # whether clients hold a metric but no memory yet

    # --- the Fleet protocol --------------------------------------------------------------------------------------

    def exchange(self, request: Request) -> Aggregate:
        """Make one round trip.

        Raises:
            ClientError: if a client failed.
            QuorumError: if one did not answer.
        """
        content, dispatch = self.dispatch(request)
        return self.gather(dispatch, self.grid.send_and_receive(content, timeout=self.timeout))

    def set_metric(self, metric: Metric) -> Traffic:
        """Send m and S to every client, which discards what it remembered in other coordinates."""
        parcel = protocol.pack_metric(metric)
        self.roster.broadcast(protocol.METRIC, [parcel] * self.n)
        self.tag, self.fresh = protocol.metric_tag(parcel), True
        self.forget()
        return Traffic(down=self.n * parcel.bits)

    def holds(self, metric: Metric) -> bool:
        """Whether all clients hold this metric, from this fleet or from an earlier one in the same run."""
        tag = protocol.metric_tag(protocol.pack_metric(metric))
        if not self.tag and set(self.roster.tags) == {tag}:
            self.tag = tag
        return self.tag == tag

    def state(self) -> dict[str, Tensor]:
        """Fetch the clients' memories, stacked over clients, for the checkpoints of a simulation."""
        like = self._memory()
        if not like:
            return {}
        replies = self.roster.broadcast(protocol.SAVE, [Parcel(header())] * self.n)
        stacks = [unpack_tensors(reply.arrays, like, f"client {i}") for i, reply in enumerate(replies)]
        return {f"memory.{name}": torch.cat([stack[name] for stack in stacks]) for name in like}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state` on every client; the points are sent again."""
        like = self._memory()
        if missing := [name for name in like if f"memory.{name}" not in state]:
            raise RunDirectoryError(f"the checkpoint lacks the clients' memory {missing[0]!r}: it is of another uplink")
        if like:
            rows = [{name: state[f"memory.{name}"][i : i + 1] for name in like} for i in range(self.n)]
            self.roster.broadcast(protocol.RESTORE, [Parcel(header(), pack_tensors(row)) for row in rows])
        self.fresh = False
        self.forget()

    def _memory(self) -> dict[str, Tensor]:
        return self.uplink.memory((1, self.chains, len(self.like)), self.like.dtype, self.like.device)

    # --- a round in two halves, between which Flower carries the messages ----------------------------------------

    def dispatch(self, request: Request, kind: str | None = None) -> tuple[list[Message], Dispatch]:
        """Make the messages of a round, of a given Flower type, and the record that `gather` needs.

        Raises:
            DivergenceError: if the points are not finite.
        """
        parcels, dispatch = self.compose(request)
        if ESTIMATE in request.outputs:
            self.fresh = False
        kind = kind or (protocol.TRAIN if ESTIMATE in request.outputs else protocol.EXACT_QUERY)
        return self.roster.send(parcels, kind, str(request.round)), dispatch

    def gather(self, dispatch: Dispatch, replies: Iterable[Message]) -> Aggregate:
        """Sum the replies over clients.

        Raises:
            ClientError: if a client failed.
            QuorumError, DataError: see `RemoteFleet.collect`.
        """
        return self.collect(dispatch, self.roster.sort(replies, dispatch.request.round).items())

    def _allow_missing(self, missing: list[int], request: Request) -> None:
        if self.arrival is None or ESTIMATE not in request.outputs or self._whole(request):
            raise self.roster.quorum(missing, f"round {request.round}" if request.round else "preparation")


def fleet_on(grid: Grid, experiment: Experiment, clients: Clients, links: Links) -> FlowerFleet:
    """Make the fleet of an experiment on the grid of a running ServerApp."""
    return FlowerFleet(grid, Federation.of(experiment, clients, links))
