"""What a fleet can do, and say, when clients die and come back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Recovers(Protocol):
    """A fleet whose clients keep their own memories, and may come back without them.

    Attributes:
        snapshot_rounds: rounds from one snapshot of everyone to the next.
    """

    snapshot_rounds: int

    def keep(self, rounds: Callable[[], list[int]]) -> None:
        """From now on there is a memory to lose; `rounds` tells which snapshots the server can go back to."""
        ...

    def common(self, kept: Sequence[int]) -> int | None:
        """The latest of the server's snapshots that every client has which has any; None: nobody has one."""
        ...

    def rewind(self, round: int) -> list[int]:
        """Everyone back to a snapshot -> who had none, and begins with an empty memory."""
        ...

    def resume_without(self, lost: Sequence[int]) -> list[int]:
        """Everyone goes on from where they are, `lost` and other newcomers with an empty memory -> who that is."""
        ...

    def scalars(self) -> dict[str, float]:
        """Curves about the connections: bytes, latencies, late and failed counts."""
        ...

    def score(self, draws: Tensor, round: int) -> dict[str, float]:
        """How good the predictions of all draws so far are, after these (S, d) in the model's parameters."""
        ...


class Rollback(Exception):
    """The run has to go back to a snapshot.

    Attributes:
        round: of the snapshot.
        client: whose return asks for it.
    """

    def __init__(self, round: int, client: int) -> None:
        super().__init__(f"client {client} is back without its memory: everyone goes back to round {round}")
        self.round, self.client = round, client


class Abandoned(Exception):
    """A wait for clients was given up because the run is to stop."""


class Fork(Exception):
    """The chain goes on from where it is, though some clients have lost what they remembered.

    Attributes:
        clients: who.
    """

    def __init__(self, clients: Sequence[int]) -> None:
        super().__init__(f"clients {list(clients)} are back, and have lost their memory for good")
        self.clients = list(clients)
