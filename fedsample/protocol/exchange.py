"""One round between a server and its clients: what is asked, and what comes back as sums over clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from fedsample.compression import Packet
from fedsample.targets.metric import Metric

ESTIMATE = "estimate"  # the uplink estimator's upload
EXACT = (
    "value",
    "gradient",
    "hvp",
    "squared_hvp",
    "cubed_hvp",
    "squared_gradient",
    "gradient_variance",
    "hessian",
    "diagonal",
    "factors",
)


@dataclass(frozen=True)
class Request:
    """What the server asks of its clients.

    Attributes:
        round: 1, 2, ... for rounds of a chain; 0 while the run is being prepared.
        points: (C, d) in the coordinates of the metric that the clients hold.
        outputs: `ESTIMATE` and / or names from `EXACT`, which are sent uncompressed.
        previous: (C, d) the points of the round before, where the estimator needs them.
        sync: (C,) bool, chains that want dense uploads; None: none.
        active: (n, C) bool, which client is asked for which chain; None: all. Exact outputs are asked of everyone.
        applied: (n,) int64, the last round in which each client's upload was applied (0: never); None: never.
        epoch: the server's memory epoch.
        vector: (C, d), for products with the Hessian.
        observe: whether norms of single uploads are wanted, for monitoring.
        reference, reference_round: (C, d) the point about which clients reduce the variance of their minibatches, and
            the round whose points it was (0: the origin of the metric's coordinates); None: they do not.
        increment: makes what leads from the points of the round before to these, where they come back compressed.
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
    """What came back.

    Attributes:
        total: (C, d) sum of the decoded uploads that arrived; None unless an estimate was asked for.
        sums: exact sums over all clients, by name.
        arrived: (n,) bool, whose upload was applied.
        arrival: probability with which an upload that was asked for arrives in such a round.
        traffic: bits on the wire, summed over clients.
        norms: (n,) root mean square over chains of the norm of each upload, where it was asked for.
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
        down: received by clients (each one counted: a broadcast costs the server a share of it).
        up_dense: what `up` would have been without compression, for the same replies.
    """

    up: int = 0
    down: int = 0
    up_dense: int = 0

    def plus(self, other: Traffic) -> Traffic:
        """The sum of two counts."""
        return Traffic(self.up + other.up, self.down + other.down, self.up_dense + other.up_dense)


class Fleet(Protocol):
    """Where the clients run."""

    n: int

    def exchange(self, request: Request) -> Aggregate:
        """One round trip to the clients."""
        ...

    def set_metric(self, metric: Metric) -> Traffic:
        """Send m and S to every client; from now on points are in its coordinates."""
        ...

    def blocks(self) -> list[Tensor]:
        """Flat positions (out, in) of the model's parameter matrices, for Kronecker factors."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Back to a `state`."""
        ...
