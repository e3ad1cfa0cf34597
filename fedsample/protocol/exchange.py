"""One round between a server and its clients: a request, and the answers as sums over clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from fedsample.compression import Packet
from fedsample.targets.metric import Metric

ESTIMATE = "estimate"  # the uplink estimator's upload


@dataclass(frozen=True)
class Request:
    """A server's request to its clients.

    Attributes:
        round: 1, 2, ... for rounds of a chain; 0 while the run is being prepared.
        points: (C, d) in the coordinates of the metric that the clients hold.
        outputs: `ESTIMATE` and / or names from `quantities.QUANTITIES`, which are sent uncompressed.
        previous: (C, d) the points of the round before, if the estimator needs them.
        sync: (C,) bool, chains that want dense uploads; None: none.
        active: (n, C) bool, which client is asked for which chain; None: all. Exact outputs are asked of all clients.
        applied: (n,) int64, the last round in which each client's upload was applied (0: never); None: never.
        epoch: the server's memory epoch.
        vector: (C, d), for products with the Hessian.
        observe: whether to return the norms of single uploads, for monitoring.
        reference: (C, d) the point for variance reduction of the clients' minibatches; None: no variance reduction.
        reference_round: the round whose points the reference was; 0: the origin of the metric's coordinates.
        increment: makes the increment from the points of the round before to these, if the downlink compresses.
    """

    round: int
    points: Tensor
    outputs: frozenset[str]
    previous: Tensor | None = None
    sync: Tensor | None = None
    active: Tensor | None = None
    applied: Tensor | None = None
    epoch: int = 0
    vector: Tensor | None = None
    observe: bool = False
    reference: Tensor | None = None
    reference_round: int = 0
    increment: Callable[[], Packet] | None = None


@dataclass(frozen=True)
class Aggregate:
    """The result of one round.

    Attributes:
        total: (C, d) sum of the decoded uploads that arrived; None unless an estimate was asked for.
        sums: exact sums over all clients, by name.
        arrived: (n,) bool, clients whose upload was applied.
        arrival: probability with which an upload that was asked for arrives.
        traffic: bits on the wire, summed over clients.
        norms: (n,) root mean square over chains of the norm of each upload, if asked for.
    """

    total: Tensor | None
    sums: dict[str, Tensor]
    arrived: Tensor
    arrival: float
    traffic: Traffic
    norms: Tensor | None = None


class Traffic(NamedTuple):
    """Bits on the wire, summed over clients; headers not included.

    Attributes:
        up: sent by clients.
        down: received by clients; a broadcast counts once per client, though it may cost the server less.
        up_dense: what `up` would be without compression, for the same replies.
    """

    up: int = 0
    down: int = 0
    up_dense: int = 0

    def plus(self, other: Traffic) -> Traffic:
        """The sum of two counts."""
        return Traffic(self.up + other.up, self.down + other.down, self.up_dense + other.up_dense)


class Fleet(Protocol):
    """A set of clients that answers requests."""

    n: int

    def exchange(self, request: Request) -> Aggregate:
        """Make one round trip to the clients."""
        ...

    def set_metric(self, metric: Metric) -> Traffic:
        """Send m and S to every client; from now on points are in the metric's coordinates."""
        ...

    def blocks(self) -> list[Tensor]:
        """Flat positions (out, in) of the model's parameter matrices, for Kronecker factors."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return everything that a resumed run needs, as tensors."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a `state`."""
        ...
