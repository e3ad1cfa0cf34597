"""Recovery when clients die and come back: snapshots, rollback and forks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Recovers(Protocol):
    """A fleet whose clients keep their own memories, and may come back without them.

    Attributes:
        snapshot_rounds: rounds between snapshots of all clients.
    """

    snapshot_rounds: int

    def keep(self, rounds: Callable[[], list[int]]) -> None:
        """Call once sampling starts: clients now hold state. `rounds` lists the snapshots the server can restore."""
        ...

    def common(self, kept: Sequence[int]) -> int | None:
        """The latest of the server's snapshots that all clients with any snapshot have; None: no client has one."""
        ...

    def rewind(self, round: int) -> list[int]:
        """Return all clients to a snapshot -> those that had none, and start with an empty memory."""
        ...

    def resume_without(self, lost: Sequence[int]) -> list[int]:
        """Continue without going back, `lost` and other newcomers with an empty memory -> all of these."""
        ...

    def scalars(self) -> dict[str, float]:
        """Metrics of the connections: bytes, latencies, late and failed counts."""
        ...

    def score(self, draws: Tensor, round: int) -> dict[str, float]:
        """Add draws (S, d), in the model's parameters -> scores of the predictions of all draws so far."""
        ...


class Rollback(Exception):
    """The run has to return to a snapshot.

    Attributes:
        round: the snapshot's round.
        client: the client whose return requires it.
    """

    def __init__(self, round: int, client: int) -> None:
        super().__init__(f"client {client} is back without its memory: everyone goes back to round {round}")
        self.round, self.client = round, client


class Abandoned(Exception):
    """Waiting for clients was given up because the run is to stop."""


class Fork(Exception):
    """The chain continues from where it is, though some clients have lost their memories.

    Attributes:
        clients: those that have lost their memories.
    """

    def __init__(self, clients: Sequence[int]) -> None:
        super().__init__(f"clients {list(clients)} are back, and have lost their memory for good")
        self.clients = list(clients)
